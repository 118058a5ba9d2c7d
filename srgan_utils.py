"""SRGAN for faces (Ledig et al. 2017, arXiv:1609.04802) in one file. Read it top to bottom.

     1 Config           every number that a run depends on, and the presets
     2 Runtime          device, precision, seeds, files, Colab and Drive
     3 Pixels           save, resize, round
     4 Models           generator, discriminator, VGG features
     5 Losses           pixel, content, adversarial
     6 Updates          the networks of a run in memory, and one update of each
     7 Metrics          PSNR, SSIM, LPIPS, sharpness, checkerboard index
     8 Sources          any photo read; a folder, a zip, CelebA, portraits, drawn faces
     9 Faces            `prepare`, `FaceStore`, the split, batches
    10 Files of a run   checkpoints, the copy on Drive, generators
    11 Inference        `upscale`: any photo, tile by tile; `enlarge`: by any factor
    12 Evaluation       one row per image, bicubic and HR beside it
    13 Figures          rows of panels, before/after, curves
    14 Training         `train`, and the report reproduced
    15 Notebook aids    source code, the live view, uploads, the upscale factor by hand
    16 Command line     `main`

A section uses only the sections above it. Names without an underscore are for the notebooks.
lr, sr, hr are low-resolution, super-resolved and high-resolution *images* (never the learning
rate): float32 (N, 3, H, W), RGB, in [0, 1], unless a docstring says otherwise. `scale` is what
people call the upscale factor, `update` one step of the optimisers. §, Eq. and Fig. refer to the
paper above; "the report" is the course project that this one began as.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import csv
import difflib
import filecmp
import glob
import hashlib
import html
import io
import itertools
import json
import math
import mimetypes
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

# --------------------------------------------------------------------------------------------------
# 1. Config: every number that a run depends on
# --------------------------------------------------------------------------------------------------


def _suggest(word: str, words: Sequence[str]) -> str:
    """The end of an error message: the nearest of `words`, or all of them where none is near."""
    close = difflib.get_close_matches(word, words, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(words)}"


# From where to where a number may go; from 0 to 10^9, where none stands here
_RANGES = {
    "crop": (16, 178), "hr_size": (16, 1024), "patch_size": (16, 1024), "vgg_window": (16, 1024),
    "channels": (4, 512), "residual_blocks": (1, 64), "batch_norm": (0, 1), "dilation": (1, 16),
    "batch_size": (1, 4096), "learning_rate": (1e-8, 1), "pretrain_learning_rate": (1e-8, 1),
    "beta1": (0, 0.9999), "beta2": (0, 0.999999), "ema": (0, 0.999999), "seed": (0, 2**32 - 1),
    "save_steps": (1, 1e9), "save_minutes": (0.01, 1e6), "sample_steps": (1, 1e9),
}


def _checked(name: str, hint: type, value):
    """`value`, or its text on a command line, as field `name` of type `hint`; else ValueError."""
    text, kinds = str(value), get_args(hint) or (hint,)
    if hint is str:
        return text
    if type(None) in kinds and text.lower() == "none":
        return None
    if kinds[0] not in (int, float):  # a bool, or a Literal
        choices = {str(choice).lower(): choice for choice in get_args(hint) or (True, False)}
        if text.lower() not in choices:
            word = text if re.search("[a-z]", text) else ""  # no number is near another's name
            raise ValueError(f"{name}={text}: {_suggest(word, list(choices))}")
        return choices[text.lower()]
    low, high = _RANGES.get(name, (0, 1e9))
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not low <= number <= high or (kinds[0] is int and number % 1):
        kind = "a whole number" if kinds[0] is int else "a number"
        raise ValueError(f"{name}={text} must be {kind} from {low:.12g} to {high:.12g}")
    return kinds[0](number)


# Ledig et al.: 10^6 updates of pre-training and 2 x 10^5 adversarial ones on 350,000 images, as
# epochs, so that they scale with the data (§3.2). Our own: ImageNet-normalised inputs, a final
# tanh, mirrored faces
_PAPER = dict(
    crop=178, hr_size=128, patch_size=96, channels=64, residual_blocks=16, dilation=1, taper=False,
    kernel_size=9, batch_norm=0.1, upsampling="shuffle", icnr=False, skip=False, output="tanh",
    discriminator="dense", distance="mse", vgg_layers="relu5", vgg_rescale=12.75, vgg_window=None,
    pixel_weight=0, adversarial="bce", adversarial_weight=1e-3, ramp_steps=0, batch_size=16,
    learning_rate=1e-4, discriminator_rate=1, pretrain_learning_rate=1e-4, beta2=0.999, ema=0,
    warmup_steps=0, decay="step", pretrain_steps=None, steps=None, pretrain_epochs=46, epochs=9,
)
# The course report: 20,000 faces of CelebA (`prepare celeba --limit 20000`). Its code ran in fp32;
# `precision=fp32` does so here. Where its text and its code differ, this follows the text: LR comes
# from the HR of 256 px (its code took the crop of 144), 3 epochs (its code said 50, and was
# stopped), evaluation by running statistics, one bicubic for all
_REPORT = _PAPER | dict(
    crop=144, hr_size=256, patch_size=None, flip=False, residual_blocks=5, batch_norm=0.8,
    shared_upsampling=True, output="report", distance="l1", vgg_layers="pool3", vgg_rescale=1,
    adversarial="least_squares", batch_size=8, learning_rate=1e-5, pretrain_learning_rate=4e-4,
    beta1=0.5, decay="none", pretrain_steps=0, pretrain_epochs=0, epochs=3,
)
_DEMO = dict(  # minutes on two CPU cores, without VGG
    hr_size=96, patch_size=48, channels=32, residual_blocks=4, dilation=1, taper=False, ema=0.99,
    content="pixel", adversarial_weight=0.02, ramp_steps=100, batch_size=16, learning_rate=1e-4,
    pretrain_learning_rate=1e-3, pretrain_steps=1_600, steps=250, save_steps=500, sample_steps=200,
)
_PRESETS = {"report": _REPORT, "paper": _PAPER, "sharp": {}, "demo": _DEMO}


@dataclass
class Config:
    """Every number that a run depends on; by default `sharp` at 4x. ValueError if impossible."""

    preset_name: Literal["report", "paper", "sharp", "demo"] = "sharp"  # what the rest started from
    scale: Literal[2, 4, 8, 16] = 4   # the upscale factor; each stage of the network doubles

    # Pixels: HR is the centre `crop` of a 178-px face, resized to `hr_size`; LR is HR / scale
    crop: int = 176
    hr_size: int = 176                # px; a multiple of scale, and of 16 for a dense discriminator
    patch_size: int | None = None     # px of HR that one update sees; None: the whole face (§3.2)
    flip: bool = True                 # mirror half of the faces
    degrade: bool = False             # LR as the web makes it: see `web_copy`

    # Generator (Fig. 4)
    channels: int = 96
    residual_blocks: int = 12
    dilation: int = 4                 # of every third block: few blocks then see the whole face
    taper: bool = True                # channels halve at each doubling, to 16 at least
    kernel_size: Literal[3, 5, 7, 9] = 3  # of the first and the last convolution
    batch_norm: float = 0.0           # momentum; 0: none (a dense discriminator then keeps 0.1)
    shared_upsampling: bool = False   # one up-sampling block applied log2(scale) times (report)
    upsampling: Literal["shuffle", "blur"] = "blur"   # see `UpsampleBlock`
    icnr: bool = True                 # start the pixel shuffle free of checkerboard
    skip: bool = True                 # the network adds detail to a bicubic enlargement
    output: Literal["report", "tanh", "linear"] = "linear"      # see `Generator`
    discriminator: Literal["dense", "places"] = "places"        # see `Discriminator`

    # Losses: pixel_weight x pixel + content_weight x content + adversarial_weight x adversarial
    distance: Literal["l1", "mse"] = "l1"                  # of pixel and content loss
    content: Literal["pixel", "vgg"] = "vgg"               # pixel: the pixel loss alone
    content_weight: float = 1.0
    pixel_weight: float = 1.0
    vgg: str = "imagenet"             # VGG19's weights; random; or a file of VGG19's or VGG16's
    vgg_layers: str = "conv2,conv3,conv4"  # conv, relu or pool, and of which block: see VGGFeatures
    vgg_rescale: float = 0.0          # features are divided by it (§3.2); 0: by HR's own magnitude
    vgg_window: int | None = 80       # px of HR, anywhere, that VGG sees; None: all
    adversarial: Literal["least_squares", "bce"] = "least_squares"
    adversarial_weight: float = 0.3
    ramp_steps: int = 50              # adversarial updates over which that weight grows from 0

    # Optimiser: Adam, both networks
    batch_size: int = 8
    learning_rate: float = 2e-4
    discriminator_rate: float = 2.0   # the discriminator's learning rate over the generator's
    pretrain_learning_rate: float = 4e-4
    beta1: float = 0.9
    beta2: float = 0.99
    warmup_steps: int = 50            # updates at the start of each stage
    decay: Literal["none", "cosine", "step"] = "cosine"  # see `_learning_rate`
    decay_steps: int | None = None    # adversarial updates until then; None: `steps` at the start
    ema: float = 0.995                # moving average of the generator in each stage; 0: none

    # Length. `steps` counts adversarial updates, `pretrain_steps` those before; None: by epochs
    pretrain_steps: int | None = 16_000
    steps: int | None = 4_000
    pretrain_epochs: float = 0.0
    epochs: float = 0.0

    # How it runs
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # resolved when the run begins
    seed: int = 0
    save_steps: int = 1_000           # a checkpoint after so many updates, and after so long
    save_minutes: float = 10.0
    sample_steps: int = 500           # updates between two sample strips

    def __post_init__(self):
        for name, hint in get_type_hints(Config).items():
            setattr(self, name, _checked(name, hint, getattr(self, name)))
        of = 16 if self.discriminator == "dense" else self.scale  # the dense one halves it 4 times
        for name, value in (("hr_size", self.hr_size), ("patch_size", self.patch)):
            if value % of:
                raise ValueError(f"{name}={value} is not a multiple of {of} px; the nearest "
                                 f"that is: {round(value / of) * of}")
        if not re.fullmatch("((conv|relu|pool)[1-5],)+", self.vgg_layers + ","):
            raise ValueError(f"vgg_layers={self.vgg_layers}: name conv, relu or pool and a block "
                             "from 1 to 5, as in conv2,conv3")

    @classmethod
    def preset(cls, name: str, **changes) -> Config:
        """The preset `name` (report, paper, sharp or demo) with `changes`."""
        return cls.from_dict({"preset_name": name} | _PRESETS.get(name.lower(), {}), **changes)

    @classmethod
    def from_dict(cls, values: dict, **changes) -> Config:
        """A Config of `values` with `changes`, whose epochs take the place of steps."""
        names = [item.name for item in fields(cls)]
        for name in values | changes:
            if name not in names:
                raise ValueError(f"there is no field {name!r}: {_suggest(name, names)}")
        for epochs, steps in (("epochs", "steps"), ("pretrain_epochs", "pretrain_steps")):
            if epochs in changes and values.get(epochs) != changes[epochs]:
                if changes.setdefault(steps) is not None:
                    raise ValueError(f"{epochs}={changes[epochs]} and {steps}={changes[steps]} "
                                     "both set one length: give one of them")
        return cls(**values | changes)

    @property
    def patch(self) -> int:
        """Side of the HR square that one update sees, px; at most `hr_size`."""
        return min(self.patch_size or self.hr_size, self.hr_size)

    @property
    def stages(self) -> int:
        """Doublings from LR to HR: log2(scale)."""
        return self.scale.bit_length() - 1

    @property
    def total_steps(self) -> int:
        """All updates, pre-training included; needs lengths in updates (`for_faces`)."""
        return self.pretrain_steps + self.steps

    def lasting(self, total: int) -> Config:
        """The same in about `total` updates, shared by the stages in proportion."""
        pretrain, steps = (max(1, round(total * count / self.total_steps)) if count else 0
                           for count in (self.pretrain_steps, self.steps))
        return replace(self, pretrain_steps=pretrain, steps=steps, decay_steps=steps)

    def for_faces(self, count: int) -> Config:
        """The same with epochs turned into updates, for a training split of `count` faces."""
        epoch, pretrain, steps = count / self.batch_size, self.pretrain_steps, self.steps
        pretrain = math.ceil(self.pretrain_epochs * epoch) if pretrain is None else pretrain
        steps = math.ceil(self.epochs * epoch) if steps is None else steps
        decay = steps if self.decay_steps is None else self.decay_steps
        return replace(self, pretrain_steps=pretrain, steps=steps, decay_steps=decay)


# --------------------------------------------------------------------------------------------------
# 2. Runtime: device, precision, seeds, files, Colab and Drive
# --------------------------------------------------------------------------------------------------


def pick_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _resolve_precision(precision: str, device: torch.device) -> str:
    """`fp32`, `bf16` or `fp16`: what `precision` (see `Config`) means on `device`."""
    if precision == "fp32":
        return "fp32"
    if device.type == "cuda":  # `is_bf16_supported()` says yes on a T4, which only emulates it
        modern = torch.cuda.get_device_capability(device)[0] >= 8
        return "bf16" if modern and precision != "fp16" else "fp16"
    native = any(getattr(torch.cpu, f"_is_{unit}_supported", bool)()
                 for unit in ("avx512_bf16", "amx_tile"))
    return "bf16" if native else "fp32"


def _autocast(precision: str, device: torch.device) -> torch.autocast:
    """torch.autocast for a resolved `precision`; none for fp32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def seeded(*numbers: int) -> torch.Generator:
    """A CPU random generator that is a function of `numbers` (a seed, an update, ...) alone."""
    low, high = np.random.SeedSequence(numbers).generate_state(2)
    return torch.Generator().manual_seed(int(high) << 32 | int(low))


def _environment() -> dict[str, str]:
    """What a result depends on besides its config: versions, device, threads."""
    return {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": str(torch.get_num_threads())}


def in_colab() -> bool:
    """Whether this is a Colab kernel. (`import google.colab` would succeed on Kaggle too.)"""
    shell = sys.modules.get("IPython")
    return shell is not None and "google.colab" in str(shell.get_ipython())


def _bar(*args, **options):
    """tqdm's text bar; in a notebook on standard output, since Jupyter paints the other red."""
    from tqdm import tqdm

    file = sys.stdout if "ipykernel" in str(type(sys.stderr)) else sys.stderr
    return tqdm(*args, **{"mininterval": 1, "file": file} | options)


def _one_line(error: object) -> str:
    """The text of an error in one line, without what would move a terminal's cursor."""
    text = " ".join(str(error).split())
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(0.0, seconds):.0f} s"
    return f"{seconds / 60:.2g} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _write_atomically(path: Path, data: bytes) -> None:
    """Write, flush, rename: `path` holds all of `data`, or what it held before."""
    partial = path.with_name(path.name + ".part")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def mount_drive() -> Path | None:
    """This project's folder on the user's Drive, or None without Drive; says which in one line."""
    if not in_colab():
        print("Google Drive: only in Colab; everything stays on this disk.")
        return None
    try:
        if not os.path.ismount("/content/drive"):  # else drive.mount would ask for consent again
            from google.colab import drive

            drive.mount("/content/drive")
        folder = Path("/content/drive/MyDrive/srgan")
        folder.mkdir(exist_ok=True)  # without its parents: where nothing is mounted, it fails
    except Exception as error:  # MessageError, pexpect's, KeyError: none may end a cell
        print(f"WARNING: no Google Drive ({type(error).__name__}: {_one_line(error)}). "
              "Checkpoints stay on this machine and are lost when the session ends.")
        return None
    print(f"Google Drive: {folder}")
    return folder


def _check_mounted(folder: Path) -> None:
    """OSError if `folder` lies below Colab's mount point while Drive is not mounted there."""
    mount, folder = Path("/content/drive"), Path(os.path.abspath(folder))
    if mount in [folder, *folder.parents] and not os.path.ismount(mount):
        raise OSError(f"{folder} is on Google Drive, which is not mounted: mount it first")


def workspace() -> Path:
    """Where stores and runs are on this disk: /content/srgan-work in Colab, else ./srgan-work."""
    folder = Path("/content/srgan-work" if in_colab() else "srgan-work")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# --------------------------------------------------------------------------------------------------
# 3. Pixels: save, resize, round
# --------------------------------------------------------------------------------------------------

def _to_tensor(pixels) -> Tensor:
    """8-bit pixels (H, W, 3) or (N, H, W, 3), or a Pillow image, as (N, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(pixels, ndmin=4)).permute(0, 3, 1, 2).float().div_(255)


def _to_pixels(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [0, 1] as uint8 (N, H, W, 3): clamped and rounded."""
    levels = images.detach().mul(255).round_().clamp_(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def save_image(image: Tensor, path: str | Path) -> None:
    """Write one image, (1, 3, H, W) or (3, H, W), as PNG or whatever the name's ending says."""
    from PIL import Image

    Image.fromarray(_to_pixels(image.reshape(1, *image.shape[-3:]))[0]).save(path)


def bicubic(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """`images` resized to `size` (a side, or height and width), neither clamped nor rounded.

    The one resize of this project. Antialiased it is Pillow's, with a = -0.5; else torch takes
    a = -0.75 and does not filter when it reduces: up to 0.7 dB from this baseline.
    """
    return F.interpolate(images, size=size, mode="bicubic", antialias=True)


def quantise(images: Tensor) -> Tensor:
    """Clamped to [0, 1] and rounded to 8-bit levels, as a file would hold them."""
    return images.mul(255).round_().clamp_(0, 255).div_(255)


def _is_grey(images: Tensor) -> Tensor:
    """Whether R, G, B of each image are within 1 level of each other everywhere, (N, 1, 1, 1)."""
    return (images.amax(1, True) - images.amin(1, True)).amax((2, 3), True) < 1.5 / 255


def _luma(images: Tensor) -> Tensor:
    """Y (N, 1, H, W) of images: (16 + 65.481 R + 128.553 G + 24.966 B) / 255 (ITU-R BT.601)."""
    weights = images.new_tensor([65.481, 128.553, 24.966]).view(1, 3, 1, 1)
    return ((images * weights).sum(1, keepdim=True) + 16) / 255


@lru_cache
def _imagenet(device: torch.device) -> Tensor:
    """Mean and deviation of ImageNet, (2, 1, 3, 1, 1), made once per device: a copy takes time."""
    values = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=device)
    return values.view(2, 1, 3, 1, 1)


def to_imagenet(images: Tensor) -> Tensor:
    """[0, 1] to ImageNet's mean and deviation, which VGG was trained with: about [-2.1, 2.6]."""
    mean, std = _imagenet(images.device)
    return (images - mean) / std


# --------------------------------------------------------------------------------------------------
# 4. Models: generator, discriminator, VGG features (§2.1, Fig. 4)
# --------------------------------------------------------------------------------------------------


def _norm(channels: int, momentum: float) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels, momentum=momentum)] if momentum else []


class ResidualBlock(nn.Module):
    """conv, (BatchNorm), PReLU, conv, (BatchNorm), + input: x (N, C, h, w) -> (N, C, h, w).

    There is no activation after the sum, so that the path from block to block stays linear.
    dilation: px between the taps of the first kernel, to see farther at the same cost.
    """

    def __init__(self, channels: int, batch_norm: float = 0.0, dilation: int = 1):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation),
            *_norm(channels, batch_norm), nn.PReLU(),
            nn.Conv2d(channels, channels, 3, padding=1), *_norm(channels, batch_norm),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class UpsampleBlock(nn.Module):
    """Twice the size, then PReLU: x (N, C, h, w) -> (N, out, 2h, 2w). `kind` says how:

    shuffle  conv to four times the channels, then pixel shuffle (§2.1.1). Each of the four phases
             of its output has filters of its own; where these differ, there is a checkerboard.
    blur     the same, then the kernel (1 2 1) x (1 2 1) / 16, which no pattern of period 2 passes
             (Sugawara et al. 2019). So would the mean of 2 x 2 px, but it moves all by half a px.

    icnr: start with four equal filters, so without a checkerboard (Aitken et al. 2017).
    """

    def __init__(self, channels: int, out: int, kind: str, icnr: bool):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(channels, 4 * out, 3, padding=1)
        self.shuffle, self.activation = nn.PixelShuffle(2), nn.PReLU()
        if icnr:
            with torch.no_grad():
                for values in (self.conv.weight, self.conv.bias):
                    values.copy_(values[::4].repeat_interleave(4, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.shuffle(self.conv(x)))
        if self.kind == "blur":
            box = x.new_full((1, 1, 2, 2), 0.25)
            binomial = F.conv2d(box, box, padding=1)  # (1 2 1) x (1 2 1) / 16
            x = F.conv2d(x, binomial.expand(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1])
        return x


def _dilations(config: Config) -> list[int]:
    """The dilation of each residual block: `config.dilation` in every third, 1 in the others."""
    return [config.dilation if number % 3 == 2 else 1 for number in range(config.residual_blocks)]


class Generator(nn.Module):
    """lr (N, 3, h, w) -> sr (N, 3, scale h, scale w), both in [0, 1]; any size (Fig. 4).

    Deep and wide where pixels are few; with `taper`, thin where they are many. sr is not clamped:
    a clamp would stop the gradients outside [0, 1].
    """

    def __init__(self, config: Config):
        super().__init__()
        channels, kernel, norm = config.channels, config.kernel_size, config.batch_norm
        self.scale, self.stages = config.scale, config.stages
        self.output, self.skip = config.output, config.skip
        self.true_to_lr = config.skip and not config.degrade  # see `super_resolve`
        self.head = nn.Sequential(nn.Conv2d(3, channels, kernel, padding=kernel // 2), nn.PReLU())
        self.blocks = nn.Sequential(*(
            ResidualBlock(channels, norm, dilation) for dilation in _dilations(config)))
        self.merge = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), *_norm(channels, norm))
        self.upsample, shared = nn.ModuleList(), config.shared_upsampling
        for _ in range(1 if shared else config.stages):
            tapers = config.taper and not shared  # what fits itself has one width
            out = max(channels // 2, min(channels, 16)) if tapers else channels
            self.upsample.append(UpsampleBlock(channels, out, config.upsampling, config.icnr))
            channels = out
        self.tail = nn.Conv2d(channels, 3, kernel, padding=kernel // 2)

    def forward(self, lr: Tensor) -> Tensor:
        shallow = self.head(to_imagenet(lr))                  # (N, C, h, w)
        x = shallow + self.merge(self.blocks(shallow))        # blocks learn what the head misses
        for stage in range(self.stages):
            x = self.upsample[stage % len(self.upsample)](x)  # (N, C, 2h, 2w) each time
        x = self.tail(x).float()                              # (N, 3, scale h, scale w)
        if self.output == "report":  # spans black and white, normalised as ImageNet is
            mean, std = _imagenet(x.device)
            return (2.38 * torch.tanh(x) + 0.26) * std + mean
        if self.output == "tanh":
            x = (torch.tanh(x) + 1) / 2
        if self.skip:
            x = x + bicubic(lr, (lr.shape[-2] * self.scale, lr.shape[-1] * self.scale))
        return x


def _spectral(*args: int, padding: int = 1) -> nn.Sequential:
    """`nn.Conv2d` with its slope bounded, which keeps its gradients useful (arXiv:1802.05957)."""
    conv = nn.Conv2d(*args, padding=padding)
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(conv), nn.LeakyReLU(0.2))


class Discriminator(nn.Module):
    """images (N, 3, H, W), lr -> verdicts, higher for what it takes for real; no sigmoid.

    dense: the network of Fig. 4, for patches of `config.patch` px. One verdict, (N, 1), without lr.
    places: any size. One verdict for each place, (N, 1, H / 8, W / 8), and one for the whole,
    (N, 1). It sees the bicubic enlargement of lr beside each image: is it the detail of *this*
    face? Each stride divides its kernel, so that no grid comes in through the gradient.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.kind, self.layers = config.discriminator, nn.Sequential()
        if self.kind == "places":
            for shape in ((6, 48, 4, 2), (48, 96, 4, 2), (96, 192, 4, 2), (192, 192, 3, 1)):
                self.layers.append(_spectral(*shape))  # channels in and out, kernel, stride
            self.place = nn.Conv2d(192, 1, 3, padding=1)
            # padding 2: a small patch may shrink to one pixel, but not to none
            deeper = [_spectral(192, 192, 4, 2, padding=2) for _ in range(3)]
            self.whole = nn.Sequential(
                *deeper, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 1))
            return
        channels = itertools.pairwise((3, 64, 64, 128, 128, 256, 256, 512, 512))
        for number, (before, after) in enumerate(channels, start=1):
            conv = nn.Conv2d(before, after, 3, stride=2 - number % 2, padding=1)
            # the report left the seventh at torch's default momentum
            momentum = 0.1 if number == 7 else config.batch_norm or 0.1
            norm = _norm(after, momentum) if number > 1 else []
            self.layers.append(nn.Sequential(conv, *norm, nn.LeakyReLU(0.2)))
        inputs = 512 * (config.patch // 16) ** 2
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(inputs, 1024), nn.LeakyReLU(0.2), nn.Linear(1024, 1))

    def forward(self, images: Tensor, lr: Tensor | None = None) -> list[Tensor]:
        if self.kind == "dense":
            return [self.head(self.layers(to_imagenet(images))).float()]
        plain = bicubic(lr, images.shape[-2:])
        x = self.layers(torch.cat([to_imagenet(images), to_imagenet(plain)], dim=1))
        return [self.place(x).float(), self.whole(x).float()]


def _vgg(source: str) -> nn.Sequential:
    """The convolutions of VGG19, or of VGG16 if `source` (`Config.vgg`) is a file of those."""
    from safetensors.torch import load_file
    from torchvision.models import VGG19_Weights, vgg16, vgg19

    if source == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(19)  # the same random features in every run
            return vgg19(weights=None).features
    try:
        if source == "imagenet":
            state = VGG19_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True)
        elif source.endswith(".safetensors"):
            state = load_file(source)
        else:
            state = torch.load(source, map_location="cpu", weights_only=True)
        state = {name.removeprefix("features."): value.float() for name, value in state.items()
                 if not name.startswith("classifier")}
        with torch.device("meta"):  # nothing is drawn at random in vain
            network = (vgg16 if len(state) == 2 * 13 else vgg19)(weights=None).features
        network.load_state_dict(state, assign=True)
    except Exception as error:  # fetching, unpickling and parsing raise many kinds
        kind = ConnectionError if source == "imagenet" else ValueError
        raise kind(f"vgg={source} gives no VGG19 or VGG16 ({_one_line(error)[:100]}): choose from "
                   "--set vgg=imagenet, vgg=FILE, vgg=random and content=pixel") from None
    return network


class VGGFeatures(nn.Module):
    """images (N, 3, H, W) -> VGG's maps at `config.vgg_layers`: (N, C, H / 2^k, W / 2^k) each.

    `conv3` is the last convolution of the third block, `relu3` its activation, `pool3` what
    follows. Frozen, but differentiable in its input (§2.2.1). ConnectionError if VGG19's ImageNet
    weights (550 MB, by torchvision) cannot be fetched; ValueError if a file holds others.
    """

    def __init__(self, config: Config):
        super().__init__()
        # torchvision's ReLU works in place: it would change the map before it, which may be wanted
        layers = [nn.ReLU() if isinstance(each, nn.ReLU) else each for each in _vgg(config.vgg)]
        pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
        before = {"conv": 2, "relu": 1, "pool": 0}
        self.wanted = [pools[int(name[4]) - 1] - before[name[:4]]
                       for name in config.vgg_layers.split(",")]
        self.network = nn.Sequential(*layers[:max(self.wanted) + 1]).requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        x, maps = to_imagenet(images), {}
        for number, layer in enumerate(self.network):
            x = layer(x)
            if number in self.wanted:
                maps[number] = x.float()
        return [maps[number] for number in self.wanted]


def count_parameters(model: nn.Module) -> int:
    """How many numbers of `model` training may change."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def layer_costs(model: nn.Module, *inputs: Tensor) -> dict[str, tuple[int, int]]:
    """Name -> (parameters, multiplications on `inputs`) of each convolution and dense layer; last
    `all else` (BatchNorm, PReLU, the blur): what these lack of the model's totals."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).eval()(*inputs)
    counts, root, costs = counter.get_flop_counts(), type(model).__name__, {}
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            flops = counts.get(f"{root}.{name}".rstrip("."), {}).values()
            costs[name] = count_parameters(layer), sum(flops) // 2  # half of them are additions
    own, multiplications = map(sum, zip(*costs.values()))
    total = counter.get_total_flops() // 2
    return costs | {"all else": (count_parameters(model) - own, total - multiplications)}


def receptive_radius(config: Config) -> int:
    """LR px on each side that a pixel of SR depends on, rounded up: the overlap of tiles."""
    edge = config.kernel_size // 2
    blocks = sum(dilation + 1 for dilation in _dilations(config))
    stage = 1.5 if config.upsampling == "blur" else 1
    stages = sum(stage / 2 ** number for number in range(config.stages))
    return math.ceil(edge + blocks + 1 + stages + edge / config.scale) + 2  # 2: the bicubic skip


# --------------------------------------------------------------------------------------------------
# 5. Losses: what each network is asked to want (§2.2), all in fp32
# --------------------------------------------------------------------------------------------------


def pixel_loss(sr: Tensor, hr: Tensor, distance: str = "l1") -> Tensor:
    """Mean absolute (`l1`) or squared (`mse`, Eq. 4) difference of images or features, a scalar."""
    return (F.l1_loss if distance == "l1" else F.mse_loss)(sr.float(), hr.float())


def feature_loss(sr: Sequence[Tensor], hr: Sequence[Tensor], distance: str = "l1",
                 rescale: float = 0.0) -> Tensor:
    """The mean of `pixel_loss` over pairs of feature maps, both divided by `rescale` (Eq. 5), or
    with 0 by the mean magnitude of each HR's map, so that each depth counts the same."""
    losses = []
    for ours, wanted in zip(sr, hr):
        size = rescale or wanted.abs().mean((1, 2, 3), keepdim=True)
        losses.append(pixel_loss(ours / size, wanted / size, distance))
    return torch.stack(losses).mean()


def _verdict_loss(verdicts: Sequence[Tensor], wanted: float, kind: str) -> Tensor:
    """How far the verdicts of a discriminator are from saying `wanted` (1 real, 0 generated)."""
    squares = kind == "least_squares"
    distance = F.mse_loss if squares else F.binary_cross_entropy_with_logits
    losses = [distance(scores, torch.full_like(scores, wanted)) for scores in verdicts]
    return (0.5 if squares else 1.0) * torch.stack(losses).mean()


def adversarial_loss(fake: Sequence[Tensor], kind: str) -> Tensor:
    """What the generator wants of the verdicts on its images: to be called real (Eq. 6). `kind` is
    least_squares, 1/2 (D(sr) - 1)^2, or bce."""
    return _verdict_loss(fake, 1, kind)


def discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor], kind: str) -> Tensor:
    """What the discriminator wants of its verdicts: real ones 1, generated ones 0 (Eq. 2)."""
    return _verdict_loss(real, 1, kind) + _verdict_loss(fake, 0, kind)


# --------------------------------------------------------------------------------------------------
# 6. Updates: the networks of a run in memory, and one update of each. No file, no clock
# --------------------------------------------------------------------------------------------------


def _share() -> tuple[int, int]:
    """(number, count) of this process, among those that torchrun has started: one for each GPU."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def _from_first(value):
    """The first process's `value`, in every process: for what only a clock or a disk can tell."""
    values = [value]
    if _share()[1] > 1:
        distributed.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


class TrainState:
    """The networks and optimisers of a run, and how many updates they have seen (`update`).

    Fresh ones are a function of `config.seed`; `config.precision` must be resolved. `ema` is the
    moving average of the generator, or None. `parallel_*` are what to call in training.
    """

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device, self.update = config, device, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            networks = [Generator(config), Discriminator(config)]
        several = _share()[1] > 1
        if several and device.type == "cuda":  # on CPUs each keeps its share's statistics
            networks = [nn.SyncBatchNorm.convert_sync_batchnorm(each) for each in networks]
        networks = [each.to(device, memory_format=torch.channels_last) for each in networks]
        self.generator, self.discriminator = networks
        self.ema = None
        if config.ema:
            self.ema = copy.deepcopy(self.generator).requires_grad_(False).eval()
        self.best = self.ema or self.generator  # the one to use
        betas = config.beta1, config.beta2
        self.g_optimizer, self.d_optimizer = (
            torch.optim.Adam(each.parameters(), config.learning_rate, betas, fused=True)
            for each in networks)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        if several:  # each process gets the mean of all gradients
            networks = [nn.parallel.DistributedDataParallel(each, broadcast_buffers=False)
                        for each in networks]
        self.parallel_generator, self.parallel_discriminator = networks
        self.vgg = None
        if config.content == "vgg" and config.steps != 0:
            self.vgg = VGGFeatures(config).to(device, memory_format=torch.channels_last)

    def autocast(self) -> torch.autocast:
        return _autocast(self.config.precision, self.device)

    def parts(self) -> dict:
        """Whatever has a state_dict, by name."""
        names = ("generator", "discriminator", "ema", "g_optimizer", "d_optimizer", "scaler")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def load(self, saved: dict) -> None:
        """Continue from what a checkpoint holds; many kinds of errors if it is of others."""
        for name, part in self.parts().items():
            if name != "scaler" or saved.get(name):  # empty where the run began without fp16
                part.load_state_dict(saved[name])
        self.update = saved["update"]


def _learning_rate(config: Config, update: int) -> float:
    """The generator's rate in update `update` (from 0): each stage warms up, then decays."""
    pretraining = update < config.pretrain_steps
    base = config.pretrain_learning_rate if pretraining else config.learning_rate
    length = config.pretrain_steps if pretraining else config.decay_steps
    step = update if pretraining else update - config.pretrain_steps
    base *= min(1.0, (step + 1) / max(1, config.warmup_steps))
    done = min(1.0, step / max(1, length))  # beyond `length` the final rate stays
    if config.decay == "cosine":
        return base * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
    if config.decay == "step" and not pretraining and done >= 0.5:
        return base / 10
    return base


def _step_optimizer(state: TrainState, optimizer: torch.optim.Optimizer, loss: Tensor,
                    times: float = 1.0) -> None:
    """One step down the gradient of `loss`, at `times` the generator's learning rate."""
    optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(loss).backward()
    for group in optimizer.param_groups:
        group["lr"] = times * _learning_rate(state.config, state.update)
    state.scaler.step(optimizer)


def pretrain_step(state: TrainState, lr: Tensor, hr: Tensor) -> dict[str, Tensor]:
    """One update of the generator alone, by the pixel loss: SRResNet (§3.2). Its losses."""
    with state.autocast():
        sr = state.parallel_generator(lr)
    loss = pixel_loss(sr, hr, state.config.distance)
    _step_optimizer(state, state.g_optimizer, loss)
    return {"g_loss": loss.detach(), "pixel": loss.detach()}


def discriminator_step(state: TrainState, lr: Tensor, sr: Tensor, hr: Tensor) -> dict[str, Tensor]:
    """One update of the discriminator: call real faces real, generated ones generated (Eq. 2)."""
    config = state.config
    with state.autocast():
        real = state.parallel_discriminator(hr, lr)
        fake = state.parallel_discriminator(sr.detach(), lr)  # the generator must not move now
    loss = discriminator_loss(real, fake, config.adversarial)
    _step_optimizer(state, state.d_optimizer, loss, config.discriminator_rate)
    means = [torch.stack([scores.detach().mean() for scores in each]).mean()
             for each in (real, fake)]
    return {"d_loss": loss.detach(), "d_real": means[0], "d_fake": means[1]}


def _content_loss(state: TrainState, sr: Tensor, hr: Tensor) -> Tensor:
    """The distance of VGG's maps of sr and hr, in a random window."""
    config = state.config
    side = min(config.vgg_window or hr.shape[-1], hr.shape[-1])
    random = seeded(config.seed, 2, state.update)
    y, x = torch.randint(hr.shape[-1] - side + 1, (2,), generator=random).tolist()
    window = np.s_[..., y:y + side, x:x + side]
    with torch.no_grad():
        wanted = state.vgg(hr[window])
    return feature_loss(state.vgg(sr[window]), wanted, config.distance, config.vgg_rescale)


def generator_step(state: TrainState, lr: Tensor, sr: Tensor, hr: Tensor) -> dict[str, Tensor]:
    """One update of the generator: look like HR (content), and be called real (Eq. 3).

    sr comes from the pass that the discriminator's update used. The report ran the generator a
    second time: the same weights, but its BatchNorm statistics weigh the new batch 0.96, not 0.8.
    """
    config, discriminator = state.config, state.discriminator
    discriminator.requires_grad_(False)  # its weights need no gradient here
    pixel = pixel_loss(sr, hr, config.distance)
    with state.autocast():
        fake = discriminator(sr, lr)
        content = _content_loss(state, sr, hr) if state.vgg else pixel
    discriminator.requires_grad_(True)
    adversarial = adversarial_loss(fake, config.adversarial)
    ramp = min(1.0, (state.update - config.pretrain_steps + 1) / max(1, config.ramp_steps))
    # each name is a column of `_HISTORY`, too
    weighted = {"weighted_content": config.content_weight * content,
                "weighted_adversarial": ramp * config.adversarial_weight * adversarial}
    loss = sum(weighted.values())
    if config.content != "pixel":
        loss = loss + config.pixel_weight * pixel
    _step_optimizer(state, state.g_optimizer, loss)
    losses = {"g_loss": loss, "pixel": pixel, "content": content, "adversarial": adversarial}
    return {name: value.detach() for name, value in (losses | weighted).items()}


def _one_update(state: TrainState, lr: Tensor, hr: Tensor) -> dict[str, Tensor]:
    """Update number `state.update` on a batch, whichever stage it belongs to; its losses."""
    config, step = state.config, state.update
    if step < config.pretrain_steps:
        losses = pretrain_step(state, lr, hr)
    else:
        step -= config.pretrain_steps
        if step == 0:  # from the averaged weights, without the moments of another loss
            state.generator.load_state_dict(state.best.state_dict())
            state.g_optimizer.state.clear()
        with state.autocast():
            sr = state.parallel_generator(lr)
        losses = discriminator_step(state, lr, sr, hr) | generator_step(state, lr, sr, hr)
    state.scaler.update()
    if state.ema is not None:  # a stage's first weights leave its average soon
        decay, values = min(config.ema, (1 + step) / (10 + step)), state.generator.state_dict()
        for name, average in state.ema.state_dict().items():
            if average.is_floating_point():  # not BatchNorm's counter
                average.lerp_(values[name], 1 - decay)
            else:
                average.copy_(values[name])
    state.update += 1
    return losses


# --------------------------------------------------------------------------------------------------
# 7. Metrics: one number per image; the mean comes last
# --------------------------------------------------------------------------------------------------


def psnr(sr: Tensor, hr: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, peak 1, (N,): inf for identical ones."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(sr, hr, data_range=1.0, reduction="none", dim=(1, 2, 3))


def ssim(sr: Tensor, hr: Tensor) -> Tensor:
    """Structural similarity of each image, (N,), 1 if identical: window of 11 px, sigma 1.5."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    if sr.is_cuda:  # newer GPUs convolve fp32 with three digits (TF32): too few here
        sr, hr = sr.double(), hr.double()
    return structural_similarity_index_measure(sr, hr, data_range=1.0, reduction="none").float()


@lru_cache(maxsize=1)
def _lpips_network(net: str, device: torch.device) -> nn.Module:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type=net, normalize=True).to(device)


def lpips(sr: Tensor, hr: Tensor, net: str = "alex") -> Tensor:
    """Learned perceptual distance of each image, 0 for identical ones, (N,); arXiv:1801.03924.

    net: whose features, alex, vgg or squeeze. Downloads it; ConnectionError if that fails.
    """
    try:
        network = _lpips_network(net, sr.device)
    except (OSError, RuntimeError) as error:  # the second: something else came
        raise ConnectionError(f"LPIPS could not fetch its network ({_one_line(error)}): "
                              "leave LPIPS out") from None
    pairs = zip(sr.clamp(0, 1), hr.clamp(0, 1))
    return torch.stack([network(a[None], b[None]) for a, b in pairs]).detach()


def _gradient_energy(images: Tensor) -> Tensor:
    across, down = images.diff(dim=-1), images.diff(dim=-2)
    return across.square().mean((1, 2, 3)) + down.square().mean((1, 2, 3))


def sharpness(sr: Tensor, hr: Tensor) -> Tensor:
    """Gradient energy of SR over that of HR for each image, (N,): below 1 blurrier than HR."""
    return _gradient_energy(sr) / _gradient_energy(hr).clamp_min(1e-12)


def flat_energy(sr: Tensor, hr: Tensor) -> Tensor:
    """`sharpness` in the flattest tenth of HR's 8 x 8 px blocks, (N,): above 1, noise was added."""
    def energies(images):
        blocks = F.unfold(images, 8, stride=8).transpose(1, 2).reshape(-1, images.shape[1], 8, 8)
        return _gradient_energy(blocks).view(len(images), -1)  # (N, blocks)

    wanted = energies(hr)
    flattest = wanted.topk(max(1, wanted.shape[1] // 10), largest=False).indices
    rounding = 4 / (12 * 255 ** 2)  # HR's least: the energy of four values rounded to 8 bits
    kept = wanted.gather(1, flattest).mean(1).clamp_min(rounding)
    return energies(sr).gather(1, flattest).mean(1) / kept


def detail_correlation(sr: Tensor, plain: Tensor, hr: Tensor) -> Tensor:
    """Correlation of what SR adds to the bicubic `plain` with what that lacks, (N,): 1 is right."""
    added, missing = (sr - plain).flatten(1), (hr - plain).flatten(1)
    return F.cosine_similarity(added - added.mean(1, keepdim=True),
                               missing - missing.mean(1, keepdim=True))


def checkerboard_index(images: Tensor) -> Tensor:
    """How far a pattern of period 2, 4 or 8 px stands out of each image's own texture, (N,).

    About 0.9 for natural images; linear in the amplitude of what stands out; NaN below 32 px. Such
    a pattern has all its power at the 63 frequencies whose period divides 8 px. There, power is
    divided by its neighbours' in the row or the column, whichever is larger; root of the mean.
    """
    side = min(images.shape[-2:]) // 8 * 8
    if side < 32:
        return images.new_full((len(images),), math.nan)
    window = torch.hann_window(side, device=images.device)
    square = images[..., :side, :side]
    centred = (square - square.mean((-2, -1), keepdim=True)) * window * window[:, None]
    power = torch.fft.fft2(centred).abs().square().mean(1)  # (N, side, side)
    v, u = torch.cartesian_prod(torch.arange(8), torch.arange(8))[1:].T * (side // 8)
    # the window spreads a pure frequency over one bin on each side: neighbours begin at the second
    offsets = [sign * step for step in range(2, min(6, side // 16 + 1)) for sign in (-1, 1)]
    row = torch.stack([power[:, v, (u + offset) % side] for offset in offsets]).mean(0)
    column = torch.stack([power[:, (v + offset) % side, u] for offset in offsets]).mean(0)
    floor = window.square().sum() ** 2 / (12 * 255 ** 2)  # of 8-bit rounding: no texture below it
    ratios = power[:, v, u] / torch.maximum(row, column).clamp_min(floor)
    return ratios.mean(1).sqrt()


# --------------------------------------------------------------------------------------------------
# 8. Sources: any photo read, and where faces come from
# --------------------------------------------------------------------------------------------------

_MAX_PIXELS = 200_000_000  # the largest photos that phones take
_MAX_FILE = 400_000_000    # bytes of one image file, or of a PNG's text or profile
_PILLOW = threading.Lock()
# Pillow decides by content, not by name; formats that run an interpreter (EPS, WMF) are left out
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")


def _to_rgb(image, keep_alpha: bool):
    """Any Pillow image as RGB in sRGB, on white where transparent; or as RGBA there, to keep it."""
    from PIL import Image, ImageChops, ImageCms

    profile, alpha = image.info.get("icc_profile"), None
    if image.mode.startswith(("I", "F")):  # grey of 16 or 32 bits, or floats
        levels, clear = np.nan_to_num(np.asarray(image, np.float32)), image.info.get("transparency")
        ranges = [1] * (image.mode == "F") + [2**bits - 1 for bits in (8, 10, 12, 14, 16)]
        filled = next((end for end in ranges if levels.max() < end + 1), levels.max())
        white = np.max(getattr(image, "tag_v2", {}).get(281, 0)) or filled  # TIFF may state it
        image = Image.fromarray(np.rint(levels * (255 / white)).clip(0, 255).astype(np.uint8))
        if clear is not None:
            alpha = Image.fromarray(np.uint8(255) * (levels != clear))
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
    if image.mode != "CMYK":  # a profile is one for grey, for RGB or for CMYK
        image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    rgb = image.convert("RGB")
    with contextlib.suppress(Exception):  # no profile, a damaged one, or that of another mode
        source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
        if np.max(ImageChops.difference(rgb, converted).getextrema()) > 1:  # else it is sRGB's own
            rgb = converted
    if alpha is not None and alpha.getextrema()[0] < 255:
        if keep_alpha:
            rgb.putalpha(alpha)
        else:
            rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)
    return rgb


def _read_image(file: str | Path | bytes, keep_alpha: bool = False, least: int | None = None):
    """`file` (a path, or what it holds) as `_to_rgb` returns it, upright; else ValueError.

    least: a JPEG may be reduced while it is decoded, to a shorter side of so many px at least.
    """
    from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

    if not isinstance(file, bytes):
        if os.path.getsize(file) > _MAX_FILE:
            raise ValueError("absurdly large file")
        file = Path(file).read_bytes()
    try:
        with _PILLOW:  # its limits hold for all threads; ours are asked for instead
            limits = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
            Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = None, _MAX_FILE
            try:
                image = Image.open(io.BytesIO(file), formats=_FORMATS)
                if image.width * image.height > _MAX_PIXELS:
                    raise ValueError(f"absurdly large ({image.width} x {image.height} px)")
                if image.format not in ("JPEG", "MPO"):  # others ask for the limits again
                    image.load()
            finally:
                Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = limits
        if least:
            image.draft(None, (least, least))
        image.load()
        with contextlib.suppress(Exception):  # of damaged Exif, which is of no use here
            ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image, keep_alpha)
    except UnidentifiedImageError:
        raise ValueError("not an image that Pillow can read (save HEIC as JPEG, give a zip as the "
                         "source by itself)") from None
    except ValueError as error:
        raise ValueError(_one_line(error)) from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ... on damage
        raise ValueError(f"truncated or damaged ({_one_line(error)})") from None


def load_image(path: str | Path) -> Tensor:
    """The photo at `path` as (1, 3, H, W), upright, in sRGB, on white where transparent.

    FileNotFoundError, or ValueError if it is no image, truncated or above 200 megapixels.
    """
    try:
        return _to_tensor(_read_image(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _spread_colours(image: Tensor, alpha: Tensor) -> Tensor:
    """`image` (1, 3, H, W) with its visible colours under what `alpha` (1, 1, H, W) hides."""
    size = image.shape[-2:]
    if max(size) == 1 or alpha.min() > 0:
        return image
    sums = F.avg_pool2d(torch.cat([image * alpha, alpha], 1), 2, ceil_mode=True)
    smaller = _spread_colours(sums[:, :3] / sums[:, 3:].clamp(min=1e-6), sums[:, 3:])
    return torch.where(alpha > 0, image, F.interpolate(smaller, size=size, mode="bilinear"))


# --- Drawn faces: at 400 px, so that edges come out smooth when they are reduced

_HAIR = ((32, 26, 24), (70, 45, 30), (120, 82, 48), (190, 150, 92), (140, 60, 34), (176, 174, 172))
_IRIS = ((70, 45, 28), (96, 66, 36), (74, 108, 66), (82, 118, 158), (110, 128, 140))
_CIRCLE = np.stack([f(np.linspace(0, 2 * np.pi, 48)) for f in (np.cos, np.sin)], axis=1)


def _noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise (400, 400, 1), deviation about 1: `cells` random values a side, enlarged."""
    values = torch.from_numpy(rng.normal(size=(1, 1, cells, cells)).astype(np.float32))
    return bicubic(values, 400)[0, 0, :, :, None].numpy()


def synthetic_face(index: int, seed: int = 0) -> Tensor:
    """Nobody's portrait: drawn face `index` of an endless set, (1, 3, 178, 178)."""
    from PIL import Image, ImageDraw, ImageFilter

    rng = np.random.default_rng([seed, index])
    down, across = (grid[..., None] - 200 for grid in np.ogrid[:400, :400])
    wall, cloth = rng.uniform(40, 215, (2, 3))
    skin = np.array([238, 200, 172]) * (1 - rng.beta(1.2, 1.8) * np.array([0.62, 0.70, 0.76]))
    shade = 1 + rng.uniform(-0.2, 0.2) * across / 84 - 0.12 * np.abs(across / 84) ** 2.5
    flesh = skin * shade.clip(0.45, 1.3) + 2.5 * _noise(rng, 120)
    hair, iris = np.array(_HAIR[rng.integers(6)]), _IRIS[rng.integers(5)]
    strand = (np.arctan2(across, down + 140) + 4) * 90 + 3 * _noise(rng, 12)
    strands = hair * (1 + 0.3 * rng.normal(size=720)[strand.astype(int)]).clip(0.4, 1.9) + 6
    backdrop = wall + 30 * _noise(rng, 3) + 5 * _noise(rng, 14)
    canvas = Image.fromarray(backdrop.clip(0, 255).astype(np.uint8))
    parting, length, chin, apart, eye, brow, wide, smile = rng.uniform(
        (20, -60, 70, 35, 17, 34, 26, 62), (100, 240, 84, 41, 22, 44, 36, 76))
    for outline, colour, soft in (
            ([(0, -129), (70, -100), (96, -60), (104, length), (0, length)], strands, 2),
            (_CIRCLE * (180, 138) + (0, 230), cloth + 6 * _noise(rng, 130), 1),            # clothes
            ([(46, 0), (54, 118), (0, 158), (-54, 118), (-46, 0)], flesh * 0.75, 2),       # neck
            (_CIRCLE * (13, 26) + (83, 4), flesh * 0.85, 1),                               # ears
            (_CIRCLE * (84, 94) + (0, -20), flesh, 1), (_CIRCLE * (chin, 94) + (0, 20), flesh, 1),
            (_CIRCLE * (eye * 1.3, eye) + (apart, -18), skin * 0.8, 6),                    # eyes
            (_CIRCLE * (eye * 1.1, eye * 0.6) + (apart, -15), skin * 0.25, 1),
            (_CIRCLE * (eye, eye / 2) + (apart, -13), (230, 226, 222), 1),
            (_CIRCLE * (eye * 0.42) + (apart, -14), iris, 1),
            (_CIRCLE * (eye * 0.2) + (apart, -14), (14, 12, 12), 1),
            ([(apart - eye, 9 - brow), (apart, -6 - brow), (apart + 28, 6 - brow)], hair * 0.7, 2),
            ([(4, -6), (13, -6), (20, 32), (10, 32)], flesh * 0.85, 4),                    # nose
            (_CIRCLE * (4.5, 2.8) + (9, 41), skin * 0.25, 1),
            ([(-wide, smile), (0, 60), (wide, smile), (0, 88)], skin * (0.9, 0.6, 0.6), 1),  # mouth
            ([(-wide, smile), (0, 67), (wide, smile), (0, 78)], (236, 230, 220), 1),
            ([*_CIRCLE[24:] * (93, 129), (82, -23), (0, -parting), (-82, -23)], strands, 2)):
        mask = Image.new("L", canvas.size)
        for side in (1, -1):  # px from the middle, and mirrored
            points = np.multiply(outline, (side, 1)) + 200
            ImageDraw.Draw(mask).polygon(points.ravel().tolist(), fill=255)
        colour = np.broadcast_to(colour, (400, 400, 3)).clip(0, 255).astype(np.uint8)
        canvas.paste(Image.fromarray(colour), mask=mask.filter(ImageFilter.GaussianBlur(soft)))
    left, top, right, bottom = rng.integers(5, 36, 4)  # margins cut off: place, size, proportions
    return _to_tensor(canvas.crop((left, top, 400 - right, 400 - bottom)).resize((178, 178), 3))


# --- Folders, zips and sets

# Names, how to read one as a Pillow RGB image, and a text that differs once names, sizes, times do
_Source = tuple[list[str], Callable, str]

_PORTRAITS = {  # members of the US Congress, public domain (github.com/unitedstates/images)
    "url": "https://github.com/Hainish/congress-images-225x275/archive/"
           "20531e981f99cd8fd42023d3e71000582f2e04c2.zip",
    "folder": "congress-images-225x275-20531e981f99cd8fd42023d3e71000582f2e04c2/images/",
    "sha256": "38ac3a8eaf28e907f8cacf7bc36c3b6ef9f9a429ad447c275a5d7f7ee226849d",
}
_CELEBA = {
    "zip": "img_align_celeba.zip", "md5": "00d2c5bc6d35e252742224ab0c1e8fcb",
    "hugging_face": "Yuehao/celeba", "drive": "0B7EVK8r0v71pZjFTYXZWM3FlRnM",
}
_LEAST = 712  # px: a shorter side of which a face's 178 px keep all that they can show
_LITTER = re.compile(r"(^|/)(\.|__MACOSX|Thumbs\.db$)")  # what systems leave in folders and zips
_CELEBA_BY_HAND = """CelebA could not be fetched (Google's quota for it is often used up). By hand:
  1. get img_align_celeba.zip (1.4 GB) from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html
  2. put it into the current folder, or into MyDrive/srgan on Google Drive
  3. run this again, or give its path as the source"""


def _open_folder(folder: Path) -> _Source:
    files, seen = {}, set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in seen or "store.json" in names:  # a link back; a store
            folders[:], names = [], []
        seen.add(os.path.realpath(place))
        for path in map(Path(place).joinpath, names):
            # what is not UTF-8, as old zips leave it, could not be written into a record
            name = os.fsencode(path.relative_to(folder).as_posix()).decode(errors="replace")
            if path.is_file() and not _LITTER.search(name):
                files[name] = path
    if not files:
        raise ValueError(f"{folder} is empty: a source needs at least one image")
    names = sorted(files)
    entries = [(name, files[name].stat().st_size, files[name].stat().st_mtime_ns) for name in names]
    state = hashlib.sha256(repr(entries).encode()).hexdigest()
    return names, lambda name: _read_image(files[name], least=_LEAST), state


def _open_zip(path: Path, inside: str = "") -> _Source:
    """Pictures are read out of the zip one by one, each no longer than it says: not unpacked."""
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # zipfile raises half a dozen kinds on damage
        raise ValueError(f"{path} is cut off, or not a zip ({_one_line(error)}): fetch it again; "
                         "of pictures, or of another archive unpacked, give the folder") from None
    members = {info.filename.replace("\\", "/"): info for info in archive.infolist()}  # Windows
    names = sorted(name for name in members if name.startswith(inside)
                   and not name.endswith("/") and not _LITTER.search(name))
    if not names:
        raise ValueError(f"{path} holds no files: a source needs at least one image")

    def read(name: str):
        if members[name].file_size > _MAX_FILE:
            raise ValueError("absurdly large file")
        with archive.open(members[name]) as file:  # archive.read has no such bound
            return _read_image(file.read(members[name].file_size), least=_LEAST)

    return names, read, f"{path.stat().st_size} {path.stat().st_mtime_ns}"


def _downloads() -> Path:
    """Where fetched archives are kept: torch's own cache folder, which TORCH_HOME moves."""
    folder = Path(torch.hub.get_dir()) / "srgan"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _portraits_are_right(path: Path) -> bool:
    """Whether the zip holds just the pinned portraits (its own bytes vary from day to day)."""
    folder, told = _PORTRAITS["folder"], hashlib.sha256()
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if name.startswith(folder) and name != folder:
                    digest = hashlib.sha256(archive.read(name)).hexdigest()
                    told.update(f"{digest}  {name.removeprefix(folder)}\n".encode())
    except Exception:  # not there, or damaged
        return False
    return told.hexdigest() == _PORTRAITS["sha256"]


def _open_portraits() -> _Source:
    """The pinned set, fetched into the cache unless it is there; ConnectionError if it fails."""
    from urllib.request import urlopen

    path = _downloads() / "portraits.zip"
    try:
        if not _portraits_are_right(path):
            with (urlopen(_PORTRAITS["url"], timeout=10) as reply, open(path, "wb") as file,
                  _bar(desc=path.name, unit="B", unit_scale=True) as bar):
                bar.total = int(reply.headers.get("Content-Length") or 0)
                while chunk := reply.read(1 << 20):
                    bar.update(file.write(chunk))
            if not _portraits_are_right(path):
                raise ValueError("not the pinned set, but a web page or another version")
        return _open_zip(path, _PORTRAITS["folder"])
    except Exception as error:  # urllib lets through errors of http.client's own
        path.unlink(missing_ok=True)
        raise ConnectionError(f"the portraits could not be fetched ({_one_line(error)}): check the "
                              "network, or use the source 'synthetic' or your own folder") from None


def _celeba_at(place: Path) -> _Source | None:
    """CelebA as a folder, or as the original zip (checked), in `place`; or None."""
    for folder in (place / "img_align_celeba" / "img_align_celeba", place / "img_align_celeba"):
        if any(folder.glob("*.jpg")):
            return _open_folder(folder)
    path = place / _CELEBA["zip"]
    if not path.is_file():
        return None
    if Path("/content/drive") in place.parents:  # Drive is slow at small reads: copy it once
        print(f"copying {path} to this machine ...")
        path = Path(shutil.copyfile(path, _downloads() / _CELEBA["zip"]))
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "md5").hexdigest() == _CELEBA["md5"]:
            return _open_zip(path)
    print(f"{path} is not CelebA's (its md5 differs); left alone")
    return None


def _open_celeba() -> _Source:
    """What is there already, else Hugging Face, else Google Drive; else ConnectionError."""
    folder, drive = _downloads(), Path("/content/drive/MyDrive")
    for place in (Path.cwd(), Path("celeba"), folder, Path("/content"), drive / "srgan", drive):
        if source := _celeba_at(place):
            return source
    for mirror in ("Hugging Face", "Google Drive"):
        print(f"CelebA: trying {mirror} ...")
        try:
            if mirror == "Hugging Face":
                from huggingface_hub import hf_hub_download

                hf_hub_download(_CELEBA["hugging_face"], _CELEBA["zip"], repo_type="dataset",
                                local_dir=folder)
            else:
                import gdown

                gdown.download(id=_CELEBA["drive"], output=str(folder / _CELEBA["zip"]))
            if source := _celeba_at(folder):
                return source
        except Exception as error:  # each client has exceptions of its own, and the next may work
            print(f"CelebA: that failed ({type(error).__name__}: {_one_line(error)[:200]})")
        (folder / _CELEBA["zip"]).unlink(missing_ok=True)  # in our own cache, and not right
    raise ConnectionError(_CELEBA_BY_HAND)


def _open_synthetic(limit: int | None) -> _Source:
    from PIL import Image

    count = 2 * limit + 100 if limit else 1_000  # enough for each part; only those kept are drawn
    return ([f"synthetic-{index:06d}.png" for index in range(count)],
            lambda name: Image.fromarray(_to_pixels(synthetic_face(int(name[10:16])))[0]), "")


_NAMED = ("celeba", "portraits", "synthetic")


def _open_source(source: str, limit: int | None = None) -> _Source:
    """FileNotFoundError, ValueError (empty, not a zip) or ConnectionError (cannot be fetched)."""
    if source == "celeba":
        return _open_celeba()
    if source == "portraits":
        return _open_portraits()
    if source == "synthetic":
        return _open_synthetic(limit)
    if Path(source).is_dir():
        return _open_folder(Path(source))
    if Path(source).is_file():
        return _open_zip(Path(source))
    _check_mounted(Path(source))
    raise FileNotFoundError(f"no such source: {source}; give a folder, a .zip, or a set: "
                            f"{_suggest(Path(source).name, _NAMED)}")

# --------------------------------------------------------------------------------------------------
# 9. Faces: prepared once, split by name, drawn in batches
# --------------------------------------------------------------------------------------------------

_SIDE = 178          # px: CelebA's width, so that none of its pixels is resampled
_SMALLEST = 64       # px: shorter sides below this hold no face worth learning
_SPLITS = ("train", "validation", "test")


def _check_space(folder: Path, needed: int, what: str) -> None:
    """OSError if the disk of `folder`, which need not exist yet, has no room for `needed` bytes."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    usage = shutil.disk_usage(there)
    if usage.total and usage.free < needed:  # a mount that does not tell says 0 of 0
        raise OSError(f"{folder} has {usage.free / 1e6:,.0f} MB free and needs {needed / 1e6:,.0f} "
                      f"for {what}: free some space, or name a folder on another disk")


def _locked(folder: Path) -> contextlib.AbstractContextManager:
    """Keeps others on this machine from writing into `folder`; BlockingIOError if one does."""
    from filelock import FileLock, Timeout

    name = hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()
    try:  # not in `folder`, which need not exist yet, and whose file system may have no locks
        return FileLock(Path(tempfile.gettempdir(), f"srgan-{name}.lock"), timeout=0).acquire()
    except Timeout:
        raise BlockingIOError(f"{folder} is in use by another process or an earlier cell: wait "
                              "until that has ended, or stop it (restart the kernel)") from None
    except OSError:  # another person's lock: what is theirs, this may not write into anyway
        return contextlib.nullcontext()


def _spread(values: Sequence, count: int) -> list:
    """`count` of `values`, or all if there are fewer, evenly over their order."""
    count = min(count, len(values))
    return [values[i * len(values) // count] for i in range(count)]


def split_of(names: Sequence[str]) -> np.ndarray:
    """0 (train), 1 (validation) or 2 (test) for each name, (len(names),).

    CelebA's own partition, where the .jpg's are numbered as its are and show all three parts. Else
    by crc32 (UTF-8) mod 100, below 85 train, below 90 validation, else test, of a key: the folder
    (a person), where at least ten hold pictures and none over a fifth of all; else the base name,
    where these are unique; else the path. An empty part takes the key of the nearest checksum that
    another can spare; below three keys, all are for training.
    """
    jpegs = [name for name in names if name.endswith(".jpg")]
    if all(re.fullmatch(r"(.*/)?\d{6}\.jpg", name) for name in jpegs):
        parts = np.searchsorted([162_770, 182_637], [int(name[-10:-4]) for name in jpegs]).tolist()
        if len(set(parts)) == 3:
            part_of = dict(zip(jpegs, parts))
            return np.array([part_of.get(name, 0) for name in names])
    folders, keys = ([name.rpartition("/")[part] for name in names] for part in (0, 2))
    sizes = Counter(folders)
    if len(sizes) >= 10 and max(sizes.values()) <= len(names) / 5:
        keys = folders
    elif len(set(keys)) < len(keys):
        keys = names
    ranked = sorted((zlib.crc32(key.encode()) % 100, key) for key in set(keys))
    if len(ranked) < 3:
        return np.zeros(len(names), dtype=int)
    part_of = {key: int(np.searchsorted([84, 89], bucket)) for bucket, key in ranked}
    for part, order in ((0, ranked), (2, ranked[::-1]), (1, ranked[::-1])):
        members = list(part_of.values())
        if part not in members:
            part_of[next(key for _, key in order if members.count(part_of[key]) > 1)] = part
    return np.array([part_of[key] for key in keys], dtype=int)


def _square(read: Callable, name: str) -> tuple[bytes, bool | str]:
    """One face as 178 x 178 x 3 bytes, and whether it was smaller; or none, and why."""
    try:
        image = read(name)
        short, long = sorted(image.size)
        if short < _SMALLEST or long > 8 * short:
            raise ValueError(f"{image.width} x {image.height} px: too small or too narrow")
    except Exception as error:  # decoders and zipfile raise all kinds on damage
        return b"", _one_line(error) or type(error).__name__
    size = [round(side * _SIDE / short) for side in image.size]
    left, top = ((side - _SIDE) // 2 for side in size)
    pixels = np.asarray(image.resize(size, resample=3))  # bicubic; Pillow's own crop has limits
    return pixels[top:top + _SIDE, left:left + _SIDE].tobytes(), short < _SIDE


class FaceStore:
    """Prepared faces: a memory-mapped array of 178-px squares with names, split and fingerprint.

    As in store.json: `names` (sorted), `split` ((len,): 0 train, 1 validation, 2 test, 3 unused),
    `left_out` ((name, reason) pairs), `enlarged` (names of smaller faces), `fingerprint`,
    `source`, `limit`, `state`. FileNotFoundError: no store; ValueError: a damaged one.
    """

    def __init__(self, folder: str | Path):
        self.folder, self._kept = Path(folder), None
        if not (self.folder / "store.json").exists():
            raise FileNotFoundError(f"{folder} holds no prepared faces: run "
                                    f"`prepare SOURCE --store {folder}` first")
        try:
            record = json.loads((self.folder / "store.json").read_text(encoding="utf-8"))
            vars(self).update(record, split=np.array(record["split"], dtype=np.uint8))
            self._pixels = np.memmap(self.folder / "faces.u8", dtype=np.uint8, mode="r",
                                     shape=(len(self.names), _SIDE, _SIDE, 3))
        except (LookupError, TypeError, AttributeError, ValueError, OSError) as error:
            raise ValueError(f"{folder} is damaged ({_one_line(error)}): delete it and prepare it "
                             "again") from None

    def __len__(self) -> int:
        return len(self.names)

    def indices(self, split: str) -> np.ndarray:
        """Positions of the faces of `train`, `validation`, `test`, or `all`; ValueError if none."""
        wanted = self.split < 3 if split == "all" else self.split == _SPLITS.index(split)
        if not wanted.any():
            raise ValueError(f"{self.folder} has no {split} faces ({self.describe()}): prepare "
                             "more faces" + (", or use --split all" if split == "test" else ""))
        return np.flatnonzero(wanted)

    def faces(self, indices: Sequence[int], device: torch.device | None = None) -> Tensor:
        """The faces at `indices` as uint8 (N, 3, 178, 178), on `device`, else on the CPU."""
        if device is not None and self._kept is not None:
            return self._kept[torch.as_tensor(indices).to(device, non_blocking=True)].movedim(3, 1)
        pixels = torch.from_numpy(self._pixels[np.asarray(indices)]).movedim(3, 1)
        if device is not None and device.type == "cuda":
            pixels = pixels.pin_memory().to(device, non_blocking=True)  # the host does not wait
        return pixels

    def keep_on(self, device: torch.device | None) -> None:
        """Put all faces into the memory of `device`, for `faces`; None lets them go."""
        self._kept = None if device is None else torch.tensor(self._pixels, device=device)

    def describe(self) -> str:
        """`515 train, 25 validation, 64 test faces; 1 left out` and the like."""
        train, validation, test, unused = np.bincount(self.split, minlength=4)
        told = [(len(self.left_out), "left out"), (len(self.enlarged), "enlarged"),
                (unused, "of these kept out of test")]
        return "; ".join([f"{train} train, {validation} validation, {test} test faces",
                          *(f"{number} {what}" for number, what in told if number)])


def _fill_store(opened: _Source, source: str, folder: Path, limit: int | None) -> None:
    """Decode what `opened` has into the store in `folder`: temporary names, then a rename."""
    names, read, state = opened
    pictures = [name for name in names  # as far as the name tells: no lists in .csv
                if (mimetypes.guess_type(name)[0] or "image/").startswith("image/")]
    part_of = dict(zip(pictures, split_of(pictures).tolist()))
    if limit:  # so many training faces, limit/17 validation, 2 limit/17 test
        wanted = limit, max(1, round(limit / 17)), max(1, round(2 * limit / 17))
        names = sorted(name for part, count in enumerate(wanted) for name in
                       _spread([name for name in pictures if part_of[name] == part], count))
    folder.mkdir(parents=True, exist_ok=True)
    _check_space(folder, len(names) * _SIDE * _SIDE * 3, f"{len(names):,} prepared faces")
    good, small, left_out, digest = [], [], [], hashlib.sha256()
    with open(folder / "faces.u8.part", "wb") as file, ThreadPoolExecutor() as pool:
        squares = itertools.chain.from_iterable(  # 512 at a time, so that few wait in memory
            pool.map(_square, itertools.repeat(read), names[start:start + 512])
            for start in range(0, len(names), 512))
        squares = _bar(squares, total=len(names), desc="preparing", unit="face")
        for (pixels, told), name in zip(squares, names):
            if pixels:
                good.append(name)
                small.append(told)
                digest.update(pixels)
                file.write(pixels)
            else:
                left_out.append([name, told])
    if not good:
        shown = _one_line("; ".join(map(": ".join, left_out[:3])))
        raise ValueError(f"{source} has no usable image ({len(left_out)} left out: {shown})")
    split, small = np.array([part_of.get(name, 0) for name in good]), np.array(small)
    if len(set(split.tolist())) < 3:  # what was left out emptied a part
        split = split_of(good)
    if (~small[split == 2]).any():  # enlarged faces have no true detail to be compared with
        split[small & (split == 2)] = 3
    told = json.dumps([good, split.tolist(), digest.hexdigest()])
    record = {"source": source, "limit": limit, "state": state,
              "fingerprint": hashlib.sha256(told.encode()).hexdigest(),
              "enlarged": list(itertools.compress(good, small)), "left_out": left_out,
              "names": good, "split": split.tolist()}
    Path(file.name).replace(folder / "faces.u8")
    _write_atomically(folder / "store.json", json.dumps(record, indent=1).encode())


def prepare(source: str | Path, folder: str | Path, limit: int | None = None,
            anew: bool = False) -> FaceStore:
    """Turn a source into the `FaceStore` in `folder`, decoding on all cores.

    source: a folder, a .zip, `celeba`, `portraits` or `synthetic`. limit: that many training faces,
    and others in proportion. A finished store is used as it is; where its source has changed since,
    it is made `anew`, or refused. ValueError: that, or a store of another source or limit, or no
    usable image; OSError: no space, or in use.
    """
    folder, source, own = Path(folder), str(source), str(source) not in _NAMED
    if own:
        source = os.path.abspath(source)
    if (folder / "store.json").exists():
        store = FaceStore(folder)
        if (store.source, store.limit) != (source, limit):
            raise ValueError(f"{folder} already holds {store.source!r} (limit {store.limit}), not "
                             f"{source!r} (limit {limit}): name another folder, or delete this one")
        if not own or not Path(source).exists() or _open_source(source)[-1] == store.state:
            return store
        if not anew:
            raise ValueError(f"{source} has changed since it was prepared into {folder}: "
                             "delete that folder, or name another, to prepare it anew")
        print(f"{source} has changed since it was prepared: preparing it anew.")
        shutil.rmtree(folder)
    _check_mounted(folder)
    opened = _open_source(source, limit)
    with _locked(folder):
        _fill_store(opened, source, folder, limit)
    return FaceStore(folder)


def prepare_faces(source: str | Path, limit: int | None = None) -> FaceStore:
    """What notebooks call: the store of `source` in the workspace, prepared if need be.

    A source that has changed is prepared anew. A named set that cannot be had is replaced, loudly,
    by drawn faces; a user's own path never is (ValueError, OSError).
    """
    source = name = str(source)
    if source not in _NAMED:
        name = f"{Path(source).stem}-{zlib.crc32(str(Path(source).resolve()).encode()):08x}"
    folder = workspace() / "stores" / f"{name}-{limit or 'all'}"
    try:
        store = prepare(source, folder, limit, anew=True)
    except (OSError, ValueError) as error:
        if source not in ("celeba", "portraits"):
            raise  # a slip in the user's own path is not mended by other faces
        print(f"\n{'!' * 80}\n{error}\nTaking SYNTHETIC (drawn) faces instead of {source}: fine "
              f"for trying things out, useless for judging results.\n{'!' * 80}\n")
        return prepare_faces("synthetic", min(limit or 200, 200))  # drawn in half a minute
    print(f"{store.source}: {store.describe()}")
    return store


def make_pair(faces: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """(lr, hr) of stored faces, uint8 (N, 3, 178, 178): (N, 3, s, s), (N, 3, S, S), S = hr_size.

    HR is the centre `crop` resized to S, LR is HR reduced to s = S / scale; both at 8-bit levels.
    """
    start = (_SIDE - config.crop) // 2
    inner = slice(start, start + config.crop)
    hr = quantise(bicubic(faces[..., inner, inner].float().div(255), config.hr_size))
    return quantise(bicubic(hr, config.hr_size // config.scale)), hr


def web_copy(hr: Tensor, scale: int, blur: float, noise: float, quality: float,
             random: torch.Generator) -> Tensor:
    """LR of one face, hr (1, 3, S, S), as the web makes it: (1, 3, S / scale, S / scale), on a CPU.

    Blurred (deviation in LR px), reduced, noisy (deviation in 8-bit levels), saved as a JPEG of
    that quality (1 to 95; above 95: no JPEG).
    """
    from PIL import Image
    from torchvision.transforms.functional import gaussian_blur

    hr, sigma = hr.cpu(), blur * scale
    if sigma:
        hr = gaussian_blur(hr, 2 * math.ceil(3 * sigma) + 1, sigma)
    lr = bicubic(hr, hr.shape[-1] // scale)
    lr = lr + noise / 255 * torch.randn(lr.shape, generator=random)
    if quality > 95:
        return quantise(lr)
    file = io.BytesIO()
    Image.fromarray(_to_pixels(lr)[0]).save(file, format="jpeg", quality=round(quality))
    return _to_tensor(Image.open(file))


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return torch.randperm(count, generator=seeded(seed, 0, epoch)).numpy()


def batch(store: FaceStore, config: Config, update: int, device: torch.device,
          share: tuple[int, int] = (0, 1)) -> tuple[Tensor, Tensor]:
    """(lr, hr) patches of update `update`: (B, 3, p / scale, p / scale), (B, 3, p, p), p = patch.

    Each epoch visits each training face once. A function of (seed, update) alone. share: (number,
    count) of the process that asks, which gets its B = batch_size / count faces.
    """
    scale, patch, small = config.scale, config.patch, config.patch // config.scale
    members, size = store.indices("train"), config.batch_size
    mine = slice(share[0] * size // share[1], (share[0] + 1) * size // share[1])
    positions = range(update * size, (update + 1) * size)[mine]
    turns = [divmod(position, len(members)) for position in positions]
    chosen = [_epoch_order(config.seed, epoch, len(members))[turn] for epoch, turn in turns]
    random = seeded(config.seed, 1, update)  # drawn for all faces, whoever's they are
    mirrored = (torch.rand(size, generator=random) < 0.5)[mine].to(device, non_blocking=True)
    places = (config.hr_size - patch) // scale + 1
    corners = torch.randint(places, (size, 2), generator=random)[mine].tolist()
    faces = store.faces(members[chosen], device)
    if config.flip:
        faces = torch.where(mirrored.view(-1, 1, 1, 1), faces.flip(-1), faces)
    lr, hr = make_pair(faces, config)
    if config.degrade:
        copies = []
        for position, face in zip(positions, hr.split(1)):
            drawn = seeded(config.seed, 3, position)
            amounts, present = torch.rand(2, 3, generator=drawn)  # each damage in half of the faces
            blur, noise, loss = (amounts * (present < 0.5)).tolist()
            copies.append(web_copy(face, scale, 0.8 * blur, 10 * noise, 100 - 70 * loss, drawn))
        lr = torch.cat(copies).to(device)
    lr = torch.stack([image[:, y:y + small, x:x + small] for image, (y, x) in zip(lr, corners)])
    hr = torch.stack([image[:, y * scale:y * scale + patch, x * scale:x * scale + patch]
                      for image, (y, x) in zip(hr, corners)])
    return lr, hr


# --------------------------------------------------------------------------------------------------
# 10. Files of a run: checkpoints, the copy on Drive, generators in and out
# --------------------------------------------------------------------------------------------------


def _save_checkpoint(folder: Path, state: dict) -> Path:
    """Write `state` (plain data with an `update`) into `folder`; its file. The newest two stay."""
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / f"update-{state['update']:08d}.pt", folder / "checkpoint.part"
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's writer has a RuntimeError for a full disk
        raise OSError(f"the checkpoint of update {state['update']} cannot be written into {folder} "
                      f"({_one_line(error)}): make room, then run it again to continue") from None
    partial.replace(path)
    # those of later updates, which only a damaged checkpoint leaves behind, do not count
    for old in sorted(each for each in folder.glob("update-*.pt") if each < path)[:-1]:
        old.unlink()
    return path


def load_checkpoint(path: str | Path) -> dict:
    """The plain data of one checkpoint; nothing in it is executed. ValueError if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums, and does not check them
            damaged = archive.testzip()
        state = torch.load(path, map_location="cpu", weights_only=True)
        if damaged or dict(state)["update"] < 0:  # TypeError or KeyError, if it is something else
            raise ValueError("a checksum, or the update, is wrong")
        return state
    except Exception as error:  # zipfile, torch and pickle raise all kinds
        raise ValueError(f"{path} is damaged or no checkpoint ({_one_line(error)[:100]})") from None


def _update_of(path: Path) -> int:
    """Which update a checkpoint holds, without reading its tensors; -1 if it cannot be told."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["update"] + 0
    except Exception:  # as in load_checkpoint, or not there
        return -1


def newest_checkpoint(folder: str | Path, backup: str | Path | None = None) -> dict | None:
    """The newest checkpoint that verifies, of `folder` and of the slots of `backup`; None if none.

    `place` in it is its file. A damaged one is passed over by name; ValueError if none verifies,
    though there are some: nothing may start over on top of them.
    """
    paths = [*Path(folder).glob("update-*.pt"), *Path(backup or folder).glob("slot_*.pt")]
    updates, damaged = {path: _update_of(path) for path in paths}, []
    # what cannot even be opened (-1) comes first, so that it is named, then the newest
    for path in sorted(paths, key=lambda path: (updates[path] >= 0, -updates[path])):
        try:
            return load_checkpoint(path) | {"place": str(path)}
        except ValueError as error:
            damaged.append(_one_line(error))
            print(f"WARNING: passed over {damaged[-1]}", file=sys.stderr)
    if damaged:
        raise ValueError(f"no checkpoint verifies: {'; '.join(damaged)}; start a new run in "
                         "another folder" + (", with another backup" if backup else ""))
    return None


class _Backup:
    """Copies of `run` in a second `folder` (on Drive), made by a thread: training does not wait.

    Two slots are overwritten in turn, in place: Drive keeps what is deleted, and counts it. First
    the one that is not `keep`, from which the run continues. A copy that fails is said once, and
    tried again at the next save.
    """

    FILES = "config.json", "history.csv", "pretrained.safetensors", "generator.safetensors"

    def __init__(self, run: Path, folder: Path, keep: str):
        folder.mkdir(parents=True, exist_ok=True)
        slots = folder / "slot_a.pt", folder / "slot_b.pt"
        self.slots = sorted(slots, key=lambda slot: (str(slot) == keep, _update_of(slot)))
        self.run, self.folder, self.update = run, folder, _update_of(self.slots[1])  # the newest
        self.status = f"update {self.update:,}" if self.update >= 0 else "none yet"
        self.pool, self.job = ThreadPoolExecutor(1), None
        for name in self.FILES:
            if (folder / name).exists() and not (run / name).exists():  # on a fresh machine
                _write_atomically(run / name, (folder / name).read_bytes())

    def submit(self, update: int) -> None:
        """Have the checkpoint of `update` copied, unless a copy is still under way."""
        if self.job is None or self.job.done():
            self.job = self.pool.submit(self.copy, update)

    def copy(self, update: int) -> None:
        try:
            _check_mounted(self.folder)
            for name in self.FILES:
                new, there = self.run / name, self.folder / name
                # only what is new: a file half-written here comes before the slot that needs it
                if new.exists() and not (there.exists() and filecmp.cmp(new, there, shallow=False)):
                    shutil.copyfile(new, there)
            shutil.copyfile(self.run / "ckpt" / f"update-{update:08d}.pt", self.slots[0])
        except Exception as error:  # whatever it is, it must not end the training
            if "fails" not in self.status:
                print(f"WARNING: the backup in {self.folder} fails ({_one_line(error)}); training "
                      "goes on, and it is tried again", file=sys.stderr)
                self.status += ", copying fails"
            return
        self.slots.reverse()
        self.update, self.status = update, f"update {update:,} at {time.strftime('%H:%M')}"

    def finish(self, update: int) -> None:
        """Wait until the checkpoint of `update` is copied, or has failed three times; says so."""
        if self.update != update:
            print(f"copying the newest checkpoint to {self.folder} ...", file=sys.stderr)
        self.pool.shutdown()  # waits for the copy under way
        for _ in range(3):
            if self.update != update:
                self.copy(update)
        if self.update != update:
            print(f"WARNING: the newest copy in {self.folder} is: {self.status}", file=sys.stderr)


# --- Generators in and out

# What shapes a generator and its view, and what a file that lacks a field means by that
_GENERATOR_FIELDS = {
    "preset_name": "sharp", "scale": 4, "crop": 176, "hr_size": 176, "channels": 64,
    "residual_blocks": 8, "dilation": 1, "taper": False, "kernel_size": 3, "batch_norm": 0.0,
    "shared_upsampling": False, "upsampling": "shuffle", "skip": True, "output": "linear",
    "degrade": False, "precision": "auto",
}


def _shipped_weights(scale: int, ending: str = "") -> Path:
    """The project's own network for `scale`; with `-photo`, the one for compressed photos."""
    return Path(__file__).parent / "weights" / f"srgan-x{scale}{ending}.safetensors"


def export_generator(path: str | Path, generator: Generator, config: Config, **about) -> None:
    """Write a generator as safetensors, with its config and `about` (data, ...) in the header."""
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().contiguous()
               for name, value in generator.state_dict().items()}
    header = json.dumps({"config": asdict(config)} | about)
    _write_atomically(Path(path), save(tensors, metadata={"srgan": header}))


def load_generator(path: str | Path, scale: int | None = None,
                   amount: float = 1.0) -> tuple[Generator, Config, dict]:
    """The generator in `path`, in eval mode on the CPU, its config, and what its header says.

    amount: from 0, its faithful parent (trained by the pixel loss alone), to 1, the sharp one
    itself; between them every weight is mixed (ESRGAN, arXiv:1809.00219, §3.4). FileNotFoundError
    if a file is missing; ValueError if it is damaged, not ours, or not of the `scale` asked for.
    """
    from safetensors import safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such weights file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["srgan"])
            # clones: the file is mapped, and may change or go (on Drive) while this is in use
            tensors = {name: file.get_tensor(name).clone().float() for name in file.keys()}
        config = Config.from_dict({name: about["config"].get(name, default)
                                   for name, default in _GENERATOR_FIELDS.items()})
        generator = Generator(config).eval()
        generator.load_state_dict(tensors)
    except Exception as error:  # of safetensors, json and torch
        raise ValueError(f"{path} is damaged, or not a generator of this project, which is a "
                         f".safetensors that `train` wrote ({_one_line(error)[:150]})") from None
    if scale not in (None, config.scale):
        raise ValueError(f"{path} is a network for {config.scale}x, not {scale}x: use --scale "
                         f"{config.scale} or other weights")
    if amount != 1:
        name = "pretrained" if path.stem == "generator" else f"{path.stem}-pixel"
        parent = path.with_name(f"{name}.safetensors")
        if not parent.is_file():
            raise FileNotFoundError(f"a mixture needs the faithful parent of {path}, which is not "
                                    "there: leave it out, or give a run that was pre-trained")
        faithful = load_generator(parent)[0].state_dict()
        both = faithful, generator.state_dict()
        shapes = [[value.shape for value in each.values()] for each in both]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{parent} has other shapes than {path}: no parent of it")
        generator.load_state_dict({name: torch.lerp(faithful[name].float(), sharp, amount)
                                   for name, sharp in tensors.items()})
    return generator, config, about


def find_generators(scale: int, *folders: str | Path) -> list[Path]:
    """The generators for `scale` in the workspace's runs and in `folders`, newest first.

    Then the shipped ones, then those of the preset `demo`: two minutes do not make a better one.
    """
    paths, is_demo = [], {}
    with contextlib.suppress(OSError):  # Drive may have gone
        for folder in (workspace() / "runs", *folders):
            paths += Path(folder).rglob("generator.safetensors")
        paths.sort(key=lambda path: -path.stat().st_mtime)
    for path in [*paths, _shipped_weights(scale), _shipped_weights(scale, "-photo")]:
        with contextlib.suppress(ValueError, OSError):  # of another scale, damaged, not there
            is_demo[path] = load_generator(path, scale)[1].preset_name == "demo"
    return sorted(is_demo, key=is_demo.get)


# --------------------------------------------------------------------------------------------------
# 11. Inference: any photo, tile by tile, by any factor
# --------------------------------------------------------------------------------------------------

_FACTORS = (2, 4, 8)  # of the networks that `enlarge` takes
_TILE = 8192          # px of SR along a tile's side, times the root of the channels there


def _back_project(sr: Tensor, lr: Tensor, generator: Generator) -> Tensor:
    """SR, and what it lacks of LR when it is made small again (Irani & Peleg 1991).

    Not for the networks of report and paper, nor for those that learned from damaged LR: they must
    not bring its noise back.
    """
    if not generator.true_to_lr:
        return sr
    return sr + bicubic(lr - bicubic(sr, lr.shape[-2:]), sr.shape[-2:])


@torch.no_grad()
def super_resolve(generator: Generator, lr: Tensor) -> Tensor:
    """lr (N, 3, h, w) -> (N, 3, scale h, scale w) at 8-bit levels, on lr's device: `generator`'s
    images as everybody sees and measures them. In eval mode, true to LR, grey where LR is."""
    was_training, device = generator.training, next(generator.parameters()).device
    sr = generator.eval()(lr.to(device)).to(lr.device)
    generator.train(was_training)
    sr = _back_project(sr, lr, generator)
    return quantise(torch.where(_is_grey(lr), sr.mean(1, keepdim=True), sr))


@torch.no_grad()
def upscale(image: Tensor, generator: Generator, config: Config,
            tile: int | None = None) -> Tensor:
    """`image` (1, 3, h, w) enlarged: (1, 3, scale h, scale w) at 8-bit levels, on the CPU.

    `super_resolve` for any size, in tiles of `tile` LR px (default: 1 to 2 thousand px of SR) that
    overlap by the receptive field: every pixel sees all that it would in one piece, so that no seam
    shows. In the network's own precision, or a finer one.
    """
    scale, device = config.scale, next(generator.parameters()).device
    precision = _resolve_precision(config.precision, device)
    if (config.precision, precision) == ("fp16", "bf16"):  # coarser than it was trained with
        precision = "fp32"
    network = copy.deepcopy(generator).eval().to(memory_format=torch.channels_last)
    height, width = image.shape[-2:]
    tile = tile or max(16, int(_TILE / network.tail.in_channels ** 0.5) // scale)
    margin = receptive_radius(config) + 4  # 4: the back-projection
    corners = list(itertools.product(range(0, height, tile), range(0, width, tile)))
    sr, grey = torch.empty(1, 3, height * scale, width * scale), _is_grey(image).item()
    for y, x in _bar(corners, desc="enlarging", disable=len(corners) < 4):
        top, left = max(0, y - margin), max(0, x - margin)  # a tile sees what lies around it
        part = image[..., top:y + tile + margin, left:x + tile + margin].to(device)
        with _autocast(precision, device):
            made = network(part.to(memory_format=torch.channels_last))
        made = _back_project(made, part, network)
        made = quantise(made.mean(1, keepdim=True) if grey else made)
        inner = np.s_[..., (y - top) * scale:(y - top + tile) * scale,
                      (x - left) * scale:(x - left + tile) * scale]
        sr[..., y * scale:(y + tile) * scale, x * scale:(x + tile) * scale] = made[inner]
    return sr


def enlarge(photo: Tensor, factor: float, weights: dict[int, str | Path] | None = None,
            amount: float = 1.0) -> tuple[Tensor, str]:
    """`photo` (1, 3, h, w) enlarged by any `factor` from 1 to 16, and a note: by which networks.

    The next larger network does it, then `bicubic` reduces what is too large; above 8 it is the
    one for 8x, then the one for 2x. weights: the file for each scale, which is then preferred;
    else the first that `find_generators` finds. amount: as for `load_generator`. ValueError if the
    factor is out of range, FileNotFoundError if a network is missing, MemoryError.
    """
    if not 1 <= factor <= 16:
        raise ValueError(f"factor {factor:g}: give a number from 1 to 16")
    weights, sr = weights or {}, photo
    scales = [scale for scale in (*sorted(weights), *_FACTORS) if scale >= factor][:1] or [8, 2]
    height, width = (round(side * factor) for side in photo.shape[-2:])
    needed = 30 * math.prod(photo.shape[-2:]) * math.prod(scales) ** 2  # bytes: floats, and a copy
    if hasattr(os, "sysconf") and needed > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise MemoryError(f"{width} x {height} px need {needed / 1e9:,.1f} GB of memory, more than "
                          "this machine has: reduce the photo or the factor")
    for scale in scales:
        path = weights.get(scale) or next(iter(find_generators(scale)), None)
        if path is None:
            raise FileNotFoundError(f"there is no network for {scale}x yet: train one with scale = "
                                    f"{scale} (notebook 3), or choose another factor")
        generator, config, _ = load_generator(path, scale, amount)
        sr = upscale(sr, generator.to(pick_device()), config)
    note = " then ".join(f"{scale}x" for scale in scales) + " network"
    if sr.shape[-2:] != (height, width):
        return quantise(bicubic(sr, (height, width))), f"{note}, reduced to {factor:g}x"
    return sr, note


# --------------------------------------------------------------------------------------------------
# 12. Evaluation: one row per image, bicubic and HR beside it
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(generator: Generator, config: Config, store: FaceStore, indices: Sequence[int],
             lpips_net: str | None = None,
             degradation: tuple[float, float, float] | None = None) -> list[dict]:
    """One row per face: its name, and `bicubic_*` and `srgan_*` of the metrics of section 7.

    `config` says the view (crop, hr_size). lpips_net: LPIPS, too, by that network. degradation: LR
    is the `web_copy` of these numbers (blur, noise, quality). Images are rounded to 8 bits and lose
    a border of `scale` px. ValueError if too little is left.
    """
    if config.hr_size - 2 * config.scale < 11:
        raise ValueError(f"hr_size={config.hr_size} is too small to measure at {config.scale}x: "
                         "11 px must be left inside the border")
    device, edge = next(generator.parameters()).device, slice(config.scale, -config.scale)
    chunks, rows = [indices[start:start + 8] for start in range(0, len(indices), 8)], []
    for chunk in _bar(chunks, desc="measuring", unit="batch", disable=len(chunks) < 8):
        lr, hr = make_pair(store.faces(chunk).to(device), config)
        if degradation:
            copies = [web_copy(face[None], config.scale, *degradation, seeded(0, index))
                      for index, face in zip(chunk, hr)]
            lr = torch.cat(copies).to(device)
        ours, plain, hr = (images[..., edge, edge] for images in (
            super_resolve(generator, lr), quantise(bicubic(lr, config.hr_size)), hr))
        columns = {"hr_checkerboard": checkerboard_index(hr), "flat_energy": flat_energy(ours, hr),
                   "detail_correlation": detail_correlation(ours, plain, hr)}
        for method, images in (("bicubic", plain), ("srgan", ours)):
            y, hr_y = _luma(images), _luma(hr)
            scores = {"psnr_rgb": psnr(images, hr), "ssim_rgb": ssim(images, hr),
                      "psnr_y": psnr(y, hr_y), "ssim_y": ssim(y, hr_y),
                      "sharpness": sharpness(images, hr),
                      "checkerboard": checkerboard_index(images)}
            if lpips_net:
                scores["lpips"] = lpips(images, hr, lpips_net)
            columns |= {f"{method}_{metric}": values for metric, values in scores.items()}
        table = torch.stack([*columns.values()], 1).tolist()
        rows += [{"name": store.names[index]} | dict(zip(columns, values))
                 for index, values in zip(chunk, table)]
    return rows


def summarise(rows: Sequence[dict], config: Config, split: str) -> dict:
    """What metrics.json holds: means over images, for bicubic, srgan and hr; null if not finite.

    `gain`: the mean gain over bicubic in PSNR, dB, with its 95 % bootstrap interval over images
    (2,000 resamples). `added`: flat energy and detail correlation of what SRGAN adds.
    """
    summary = {"scale": config.scale, "split": split, "images": len(rows), "crop": config.crop,
               "hr_size": config.hr_size, "bicubic": {}, "srgan": {}, "hr": {"sharpness": 1},
               "gain": {}, "added": {}}
    for name in list(rows[0])[1:]:
        mean, (method, _, metric) = np.mean([row[name] for row in rows]), name.partition("_")
        if method not in summary:
            method, metric = "added", name
        summary[method][metric] = round(float(mean), 5) if math.isfinite(mean) else None
    for metric in ("psnr_rgb", "psnr_y"):
        gains = np.array([row[f"srgan_{metric}"] - row[f"bicubic_{metric}"] for row in rows])
        gains = gains[np.isfinite(gains)]  # a picture of one colour has no PSNR
        if len(gains):
            resampled = np.random.default_rng(0).integers(len(gains), size=(2_000, len(gains)))
            values = gains.mean(), *np.percentile(gains[resampled].mean(1), (2.5, 97.5))
            rounded = [round(float(value), 5) for value in values]
            summary["gain"][metric] = dict(zip(("mean", "low", "high"), rounded))
    return summary


def results_table(summary: dict) -> str:
    """A summary as a table for people."""
    metrics = list(summary["srgan"])
    lines = ["{images} {split} faces at {scale}x, {crop} -> {hr_size} px".format(**summary),
             " " * 8 + "".join(f"{metric:>13}" for metric in metrics)]
    for method in ("bicubic", "srgan", "hr"):
        line = f"{method:8}"
        for metric in metrics:
            mean, digits = summary[method].get(metric), 2 if "psnr" in metric else 3
            line += " " * 13 if mean is None else f"{mean:13.{digits}f}"
        lines.append(line)
    for metric, gain in summary["gain"].items():
        lines.append(f"gain in {metric}: {gain['mean']:+.2f} dB")
        if summary["images"] > 1:
            lines[-1] += f" (95 % interval {gain['low']:+.2f} to {gain['high']:+.2f})"
    added = summary["added"]
    lines.append(f"energy in HR's flattest blocks: {added['flat_energy']:.2f} of HR's; what is "
                 f"added correlates {added['detail_correlation']:.2f} with what bicubic lacks")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# 13. Figures: rows of panels, before/after, curves
# --------------------------------------------------------------------------------------------------


def _img(picture, alt: str, style: str = "") -> str:
    """An <img> that holds the pixels of a PNG file, an image (1, 3, H, W) or a Figure."""
    from PIL import Image

    buffer = io.BytesIO()
    if isinstance(picture, (str, Path)):
        buffer.write(Path(picture).read_bytes())
    elif isinstance(picture, Tensor):
        Image.fromarray(_to_pixels(picture)[0]).save(buffer, format="png", compress_level=1)
    else:
        picture.savefig(buffer, format="png", dpi=100)
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    width, height = Image.open(buffer).size
    # as wide as there is room; where that is little (a phone), what stands around it scrolls
    style = style or f"width: min(max(100%, 40em), {width}px); max-width: none; background: white"
    return (f'<img alt="{html.escape(alt)}" decoding="sync" src="{source}" '
            f'style="aspect-ratio: {width} / {height}; {style}">')


def show(figure, alt: str) -> None:
    """Display a Figure, or the PNG in a file, in a notebook; `alt` says what it shows in words."""
    from IPython.display import HTML, display

    display(HTML(f'<div style="overflow-x: auto">{_img(figure, alt)}</div>'))


def _fit(image: Tensor, most: int) -> Tensor:
    """(1, 3, H, W) reduced to 8-bit levels of at most `most` px along a side, if it has more."""
    share = min(1, most / max(image.shape[-2:]))
    return quantise(bicubic(image, tuple(max(1, round(side * share)) for side in image.shape[-2:])))


def panels_figure(rows: Sequence[Sequence[tuple]], zoom: tuple[float, float] | None = (0.35, 0.35),
                  size: float = 3.0):
    """Rows of panels (title, image (1, 3, H, W), caption), `size` inches each, as a Figure.

    Below each panel stands a part of it, enlarged, the same of all: a quarter of the side, `zoom`
    to the right and down (0 to 1). None: no parts.
    """
    from matplotlib.figure import Figure  # without pyplot and its global state

    lines = 2 if zoom else 1
    shape = lines * len(rows), max(map(len, rows))
    figure = Figure(figsize=(size * shape[1], (size + 0.4) * shape[0]), layout="constrained")
    axes = figure.subplots(*shape, squeeze=False,
                           subplot_kw={"xticks": [], "yticks": [], "frame_on": False})
    exact = {"interpolation": "nearest", "vmin": 0, "vmax": 255}
    for row, panels in enumerate(rows):
        for column, (title, image, caption) in enumerate(panels):
            ax, pixels = axes[lines * row, column], _to_pixels(_fit(image, 1024))[0]
            ax.imshow(pixels, **exact)
            ax.set_title(title, fontsize=max(8, min(12, 4 * size)))
            ax.set_xlabel(caption or " ")
            if zoom:
                height, width = (max(1, side // 4) for side in pixels.shape[:2])
                x, y = round(zoom[0] * 3 * width), round(zoom[1] * 3 * height)
                ax.indicate_inset([x, y, width, height], edgecolor="white", alpha=1)
                below = axes[lines * row + 1, column]
                below.imshow(pixels[y:y + height, x:x + width], **exact)
    return figure


def show_images(images: Tensor | Sequence[Tensor], titles: Sequence[str] = (), columns: int = 8,
                size: float = 1.6):
    """A Figure of images, (N, 3, H, W) or N of (3, H, W) of any size, `size` inches each."""
    panels = [(title, image[None], "")
              for image, title in itertools.zip_longest(images, titles, fillvalue="")]
    rows = [panels[start:start + columns] for start in range(0, len(panels), columns)]
    return panels_figure(rows, None, size)


def _panels(lr: Tensor, images: dict[str, Tensor], hr: Tensor | None) -> list[tuple]:
    """Panels of LR, bicubic, `images` and HR.

    If there is an HR, PSNR and SSIM (RGB) and checkerboard index stand below each, measured as
    `evaluate` does: without a border of `scale` px.
    """
    size = next(iter(images.values())).shape[-2:]
    panels = [(f"LR, {lr.shape[-1]} px", F.interpolate(lr, size=size, mode="nearest"), "")]
    edge, caption = slice(size[1] // lr.shape[-1], -(size[1] // lr.shape[-1])), ""
    for name, image in ({"bicubic": quantise(bicubic(lr, size))} | images).items():
        if hr is not None:
            inner, truth = image[..., edge, edge], hr[..., edge, edge]
            caption = (f"{psnr(inner, truth).item():.2f} dB, SSIM {ssim(inner, truth).item():.3f}\n"
                       f"checkerboard {checkerboard_index(inner).item():.2f}")
        panels.append((name, image, caption))
    if hr is not None:
        caption = f"\ncheckerboard {checkerboard_index(hr).item():.2f}"
        panels.append((f"HR, {size[1]} px", hr, caption))
    return panels


def stages_figure(networks: dict[str, Generator], config: Config, faces: Tensor,
                  errors: bool = False, zoom: tuple[float, float] | None = (0.5, 0.5)):
    """LR, bicubic, what each of `networks` makes of it, and HR, a row for each face, as a Figure.

    faces: stored ones, uint8 (N, 3, 178, 178). `config` says the view (scale, crop, hr_size).
    errors: one more panel, four times the absolute difference of the last network and HR.
    """
    rows = []
    for face in faces.split(1):
        lr, hr = make_pair(face, config)
        images = {name: super_resolve(network, lr) for name, network in networks.items()}
        rows.append(_panels(lr, images, hr))
        if errors:
            difference = (list(images.values())[-1] - hr).abs().mul(4).clamp(0, 1)
            rows[-1].append(("error, 4 times", difference, ""))
    return panels_figure(rows, zoom)


def factor_panels(picture: Tensor, factor: float, is_hr: bool = True,
                  weights: dict[int, str | Path] | None = None,
                  amount: float = 1.0) -> tuple[list[tuple], str]:
    """What `factor` does to `picture` (1, 3, h, w): panels (title, image, caption), and a note.

    is_hr: the picture is the truth. It loses the px on the right and below that `factor` (2, 4 or
    8) does not divide, and is shrunk: LR, bicubic, SRGAN and HR. Otherwise it is the LR: three
    panels and no numbers. The other arguments, the note and the errors are `enlarge`'s;
    ValueError, too, if too little is left to measure.
    """
    lr, hr = picture, None
    if is_hr:
        if factor not in _FACTORS:
            raise ValueError(f"a picture is shrunk by 2, 4 or 8 to be tested, not by {factor:g}")
        scale = int(factor)
        height, width = (side // scale for side in picture.shape[-2:])
        if (min(height, width) - 2) * scale < 11:
            raise ValueError(f"{picture.shape[-1]} x {picture.shape[-2]} px are too few to be "
                             f"shrunk {scale}x and measured")
        hr = picture[..., :height * scale, :width * scale]
        lr = quantise(bicubic(hr, (height, width)))
    sr, note = enlarge(lr, factor, weights, amount)
    return _panels(lr, {f"SRGAN {factor:g}x": sr}, hr), note


# The range input lies over the pictures, unseen: mouse, touch and keys are the browser's business.
# Its attribute keeps JupyterLab from taking the arrow keys for its own.
_BEFORE_AFTER = """<div class="srgan-cut" style="position: relative; width: min({width}px, 100%)">
<style>.srgan-cut:focus-within {{outline: 3px solid #1a73e8; outline-offset: 2px}}
.srgan-cut span {{position: absolute; top: 4px; padding: 0 6px; background: #000b; color: white}}
.srgan-cut input {{position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0;
cursor: ew-resize; touch-action: pan-y}}</style>{right}{left}
<div style="position: absolute; inset: 0 auto 0 calc(var(--cut, 50%) - 1px); width: 2px;
background: white; box-shadow: 0 0 2px black"></div>
<span style="left: 4px">{names[0]}</span><span style="right: 4px">{names[1]}</span>
<input type="range" min="0" max="100" value="50" data-lm-suppress-shortcuts="true"
aria-label="{names[0]} left of the line, {names[1]} right of it: per cent"
oninput="this.parentNode.style.setProperty('--cut', this.value + '%')"></div>"""


def before_after(left: Tensor, right: Tensor, names: tuple[str, str], alt: str):
    """Two images (1, 3, H, W) upon each other, and a line to be moved between them, as HTML.

    By mouse, touch or arrow keys. Its `data` works as the value of an ipywidgets.HTML, too.
    """
    from IPython.display import HTML

    times = max(1, 640 // left.shape[-1])
    style = f"display: block; width: 100%; image-rendering: {'pixelated' if times > 1 else 'auto'}"
    cut = "position: absolute; inset: 0; clip-path: inset(0 calc(100% - var(--cut, 50%)) 0 0)"
    return HTML(_BEFORE_AFTER.format(
        width=times * left.shape[-1], names=[html.escape(name) for name in names],
        left=_img(_fit(left, 1024), f"{alt}: {names[0]}", f"{style}; {cut}"),
        right=_img(_fit(right, 1024), f"{alt}: {names[1]}", style)))


def _unused(path: Path) -> Path:
    """`path`, or with a number added where it exists: no result is written over."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], numbered) if not each.exists())


def history_figure(path: str | Path):
    """The losses of a run's history.csv as a Figure: a panel for each of the two networks."""
    from matplotlib.figure import Figure

    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(12, 3), layout="constrained")
    losses = {"generator": ("pixel", "content", "adversarial"),
              "discriminator": ("d_loss", "d_real", "d_fake")}
    for ax, (network, names) in zip(figure.subplots(1, 2), losses.items()):
        ax.set(title=network, xlabel="update")
        for name in names:
            steps = [int(row["step"]) for row in rows if row[name]]
            if steps:
                width = max(1, len(steps) // 200)  # a running mean, or noise hides the trend
                values = [float(row[name]) for row in rows if row[name]]
                smooth = np.convolve(values, np.full(width, 1 / width), mode="valid")
                ax.plot(steps[width - 1:], smooth, ".-" if len(smooth) < 3 else "-", label=name)
        if ax.lines:
            ax.legend()
        else:
            ax.text(0.5, 0.5, "not yet: pixels alone so far", ha="center", transform=ax.transAxes)
    figure.axes[0].set_yscale("log")  # the generator's differ by orders of magnitude
    return figure


def write_comparison(store: FaceStore, generator: Generator, config: Config, folder: Path,
                     split: str = "test", count: int | None = None, lpips_net: str | None = None,
                     errors: bool = False) -> dict:
    """Measure `generator` on `count` faces of `split` (default: all, at most 2,000).

    Leaves panels.png, metrics.csv (see `evaluate`) and metrics.json in `folder`; returns what that
    holds (see `summarise`).
    """
    chosen = _spread(store.indices(split), count or 2000)
    rows = evaluate(generator, config, store, chosen, lpips_net)
    with open(folder / "metrics.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    summary = summarise(rows, config, split)
    _write_atomically(folder / "metrics.json", (json.dumps(summary, indent=1) + "\n").encode())
    faces, networks = store.faces(_spread(chosen, 4)), {f"SRGAN {config.scale}x": generator}
    stages_figure(networks, config, faces, errors, None).savefig(folder / "panels.png", dpi=100)
    return summary


# --------------------------------------------------------------------------------------------------
# 14. Training: the loop and its files; the report reproduced
# --------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """What `train` reports about once a second."""

    step: int                      # updates done, pre-training included
    total: int                     # updates in all
    stage: str                     # pretrain or adversarial
    losses: dict[str, float]       # of the newest update
    images_per_second: float
    seconds_left: float
    sample: Path | None            # a strip just drawn
    checkpoint: str                # which update the newest one holds, and how old it is
    backup: str                    # the same of the copy, "" where there is none
    done: bool                     # nothing more will come
    stopped: bool                  # by a person or by the clock, before the end
    notes: list[str]               # what there is to say


_FREE_TO_CHANGE = {"steps", "save_steps", "save_minutes", "sample_steps", "precision"}
# The columns of history.csv: `step`, then what the three steps of section 6 return
_HISTORY = ("step", "stage", "seconds", "learning_rate", "g_loss", "pixel", "content",
            "adversarial", "weighted_content", "weighted_adversarial", "d_loss", "d_real", "d_fake")


def run_name(config: Config, store: FaceStore) -> str:
    """`preset-xS-hash`, the hash of what differs from the preset and of the faces."""
    plain = asdict(Config.preset(config.preset_name))
    differs = {name: value for name, value in asdict(config).items()
               if value != plain[name] and name not in _FREE_TO_CHANGE}
    told = json.dumps([differs, store.fingerprint], sort_keys=True)
    return f"{config.preset_name}-x{config.scale}-{hashlib.sha256(told.encode()).hexdigest()[:6]}"


def _look_up(folder: str | Path, store: FaceStore, preset: str | None, changes: dict | None,
             backup: str | Path | None) -> tuple[Config, dict | None]:
    """The config of the run in `folder`, and its newest checkpoint; ValueError if it is another."""
    if backup:
        _check_mounted(Path(backup))
        with contextlib.suppress(FileNotFoundError):
            os.listdir(backup)  # OSError where Drive cannot be read: `glob` would find nothing
    saved, count = newest_checkpoint(Path(folder) / "ckpt", backup), _share()[1]
    old = saved["config"] if saved else asdict(Config.preset(preset or "sharp"))
    given = {"preset_name": preset or old["preset_name"]} | (changes or {})
    config = Config.from_dict(old, **given).for_faces(len(store.indices("train")))
    if saved and saved["store"] != store.fingerprint:
        raise ValueError(f"{folder} was trained on other faces than those in {store.folder}: name "
                         "the store it began with, or another folder")
    for name, value in old.items() if saved else ():
        new = getattr(config, name)
        longer_now = name == "decay_steps" and value < new <= config.steps  # see `longer`
        if new != value and name not in _FREE_TO_CHANGE and not longer_now:
            raise ValueError(f"{folder} was started with {name}={value}, not {new}: start a new "
                             "run in another folder")
    if config.batch_size % count:
        raise ValueError(f"batch_size={config.batch_size} cannot be shared by {count} processes")
    precision = _resolve_precision(config.precision, pick_device())
    return replace(config, precision=precision), saved


def _check_run_space(config: Config, *folders: str | Path | None) -> None:
    """OSError if one of `folders` lacks room for the checkpoints: two and the one being written."""
    with torch.device("meta"):  # shapes alone: no memory
        own = [count_parameters(network(config)) for network in (Generator, Discriminator)]
    size = 4 * (3 * sum(own) + own[0])  # 3: Adam keeps two moments of each; then the average
    for folder in map(Path, filter(None, folders)):
        there = sum(path.stat().st_size for path in folder.glob("**/*.pt"))
        _check_space(folder, 3 * size - there, "checkpoints")


def _updates(state: TrainState, store: FaceStore, count: int) -> list[dict[str, float]]:
    """The next `count` updates, of one stage; their losses, fetched together: a GPU's host waits.

    FloatingPointError if a loss, or a weight after the last update, is not finite.
    """
    losses = [_one_update(state, *batch(store, state.config, state.update, state.device, _share()))
              for _ in range(count)]
    names, table = list(losses[0]), torch.stack([torch.stack([*each.values()]) for each in losses])
    if _share()[1] > 1:
        distributed.all_reduce(table)
        table /= _share()[1]
    broken = [name for name, column in zip(names, table.T) if not column.isfinite().all()]
    weights = itertools.chain(state.generator.parameters(), state.discriminator.parameters())
    # a sum keeps what is not finite, and takes a thirtieth of the time of looking at each number
    if broken or not all(each.sum().isfinite() for each in weights):
        raise FloatingPointError(f"by update {state.update}, {', '.join(broken) or 'a weight'} is "
                                 "not finite any more: continue with precision=fp32 (the newest "
                                 "checkpoint is from before that), or start a new run with a lower "
                                 "learning_rate")
    return [dict(zip(names, values)) for values in table.tolist()]


def _pace(config: Config, store: FaceStore) -> dict[str, float]:
    """How many seconds an update of each stage takes here, by timing four."""
    pretrain, steps = (6 if length else 0 for length in (config.pretrain_steps, config.steps))
    config, pace = replace(config, pretrain_steps=pretrain, steps=steps), {}
    state = TrainState(config, pick_device())
    while state.update < config.total_steps:
        _updates(state, store, 2)  # which take longer
        begun = time.perf_counter()
        _updates(state, store, 4)
        stage = "pretrain" if state.update == pretrain else "adversarial"
        pace[stage] = (time.perf_counter() - begun) / 4
    return pace


def _seconds_left(config: Config, done: int, pace: dict[str, float]) -> float:
    """How long the updates after `done` take, where one of each stage takes what `pace` says."""
    pretrain = pace.get("pretrain", 0.0)
    adversarial = pace.get("adversarial", 3 * pretrain)  # a guess, until one has been seen
    first = max(0, config.pretrain_steps - done)
    seconds = first * pretrain + (config.total_steps - done - first) * adversarial
    return seconds / 0.96  # samples and checkpoints take the rest


class _Run:
    """A run on its way: its networks, its folder, its clock. How it is saved and resumed:

    `save`, between two updates, writes all that continuing needs (`_save_checkpoint`), and has it
    copied (`_Backup`). Later `_look_up` takes the newest that verifies (`newest_checkpoint`), and
    `__init__` loads it and puts history.csv back to that update. Which faces come next needs no
    saving: `batch` is a function of the seed and the update.
    """

    def __init__(self, folder: Path, store: FaceStore, config: Config, saved: dict | None,
                 backup: Path | None):
        self.folder, self.store, self.pace, self.notes, self.backup = folder, store, {}, [], None
        self.state, self.began = TrainState(config, pick_device()), time.perf_counter()
        self.saved_update, self.saved_at, self.seconds = 0, time.time(), 0.0
        if saved:
            try:
                self.state.load(saved)
            except torch.OutOfMemoryError:  # a RuntimeError, too, but the checkpoint is good
                raise
            except (LookupError, TypeError, AttributeError, RuntimeError, ValueError):
                raise ValueError(f"{saved['place']} does not hold the networks of this run: delete "
                                 "it to continue from the one before") from None
            self.began -= saved["seconds"]
            self.saved_update = saved["update"]
            self.notes.append(f"continues at update {saved['update']:,} of {config.total_steps:,}")
        device, often = self.state.device, config.total_steps * config.batch_size > len(store)
        if device.type == "cuda" and often:  # the faces beside the networks, where they fit
            torch.cuda.empty_cache()  # else what earlier runs left would count as taken
            if len(store) * _SIDE * _SIDE * 3 < torch.cuda.mem_get_info()[0] / 4:
                store.keep_on(device)
        self.writes = _share()[0] == 0  # of several processes, the first one
        if not self.writes:
            return
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        if backup:
            self.backup = _Backup(folder, backup, saved["place"] if saved else "")
        record = {"store": store.fingerprint, "config": asdict(config),
                  "environment": _environment(), "processes": _share()[1]}
        _write_atomically(folder / "config.json", json.dumps(record, indent=1).encode())
        history = saved["history"] if saved else ",".join(_HISTORY) + "\n"
        _write_atomically(folder / "history.csv", history.encode())  # no row comes twice

    def save(self) -> None:
        """The generator in use, then a checkpoint; killed in between, the one before counts."""
        state, store = self.state, self.store
        if state.update == self.saved_update:
            return
        if self.writes:
            data = {"source": Path(store.source).name, "fingerprint": store.fingerprint}
            pretrained = state.update == state.config.pretrain_steps
            for name in ("pretrained", "generator") if pretrained else ("generator",):
                export_generator(self.folder / f"{name}.safetensors", state.best, state.config,
                                 data=data, update=state.update, seconds=round(self.seconds),
                                 environment=_environment())
            _save_checkpoint(self.folder / "ckpt", {  # last: what is saved is not saved again
                "update": state.update, "seconds": self.seconds, "config": asdict(state.config),
                "store": store.fingerprint,
                "history": (self.folder / "history.csv").read_text(encoding="utf-8"),
                **{name: part.state_dict() for name, part in state.parts().items()}})
        self.saved_update, self.saved_at = state.update, time.time()
        if self.backup:
            self.backup.submit(state.update)

    def record(self, stage: str, losses: list[dict[str, float]]) -> None:
        """Append the losses of the newest updates to history.csv."""
        config, first = self.state.config, self.state.update - len(losses)
        with open(self.folder / "history.csv", "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _HISTORY, lineterminator="\n")
            for update, values in enumerate(losses, first):
                values = {"learning_rate": _learning_rate(config, update)} | values
                writer.writerow(
                    {"step": update + 1, "stage": stage, "seconds": f"{self.seconds:.1f}"}
                    | {name: f"{value:.6g}" for name, value in values.items()})

    def draw(self) -> Path:
        """Four faces that are not trained on, as LR, bicubic, SR and HR, in a PNG."""
        part = "validation" if (self.store.split == 1).any() else "train"
        faces = self.store.faces(_spread(self.store.indices(part), 4))
        path = self.folder / "samples" / f"update-{self.state.update:07d}.png"
        networks = {f"update {self.state.update:,}": self.state.best}
        stages_figure(networks, self.state.config, faces, zoom=None).savefig(path, dpi=60)
        return path

    def advance(self, held: list, deadline: float) -> Progress:
        """About a second's updates, and whatever is due after them: a strip, a checkpoint."""
        state, config, begun = self.state, self.state.config, time.perf_counter()
        done, losses, sample = state.update, [{}], None
        stage = "pretrain" if done < config.pretrain_steps else "adversarial"
        # so many at once: a second's, up to the end of a stage, a checkpoint or a strip
        ends = [end for end in (config.pretrain_steps, config.total_steps) if end > done]
        ends += [done - done % every + every for every in (config.save_steps, config.sample_steps)]
        a_second = max(1, min(50, int(1 / self.pace.get(stage, 1))))
        if done < config.total_steps:  # else the run was finished when it was opened
            count = _from_first(min(a_second, min(ends) - done))
            losses = _updates(state, self.store, count)
            self.pace[stage] = (time.perf_counter() - begun) / count
        finished, now = state.update >= config.total_steps, time.perf_counter()
        self.seconds = now - self.began
        stopped, due = _from_first((not finished and (bool(held) or now > deadline),
                                    time.time() - self.saved_at > 60 * config.save_minutes))
        at_an_end = stopped or state.update in (config.pretrain_steps, config.total_steps)
        if state.update > done and self.writes:
            self.record(stage, losses)
            if at_an_end or state.update % config.sample_steps == 0:
                sample = self.draw()
        if at_an_end or due or state.update % config.save_steps == 0:
            self.save()
        if stopped:
            self.notes.append(f"stopped at update {state.update:,} of {config.total_steps:,}; "
                              "saved, run it again to continue")
        kept = f"update {self.saved_update:,}, {_duration(time.time() - self.saved_at)} ago"
        notes, self.notes = self.notes, []
        return Progress(
            state.update, config.total_steps, stage, losses[-1],
            config.batch_size / self.pace.get(stage, math.inf),
            min(_seconds_left(config, state.update, self.pace), deadline - now), sample,
            kept if self.saved_update else "none yet", self.backup.status if self.backup else "",
            finished or stopped, stopped, notes)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[list]:
    """Ctrl-C, a stop button and a polite `kill` only fill the list; a second one interrupts."""
    held: list = []

    def hold(number, frame):
        if held:
            raise KeyboardInterrupt
        held.append(number)

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ValueError):  # only the main thread may
            for kind in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, kind, signal.signal(kind, hold))
        yield held


def train(store: FaceStore, folder: str | Path, preset: str | None = None,
          changes: dict | None = None, *, backup: str | Path | None = None,
          max_minutes: float | None = None, for_minutes: float | None = None) -> Iterator[Progress]:
    """Start the run in `folder`, or continue it: a generator, so that the caller keeps the `for`.

    Yields `Progress` about once a second. preset, changes: as for `Config.preset`; a run that
    exists keeps what is not given, and refuses (ValueError) what would make it another run.
    max_minutes: save and stop after so long. for_minutes: a new run sets its length to fit. backup:
    a second folder (on Drive) for copies, from which it also continues. Ctrl-C, the stop button and
    leaving the loop save first. FloatingPointError if a loss is not finite; BlockingIOError if the
    run is trained elsewhere; OSError if the checkpoints do not fit.
    """
    folder, backup, progress = Path(folder), Path(backup) if backup else None, None
    _check_mounted(folder)
    deadline = time.perf_counter() + 60 * (max_minutes or math.inf)
    first = _share()[0] == 0  # of several processes; the others take what it finds
    with _locked(folder) if first else contextlib.nullcontext():
        config, saved = _from_first(
            _look_up(folder, store, preset, changes, backup) if first else None)
        _check_run_space(config, folder, backup)
        if for_minutes and not saved:
            whole = max(1e-9, _seconds_left(config, 0, _pace(config, store)))
            config = config.lasting(_from_first(int(config.total_steps * 60 * for_minutes / whole)))
        run = _Run(folder, store, config, saved, backup)
        if for_minutes and saved:
            run.notes.append(f"the run keeps its own length, {config.total_steps:,} updates")
        try:
            with _interrupts_held() as held:
                while progress is None or not progress.done:
                    progress = run.advance(held, deadline)
                    yield progress
        except GeneratorExit:  # the loop is left between two updates
            run.save()
            raise
        finally:
            if run.backup and run.saved_update:
                run.backup.finish(run.saved_update)
            store.keep_on(None)


def longer(store: FaceStore, folder: str | Path, minutes: float,
           backup: str | Path | None = None) -> dict:
    """Changes, for `train`, with which a finished run trains on for so many `minutes`.

    Its learning rate rises to what a decay of that length has there. {} for a new run; one that is
    not finished keeps its length.
    """
    config, saved = _look_up(folder, store, None, None, backup)
    if not saved:
        return {}
    steps = config.steps
    if saved["update"] >= config.total_steps:
        one = replace(config, pretrain_steps=0, steps=1)
        steps += math.ceil(60 * minutes / _seconds_left(one, 0, _pace(one, store)))
    return {"steps": steps, "decay_steps": steps}


def forecast(store: FaceStore, folder: str | Path, preset: str | None = None,
             changes: dict | None = None, *, backup: str | Path | None = None,
             max_minutes: float | None = None, for_minutes: float | None = None) -> str:
    """What `train` with the same arguments will do, and how long it will take, by timing.

    Warns where time, Colab's session or the disks do not suffice. Writes nothing; raises as train.
    """
    config, saved = _look_up(folder, store, preset, changes, backup)
    done, total = saved["update"] if saved else 0, config.total_steps
    if saved and done >= total:
        return f"finished: all {total:,} updates are done; more minutes, or more steps, train on"
    told = f"continues at update {done:,}" if saved else "starts a new run"
    if for_minutes and not saved:
        seconds, length = 60 * for_minutes, "timing sets its length"
    else:
        seconds, length = _seconds_left(config, done, _pace(config, store)), f"{total:,} updates"
    told += f"; {length}: about {_duration(seconds)} on this machine"
    if max_minutes and seconds > max_minutes * 60:
        told += (f"\nWARNING: {_duration(max_minutes * 60)} do not suffice: it will save and stop "
                 f"after about {6000 * max_minutes / seconds:.0f} %; train again then")
    if in_colab() and seconds > 12 * 3600:
        then = "run it again then, and it continues" if backup else "without Drive all is lost then"
        told += f"\nWARNING: Colab ends a session after 12 h at most: {then}"
    for place in (folder, backup):
        try:
            _check_run_space(config, place)
        except OSError as error:
            told += f"\nWARNING: {error}"
    return told


def reproduce_report(store: FaceStore, folder: str | Path, changes: dict | None = None,
                     looks: Sequence[int] = (10, 100, 500, 1000, 2000),
                     backup: str | Path | None = None) -> Iterator[Progress]:
    """Train the preset `report` with `changes`, then `sharp` in its view for as long.

    Yields what `train` does; stopped, it continues. Leaves in `folder` the runs and, of the report
    after `looks` updates and at its end and of `sharp`, stages.png (two test faces) and stages.txt
    (up to 200). backup: a second folder, as for `train`. The report's generators are kept there.
    """
    folder, changes, kept, networks = Path(folder), dict(changes or {}), {}, {}
    safe = Path(backup or folder)
    config = Config.preset("report", **changes).for_faces(len(store.indices("train")))
    fixed = {name: value for name, value in changes.items() if name not in ("epochs", "steps")}
    for steps in sorted({look for look in looks if look < config.steps} | {config.steps}):
        path = kept[f"report, {steps} updates"] = safe / f"report-{steps:06}.safetensors"
        if not path.exists():
            for event in train(store, folder / "report", "report", fixed | {"steps": steps},
                               backup=backup and safe / "report"):
                yield event
            if event.stopped:
                return
            _write_atomically(path, (folder / "report" / "generator.safetensors").read_bytes())
    view = {name: getattr(config, name) for name in ("scale", "crop", "hr_size", "vgg")}
    sharp, minutes = folder / f"sharp-{config.steps:06}", load_generator(path)[2]["seconds"] / 60
    for event in train(store, sharp, "sharp", view, for_minutes=max(minutes, 0.01),
                       backup=backup and safe / sharp.name):
        yield event
    if event.stopped:
        return
    kept["sharp"], test = sharp / "generator.safetensors", _spread(store.indices("test"), 200)
    lines = [f"vgg={Path(config.vgg).name}"]
    for name, path in kept.items():
        networks[name], _, about = load_generator(path)
        rows = evaluate(networks[name].to(pick_device()), config, store, test)
        table = results_table(summarise(rows, config, "test"))
        lines.append(f"\n{name}, {about['seconds'] / 60:.1f} minutes\n{table}")
    _write_atomically(folder / "stages.txt", ("\n".join(lines) + "\n").encode())
    stages_figure(networks, config, store.faces(test[:2])).savefig(folder / "stages.png", dpi=80)


# --------------------------------------------------------------------------------------------------
# 15. Notebook aids: source code, the live view, uploads, the upscale factor by hand
# --------------------------------------------------------------------------------------------------


def show_source(*objects) -> None:
    """Display the source of classes or functions of this module, highlighted."""
    import inspect

    from IPython.display import Markdown, display

    for each in objects:
        display(Markdown(f"```python\n{inspect.getsource(each)}```"))


@torch.no_grad()
def shape_walk(model: nn.Module, *inputs: Tensor) -> str:
    """One line per part of `model`, in the order they ran on `inputs`: name, shapes, parameters."""
    rows, model = [], copy.deepcopy(model).eval()
    names = {part: name for name, part in model.named_modules()}

    def note(part, given, output):
        before, after = str(tuple(given[0].shape)), str(tuple(output.shape))
        rows.append(f"{names[part]:<12}{before:>22} -> {after:<22}{count_parameters(part):>12,}")

    for part, name in names.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        if name and (parent is model or isinstance(parent, nn.ModuleList)):
            part.register_forward_hook(note)
    model(*inputs)
    return "\n".join(rows)


def _told(event: Progress) -> str:
    """An event in words: stage, update, speed, time left, losses."""
    losses = "".join(f", {name} {event.losses[name]:.3g}" for name in ("pixel", "d_loss")
                     if name in event.losses)
    return (f"{event.stage}: update {event.step:,} of {event.total:,}, "
            f"{event.images_per_second:.0f} img/s, {_duration(event.seconds_left)} left{losses}")


def progress_bar(events: Iterator[Progress]) -> Iterator[Progress]:
    """Pass on what `train` yields, with a text bar: stage, losses, images per second, time left."""
    with contextlib.closing(events), _bar(bar_format="{percentage:3.0f}%|{bar}| {desc}") as bar:
        for event in events:
            for note in event.notes:
                bar.write(note, file=bar.fp)
            bar.total, bar.n = event.total, event.step
            backup = f", backup: {event.backup}" if event.backup else ""
            bar.set_description_str(_told(event) + backup)
            yield event


def watch(events: Iterator[Progress], folder: str | Path) -> Iterator[Progress]:
    """Pass on what `train` yields of the run in `folder`, in a view that is redrawn in place.

    A status line with the ages of checkpoint and backup, the loss curves, the newest strip. The
    notebook's stop button saves, and the cell ends as usual.
    """
    from IPython.display import HTML, display

    status, curves, strip = (display(HTML(""), display_id=True) for _ in range(3))
    newest, due = max((Path(folder) / "samples").glob("*.png"), default=None), 0.0
    with contextlib.closing(events):
        for event in events:
            kept = f"checkpoint: {event.checkpoint}; backup: {event.backup or 'none'}"
            text = "<br>".join(map(html.escape, [_told(event), kept, *event.notes]))
            bar = f'<progress value="{event.step}" max="{event.total}" aria-label="updates done">'
            status.update(HTML(f'<div role="status">{text}</div>{bar}</progress>'))
            if event.done or event.sample or time.monotonic() > due:
                alt = f"loss curves up to update {event.step}"
                curves.update(HTML(_img(history_figure(Path(folder) / "history.csv"), alt)))
                due = time.monotonic() + 10  # drawing takes some tenths of a second
            if newest := event.sample or newest:
                alt = f"{newest.stem}, a row for each face: LR, bicubic, the network's, HR"
                strip.update(HTML(_img(newest, alt)))
                newest = None
            yield event


def export_zip(folder: str | Path) -> Path:
    """Pack the run in `folder`, without its checkpoints, into FOLDER.zip beside it.

    In Colab, download that. FileNotFoundError if nothing is trained yet.
    """
    folder = Path(folder)
    if not (folder / "generator.safetensors").exists():
        raise FileNotFoundError(f"{folder} has no generator yet: train first")
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(folder, Path(place, folder.name), ignore=shutil.ignore_patterns("ckpt"))
        path = Path(shutil.make_archive(str(folder), "zip", place))
    if in_colab():
        from google.colab import files

        files.download(str(path))
    return path


def upload_images(folder: str | Path):
    """Have the user choose images for `folder`.

    In Colab by its own dialog, which this waits for: returns None. Elsewhere by the ipywidgets
    FileUpload that is returned, for files of up to about 10 MB: larger ones do not arrive.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if in_colab():
        from google.colab import files

        for name, data in files.upload().items():
            Path(name).unlink(missing_ok=True)  # Colab has put a copy into the current folder
            (folder / Path(name).name).write_bytes(data)
        return None
    import ipywidgets

    widget = ipywidgets.FileUpload(accept="image/*", multiple=True, description="Choose photos",
                                   layout={"width": "auto"})

    def save(_):
        value = widget.value  # a dict in ipywidgets 7, a tuple in 8
        new = value.items() if isinstance(value, dict) else ((each["name"], each) for each in value)
        for name, each in new:
            (folder / Path(name.replace("\\", "/")).name).write_bytes(each["content"])

    widget.observe(save, names="value")
    return widget


_PANEL_LIMIT = 4096  # px of SR along a side: 200 MB for each panel
_OF_A_PHOTO = ("Choose a photo", "Mode", "Reduce crop to", "Crop size", "Crop left", "Crop top")


class Explorer:
    """The upscale factor by hand, for a notebook: display `panel`.

    All that it shows, `factor_panels`, `panels_figure` and `before_after` make without widgets.
    store: whose test faces are shown. path: the network to begin with; folders: where others are,
    as for `find_generators`. `controls`: the widgets by label. `status`: what is shown, or wrong.
    """

    def __init__(self, store: FaceStore, path: str | Path, *folders: str | Path):
        import ipywidgets as widgets

        self._store, self._path, self._folders = store, Path(path), folders
        self._scale, self._test = load_generator(path)[1].scale, store.indices("test")
        self._photos, self._photo = workspace() / "photos", None
        self._scales, self._rows, self._busy = [], [], False
        style, layout = {"description_width": "initial"}, {"width": "26em", "max_width": "98%"}

        def choice(*options):
            return widgets.ToggleButtons(options=options, style=style | {"button_width": "auto"})

        def slider(value, low=0, high=1, step=0.05):
            kind = widgets.IntSlider if isinstance(value, int) else widgets.FloatSlider
            return kind(value=value, min=low, max=high, step=step, style=style, layout=layout,
                        continuous_update=False)

        self.controls = {
            "Upscale factor": choice("2x", "4x", "8x", "all factors"),
            "Any factor": slider(4.0, 1, 16, 0.1),
            "Network": widgets.Dropdown(style=style, layout=layout),
            "Faithful to sharp": slider(1.0),
            "Picture": choice("Test face", "Your photo"),
            "Face": slider(0, 0, max(1, len(self._test) - 1), 1),
            "Choose a photo": widgets.Button() if in_colab() else upload_images(self._photos),
            "Mode": choice("Test it", "Enlarge it"), "Reduce crop to": slider(176, 32, 1024, 8),
            "Crop size": slider(1.0, 0.05, 1, 0.01),
            "Crop left": slider(0.5, step=0.01), "Crop top": slider(0.5, step=0.01),
            "Zoom left": slider(0.35), "Zoom top": slider(0.35),
            "Before/after": choice("bicubic | SRGAN", "SRGAN | HR"), "Save": widgets.Button(),
        }
        self.controls["Upscale factor"].value = f"{self._scale}x"
        for label, control in self.controls.items():
            control.description = label
            if isinstance(control, widgets.Button):
                control.on_click(lambda _, label=label: self._change(label))
            else:
                control.observe(lambda _, label=label: self._change(label), names="value")
        self.status, self.picture, self.line = (widgets.HTML() for _ in range(3))
        box = widgets.Box(list(self.controls.values()), layout={"flex_flow": "row wrap"})
        self.panel = widgets.VBox([box, self.status, self.picture, self.line])
        self._change("Picture")

    def _change(self, label: str) -> None:
        """What a change of a control does. Errors stand in the status line, where they are read."""
        if self._busy:  # a control that this moves itself
            return
        self._busy = True
        try:
            if label == "Choose a photo":
                self._take_photo()
            if label not in ("Zoom left", "Zoom top", "Before/after", "Save"):
                self._fit_controls()
                self._enlarge()
            self._show()
            if label == "Save":
                self._save()
        except Exception as error:  # elsewhere nobody would see it
            self._say(_one_line(error))
        finally:  # also where the kernel is interrupted
            self._busy = False

    def _say(self, text: str) -> None:
        self.status.value = f'<div role="status">{html.escape(text)}</div>'

    def _take_photo(self) -> None:
        """The newest photo in the folder; outside Colab the button has put it there already."""
        if in_colab():
            upload_images(self._photos)
        photos = sorted(self._photos.glob("[!.]*"), key=lambda path: path.stat().st_mtime_ns)
        if photos:
            self._photo = photos[-1].stem, load_image(photos[-1])

    def _fit_controls(self) -> None:
        """Show the controls that apply; list the networks where the scale has changed."""
        controls, before = self.controls, self._scales
        own = controls["Picture"].value == "Your photo"
        self._is_hr = not own or controls["Mode"].value == "Test it"
        shown = {"Face": not own, "Upscale factor": self._is_hr, "Any factor": not self._is_hr}
        for label, visible in (shown | dict.fromkeys(_OF_A_PHOTO, own)).items():
            controls[label].layout.display = None if visible else "none"
        if not self._is_hr:
            wanted = controls["Any factor"].value
            self._scales = [next((scale for scale in _FACTORS if scale >= wanted), 8)]
        elif controls["Upscale factor"].value == "all factors":
            self._scales = list(_FACTORS)
        else:
            self._scales = [int(controls["Upscale factor"].value[0])]
        if self._scales != before:
            found = {scale: find_generators(scale, *self._folders) for scale in _FACTORS}
            found[self._scale].insert(0, self._path)
            self._best = {scale: paths[0] for scale, paths in found.items() if paths}
            paths = found[self._scales[0]] if len(self._scales) == 1 else []
            names = {str(path.parent / path.stem): path for path in paths}
            controls["Network"].options = list(names.items())
            controls["Network"].index = 0 if paths else None

    def _image(self) -> tuple[str, Tensor]:
        """What is to be enlarged: its name, and (1, 3, h, w)."""
        value = {label: getattr(each, "value", None) for label, each in self.controls.items()}
        if value["Picture"] == "Test face":
            view = load_generator(value["Network"])[1] if value["Network"] else Config()
            number = value["Face"] % len(self._test)
            face = self._store.faces([self._test[number]])
            return f"face {number}", make_pair(face, view)[1]
        if self._photo is None:
            raise ValueError("choose a photo first, with the button above")
        name, photo = self._photo
        side = max(1, round(value["Crop size"] * min(photo.shape[-2:])))
        x = round(value["Crop left"] * (photo.shape[-1] - side))
        y = round(value["Crop top"] * (photo.shape[-2] - side))
        return name, _fit(photo[..., y:y + side, x:x + side], value["Reduce crop to"])

    def _enlarge(self) -> None:
        """Make the rows of panels anew, one for each factor."""
        began, network = time.monotonic(), self.controls["Network"].value
        self._rows, self.picture.value, self.line.value = [], "", ""
        name, image = self._image()
        self._say(f"enlarging {name} ...")
        factors = self._scales if self._is_hr else [self.controls["Any factor"].value]
        if not self._is_hr and image.shape[-1] * factors[0] > _PANEL_LIMIT:
            raise ValueError(f"{_PANEL_LIMIT} px are the most here: crop or reduce more, or "
                             "use python srgan_utils.py upscale")
        weights = self._best | ({self._scales[0]: network} if network else {})
        amount = self.controls["Faithful to sharp"].value
        made = [factor_panels(image, factor, self._is_hr, weights, amount) for factor in factors]
        self._rows, note = [panels for panels, _ in made], made[-1][1]
        self._title = f"{name} all factors" if len(made) > 1 else f"{name} {factors[0]:g}x"
        self._say(f"{self._title}, by the {note}; {time.monotonic() - began:.2f} s")

    def _show(self) -> None:
        if not self._rows:
            raise ValueError("there is nothing to show yet")
        zoom = self.controls["Zoom left"].value, self.controls["Zoom top"].value
        self._figure = panels_figure(self._rows, zoom)
        told = "; ".join(f"{title} {caption}" for row in self._rows for title, _, caption in row)
        self.picture.value = _img(self._figure, f"{self._title}: {told}")
        images = [image for _, image, _ in self._rows[-1]]
        pair = self.controls["Before/after"].value if self._is_hr else "bicubic | SRGAN"
        left, right = images[1:3] if pair == "bicubic | SRGAN" else images[2:4]
        self.line.value = before_after(left, right, tuple(pair.split(" | ")), self._title).data

    def _save(self) -> None:
        """Write what is shown into the workspace; nothing saved before is written over."""
        blend = self.controls["Faithful to sharp"].value
        path = _unused(workspace() / f"{self._title}, blend {blend:g}.png")
        self._figure.savefig(path, dpi=120)
        save_image(self._rows[-1][2][1], path.with_stem(f"{path.stem}, enlarged"))
        self._say(f"saved: {path}, and the enlarged picture beside it")


# --------------------------------------------------------------------------------------------------
# 16. Command line: `python srgan_utils.py COMMAND`
# --------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}; see `python {self.prog} --help`")


def _number(kind: type, wanted: str, low: float = 1e-9, high: float = 1e9) -> Callable:
    """For argparse: a number of `kind` from `low` to `high`; `wanted` says that in words."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= float(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text}: give a {wanted}")
    return parse


def _made(folder: str) -> Path:
    _check_mounted(Path(folder))
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def _chosen_weights(args: argparse.Namespace, scale: int) -> Path:
    """The file that --run or --weights names, or that is in this folder; else the shipped one."""
    path = Path(args.run or _shipped_weights(scale))
    if path.is_dir():
        path /= "generator.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"no such weights file: {path}; train it first, or take a "
                                "--scale that the project brings: 2, 4, 8")
    print(f"weights: {path}, blend {args.blend:g}")
    return path


def _demo(args: argparse.Namespace) -> None:
    """the whole way in minutes on a CPU, no network needed"""
    folder, began = _made(args.out), time.perf_counter()
    store = prepare("synthetic", folder / "store", limit=360)
    for _ in progress_bar(train(store, folder, "demo", max_minutes=4)):
        pass
    generator, config, _ = load_generator(folder / "generator.safetensors")
    print(results_table(write_comparison(store, generator, config, folder)))
    print(f"{folder / 'panels.png'} shows it; all of it took {time.perf_counter() - began:.0f} s")


def _prepare(args: argparse.Namespace) -> None:
    """turn a source of faces into a store"""
    store = prepare(args.source, args.store, args.limit)
    print(f"{store.folder}: {store.describe()}")
    for name, why in store.left_out[:20]:
        print(f"  {_one_line(f'left out {name}: {why}')}")
    if len(store.left_out) > 20:
        print(f"  ... and {len(store.left_out) - 20} more, all in {store.folder / 'store.json'}")


def _train(args: argparse.Namespace) -> None:
    """start a run, or continue it"""
    if args.backup and Path(args.backup).resolve() == Path(args.run).resolve():
        raise ValueError("--backup and --run are one folder: name another for the copies")
    changes = dict(args.set) | ({"scale": args.scale} if args.scale else {})
    if distributed.is_torchelastic_launched():  # by torchrun: one process for each GPU
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    first = _share()[0] == 0
    events = train(FaceStore(args.store), args.run, args.preset, changes, backup=args.backup,
                   max_minutes=args.max_minutes, for_minutes=args.for_minutes)
    for event in progress_bar(events) if first else events:
        pass
    if first and not event.stopped:
        print(f"{args.run}: finished; generator.safetensors is the network to use")
    if distributed.is_initialized():
        distributed.barrier()  # gloo may abort one that leaves while another still works
        distributed.destroy_process_group()


def _compare(args: argparse.Namespace) -> None:
    """LR, bicubic, SRGAN, HR: panels and metrics"""
    view, store = dict(args.set), FaceStore(args.store)
    if set(view) - {"crop", "hr_size"}:
        raise ValueError(f"compare can set crop and hr_size, not {', '.join(view)}")
    path, scale = _chosen_weights(args, args.scale or 4), int(args.scale) if args.scale else None
    generator, config, _ = load_generator(path, scale, args.blend)
    config, folder = replace(config, **view), _made(args.out)
    print(results_table(write_comparison(store, generator.to(pick_device()), config, folder,
                                         args.split, args.count, args.lpips, args.errors)))
    if path.with_name("history.csv").exists():
        history_figure(path.with_name("history.csv")).savefig(folder / "curves.png", dpi=100)
    print(f"in {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def _photos(text: str) -> list[Path]:
    """What `text` names: a file, the files in a folder, or those that a pattern finds."""
    path = Path(text)
    if path.is_file():
        return [path]
    found = path.glob("[!.]*") if path.is_dir() else map(Path, glob.glob(text))
    return sorted(filter(Path.is_file, found)) or [path]


def _upscale(args: argparse.Namespace) -> None:
    """enlarge photos; transparency is kept, enlarged by the plain bicubic"""
    from PIL import Image

    if args.photo:
        if args.run:
            raise ValueError("give --photo, or a network by --run or --weights, not both")
        args.run = _shipped_weights(4, "-photo")
    path = _chosen_weights(args, next((s for s in _FACTORS if s >= (args.scale or 4)), 8))
    scale = load_generator(path, None, args.blend)[1].scale  # refused before anything is written
    factor, weights = args.scale or scale, {scale: path}
    if factor > 8:  # the network for 8x, then this
        weights[2] = _shipped_weights(2)
    if factor > scale != 8:
        raise ValueError(f"{path} is a network for {scale}x, not {factor:g}x: use --scale {scale} "
                         "or other weights")
    folder, failed = _made(args.out), []
    paths = [path for text in args.images for path in _photos(text)]
    for path in paths:
        try:
            photo = _read_image(path, keep_alpha=True)
            lr = _to_tensor(photo)
            if photo.mode == "RGBA":
                lr = _spread_colours(lr[:, :3], lr[:, 3:])
            sr, note = enlarge(lr, factor, weights, args.blend)
            result = Image.fromarray(_to_pixels(sr)[0])
            if photo.mode == "RGBA":
                result.putalpha(photo.getchannel("A").resize(result.size, Image.BICUBIC))
            target = _unused(folder / f"{path.stem}-x{factor:g}.png")
            result.save(target)
            print(f"{target}, by the {note}")
        except (ValueError, OSError, MemoryError, RuntimeError) as error:  # torch's, of memory
            failed.append(_one_line(f"{path}: {error}"))
    if failed:
        raise ValueError(f"{len(failed)} of {len(paths)} images could not be enlarged: "
                         f"{'; '.join(failed)}")


def _parser() -> argparse.ArgumentParser:
    parser, parsers = _Parser(prog="srgan_utils.py", description="SRGAN for faces."), {}
    commands = parser.add_subparsers(dest="command", required=True)
    for run in (_demo, _prepare, _train, _compare, _upscale):
        name = run.__name__[1:]
        parsers[name] = commands.add_parser(name, help=run.__doc__)
        parsers[name].set_defaults(run_command=run)

    def add(names, *flags, **options):
        for name in names.split():
            parsers[name].add_argument(*flags, **options)

    count, minutes = _number(int, "whole number above 0"), _number(float, "number above 0")
    add("demo", "--out", default="demo-out", metavar="DIR")
    add("prepare", "source", help="a folder, a .zip, or one of: celeba portraits synthetic")
    add("prepare", "--limit", type=count, metavar="N", help="training faces (default: all)")
    add("prepare train compare", "--store", required=True, metavar="DIR", help="prepared faces")
    add("train", "--run", required=True, metavar="DIR", help="the run; one there is continued")
    add("train", "--preset", help="report, paper, sharp (default) or demo")
    add("train", "--backup", metavar="DIR", help="a second folder for checkpoints, on Drive say")
    parsers["time"] = parsers["train"].add_mutually_exclusive_group()
    add("time", "--max-minutes", type=minutes, metavar="M", help="save and stop after so long")
    add("time", "--for-minutes", type=minutes, metavar="M", help="set a new run's length to fit")
    add("train compare", "--scale", choices=("2", "4", "8", "16"), help="(default: 4)")
    add("train compare", "--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
        type=lambda text: text.partition("=")[::2], help="change a preset, or crop and hr_size")
    add("compare", "--split", default="test", choices=("test", "all"))
    add("compare", "--count", type=count, metavar="N", help="faces to measure")
    add("compare", "--lpips", nargs="?", const="alex", choices=("alex", "vgg", "squeeze"),
        help="also LPIPS, by the network named, which is downloaded (default: alex)")
    add("compare", "--errors", action="store_true", help="a fifth panel: the difference to HR")
    add("upscale", "images", nargs="+", help="photos or folders; faces of 176 px suit best")
    add("upscale", "--scale", type=_number(float, "number from 1 to 16", 1, 16),
        help="1 to 16 (default: 4, or the network's own)")
    add("upscale", "--photo", action="store_true", help="for compressed or noisy photos, up to 4x")
    add("compare upscale", "--out", required=True, metavar="DIR", help="where the results go")
    add("compare upscale", "--run", "--weights", metavar="PATH", help="this run's network, or file")
    add("compare upscale", "--blend", type=_number(float, "number from 0 to 1", 0, 1), default=1.0,
        help="0 faithful, 1 sharp")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, or 2 after one line on standard error that says what to do."""
    warnings.filterwarnings("ignore", module="PIL")  # a file at fault is named in a line of its own
    if isinstance(sys.stdout, io.TextIOWrapper):  # a console may lack letters of a file's name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = _parser().parse_args(argv)
        args.run_command(args)
        return 0
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except ConnectionError as error:
        print(error, file=sys.stderr)  # the one message of three lines: CelebA by hand
    except (ValueError, OSError, FloatingPointError, ImportError, MemoryError,
            RuntimeError) as error:  # the last of torch: no memory, an unfit GPU or driver
        print(f"srgan_utils.py: {_one_line(error)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
