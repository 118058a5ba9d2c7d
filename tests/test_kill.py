"""Runs and preparations killed (SIGKILL) at random moments, and continued: they end as if nothing had happened.

    python tests/test_kill.py 200 [SEED]        so many kills of training, and a quarter as many of preparing

Every third kill of a training also loses the machine: only the backup folder is left.
"""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn
from tqdm import tqdm

import srgan_utils as srgan

# Saves after every update, so that many kills hit one
CHANGES = {"hr_size": 32, "patch_size": 32, "channels": 8, "residual_blocks": 1, "batch_size": 2, "precision": "fp32",
           "pretrain_steps": 12, "steps": 12, "ramp_steps": 4, "warmup_steps": 2, "save_steps": 1, "sample_steps": 99}


class SmallDiscriminator(srgan.Discriminator):
    """In its place where many checkpoints are written: they are a hundredth as large."""

    def __init__(self, config):
        nn.Module.__init__(self)
        self.layers = nn.ModuleList(nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1), nn.LeakyReLU(0.2)) for channels in (3, 8))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1))


def in_child(work, seconds: float | None = None) -> bool:
    """Run `work()` in a process of its own, killed after `seconds`; whether it got to its end."""
    child = os.fork()
    if not child:
        tqdm.set_lock(threading.RLock())  # its own is shared between processes: a killed one would keep it
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "a continued process failed"
    return not os.WIFSIGNALED(status)


def rows(text: str) -> list[dict]:
    """A history, but for the time that it took."""
    return [row | {"seconds": ""} for row in csv.DictReader(text.splitlines())]


def plain(value):
    """Tensors as bytes, so that == compares bit for bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value


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


def kill(work, place: Path, kills: int, chance: random.Random) -> str:
    """Kill `work(folder, backup)` again and again, until it is done; then anew, until there are so many kills."""
    work(place / "whole", place / "whole-backup")  # here, so that what it imports need not be imported by each child
    began = time.perf_counter()
    assert in_child(lambda: work(place / "again", place / "again-backup"))
    whole, expected, folder, backup = time.perf_counter() - began, final_state(place / "whole"), place / "run", place / "backup"
    assert expected == final_state(place / "again")
    count = {"kills": 0, "while writing": 0, "machines lost": 0, "runs": 0, "identical": 0}
    while count["kills"] < kills:
        lost, count["runs"] = False, count["runs"] + 1
        while not in_child(lambda: work(folder, backup), chance.uniform(0, 0.6 * whole) if count["kills"] < kills else None):
            count["kills"] += 1
            count["while writing"] += any(folder.rglob("*.part"))
            if count["kills"] % 3 == 0 and folder.exists():
                shutil.rmtree(folder)
                lost, count["machines lost"] = True, count["machines lost"] + 1
        found = final_state(folder)  # of checkpoints and samples, a new machine has those since then
        wanted = {name: value for name, value in expected.items() if not lost or name in found or "/" not in name}
        differs = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
        assert not differs, f"differs from what was never killed: {differs}"
        count["identical"] += 1
        shutil.rmtree(folder)
        if backup.exists():
            assert srgan.newest_checkpoint(place / "none", backup)["update"] == len(expected["history.csv"]) == 24
            shutil.rmtree(backup)
    return ", ".join(f"{number} {word}" for word, number in count.items())


def main(kills: int, seed: int = 0) -> None:
    srgan.Discriminator = SmallDiscriminator
    torch.set_num_threads(1)  # forked processes cannot share OpenMP's threads
    with tempfile.TemporaryDirectory() as name:
        place, chance = Path(name), random.Random(seed)
        store, faces = srgan.prepare("synthetic", place / "small", limit=17), place / "faces"
        faces.mkdir()
        for number in range(600):
            row = torch.rand(3, 1, 178, generator=srgan.seeded(number))
            srgan.save_image(row.expand(3, 218, 178), faces / f"{number:03}.jpg")
        for what, kills, work in (
                ("training", kills, lambda folder, backup: list(srgan.train(store, folder, None, CHANGES, backup=backup))),
                ("preparing", kills // 4, lambda folder, _: srgan.prepare(faces, folder))):
            print(f"{what}:", kill(work, place / what, kills, chance))


def test_killed_processes_continue_as_if_nothing_had_happened():
    result = subprocess.run([sys.executable, __file__, "8"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    training, preparing = result.stdout.splitlines()[-2:]
    assert training.startswith("training: 8 kills, ") and preparing.startswith("preparing: 2 kills, ")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
