"""Runs and preparations killed (SIGKILL) at random moments, and continued: they end as if nothing had happened.

    python tests/test_kill.py 200        so many kills of training, and a quarter as many of preparing

Every third kill of a training also loses the machine: only the backup folder is left.
"""

import argparse
import contextlib
import csv
import json
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
from tqdm import tqdm

import srgan_utils as srgan

# Saves after every update, so that many kills hit one
CHANGES = {"hr_size": 32, "patch_size": 32, "channels": 8, "residual_blocks": 1, "batch_size": 2, "precision": "fp32",
           "pretrain_steps": 12, "steps": 12, "ramp_steps": 4, "warmup_steps": 2, "save_steps": 1, "sample_steps": 5}


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
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == 0, "a continued process failed"
    return True


def train(store: Path, folder: Path, backup: Path) -> None:
    with contextlib.redirect_stdout(None):
        for _ in srgan.train(srgan.FaceStore(store), folder, "sharp", CHANGES, backup=backup):
            pass


def plain(value):
    """Tensors as bytes, so that == compares bit for bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value


def rows(text: str) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(text.splitlines())]


def final_state(folder: Path, samples: bool) -> dict:
    """All that a run leaves, but for the time that it took."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".pt":
            state = srgan.load_checkpoint(path)
            found[name] = plain(state | {"history": rows(state["history"]), "seconds": None})
        elif path.suffix == ".safetensors":
            generator, config, about = srgan.load_generator(path)
            found[name] = plain(dict(generator.state_dict())), config, about
        elif path.name == "history.csv":
            found[name] = rows(path.read_text())
        elif path.is_file() and (samples or path.suffix != ".png"):
            found[name] = path.read_bytes()
    return found


def kill_trainings(place: Path, store: Path, kills: int, chance: random.Random) -> dict:
    train(store, place / "whole", place / "whole-backup")  # here, so that what it imports need not be imported by each child
    began = time.perf_counter()
    assert in_child(lambda: train(store, place / "again", place / "again-backup"))
    whole = time.perf_counter() - began
    assert final_state(place / "whole", True) == final_state(place / "again", True)
    steps = [int(row["step"]) for row in rows((place / "whole" / "history.csv").read_text())]
    assert steps == list(range(1, 25))  # none twice, none missing
    count = {"kills": 0, "within a save": 0, "machines lost": 0, "runs": 0, "identical": 0}
    while count["kills"] < kills:
        folder, backup, lost, ended = place / "run", place / "backup", False, False
        count["runs"] += 1
        while not ended:
            last = count["kills"] == kills
            ended = in_child(lambda: train(store, folder, backup), None if last else chance.uniform(0, 0.6 * whole))
            count["kills"] += not ended
            count["within a save"] += any(place.glob("run/**/*.part"))
            if not ended and count["kills"] % 3 == 0 and folder.exists():
                shutil.rmtree(folder)
                lost = True
                count["machines lost"] += 1
        expected, found = (final_state(each, samples=not lost) for each in (place / "whole", folder))
        if lost:  # of the checkpoints, those since then
            expected = {name: value for name, value in expected.items() if name in found or not name.startswith("ckpt")}
        differs = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        assert not differs, f"differs from the run that was never killed: {differs}"
        manifest = json.loads((backup / "manifest.json").read_text())
        assert manifest["update"] == 24 and srgan.load_checkpoint(backup / manifest["slot"])["update"] == 24
        count["identical"] += 1
        shutil.rmtree(folder)
        shutil.rmtree(backup)
    return count


def kill_preparations(place: Path, kills: int, chance: random.Random) -> dict:
    srgan._BLOCK = 4
    for number in range(60):
        place.joinpath("faces").mkdir(exist_ok=True)
        srgan.save_image(torch.rand(3, 218, 178, generator=srgan.seeded(number)), place / "faces" / f"{number:03}.jpg")
    began = time.perf_counter()
    assert in_child(lambda: srgan.prepare(place / "faces", place / "whole-store"))
    whole = time.perf_counter() - began
    count = {"kills": 0, "stores": 0, "identical": 0}
    while count["kills"] < kills:
        folder, ended = place / "store", False
        count["stores"] += 1
        while not ended:
            last = count["kills"] == kills
            ended = in_child(lambda: srgan.prepare(place / "faces", folder), None if last else chance.uniform(0, 0.6 * whole))
            count["kills"] += not ended
        expected, found = ({path.name: path.read_bytes() for path in each.iterdir()} for each in (place / "whole-store", folder))
        found.pop("lock", None)  # of a killed one; it stops nobody
        assert expected == found, "differs from the store whose preparation was never killed"
        count["identical"] += 1
        shutil.rmtree(folder)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    srgan._POOLED_LAYERS = ((4, 3, 1), (8, 4, 2))  # a tiny discriminator too
    torch.set_num_threads(1)  # forked processes cannot share OpenMP's threads
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        in_child(lambda: srgan.prepare("synthetic", place / "small", limit=17))
        for what, count in (("training", kill_trainings(place, place / "small", args.kills, chance)),
                            ("preparing", kill_preparations(place, max(1, args.kills // 4), chance))):
            print(f"{what}: " + ", ".join(f"{number} {word}" for word, number in count.items()))


def test_killed_processes_continue_as_if_nothing_had_happened():
    result = subprocess.run([sys.executable, __file__, "8"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    training, preparing = result.stdout.splitlines()[-2:]
    assert training.startswith("training: 8 kills") and preparing.startswith("preparing: 2 kills")


if __name__ == "__main__":
    main()
