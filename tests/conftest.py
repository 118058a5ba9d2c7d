"""What several test files need: a small store of synthetic faces, tiny networks, and all that a run leaves."""

import contextlib
import csv
import re
import types
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import srgan_utils as srgan

torch.set_num_threads(1)  # for networks as small as these, threads cost more than they bring

# Seconds instead of minutes: one block, few channels, 32-px faces
TINY = {"hr_size": 32, "patch_size": 32, "channels": 8, "residual_blocks": 1, "batch_size": 2, "precision": "fp32",
        "pretrain_steps": 3, "steps": 3, "ramp_steps": 2, "warmup_steps": 2, "save_steps": 2, "sample_steps": 3,
        "content": "pixel"}  # VGG has 80 MB


class SmallDiscriminator(srgan.Discriminator):
    """In its place where many checkpoints are written: they are a hundredth as large."""

    def __init__(self, config):
        nn.Module.__init__(self)
        self.kind = "dense"
        self.layers = nn.Sequential(*(nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1), nn.LeakyReLU(0.2)) for channels in (3, 8)))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1))


class Unweighted(nn.Linear):
    def __init__(self, *size):
        super().__init__(*size, device="meta")


@pytest.fixture(scope="session", autouse=True)
def vgg_without_its_classifier():
    """Nobody uses that, and drawing its 124 million weights takes seconds each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models.vgg, "nn", types.SimpleNamespace(**vars(nn) | {"Linear": Unweighted}))
        yield


@pytest.fixture(scope="module")
def small():
    """What takes longer than the updates of tiny runs is small: the discriminator, and samples, which are no pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(srgan, "Discriminator", SmallDiscriminator)
        figure = types.SimpleNamespace(savefig=lambda path, **_: Path(path).write_bytes(b""))
        patch.setattr(srgan, "stages_figure", lambda *_, **__: figure)
        yield


def plain(value):
    """Tensors as bytes, so that == compares bit for bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value


def rows(text: str) -> list[dict]:
    """A history, but for the time that it took."""
    return [row | {"seconds": ""} for row in csv.DictReader(text.splitlines())]


def final_state(folder: Path) -> dict:
    """All that a run or a store leaves, but for the time that it took."""
    found = {}
    for path in (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"):
        content = rows(path.read_text()) if path.name == "history.csv" else path.read_bytes()
        if path.suffix == ".pt":
            state = srgan.load_checkpoint(path)
            content = plain(state | {"history": rows(state["history"]), "seconds": None})
        elif path.suffix == ".safetensors":
            generator, config, about = srgan.load_generator(path)
            content = plain(dict(generator.state_dict())), config, about | {"seconds": None}
        found[str(path.relative_to(folder))] = content
    return found


@contextlib.contextmanager
def refused(kind, match=None):
    """One line, whatever is in it."""
    with pytest.raises(kind, match=match) as caught:
        yield
    assert str(caught.value).isprintable()


def fill_in(notebook, **form) -> None:
    """Change fields of a notebook's forms, as a person would."""
    for name, value in form.items():
        found = 0
        for cell in notebook.cells:
            cell.source, count = re.subn(rf"(?m)^{name} = .+?(?=  #@param)", f"{name} = {value!r}", cell.source)
            found += count
        assert found == 1, f"{found} fields are called {name}"


def execute(notebook, folder: Path) -> str:
    """Run all of a notebook that lies in `folder`, and return what it prints."""
    from nbclient import NotebookClient

    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


@torch.no_grad()
def flat_field(generator, colours: torch.Tensor, side: int = 32) -> torch.Tensor:
    """Standard deviation, in levels of 255, of the interior of what each flat colour (N, 3) is enlarged to, (N,)."""
    sr = generator(colours.view(-1, 3, 1, 1).expand(-1, 3, side, side))
    edge = sr.shape[-1] // 4
    return sr[..., edge:-edge, edge:-edge].mul(255).std((-2, -1)).amax(1)


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> srgan.FaceStore:
    """40 synthetic faces, prepared once; some in each part of the split."""
    return srgan.prepare("synthetic", tmp_path_factory.mktemp("data") / "store", limit=34)


@pytest.fixture(scope="session")
def tiny_run(store, tmp_path_factory):
    """A finished run of the tiny network at 4x."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    for _ in srgan.train(store, folder, "sharp", TINY | {"scale": 4}):
        pass
    return folder
