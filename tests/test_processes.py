"""Training by several processes, as torchrun starts them: the same weights as by one."""

import csv
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

import srgan_utils as srgan

CHANGES = TINY | {"batch_size": 4, "pretrain_steps": 6, "steps": 8, "decay_steps": 8, "save_steps": 5}


def by_torchrun(store, run, **changes):
    given = [f"{name}={value}" for name, value in (CHANGES | changes).items()]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", srgan.__file__,
                    "train", "--store", str(store.folder), "--run", str(run), "--set", *given], check=True, timeout=120)


def by_two(store, run, **changes):
    """The same without the seconds that two interpreters need to start."""
    def work(rank):
        torch.distributed.init_process_group("gloo", init_method=f"file://{run}.rendezvous", rank=rank, world_size=2)
        by_one(store, run, **changes)

    processes = [multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]


def by_one(store, run, **changes):
    for _ in srgan.train(store, run, None, CHANGES | changes):
        pass


def distance(a: dict, b: dict) -> float:
    """The largest difference of any weight of the two networks or the moving average."""
    return max((a[part][name] - b[part][name]).abs().max().item()
               for part in ("generator", "discriminator", "ema") for name in a[part])


def history(run: Path) -> torch.Tensor:
    with open(run / "history.csv", newline="") as file:
        return torch.tensor([[float(value or 0) for name, value in row.items() if name not in ("stage", "seconds")]
                             for row in csv.DictReader(file)])


def test_two_processes_give_the_weights_of_one_and_a_run_goes_on_with_another_number(store, tmp_path):
    """Begun by two, continued by one, ended by two."""
    one, two = tmp_path / "one", tmp_path / "two"
    by_torchrun(store, two, steps=2)
    by_one(store, two, steps=4)
    by_two(store, two)
    by_one(store, one)
    expected, found = (srgan.newest_checkpoint(run / "ckpt") for run in (one, two))
    before = srgan.load_checkpoint(one / "ckpt" / "update-00000010.pt")
    assert expected["update"] == found["update"] == 14 and distance(expected, found) < 1e-5 < 1e-4 < distance(before, found)
    assert len(history(two)) == 14 and history(two).allclose(history(one), rtol=1e-4, atol=1e-6)
    parents = [srgan.load_generator(run / "pretrained.safetensors")[0].state_dict() for run in (one, two)]
    assert all(value.allclose(parents[1][name], atol=1e-5) for name, value in parents[0].items())


def test_a_batch_that_cannot_be_shared_is_refused(store, tmp_path, monkeypatch):
    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 3)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    with pytest.raises(ValueError, match="batch_size=4 cannot be shared by 3 processes"):
        next(srgan.train(store, tmp_path / "run", None, CHANGES))
    assert not (tmp_path / "run").exists()
