"""Training by several processes, as torchrun starts them: the same weights as by one, whoever dies."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY

import srgan_utils as srgan

MODULE = str(Path(srgan.__file__))
QUICK = TINY | {"batch_size": 4, "pretrain_steps": 6, "steps": 8, "save_steps": 5}


def command(store, run, changes) -> list[str]:
    given = [f"{name}={value}" for name, value in changes.items()]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
            MODULE, "train", "--store", str(store.folder), "--run", str(run), "--set", *given]


def by_one(store, run, changes) -> dict:
    for _ in srgan.train(store, run, None, changes):
        pass
    return srgan.newest_checkpoint(run / "ckpt")


def distance(a: dict, b: dict) -> float:
    """The largest difference of any weight of the generator or its moving average."""
    return max((a[part][name] - b[part][name]).abs().max().item() for part in ("generator", "ema") for name in a["ema"])


def history(run: Path) -> list[list[float]]:
    """Step and losses; of the discriminator's scores their difference, since the relativistic loss leaves their mean free."""
    with open(run / "history.csv", newline="") as file:
        names = ("step", "learning_rate", "g_loss", "pixel", "content", "adversarial", "d_loss")
        return [[float(row[name] or 0) for name in names] + [float(row["d_real"] or 0) - float(row["d_fake"] or 0)]
                for row in csv.DictReader(file)]


def test_two_processes_give_the_weights_of_one(store, tmp_path):
    changes = QUICK | {"adversarial": "relativistic", "adversarial_weight": 0.5}
    one, two = tmp_path / "one", tmp_path / "two"
    expected = by_one(store, one, changes)
    subprocess.run(command(store, two, changes), check=True, timeout=300)
    found = srgan.newest_checkpoint(two / "ckpt")
    fresh = srgan.TrainState.create(srgan.Config.preset("sharp", **changes), torch.device("cpu")).generator.state_dict()
    moved = max((found["generator"][name] - value).abs().max().item() for name, value in fresh.items())
    assert distance(expected, found) < 1e-5 and moved > 1e-3
    assert len(history(two)) == 14
    assert torch.tensor(history(two)).allclose(torch.tensor(history(one)), rtol=1e-4, atol=1e-6)


def process_of(rank: int, run: Path) -> int:
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"\0RANK={rank}\0".encode() in place.joinpath("environ").read_bytes():
                if str(run).encode() in place.joinpath("cmdline").read_bytes():
                    return int(place.name)
        except OSError:  # it has just ended
            continue
    raise LookupError(f"no process of rank {rank}")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_process_ends_the_run_and_one_continues_it(store, tmp_path, rank):
    # a small step, for Adam makes more of a rounding error with every update
    changes = QUICK | {"pretrain_steps": 300, "save_steps": 10, "pretrain_learning_rate": 1e-5}
    expected = by_one(store, tmp_path / "whole", changes)
    run = tmp_path / "run"
    process = subprocess.Popen(command(store, run, changes), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not any(run.glob("ckpt/update-*.pt")) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(process_of(rank, run), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    saved = srgan.newest_checkpoint(run / "ckpt")
    assert process.returncode != 0 and 10 <= saved["update"] < 308, errors
    if rank == 1:
        assert "process 0 of 2 lost another" in errors and "start them all again" in errors
    assert distance(expected, by_one(store, run, {})) < 1e-5
    assert [row[0] for row in history(run)] == list(range(1, 309))


FAILS = """
import sys
sys.path.insert(0, {root!r})
import srgan_utils as srgan
batch = srgan.batch

def fails(store, config, update, device):
    if srgan._rank() == 0 and update == 4:
        raise ValueError("faces 0 to 999 are damaged on disk")
    return batch(store, config, update, device)

srgan.batch = fails
sys.exit(srgan.main(sys.argv[1:]))
"""


def test_what_fails_in_one_process_only_is_said_and_ends_all(store, tmp_path):
    """The other one is in the middle of an update, and waits for this one's gradients."""
    program = tmp_path / "fails.py"
    program.write_text(FAILS.format(root=str(Path(MODULE).parent)))
    arguments = [str(program) if each == MODULE else each for each in command(store, tmp_path / "run", QUICK)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and done.stderr.count("faces 0 to 999 are damaged on disk") == 1, done.stderr
    assert srgan.newest_checkpoint(tmp_path / "run" / "ckpt") is None and not (tmp_path / "run" / "lock").exists()


def test_a_batch_that_cannot_be_shared_is_refused(store, tmp_path, monkeypatch):
    monkeypatch.setattr(srgan, "_ranks", lambda: 3)
    monkeypatch.setattr(srgan, "_tell", lambda order: None)
    with pytest.raises(ValueError, match="batch_size=4 cannot be shared by 3 processes"):
        next(srgan.train(store, tmp_path / "run", None, QUICK))
    assert not (tmp_path / "run").exists()


def test_the_shares_of_a_batch_make_up_the_whole(store, monkeypatch):
    config = srgan.Config(**QUICK | {"batch_size": 12, "patch_size": 16})
    whole = srgan.batch(store, config, 5, torch.device("cpu"))
    monkeypatch.setattr(srgan, "_ranks", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(srgan, "_rank", lambda rank=rank: rank)
        shares.append(srgan.batch(store, config, 5, torch.device("cpu")))
    assert all(torch.equal(torch.cat(parts), each) for parts, each in zip(zip(*shares), whole))
