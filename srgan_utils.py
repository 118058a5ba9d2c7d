"""SRGAN for faces (Ledig et al. 2017, arXiv:1609.04802) in one file. Read it top to bottom.

     1 Config        every number that a run depends on, and the presets
     2 Runtime       device, precision, seeds, Colab and Drive
     3 Pixels        load, save, resize, round
     4 Data          sources, `prepare`, `FaceStore`, batches
     5 Models        generator, discriminator, VGG19 features
     6 Losses        pixel, content, adversarial
     7 Metrics       PSNR, SSIM, LPIPS, sharpness, checkerboard index
     8 Checkpoints   save, verify, find again, back up; export and load generators
     9 Inference     `upscale`: any photo, tile by tile; `enlarge`: by any factor
    10 Evaluation    one row per image, bicubic and HR beside it
    11 Figures       four panels, before/after, sample strips, loss curves
    12 Training      the step functions and `train`
    13 Notebook aids `show_source`, `shape_walk`, a dashboard, uploads, the upscale factor by hand
    14 Command line  `main`

A section uses only the sections above it. Everywhere, unless a docstring says otherwise:
    lr, sr, hr   low-resolution, super-resolved, high-resolution *images* (never the learning rate)
    images       float32 tensors (N, 3, H, W), RGB, in [0, 1]
    scale        what people call the upscale factor
    §, Eq., Fig. refer to the paper above; "the report" is the course project that this one began as
"""

from __future__ import annotations

import argparse
import atexit
import base64
import contextlib
import copy
import csv
import difflib
import hashlib
import html
import io
import itertools
import json
import math
import os
import pickletools
import re
import reprlib
import shutil
import signal
import stat
import sys
import threading
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

try:
    import fcntl
except ImportError:  # Windows, where runs and stores are not locked
    fcntl = None

__all__ = [
    "REPOSITORY", "Config", "PRESETS",                                              # 1
    "pick_device", "resolve_precision", "seeded", "environment", "hardware_note",   # 2
    "in_colab", "mount_drive", "workspace",
    "load_image", "save_image", "bicubic", "quantise", "luma", "to_imagenet",       # 3
    "from_imagenet",
    "Source", "open_source", "synthetic_face", "split_of", "prepare", "FaceStore",  # 4
    "prepare_faces", "make_pair", "batch_indices", "batch",
    "ResidualBlock", "UpsampleBlock", "icnr_", "Generator", "Discriminator",        # 5
    "VGGFeatures", "count_parameters", "layer_costs", "receptive_radius",
    "pixel_loss", "feature_loss", "adversarial_loss", "discriminator_loss",         # 6
    "psnr", "ssim", "lpips", "sharpness", "flat_energy", "detail_correlation",      # 7
    "checkerboard_index", "flat_field",
    "save_checkpoint", "load_checkpoint", "newest_checkpoint", "Backup",            # 8
    "export_generator", "load_generator", "interpolate_generators",
    "find_generators", "find_generator", "find_parent", "blended_generator",
    "upscale", "enlarge",                                                           # 9
    "evaluate", "summarise", "results_table",                                       # 10
    "show_picture", "show_images", "comparison_figure", "stages_figure",            # 11
    "image_strip", "scores_figure", "factor_panels", "panels_figure", "before_after",
    "picture_slider", "write_comparison", "history_figure", "histogram_figure",
    "layers_figure",
    "TrainState", "pretrain_step", "discriminator_step", "generator_step",          # 12
    "update_ema", "Progress", "run_name", "train", "longer", "forecast", "minutes_until",
    "reproduce_report", "stages_table",
    "show_source", "shape_walk", "progress_bar", "Dashboard", "export_zip",         # 13
    "export_button", "uploaded_files", "upload_images", "contact_sheet", "Explorer",
    "main",                                                                         # 14
]

# The one place that says where the project lives; badges and set-up cells are tested against it.
REPOSITORY = "OWNER/srgan-celeba"


# -----------------------------------------------------------------------------
# 1. Config: every number that a run depends on
# -----------------------------------------------------------------------------


def _shown(value) -> str:
    """A value for an error message: one short line, however long, deep or many-lined it is."""
    return " ".join(reprlib.repr(value).split())


def _suggest(word: str, words: Sequence[str]) -> str:
    """The end of an error message: the nearest of `words`, or all of them where none is near."""
    close = difflib.get_close_matches(word[:99], words, n=1, cutoff=0.5) if isinstance(word, str) else []
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(words)}"


# What a field may be. Numbers: from 0 on, unless lowest and highest stand here; words: the choices.
_RANGES = {
    "crop": (16, 178), "hr_size": (16, 1024), "patch_size": (16, 1024), "channels": (4, 512),
    "residual_blocks": (1, 64), "kernel_size": (3, 9), "batch_norm": (0, 1), "batch_size": (1, 4096),
    "learning_rate": (1e-8, 1), "pretrain_learning_rate": (1e-8, 1), "beta1": (0, 0.9999), "beta2": (0, 0.999999),
    "vgg_layers": (1, 37), "vgg_rescale": (1e-6, 1e6), "ema": (0, 0.999999), "seed": (0, 2**32 - 1),
    "save_steps": (1, 1e9), "save_minutes": (0.01, 1e6), "sample_steps": (1, 1e9),
}
_CHOICES = {
    "scale": (2, 4, 8, 16), "output": ("report", "tanh", "linear"), "upsampling": ("shuffle", "blur", "resize"),
    "discriminator": ("dense", "pooled"),
    "content": ("pixel", "vgg", "features"), "distance": ("l1", "mse"),
    "adversarial": ("least_squares", "bce", "relativistic"), "decay": ("none", "cosine"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
}


def _choice_error(name: str, value) -> str:
    if name == "scale":
        return f"scale={_shown(value)} is not possible: choose 2, 4, 8 or 16 (each stage of the network doubles the size)"
    return f"{name}={_shown(value)}: {_suggest(value, [str(choice) for choice in _CHOICES[name]])}"


def _checked(name: str, kind: str, value):
    """`value` as the type that field `name` is declared with, if it may have it; else ValueError."""
    if value is None and kind.endswith("| None"):
        return None
    kind = kind.removesuffix(" | None")
    whole = isinstance(value, float) and value.is_integer()
    if kind == "int" and whole:
        value = int(value)
    if kind == "float" and type(value) is int and abs(value) < 1e300:
        value = float(value)
    valid = type(value).__name__ == kind and value == value  # value != value: not a number
    if name in _CHOICES:
        if not valid or value not in _CHOICES[name]:
            raise ValueError(_choice_error(name, value))
    elif not valid:
        wanted = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word"}[kind]
        raise ValueError(f"{name}={_shown(value)} must be {wanted}")
    elif kind in ("int", "float"):
        low, high = _RANGES.get(name, (0, 1e9))
        if not low <= value <= high:
            raise ValueError(f"{name}={value} is out of range; the nearest valid: {low if value < low else high:.12g}")
    return value


@dataclass
class Config:
    """Every number that a run depends on. `Config()` is the preset `sharp` at 4x.

    Raises ValueError, with the nearest valid choice, for a value that is out of range or of the wrong type.
    """

    preset_name: str = "sharp"        # which preset the other values started from
    scale: int = 4                    # the upscale factor: 2, 4, 8 or 16

    # Pixels: HR is the centre `crop` of a 178-px face, resized to `hr_size`; LR is HR / scale
    crop: int = 176
    hr_size: int = 176                # px; a multiple of scale, and of 16 for a dense discriminator
    patch_size: int | None = 96       # px of HR that one update sees; None: the whole face (§3.2 uses 96)
    flip: bool = True                 # mirror half of the faces

    # Generator (Fig. 4)
    channels: int = 64
    residual_blocks: int = 8
    kernel_size: int = 3              # of the first and the last convolution
    batch_norm: float = 0.0           # momentum of BatchNorm; 0: none (a dense discriminator then keeps 0.1)
    shared_upsampling: bool = False   # one up-sampling block applied log2(scale) times, as the report did
    upsampling: str = "blur"          # shuffle; blur: smoothed after it; or resize: nearest pixels, then a convolution
    icnr: bool = True                 # start the pixel shuffle free of checkerboard (arXiv:1707.02937)
    skip: bool = True                 # the network adds detail to a bicubic enlargement
    output: str = "linear"            # report: 2.38 tanh + 0.26, ImageNet-normalised; tanh: [0, 1]

    # Discriminator
    discriminator: str = "pooled"     # dense: Fig. 4, one input size; pooled: 4x4 strided, any size

    # Losses
    distance: str = "l1"              # l1 or mse, for the pixel and the content loss
    content: str = "features"         # pixel, vgg, or features (the discriminator's own, feature matching)
    content_weight: float = 0.1
    pixel_weight: float = 1.0         # a pixel loss beside a vgg or features content loss
    vgg: str = "imagenet"             # VGG19 weights: imagenet, random, or a file
    vgg_layers: int = 35              # how many of VGG19's layers: 35 ends at conv5_4 before its ReLU
    vgg_rescale: float = 12.75        # VGG features are divided by it (§3.2)
    adversarial: str = "least_squares"
    adversarial_weight: float = 0.1
    ramp_steps: int = 500             # adversarial updates over which that weight grows from 0

    # Optimiser: Adam, both networks
    batch_size: int = 16
    learning_rate: float = 1e-4
    pretrain_learning_rate: float = 5e-4
    beta1: float = 0.9
    beta2: float = 0.99
    warmup_steps: int = 100           # updates at the start of each stage
    decay: str = "cosine"             # none, or cosine down to a hundredth over each stage
    decay_steps: int | None = None    # adversarial updates until then; None: `steps` when the run is created
    ema: float = 0.999                # moving average of the generator; 0: none

    # Length. `steps` counts adversarial updates, `pretrain_steps` those before; None: from the epochs
    pretrain_steps: int | None = 12_000
    steps: int | None = 6_000
    pretrain_epochs: float = 0.0
    epochs: float = 0.0

    # How it runs
    precision: str = "auto"           # auto, fp32, bf16 or fp16; resolved once, when the run is created
    compile: bool | None = None       # torch.compile; None: on a GPU, if the run is long enough to pay for it
    seed: int = 0
    save_steps: int = 1_000
    save_minutes: float = 10.0
    sample_steps: int = 500           # updates between two sample strips

    def __post_init__(self):
        if self.preset_name not in list(PRESETS):  # a list: it may be of a kind that cannot be looked up
            raise ValueError(f"there is no preset {_shown(self.preset_name)}: {_suggest(self.preset_name, list(PRESETS))}")
        for item in fields(self):
            setattr(self, item.name, _checked(item.name, item.type, getattr(self, item.name)))
        dense = self.discriminator == "dense"
        of, why = (16, "16 (the dense discriminator halves it 4 times)") if dense else (self.scale, f"scale={self.scale}")
        for name, value in (("hr_size", self.hr_size), ("patch_size", self.patch)):
            if value % of:
                nearest = max(of, round(value / of) * of)
                raise ValueError(f"{name}={value} is not a multiple of {why}; the nearest that is: {nearest}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} is even; try {self.kernel_size + 1}")

    @classmethod
    def preset(cls, name: str, **changes) -> Config:
        """The preset `name` (report, paper, sharp or demo) with `changes`. ValueError if there is none."""
        return cls.from_dict({"preset_name": name} | PRESETS.get(name, {}) | changes)

    @classmethod
    def from_dict(cls, values: dict) -> Config:
        """A Config from plain values. ValueError for an unknown field, with the nearest name."""
        names = [item.name for item in fields(cls)]
        for name in values:
            if name not in names:
                raise ValueError(f"there is no field {_shown(name)}: {_suggest(name, names)}")
        return cls(**values)

    @classmethod
    def recorded(cls, values: dict) -> Config:
        """A Config from what a run or a file says of itself: a field that it lacks is younger than it is."""
        return cls.from_dict({"upsampling": "shuffle", "compile": False} | values)

    @property
    def patch(self) -> int:
        """Side of the HR square that one update sees, px: a patch larger than `hr_size` means `hr_size`."""
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
        """The same in about `total` updates, shared by the two stages in proportion; needs lengths in updates (`for_faces`)."""
        pretrain, steps = (max(1, round(total * count / self.total_steps)) if count else 0
                           for count in (self.pretrain_steps, self.steps))
        return replace(self, pretrain_steps=pretrain, steps=steps, decay_steps=steps)

    def for_faces(self, count: int) -> Config:
        """The same with lengths stated in epochs turned into updates, for a training split of `count` faces."""
        def updates(epochs):
            return math.ceil(epochs * count / self.batch_size)

        pretrain = updates(self.pretrain_epochs) if self.pretrain_steps is None else self.pretrain_steps
        steps = updates(self.epochs) if self.steps is None else self.steps
        decay = steps if self.decay_steps is None else self.decay_steps
        return replace(self, pretrain_steps=pretrain, steps=steps, decay_steps=decay)

    def for_epochs(self, epochs: float, count: int) -> Config:
        """The same, so long that each of `count` training faces is seen `epochs` times."""
        return self.for_faces(count).lasting(math.ceil(epochs * count / self.batch_size))


def _parsed(text: str):
    """What `text` on a command line means: true, false, none, a whole number, a number, or else itself."""
    words = {"true": True, "false": False, "none": None}
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return words.get(text.lower(), text)


# The report's discriminator and data, which the paper's preset shares where the report followed the paper
_FIG4 = dict(
    kernel_size=9, upsampling="shuffle", icnr=False, skip=False, discriminator="dense", pixel_weight=0.0, content="vgg",
    content_weight=1.0, adversarial_weight=1e-3, ramp_steps=0, warmup_steps=0, decay="none", ema=0.0,
)
PRESETS = {
    # The course report, exactly: 20,000 faces of CelebA (`prepare celeba --limit 20000`), 3 epochs
    "report": _FIG4 | dict(
        crop=144, hr_size=256, patch_size=None, flip=False, residual_blocks=5, batch_norm=0.8,
        shared_upsampling=True, output="report", vgg_layers=19, vgg_rescale=1.0, batch_size=8,
        learning_rate=1e-5, beta1=0.5, beta2=0.999, pretrain_steps=0, steps=None, epochs=3.0,
    ),
    # Ledig et al.: 10^6 updates of pre-training and 2 x 10^5 adversarial ones on 350,000 images (§3.2),
    # as epochs, so that they scale with the data
    "paper": _FIG4 | dict(
        crop=178, hr_size=128, patch_size=96, residual_blocks=16, batch_norm=0.1, output="tanh",
        distance="mse", vgg_layers=36, adversarial="bce", batch_size=16, beta2=0.999,
        pretrain_learning_rate=1e-4, pretrain_steps=None, pretrain_epochs=46.0, steps=None, epochs=9.0,
    ),
    "sharp": {},
    # Minutes on two CPU cores
    "demo": dict(
        hr_size=96, patch_size=48, channels=32, residual_blocks=4, pretrain_steps=1_600, steps=250, adversarial_weight=0.02,
        ramp_steps=100, warmup_steps=50, ema=0.99, batch_size=16, pretrain_learning_rate=1e-3,
        save_steps=500, sample_steps=200,
    ),
}


# -----------------------------------------------------------------------------
# 2. Runtime: device, precision, seeds, Colab and Drive
# -----------------------------------------------------------------------------


def pick_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: str, device: torch.device) -> str:
    """`fp32`, `bf16` or `fp16`: what `precision` (see `Config`) means on `device`.

    `torch.cuda.is_bf16_supported()` is not asked: it says yes on a T4, which only emulates it.
    """
    if device.type == "cuda":
        modern = torch.cuda.get_device_capability(device)[0] >= 8
        return {"auto": "bf16" if modern else "fp16", "bf16": "bf16" if modern else "fp16"}.get(precision, precision)
    native = any(getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("avx512_bf16", "amx_tile"))
    return "fp32" if precision == "fp32" or not native else "bf16"


def _autocast(precision: str, device: torch.device) -> torch.autocast:
    """torch.autocast for a resolved `precision`; none for fp32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def seeded(*numbers: int) -> torch.Generator:
    """A CPU random generator that is a function of `numbers` (a seed, an update, ...) and nothing else."""
    low, high = np.random.SeedSequence(numbers).generate_state(2)
    return torch.Generator().manual_seed(int(high) << 32 | int(low))


def environment() -> dict[str, str]:
    """What a result depends on besides its config: versions, device, threads."""
    device = pick_device()
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": str(torch.get_num_threads()),
    }


def in_colab() -> bool:
    """Whether this is a Colab kernel. (`import google.colab` would succeed on Kaggle too.)"""
    shell = sys.modules.get("IPython")
    return shell is not None and "google.colab" in str(shell.get_ipython())


def _kernel():
    """The IPython kernel that this runs in, or None."""
    shell = sys.modules.get("IPython")
    return getattr(shell and shell.get_ipython(), "kernel", None)


def _bar(*args, **options):
    """tqdm's text bar; in a notebook on standard output, since Jupyter shows the other stream as if something were wrong."""
    from tqdm import tqdm

    return tqdm(*args, **{"mininterval": 1, "file": sys.stdout if _kernel() else sys.stderr} | options)


def hardware_note() -> str:
    """One line for people: the GPU at hand, or how to get one."""
    if torch.cuda.is_available():
        return f"GPU: {torch.cuda.get_device_name()}"
    where = "Runtime > Change runtime type > T4 GPU gives you one" if in_colab() else "none was found"
    count = torch.get_num_threads()
    return f"No GPU ({where}): small settings, on {count} CPU thread{'s' * (count > 1)}."


# --- Files: never half-written, noticed when damaged, one writer at a time


def _one_line(error: object) -> str:
    """The text of an error without line breaks, and without what would move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(error).split()))


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(0.0, seconds):.0f} s"
    return f"{seconds / 60:.2g} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _age(kept: tuple[int, float] | None, none: str) -> str:
    """For people: which update a copy holds, and how long ago (since `time.time()`) that was written."""
    return f"update {kept[0]:,}, {_duration(time.time() - kept[1])} ago" if kept else none


def _write_atomically(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".part")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _sealed(value: dict) -> bytes:
    """`value` as JSON whose last entry is the SHA-256 of all that comes before it."""
    body = json.dumps(value, indent=1)[:-2].encode()
    return body + f',\n "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


class _Damaged(ValueError):
    """A file that is not as it was written; one of a newer format is a plain ValueError."""


def _check_format(record: dict, newest: int, what: object) -> None:
    """ValueError if `record` is of a format that this version does not read."""
    number = record.get("format")
    if type(number) is not int:
        raise _Damaged(f"{what} is damaged (it does not say its format)")
    if number > newest:
        raise ValueError(f"{what} was written by a newer version (format {number}, this one reads {newest}): update the project")


def _read_sealed(path: Path, newest: int, advice: str) -> dict:
    """What `_sealed` made, from `path`. ValueError in one line if any byte is damaged, or the format newer than `newest`."""
    data = path.read_bytes()
    try:
        value = json.loads(data)
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise _Damaged(f"{path} is damaged ({_one_line(error)}): {advice}") from None
    _check_format(value, newest, path)
    seal = value.pop("sha256", None)
    body, _, _ = data.rpartition(b',\n "sha256": "')
    if seal != hashlib.sha256(body).hexdigest() or data != body + f',\n "sha256": "{seal}"\n}}\n'.encode():
        raise _Damaged(f"{path} is damaged (its checksum does not fit): {advice}")
    return value


def _check_space(folder: Path, needed: int, what: str) -> None:
    """OSError if the disk of `folder` has no room for `needed` bytes."""
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < needed:  # a mount that does not tell says 0 of 0
        raise OSError(f"{folder} has {_size(usage.free)} free and needs {_size(needed)} for {what}: "
                      "free some space, or name a folder on another disk")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other writers out of `folder` meanwhile, where the system has locks. BlockingIOError says who holds it.

    The system frees the lock of a process however that ends: the file that a killed one leaves only tells its name.
    """
    if fcntl is None:
        yield
        return
    path, handle = folder / "lock", os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = path.read_text() if path.exists() else "another process"
            raise BlockingIOError(f"{folder} is in use by {owner}: wait until that has ended, or stop it") from None
        except OSError:  # a file system without locks
            pass
        path.write_text(f"process {os.getpid()} (since {time.strftime('%Y-%m-%d %H:%M:%S')})")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)


# --- Colab and Drive


def mount_drive(mount_point: str = "/content/drive") -> Path | None:
    """This project's folder on the user's Drive, or None where there is no Drive; says which in one line.

    Nothing is ever created below a mount point that is not mounted: such a folder would lie on the
    virtual machine, be lost with it, and keep Drive from being mounted later.
    """
    if not in_colab():
        print("Google Drive: only in Colab; everything stays on this disk.")
        return None
    try:
        if not os.path.ismount(mount_point):  # drive.mount asks for consent even if it is mounted
            from google.colab import drive

            drive.mount(mount_point)
        if not os.path.ismount(mount_point):
            raise OSError("it did not appear after mounting")
        folder = Path(mount_point) / "MyDrive" / "srgan"
        folder.mkdir(exist_ok=True)
    except Exception as error:  # MessageError, ValueError, pexpect's, KeyError: none may end the notebook
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
    """The folder on the local disk for stores and runs: /content/srgan-work in Colab, else ./srgan-work."""
    folder = Path("/content/srgan-work" if in_colab() else "srgan-work")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# --- Processes: one for each GPU, started by torchrun; the first decides, saves and reports, the others follow


def _rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def _ranks() -> int:
    """How many processes share each update."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def _join() -> None:
    """Meet the other processes that torchrun has started: NCCL between GPUs, gloo for all else."""
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if gpus and local >= gpus:
        raise ValueError(f"torchrun was asked for more processes than there are GPUs: --nproc_per_node={gpus} is the most")
    if gpus:
        torch.cuda.set_device(local)
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    except (RuntimeError, ValueError) as error:
        raise ConnectionError(f"srgan_utils.py: this process does not find the others ({_one_line(error)[:200]}): look at "
                              "torchrun's --master-addr and --nnodes") from None


@contextlib.contextmanager
def _process_group() -> Iterator[None]:
    """What processes started by torchrun speak through; nothing without torchrun. ConnectionError in one line if one dies."""
    if not distributed.is_torchelastic_launched():
        yield
        return
    _join()
    try:
        yield
    except RuntimeError as error:  # torch has no class of its own for gloo's
        if not re.search("gloo|NCCL|[Cc]onnection|[Tt]imed out|Broken pipe", str(error)):
            raise
        raise ConnectionError(f"srgan_utils.py: process {_rank()} of {_ranks()} lost another: start them all again, and the run "
                              "continues at its newest checkpoint") from None
    finally:
        with contextlib.suppress(RuntimeError):
            distributed.destroy_process_group()


_followers_wait = True  # for an order, as the first process knows


def _tell(order: tuple | None = None) -> tuple | None:
    """What the first process gives as `order` (None: end), in every process."""
    orders = [order]
    if _ranks() > 1:
        distributed.broadcast_object_list(orders, device=torch.device("cpu"))
    return orders[0]


@contextlib.contextmanager
def _ordered(*order) -> Iterator[None]:
    """Have the processes that follow this one do what `order` says, while this one does the same."""
    global _followers_wait
    _tell(order)
    _followers_wait = False
    yield
    _followers_wait = True


def _dismiss(*_) -> None:
    """End the processes that follow this one. Where this one failed in the middle of an order, they wait for it, not for
    another order, and end when it is gone."""
    if _followers_wait:
        with contextlib.suppress(RuntimeError):  # they are gone already
            _tell(None)


class _MeanOfRanks(torch.autograd.Function):
    """The mean over all processes; so is its gradient."""

    @staticmethod
    def forward(_, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total / _ranks()

    @staticmethod
    def backward(_, gradient: Tensor) -> Tensor:
        return _MeanOfRanks.forward(_, gradient)


def _mean_of_ranks(values: Tensor) -> Tensor:
    """The mean of what the processes have as `values`; gradients flow through it."""
    return values if _ranks() == 1 else _MeanOfRanks.apply(values)


# -----------------------------------------------------------------------------
# 3. Pixels: load, save, resize, round
# -----------------------------------------------------------------------------

_MAX_PIXELS = 89_000_000  # Pillow itself warns above, and refuses twice as many
_MAX_FILE = 400_000_000   # bytes of one image file: as many pixels, not compressed
# Of a JPEG: cameras write about ten scans and a few segments of Exif; thousands would keep a core busy for hours
_MAX_SCANS, _MAX_EXIF = 100, 500
# Pillow decides by content, not by name; formats that run an interpreter (EPS, WMF) are left out
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def _to_rgb(image):
    """Any Pillow mode as RGB, or RGBA if it is transparent anywhere; 16-bit greys keep their top 8 bits."""
    from PIL import Image

    if image.mode.startswith("I"):  # Pillow's own conversion clips 16-bit values at 255
        levels = np.asarray(image)  # uint16 or int32: wider copies of 89 megapixels would take gigabytes
        deep = image.mode.startswith("I;16") or levels.max(initial=0) > 255  # mode I does not tell 8 from 16 bits
        image = Image.fromarray((levels >> 8 if deep else levels).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            return image
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies


def _read_image(file: str | Path | bytes):
    """`file` (a path, or what it holds) as a Pillow image, RGB or RGBA, upright, 8 bits.

    Raises ValueError saying what is wrong with it: not an image, truncated, absurdly large.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not isinstance(file, bytes):
        if os.path.getsize(file) > _MAX_FILE:
            raise ValueError("absurdly large file")
        file = Path(file).read_bytes()
    if file.startswith(b"\xff\xd8") and (file.count(b"\xff\xda") > _MAX_SCANS or file.count(b"\xff\xe1") > _MAX_EXIF):
        raise ValueError("a JPEG of more scans or segments than any camera writes")
    try:
        with Image.open(io.BytesIO(file), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > _MAX_PIXELS:
                raise ValueError(f"absurdly large ({width} x {height} px)")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError("not an image that Pillow can read" if isinstance(error, UnidentifiedImageError)
                         else "absurdly large") from None
    except ValueError as error:
        raise ValueError(_one_line(error)) from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, IndexError, ... on damage
        raise ValueError(f"truncated or damaged ({_one_line(error)})") from None


def _on_white(image):
    """RGBA pasted on white, as a viewer shows it; RGB unchanged."""
    from PIL import Image

    if image.mode == "RGB":
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) or (N, H, W, 3) as float32 (N, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(pixels, ndmin=4)).permute(0, 3, 1, 2).float().div(255)


def load_image(path: str | Path) -> Tensor:
    """The photo at `path` as (1, 3, H, W), upright, on white where it is transparent.

    Raises FileNotFoundError, or ValueError if it is not an image, truncated or larger than 89 megapixels.
    """
    try:
        return _to_tensor(np.asarray(_on_white(_read_image(path))))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _to_pixels(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [0, 1] as uint8 (N, H, W, 3): clamped and rounded."""
    levels = images.detach().mul(255).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def save_image(image: Tensor, path: str | Path) -> None:
    """Write one image, (1, 3, H, W) or (3, H, W) in [0, 1], as PNG or whatever the name's ending says."""
    from PIL import Image

    Image.fromarray(_to_pixels(image.reshape(1, *image.shape[-3:]))[0]).save(path)


def bicubic(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """`images` resized to `size` (a side, or height and width), down or up, neither clamped nor rounded.

    The one resize of this project: bicubic with a = -0.5, antialiased, as Pillow's. Without `antialias`
    torch uses a = -0.75 and does not filter, which moves a bicubic baseline by up to 0.7 dB.
    """
    size = (size, size) if isinstance(size, int) else tuple(size)
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True)


def quantise(images: Tensor) -> Tensor:
    """Clamped to [0, 1] and rounded to 8-bit levels, as a file would hold them."""
    return images.mul(255).round().clamp(0, 255).div(255)


def luma(images: Tensor) -> Tensor:
    """Y of (N, 3, H, W) as (N, 1, H, W): (16 + 65.481 R + 128.553 G + 24.966 B) / 255 (ITU-R BT.601)."""
    weights = images.new_tensor([65.481, 128.553, 24.966]).view(1, 3, 1, 1)
    return ((images * weights).sum(1, keepdim=True) + 16) / 255


@lru_cache
def _imagenet(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation, made once per device: a copy to a GPU in every forward pass would make the host wait."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=device).view(2, 1, 3, 1, 1)
    return mean, std


def to_imagenet(images: Tensor) -> Tensor:
    """[0, 1] to the mean and deviation of ImageNet, which VGG19 was trained with: about [-2.1, 2.6]."""
    mean, std = _imagenet(images.device)
    return (images - mean) / std


def from_imagenet(images: Tensor) -> Tensor:
    """The inverse of `to_imagenet`; not clamped."""
    mean, std = _imagenet(images.device)
    return images * std + mean


# -----------------------------------------------------------------------------
# 4. Data: sources, `prepare`, `FaceStore`, batches
# -----------------------------------------------------------------------------

# --- Synthetic faces, drawn by rule

_DRAWN = 356  # px: synthetic faces are drawn twice as large as they are stored, so that edges come out smooth
_HAIR = ((32, 26, 24), (70, 45, 30), (120, 82, 48), (190, 150, 92), (140, 60, 34), (176, 174, 172))
_IRIS = ((70, 45, 28), (96, 66, 36), (74, 108, 66), (82, 118, 158), (110, 128, 140))


def _noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise, (drawn, drawn, 1), deviation about 1: `cells` random values a side, enlarged."""
    values = torch.from_numpy(rng.normal(size=(1, 1, cells, cells)).astype(np.float32))
    return bicubic(values, _DRAWN)[0, 0, :, :, None].numpy()


def _oval(x: float, y: float, rx: float, ry: float, jaw: float = 0.0) -> np.ndarray:
    """Outline of an ellipse as points (48, 2); `jaw` narrows its lower half towards a chin."""
    angle = np.linspace(0, 2 * np.pi, 48)
    narrow = 1 - jaw * np.clip(np.sin(angle), 0, 1) ** 2
    return np.stack([x + rx * np.cos(angle) * narrow, y + ry * np.sin(angle)], axis=1)


def _paint(canvas, points, colour, soft=1.0, strength=1.0, width=0, within=None) -> None:
    """Fill a polygon of `canvas` (H, W, 3), or draw a line of `width` px, in place, with edges blurred by `soft` px.

    colour: (3,) or a whole picture to take it from; strength: opacity; within: an outline that clips it.
    """
    from PIL import Image, ImageDraw, ImageFilter

    points = np.asarray(points, dtype=float)
    margin = int(3 * soft + width + 2)
    left, top = np.clip(points.min(0).astype(int) - margin, 0, _DRAWN)
    right, bottom = np.clip(points.max(0).astype(int) + margin, 0, _DRAWN)
    if right <= left or bottom <= top:
        return

    def mask(outline, line):
        image = Image.new("L", (right - left, bottom - top))
        shifted = [tuple(point) for point in np.asarray(outline) - (left, top)]
        draw = ImageDraw.Draw(image)
        draw.line(shifted, fill=255, width=line, joint="curve") if line else draw.polygon(shifted, fill=255)
        return np.asarray(image.filter(ImageFilter.GaussianBlur(soft)), dtype=np.float32)[..., None] / 255

    opacity = mask(points, width) * strength
    if within is not None:
        opacity = opacity * mask(within, 0)
    colour = np.asarray(colour, dtype=np.float32)
    region = canvas[top:bottom, left:right]
    region += opacity * ((colour[top:bottom, left:right] if colour.ndim == 3 else colour) - region)


def _paint_eye(canvas, look, x, y, side):
    w, h, skin, flesh = look["eye_w"], look["eye_h"], look["skin"], look["flesh"]
    upper = np.array([(-1, .1), (-.5, -.85), (0, -1), (.55, -.8), (1, .1)]) * (w, h) + (x, y)
    lower = np.array([(1, .1), (.5, .75), (-.5, .75), (-1, .1)]) * (w, h) + (x, y)
    almond = np.concatenate([upper, lower])
    _paint(canvas, _oval(x, y - 4, w * 1.35, h * 2.2), flesh * 0.74, soft=6, strength=0.55)
    _paint(canvas, almond, (230, 226, 222), soft=0.8)
    _paint(canvas, _oval(x + look["gaze"], y - 0.5, h * 1.05, h * 1.05), look["iris"], 0.8, within=almond)
    _paint(canvas, _oval(x + look["gaze"], y - 0.5, h * 0.5, h * 0.5), (14, 12, 12), 0.6, within=almond)
    _paint(canvas, _oval(x + look["gaze"] + 3, y - 4, 2.2, 2.2), (250, 250, 250), 0.5)
    _paint(canvas, upper, skin * 0.25, soft=0.7, width=4)
    _paint(canvas, upper - (0, 8), skin * 0.6, soft=1, strength=0.6, width=2)
    _paint(canvas, lower, skin * 0.5, soft=0.8, strength=0.5, width=2)
    arch = np.array([(-1.15 * side, 4), (0, -4), (1.4 * side, 5 + look["tilt"])]) * (w, 1) + (x, y - look["brow"])
    _paint(canvas, arch, look["brow_colour"], soft=1.6, strength=0.9, width=look["brow_width"])


def _paint_nose(canvas, look, x, top, y):
    w, flesh, dark = look["nose_w"], look["flesh"], look["dark_side"]
    _paint(canvas, [(x + dark * 9, top), (x + dark * w * 0.8, y - 6)], flesh * 0.72, soft=6, strength=0.6, width=10)
    _paint(canvas, [(x - dark * 2, top), (x - dark * 2, y - 6)], flesh * 1.15 + 5, soft=5, strength=0.5, width=9)
    under = [(x - w, y - 2), (x - w * 0.6, y + 7), (x, y + 9), (x + w * 0.6, y + 7), (x + w, y - 2)]
    _paint(canvas, under, flesh * 0.6, soft=2.5, strength=0.8, width=5)
    for side in (-1, 1):
        _paint(canvas, _oval(x + side * w * 0.5, y + 4, 4.5, 2.8), look["skin"] * 0.25, soft=1.2, strength=0.9)
        fold = [(x + side * w * 1.2, y - 2), (x + side * w * 1.8, y + 22), (x + side * w * 1.95, y + 36)]
        _paint(canvas, fold, flesh * 0.7, soft=3, strength=look["fold"], width=4)


def _paint_mouth(canvas, look, x, y):
    w, smile, gap, lips = look["mouth_w"], look["smile"], look["gap"], look["lips"]
    left, right = (x - w, y - smile), (x + w, y - smile)
    upper = [left, (x - 8, y - 9), (x, y - 6), (x + 8, y - 9), right, (x, y + 1)]
    lower = [left, (x - w * 0.45, y + 2), (x + w * 0.45, y + 2), right,
             (x + w * 0.5, y + 11 + gap), (x, y + 15 + gap), (x - w * 0.5, y + 11 + gap)]
    _paint(canvas, upper, lips * 0.86, soft=1.2)
    _paint(canvas, lower, lips, soft=1.2)
    if gap > 2:
        teeth = [(x - w * 0.8, y - smile * 0.7), (x, y - 1), (x + w * 0.8, y - smile * 0.7),
                 (x + w * 0.4, y + 3 + gap), (x, y + 5 + gap), (x - w * 0.4, y + 3 + gap)]
        _paint(canvas, teeth, (236, 230, 220), soft=0.8)
        for tooth in np.arange(-w * 0.5, w * 0.5, 8):
            _paint(canvas, [(x + tooth, y), (x + tooth, y + gap + 1)], (150, 140, 132), 0.6, 0.5, width=1)
    else:
        _paint(canvas, [left, (x - w * 0.4, y + 1), (x, y), (x + w * 0.4, y + 1), right], look["skin"] * 0.3, 1, 0.9, 3)
    _paint(canvas, _oval(x, y + 24 + gap, 18, 5), look["flesh"] * 0.76, soft=4, strength=0.5)


def _paint_hair(canvas, look, rng, x, y, rx, ry):
    """A cap over the skull, down the sides where the hair is long, strand by strand."""
    from PIL import Image, ImageDraw

    line, part = y - ry * rng.uniform(0.55, 0.70), rng.uniform(-0.5, 0.5)
    skull = [point for point in _oval(x, y, rx * 1.1, ry * 1.13)[24:]]  # left ear, over the top, right ear
    fringe = [(x + rx * 0.97, y - ry * 0.2), (x + rx * (0.62 + 0.2 * part), line + 12), (x + rx * part, line - 6),
              (x - rx * (0.62 - 0.2 * part), line + 12), (x - rx * 0.97, y - ry * 0.2)]
    outlines = [np.array(skull + fringe)]
    if look["style"] == "long":
        for side in (-1, 1):
            outlines.append(np.array([(x + side * rx * a, y + ry * b) for a, b in (
                (0.9, -0.55), (1.12, -0.35), (1.3, 0.4), (1.25, 1.25), (0.8, 1.3), (0.93, 0.5), (0.99, 0.0))]))
    picture = Image.fromarray(look["hair_picture"].clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for start in rng.uniform(-1, 1, 260):
        t = np.linspace(0, 1, 9) * np.pi / 2
        reach = np.sign(start) * (0.3 + 0.95 * abs(start))
        fall = (1.4 if look["style"] == "long" else 0.2) * ry * (t / t[-1]) ** 3
        across = x + rx * (part * 0.6 + (reach - part * 0.3) * np.sin(t)) + rng.normal(0, 2)
        down = y - ry * 1.08 * np.cos(t) * (1 - 0.35 * rng.random()) + fall
        colour = np.clip(look["hair"] * rng.uniform(0.55, 1.5) + rng.uniform(0, 16), 0, 255).astype(int)
        draw.line(list(zip(across, down)), fill=tuple(colour), width=2)
    for outline in outlines:
        _paint(canvas, outline, np.asarray(picture), soft=2)


def _look(rng, x, y, rx, ry) -> dict:
    """What tells one synthetic face from another: colours, sizes, light."""
    skin = np.array([238, 200, 172]) * (1 - rng.beta(1.2, 1.8) * np.array([0.62, 0.70, 0.76]))
    hair = np.array(_HAIR[rng.choice(6, p=[0.32, 0.26, 0.16, 0.10, 0.06, 0.10])]) * rng.uniform(0.8, 1.15)
    rows, columns = np.mgrid[:_DRAWN, :_DRAWN].astype(np.float32)[..., None]
    across, down, light = (columns - x) / rx, (rows - y) / ry, rng.uniform(-1, 1)
    shade = 1 + 0.16 * light * across - 0.12 * np.abs(across) ** 2.5 - 0.05 * down.clip(-1, 1)
    flesh = skin * shade.clip(0.45, 1.3) + _noise(rng, 120) * rng.uniform(1, 3.5) + _noise(rng, 24) * 2.5
    return {
        "skin": skin, "flesh": flesh, "hair": hair, "style": rng.choice(["long", "short", "bald"], p=[0.43, 0.50, 0.07]),
        "hair_picture": hair * (0.85 + 0.25 * light * across.clip(-1, 1)) + _noise(rng, 90) * 14,
        "eye_w": rng.uniform(17, 21), "eye_h": rng.uniform(7, 10.5), "gaze": rng.uniform(-3, 3),
        "iris": np.array(_IRIS[rng.integers(5)]), "tilt": rng.uniform(-4, 5), "brow": rng.uniform(23, 30),
        "brow_width": int(rng.integers(5, 10)), "brow_colour": np.minimum(hair * 0.75, skin * 0.7),
        "nose_w": rng.uniform(15, 22), "dark_side": -1 if light > 0 else 1, "fold": rng.uniform(0.1, 0.5),
        "mouth_w": rng.uniform(27, 38), "smile": rng.uniform(-3, 11), "gap": max(0.0, rng.uniform(-6, 9)),
        "lips": skin * np.array([0.86, 0.60, 0.60]) + rng.uniform(0, 30) * np.array([1, 0, 0.2]),
        "beard": rng.random() < 0.16, "glasses": rng.random() < 0.2,
    }


def _paint_bust(canvas, look, rng, x, y, rx, ry):
    """Hair behind the head, clothes, collar, neck, ears and the head itself."""
    n, flesh = _DRAWN, look["flesh"]
    if look["style"] == "long":
        _paint(canvas, _oval(x, y + 40, rx * 1.25, ry * 1.25), look["hair_picture"] * 0.7, soft=3)
    cloth = rng.uniform(25, 200) + rng.uniform(-60, 60, 3) + _noise(rng, 130) * rng.uniform(1, 9)
    _paint(canvas, _oval(x, n + 40, rx * 2.1, 128), cloth, soft=1.5)
    neck = [(x - rx * 0.55, y + ry * 0.5), (x + rx * 0.55, y + ry * 0.5), (x + rx * 0.66, n * 0.97),
            (x, n + 6), (x - rx * 0.66, n * 0.97)]
    _paint(canvas, neck, flesh * 0.8, soft=2)
    _paint(canvas, _oval(x, y + ry * 0.95, rx * 0.55, 22), flesh * 0.55, soft=9, strength=0.7)
    collar = rng.uniform(130, 255, 3)
    for side in (-1, 1):
        _paint(canvas, [(x + side * rx * 0.58, n * 0.9), (x + side * rx * 0.98, n * 0.97),
                        (x + side * rx * 0.3, n + 20), (x + side * 2, n + 8)], collar, soft=1)
        _paint(canvas, _oval(x + side * rx * 0.99, y + 4, 13, 26), flesh * 0.88, soft=1.5)
        _paint(canvas, _oval(x + side * rx * 1.0, y + 4, 7, 16), flesh * 0.7, soft=1.5, strength=0.8, width=3)
    _paint(canvas, _oval(x, y, rx, ry, look["jaw"]), flesh, soft=1.5)


def _paint_face(canvas, look, rng, x, y, rx, ry):
    """Cheeks, eyes, nose, mouth, beard, hair and glasses on a head at (x, y) of half-axes rx and ry."""
    for side in (-1, 1):
        cheek = look["skin"] * np.array([1.0, 0.72, 0.68])
        _paint(canvas, _oval(x + side * rx * 0.5, y + 34, 22, 16), cheek, soft=11, strength=look["fold"] * 0.6)
    eye_y, apart, nose_y, mouth_y = y - rng.uniform(8, 16), rx * rng.uniform(0.42, 0.48), y + 36, y + rng.uniform(63, 70)
    if look["beard"]:
        stubble = look["hair"] * 0.8 + _noise(rng, 150) * 16
        beard = _oval(x, y + 4, rx * 0.97, ry * 0.97, look["jaw"])
        _paint(canvas, np.concatenate([beard[2:23], [(x - rx * 0.6, nose_y + 14), (x + rx * 0.6, nose_y + 14)]]),
               stubble, soft=5, strength=rng.uniform(0.5, 0.9))
    for side in (-1, 1):
        _paint_eye(canvas, look, x + side * apart, eye_y, side)
    _paint_nose(canvas, look, x, eye_y + 6, nose_y)
    _paint_mouth(canvas, look, x, mouth_y)
    if look["style"] != "bald":
        _paint_hair(canvas, look, rng, x, y, rx, ry)
    if look["glasses"]:
        frame = rng.uniform(10, 90, 3)
        for side in (-1, 1):
            _paint(canvas, _oval(x + side * apart, eye_y + 3, look["eye_w"] * 1.5, 20), frame, soft=0.7, width=4)
        bridge = apart - look["eye_w"] * 1.5
        _paint(canvas, [(x - bridge, eye_y), (x + bridge, eye_y)], frame, soft=0.7, width=4)


def synthetic_face(index: int, seed: int = 0) -> Tensor:
    """Face number `index` of an endless, procedurally drawn set, (1, 3, 178, 178): the same for the same arguments.

    Nobody's portrait: for tests, for the demo, and for a notebook that cannot reach a data set.
    """
    rng = np.random.default_rng([seed, index])
    n = _DRAWN
    x, y = n / 2 + rng.uniform(-10, 10), n / 2 + rng.uniform(-8, 8)
    rx, ry = rng.uniform(76, 92), rng.uniform(104, 122)
    wall, other = rng.uniform(50, 205, (2, 1)) + rng.uniform(-38, 38, (2, 3))
    canvas = (wall + (other - wall) * (0.5 + 0.25 * _noise(rng, 3)) + _noise(rng, 14) * rng.uniform(0, 9)).astype(np.float32)
    look = _look(rng, x, y, rx, ry) | {"jaw": rng.uniform(0.12, 0.3)}
    _paint_bust(canvas, look, rng, x, y, rx, ry)
    _paint_face(canvas, look, rng, x, y, rx, ry)
    drawn = torch.from_numpy(canvas).permute(2, 0, 1)[None] / 255
    return quantise(bicubic(drawn.clamp(0, 1), 178))


# --- Sources: where faces come from

_PORTRAITS_COMMIT = "20531e981f99cd8fd42023d3e71000582f2e04c2"
_PORTRAITS = {  # members of the US Congress, public domain (github.com/unitedstates/images)
    "url": f"https://github.com/Hainish/congress-images-225x275/archive/{_PORTRAITS_COMMIT}.zip",
    "folder": f"congress-images-225x275-{_PORTRAITS_COMMIT}/images/",
    "files": 879,
    "bytes": 43_794_509,
    "sha256": "38ac3a8eaf28e907f8cacf7bc36c3b6ef9f9a429ad447c275a5d7f7ee226849d",
}
_CELEBA = {
    "zip": "img_align_celeba.zip",
    "bytes": 1_443_490_838,
    "md5": "00d2c5bc6d35e252742224ab0c1e8fcb",
    "drive": "0B7EVK8r0v71pZjFTYXZWM3FlRnM",
    "hugging_face": "Yuehao/celeba",
    "kaggle": "jessicali9530/celeba-dataset",
}
_CELEBA_BY_HAND = """CelebA could not be fetched (Google's quota for it is often used up). By hand:
  1. get img_align_celeba.zip (1.4 GB) from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html
  2. put it into the current folder, or into MyDrive/srgan on Google Drive
  3. run this again, or give its path as the source"""
_SYNTHETIC_FACES = 1_000
# What a zip may be: CelebA's has 202,599 entries, and photos hardly compress
_ZIP_ENTRIES, _ZIP_BYTES, _ZIP_RATIO = 1_000_000, 1 << 36, 100


@dataclass
class Source:
    """Faces to prepare: what they are called, and how to get one as a Pillow RGB(A) image (`read(name)`)."""

    title: str
    names: list[str]
    read: Callable


def _hidden(name: str) -> bool:
    """Whether an archive's or a system's own litter (.DS_Store, __MACOSX, Thumbs.db)."""
    parts = Path(name).parts
    return not parts or any(part.startswith(".") or part == "__MACOSX" for part in parts) or parts[-1] == "Thumbs.db"


def _open_folder(folder: Path, title: str) -> Source:
    names, on_disk = [], {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not _hidden(name):
            names.append(name.encode(errors="surrogateescape").decode(errors="replace"))
            if names[-1] != name:  # not UTF-8, as old zips leave it
                on_disk[names[-1]] = name
    if not names:
        raise ValueError(f"{folder} is empty: a source needs at least one image")
    return Source(title, sorted(names), lambda name: _read_image(folder / on_disk.get(name, name)))


def _web_page(path: Path) -> str:
    """The title of the web page that was saved in place of a file (a quota notice, a login), or '' if it is none."""
    with open(path, "rb") as file:
        text = file.read(1 << 16).decode(errors="replace").lstrip()
    if not text.lower().startswith(("<!doctype html", "<html")):
        return ""
    title = re.search("<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
    return _one_line(html.unescape(title[1])) if title else "without a title"


def _refuse_hostile(path: Path, entries: Sequence[zipfile.ZipInfo]) -> None:
    """ValueError for a zip that no honest program writes of photos, or that would not fit into memory or time."""
    if len(entries) > _ZIP_ENTRIES:
        raise ValueError(f"{path} is refused: it has {len(entries):,} entries; {_ZIP_ENTRIES:,} are the most")
    total, size, seen = sum(info.file_size for info in entries), path.stat().st_size, set()
    if total > max(_ZIP_RATIO * size, 100_000_000) or total > _ZIP_BYTES:
        raise ValueError(f"{path} is refused: its {_size(size)} would become {_size(total)}, as in a zip bomb")
    for info in entries:
        name = info.filename.replace("\\", "/")
        kind = stat.S_IFMT(info.external_attr >> 16)
        fault = ("leads out of its folder" if name.startswith("/") or name[1:2] == ":" or ".." in name.split("/") else
                 "is a link or a device" if kind not in (0, stat.S_IFREG, stat.S_IFDIR) else
                 "is there twice" if name in seen else
                 "is encrypted" if info.flag_bits & 1 else
                 "" if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) else
                 "is compressed in an unusual way")
        if fault:
            raise ValueError(f"{path} is refused: its entry {info.filename!r} {fault}; "
                             "unpack it where you trust it, and give the folder")
        seen.add(name)


def _open_zip(path: Path, title: str, inside: str = "") -> Source:
    """Images are read straight out of the zip: nothing is unpacked, so nothing can land outside a folder."""
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # zipfile raises half a dozen kinds on damage
        page = _web_page(path)
        raise ValueError(f"{path} is a web page ({page!r}), not a zip: fetch it again later" if page else
                         f"{path} is not a zip, or it is cut off ({_one_line(error)}): fetch it again") from None
    entries = [info for info in archive.infolist() if info.filename.startswith(inside)]
    _refuse_hostile(path, entries)
    members = {info.filename: info for info in entries if not _hidden(info.filename) and not info.is_dir()}
    if not members:
        raise ValueError(f"{path} holds no files: a source needs at least one image")

    def read(name):
        if members[name].file_size > _MAX_FILE:
            raise ValueError("absurdly large file")
        with archive.open(members[name]) as file:
            data = file.read(members[name].file_size)  # and no more, whatever comes out of it
        if len(data) < members[name].file_size:  # which zipfile has not checked then
            raise ValueError("truncated or damaged")
        if data.startswith(b"PK\3\4"):
            raise ValueError("a zip within the zip: unpack it, and give the folder")
        return _read_image(data)

    return Source(title, sorted(members), read)


def _downloads() -> Path:
    """Where fetched archives are kept: torch's own cache folder, which TORCH_HOME moves."""
    folder = Path(torch.hub.get_dir()) / "srgan"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _open_url(url: str, start: int, seconds: float):
    """A reply from `url`, from byte `start` on if the host can, within `seconds`; OSError otherwise.

    (A socket's own timeout holds for each address anew.)
    """
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    replies, failures = [], [TimeoutError(f"no answer within {seconds:g} s")]

    def ask():
        try:
            replies.append(urlopen(request, timeout=seconds))
        except OSError as error:
            failures.append(error)
        except HTTPException as error:
            failures.append(OSError(_one_line(error) or type(error).__name__))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if not replies:
        raise failures[-1]
    return replies[0]


def _fetch_rest(url: str, partial: Path, title: str) -> None:
    """Append to `partial` what is missing of `url`, or all of it where the host cannot continue. OSError if it breaks off."""
    from http.client import HTTPException
    from urllib.error import HTTPError

    had = partial.stat().st_size if partial.exists() else 0
    try:
        reply = _open_url(url, had, 10)
    except HTTPError as error:
        if error.code == 416:  # nothing there to continue with: it is another file by now
            partial.unlink()
            return _fetch_rest(url, partial, title)
        raise
    with reply:
        if not (reply.headers.get("Content-Range") or "").startswith(f"bytes {had}-"):
            had = 0
        length = reply.headers.get("Content-Length")
        total = had + int(length) if length else None
        with (open(partial, "ab" if had else "wb") as file,
              _bar(total=total, initial=had, desc=title, unit="B", unit_scale=True) as bar):
            try:
                while chunk := reply.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
            except HTTPException as error:  # IncompleteRead is no OSError
                raise OSError(f"the connection broke: {_one_line(error)}") from None
            if total and file.tell() < total:
                raise OSError(f"the connection broke after {_size(file.tell())} of {_size(total)}")


def _download(url: str, target: Path) -> None:
    """Fetch `url` into `target`, whole or not at all; what breaks off is taken up where it broke, also by a later call.

    OSError if the host does not answer within 10 s, keeps breaking off, or sends a web page in place of the file.
    """
    partial = target.with_name(target.name + ".part")
    for pause in (1, 2, 4, 8, 0):
        had = partial.stat().st_size if partial.exists() else 0
        try:
            _fetch_rest(url, partial, target.name)
            break
        except OSError:
            if not pause or not partial.exists() or partial.stat().st_size <= had:  # it brought nothing: say so at once
                raise
            time.sleep(pause)
    if page := _web_page(partial):
        partial.unlink()
        raise OSError(f"the host sent a web page ({page!r}) in place of the file")
    partial.replace(target)


def _portraits_are_right(path: Path) -> bool:
    """Whether the zip holds just the pinned portraits: their number, bytes and checksums (its own bytes may vary)."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [info for info in archive.infolist()
                      if info.filename.startswith(_PORTRAITS["folder"]) and not info.is_dir()]
            if (len(inside), sum(info.file_size for info in inside)) != (_PORTRAITS["files"], _PORTRAITS["bytes"]):
                return False
            lines = sorted((info.filename.rsplit("/", 1)[1], hashlib.sha256(archive.read(info)).hexdigest())
                           for info in inside)
    except Exception:  # zipfile raises half a dozen kinds on damage
        return False
    return hashlib.sha256("".join(f"{sha}  {name}\n" for name, sha in lines).encode()).hexdigest() == _PORTRAITS["sha256"]


def _open_portraits() -> Source:
    path = _downloads() / "portraits.zip"
    if not (path.exists() and _portraits_are_right(path)):
        try:
            continued = path.with_name(path.name + ".part").exists()
            _download(_PORTRAITS["url"], path)
            if continued and not _portraits_are_right(path):  # GitHub may have made the zip anew in between
                _download(_PORTRAITS["url"], path)
        except OSError as error:
            raise ConnectionError(f"the portraits could not be fetched ({_one_line(error)}): check the network, "
                                  "or use the source 'synthetic' or a folder of your own") from None
        if not _portraits_are_right(path):
            path.unlink()
            raise ValueError("what was fetched as portraits is not the pinned set: try again later, "
                             "or use the source 'synthetic' or a folder of your own")
    return _open_zip(path, "portraits", _PORTRAITS["folder"])


def _celeba_at(place: Path) -> Source | None:
    """CelebA as a folder or as the original zip (size and md5 checked) in `place`, or None."""
    for folder in (place / "img_align_celeba" / "img_align_celeba", place / "img_align_celeba"):
        if folder.is_dir() and next(folder.glob("*.jpg"), None):
            return _open_folder(folder, "celeba")
    path = place / _CELEBA["zip"]
    if not path.is_file():
        return None
    if Path("/content/drive") in place.parents:  # Drive is slow at small reads: one copy, then all from this disk
        print(f"copying {path} to this machine ...")
        path = Path(shutil.copyfile(path, _downloads() / _CELEBA["zip"]))
    if path.stat().st_size != _CELEBA["bytes"]:
        page = _web_page(path)
        found = f"a web page ({page!r})" if page else f"{path.stat().st_size:,} bytes instead of {_CELEBA['bytes']:,}"
        print(f"{path} is not CelebA's: {found}; left alone")
        return None
    with open(path, "rb") as file:
        right = hashlib.file_digest(file, "md5").hexdigest() == _CELEBA["md5"]
    if not right:
        print(f"{path} is damaged (its md5 is not CelebA's); left alone")
        return None
    return _open_zip(path, "celeba")


def _fetch_celeba(mirror: str, folder: Path) -> Path:
    """Where `mirror`'s client has put CelebA. ImportError if the client is not installed; else what it raises."""
    if mirror == "Hugging Face":
        from huggingface_hub import hf_hub_download

        hf_hub_download(_CELEBA["hugging_face"], _CELEBA["zip"], repo_type="dataset", local_dir=folder)
    elif mirror == "Kaggle":
        import kagglehub

        return Path(kagglehub.dataset_download(_CELEBA["kaggle"]))
    else:
        import gdown

        gdown.download(id=_CELEBA["drive"], output=str(folder / _CELEBA["zip"]), quiet=False, resume=True)
    return folder


def _open_celeba() -> Source:
    """What is there already, then the mirrors, then what to do by hand (ConnectionError)."""
    folder = _downloads()
    for place in (Path.cwd(), Path.cwd() / "celeba", folder, Path("/content"), Path("/content/drive/MyDrive/srgan"),
                  Path("/content/drive/MyDrive")):
        if source := _celeba_at(place):
            return source
    for mirror in ("Hugging Face", "Kaggle", "Google Drive"):
        (folder / _CELEBA["zip"]).unlink(missing_ok=True)  # in our own cache and not right, or it had been taken above
        try:
            print(f"CelebA: trying {mirror} ...")
            if source := _celeba_at(_fetch_celeba(mirror, folder)):
                return source
            print(f"CelebA: {mirror} gave something else")
        except ImportError:
            print(f"CelebA: no client for {mirror} installed")
        except Exception as error:  # each client has exceptions of its own, and the next mirror may work
            print(f"CelebA: {mirror} failed ({type(error).__name__}: {_one_line(error)[:200]})")
    raise ConnectionError(_CELEBA_BY_HAND)


def _open_synthetic(count: int = _SYNTHETIC_FACES) -> Source:
    from PIL import Image

    def read(name):
        return Image.fromarray(_to_pixels(synthetic_face(int(Path(name).stem.split("-")[1])))[0])

    return Source("synthetic", [f"synthetic-{index:06d}.png" for index in range(count)], read)


def open_source(source: str | Path) -> Source:
    """A folder, a .zip, or one of `celeba`, `portraits`, `synthetic`, ready to be prepared.

    Raises FileNotFoundError, ValueError (empty, not a zip) or ConnectionError (cannot be fetched).
    """
    named = {"celeba": _open_celeba, "portraits": _open_portraits, "synthetic": _open_synthetic}
    if str(source) in named:
        return named[str(source)]()
    path = Path(source)
    if path.is_dir():
        return _open_folder(path, str(path))
    if path.is_file():
        return _open_zip(path, str(path))
    raise FileNotFoundError(f"no such source: {source}; give a folder, a .zip, or a set: {_suggest(str(source), list(named))}")


# --- The store: one array of centre squares on the local disk

_STORE_FORMAT = 1
_SIDE = 178          # px: CelebA's width, so that none of its pixels is resampled
_SMALLEST = 64       # px: shorter sides below this hold no face worth learning
_BLOCK = 1_000       # faces that share a checksum
_SPLITS = ("train", "validation", "test", "unused")


def split_of(names: Sequence[str]) -> np.ndarray:
    """0 (train), 1 (validation) or 2 (test) for each name, (len(names),).

    CelebA's official partition, by the number in the name, where all three of its parts are present;
    otherwise crc32 of the base name (UTF-8) mod 100: below 85 train, below 90 validation, else test.
    """
    bases = [name.rsplit("/", 1)[-1] for name in names]
    numbered = [base[:6] for base in bases if len(base) == 10 and base[:6].isdecimal() and base[6:] == ".jpg"]
    if len(numbered) == len(bases):
        parts = np.searchsorted([162_770, 182_637], np.array(numbered, dtype=int), side="left")
        if set(parts.tolist()) == {0, 1, 2}:
            return parts
    buckets = np.array([zlib.crc32(base.encode()) % 100 for base in bases], dtype=int)
    return np.searchsorted([84, 89], buckets, side="left")


def _limited(names: list[str], limit: int | None) -> list[str]:
    """`limit` training faces, limit/17 validation and 2 limit/17 test faces, spread evenly over the sorted names."""
    if limit is None:
        return names
    parts, kept = split_of(names), []
    for part, wanted in enumerate((limit, round(limit / 17), round(2 * limit / 17))):
        members = [name for name, its in zip(names, parts) if its == part]
        count = min(max(wanted, 1), len(members))
        kept += [members[i * len(members) // count] for i in range(count)]
    return sorted(kept)


def _square(source: Source, name: str):
    """One face as (pixels (178, 178, 3) or None, why not, whether it was enlarged)."""
    from PIL import Image

    try:
        image = source.read(name)
        width, height = image.size
        short, long = min(width, height), max(width, height)
        if short < _SMALLEST:
            raise ValueError(f"too small ({width} x {height} px; the shorter side must have {_SMALLEST})")
        if long > 8 * short:
            raise ValueError(f"too long and narrow for a face ({width} x {height} px)")
    except Exception as error:  # decoders and zipfile raise all kinds on damage
        return None, _one_line(error) or type(error).__name__, False
    size = (_SIDE, round(height * _SIDE / width)) if width <= height else (round(width * _SIDE / height), _SIDE)
    image = _on_white(image)
    if size != image.size:
        image = image.resize(size, Image.BICUBIC)
    left, top = (size[0] - _SIDE) // 2, (size[1] - _SIDE) // 2
    return np.asarray(image.crop((left, top, left + _SIDE, top + _SIDE))), "", short < _SIDE


def _journal_line(block: dict) -> str:
    text = json.dumps(block)
    return f"{hashlib.sha256(text.encode()).hexdigest()} {text}\n"


def _journal(path: Path, header: dict, pixels: Path) -> list[dict]:
    """The blocks that an interrupted preparation has finished and that are still whole; a fresh journal if it was another's."""
    blocks = []
    if path.exists() and pixels.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            with contextlib.suppress(ValueError, RecursionError):
                block = json.loads(line[65:])
                if line == _journal_line(block):
                    blocks.append(block)
                    continue
            break  # half-written or damaged: all from here on is done again
    rows, row_bytes = 0, _SIDE * _SIDE * 3
    if not blocks or blocks[0] != header:
        blocks = [header]
        pixels.write_bytes(b"")
    with open(pixels, "rb") as file:
        for number, block in enumerate(blocks[1:], 1):
            if hashlib.sha256(file.read(len(block["names"]) * row_bytes)).hexdigest() != block["sha256"]:
                blocks = blocks[:number]
                break
            rows += len(block["names"])
    _write_atomically(path, "".join(map(_journal_line, blocks)).encode())
    os.truncate(pixels, rows * row_bytes)
    return blocks[1:]


def _prepare_block(source: Source, names: list[str], pool, bar, file) -> dict:
    """Decode `names`, append the good faces to `file`; what the journal keeps of it."""
    block = {"names": [], "sha256": "", "left_out": [], "enlarged": []}
    digest = hashlib.sha256()
    # in groups: one by one, the threads would wait for each other
    groups = [names[start:start + 16] for start in range(0, len(names), 16)]
    for group, squares in zip(groups, pool.map(lambda group: [_square(source, name) for name in group], groups)):
        bar.update(len(group))
        for name, (pixels, why, enlarged) in zip(group, squares):
            if pixels is None:
                block["left_out"].append([name, why])
                continue
            block["names"].append(name)
            if enlarged:
                block["enlarged"].append(name)
        data = b"".join(pixels.tobytes() for pixels, _, _ in squares if pixels is not None)
        digest.update(data)
        file.write(data)
    block["sha256"] = digest.hexdigest()
    file.flush()
    os.fsync(file.fileno())
    return block


def _store_record(source: str, title: str, limit: int | None, blocks: list[dict]) -> dict:
    """What store.json says once every block is there."""
    names = [name for block in blocks for name in block["names"]]
    enlarged = {name for block in blocks for name in block["enlarged"]}
    left_out = [entry for block in blocks for entry in block["left_out"]]
    if not names:
        shown = "; ".join(f"{_one_line(name)}: {why}" for name, why in left_out[:3])
        raise ValueError(f"{source} has no usable image ({len(left_out)} left out: {shown})")
    # An enlarged face holds no real detail at 178 px, so it cannot be a test's ground truth
    split = [3 if part == 2 and name in enlarged else int(part) for name, part in zip(names, split_of(names))]
    checksums = [[len(block["names"]), block["sha256"]] for block in blocks]
    fingerprint = hashlib.sha256(json.dumps([names, checksums, split]).encode()).hexdigest()
    return {"format": _STORE_FORMAT, "source": source, "title": title, "limit": limit, "fingerprint": fingerprint,
            "blocks": checksums, "enlarged": sorted(enlarged), "left_out": left_out, "names": names, "split": split}


class FaceStore:
    """Prepared faces: a memory-mapped array of 178-px squares with names, split and fingerprint.

    Attributes: `source`, `limit`, `title`, `split` (codes of `_SPLITS`, (len,)), `fingerprint`. A block of faces
    is checked against its checksum when it is first used. Raises FileNotFoundError or ValueError if the folder is no store,
    one of a newer format, or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "store.json").exists():
            raise FileNotFoundError(f"{self.folder} holds no prepared faces: run `prepare SOURCE --store {self.folder}` first")
        record = self._record()
        try:
            lists = [record[name] for name in ("names", "enlarged", "left_out", "split", "blocks")]
            words = [record["source"], record["title"], *lists[0], *lists[1]]
            words += [text for name, why in lists[2] for text in (name, why)]
            numbers = [*lists[3], *(rows for rows, _ in lists[4]), record["limit"] or 0]
            if [{*map(type, each)} for each in (lists, words, numbers)] != [{list}, {str}, {int}] or min(numbers) < 0:
                raise ValueError("a value of the wrong type")
            self.source, self.title, self.limit = record["source"], record["title"], record["limit"]
            self.fingerprint, self._sums = record["fingerprint"], record["blocks"]
            self.split = np.array(record["split"], dtype=np.uint8)
            self._ends = np.cumsum([rows for rows, _ in self._sums])
            parts = [record["names"], self._sums, record["split"]]
            size = (self.folder / "faces.u8").stat().st_size
            whole = (hashlib.sha256(json.dumps(parts).encode()).hexdigest() == self.fingerprint
                     and size == len(self) * _SIDE * _SIDE * 3 > 0 and self._ends[-1] == len(record["names"]) == len(self)
                     and self.split.max() < len(_SPLITS))
        except (LookupError, TypeError, ValueError, OverflowError, RecursionError, OSError) as error:
            raise ValueError(f"{self.folder} is damaged ({_one_line(error)}): delete it and prepare it again") from None
        if not whole:
            raise ValueError(f"{self.folder} is damaged (its parts do not fit together): delete it and prepare it again")
        self._unchecked = set(range(len(self._sums)))
        self._members: dict[str, np.ndarray] = {}
        self._kept: tuple[Tensor, np.ndarray] | None = None
        self._pixels = np.memmap(self.folder / "faces.u8", dtype=np.uint8, mode="r", shape=(len(self), _SIDE, _SIDE, 3))

    def __len__(self) -> int:
        return len(self.split)

    def _record(self) -> dict:
        return _read_sealed(self.folder / "store.json", _STORE_FORMAT, "delete the folder and prepare it again")

    # Lists as long as the store is large: read when first asked for, since training does without

    @cached_property
    def names(self) -> list[str]:
        """The faces' names, sorted."""
        return self._record()["names"]

    @cached_property
    def left_out(self) -> list[tuple[str, str]]:
        """What was left out: name and reason."""
        return self._record()["left_out"]

    @cached_property
    def enlarged(self) -> list[str]:
        """Names of the faces that were smaller than 178 px."""
        return self._record()["enlarged"]

    def _check(self, block: int) -> None:
        rows, expected = self._sums[block]
        end = int(self._ends[block])
        if hashlib.sha256(self._pixels[end - rows:end]).hexdigest() != expected:
            raise ValueError(f"{self.folder}: faces {end - rows} to {end - 1} are damaged on disk: "
                             "delete the folder and prepare it again")
        self._unchecked.discard(block)

    def verify(self) -> None:
        """Check every block against its checksum; ValueError names the first that is damaged."""
        for block in _bar(range(len(self._sums)), desc="checking", unit="block", disable=len(self._sums) < 20):
            self._check(block)

    def indices(self, split: str) -> np.ndarray:
        """Positions of the faces of `train`, `validation`, `test` or `all` of these. ValueError if there are none."""
        if split not in self._members:  # asked for at every update
            self._members[split] = np.flatnonzero(self.split < 3 if split == "all" else self.split == _SPLITS.index(split))
            self._members[split].setflags(write=False)
        if not len(self._members[split]):
            raise ValueError(f"{self.folder} has no {split} faces ({self.describe()}): prepare more faces"
                             + (", or use --split all" if split == "test" else ""))
        return self._members[split]

    def faces(self, indices: Sequence[int], device: torch.device | None = None) -> Tensor:
        """The faces at `indices` as uint8 (N, 3, 178, 178), channels last in memory; on `device`, else on the CPU."""
        indices = np.asarray(indices)
        if device is not None and self._kept and self._kept[0].device.type == device.type:
            pixels, rows = self._kept
            if (rows[indices] >= 0).all():
                return pixels[torch.from_numpy(rows[indices]).to(device, non_blocking=True)].permute(0, 3, 1, 2)
        if self._unchecked:
            for block in set(np.searchsorted(self._ends, indices, side="right").tolist()) & self._unchecked:
                self._check(block)
        pixels = torch.from_numpy(self._pixels[indices])
        if device is not None and device.type == "cuda":
            pixels = pixels.pin_memory().to(device, non_blocking=True)  # the host does not wait for the copy
        return pixels.permute(0, 3, 1, 2)

    def keep_on(self, device: torch.device | None) -> None:
        """Put the training faces into the memory of `device`, for `faces`; None lets them go."""
        self._kept = None
        if device is None:
            return
        members = self.indices("train")
        pixels = torch.empty((len(members), _SIDE, _SIDE, 3), dtype=torch.uint8, device=device)
        starts = range(0, len(members), _BLOCK)
        for start in _bar(starts, desc=f"faces to {device}", unit="block", disable=len(starts) < 20):
            rows = self.faces(members[start:start + _BLOCK]).permute(0, 2, 3, 1)
            pixels[start:start + len(rows)].copy_(rows)
        places = np.full(len(self), -1)
        places[members] = np.arange(len(members))
        self._kept = pixels, places

    def describe(self) -> str:
        """`515 train, 25 validation, 64 test faces; 1 left out` and the like."""
        counts = np.bincount(self.split, minlength=4)
        text = ", ".join(f"{count} {name}" for name, count in zip(_SPLITS[:3], counts)) + " faces"
        text += f"; {len(self.left_out)} left out" if self.left_out else ""
        return text + (f"; {len(self.enlarged)} enlarged, kept out of test" if self.enlarged else "")


def _fill_store(opened: Source, source: str, folder: Path, limit: int | None) -> None:
    """Decode what `opened` has, and what an interrupted preparation has not done yet, into the store in `folder`."""
    names = _limited(opened.names, limit)
    pixels, journal = folder / "faces.u8", folder / "journal.jsonl"
    signature = hashlib.sha256("\n".join(names).encode()).hexdigest()
    blocks = _journal(journal, {"format": _STORE_FORMAT, "source": source, "names": signature, "block": _BLOCK}, pixels)
    done = len(blocks) * _BLOCK
    _check_space(folder, max(0, len(names) - done) * _SIDE * _SIDE * 3, f"{len(names):,} prepared faces")
    with (ThreadPoolExecutor(os.cpu_count()) as pool, open(pixels, "ab") as file, open(journal, "a") as log,
          _bar(total=len(names), desc="preparing", unit="face", mininterval=0.5) as bar):
        bar.update(done)
        for start in range(done, len(names), _BLOCK):
            blocks.append(_prepare_block(opened, names[start:start + _BLOCK], pool, bar, file))
            log.write(_journal_line(blocks[-1]))
            log.flush()
    try:
        record = _store_record(source, opened.title, limit, blocks)
    except ValueError:  # no face was usable: a mended source starts anew
        pixels.unlink()
        journal.unlink()
        raise
    _write_atomically(folder / "store.json", _sealed(record))
    journal.unlink()


def prepare(source: str | Path, folder: str | Path, limit: int | None = None) -> FaceStore:
    """Turn a source (see `open_source`) into the `FaceStore` in `folder`, decoding on all cores.

    limit: take so many training faces, and validation and test faces in proportion. Interrupted, it
    continues where it was; on a finished store of the same source it only checks every block. Raises
    ValueError if the folder holds another source's store, or if no image is usable; BlockingIOError if another
    process is preparing into it; OSError if the disk is too small.
    """
    folder, source = Path(folder), str(Path(source))
    if (folder / "store.json").exists():
        store = FaceStore(folder)
        if (store.source, store.limit) != (source, limit):
            raise ValueError(f"{folder} already holds {store.source!r} (limit {store.limit}), not {source!r} "
                             f"(limit {limit}): name another folder with --store, or delete this one")
        store.verify()
        return store
    _check_mounted(folder)
    opened = open_source(source)
    if opened.title == "synthetic" and limit:
        opened = _open_synthetic(2 * limit + 100)  # enough names for each part of the split; only those kept are drawn
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if not (folder / "store.json").exists():
            _fill_store(opened, source, folder, limit)
            return FaceStore(folder)
    return prepare(source, folder, limit)  # another process finished it just now


def prepare_faces(source: str | Path, limit: int | None = None) -> FaceStore:
    """What notebooks call: the store of `source` in the workspace, prepared if need be; if it cannot be had, says so
    loudly and takes synthetic faces."""
    stores = workspace() / "stores"

    def place(name, count):
        known = str(name) in ("celeba", "portraits", "synthetic")
        path = Path(name)  # a folder that has changed since is another source
        told = f"{path.resolve()} {path.stat().st_mtime_ns if path.exists() else 0}"
        word = str(name) if known else f"{path.stem}-{zlib.crc32(told.encode()):08x}"
        return stores / f"{word}-{count or 'all'}"

    try:
        store = prepare(source, place(source, limit), limit)
    except (OSError, ValueError) as error:
        if source not in ("celeba", "portraits"):
            raise  # a slip in the user's own path is not mended by other faces
        print(f"\n{'!' * 100}\n{error}\nTaking SYNTHETIC (drawn) faces instead of {source}: fine for trying things out, "
              f"useless for judging results.\n{'!' * 100}\n")
        limit = min(limit or 200, 200)  # drawn in ten seconds
        store = prepare("synthetic", place("synthetic", limit), limit)
    print(f"{store.title}: {store.describe()}")
    return store


# --- Batches: a function of (seed, update), so that a resumed run sees what an uninterrupted one would


def make_pair(faces: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """(lr, hr) of stored faces, uint8 (N, 3, 178, 178): (N, 3, s, s) and (N, 3, S, S), S = hr_size = s * scale.

    HR is the centre `crop` resized to `hr_size`, LR is HR reduced; both at 8-bit levels, as files would be.
    """
    start = (_SIDE - config.crop) // 2
    cropped = faces[..., start:start + config.crop, start:start + config.crop].float().div(255)
    hr = quantise(bicubic(cropped, config.hr_size))
    return quantise(bicubic(hr, config.hr_size // config.scale)), hr


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return torch.randperm(count, generator=seeded(seed, 0, epoch)).numpy()


def batch_indices(config: Config, update: int, count: int) -> np.ndarray:
    """Which of `count` faces make up update number `update` (from 0): (batch_size,); each epoch visits each face once."""
    positions = np.arange(update * config.batch_size, (update + 1) * config.batch_size)
    return np.array([_epoch_order(config.seed, int(p) // count, count)[int(p) % count] for p in positions])


def batch(store: FaceStore, config: Config, update: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(lr, hr) training patches of update number `update`: (B, 3, p/scale, p/scale) and (B, 3, p, p), p = config.patch.

    B is `config.batch_size`, or this process's share of it where several train together.
    """
    scale, patch, small = config.scale, config.patch, config.patch // config.scale
    share = config.batch_size // _ranks()
    mine = slice(_rank() * share, (_rank() + 1) * share)
    random = seeded(config.seed, 1, update)  # drawn for all faces of the update, whoever's they are
    mirrored = (torch.rand(config.batch_size, generator=random) < 0.5)[mine]
    corners = torch.randint((config.hr_size - patch) // scale + 1, (config.batch_size, 2), generator=random)[mine].tolist()
    members = store.indices("train")
    faces = store.faces(members[batch_indices(config, update, len(members))[mine]], device)
    if config.flip:
        faces = torch.where(mirrored.to(device, non_blocking=True).view(-1, 1, 1, 1), faces.flip(-1), faces)
    lr, hr = make_pair(faces, config)
    lr = torch.stack([image[:, y:y + small, x:x + small] for image, (y, x) in zip(lr, corners)])
    hr = torch.stack([image[:, y * scale:y * scale + patch, x * scale:x * scale + patch]
                      for image, (y, x) in zip(hr, corners)])
    return lr, hr


# -----------------------------------------------------------------------------
# 5. Models: generator, discriminator, VGG19 features (§2.1, Fig. 4)
# -----------------------------------------------------------------------------


def _norm(channels: int, momentum: float) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels, momentum=momentum)] if momentum else []


class ResidualBlock(nn.Module):
    """conv, (BatchNorm), PReLU, conv, (BatchNorm), + input. No activation after the sum, so the path stays linear."""

    def __init__(self, channels: int, batch_norm: float = 0.0):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), *_norm(channels, batch_norm), nn.PReLU(),
            nn.Conv2d(channels, channels, 3, padding=1), *_norm(channels, batch_norm),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)  # (N, C, h, w), unchanged


@torch.no_grad()
def icnr_(conv: nn.Conv2d, factor: int = 2) -> None:
    """Give the `factor`^2 filters behind each output pixel one common value (Aitken et al. 2017, arXiv:1707.02937).

    Pixel shuffle then starts as a nearest-neighbour enlargement: free of checkerboard from the first update.
    """
    for values in (conv.weight, conv.bias):
        values.copy_(values[::factor ** 2].repeat_interleave(factor ** 2, dim=0))


class UpsampleBlock(nn.Module):
    """Twice the size, then PReLU. `kind` says how:

    shuffle  conv to four times the channels, pixel shuffle (§2.1.1): each of the four phases of its output has filters of
             its own, and where these differ there is a checkerboard
    blur     the same, then the kernel (1 2 1) x (1 2 1) / 16, which no pattern of period 2 passes (Sugawara et al. 2019);
             the mean of 2 x 2 pixels would do, but it moves all by half a pixel, and diagonal scratches follow
    resize   nearest pixels, then conv: flat stays flat (Odena et al. 2016, distill.pub/2016/deconv-checkerboard)
    """

    def __init__(self, channels: int, kind: str = "shuffle", icnr: bool = False):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(channels, channels if kind == "resize" else 4 * channels, 3, padding=1)
        self.shuffle = nn.Identity() if kind == "resize" else nn.PixelShuffle(2)
        self.activation = nn.PReLU()
        if icnr and kind != "resize":
            icnr_(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "resize":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = self.activation(self.shuffle(self.conv(x)))  # (N, C, h, w) -> (N, C, 2h, 2w)
        if self.kind == "blur":
            box = x.new_full((1, 1, 2, 2), 0.25)  # made where x is: a copy to a GPU would make the host wait
            binomial = F.conv2d(box, box, padding=1)
            x = F.conv2d(x, binomial.expand(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1])
        return x


class Generator(nn.Module):
    """lr (N, 3, h, w) -> sr (N, 3, scale h, scale w), both in [0, 1]; fully convolutional (Fig. 4).

    sr is not clamped: a clamp would stop the gradients outside [0, 1].
    """

    def __init__(self, config: Config):
        super().__init__()
        channels, kernel = config.channels, config.kernel_size
        self.scale, self.stages, self.output, self.skip = config.scale, config.stages, config.output, config.skip
        self.head = nn.Sequential(nn.Conv2d(3, channels, kernel, padding=kernel // 2), nn.PReLU())
        self.blocks = nn.Sequential(*(ResidualBlock(channels, config.batch_norm) for _ in range(config.residual_blocks)))
        self.merge = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), *_norm(channels, config.batch_norm))
        own = 1 if config.shared_upsampling else config.stages
        self.upsample = nn.ModuleList(UpsampleBlock(channels, config.upsampling, config.icnr) for _ in range(own))
        self.tail = nn.Conv2d(channels, 3, kernel, padding=kernel // 2)

    def forward(self, lr: Tensor) -> Tensor:
        shallow = self.head(to_imagenet(lr))                  # (N, C, h, w)
        x = shallow + self.merge(self.blocks(shallow))        # the blocks learn only what the head misses
        for stage in range(self.stages):
            x = self.upsample[stage % len(self.upsample)](x)  # (N, C, 2h, 2w) each time
        x = self.tail(x)                                      # (N, 3, scale h, scale w)
        if self.output == "report":
            return from_imagenet(2.38 * torch.tanh(x.float()) + 0.26)  # spans ImageNet-normalised white and black
        x = (torch.tanh(x.float()) + 1) / 2 if self.output == "tanh" else x
        if self.skip:
            x = x + bicubic(lr, (lr.shape[-2] * self.scale, lr.shape[-1] * self.scale))
        return x.float()


# Fig. 4: (channels, stride) of the discriminator's eight 3x3 convolutions
_DENSE_LAYERS = ((64, 1), (64, 2), (128, 1), (128, 2), (256, 1), (256, 2), (512, 1), (512, 2))
# (channels, kernel, stride): a kernel that its stride divides gives every pixel the same gradient, so that no
# grid comes in through the backward pass (Sugawara et al. 2019)
_POOLED_LAYERS = ((32, 3, 1), (64, 4, 2), (128, 4, 2), (256, 4, 2), (256, 3, 1))


class Discriminator(nn.Module):
    """images (N, 3, H, W) in [0, 1] -> scores (N, 1), higher for images it takes for real; no sigmoid.

    `dense` is the network of Fig. 4 and takes patches of `config.patch` px only; `pooled` takes any size.
    """

    def __init__(self, config: Config):
        super().__init__()
        if config.discriminator == "dense":
            self.layers = self._dense_layers(config.batch_norm or 0.1)
            inputs = 512 * (config.patch // 16) ** 2
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 1024), nn.LeakyReLU(0.2), nn.Linear(1024, 1))
        else:
            self.layers = self._pooled_layers()
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(_POOLED_LAYERS[-1][0], 1))

    @staticmethod
    def _dense_layers(momentum: float) -> nn.ModuleList:
        layers, before = nn.ModuleList(), 3
        for number, (channels, stride) in enumerate(_DENSE_LAYERS, start=1):
            conv = nn.Conv2d(before, channels, 3, stride, padding=1)
            # the report left the seventh at torch's default
            norm = _norm(channels, 0.1 if number == 7 else momentum) if number > 1 else []
            layers.append(nn.Sequential(conv, *norm, nn.LeakyReLU(0.2)))
            before = channels
        return layers

    @staticmethod
    def _pooled_layers() -> nn.ModuleList:
        layers, before = nn.ModuleList(), 3
        for channels, kernel, stride in _POOLED_LAYERS:
            conv = nn.Conv2d(before, channels, kernel, stride, padding=1)
            # bounded slopes keep the generator's gradients useful without BatchNorm (arXiv:1802.05957)
            layers.append(nn.Sequential(nn.utils.parametrizations.spectral_norm(conv), nn.LeakyReLU(0.2)))
            before = channels
        return layers

    def features(self, images: Tensor) -> list[Tensor]:
        """What each convolution sees in (N, 3, H, W), finest first; the last is what `score` takes."""
        x, seen = to_imagenet(images), []
        for layer in self.layers:
            x = layer(x)
            seen.append(x)
        return seen

    def score(self, features: list[Tensor]) -> Tensor:
        return self.head(features[-1]).float()

    def forward(self, images: Tensor) -> Tensor:
        return self.score(self.features(images))


def _vgg19_state(weights: str) -> dict[str, Tensor]:
    """VGG19's `features` weights from a file written by torch.save or safetensors. ValueError if it holds others."""
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"vgg={weights}: no such file; give imagenet, random, or a file of VGG19 weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        return {name.removeprefix("features."): value for name, value in state.items() if not name.startswith("classifier")}
    except Exception as error:  # unpickling and parsing raise many kinds
        raise ValueError(f"vgg={weights} is not a file of VGG19 weights ({_one_line(error)[:100]})") from None


class VGGFeatures(nn.Module):
    """The first `config.vgg_layers` layers of VGG19, divided by `config.vgg_rescale`: images in [0, 1] -> feature maps.

    Frozen and in eval mode, but differentiable in its input (§2.2.1, Eq. 5). ConnectionError if ImageNet's
    weights (550 MB, by torchvision) cannot be fetched.
    """

    def __init__(self, config: Config):
        super().__init__()
        from torchvision.models import VGG19_Weights, vgg19

        if config.vgg == "imagenet":
            try:
                network = vgg19(weights=VGG19_Weights.IMAGENET1K_V1).features
            except (OSError, RuntimeError) as error:
                raise ConnectionError(f"VGG19's ImageNet weights could not be fetched ({_one_line(error)}): use --set "
                                      "vgg=FILE, --set vgg=random or --set content=pixel") from None
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(19)  # the same random features in every run
                network = vgg19(weights=None).features
            if config.vgg != "random":
                try:
                    network.load_state_dict(_vgg19_state(config.vgg))
                except RuntimeError:
                    raise ValueError(f"vgg={config.vgg} does not hold VGG19's layers") from None
        self.network = network[:config.vgg_layers].requires_grad_(False).eval()
        self.rescale = config.vgg_rescale

    def train(self, mode: bool = True) -> VGGFeatures:
        return super().train(False)  # stays in eval mode, whoever asks

    def forward(self, images: Tensor) -> Tensor:
        return self.network(to_imagenet(images)).float() / self.rescale


def count_parameters(model: nn.Module) -> int:
    """How many numbers of `model` training may change."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def layer_costs(model: nn.Module, x: Tensor) -> dict[str, tuple[int, int]]:
    """Name -> (parameters, multiplications on `x`) of each convolution and dense layer, in the order of reading.

    The last, `all else` (BatchNorm, PReLU, the blur), is what they lack of the model's own totals. torch's `meta` device will do.
    """
    from torch.utils.flop_counter import FlopCounterMode

    was_training = model.training
    try:
        with FlopCounterMode(display=False) as counter:
            model.eval()(x)
    finally:
        model.train(was_training)
    counts = {name: sum(by_kind.values()) // 2 for name, by_kind in counter.get_flop_counts().items()}  # 2: and an addition
    root = type(model).__name__
    costs = {name: (count_parameters(layer), counts.get(f"{root}.{name}".rstrip("."), 0))
             for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    totals = count_parameters(model), counts.get(root, 0)
    return costs | {"all else": tuple(total - sum(each) for total, each in zip(totals, zip(*costs.values())))}


def receptive_radius(config: Config) -> int:
    """LR px on each side that a pixel of SR depends on, rounded up: the overlap that tiles need."""
    edge = config.kernel_size // 2
    stages = sum((1.5 if config.upsampling == "blur" else 1) / 2 ** stage for stage in range(config.stages))
    return math.ceil(edge + 2 * config.residual_blocks + 1 + stages + edge / config.scale) + 2  # 2: the bicubic skip


# -----------------------------------------------------------------------------
# 6. Losses: what each network is asked to want (§2.2), all in fp32
# -----------------------------------------------------------------------------


def pixel_loss(sr: Tensor, hr: Tensor, distance: str = "l1") -> Tensor:
    """Mean absolute (`l1`) or squared (`mse`, Eq. 4) difference, a scalar; of images or of features."""
    return (F.l1_loss if distance == "l1" else F.mse_loss)(sr.float(), hr.float())


def feature_loss(sr: Sequence[Tensor], hr: Sequence[Tensor], distance: str = "l1") -> Tensor:
    """The mean of `pixel_loss` over pairs of feature maps (feature matching, arXiv:1606.03498)."""
    return torch.stack([pixel_loss(a, b, distance) for a, b in zip(sr, hr)]).mean()


def _target(scores: Tensor, value: float, kind: str) -> Tensor:
    """How far `scores` are from being called `value` (1 real, 0 generated)."""
    wanted = torch.full_like(scores, value)
    if kind == "least_squares":
        return 0.5 * F.mse_loss(scores, wanted)
    return F.binary_cross_entropy_with_logits(scores, wanted)


def adversarial_loss(fake: Tensor, real: Tensor | None, kind: str) -> Tensor:
    """What the generator wants of the discriminator's scores (N, 1): that its images are called real (Eq. 6).

    kind: least_squares, 1/2 (D(sr) - 1)^2; bce; or relativistic (more real than the real ones, which needs `real`).
    """
    if kind == "relativistic":
        fakes, reals = _mean_of_ranks(fake.mean()), _mean_of_ranks(real.mean())
        return 0.5 * (_target(fake - reals, 1, "bce") + _target(real - fakes, 0, "bce"))
    return _target(fake, 1, kind)


def discriminator_loss(real: Tensor, fake: Tensor, kind: str) -> Tensor:
    """What the discriminator wants of its scores (N, 1): real ones called 1, generated ones 0 (Eq. 2)."""
    if kind == "relativistic":
        fakes, reals = _mean_of_ranks(fake.mean()), _mean_of_ranks(real.mean())
        return 0.5 * (_target(real - fakes, 1, "bce") + _target(fake - reals, 0, "bce"))
    return _target(real, 1, kind) + _target(fake, 0, kind)


# -----------------------------------------------------------------------------
# 7. Metrics: one number per image; the mean comes last
# -----------------------------------------------------------------------------


def psnr(sr: Tensor, hr: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, peak 1, (N,); identical images give inf.

    sr, hr: (N, C, H, W) in [0, 1]; give `luma(...)` for Y.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(sr, hr, data_range=1.0, reduction="none", dim=(1, 2, 3))


def ssim(sr: Tensor, hr: Tensor) -> Tensor:
    """Structural similarity of each image, 1 for identical ones, (N,): Gaussian window of 11 px, sigma 1.5; good to 1e-3."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(sr, hr, data_range=1.0, reduction="none").reshape(-1)


@lru_cache(maxsize=1)
def _lpips_network(device: torch.device) -> nn.Module:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)


def lpips(sr: Tensor, hr: Tensor) -> Tensor:
    """Learned perceptual distance of each image (AlexNet), 0 for identical ones, (N,). Downloads its network.

    Raises ConnectionError if that fails.
    """
    try:
        network = _lpips_network(sr.device)
    except OSError as error:
        raise ConnectionError(f"LPIPS could not fetch its network ({_one_line(error)}): leave --lpips out") from None
    return torch.stack([network(a[None].clamp(0, 1), b[None].clamp(0, 1)) for a, b in zip(sr, hr)]).detach()


def _gradient_energy(images: Tensor) -> Tensor:
    across, down = images.diff(dim=-1), images.diff(dim=-2)
    return across.square().mean((1, 2, 3)) + down.square().mean((1, 2, 3))


def sharpness(sr: Tensor, hr: Tensor) -> Tensor:
    """Gradient energy of SR over that of HR for each image, (N,): below 1 blurrier, above 1 noisier."""
    return _gradient_energy(sr) / _gradient_energy(hr).clamp_min(1e-12)


def flat_energy(sr: Tensor, hr: Tensor) -> Tensor:
    """`sharpness` in the flattest tenth of HR's blocks of 8 x 8 px alone, (N,): above 1, noise or a pattern was added there.

    HR's energy counts as that of 8-bit rounding at least, so that a wall without any does not make a level of noise infinite.
    """
    def energies(images):
        blocks = F.unfold(images, 8, stride=8).transpose(1, 2).reshape(-1, images.shape[1], 8, 8)
        return _gradient_energy(blocks).view(len(images), -1)  # (N, blocks)

    wanted = energies(hr)
    flattest = wanted.topk(max(1, wanted.shape[1] // 10), largest=False).indices
    rounding = 4 / (12 * 255 ** 2)  # each of the two differences is of two values, rounded with a variance of 1/12 of a level
    return energies(sr).gather(1, flattest).mean(1) / wanted.gather(1, flattest).mean(1).clamp_min(rounding)


def detail_correlation(sr: Tensor, plain: Tensor, hr: Tensor) -> Tensor:
    """Correlation of the detail that SR adds to the bicubic enlargement `plain` with the detail that HR has beyond it, (N,).

    1: what is added is right; 0: it has nothing to do with the face (or nothing is added).
    """
    added, missing = (sr - plain).flatten(1), (hr - plain).flatten(1)
    return F.cosine_similarity(added - added.mean(1, keepdim=True), missing - missing.mean(1, keepdim=True))


def checkerboard_index(images: Tensor) -> Tensor:
    """How much a pattern of period 2, 4 or 8 px stands out of each image's own texture, (N,); natural images give about 0.9.

    The power spectrum (Hann window) just at the 63 frequencies whose period divides 8 px, each over the mean
    of its nearest neighbours in its row or its column, whichever is larger; the index is the root of the
    mean of these ratios. A pattern repeated across the image adds up at exactly these frequencies and
    nowhere else; interpolation, which modulates whatever the image holds, leaves them empty. Linear in the
    amplitude of a pattern, once that stands out. NaN for images below 32 px.
    """
    side = min(images.shape[-2:]) // 8 * 8
    if side < 32:
        return images.new_full((len(images),), math.nan)
    window = torch.hann_window(side, device=images.device)
    centred = images[..., :side, :side] - images[..., :side, :side].mean((-2, -1), keepdim=True)
    power = torch.fft.fft2(centred * window * window[:, None]).abs().square().mean(1)  # (N, side, side)
    v, u = (k.flatten()[1:] * (side // 8) for k in torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"))
    # the window spreads a pure frequency over one bin on each side, so neighbours begin at the second
    offsets = [sign * step for step in range(2, min(6, max(3, side // 16 + 1))) for sign in (-1, 1)]
    row = torch.stack([power[:, v, (u + offset) % side] for offset in offsets]).mean(0)
    column = torch.stack([power[:, (v + offset) % side, u] for offset in offsets]).mean(0)
    # the floor is the power of 8-bit rounding: below it there is no texture to stand out of
    floor = (window.square().sum() ** 2 / (12 * 255 ** 2)).clamp_min(1e-20)
    return (power[:, v, u] / torch.maximum(row, column).clamp_min(floor)).mean(1).sqrt()  # (N,)


@torch.no_grad()
def flat_field(generator: Generator, colours: Tensor, side: int = 32) -> Tensor:
    """Standard deviation, in levels of 255, of the interior of what each flat colour (N, 3) is enlarged to, (N,).

    0 for a generator without a checkerboard (the unit step response of its up-sampling is constant).
    """
    sr = generator(colours.view(-1, 3, 1, 1).expand(-1, 3, side, side))
    edge = sr.shape[-1] // 4
    return sr[..., edge:-edge, edge:-edge].mul(255).std((-2, -1)).amax(1)


# -----------------------------------------------------------------------------
# 8. Checkpoints: save, verify, find again, back up; export and load generators
# -----------------------------------------------------------------------------

_FORMAT = 1
_SLOTS = ("slot_a.pt", "slot_b.pt")
_SEAL = b"sha256:"


def _seal_fits(path: Path) -> bool:
    """Whether the file ends in the SHA-256 of all that comes before it."""
    digest, left = hashlib.sha256(), path.stat().st_size - 64
    with open(path, "rb") as file:
        while left > 0 and (chunk := file.read(min(left, 1 << 20))):
            digest.update(chunk)
            left -= len(chunk)
        return file.read() == digest.hexdigest().encode()


def _checkpoint_path(folder: Path, update: int) -> Path:
    return folder / f"update-{update:08d}.pt"


def save_checkpoint(folder: str | Path, state: dict, keep: int = 2) -> Path:
    """Write `state` (plain data with an `update`) into `folder`, never half-written; keep the newest `keep`. Returns the file.

    It is what torch.save writes, with the SHA-256 of all that as the comment that a zip file may end in.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = _checkpoint_path(folder, state["update"]), folder / "checkpoint.part"
    # those of later updates, which only a damaged checkpoint leaves behind, do not count
    older = [each for each in sorted(folder.glob("update-*.pt")) if each.name < path.name]
    if older and shutil.disk_usage(folder).free < 1.1 * older[-1].stat().st_size and _seal_fits(older[-1]):
        for old in older[:-1]:  # no room for one more: make it before, not after
            old.unlink()
    try:
        with open(partial, "w+b") as file:
            torch.save({"format": _FORMAT} | state, file)
            file.seek(-2, os.SEEK_END)  # the length of the comment
            file.write((len(_SEAL) + 64).to_bytes(2, "little") + _SEAL)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0, os.SEEK_END)
            file.write(digest.encode())
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's writer has a RuntimeError of its own for a full disk
        raise OSError(f"the checkpoint of update {state['update']} cannot be written into {folder} "
                      f"({_one_line(error.__context__ or error)}): make room, then run it again to continue") from None
    partial.replace(path)
    for old in older[:1 - keep or None]:
        with contextlib.suppress(OSError):  # Windows, while it is being backed up: then it goes the next time
            old.unlink()
    return path


# What a checkpoint's pickle may name: by itself torch would also make sparse tensors, and buffers of any size
_PLAIN = re.compile("torch._utils _rebuild_tensor_v2|collections OrderedDict|torch [A-Za-z0-9]+Storage")


def _one_directory(path: Path, start: int) -> bool:
    """Whether the end of a sealed zip names the directory at `start`, which Python reads: torch reads the one that is named."""
    with open(path, "rb") as file:
        file.seek(-min(path.stat().st_size, 76 + 22 + len(_SEAL) + 64), os.SEEK_END)
        place, tail = file.tell(), file.read()
    record, locator, end = tail[:56], tail[56:76], tail[76:98]
    if locator[:4] == b"PK\6\7":
        named = record[48:56] == start.to_bytes(8, "little") and locator[8:16] == place.to_bytes(8, "little")
    else:
        named = end[16:20] == start.to_bytes(8, "little")[:4]
    return named and end[:4] == b"PK\5\6" and end[20:] == (len(_SEAL) + 64).to_bytes(2, "little")


def load_checkpoint(path: str | Path) -> dict:
    """The plain data of one checkpoint. ValueError if a byte is damaged, the format newer, or more than plain data in it."""
    path = Path(path)
    if not _seal_fits(path):
        raise ValueError(f"{path} is damaged or cut off (its checksum does not fit)")
    try:
        with zipfile.ZipFile(path) as archive:  # torch would unpack a zip bomb; its own files are not compressed
            if (any(info.compress_type != zipfile.ZIP_STORED or info.file_size > path.stat().st_size
                    for info in archive.infolist()) or not _one_directory(path, archive.start_dir)):
                raise ValueError("compressed")
            pickles = [archive.read(info) for info in archive.infolist() if info.filename.lower().endswith("data.pkl")]
            used = [named for each in pickles for code, named, _ in pickletools.genops(each) if code.name.endswith("GLOBAL")]
            if not all(_PLAIN.fullmatch(named) for named in used):  # None, of a name that is made while unpickling, too
                raise ValueError("more than plain data")
        state = torch.load(path, map_location="cpu", weights_only=True)  # never runs what is in it
        update = state["update"]
    except Exception:  # zipfile, torch and pickle raise all kinds
        raise ValueError(f"{path} holds more than plain data, or is no checkpoint: it was not opened") from None
    _check_format(state, _FORMAT, path)
    if type(update) is not int or not 0 <= update <= 2e9:
        raise ValueError(f"{path} is no checkpoint of this project")
    return state


def _newest_of(paths: Sequence[Path], damaged: list[str]) -> dict | None:
    """The first of `paths` that verifies; what does not is named in `damaged`."""
    for path in paths:
        try:
            return load_checkpoint(path)
        except (ValueError, OSError) as error:
            damaged.append(f"{path.name} ({_one_line(error)})")
    return None


def _manifest(backup: Path) -> dict:
    """What `backup` says of its newest slot; nothing where it has no manifest yet, or a half-written one."""
    try:
        return _read_sealed(backup / "manifest.json", _FORMAT, "")
    except (OSError, ValueError):
        return {}


def _backup_update(backup: Path) -> float:
    """The update that the newest slot of `backup` holds by its manifest; inf if only the slots can tell, -1 without any."""
    update = _manifest(backup).get("update")
    if type(update) is int:
        return update
    return math.inf if any((backup / slot).exists() for slot in _SLOTS) else -1


def newest_checkpoint(folder: str | Path, backup: str | Path | None = None) -> dict | None:
    """The newest checkpoint that verifies, of those in `folder` and in the slots of `backup`; None if there is none at all.

    A damaged one that is passed over is named. ValueError if there are some but none verifies.
    """
    damaged: list[str] = []
    state = _newest_of(sorted(Path(folder).glob("update-*.pt"), reverse=True), damaged)
    backup = Path(backup) if backup else None
    if backup and _backup_update(backup) > (state["update"] if state else -1):
        for slot in _SLOTS:
            found = _newest_of([backup / slot], damaged) if (backup / slot).exists() else None
            if found and (state is None or found["update"] > state["update"]):
                state = found
    if damaged and state is None:
        places = f"{folder} or {backup}" if backup else folder
        raise ValueError(f"no checkpoint in {places} verifies: {'; '.join(damaged)}; start a new run in another folder"
                         + (", with another backup" if backup else ""))
    for text in damaged:
        print(f"WARNING: passed over a damaged checkpoint: {text}", file=sys.stderr)
    return state


_UPLOADING = threading.Lock()  # also where the loop of a stopped cell is still copying


class Backup:
    """Copies of a run in a second folder (on Drive, say), made by a thread of its own: training never waits.

    Two slots are overwritten in turn, without deleting or renaming (Drive keeps what is deleted, and counts
    it), and a manifest is written last. If the folder fails, the copy is tried again, with growing pauses, or
    with the next state. `status` says what the last good copy holds, and whether it fails since.
    Raises OSError if the folder is on a Drive that is not mounted, or has no room for two slots of `needed` bytes.
    """

    def __init__(self, folder: str | Path, needed: int = 0):
        self.folder = Path(folder)
        _check_mounted(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        there = sum(path.stat().st_size for slot in _SLOTS if (path := self.folder / slot).exists())
        _check_space(self.folder, 2 * needed - there, "two checkpoints")
        update = _manifest(self.folder).get("update")
        self._good = (update, (self.folder / "manifest.json").stat().st_mtime) if type(update) is int else None
        self._began, self._failing = time.time(), ""
        self._waiting: tuple | None = None
        self._wake, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, daemon=True)

    @property
    def status(self) -> str:
        return _age(self._good, "no backup yet") + self._failing

    def submit(self, checkpoint: Path, update: int, files: Sequence[Path]) -> None:
        """Have a checkpoint and small `files` copied; one still waiting is replaced."""
        with self._wake:
            self._waiting = (checkpoint, update, list(files))
            self._wake.notify()
            if not self._thread.ident:
                with contextlib.suppress(RuntimeError):  # the interpreter is about to exit: the next one copies it
                    self._thread.start()

    def close(self) -> None:
        """Finish the copy under way and the one waiting, but give up after 15 minutes; call it once, at the end."""
        with self._wake:
            self._closing = True
            self._wake.notify()
            if not self._thread.ident:
                return
        self._thread.join(2)
        if self._thread.is_alive():
            print(f"finishing the backup in {self.folder} ...", file=sys.stderr)
            self._thread.join(15 * 60)
        if self._failing or self._thread.is_alive():
            print(f"WARNING: the backup in {self.folder} is not complete; last good backup: {self.status}", file=sys.stderr)

    def _work(self) -> None:
        delay, retry = 1.0, None
        while True:
            with self._wake:
                if not self._waiting and not self._closing:
                    self._wake.wait(delay if retry else None)
                job, self._waiting = self._waiting or retry, None
                if job is retry and job and not job[0].exists():  # newer checkpoints have replaced it
                    job = retry = None
                if job is None:
                    if self._closing:
                        return
                    continue
            try:
                if not _UPLOADING.acquire(timeout=60):
                    raise OSError("an earlier copy has not ended")
                try:
                    self._copy(*job)
                finally:
                    _UPLOADING.release()
                delay, retry = 1.0, None
                self._good, self._failing = (job[1], time.time()), ""
            except Exception as error:  # whatever it is, it must not end the backups
                self._warn(error)
                if self._closing and delay > 30:
                    return
                delay, retry = min(delay * 2, 60), job
                if self._closing:
                    time.sleep(delay)

    def _warn(self, error: Exception) -> None:
        if not self._failing:
            print(f"WARNING: the backup in {self.folder} fails ({_one_line(error)}); training goes on and it is tried again; "
                  f"last good backup: {self.status}", file=sys.stderr)
            self._failing = f", failing since {time.strftime('%H:%M:%S')}"

    def _copy(self, checkpoint: Path, update: int, files: Sequence[Path]) -> None:
        _check_mounted(self.folder)
        manifest = _manifest(self.folder)
        began = manifest.get("began")
        if isinstance(began, float) and self._began < began < time.time() + 86_400:
            raise OSError("a session that began later writes its backups there")
        if manifest.get("slot") in _SLOTS:
            last = _SLOTS.index(manifest["slot"])
        else:  # the older slot goes
            ages = [path.stat().st_mtime if (path := self.folder / name).exists() else 0 for name in _SLOTS]
            last = 1 if ages[1] >= ages[0] else 0
        slot = self.folder / _SLOTS[1 - last]
        for path in files:  # first, so that no slot is without its run's config; and only what is new
            there = self.folder / path.name
            if path.exists() and not (there.exists() and there.read_bytes() == path.read_bytes()):
                shutil.copyfile(path, there)
        shutil.copyfile(checkpoint, slot)
        if not _seal_fits(slot):
            raise OSError(f"{slot} does not read back as written")
        record = {"format": _FORMAT, "slot": slot.name, "update": update, "bytes": slot.stat().st_size,
                  "saved": time.strftime("%Y-%m-%d %H:%M:%S"), "began": self._began}
        (self.folder / "manifest.json").write_bytes(_sealed(record))


def _digest(tensors: dict[str, Tensor], about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _shipped_weights(scale: int) -> Path:
    return Path(__file__).parent / "weights" / f"srgan-x{scale}.safetensors"


def export_generator(path: str | Path, generator: Generator, config: Config, **about) -> None:
    """Write a generator as safetensors, with its config and whatever `about` says (data, metrics, ...) in the header."""
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().contiguous() for name, value in generator.state_dict().items()}
    header = json.dumps({"format": _FORMAT, "config": asdict(config)} | about)
    data = save(tensors, metadata={"srgan": header, "sha256": _digest(tensors, header)})
    _write_atomically(Path(path), data)


def load_generator(path: str | Path, scale: int | None = None) -> tuple[Generator, Config, dict]:
    """The generator in `path`, in eval mode on the CPU, its config, and what its header says about it.

    Raises FileNotFoundError, or ValueError if it is damaged, not ours, newer, or not of the `scale` asked for.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no such weights file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # clones: the file is mapped, and may change or go (on Drive) while the network is in use
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        about = json.loads(metadata["srgan"])
        if metadata["sha256"] != _digest(tensors, metadata["srgan"]):
            raise ValueError("its checksum does not fit")
        if not isinstance(about["config"], dict):
            raise KeyError("config")
    except (KeyError, TypeError):
        raise ValueError(f"{path} is safetensors, but not a generator of this project") from None
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({_one_line(error)})") from None
    _check_format(about, _FORMAT, path)
    config = Config.recorded(about["config"])
    if scale not in (None, config.scale):
        raise ValueError(f"{path} is a network for {config.scale}x, not {scale}x: use --scale {config.scale} or other weights")
    with torch.device("meta"):  # no memory for weights that the file may not hold
        generator = Generator(config)
    try:
        if any(tensors[name].is_floating_point() != mine.is_floating_point() for name, mine in generator.state_dict().items()):
            raise RuntimeError("another kind of number")
        generator.load_state_dict(tensors, assign=True)
        generator.float()  # from half precision
    except (RuntimeError, KeyError):
        raise ValueError(f"{path} does not hold the network that its header tells of: export it again") from None
    return generator.eval(), config, about


def interpolate_generators(faithful: Generator, sharp: Generator, amount: float) -> Generator:
    """A generator between two of one shape: every weight (1 - amount) * faithful + amount * sharp, in eval mode.

    With the pixel-loss parent and the final generator this is a slider from 0, faithful, to 1, sharp (ESRGAN,
    arXiv:1809.00219, §3.4). ValueError if their shapes differ.
    """
    between = copy.deepcopy(faithful).eval()
    ours, others = between.state_dict(), sharp.state_dict()
    if {name: value.shape for name, value in ours.items()} != {name: value.shape for name, value in others.items()}:
        raise ValueError("these two generators have different shapes: take a run's own pretrained and generator")
    for name, value in ours.items():
        value.copy_(torch.lerp(value.double(), others[name].double(), amount))
    return between


def find_generators(scale: int, *folders: str | Path) -> Iterator[Path]:
    """The generators for `scale` in the workspace's runs and in `folders` (Drive, say), newest first, then the shipped one, then
    those of the preset `demo`: two minutes on a CPU do not make a better one."""
    found, quick = [], []
    for folder in (workspace() / "runs", *folders):
        with contextlib.suppress(OSError):  # Drive may have gone
            found += [(path.stat().st_mtime, path) for path in Path(folder).rglob("generator.safetensors")]
    for _, path in sorted(found, reverse=True):
        with contextlib.suppress(ValueError, OSError):
            if load_generator(path, scale)[1].preset_name == "demo":
                quick.append(path)
            else:
                yield path
    if _shipped_weights(scale).exists():
        yield _shipped_weights(scale)
    yield from quick


def find_generator(scale: int, *folders: str | Path) -> Path | None:
    """The first of `find_generators`, or None."""
    return next(find_generators(scale, *folders), None)


def find_parent(path: str | Path) -> Path | None:
    """The pixel-loss parent of the generator in `path`, where it is kept beside it; None if it is not."""
    path = Path(path)
    parent = path.with_name("pretrained.safetensors" if path.stem == "generator" else f"{path.stem}-pixel.safetensors")
    return parent if parent.exists() else None


@lru_cache(maxsize=16)
def _blended(path: Path, written: int, scale: int | None, amount: float) -> tuple[Generator, Config]:
    generator, config, _ = load_generator(path, scale)
    if amount != 1:
        parent = find_parent(path)
        if parent is None:
            raise FileNotFoundError(f"a mixture needs the pixel-loss parent of {path}, which is not there: leave it out, "
                                    "or give a run that was pre-trained")
        generator = interpolate_generators(load_generator(parent, scale)[0], generator, amount)
    return generator.to(pick_device()), config


def blended_generator(path: str | Path, scale: int | None = None, amount: float = 1.0) -> tuple[Generator, Config]:
    """The generator in `path` mixed with its pixel-loss parent (0: the parent, 1: the generator itself), and its config.

    The last 16 stay in memory, so that a slider does not read files; a file that training has replaced is read again.
    Errors as from `load_generator`; FileNotFoundError, too, where a mixture is asked for and no parent is kept.
    """
    path = Path(path)
    return _blended(path, path.stat().st_mtime_ns if path.exists() else 0, scale, amount)


# -----------------------------------------------------------------------------
# 9. Inference: any photo, tile by tile, by any factor
# -----------------------------------------------------------------------------


_FACTORS = (2, 4, 8)                      # of the networks that `enlarge` takes
_TILE = 1024                              # px of SR along a tile's side
_TILES_TOGETHER = {"cuda": 4, "cpu": 1}   # how many of them are enlarged at once: one keeps a CPU busy


def _for_inference(generator: Generator) -> Generator:
    """A copy in eval mode, channels last, where each BatchNorm has become part of the convolution before it."""
    network = copy.deepcopy(generator).eval()
    for sequence in network.modules():
        if isinstance(sequence, nn.Sequential):
            for number in range(1, len(sequence)):
                if isinstance(sequence[number], nn.BatchNorm2d):
                    sequence[number - 1] = nn.utils.fuse_conv_bn_eval(sequence[number - 1], sequence[number])
                    sequence[number] = nn.Identity()
    return network.to(memory_format=torch.channels_last)


def _tiles(image: Tensor, generator: Generator, config: Config, tile: int | None, progress: bool) -> Iterator[tuple]:
    """What `upscale` puts together: (y, x, pixels), place and uint8 (h, w, 3) of each tile of SR, tiles of one shape together."""
    scale, margin, device = config.scale, receptive_radius(config), next(generator.parameters()).device
    network, precision = _for_inference(generator), resolve_precision(config.precision, device)
    if (config.precision, precision) == ("fp16", "bf16"):  # coarser than it was trained with
        precision = "fp32"
    tile = tile or max(16, _TILE // scale)
    height, width = image.shape[-2:]
    groups: dict[tuple, list] = {}
    for y, x in itertools.product(range(0, height, tile), range(0, width, tile)):
        rows = slice(max(0, y - margin), min(height, y + tile + margin))
        columns = slice(max(0, x - margin), min(width, x + tile + margin))
        groups.setdefault((rows.stop - rows.start, columns.stop - columns.start), []).append((y, x, rows, columns))
    together = _TILES_TOGETHER[device.type]
    batches = [group[i:i + together] for group in groups.values() for i in range(0, len(group), together)]
    for members in _bar(batches, desc="enlarging", disable=not progress or len(batches) < 4):
        parts = torch.cat([image[..., rows, columns] for _, _, rows, columns in members]).to(device)
        with _autocast(precision, device):
            pixels = _to_pixels(network(parts.contiguous(memory_format=torch.channels_last)))
        for (y, x, rows, columns), each in zip(members, pixels):
            top, left = (y - rows.start) * scale, (x - columns.start) * scale
            yield y * scale, x * scale, each[top:top + tile * scale, left:left + tile * scale]


@torch.no_grad()
def upscale(image: Tensor, generator: Generator, config: Config, tile: int | None = None,
            progress: bool | Callable[[float], None] = False) -> Tensor:
    """`image` (1, 3, h, w) enlarged: (1, 3, scale h, scale w) in [0, 1] at 8-bit levels, on the CPU.

    Works in tiles of `tile` LR px (default: 1024 px of output) that overlap by the network's receptive field:
    memory stays bounded and no seam shows, since every pixel sees all that it would in one piece. In the precision that
    the network was trained in, or in a finer one. progress: a text bar, or a function called with the share done, ]0, 1].
    """
    out, done = torch.empty(1, 3, image.shape[-2] * config.scale, image.shape[-1] * config.scale), 0
    for y, x, pixels in _tiles(image, generator, config, tile, progress is True):
        height, width = pixels.shape[:2]
        out[..., y:y + height, x:x + width] = _to_tensor(pixels)
        done += height * width
        if callable(progress):
            progress(done / out[0, 0].numel())
    return out


def enlarge(photo: Tensor, factor: float, weights: dict[int, str | Path] | None = None, amount: float = 1.0,
            progress: bool | Callable[[float], None] = False) -> tuple[Tensor, str]:
    """`photo` (1, 3, h, w) enlarged by any `factor` from 1 to 16, and a note that says which networks did it.

    The next larger network does it, then `bicubic` reduces what is too large; above 8 it is the one for 8x, then the one
    for 2x. weights: the file for each scale; `find_generator` where it names none. amount: as for `blended_generator`.
    ValueError if the factor is out of range, FileNotFoundError if a network is missing.
    """
    if not 1 <= factor <= 16:
        raise ValueError(f"factor {factor:g}: give a number from 1 to 16")
    scales = [next(scale for scale in _FACTORS if scale >= factor)] if factor <= 8 else [8, 2]
    image, size = photo, tuple(round(side * factor) for side in photo.shape[-2:])
    for scale in scales:
        path = (weights or {}).get(scale) or find_generator(scale)
        if path is None:
            raise FileNotFoundError(f"there is no network for {scale}x yet: train one in notebook 3 with scale = {scale} (or "
                                    f"python srgan_utils.py train --scale {scale}), or choose another factor")
        image = upscale(image, *blended_generator(path, scale, amount), progress=progress)
    note = " then ".join(f"{scale}x" for scale in scales) + " network"
    if image.shape[-2:] != size:
        image, note = quantise(bicubic(image, size)), f"{note}, reduced to {factor:g}x"
    return image, note


# -----------------------------------------------------------------------------
# 10. Evaluation: one row per image, bicubic and HR beside it
# -----------------------------------------------------------------------------

def _scores(images: Tensor, hr: Tensor, with_lpips: bool) -> dict[str, list[float]]:
    y, hr_y = luma(images), luma(hr)
    scores = {"psnr_rgb": psnr(images, hr), "ssim_rgb": ssim(images, hr), "psnr_y": psnr(y, hr_y), "ssim_y": ssim(y, hr_y),
              "sharpness": sharpness(images, hr), "checkerboard": checkerboard_index(images)}
    if with_lpips:
        scores["lpips"] = lpips(images, hr)
    return {name: values.tolist() for name, values in scores.items()}


@torch.no_grad()
def evaluate(generator: Generator, config: Config, store: FaceStore, indices: Sequence[int],
             with_lpips: bool = False) -> list[dict]:
    """One row per face: its name, and `bicubic_*`, `srgan_*` for PSNR (dB) and SSIM in RGB and Y, sharpness and
    checkerboard index; `hr_checkerboard`, `flat_energy` and `detail_correlation` of SRGAN beside them. `config` says the
    view (crop, hr_size).

    Images are rounded to 8 bits and lose a border of `scale` px. ValueError if too little is left to measure.
    """
    if config.hr_size - 2 * config.scale < 11:
        raise ValueError(f"hr_size={config.hr_size} is too small to measure at {config.scale}x: 11 px must be left "
                         "inside the border")
    device, edge, rows = next(generator.parameters()).device, slice(config.scale, -config.scale), []
    chunks = [indices[start:start + 8] for start in range(0, len(indices), 8)]
    for chunk in _bar(chunks, desc="measuring", unit="batch", disable=len(chunks) < 8):
        lr, hr = make_pair(store.faces(chunk).to(device), config)
        ours = quantise(generator(lr))[..., edge, edge].float()
        plain, hr = quantise(bicubic(lr, config.hr_size))[..., edge, edge], hr[..., edge, edge]
        scores = {"bicubic": _scores(plain, hr, with_lpips), "srgan": _scores(ours, hr, with_lpips),
                  "hr": {"checkerboard": checkerboard_index(hr).tolist()}}
        added = {"flat_energy": flat_energy(ours, hr).tolist(),
                 "detail_correlation": detail_correlation(ours, plain, hr).tolist()}
        for i, index in enumerate(chunk):
            rows.append({"name": store.names[index]} | {f"{method}_{metric}": values[i] for method, by_metric in scores.items()
                                                        for metric, values in by_metric.items()}
                        | {metric: values[i] for metric, values in added.items()})
    return rows


def _interval(values: Sequence[float]) -> dict[str, float]:
    """The mean of `values` and its 95 % bootstrap interval (percentiles of the means of 2,000 resamples, always the same)."""
    values = np.asarray(values, dtype=float)
    means = values[np.random.default_rng(0).integers(len(values), size=(2_000, len(values)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return {"mean": round(float(values.mean()), 5), "low": round(float(low), 5), "high": round(float(high), 5)}


def summarise(rows: Sequence[dict], config: Config, split: str) -> dict:
    """What metrics.json holds: means over images of per-image values, for bicubic, srgan and hr; null where not finite.

    `gain`: the mean gain over bicubic in PSNR, dB, with its 95 % bootstrap interval over images. `added`: flat energy and
    detail correlation of what SRGAN adds.
    """
    def mean(key):
        value = float(np.mean([row[key] for row in rows]))
        return round(value, 5) if math.isfinite(value) else None

    summary = {"scale": config.scale, "split": split, "images": len(rows), "crop": config.crop, "hr_size": config.hr_size}
    for method in ("bicubic", "srgan"):
        prefix = f"{method}_"
        summary[method] = {key.removeprefix(prefix): mean(key) for key in rows[0] if key.startswith(prefix)}
    gains = {metric: [row[f"srgan_{metric}"] - row[f"bicubic_{metric}"] for row in rows] for metric in ("psnr_rgb", "psnr_y")}
    summary["added"] = {metric: mean(metric) for metric in ("flat_energy", "detail_correlation")}
    summary["gain"] = {metric: _interval(values) for metric, values in gains.items() if np.isfinite(values).all()}
    return summary | {"hr": {"sharpness": 1, "checkerboard": mean("hr_checkerboard")}}


def results_table(summary: dict) -> str:
    """A summary as a table for people."""
    metrics = list(summary["srgan"])
    lines = [f"{summary['images']} {summary['split']} faces at {summary['scale']}x, {summary['crop']} -> {summary['hr_size']} px",
             " " * 8 + "".join(f"{metric:>13}" for metric in metrics)]
    for method in ("bicubic", "srgan", "hr"):
        cells = [(summary[method].get(metric), 2 if "psnr" in metric else 3) for metric in metrics]
        lines.append(f"{method:8}" + "".join(" " * 13 if cell is None else f"{cell:13.{digits}f}" for cell, digits in cells))
    for metric, gain in summary["gain"].items():
        lines.append(f"gain in {metric}: {gain['mean']:+.2f} dB (95 % interval of this mean: "
                     f"{gain['low']:+.2f} to {gain['high']:+.2f})")
    added = summary["added"]
    lines.append(f"energy in HR's flattest blocks: {added['flat_energy']:.2f} of HR's; what is added correlates "
                 f"{added['detail_correlation']:.2f} with what bicubic lacks")
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# 11. Figures: four panels, before/after, sample strips, loss curves
# -----------------------------------------------------------------------------


def _img(png: bytes, alt: str, style: str) -> str:
    """An HTML <img> that holds its own pixels, with alternative text for those who cannot see it."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<img alt="{html.escape(alt)}" decoding="sync" style="{style}" src="{source}">'


def _picture(png: bytes, alt: str) -> str:
    """A figure as an <img> as large as the PNG, or as wide as there is room; where that is little (a phone, a large zoom), it
    scrolls rather than become too small to be seen. It holds its place while another takes over."""
    from PIL import Image

    width, height = Image.open(io.BytesIO(png)).size
    style = f"width: min(max(100%, 40em), {width}px); max-width: none; aspect-ratio: {width} / {height}; background: white"
    return f'<div style="overflow-x: auto">{_img(png, alt, style)}</div>'


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def show_picture(file: str | Path, alt: str):
    """The PNG in `file` for display in a notebook, with the alternative text `alt`."""
    from IPython.display import HTML

    return HTML(_picture(Path(file).read_bytes(), alt))


def _figure(width: float, height: float, alt: str):
    """A matplotlib Figure, in inches, that notebooks show without pyplot and its global state, with `alt` for screen readers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure._repr_html_ = lambda: _picture(_png(figure), alt)  # IPython's image/png has no alternative text
    return figure


def show_images(images: Tensor | Sequence[Tensor], titles: Sequence[str] = (), columns: int = 8, size: float = 1.6):
    """A matplotlib Figure of images, (N, 3, H, W) or N of (3, H, W) of any size, `size` inches each, on one range of colours."""
    rows = math.ceil(len(images) / columns)
    alt = " ".join(f"{len(images)} images{': ' * bool(titles)}{'; '.join(titles)}".split())
    figure = _figure(size * min(columns, len(images)), (size + 0.25 * bool(titles)) * rows, alt)
    axes = figure.subplots(rows, min(columns, len(images)), squeeze=False).flat
    for ax, image, title in itertools.zip_longest(axes, images, titles):
        ax.axis("off")
        if image is not None:
            ax.imshow(_to_pixels(image[None])[0], interpolation="nearest", vmin=0, vmax=255)
            ax.set_title(title or "", fontsize=9)
    return figure


@torch.no_grad()
def comparison_figure(generator: Generator, config: Config, faces: Tensor, label: str = "SRGAN", errors: bool = False):
    """LR (nearest), bicubic, SRGAN and HR of stored faces, uint8 (N, 3, 178, 178), as a matplotlib Figure.

    All panels share one range of colours, [0, 1]; PSNR and SSIM (RGB, border of `scale` px removed) stand below.
    errors: a fifth panel, four times the absolute difference of SRGAN and HR.
    """
    device, edge = next(generator.parameters()).device, slice(config.scale, -config.scale)
    lr, hr = make_pair(faces.to(device), config)
    plain, ours = quantise(bicubic(lr, config.hr_size)), quantise(generator(lr))
    titles = (f"LR, {lr.shape[-1]} px", "bicubic", f"{label} {config.scale}x", f"HR, {config.hr_size} px")
    panels = (lr, plain, ours, hr)
    if errors:
        titles, panels = (*titles, "error, 4 times"), (*panels, (ours - hr).abs().mul(4).clamp(0, 1))
    figure = _figure(3 * len(panels), 3.25 * len(faces), f"{len(faces)} faces, each as {'; '.join(titles)}")
    axes = figure.subplots(len(faces), len(panels), squeeze=False)
    for column, (title, images) in enumerate(zip(titles, panels)):
        scores = None
        if column in (1, 2):
            scores = zip(psnr(images[..., edge, edge], hr[..., edge, edge]), ssim(images[..., edge, edge], hr[..., edge, edge]))
        for row, image in enumerate(_to_pixels(images)):
            ax = axes[row, column]
            ax.imshow(image, interpolation="nearest", vmin=0, vmax=255)
            ax.set(xticks=[], yticks=[], title=title if row == 0 else "")
            ax.set_xlabel("{:.2f} dB, SSIM {:.3f}".format(*next(scores)) if scores else " ")
    return figure


@torch.no_grad()
def stages_figure(stages: dict[str, Generator], config: Config, faces: Tensor, note: str = ""):
    """What each of several generators, of one scale, makes of stored faces, uint8 (N, 3, 178, 178): a matplotlib Figure.

    LR and bicubic first, HR last; below each face a quarter of its side, four times as large, where a checkerboard shows.
    Under them PSNR (RGB) and checkerboard index of that face. `config` says the view (crop, hr_size); `note` stands at the
    foot.
    """
    lr, hr = make_pair(faces, config)
    panels = {f"LR, {lr.shape[-1]} px": F.interpolate(lr, size=hr.shape[-2:], mode="nearest"),
              "bicubic": quantise(bicubic(lr, config.hr_size))}
    for name, network in stages.items():
        panels[name] = quantise(network.eval()(lr.to(next(network.parameters()).device)).cpu())
    panels["HR"] = hr
    part, edge = slice(3 * config.hr_size // 8, 5 * config.hr_size // 8), slice(config.scale, -config.scale)
    alt = f"{len(faces)} faces and a part of each enlarged, as {'; '.join(panels)}"
    figure = _figure(2.4 * len(panels), 5.1 * len(faces) + 0.3 * bool(note), alt)
    axes = figure.subplots(2 * len(faces), len(panels), squeeze=False)
    for column, (name, images) in enumerate(panels.items()):
        inner, truth = images[..., edge, edge], hr[..., edge, edge]
        whole, zoomed = (_to_pixels(each) for each in (images, images[..., part, part]))
        for row, (near, index) in enumerate(zip(psnr(inner, truth).tolist(), checkerboard_index(inner).tolist())):
            for ax, pixels in zip(axes[2 * row:2 * row + 2, column], (whole[row], zoomed[row])):
                ax.imshow(pixels, interpolation="nearest", vmin=0, vmax=255)
                ax.set(xticks=[], yticks=[])
            axes[2 * row, column].set_title(name if row == 0 else "", fontsize=13)  # to be read where eight panels share a page
            distance = "" if name == "HR" else f"{near:.2f} dB, "
            axes[2 * row + 1, column].set_xlabel(f"{distance}index {index:.2f}" if column else " ", fontsize=13)
    figure.supxlabel(note, fontsize=9)
    return figure


@torch.no_grad()
def image_strip(generator: Generator, config: Config, faces: Tensor) -> Tensor:
    """LR (nearest), bicubic, SR and HR side by side, one stored face below the other: (1, 3, N S, 4 S), S = hr_size."""
    device = next(generator.parameters()).device
    lr, hr = make_pair(faces.to(device), config)
    enlarged = F.interpolate(lr, size=hr.shape[-2:], mode="nearest")
    columns = torch.cat([enlarged, bicubic(lr, config.hr_size), generator(lr).clamp(0, 1), hr], dim=3)  # (N, 3, S, 4 S)
    return torch.cat(list(columns), dim=1)[None].cpu()


def scores_figure(rows: Sequence[dict]):
    """What `evaluate` found, a matplotlib Figure: a dot for each face and method, PSNR (RGB, dB) against sharpness."""
    figure = _figure(6, 4, f"PSNR against sharpness of {len(rows)} faces, bicubic and SRGAN")
    ax = figure.subplots()
    for method, label in (("bicubic", "bicubic"), ("srgan", "SRGAN")):
        ax.scatter(*([row[f"{method}_{metric}"] for row in rows] for metric in ("psnr_rgb", "sharpness")), s=14, label=label)
    ax.axhline(1, color="grey", linewidth=0.8)
    ax.set(xlabel="PSNR RGB, dB: nearer to HR", ylabel="sharpness (HR: 1)")
    ax.legend()
    return figure


def _fit(image: Tensor, most: int) -> Tensor:
    """(1, 3, H, W) reduced so that no side is longer than `most` px; unchanged if none is."""
    share = most / max(image.shape[-2:])
    return image if share >= 1 else quantise(bicubic(image, tuple(max(1, round(side * share)) for side in image.shape[-2:])))


def factor_panels(picture: Tensor, factor: float, is_hr: bool = True, weights: dict[int, str | Path] | None = None,
                  amount: float = 1.0, progress: bool | Callable[[float], None] = False) -> tuple[list[tuple], str]:
    """What `factor` does to `picture` (1, 3, h, w): panels of (title, image, caption), and the note of `enlarge`.

    is_hr: the picture is the truth and is shrunk first, by 2, 4 or 8 (which may cost it some px on the right and below):
    LR, bicubic, SRGAN and HR, all (1, 3, H, W), with PSNR and SSIM (RGB, border of `factor` px removed) as captions.
    Otherwise it is the LR, and there are three panels without numbers, since there is no truth; the note is the caption of
    SRGAN. The other arguments, and the errors, are those of `enlarge`; ValueError, too, if too little is left to measure.
    """
    lr, hr = picture, None
    if is_hr:
        if factor not in _FACTORS:
            raise ValueError(f"a picture is shrunk by 2, 4 or 8 to be tested, not by {factor:g}")
        factor = int(factor)
        height, width = (side // factor for side in picture.shape[-2:])
        if (min(height, width) - 2) * factor < 11:
            raise ValueError(f"{picture.shape[-1]} x {picture.shape[-2]} px are too few to be shrunk {factor}x and measured: "
                             f"take {(2 + math.ceil(11 / factor)) * factor} px or more")
        hr = picture[..., :height * factor, :width * factor]
        lr = quantise(bicubic(hr, (height, width)))
    sr, note = enlarge(lr, factor, weights, amount, progress)
    size = sr.shape[-2:]
    panels = [(f"LR, {lr.shape[-1]} px", F.interpolate(lr, size=size, mode="nearest"), ""),
              ("bicubic", quantise(bicubic(lr, size)), ""), (f"SRGAN {factor:g}x", sr, note)]
    if hr is None:
        return panels, note
    inner = (..., slice(factor, -factor), slice(factor, -factor))
    for i in (1, 2):
        title, image, _ = panels[i]
        near, similar = (metric(image[inner], hr[inner]).item() for metric in (psnr, ssim))
        panels[i] = (title, image, f"{near:.2f} dB, SSIM {similar:.3f}")
    return [*panels, (f"HR, {size[1]} px", hr, "")], note


def _part(image: Tensor, zoom: tuple[float, float]) -> Tensor:
    """A quarter of the side of `image`, at `zoom`: how far to the right and how far down, from 0 to 1."""
    size = [max(1, side // 4) for side in image.shape[-2:]]
    y, x = (round(share * (side - part)) for share, side, part in zip(zoom[::-1], image.shape[-2:], size))
    return image[..., y:y + size[0], x:x + size[1]]


def panels_figure(rows: dict[str, list[tuple]], zoom: tuple[float, float] | None = (0.35, 0.35)):
    """Panels of `factor_panels`, a row for each name in `rows`, as a matplotlib Figure; below each, enlarged, a part: the same of
    all, a quarter of the side, `zoom` to the right and down (0 to 1). None: no parts."""
    from matplotlib.patches import Rectangle

    columns, lines = max(map(len, rows.values())), 2 if zoom else 1
    alt = "; ".join(f"{name}: " + ", ".join(f"{title} {caption}".strip() for title, _, caption in panels)
                    for name, panels in rows.items())
    figure = _figure(3 * columns, 3.25 * lines * len(rows), alt + "; a part of each enlarged below it" * bool(zoom))
    axes = figure.subplots(lines * len(rows), columns, squeeze=False)
    for row, (name, panels) in enumerate(rows.items()):
        axes[lines * row, 0].set_ylabel(name)
        for column, (title, image, caption) in enumerate(panels):
            whole = _fit(image, 1024)
            for ax, shown in zip(axes[lines * row:, column], [whole, _part(image, zoom)] if zoom else [whole]):
                ax.imshow(_to_pixels(shown)[0], interpolation="nearest", vmin=0, vmax=255)
                ax.set(xticks=[], yticks=[])
            axes[lines * row, column].set_title(title)
            axes[lines * row, column].set_xlabel(caption or " ")
            if zoom:
                height, width = whole.shape[-2:]
                corner = (zoom[0] * (width - width // 4) - 0.5, zoom[1] * (height - height // 4) - 0.5)  # a pixel's edge
                axes[lines * row, column].add_patch(Rectangle(corner, width // 4, height // 4, fill=False, color="white"))
    return figure


def _encoded(image) -> bytes:
    """A Pillow image as a PNG file, packed fast rather than small."""
    buffer = io.BytesIO()
    image.save(buffer, format="png", compress_level=1)
    return buffer.getvalue()


def _image_png(image: Tensor) -> bytes:
    """One image, (1, 3, H, W), as a PNG file."""
    from PIL import Image

    return _encoded(Image.fromarray(_to_pixels(image)[0]))


# The range input lies over the pictures, unseen: pointer, touch and keys are the browser's own business. The attribute
# keeps JupyterLab from taking the arrow keys for its own. In the Explorer's panel the line stays where it is from one picture
# to the next, so its place is kept there.
_BEFORE_AFTER = """<div class="srgan-cut" style="position: relative; width: min({width}px, 100%); margin: 4px 0">
<style onload="const cut = parseFloat(getComputedStyle(this.parentNode).getPropertyValue('--cut'));
if (cut >= 0) this.parentNode.querySelector('input').value = cut">
.srgan-cut:focus-within {{outline: 3px solid #1a73e8; outline-offset: 2px}}
.srgan-cut span {{position: absolute; top: 4px; padding: 0 6px; background: #000b; color: white}}
.srgan-cut input {{position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: ew-resize;
touch-action: pan-y; -webkit-appearance: none; appearance: none}}
.srgan-cut input::-webkit-slider-thumb {{width: 1px}} .srgan-cut input::-moz-range-thumb {{width: 1px; border: 0}}</style>
{right}<div style="position: absolute; inset: 0; clip-path: inset(0 calc(100% - var(--cut, 50%)) 0 0)">{left}</div>
<div style="position: absolute; inset: 0 auto 0 calc(var(--cut, 50%) - 1px); width: 2px; background: white;
box-shadow: 0 0 2px black"></div><span style="left: 4px">{names[0]}</span><span style="right: 4px">{names[1]}</span>
<input type="range" min="0" max="100" value="50" data-lm-suppress-shortcuts="true"
aria-label="{names[0]} left of the line, {names[1]} right of it: per cent"
oninput="(this.closest('.srgan-explorer') || this.parentNode).style.setProperty('--cut', this.value + '%')"></div>"""


def before_after(left: Tensor, right: Tensor, names: tuple[str, str], alt: str):
    """Two images (1, 3, H, W) upon each other, and a line between them to be moved by mouse, touch or arrow keys, as HTML.

    Complete in itself: no network and no <script>, so its `data` works as the `value` of an ipywidgets.HTML, too.
    """
    from IPython.display import HTML

    times = max(1, 640 // left.shape[-1])
    style = f"display: block; width: 100%; max-width: none; margin: 0; image-rendering: {'pixelated' if times > 1 else 'auto'}"
    left, right = (_fit(image, 1024) for image in (left, right))
    pictures = [_img(_image_png(image), f"{alt}: {name}", style) for image, name in zip((left, right), names)]
    return HTML(_BEFORE_AFTER.format(width=times * left.shape[-1], left=pictures[0], right=pictures[1],
                                     names=[html.escape(name) for name in names]))


# All pictures lie in one cell of a grid, so that nothing moves when another takes over
_PICTURE_SLIDER = """<div><label>{label} <input type="range" min="0" max="{last}" value="{start}" aria-valuetext="{name}"
data-lm-suppress-shortcuts="true" style="vertical-align: middle; width: 12em"
oninput="const all = this.closest('div').lastChild.children;
for (const one of all) one.style.visibility = one == all[this.value] ? 'visible' : 'hidden';
this.ariaValueText = this.parentNode.nextElementSibling.textContent = all[this.value].dataset.name"></label>
<b>{name}</b><div style="display: grid">{pictures}</div></div>"""


def picture_slider(figures: dict, label: str, start):
    """A slider that shows one of several Figures of this module, by mouse, touch or arrow keys: the one at each key of `figures`,
    at first that of `start`. HTML that holds them all, and needs neither kernel nor network."""
    from IPython.display import HTML

    names = [html.escape(str(key)) for key in figures]
    at = list(figures).index(start)
    pictures = "".join(f'<div data-name="{name}" style="grid-area: 1 / 1; visibility: {"visible" if i == at else "hidden"}">'
                       f"{figure._repr_html_()}</div>" for i, (name, figure) in enumerate(zip(names, figures.values())))
    return HTML(_PICTURE_SLIDER.format(label=html.escape(label), last=len(names) - 1, start=at, name=names[at],
                                       pictures=pictures))


def write_comparison(store: FaceStore, generator: Generator, config: Config, folder: Path, split: str = "test",
                     count: int | None = None, with_lpips: bool = False, errors: bool = False) -> dict:
    """Measure `generator` on `count` faces of `split` (default: all, at most 2,000). Leaves panels.png, scores.png, metrics.csv
    (see `evaluate`) and metrics.json in `folder`; returns what that holds (see `summarise`)."""
    indices = store.indices(split)
    count = min(len(indices), count or 2000)
    chosen = indices[[i * len(indices) // count for i in range(count)]]
    rows = evaluate(generator, config, store, chosen, with_lpips)
    with open(folder / "metrics.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    summary = summarise(rows, config, split)
    _write_atomically(folder / "metrics.json", (json.dumps(summary, indent=1) + "\n").encode())
    shown = chosen[[i * len(chosen) // min(4, len(chosen)) for i in range(min(4, len(chosen)))]]
    comparison_figure(generator, config, store.faces(shown), errors=errors).savefig(folder / "panels.png", dpi=100)
    scores_figure(rows).savefig(folder / "scores.png", dpi=100)
    return summary


def history_figure(path: str | Path):
    """The losses of a run's history.csv, a matplotlib Figure: one panel for the generator, one for the discriminator."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure = _figure(12, 3, "losses of the generator and of the discriminator over the updates")
    panels = {"generator": ("pixel", "content", "adversarial"), "discriminator": ("d_loss", "d_real", "d_fake")}
    for ax, (title, names) in zip(figure.subplots(1, 2), panels.items()):
        for name in names:
            points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
            if points:
                steps, values = zip(*points)
                width = max(1, len(values) // 200)  # a running mean, or noise hides the trend
                smooth = np.convolve(values, np.ones(width) / width, mode="valid")
                ax.plot(steps[width - 1:], smooth, label=name, marker="o" if len(smooth) == 1 else "")
        ax.set(xlabel="update", title=title)
        if ax.lines:
            ax.legend()
        else:
            ax.set(xticks=[], yticks=[])
            waits = "no update yet" if title == "generator" else "not yet: pixels alone so far"
            ax.text(0.5, 0.5, waits, ha="center", transform=ax.transAxes)
    figure.axes[0].set_yscale("log")  # the losses of the generator differ by orders of magnitude
    return figure


def histogram_figure(panels: dict[str, Tensor]):
    """How often each value occurs in red, green and blue of each of several images (3, H, W): a matplotlib Figure."""
    ranges = [f"{name}, from {image.min() + 0:.2f} to {image.max():.2f}" for name, image in panels.items()]
    figure = _figure(4.5 * len(panels), 3, f"histograms of red, green and blue: {'; '.join(ranges)}")
    for ax, title, image in zip(figure.subplots(1, len(panels), squeeze=False)[0], ranges, panels.values()):
        for channel, name, line in zip(image.cpu(), ("red", "green", "blue"), ("-", "--", ":")):  # for the colour-blind
            ax.hist(channel.flatten().numpy(), 64, histtype="step", color=name, linestyle=line,
                    label=f"{name}: mean {channel.mean():.2f}, deviation {channel.std():.2f}")
        ax.set(title=title, xlabel="value", ylabel="pixels")
        ax.margins(y=0.6)  # room for the legend
        ax.legend(fontsize=8)
    return figure


def layers_figure(model: nn.Module, x: Tensor):
    """Parameters and multiplications of each layer of `model` on `x` (see `layer_costs`) as bars: a matplotlib Figure."""
    costs = layer_costs(model, x)
    totals = [max(1, sum(values)) for values in zip(*costs.values())]
    told = "; ".join(f"{name} {own / totals[0]:.0%} and {count / totals[1]:.0%}" for name, (own, count) in costs.items())
    figure = _figure(9, 0.8 + 0.2 * len(costs), f"each layer's share of the parameters and of the multiplications: {told}")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, values, total, title in zip(axes, zip(*costs.values()), totals, ("parameters", "multiplications")):
        bars = ax.barh(list(costs), values)
        ax.bar_label(bars, [f" {value / total:.0%}" for value in values], fontsize=8)
        ax.set(title=f"{total:,} {title}", xlim=(0, 1.15 * max(1, *values)), xticks=[])
    axes[0].tick_params(labelsize=8)
    axes[0].invert_yaxis()
    return figure


# -----------------------------------------------------------------------------
# 12. Training: the step functions and `train`
# -----------------------------------------------------------------------------


def _adam(network: nn.Module, config: Config) -> torch.optim.Adam:
    return torch.optim.Adam(network.parameters(), lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def _load_part(part, saved: dict) -> None:
    """`part.load_state_dict`, where an optimiser takes its moments from `saved` and keeps its own settings."""
    if isinstance(part, torch.amp.GradScaler) and part.is_enabled() and not (saved.keys() == part.state_dict().keys() and all(
            type(value) in (int, float) and 0 <= value < 1e30 for value in saved.values())):
        raise ValueError("no state of a loss scaler")
    if not isinstance(part, torch.optim.Optimizer):
        mine = part.state_dict() if isinstance(part, nn.Module) and isinstance(saved, dict) else {}
        if any(saved[name].dtype != value.dtype for name, value in mine.items()):
            raise ValueError("weights of another type")
        part.load_state_dict(saved)
        return
    if any(each.keys() != {"step", "exp_avg", "exp_avg_sq"} or {(value.dtype, value.layout) for value in each.values()}
           != {(torch.float32, torch.strided)} for each in saved["state"].values()):  # torch would walk through anything
        raise ValueError("moments of another type")
    part.load_state_dict({"state": saved["state"], "param_groups": part.state_dict()["param_groups"]})
    for weight, moments in part.state.items():
        if {moments["exp_avg"].shape, moments["exp_avg_sq"].shape} != {weight.shape} or moments["step"].numel() != 1:
            raise ValueError("moments of other weights")


def _as_stepped(network: nn.Module, config: Config) -> nn.Module:
    """`network` as the updates call it: its gradients are means over all processes, its kernels fused where that pays."""
    if _ranks() > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.15 has another word for it, older ones only this
            network = nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)
    if config.compile:
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled here runs as it is
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # _imagenet
        return torch.compile(network)
    return network


def _compile_pays(config: Config, device: torch.device) -> bool:
    """Whether torch.compile's minute or two are little beside the run."""
    return device.type == "cuda" and config.total_steps >= 20_000


@dataclass
class TrainState:
    """The networks and optimisers of a run, and how many updates they have seen."""

    config: Config
    device: torch.device
    generator: Generator
    discriminator: Discriminator
    enlarge: nn.Module                # generator and discriminator as the updates call them
    judge: nn.Module
    ema: Generator | None
    vgg: VGGFeatures | None
    g_optimizer: torch.optim.Optimizer
    d_optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    update: int = 0

    @classmethod
    def create(cls, config: Config, device: torch.device) -> TrainState:
        """Fresh networks, a function of `config.seed`; `config.precision` must be resolved."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            networks = [Generator(config), Discriminator(config), Generator(config)]
        if _ranks() > 1 and device.type == "cuda":  # else each process has the statistics of its own share (no gloo for it)
            networks = [nn.SyncBatchNorm.convert_sync_batchnorm(network) for network in networks]
        generator, discriminator, ema = (net.to(device, memory_format=torch.channels_last) for net in networks)
        ema.load_state_dict(generator.state_dict())
        needs_vgg = config.content == "vgg" and config.steps != 0
        scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        return cls(config, device, generator, discriminator, _as_stepped(generator, config), _as_stepped(discriminator, config),
                   ema.requires_grad_(False).eval() if config.ema else None,
                   VGGFeatures(config).to(device, memory_format=torch.channels_last) if needs_vgg else None,
                   _adam(generator, config), _adam(discriminator, config), scaler)

    @property
    def best(self) -> Generator:
        """The generator to use: its moving average where the run keeps one."""
        return self.ema or self.generator

    def autocast(self) -> torch.autocast:
        return _autocast(self.config.precision, self.device)

    def parts(self) -> dict:
        """Whatever has a state_dict, by name."""
        names = ("generator", "discriminator", "ema", "g_optimizer", "d_optimizer", "scaler")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def load(self, saved: dict) -> None:
        """Continue from what a checkpoint says. Errors of many kinds if it is of other networks."""
        for name, part in self.parts().items():
            if name != "scaler" or saved.get(name):  # the scaler's is empty where the run began without fp16
                _load_part(part, saved[name])
        self.update = saved["update"]


def _checkpoint_bytes(config: Config) -> int:
    """About how large a checkpoint is: all weights and statistics, and Adam's two moments of every trained weight."""
    with torch.device("meta"):  # shapes alone: no memory
        generator, discriminator = Generator(config), Discriminator(config)
    kept = [generator, discriminator] + ([generator] if config.ema else [])
    moments = 2 * sum(p.nbytes for network in (generator, discriminator) for p in network.parameters())
    return moments + sum(value.nbytes for network in kept for value in network.state_dict().values())


def _learning_rate(config: Config, update: int) -> float:
    """Warm-up, then constant or a cosine down to a hundredth, of the stage that update number `update` (from 0) is in."""
    pretraining = update < config.pretrain_steps
    base = config.pretrain_learning_rate if pretraining else config.learning_rate
    length = config.pretrain_steps if pretraining else config.decay_steps
    step = update if pretraining else update - config.pretrain_steps
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.decay == "none":
        return base * warm
    done = min(1.0, step / max(1, length))  # beyond `length` (steps raised later) the final rate stays
    return base * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def _step_optimizer(state: TrainState, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(loss).backward()
    for group in optimizer.param_groups:
        group["lr"] = _learning_rate(state.config, state.update)
    state.scaler.step(optimizer)


def pretrain_step(state: TrainState, lr: Tensor, hr: Tensor) -> dict[str, Tensor]:
    """One update of the generator alone, by the pixel loss: SRResNet (§3.2)."""
    with state.autocast():
        sr = state.enlarge(lr)
    loss = pixel_loss(sr, hr, state.config.distance)
    _step_optimizer(state, state.g_optimizer, loss)
    return {"g_loss": loss.detach(), "pixel": loss.detach()}


def discriminator_step(state: TrainState, sr: Tensor, hr: Tensor) -> dict[str, Tensor]:
    """One update of the discriminator: call real faces real and generated ones generated (Eq. 2)."""
    with state.autocast():
        real = state.judge(hr)
        fake = state.judge(sr.detach())  # detach: this update must not move the generator
    loss = discriminator_loss(real, fake, state.config.adversarial)
    _step_optimizer(state, state.d_optimizer, loss)
    return {"d_loss": loss.detach(), "d_real": real.detach().mean(), "d_fake": fake.detach().mean()}


def _content_loss(state: TrainState, sr: Tensor, hr: Tensor, fake_features, real_features) -> Tensor:
    config = state.config
    if config.content == "features":
        # the first layer's maps are as large as the image and hold little more than it does
        return feature_loss(fake_features[1:], real_features[1:], config.distance)
    if config.content == "vgg":
        with torch.no_grad():
            wanted = state.vgg(hr)
        return pixel_loss(state.vgg(sr), wanted, config.distance)
    return pixel_loss(sr, hr, config.distance)


def generator_step(state: TrainState, sr: Tensor, hr: Tensor) -> dict[str, Tensor]:
    """One update of the generator: look like HR (content), and be called real (adversarial; Eq. 3).

    sr comes from the same pass that the discriminator's update used: the report ran the generator a second
    time, which gives the same weights (its BatchNorm statistics then weigh the newest batch 0.96 instead of 0.8).
    """
    config, critic = state.config, state.discriminator
    critic.requires_grad_(False)  # its weights need no gradient here
    with state.autocast():
        fake_features = critic.features(sr)
        fake, real, real_features = critic.score(fake_features), None, None
        if config.content == "features" or config.adversarial == "relativistic":
            with torch.no_grad():
                real_features = critic.features(hr)
                real = critic.score(real_features)
        content = _content_loss(state, sr, hr, fake_features, real_features)
    critic.requires_grad_(True)
    pixel = pixel_loss(sr, hr, config.distance)
    adversarial = adversarial_loss(fake, real, config.adversarial)
    ramp = min(1.0, (state.update - config.pretrain_steps + 1) / config.ramp_steps) if config.ramp_steps else 1.0
    loss = config.content_weight * content + ramp * config.adversarial_weight * adversarial
    if config.content != "pixel" and config.pixel_weight:
        loss = loss + config.pixel_weight * pixel
    _step_optimizer(state, state.g_optimizer, loss)
    return {"g_loss": loss.detach(), "pixel": pixel.detach(), "content": content.detach(), "adversarial": adversarial.detach()}


@torch.no_grad()
def update_ema(ema: Generator, generator: Generator, decay: float) -> None:
    """ema = decay * ema + (1 - decay) * generator, BatchNorm's statistics included."""
    for average, value in zip(ema.state_dict().values(), generator.state_dict().values()):
        if average.is_floating_point():
            average.lerp_(value, 1 - decay)
        else:
            average.copy_(value)


def _one_update(state: TrainState, store: FaceStore) -> dict[str, Tensor]:
    """Update number `state.update`, whichever stage it belongs to; returns its losses, still on the device."""
    config = state.config
    lr, hr = batch(store, config, state.update, state.device)
    if state.update < config.pretrain_steps:
        losses = pretrain_step(state, lr, hr)
    else:
        if state.update == config.pretrain_steps:
            state.g_optimizer = _adam(state.generator, config)  # moments of another loss would mislead
        with state.autocast():
            sr = state.enlarge(lr)
        losses = discriminator_step(state, sr, hr) | generator_step(state, sr, hr)
    state.scaler.update()
    if state.ema is not None:
        update_ema(state.ema, state.generator, min(config.ema, (1 + state.update) / (10 + state.update)))
    state.update += 1
    return losses


def _updates(state: TrainState, store: FaceStore, count: int) -> list[dict[str, float]]:
    """The next `count` updates, of one stage, in all processes; their losses are fetched together, since each fetch makes the
    host wait for the device."""
    state.generator.train()
    state.discriminator.train()
    losses = [_one_update(state, store) for _ in range(count)]
    table = _mean_of_ranks(torch.stack([torch.stack(list(each.values())) for each in losses]))
    return [dict(zip(losses[0], values)) for values in table.tolist()]


def _created(config: Config, store: FaceStore) -> TrainState:
    """Fresh networks on this process's device, and the faces beside them if it is a GPU where they fit and are used often."""
    device, members = pick_device(), store.indices("train")
    store.keep_on(None)
    state = TrainState.create(config, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # else what earlier runs left would count as taken
        room = torch.cuda.mem_get_info()[0] / 4
        if len(members) * _SIDE * _SIDE * 3 < room and config.total_steps * config.batch_size > len(members):
            store.keep_on(device)
    return state


def _follow(store: FaceStore) -> None:
    """What every process but the first does: the same updates with its own share of the faces, until it is told to end."""
    for kind in (signal.SIGINT, signal.SIGTERM):  # the first process saves, then ends the others
        signal.signal(kind, signal.SIG_IGN)
    state = None
    while order := _tell():
        if order[0] == "update":
            _updates(state, store, order[1])
        elif order[0] == "load":
            state.load(order[1])
        else:
            state = None  # before there is another, so that they do not need memory both
            _, config, fingerprint = order
            if fingerprint != store.fingerprint:
                raise ValueError(f"{store.folder} holds other faces here than on the first machine: prepare the same on each")
            state = _created(config, store)


@dataclass
class Progress:
    """What `train` reports about once a second."""

    step: int                      # updates done, pre-training included
    total: int                     # updates in all
    stage: str                     # pretrain or adversarial
    losses: dict[str, float]       # of the newest update
    images_per_second: float
    seconds_left: float
    sample: Path | None = None     # a strip just drawn
    saved: bool = False            # a checkpoint is being written
    checkpoint: str = ""           # which update the newest complete one holds, and its age
    backup: str = ""               # the same of the backup, if there is one
    done: bool = False             # nothing more will come
    notes: list[str] = field(default_factory=list)


_FREE_TO_CHANGE = {"steps", "save_steps", "save_minutes", "sample_steps", "precision", "compile"}
_HISTORY = ("step", "stage", "seconds", "learning_rate", "g_loss", "pixel", "content", "adversarial", "d_loss", "d_real",
            "d_fake")


def run_name(config: Config, store: FaceStore) -> str:
    """`preset-xS-hash`, the hash of what differs from the preset and of the faces: another choice is another run."""
    plain = asdict(Config.preset(config.preset_name))
    differs = {name: value for name, value in asdict(config).items() if value != plain[name] and name not in _FREE_TO_CHANGE}
    told = hashlib.sha256(json.dumps([differs, store.fingerprint], sort_keys=True).encode()).hexdigest()[:6]
    return f"{config.preset_name}-x{config.scale}-{told}"


def _seconds_per_update(config: Config, store: FaceStore, device: torch.device) -> tuple[float, float]:
    """What an update of pre-training and an adversarial one take here, by timing some; 0 for a stage that `config` lacks."""
    warm, timed = 2, 4
    stages = {name: warm + timed for name in ("pretrain_steps", "steps") if getattr(config, name)}
    trial = replace(config, compile=False, **stages)
    for number in range(trial.total_steps):
        batch(store, trial, number, device)  # a block's first use checks it, which is not what is timed here
    with _ordered("create", trial, store.fingerprint):
        state = _created(trial, store)
    seconds = []
    for count in (trial.pretrain_steps, trial.steps):
        for number in (warm, timed) if count else ():
            begun = time.perf_counter()
            with _ordered("update", number):
                _updates(state, store, number)
        seconds.append((time.perf_counter() - begun) / timed if count else 0.0)
    return tuple(seconds)


_UPDATING = 0.96  # of a run's time; the rest goes into samples and checkpoints


def _fit_to_minutes(config: Config, store: FaceStore, device: torch.device, minutes: float) -> Config:
    """`config` with its stages shortened or lengthened, in proportion, to fill `minutes`, by timing some updates."""
    pretrain, adversarial = _seconds_per_update(config, store, device)
    whole = config.pretrain_steps * pretrain + config.steps * adversarial
    return config.lasting(int(config.total_steps * minutes * 60 * _UPDATING / max(whole, 1e-9)))


def _require_same_run(place: Path, record: dict, store: FaceStore, config: Config) -> None:
    """ValueError if what `record`, found in `place`, was made with other faces or with another config than `config`."""
    if not isinstance(record.get("config"), dict):
        raise ValueError(f"{place} does not say how the run was made: start a new run in another folder")
    if record.get("store") != store.fingerprint:
        raise ValueError(f"{place} was trained on other faces than those in {store.folder}: name the store it began with, "
                         "or another folder")
    younger = asdict(Config.recorded({}))  # what a run of before a field was there has of it
    for name, value in asdict(config).items():
        old = record["config"].get(name, younger[name])
        if name == "decay_steps" and type(old) is int and old < value <= config.steps:
            continue  # made longer with the run: see `longer`
        if name not in _FREE_TO_CHANGE and (type(old) not in (int, float, str, bool, type(None)) or value != old):
            old, value = (_shown(each).strip("'") for each in (old, value))
            raise ValueError(f"{place} was started with {name}={old}, not {value}: start a new run in another folder")


def _open_run(folder: Path, record: dict | None, store: FaceStore, preset: str | None, changes: dict, device: torch.device,
              for_minutes: float | None) -> tuple[Config, list[str]]:
    """The config of the run in `folder`, continued if there is a `record` of it, and what there is to say about it."""
    notes = []
    if record:
        given = changes if preset is None else {"preset_name": preset} | changes
        old = record.get("config")
        config = Config.recorded((old if isinstance(old, dict) else {}) | given).for_faces(len(store.indices("train")))
        _require_same_run(folder, record, store, config)
        if for_minutes:
            notes.append(f"the run keeps its own length, {config.total_steps:,} updates; minutes set that of new runs only. "
                         f"To train on after its end, give it more steps (it has {config.steps:,}), and as many decay_steps")
    else:
        config = Config.preset("sharp" if preset is None else preset, **changes).for_faces(len(store.indices("train")))
    if config.batch_size % _ranks():
        raise ValueError(f"batch_size={config.batch_size} cannot be shared by {_ranks()} processes: start so many that divide it")
    precision = resolve_precision(config.precision, device)
    if config.precision not in ("auto", precision):
        notes.append(f"precision changes from {config.precision} to {precision}, which is what this device has")
    return replace(config, precision=precision), notes


@contextlib.contextmanager
def _interrupts_held() -> Iterator[list]:
    """Ctrl-C, the notebook's stop button and a polite `kill` wait until the update under way is whole; the list then is
    not empty."""
    held: list = []
    kinds = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {kind: signal.signal(kind, lambda *_: held.append(True)) for kind in kinds}
    try:
        yield held
    finally:
        for kind, handler in reversed(before.items()):
            signal.signal(kind, handler)


def _snapshot(value):
    """A copy in the CPU's memory of all tensors in nested dictionaries and lists, which training cannot change any more."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _snapshot(each) for key, each in value.items()}
    return [_snapshot(each) for each in value] if isinstance(value, list) else value


class _Run:
    """The files and the clock of one training run; `advance` does updates until there is something to report."""

    def __init__(self, folder: Path, store: FaceStore, state: TrainState, max_minutes: float | None, backup: Backup | None):
        self.folder, self.store, self.state, self.backup = folder, store, state, backup
        self.began = self.saved_at = time.perf_counter()
        self.deadline = self.began + max_minutes * 60 if max_minutes else math.inf
        self.seconds_before, self.pace = 0.0, {}
        self.saved_update, self.losses = -1, {}
        self.kept: tuple[int, float] | None = None               # the newest checkpoint on disk, and when it was written
        self.writer, self.writing = ThreadPoolExecutor(1), None  # writes checkpoints while training goes on
        self.between = True                                      # two updates, that is: what is in memory is whole
        part = "validation" if (store.split == 1).any() else "train"
        members = store.indices(part)
        self.probes = store.faces(members[:: max(1, len(members) // 4)][:4])
        (folder / "samples").mkdir(parents=True, exist_ok=True)

    def resume(self, saved: dict) -> None:
        """Continue from the checkpoint `saved`. ValueError if it does not hold the networks of this run."""
        try:
            self.state.load(saved)
            self.seconds_before = float(saved["seconds"])
            history = saved["history"].encode()
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, OverflowError, LookupError):
            raise ValueError(f"the checkpoint of update {saved['update']}, in {self.folder / 'ckpt'} or the backup, does not "
                             "hold the networks of this run: delete it to continue from the one before") from None
        _write_atomically(self.folder / "history.csv", history)  # drops rows that would come twice
        self.saved_update = saved["update"]
        path = _checkpoint_path(self.folder / "ckpt", self.saved_update)
        if path.exists():
            self.kept = self.saved_update, path.stat().st_mtime
        if self.backup and path.exists() and _backup_update(self.backup.folder) != self.saved_update:
            self._back_up(path)  # the process that saved it did not live to do that

    def _back_up(self, checkpoint: Path) -> None:
        names = ("config.json", "history.csv", "pretrained.safetensors", "generator.safetensors")
        self.backup.submit(checkpoint, self.saved_update, [self.folder / name for name in names])

    def settle(self) -> None:
        """Wait until the checkpoint under way is on disk; OSError if it cannot be written."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def end(self) -> None:
        """Save what is not saved yet, and let the threads finish."""
        try:
            with _interrupts_held():  # the lock must not go while the thread writes
                try:
                    if self.between:
                        self.save()
                    self.settle()
                finally:
                    self.between = False
                    self.writer.shutdown()
        finally:
            if self.backup:
                self.backup.close()
            self.state = self.probes = None  # a traceback may keep this object, and the networks fill a GPU
            self.store.keep_on(None)

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began

    def record(self, first: int, stage: str, losses: list[dict[str, float]]) -> None:
        """Check the losses of the updates after the `first`, append them to history.csv."""
        path = self.folder / "history.csv"
        new = not path.exists()
        with open(path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _HISTORY, restval="", lineterminator="\n")
            if new:
                writer.writeheader()
            for update, values in enumerate(losses, first):
                for name, value in values.items():
                    if not math.isfinite(value):
                        self._stop(update + 1, name, value)
                rate = _learning_rate(self.state.config, update)
                row = {"step": update + 1, "stage": stage, "learning_rate": rate} | values
                numbers = {name: f"{value:.6g}" for name, value in row.items() if isinstance(value, float)}
                writer.writerow(row | numbers | {"seconds": f"{self.seconds:.1f}"})
        self.losses = losses[-1]

    def _stop(self, step: int, name: str, value: float) -> None:
        self.settle()
        good = f"of update {self.saved_update} in {self.folder / 'ckpt'}" if self.saved_update > 0 else "not there yet"
        raise FloatingPointError(f"update {step}: {name} is {value}; the last good checkpoint is {good}: "
                                 "try a lower learning_rate or precision=fp32 in a new run")

    def _write(self, content: dict) -> None:
        path = save_checkpoint(self.folder / "ckpt", content)
        self.saved_update = content["update"]
        self.kept = self.saved_update, time.time()
        if self.backup:
            self._back_up(path)

    def save(self, measure: bool = False) -> None:
        """The generator in use, and a checkpoint of all that resuming needs, which a thread writes from a copy in memory.

        The checkpoint comes last, so that none tells of files that are not there; `measure` as for `export`.
        """
        self.settle()
        state = self.state
        if self.saved_update == state.update:
            return
        networks = (state.generator, state.discriminator)
        if not all(p.isfinite().all() for network in networks for p in network.parameters()):
            self._stop(state.update, "a weight", math.nan)  # the losses tell only of the weights before the last step
        self.export("generator", measure)
        try:
            content = _snapshot({name: part.state_dict() for name, part in state.parts().items()})
        except RuntimeError as error:  # torch's own for want of memory
            raise OSError(f"the memory does not hold a copy of the networks ({_one_line(error)[:80]}), which a checkpoint is "
                          "written from: close other programs, then run it again to continue") from None
        content |= {
            "update": state.update, "seconds": self.seconds, "config": asdict(state.config), "store": self.store.fingerprint,
            "history": (self.folder / "history.csv").read_text(encoding="utf-8")}
        self.saved_at = time.perf_counter()
        try:
            self.writing = self.writer.submit(self._write, content)
        except RuntimeError:  # the interpreter is about to exit, and starts no threads any more
            self._write(content)

    def export(self, name: str, measure: bool = False) -> None:
        """Write the generator in use as NAME.safetensors; `measure` adds its scores on up to 32 validation faces."""
        config, about = self.state.config, {}
        if measure and (self.store.split == 1).any():
            rows = evaluate(self.state.best.eval(), config, self.store, self.store.indices("validation")[:32])
            about["validation"] = summarise(rows, config, "validation")
        export_generator(self.folder / f"{name}.safetensors", self.state.best, config, update=self.state.update, **about,
                         data={"source": Path(self.store.title).name, "fingerprint": self.store.fingerprint},
                         environment=environment())

    def draw(self) -> Path:
        network = self.state.best
        path = self.folder / "samples" / f"update-{self.state.update:07d}.png"
        was_training = network.training
        save_image(image_strip(network.eval(), self.state.config, self.probes), path)
        network.train(was_training)
        return path

    def _pace(self, stage: str, seconds: float, updates: int) -> None:
        old = self.pace.get(stage)
        self.pace[stage] = seconds / updates if old is None else 0.7 * old + 0.3 * seconds / updates

    def _seconds_left(self) -> float:
        config, done = self.state.config, self.state.update
        before = max(0, config.pretrain_steps - done)
        after = config.total_steps - max(done, config.pretrain_steps)
        pretrain = self.pace.get("pretrain", 0.0)
        # until it has been seen, an adversarial update is taken to cost three of pre-training
        left = before * pretrain + after * self.pace.get("adversarial", 3 * pretrain)
        return min(left, self.deadline - time.perf_counter())

    def _save_due(self) -> bool:
        state, config = self.state, self.state.config
        return (state.update in (config.pretrain_steps, config.total_steps) or state.update % config.save_steps == 0
                or time.perf_counter() - self.saved_at > config.save_minutes * 60)

    def _sample_due(self) -> bool:
        state, config = self.state, self.state.config
        return state.update in (config.pretrain_steps, config.total_steps) or state.update % config.sample_steps == 0

    def _planned(self, stage: str) -> int:
        """How many updates to do at once: about a second's, but up to the next stage, checkpoint or strip, and at most 50."""
        config, done = self.state.config, self.state.update
        ends = [(done // steps + 1) * steps for steps in (config.save_steps, config.sample_steps)]
        ends.append(config.pretrain_steps if stage == "pretrain" else config.total_steps)
        return max(1, min(50, int(1 / self.pace[stage]) if stage in self.pace else 1, min(ends) - done))

    def advance(self, held: list) -> Progress:
        """Train for about a second, or until a strip is drawn, a checkpoint saved, or there is nothing more to do."""
        state, config, begun, first = self.state, self.state.config, time.perf_counter(), self.state.update
        self.between = False
        if self.writing and self.writing.done():
            self.settle()  # if it failed, it is said now
        stage = "pretrain" if first < config.pretrain_steps else "adversarial"
        worked = first < config.total_steps
        if worked:
            count = self._planned(stage)
            with _ordered("update", count):
                losses = _updates(state, self.store, count)
            self.record(first, stage, losses)
            self._pace(stage, time.perf_counter() - begun, state.update - first)
        done = state.update >= config.total_steps or time.perf_counter() > self.deadline
        sample = self.draw() if worked and (done or self._sample_due()) else None
        if worked and state.update == config.pretrain_steps:
            self.export("pretrained", measure=True)
        saved = worked and bool(done or held or self._save_due())
        if saved:
            self.save(measure=done)
        if done or held:
            self.settle()
        self.between = True
        images_per_second = config.batch_size / self.pace.get(stage, math.inf)
        return Progress(state.update, config.total_steps, stage, self.losses, images_per_second, self._seconds_left(), sample,
                        saved, _age(self.kept, "none yet"), self.backup.status if self.backup else "", done)


def _look_up(folder: Path, store: FaceStore, preset: str | None, changes: dict, backup: Path | None,
             for_minutes: float | None) -> tuple[Config, dict | None, bool, list[str]]:
    """The config of the run in `folder`, its newest checkpoint if it has one, whether it is new, and what there is to say.

    Raises what `train` raises for a run that it refuses.
    """
    path, theirs = folder / "config.json", None
    if backup:
        _check_mounted(backup)
        with contextlib.suppress(OSError, _Damaged):  # none, or half-written: then the slots tell
            theirs = _read_sealed(backup / "config.json", _FORMAT, "")
    saved = newest_checkpoint(folder / "ckpt", backup)
    if path.exists():
        record = _read_sealed(path, _FORMAT, "delete this file, and the run continues with what its checkpoint says")
    else:
        record = theirs or saved
    config, notes = _open_run(folder, record, store, preset, changes, pick_device(), for_minutes)
    for place, other in ((backup, theirs), (folder / "ckpt", saved)):
        if other:
            _require_same_run(place, other, store, config)
    return config, saved, not record, notes


def _check_run_space(folder: Path, config: Config) -> None:
    """OSError if the disk of `folder`, which need not exist yet, has no room for the two checkpoints that a run keeps there."""
    there = sum(each.stat().st_size for pattern in ("ckpt/*", "slot_?.pt") for each in folder.glob(pattern))
    place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    _check_space(place, 2 * _checkpoint_bytes(config) - there, "two checkpoints")


def _begin(folder: Path, store: FaceStore, preset: str | None, changes: dict, backup: Path | None,
           max_minutes: float | None, for_minutes: float | None) -> tuple[_Run, list[str]]:
    """The run in `folder`, new or continued, ready to advance, and what there is to say about it."""
    device, path = pick_device(), folder / "config.json"
    config, saved, new, notes = _look_up(folder, store, preset, changes, backup, for_minutes)
    _check_run_space(folder, config)
    size = _checkpoint_bytes(config)
    copies = Backup(backup, size) if backup else None
    print(f"checkpoints of {_size(size)} each: the newest two in {folder / 'ckpt'}{f' and in {backup}' if backup else ''}")
    if for_minutes and new:
        config = replace(config, compile=config.compile or False)  # compiling takes minutes of those
        config = _fit_to_minutes(config, store, device, for_minutes)
    if config.compile is None:
        config = replace(config, compile=_compile_pays(config, device))
    with _ordered("create", config, store.fingerprint):
        state = _created(config, store)  # before config.json, so that what fails here can be asked for differently
    for name in ("pretrained.safetensors", "generator.safetensors"):
        if backup and saved and not path.exists() and (backup / name).exists():  # a fresh machine
            with contextlib.suppress(ValueError):  # one that was cut off while it was copied
                load_generator(backup / name)
                _write_atomically(folder / name, (backup / name).read_bytes())
    about = {"format": _FORMAT, "store": store.fingerprint, "config": asdict(config), "environment": environment(),
             "processes": _ranks()}
    _write_atomically(path, _sealed(about))
    run = _Run(folder, store, state, max_minutes, copies)
    if saved:
        run.resume(saved)
        with _ordered("load", saved):
            pass
        notes.append(f"continues at update {saved['update']:,} of {config.total_steps:,}")
    else:
        (folder / "history.csv").unlink(missing_ok=True)  # rows of updates that no checkpoint holds
    return run, notes


_LOOPS: dict[Path, tuple[_Run, contextlib.ExitStack]] = {}  # this process's runs, by their folder


def train(store: FaceStore, folder: str | Path, preset: str | None = None, changes: dict | None = None, *,
          backup: str | Path | None = None, max_minutes: float | None = None,
          for_minutes: float | None = None) -> Iterator[Progress]:
    """Start the run in `folder`, or continue it; yields `Progress` about once a second, so that the caller keeps the `for`.

    preset, changes: as for `Config.preset`; a run that exists keeps what is not given, and refuses (ValueError) a
    difference that would make it another run. max_minutes: save and stop after so long. for_minutes: a new run
    sets its length to fit. backup: a second folder (on Drive) for copies, from which it also continues. Stopping
    (Ctrl-C, the stop button, leaving the loop) saves first. FloatingPointError if a loss is not finite;
    BlockingIOError if another process trains this run; OSError if two checkpoints do not fit on the disk.
    Where several processes train together (the command `train` under torchrun), only the first yields anything.
    """
    folder = Path(folder)
    if _rank():
        _follow(store)
        return
    _check_mounted(folder)
    key, new = folder.resolve(), not folder.exists()
    run, stack = _LOOPS.get(key, (None, None))
    if run and run.between:  # a cell was stopped while it showed something: its loop is over, but still in memory
        run.between = folder.exists()  # if it was deleted, there is nothing to save into
        stack.close()
    del run, stack
    with contextlib.ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        stack.callback(lambda: new and folder.exists() and not any(folder.iterdir()) and folder.rmdir())
        stack.enter_context(_locked(folder))
        stack.push(_dismiss)
        run, notes = _begin(folder, store, preset, changes or {}, Path(backup) if backup else None, max_minutes, for_minutes)
        stack.callback(run.end)
        _LOOPS[key] = run, stack
        stack.callback(_LOOPS.pop, key)
        atexit.register(stack.close)  # while there still are threads and modules
        stack.callback(atexit.unregister, stack.close)
        while True:
            with _interrupts_held() as held:
                progress = run.advance(held)
            if held:
                raise KeyboardInterrupt(f"stopped at update {progress.step} of {progress.total}; saved, run again to continue")
            progress.notes, notes = notes, []
            yield progress
            if progress.done:
                return
            if not run.between:
                raise ValueError(f"{folder} is trained by a newer call of train()")


def longer(store: FaceStore, folder: str | Path, minutes: float, backup: str | Path | None = None) -> dict:
    """Changes, for `train`, with which the run in `folder` (or in its backup), if it is finished, trains on for so many
    `minutes`, by timing some adversarial updates: to be `steps` long in all, the learning rate rising to what a cosine of that
    length has there. One that is not finished keeps its length; a new one has none yet."""
    config, saved, *_ = _look_up(Path(folder), store, None, {}, Path(backup) if backup else None, None)
    if not saved:
        return {}
    if saved["update"] < config.total_steps:
        return {"steps": config.steps, "decay_steps": config.decay_steps}
    seconds = _seconds_per_update(replace(config, pretrain_steps=0, steps=1), store, pick_device())[1]
    steps = config.steps + math.ceil(minutes * 60 * _UPDATING / max(seconds, 1e-9))
    return {"steps": steps, "decay_steps": steps}


_COLAB_HOURS = 12  # after which Colab ends a session of those who do not pay


def _time_warning(seconds: float, minutes: float | None, backup: Path | None) -> str:
    """What there is to say of a run that needs `seconds` more, if that is more than there are; else nothing."""
    hours = _COLAB_HOURS * 3600 if in_colab() else math.inf
    if minutes and seconds > minutes * 60:
        return (f"WARNING: {_duration(minutes * 60)} do not suffice: it will save and stop after about "
                f"{100 * minutes * 60 / seconds:.0f} % of that; train again to continue, or choose fewer epochs")
    if seconds > hours:
        return (f"WARNING: Colab ends a session after {_COLAB_HOURS} h at most: " +
                ("run the notebook again then, and it continues" if backup else "without a backup on Drive all is lost then"))
    return ""


def forecast(store: FaceStore, folder: str | Path, preset: str | None = None, changes: dict | None = None, *,
             backup: str | Path | None = None, max_minutes: float | None = None, for_minutes: float | None = None) -> str:
    """What `train` with the same arguments will do and cost, from timing a few updates, and warnings: where the time given,
    Colab's session or the disks do not suffice. Writes nothing; raises what `train` raises for a run that it refuses.
    """
    folder, backup = Path(folder), Path(backup) if backup else None
    config, saved, new, _ = _look_up(folder, store, preset, changes or {}, backup, None)
    done, total = saved["update"] if saved else 0, config.total_steps
    lines = [f"continues at update {done:,} of {total:,}" if saved else "starts a new run"]
    if saved and done >= total:
        return f"finished: all {total:,} updates are done; more minutes, or more steps, train on"
    if new and for_minutes:
        lines[0] += f" of {_duration(for_minutes * 60)}; its length is set by timing the first updates"
        seconds = for_minutes * 60
    else:
        pretrain, adversarial = _seconds_per_update(config, store, pick_device())
        before = max(0, config.pretrain_steps - done)
        seconds = (before * pretrain + (total - max(done, config.pretrain_steps)) * adversarial) / _UPDATING
        device = environment()["device"]
        lines[0] += f"{f': {total:,} updates' * (not saved)}, about {_duration(seconds)} on this {device.replace('cpu', 'CPU')}"
    lines.append(f"2 checkpoints of {_size(_checkpoint_bytes(config))} here{' and on Drive' * bool(backup)}")
    lines.append(_time_warning(seconds, max_minutes, backup))
    for place in filter(None, (folder, backup)):
        try:
            _check_run_space(place, config)
        except OSError as error:
            lines.append(f"WARNING: {error}")
    return "\n".join(filter(None, lines))


# --- The report, reproduced

_FIRST_BATCHES = 10  # after which the report showed its first panels


def _report_stages(config: Config, faces: int) -> dict[str, int]:
    """After how many updates the report looked at its faces: the first batches, then each epoch."""
    total, epoch = config.for_faces(faces).steps, math.ceil(faces / config.batch_size)
    ends = [*range(epoch, total, epoch), total]
    first = {f"{_FIRST_BATCHES} batches": _FIRST_BATCHES} if ends[0] > _FIRST_BATCHES else {}
    return first | {f"epoch {end // epoch}" if end % epoch == 0 else f"{end} batches": end for end in ends}


def minutes_until(run: Path, update: int) -> float:
    """How long the run in `run` had trained when it had done `update` updates."""
    with open(run / "history.csv", newline="", encoding="utf-8") as file:
        return next(float(row["seconds"]) / 60 for row in csv.DictReader(file) if int(row["step"]) == update)


def _write_reproduction(folder: Path, store: FaceStore, config: Config, kept: dict[str, tuple[Path, float]]) -> None:
    """stages.png and stages.json: the networks whose files and minutes `kept` has, on test faces in the view of `config`."""
    networks, table, test = {}, [], store.indices("test")
    for name, (path, minutes) in kept.items():
        networks[name], _, about = load_generator(path)
        rows = evaluate(networks[name].to(pick_device()), config, store, test[:200])
        table.append({"stage": name, "update": about["update"], "minutes": round(minutes, 2)}
                     | summarise(rows, config, "test"))
    notes = {"imagenet": "", "random": "report: VGG19 with random weights, not ImageNet's, so this is not quite the report"}
    note = notes.get(config.vgg, f"report: VGG19 weights from {config.vgg}")
    if config.content != "vgg":
        note = f"report: content={config.content} in place of VGG19, so this is not the report"
    _write_atomically(folder / "stages.json", (json.dumps({"note": note, "stages": table}, indent=1) + "\n").encode())
    stages_figure(networks, config, store.faces(test[:2]), note).savefig(folder / "stages.png", dpi=100)


def reproduce_report(store: FaceStore, folder: str | Path, changes: dict | None = None) -> Iterator[Progress]:
    """Train the preset `report` with `changes` (scale, epochs, vgg, ...), then `sharp` in the report's view for as long;
    yields what `train` does.

    In `folder`: the runs, the report's generators after the first 10 batches and after each epoch, and at the end
    `stages.png` (see `stages_figure`) and `stages.json` (means over up to 200 test faces; see `stages_table`). Stopped, it
    continues; more epochs lengthen it.
    """
    folder, kept = Path(folder), {}
    config = Config.preset("report", **(changes or {}))
    stages = _report_stages(config, len(store.indices("train")))
    fixed = {name: value for name, value in (changes or {}).items() if name != "epochs"}
    for name, steps in stages.items():
        path = folder / f"report-{steps:06}.safetensors"
        if not path.exists() or steps == max(stages.values()):  # the last one checks that it is the same run
            yield from train(store, folder / "report", "report", fixed | {"steps": steps})
        if not path.exists():
            shutil.copyfile(folder / "report" / "generator.safetensors", path)
        kept[f"report, {name}"] = path, minutes_until(folder / "report", steps)
    run, view = folder / f"sharp-{steps:06}", {"scale": config.scale, "crop": config.crop, "hr_size": config.hr_size}
    for event in train(store, run, "sharp", view, for_minutes=kept[f"report, {name}"][1]):
        yield event
    kept["sharp"] = run / "generator.safetensors", minutes_until(run, event.total)
    _write_reproduction(folder, store, config, kept)


def stages_table(folder: str | Path) -> str:
    """What `reproduce_report` left in `folder`, as a table for people."""
    found = json.loads((Path(folder) / "stages.json").read_text(encoding="utf-8"))
    last = found["stages"][-1]
    lines = [f"{last['images']} test faces at {last['scale']}x, {last['crop']} -> {last['hr_size']} px. {found['note']}".rstrip(),
             f"{'':18}{'updates':>8}{'minutes':>9}{'PSNR RGB':>10}{'SSIM RGB':>10}{'sharpness':>11}{'checkerboard':>14}"]
    rows = [("bicubic", "", "", last["bicubic"])]
    rows += [(each["stage"], each["update"], f"{each['minutes']:.1f}", each["srgan"]) for each in found["stages"]]
    columns = (("psnr_rgb", 10, 2), ("ssim_rgb", 10, 3), ("sharpness", 11, 3), ("checkerboard", 14, 3))
    for name, update, minutes, scores in [*rows, ("HR", "", "", last["hr"])]:
        cells = [(scores.get(metric), width, digits) for metric, width, digits in columns]
        lines.append(f"{name:18}{update:>8}{minutes:>9}" + "".join(
            " " * width if value is None else f"{value:{width}.{digits}f}" for value, width, digits in cells))
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# 13. Notebook aids
# -----------------------------------------------------------------------------


def show_source(*objects) -> None:
    """Display the source of classes or functions of this module, highlighted."""
    import inspect

    from IPython.display import HTML, Markdown, display

    display(HTML("<style>.jp-RenderedMarkdown pre {word-break: normal !important}</style>"))  # JupyterLab breaks within words
    for each in objects:
        display(Markdown(f"```python\n{inspect.getsource(each)}```"))


@torch.no_grad()
def shape_walk(model: nn.Module, x: Tensor) -> str:
    """One line per direct child of `model`, in the order it ran on `x`: name, shape in -> out, parameters."""
    rows, hooks, was_training = [], [], model.training
    for name, child in model.named_children():
        parts = list(child.named_children()) if isinstance(child, nn.ModuleList) else [("", child)]
        for number, part in parts:
            def note(module, inputs, output, label=f"{name}[{number}]" if number else name):
                before, after = tuple(inputs[0].shape), tuple(output.shape)
                rows.append(f"{label:<12}{before!s:>22} -> {after!s:<22}{count_parameters(module):>12,}")
            hooks.append(part.register_forward_hook(note))
    try:
        model.eval()(x)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return "\n".join(rows)


def progress_bar(events: Iterator[Progress]) -> Iterator[Progress]:
    """Pass on what `train` yields, with a text bar that shows stage, losses, images per second and time left."""
    with contextlib.closing(events), _bar(unit="update", dynamic_ncols=True,
                                          bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}") as bar:
        for event in events:
            for note in event.notes:
                bar.write(note, file=bar.fp)
            bar.total, bar.n = event.total, event.step
            minutes, seconds = divmod(round(max(0.0, event.seconds_left)), 60)
            bar.set_description_str(event.stage, refresh=False)
            losses = ", ".join(f"{name} {value:.3g}" for name, value in event.losses.items() if name in ("pixel", "d_loss"))
            backup = f", backup: {event.backup}" if event.backup else ""
            bar.set_postfix_str(f"[{event.images_per_second:.0f} img/s, {minutes}:{seconds:02d} left, {losses}{backup}]")
            yield event


def _handle_clicks() -> None:
    """Let widgets answer what was clicked while this cell has kept the kernel busy; other messages wait for its end, in order.

    ipykernel 6 (Colab's) has a stream of all messages, 7 one to its main thread. Where a kernel has neither, or its front end
    sends nothing meanwhile (VS Code's), a click is answered when the cell ends.
    """
    kernel = _kernel()
    try:
        channel = getattr(kernel, "shell_channel_thread", None)
        stream = channel.manager._shell_channel_to_main.to_stream if channel else kernel.shell_stream
        usual = stream._recv_callback
    except AttributeError:
        return

    def sort(frames):
        _, parts = kernel.session.feed_identities(frames, copy=False)
        if json.loads(bytes(parts[1]))["msg_type"] != "comm_msg":
            return usual(frames)
        kernel.comm_manager.comm_msg(stream, None, kernel.session.deserialize(parts, copy=False))

    stream.on_recv(sort, copy=False)
    try:
        stream.flush(1)  # zmq.POLLIN
    finally:
        stream.on_recv(usual, copy=False)


class Dashboard:
    """A run in training as a panel that is redrawn in place: `for event in Dashboard(run).watch(train(...))`.

    A progress line, a button that saves and ends, the age of checkpoint and backup, loss curves, the newest sample strip.
    It is of widgets where there are ipywidgets, else without the button. At the end it turns into a picture of its last state,
    which stays in the notebook.
    """

    def __init__(self, folder: str | Path):
        self.folder, self.stopping = Path(folder), False
        self._html = dict.fromkeys(("note", "progress", "kept", "curves", "strip"), "")
        self._text = "training begins"
        self._widgets, self._button, self._box, self._handle = {}, None, None, None
        self._due = self._curves_due = 0.0

    def stop(self, *_) -> None:
        """What the button does: `watch` ends, and the run is saved, when the update under way is whole."""
        self.stopping = True
        if self._button:
            self._button.disabled = True

    def watch(self, events: Iterator[Progress]) -> Iterator[Progress]:
        """Pass on what `train` yields and show it, until it ends or the button is pressed, which saves."""
        event = None
        self._open()
        try:
            with contextlib.closing(events):
                for event in events:
                    self.show(event)
                    yield event
                    _handle_clicks()
                    if self.stopping:
                        self._say("Stopping: the run is being saved.")
                        self._refresh()
                        break
        finally:
            self._close(event)

    def show(self, event: Progress) -> None:
        """Bring the panel up to date: at most once a second, the curves for at most a twentieth of the time."""
        now, text = time.perf_counter(), html.escape
        if event.notes:
            self._html["note"] = f"<div>{text('; '.join(event.notes))}</div>"
        sample = event.sample or max((self.folder / "samples").glob("*.png"), default=None)
        if sample and (event.sample or not self._html["strip"]):
            alt = f"samples of {sample.stem}, a row for each face: LR, bicubic, the network's output, HR"
            self._html["strip"] = _picture(sample.read_bytes(), alt)
        if event.sample or now > self._curves_due:
            self._draw_curves(event.step)
            self._curves_due = time.perf_counter() + max(5, 20 * (time.perf_counter() - now))
        losses = "".join(f", {name} {value:.3g}" for name, value in event.losses.items() if name in ("pixel", "d_loss"))
        self._say(f"{event.stage}: update {event.step:,} of {event.total:,}, {event.images_per_second:.0f} img/s, "
                  f"{_duration(event.seconds_left)} left{losses}", "timer")  # which is not read out each second
        self._html["progress"] += (f'<progress value="{event.step}" max="{event.total}" aria-label="updates done" '
                                   'style="width: 100%"></progress>')
        backup = f"; backup: {event.backup}" if event.backup else "; no backup"
        self._html["kept"] = f"<div>checkpoint: {text(event.checkpoint + backup)}</div>"
        if now > self._due or event.sample or event.done:
            self._refresh()

    def _draw_curves(self, update: int) -> None:
        if (self.folder / "history.csv").exists():
            figure = history_figure(self.folder / "history.csv")
            self._html["curves"] = _picture(_png(figure), f"loss curves up to update {update}")

    def _say(self, text: str, role: str = "status") -> None:
        self._text, self._html["progress"] = text, f'<div role="{role}">{html.escape(text)}</div>'

    def _open(self) -> None:
        from IPython.display import display

        bundle = {"text/plain": self._text}
        try:
            import ipywidgets
        except ImportError:
            pass
        else:
            self._button = ipywidgets.Button(description="Stop and save", icon="stop", tooltip="saves, then ends this cell")
            self._button.on_click(self.stop)
            self._widgets = {name: ipywidgets.HTML() for name in self._html}
            first, *others = self._widgets.values()
            self._box = ipywidgets.VBox([first, self._button, *others])
            bundle["application/vnd.jupyter.widget-view+json"] = {  # display(box) has no handle in ipywidgets 7
                "version_major": 2, "version_minor": 0, "model_id": self._box.model_id}
        self._handle = display(bundle, raw=True, display_id=True)

    def _refresh(self) -> None:
        self._due = time.perf_counter() + (1 if self._widgets else 5)  # without widgets, the pictures travel each time
        for name, widget in self._widgets.items():
            widget.value = self._html[name]  # which sends only what has changed
        if not self._widgets:
            self._freeze()

    def _freeze(self) -> None:
        """Show the last state as plain HTML."""
        if self._handle:  # a script has none
            self._handle.update({"text/html": "".join(self._html.values()), "text/plain": self._text}, raw=True)

    def _close(self, event: Progress | None) -> None:
        """Say how it ended, which the newest checkpoint tells, in a picture that needs no kernel."""
        kept = max((self.folder / "ckpt").glob("update-*.pt"), default=None)
        if event and kept:
            update = int(kept.stem.removeprefix("update-"))
            ended, saved = update >= event.total, f"saved at {time.strftime('%H:%M', time.localtime(kept.stat().st_mtime))}"
            self._say(f"Finished: {update:,} updates, {saved}." if ended else
                      f"Stopped at update {update:,} of {event.total:,}, {saved}. Run this cell again to continue.")
            self._html["kept"] = ""
            self._draw_curves(update)
        elif event:
            self._html["kept"] = ""
            self._say("Nothing was saved: it ended before the first checkpoint.")
        else:
            self._text = "nothing was trained"
        self._freeze()
        for widget in filter(None, (self._box, self._button, *self._widgets.values())):
            for each in (widget, widget.layout, getattr(widget, "style", None)):
                if each is not None:
                    each.close()


def export_zip(folder: str | Path) -> Path:
    """Pack what one keeps of the run in `folder` into a zip there, and return it: the networks, panels.png and metrics if they
    were made, losses, config. FileNotFoundError if nothing is trained yet."""
    folder = Path(folder)
    names = ("generator.safetensors", "pretrained.safetensors", "panels.png", "metrics.json", "metrics.csv", "history.csv",
             "config.json")
    if not (folder / names[0]).exists():
        raise FileNotFoundError(f"{folder} has no generator yet: train first")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            if (folder / name).exists():
                archive.write(folder / name, name)
    target = folder / f"{folder.name}.zip"
    _write_atomically(target, packed.getvalue())
    return target


def export_button(folder: str | Path) -> None:
    """Display a button that makes the zip of `export_zip` and hands it over: Colab's download there, elsewhere a link.
    Without ipywidgets, the link."""
    from IPython.display import HTML, FileLink, display

    try:
        import ipywidgets
    except ImportError:
        display(FileLink(os.path.relpath(export_zip(folder))))
        return
    button, said = ipywidgets.Button(description="Export as zip", icon="download"), ipywidgets.HTML()

    def export(_):
        said.value = "packing ..."
        try:
            path = export_zip(folder)
            if in_colab():
                from google.colab import files

                files.download(str(path))
            else:
                link.update(FileLink(os.path.relpath(path)))
            with zipfile.ZipFile(path) as archive:
                said.value = html.escape(f"{path.name}, {_size(path.stat().st_size)}: {', '.join(archive.namelist())}")
        except Exception as error:  # Colab's are of no common kind; elsewhere nobody would read it
            said.value = html.escape(_one_line(error))

    button.on_click(export)
    display(ipywidgets.VBox([button, said]))
    link = display(HTML(""), display_id=True)  # no Output widget, which Notebook 6 with widgetsnbextension 3.6.10 cannot make


def uploaded_files(widget) -> list[tuple[str, bytes]]:
    """Name and bytes of each file in an ipywidgets FileUpload, of ipywidgets 7 (a dict) or 8 (a tuple)."""
    value = widget.value
    items = value.items() if isinstance(value, dict) else ((each["name"], each) for each in value)
    return [(name, bytes(each["content"])) for name, each in items]


def upload_images(folder: str | Path):
    """Have the user choose images for `folder`: Colab's own dialog there, elsewhere a FileUpload widget that saves
    what is chosen. Returns the widget, or None in Colab, where this returns when the files are there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if in_colab():
        from google.colab import files

        for name, data in files.upload().items():
            target = folder / Path(name).name
            target.write_bytes(data)
            if Path(name).resolve() != target.resolve():
                Path(name).unlink(missing_ok=True)  # Colab has put a copy into the current folder
        return None
    import ipywidgets

    widget = ipywidgets.FileUpload(accept="image/*", multiple=True, description="Choose photos", layout={"width": "auto"})

    def save(_):
        for name, data in uploaded_files(widget):
            (folder / Path(name.replace("\\", "/")).name).write_bytes(data)

    widget.observe(save, names="value")
    return widget


def _tile(image, caption: str) -> str:
    """One picture of a contact sheet as HTML: a Pillow image, or a frame where there is None to show, and its caption."""
    if image is None:
        shown = '<div style="height: 6em; box-sizing: border-box; border: 1px dashed; padding: 2em 0.3em 0">cannot be shown</div>'
    else:
        image.thumbnail((128, 128))
        shown = _img(_encoded(image), caption, "width: 100%; height: 6em; object-fit: contain")
    return (f'<figure style="margin: 0; width: 8em; overflow-wrap: anywhere">{shown}'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>")


def contact_sheet(store: FaceStore, left_out: bool = False, count: int = 24):
    """`count` faces of `store`, spread evenly over their names, with name and part of the split, for display in a notebook.

    left_out: what was left out instead, each with the reason, and with its picture where the source is still there and it
    can be decoded.
    """
    from IPython.display import HTML
    from PIL import Image

    total = len(store.left_out) if left_out else len(store)
    if not total:
        return HTML("<p>Nothing was left out.</p>")
    tiles, count = [], min(count, total)
    if left_out:
        read = None
        with contextlib.suppress(OSError, ValueError):
            if Path(store.source).exists():  # or it would be downloaded
                read = open_source(store.source).read
        for name, why in store.left_out[:count]:
            try:
                image = _on_white(read(name))
            except Exception:  # decoders and zipfile raise all kinds on damage
                image = None
            tiles.append(_tile(image, _one_line(f"{name[:80]}: {why}")))
    else:
        chosen = [i * total // count for i in range(count)]
        for index, pixels in zip(chosen, store.faces(chosen).permute(0, 2, 3, 1).numpy()):
            enlarged = ", enlarged" * (store.names[index] in store.enlarged)
            caption = f"{store.names[index][:80]}, {_SPLITS[store.split[index]]}{enlarged}"
            tiles.append(_tile(Image.fromarray(pixels), _one_line(caption)))
    title = f"{total:,} {'left out' if left_out else 'accepted'}{f', {count} of them shown' * (count < total)}"
    return HTML(f'<p>{title}</p><div style="display: flex; flex-wrap: wrap; gap: 0.8em">{"".join(tiles)}</div>')


# --- The upscale factor by hand


def _controls(faces: int, upload) -> dict:
    """The widgets of `Explorer` by their labels; `upload` is the one that chooses a photo."""
    import ipywidgets

    style = {"description_width": "initial"}
    slider = {"continuous_update": False, "style": style, "layout": {"width": "26em", "max_width": "98%"}}

    def choice(*options):
        return ipywidgets.ToggleButtons(options=options, style=style | {"button_width": "auto"})

    def level(value, least, most, step):
        return ipywidgets.FloatSlider(value=value, min=least, max=most, step=step, **slider)

    controls = {
        "Upscale factor": choice(*((f"{scale}x", scale) for scale in _FACTORS)),
        "Network": ipywidgets.Dropdown(style=style, layout={"width": "30em", "max_width": "98%"}),
        "Picture": choice("Test face", "Your photo"), "Face": ipywidgets.IntSlider(max=max(1, faces - 1), **slider),
        "Previous face": ipywidgets.Button(), "Next face": ipywidgets.Button(),
        "Mode": choice("Test it", "Enlarge it"), "Choose a photo": upload, "Any factor": level(4, 1, 16, 0.1),
        "Crop left": ipywidgets.IntSlider(**slider), "Crop top": ipywidgets.IntSlider(**slider),
        "Crop size": ipywidgets.IntSlider(min=1, **slider),
        "Reduce crop to": ipywidgets.IntSlider(value=176, min=32, max=1024, step=8, **slider),
        "Faithful to sharp": level(1, 0, 1, 0.05), "Zoom left": level(0.35, 0, 1, 0.05), "Zoom top": level(0.35, 0, 1, 0.05),
        "Before/after": choice("bicubic | SRGAN", "SRGAN | HR"),
        "Save figure": ipywidgets.Button(), "Compare all factors": ipywidgets.Button(),
    }
    for label, control in controls.items():
        control.description = label
    return controls


# ipywidgets draws names and values of its sliders and choices, but does not tell them to screen readers. `onload` does, and
# whenever something in the panel changes; the status is announced, since the element that holds it stays.
_TOLD = """<style onload="const panel = this.closest('.srgan-explorer');
const tell = (each, role, name) => { if (each) { each.role = role; each.ariaLabel = name } };
const all = () => { for (const label of panel.querySelectorAll('.widget-label')) {
    const control = label.parentNode, name = label.textContent, value = control.querySelector('.widget-readout');
    const handle = control.querySelector('.noUi-handle, .ui-slider-handle');
    tell(handle, 'slider', name); tell(value, 'textbox', name + ', as a number');
    if (handle) handle.ariaValueText = handle.ariaValueNow = value.textContent;
    if (control.querySelector('button')) tell(control, 'group', name);
    for (const button of control.querySelectorAll('button')) button.ariaPressed = button.classList.contains('mod-active') }
    panel.querySelector('.srgan-status .widget-html-content').role = 'status' };
all(); new MutationObserver(all).observe(panel, {subtree: true, childList: true, characterData: true, attributeFilter: ['class']})
">.srgan-explorer {}</style>"""

_PANEL_LIMIT = 4096  # px of SR along a side: 200 MB for each panel

# A click in a picture: a hidden text field of the same panel takes what was clicked, and where (0 to 1)
_CLICK = """const box = this.getBoundingClientRect(), field = this.closest('.srgan-explorer').querySelector('.srgan-click input');
field.value = '{} ' + (event.clientX - box.left) / box.width + ' ' + (event.clientY - box.top) / box.height;
field.dispatchEvent(new Event('input', {{bubbles: true}})); field.dispatchEvent(new Event('change', {{bubbles: true}}))"""


def _framed(picture: str, kind: str, left: float, top: float, width: float, height: float) -> str:
    """An <img> with a frame upon it, in per cent, that reports clicks as `kind`."""
    return (f'<div style="position: relative; cursor: crosshair" onclick="{_CLICK.format(kind)}">{picture}<div style="position: '
            f"absolute; left: {left:.2f}%; top: {top:.2f}%; width: {width:.2f}%; height: {height:.2f}%; box-sizing: border-box; "
            'border: 2px solid white; outline: 1px solid black"></div></div>')


def _panels_html(panels: list[tuple], zoom: tuple[float, float]) -> str:
    """What `panels_figure` draws of one row, without matplotlib's half second, and to be clicked."""
    figures, style = [], "display: block; width: 100%; max-width: none; margin: 0"
    for title, image, caption in panels:
        whole = _img(_image_png(_fit(image, 512)), f"{title} {caption}".strip(), style)
        part = _img(_image_png(_fit(_part(image, zoom), 512)), f"{title}, a part", f"{style}; image-rendering: pixelated")
        figures.append(f'<figure style="margin: 0"><b>{title}</b>{_framed(whole, "zoom", 75 * zoom[0], 75 * zoom[1], 25, 25)}'
                       f'<figcaption>{caption or "&nbsp;"}</figcaption>{part}</figure>')
    return ('<div style="display: grid; grid-template-columns: repeat(auto-fit, minmax(min(11em, 45%), 1fr)); gap: 8px; '
            f'max-width: 72em; line-height: 1.5">{"".join(figures)}</div>')


def _unused_file(title: str) -> Path:
    """A file in the workspace for the picture `title`, numbered where one is there: nothing that was saved is written over."""
    name = re.sub(r"[^\w.]+", "-", title).strip("-.")
    files = (workspace() / f"{name}{number}.png" for number in itertools.chain([""], (f"-{i}" for i in itertools.count(2))))
    return next(file for file in files if not file.exists())


class Explorer:
    """The upscale factor by hand, for a notebook: display `panel`. Everything it shows, `factor_panels`, `panels_figure` and
    `before_after` make without widgets, too.

    store: whose test faces are shown. path: the network to begin with, for 2x, 4x or 8x. folders: where to look for others,
    as `find_generators`. `controls` are the widgets by label, `status` the line that says what is shown or what is wrong.
    """

    def __init__(self, store: FaceStore, path: str | Path, *folders: str | Path):
        import ipywidgets

        self._faces, self._store, self._folders = store.indices("test"), store, folders
        scale = load_generator(path)[1].scale
        self._weights = {each: find_generator(each, *folders) for each in _FACTORS} | {scale: Path(path)}
        self._photo, self._panels, self._busy, self._uploads = None, [], False, workspace() / "photos"
        self._newest, self._listed = self._newest_upload(), None
        if in_colab():
            upload = ipywidgets.Button(layout={"width": "auto"})
        else:
            upload = upload_images(self._uploads)
            upload.multiple = False
        self.controls = _controls(len(self._faces), upload)
        self.controls["Upscale factor"].value = scale
        self.status, self.photo, self.pictures, self.slider, self.sheet = (ipywidgets.HTML() for _ in range(5))
        self.clicked = ipywidgets.Text(layout={"display": "none"})
        self.clicked.add_class("srgan-click")
        for label, control in self.controls.items():
            if hasattr(control, "on_click"):
                control.on_click(self._callback(label))
            else:
                control.observe(self._callback(label), names="value")
        self.clicked.observe(self._callback("clicked"), names="value")
        self.panel = self._arranged()
        self._callback("Upscale factor")()

    def _arranged(self):
        import ipywidgets

        def row(*labels):
            return ipywidgets.HBox([self.controls[label] for label in labels], layout={"flex_flow": "row wrap"})

        panel = ipywidgets.VBox([
            row("Upscale factor", "Network"), row("Picture", "Face", "Previous face", "Next face", "Mode", "Choose a photo"),
            row("Any factor", "Reduce crop to"), row("Crop left", "Crop top", "Crop size"), self.photo,
            row("Faithful to sharp"), self.status, self.pictures, row("Zoom left", "Zoom top", "Before/after"), self.slider,
            row("Save figure", "Compare all factors"), self.sheet, self.clicked, ipywidgets.HTML(_TOLD)])
        self.status.add_class("srgan-status")
        panel.add_class("srgan-explorer")
        return panel

    def _say(self, text: str) -> None:
        self.status.value = f"<div>{html.escape(text)}</div>"

    def _callback(self, label: str) -> Callable:
        """What a change of this control calls. Its errors stand in the status line: elsewhere nobody would read them."""
        def call(_=None):
            if self._busy:  # a control that another one moves
                return
            self._busy = True
            try:
                self._changed(label)
            except Exception as error:
                kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
                self._say(kind + _one_line(error))
            finally:
                self._busy = False
            if not self._panels:
                self.pictures.value = self.slider.value = ""
        return call

    def _changed(self, label: str) -> None:
        controls = self.controls
        if label in ("Save figure", "Compare all factors"):
            return self._save() if label == "Save figure" else self._compare()
        if label == "clicked":
            label = self._click(*self.clicked.value.split())
            self.clicked.value = ""  # or a click at the same place would be no change
        elif label in ("Previous face", "Next face"):
            face = controls["Face"]
            face.value = (face.value + (1 if label == "Next face" else -1)) % len(self._faces)
        elif label == "Choose a photo":
            self._choose()
        elif label == "Upscale factor":
            controls["Any factor"].value = controls["Upscale factor"].value
        elif label == "Any factor":
            controls["Upscale factor"].value = next((each for each in _FACTORS if each >= controls[label].value), 8)
        elif label == "Network":
            self._weights[controls["Upscale factor"].value] = controls["Network"].value
        if label in ("Upscale factor", "Any factor"):
            self._list_networks()
        if label not in ("Zoom left", "Zoom top", "Before/after"):
            self._fit_controls()
            self._redraw()
        if self._panels:
            self._show()

    def _list_networks(self) -> None:
        scale, network, found = self.controls["Upscale factor"].value, self.controls["Network"], {}
        if scale == self._listed:  # reading them all takes a while, from Drive a long one
            return
        for path in filter(None, (self._weights[scale], *find_generators(scale, *self._folders))):
            found.setdefault(path.resolve(), path)
        network.options = [("shipped with the project" if path == _shipped_weights(scale) else
                            str(path).removesuffix(f"{os.sep}generator.safetensors"), path)
                           for path in found.values()] or [("none yet", None)]
        network.index = 0  # ipywidgets 8 would choose none
        self._weights[scale], self._listed = network.value, scale

    def _crop(self) -> tuple[int, int, int]:
        """left, top and side of the crop. A slider's bounds must differ, so it may go a pixel too far."""
        width, height = self._photo.size
        side = min(self.controls["Crop size"].value, width, height)
        return min(self.controls["Crop left"].value, width - side), min(self.controls["Crop top"].value, height - side), side

    def _fit_controls(self) -> None:
        """Show the controls that apply, within the bounds that apply."""
        controls = self.controls
        own = controls["Picture"].value == "Your photo"
        alone = own and controls["Mode"].value == "Enlarge it"
        shown = {"Face": not own, "Previous face": not own, "Next face": not own, "Mode": own, "Choose a photo": own,
                 "Any factor": alone}
        shown |= dict.fromkeys(("Crop left", "Crop top", "Crop size", "Reduce crop to"), own and self._photo is not None)
        for label, visible in shown.items():
            controls[label].layout.display = None if visible else "none"
        scale = controls["Upscale factor"].value
        networks = [self._weights[each] for each in ((8, 2) if alone and controls["Any factor"].value > 8 else (scale,))]
        controls["Faithful to sharp"].disabled = not all(network and find_parent(network) for network in networks)
        pairs = ("bicubic | SRGAN",) if alone else ("bicubic | SRGAN", "SRGAN | HR")
        if controls["Before/after"].options != pairs:
            controls["Before/after"].options = pairs
        self.photo.value = ""
        if own and self._photo is not None:
            (width, height), (left, top, side) = self._photo.size, self._crop()
            controls["Crop left"].max, controls["Crop top"].max = max(1, width - side), max(1, height - side)
            frame = (100 * left / width, 100 * top / height, 100 * side / width, 100 * side / height)
            self.photo.value = ('<div style="max-width: 320px">Click where the middle of the crop shall be:'
                                f'{_framed(self._preview, "crop", *frame)}</div>')

    def _newest_upload(self) -> tuple[int, Path] | None:
        return max(((each.stat().st_mtime_ns, each) for each in self._uploads.glob("*")), default=None)

    def _choose(self) -> None:
        if in_colab():
            upload_images(self._uploads)
        newest = self._newest_upload()
        if newest in (None, self._newest):  # Colab's dialog was cancelled
            raise ValueError("no photo was chosen")
        self._newest, path = newest, newest[1]
        try:
            self._photo = _on_white(_read_image(path))
        except ValueError as error:
            path.unlink()  # or it would be found as the newest one
            self._newest = self._newest_upload()
            raise ValueError(f"{path.name}: {error}{'; the photo before it stays' * (self._photo is not None)}") from None
        self._title = path.stem
        small = self._photo.copy()
        small.thumbnail((320, 320))
        self._preview = _img(_encoded(small), f"your photo, {path.name}", "display: block; width: 100%")
        controls, side = self.controls, min(self._photo.size)  # the largest square in the middle
        controls["Crop size"].max = max(2, side)
        controls["Crop size"].value = side
        for label, room in zip(("Crop left", "Crop top"), self._photo.size):
            controls[label].max = max(1, room - side)
            controls[label].value = (room - side) // 2

    def _click(self, kind: str, *place: str) -> str:
        """Move crop or part to where the user clicked; the label of a control that it has moved."""
        shares = [float(share) for share in place]
        if kind == "zoom":  # the part is a quarter wide
            for label, share in zip(("Zoom left", "Zoom top"), shares):
                self.controls[label].value = (share - 1 / 8) / (3 / 4)
            return "Zoom left"
        for label, share, room in zip(("Crop left", "Crop top"), shares, self._photo.size):
            self.controls[label].value = round(share * room - self.controls["Crop size"].value / 2)
        return "Crop left"

    def _picture(self) -> tuple[Tensor, float, bool, str]:
        """What is to be enlarged: an image, by which factor, whether it is the HR, and what it is called."""
        controls, scale = self.controls, self.controls["Upscale factor"].value
        if controls["Picture"].value == "Test face":
            number = controls["Face"].value % len(self._faces)
            network = controls["Network"].value
            config = blended_generator(network, scale)[1] if network else Config(scale=scale)  # the view it was trained in
            return make_pair(self._store.faces([int(self._faces[number])]), config)[1], scale, True, f"test face {number}"
        if self._photo is None:
            raise ValueError("choose a photo first, with the button above")
        left, top, side = self._crop()
        crop = _to_tensor(np.asarray(self._photo.crop((left, top, left + side, top + side))))
        is_hr, most = controls["Mode"].value == "Test it", controls["Reduce crop to"].value
        title = f"{self._title}, {side} px" + f" reduced to {most}" * (side > most)
        return _fit(crop, most), scale if is_hr else controls["Any factor"].value, is_hr, title

    def _amount(self) -> float:
        return 1.0 if self.controls["Faithful to sharp"].disabled else self.controls["Faithful to sharp"].value

    def _bounded(self, side: int, times: int) -> int:
        if side * times > _PANEL_LIMIT:
            raise ValueError(f"{side} px would become {side * times} px, and {_PANEL_LIMIT} are the most here: crop or reduce "
                             "more, or use python srgan_utils.py upscale, which writes any size to a file")
        return side * times

    def _redraw(self) -> None:
        began, self._panels, self.sheet.value = time.monotonic(), [], ""
        picture, factor, is_hr, title = self._picture()
        largest = self._bounded(picture.shape[-1], 1 if is_hr else 16 if factor > 8 else self.controls["Upscale factor"].value)

        def progress(share):
            if share < 1:
                self._say(f"enlarging: {share:.0%}")

        if largest > _TILE:  # the pictures of before would seem to be the new ones
            self.pictures.value = self.slider.value = ""
            self._say(f"enlarging to {largest} px ...")
        self._panels, note = factor_panels(picture, factor, is_hr, self._weights, self._amount(), progress)
        self._label = f"{factor:g}x{self._made_by()}"
        self._shown = f"{title} {self._label}"
        twice = " (two in a row: the second invents upon what the first invented)" if factor > 8 else ""
        self._say(f"{title}, {'shrunk, then ' if is_hr else ''}enlarged {factor:g}x by the {note}{twice}; "
                  f"{time.monotonic() - began:.2f} s")

    def _made_by(self) -> str:
        """What to add to the name of a picture that the shipped network, as it is, did not make."""
        network, amount = self.controls["Network"].value, self._amount()
        shipped = network in (None, _shipped_weights(self.controls["Upscale factor"].value))
        return ("" if shipped else f" by {Path(network).parent.name}") + f" blend {amount:g}" * (amount < 1)

    def _zoom(self) -> tuple[float, float]:
        return self.controls["Zoom left"].value, self.controls["Zoom top"].value

    def _show(self) -> None:
        self.pictures.value = _panels_html(self._panels, self._zoom())
        pair = self.controls["Before/after"].value
        left, right = self._panels[1:3] if pair == "bicubic | SRGAN" else self._panels[2:4]
        self.slider.value = before_after(left[1], right[1], tuple(pair.split(" | ")), self._shown).data

    def _save(self) -> None:
        if not self._panels:
            raise ValueError("there is no figure to save yet")
        saved = [_unused_file(self._shown)]
        panels_figure({self._label: self._panels}, self._zoom()).savefig(saved[0], dpi=120)
        if len(self._panels) == 3:
            saved.append(saved[0].with_stem(f"{saved[0].stem}-enlarged"))
            save_image(self._panels[2][1], saved[1])
        self._say(f"saved: {' and '.join(map(str, saved))}")

    def _compare(self) -> None:
        picture, _, is_hr, title = self._picture()
        self._bounded(picture.shape[-1], 1 if is_hr else max(_FACTORS))
        rows, missing = {}, []
        for scale in _FACTORS:
            self._say(f"comparing all factors: {scale}x ...")
            network, amount = self._weights[scale], self._amount()
            if amount < 1 and network and not find_parent(network):
                amount, missing = 1.0, [*missing, f"{scale}x: sharp, since no faithful network is kept beside it"]
            try:
                rows[f"{scale}x"] = factor_panels(picture, scale, is_hr, self._weights, amount)[0]
            except (FileNotFoundError, ValueError) as error:  # no network; too few px for this factor
                missing.append(f"{scale}x: {_one_line(error)}")
        if rows:
            figure, path = panels_figure(rows, self._zoom()), _unused_file(f"{title} all factors{self._made_by()}")
            figure.savefig(path, dpi=100)
            self.sheet.value = figure._repr_html_()
            missing.insert(0, f"all factors, saved: {path}")
        self._say("; ".join(missing))


# -----------------------------------------------------------------------------
# 14. Command line: `python srgan_utils.py COMMAND`
# -----------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}; see `python {self.prog} --help`")


def _number(name: str, text: str | None, kind=float, least=0.0):
    """`text` as a number above `least`, or None; ValueError otherwise."""
    if text is None:
        return None
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not least < value < math.inf:
        raise ValueError(f"--{name} {text}: give a {'whole ' if kind is int else ''}number above {least:g}")
    return value


def _given(args: argparse.Namespace) -> dict:
    """The fields that --scale and --set name, with their values."""
    changes = {}
    for text in itertools.chain.from_iterable(args.set or []):
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text}: write FIELD=VALUE")
        changes[name] = _parsed(value)
    if getattr(args, "scale", None) is not None:
        changes["scale"] = _parsed(args.scale)
    return changes


def _writable(folder: Path) -> Path:
    """`folder`, made if need be and seen to take a file; OSError otherwise, before hours of work."""
    _check_mounted(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write into {folder} ({error.strerror or error}): name another folder") from None
    return folder


def _chosen_weights(args: argparse.Namespace, scale: int | None) -> Path:
    """The file that --run, --weights or --scale (the shipped weights) names."""
    if args.run and args.weights:
        raise ValueError("give --run or --weights, not both")
    if args.run:
        path = Path(args.run) / "generator.safetensors"
        if not path.exists():
            raise FileNotFoundError(f"{args.run} holds no generator.safetensors: train it first, or name another run")
        return path
    if args.weights:
        return Path(args.weights)
    path = _shipped_weights(scale or 4)
    if not path.exists():
        raise FileNotFoundError(f"there are no shipped weights for {scale or 4}x: train a run and give --run DIR, or give "
                                f"--weights FILE{'' if scale in _FACTORS else ' (the project brings 2, 4 and 8)'}")
    return path


def _chosen_generator(args: argparse.Namespace) -> tuple[Generator, Config, str]:
    """The generator that the options name, as sharp as --blend says, and where it came from."""
    scale = None if args.scale is None else _checked("scale", "int", _parsed(args.scale))
    path, amount = _chosen_weights(args, scale), 1 if args.blend is None else _parsed(args.blend)
    if type(amount) not in (int, float) or not 0 <= amount <= 1:
        raise ValueError(f"--blend {args.blend}: give a number from 0 (faithful) to 1 (sharp)")
    blended = "" if args.blend is None else f" (--blend {args.blend})"
    return *blended_generator(path, scale, amount), f"{path}{blended}"


def _prepare_command(args: argparse.Namespace) -> None:
    limit, folder = _number("limit", args.limit, int), _writable(Path(args.store))
    try:
        store = prepare(args.source, folder, limit)
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()
    print(f"{store.folder}: {store.describe()}")
    for name, why in store.left_out[:20]:
        print(f"  {_one_line(f'left out {name}: {why}')}")
    if len(store.left_out) > 20:
        print(f"  ... and {len(store.left_out) - 20} more, all in {store.folder / 'store.json'}")


def _train_command(args: argparse.Namespace) -> None:
    limits = {name: _number(name.replace("_", "-"), getattr(args, name)) for name in ("max_minutes", "for_minutes")}
    if all(limits.values()):
        raise ValueError("give --max-minutes or --for-minutes, not both")
    changes = _given(args)
    store, folder = FaceStore(args.store), Path(args.run)
    if not (folder / "config.json").exists():
        # what is wrong with the options is said before a folder is made
        Config.preset("sharp" if args.preset is None else args.preset, **changes)
    with _process_group():
        events = train(store, folder, args.preset, changes, backup=args.backup, **limits)
        if _rank():
            next(events, None)  # which comes at the end: the first process reports
            return
        for place in filter(None, (args.backup, folder)):
            _writable(Path(place))
        for event in progress_bar(events):
            pass
    stopped = f"stopped at update {event.step} of {event.total}, run it again to continue"
    print(f"{folder}: {stopped if event.step < event.total else 'finished'}; generator.safetensors is the network to use")


def _compare_command(args: argparse.Namespace) -> None:
    view, count = _given(argparse.Namespace(set=args.set)), _number("count", args.count, int)
    if set(view) - {"crop", "hr_size"}:
        raise ValueError(f"compare can set crop and hr_size, not {', '.join(sorted(set(view) - {'crop', 'hr_size'}))}")
    if args.split not in ("test", "all"):
        raise ValueError(f"--split {args.split}: {_suggest(args.split, ['test', 'all'])}")
    store = FaceStore(args.store)
    generator, config, path = _chosen_generator(args)
    folder = _writable(Path(args.out))
    print(f"weights: {path}")
    view_config = replace(config, **view)
    print(results_table(write_comparison(store, generator, view_config, folder, args.split, count, args.lpips, args.errors)))
    files = "panels.png, scores.png, metrics.csv and metrics.json"
    if args.run and (Path(args.run) / "history.csv").exists():
        history_figure(Path(args.run) / "history.csv").savefig(folder / "curves.png", dpi=100)
        files = f"curves.png, {files}"
    print(f"in {folder}: {files}")


def _upscale_file(path: Path, target: Path, generator: Generator, config: Config) -> None:
    """One photo, transparency kept (enlarged by the plain bicubic)."""
    from PIL import Image

    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name the images in it, {path / '*.jpg'} say")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        image = _read_image(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    result = Image.new("RGB", (image.width * config.scale, image.height * config.scale))
    lr = _to_tensor(np.asarray(image.convert("RGB")))
    with torch.no_grad():
        for y, x, pixels in _tiles(lr, generator, config, None, progress=True):  # no array as large as the result
            result.paste(Image.fromarray(pixels), (x, y))
    if image.mode == "RGBA":
        result.putalpha(image.getchannel("A").resize(result.size, Image.BICUBIC))
    result.save(target)


def _upscale_command(args: argparse.Namespace) -> None:
    generator, config, weights = _chosen_generator(args)
    folder = _writable(Path(args.out))
    targets = {}
    for path in map(Path, args.images):
        target = folder / f"{path.stem}-x{config.scale}.png"
        if target in targets:
            raise ValueError(f"{path} and {targets[target]} would both become {target}: give them to two commands")
        targets[target] = path
    print(f"weights: {weights}")
    failed = []
    for target, path in targets.items():
        try:
            _upscale_file(path, target, generator, config)
            print(target)
        except (ValueError, OSError) as error:
            failed.append(_one_line(error))
    if failed:
        raise ValueError(f"{len(failed)} of {len(targets)} images could not be enlarged: {'; '.join(failed)}")


def _report_command(args: argparse.Namespace) -> None:
    scales = [_checked("scale", "int", _parsed(text)) for text in args.scales]
    changes, store, folder = _given(args), FaceStore(args.store), _writable(Path(args.out))
    if args.epochs is not None:
        changes["epochs"] = _number("epochs", args.epochs)
    for scale in scales:
        place = folder / f"x{scale}"
        for _ in progress_bar(reproduce_report(store, place, changes | {"scale": scale})):
            pass
        print(f"{stages_table(place)}\n{place / 'stages.png'} shows it\n")


def _demo_command(args: argparse.Namespace) -> None:
    folder = _writable(Path(args.out))
    began = time.perf_counter()
    store = prepare("synthetic", folder / "store", limit=360)
    for _ in progress_bar(train(store, folder, "demo", max_minutes=4)):
        pass
    generator, config, _ = load_generator(folder / "generator.safetensors")
    print(results_table(write_comparison(store, generator, config, folder)))
    print(f"{folder / 'panels.png'} shows it; the whole way took {time.perf_counter() - began:.0f} s")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="srgan_utils.py", description="SRGAN for faces: prepare, train, compare, upscale.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    demo = commands.add_parser("demo", help="the whole way in minutes on a CPU, no network needed")
    demo.add_argument("--out", default="demo-out", metavar="DIR")
    prepare_ = commands.add_parser("prepare", help="turn a source of faces into a store")
    prepare_.add_argument("source", metavar="SOURCE", help="a folder, a .zip, or one of: celeba portraits synthetic")
    prepare_.add_argument("--store", required=True, metavar="DIR", help="where the prepared faces go")
    prepare_.add_argument("--limit", metavar="N", help="training faces to take (default: all)")
    train_ = commands.add_parser("train", help="start or continue a run")
    train_.add_argument("--store", required=True, metavar="DIR", help="prepared faces")
    train_.add_argument("--run", required=True, metavar="DIR", help="the run's folder; one that exists is continued")
    train_.add_argument("--preset", metavar="P", help=f"{', '.join(PRESETS)} (default: sharp)")
    train_.add_argument("--scale", metavar="S", help="2, 4, 8 or 16 (default: 4)")
    train_.add_argument("--set", nargs="+", action="append", metavar="FIELD=VALUE", help="change numbers of the preset")
    train_.add_argument("--backup", metavar="DIR", help="a second folder for checkpoints, on Drive say")
    train_.add_argument("--max-minutes", metavar="M", help="save and stop after so long")
    train_.add_argument("--for-minutes", metavar="M", help="set a new run's length to fit")
    compare = commands.add_parser("compare", help="LR, bicubic, SRGAN, HR: panels and metrics")
    compare.add_argument("--store", required=True, metavar="DIR")
    report = commands.add_parser("report", help="reproduce the course report, beside `sharp` trained for as long")
    report.add_argument("--store", required=True, metavar="DIR")
    report.add_argument("--out", required=True, metavar="DIR")
    report.add_argument("--scales", nargs="+", default=["4", "8"], metavar="S", help="default: 4 8")
    report.add_argument("--epochs", metavar="N", help="default: the report's 3")
    upscale_ = commands.add_parser("upscale", help="enlarge photos")
    upscale_.add_argument("images", nargs="+", metavar="IMAGE", help="photos; faces about 176 px wide suit the networks best")
    for command in (compare, upscale_):
        command.add_argument("--out", required=True, metavar="DIR", help="where the results go")
        command.add_argument("--run", metavar="DIR", help="take the network of this run")
        command.add_argument("--weights", metavar="FILE", help="take this generator.safetensors")
        command.add_argument("--scale", metavar="S", help="else the one that ships for 2, 4 or 8 (default: 4)")
        command.add_argument("--blend", metavar="A", help="from 0, faithful (pixel loss alone), to 1, sharp")
    compare.add_argument("--split", default="test", metavar="test|all")
    compare.add_argument("--count", metavar="N", help="faces to measure")
    compare.add_argument("--set", nargs="+", action="append", metavar="FIELD=VALUE", help="crop=..., hr_size=...")
    report.add_argument("--set", nargs="+", action="append", metavar="FIELD=VALUE", help="vgg=random, say")
    compare.add_argument("--lpips", action="store_true", help="also LPIPS (downloads its network)")
    compare.add_argument("--errors", action="store_true", help="a fifth panel: the difference to HR")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0; 130 if interrupted; 2 after one line on standard error that says what to do."""
    commands = {"demo": _demo_command, "prepare": _prepare_command, "train": _train_command, "compare": _compare_command,
                "report": _report_command, "upscale": _upscale_command}
    warnings.filterwarnings("ignore", module="PIL")  # a file at fault is named in a line of its own
    try:
        args = _parser().parse_args(argv)
        commands[args.command](args)
        return 0
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'stopped'}", file=sys.stderr)
        return 130
    except ConnectionError as error:
        print(str(error), file=sys.stderr)  # the one message of three lines: how to get CelebA by hand
    except (ValueError, OSError, FloatingPointError, ImportError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"srgan_utils.py: {_one_line(error)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    status = main()
    if distributed.is_torchelastic_launched():  # one that had done its work was aborted at its exit (by gloo, we think)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
