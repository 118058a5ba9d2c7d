"""What several test files need: a small store of synthetic faces, and tiny networks."""

import re

import pytest
import torch

import srgan_utils as srgan

torch.set_num_threads(1)  # for networks as small as these, threads cost more than they bring

# Seconds instead of minutes: one block, few channels, 32-px faces
TINY = {"hr_size": 32, "patch_size": 32, "channels": 8, "residual_blocks": 1, "batch_size": 2, "precision": "fp32",
        "pretrain_steps": 3, "steps": 3, "ramp_steps": 2, "warmup_steps": 2, "save_steps": 2, "sample_steps": 3}


def fill_in(notebook, **form) -> None:
    """Change fields of a notebook's forms, as a person would."""
    for name, value in form.items():
        found = 0
        for cell in notebook.cells:
            cell.source, count = re.subn(rf"(?m)^{name} = .+?(?=  #@param)", f"{name} = {value!r}", cell.source)
            found += count
        assert found == 1, f"{found} fields are called {name}"


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
