"""Runs and preparations killed (SIGKILL) at random moments, and continued: they end as if nothing had happened.

    python tests/test_kill.py 200 [SEED]        so many kills of training, and a quarter as many of preparing

Every third kill of a training also loses the machine: only the backup folder is left.
"""

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
from conftest import TINY, SmallDiscriminator, final_state
from tqdm import tqdm

import srgan_utils as srgan

# Saves after every update, so that many kills hit one
CHANGES = TINY | {"pretrain_steps": 12, "steps": 12, "ramp_steps": 4, "save_steps": 1, "sample_steps": 99}


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


def kill(work, place: Path, kills: int, chance: random.Random) -> str:
    """Kill `work(folder, backup)` again and again, until it is done; then anew, until there are so many kills."""
    work(place / "whole", place / "whole-backup")  # here, so that what it imports need not be imported by each child
    began, folder, backup = time.perf_counter(), place / "run", place / "backup"
    assert in_child(lambda: work(place / "again", place / "again-backup"))
    whole, expected = time.perf_counter() - began, final_state(place / "whole")
    assert expected == final_state(place / "again")
    count = dict.fromkeys(("kills", "while writing", "machines lost", "runs", "identical"), 0)
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
    with tempfile.TemporaryDirectory() as name:
        place, chance = Path(name), random.Random(seed)
        store, faces = srgan.prepare("synthetic", place / "small", limit=17), place / "faces"
        faces.mkdir()
        for number in range(300):
            row = torch.rand(3, 1, 178, generator=srgan.seeded(number))
            srgan.save_image(row.expand(3, 218, 178), faces / f"{number:03}.jpg")
        for what, kills, work in (
                ("training", kills, lambda folder, backup: list(srgan.train(store, folder, None, CHANGES, backup=backup))),
                ("preparing", kills // 4, lambda folder, _: srgan.prepare(faces, folder))):
            print(f"{what}:", kill(work, place / what, kills, chance))


def test_killed_processes_continue_as_if_nothing_had_happened():
    result = subprocess.run([sys.executable, __file__, "4"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    training, preparing = result.stdout.splitlines()[-2:]
    assert training.startswith("training: 4 kills, ") and preparing.startswith("preparing: 1 kills, ")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
