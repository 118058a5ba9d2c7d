"""What things cost, measured: `python tests/benchmark.py WHAT`; prints a table, no test.

    backup    how long training waits for a checkpoint of the `report` networks and its copy to a slow Drive
    memory    private memory while preparing and training, with few faces and many, after few updates and many
"""

import argparse
import hashlib
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import srgan_utils as srgan

ROW = 178 * 178 * 3


def machine() -> str:
    about = srgan.environment()
    threads = f"{about['threads']} threads, {platform.machine()}"
    return f"torch {about['torch']}, {about['device']} ({threads}), Python {about['python']}"


# --- backup


def slow_copy(seconds: float):
    """`shutil.copyfile` at the pace that takes `seconds` for 1.7 GB."""
    def copy(source, target):
        with open(source, "rb") as read, open(target, "wb") as write:
            while chunk := read.read(1 << 24):
                write.write(chunk)
                time.sleep(seconds * len(chunk) / 1.7e9)
    return copy


def backup(args) -> None:
    """Every update and every save timed by wrapping them; what the threads do meanwhile is noted beside."""
    shutil.copyfile = slow_copy(args.seconds)
    updates, saves, copies = [], [], []
    update, save, copy = srgan._one_update, srgan._Run.save, srgan.Backup._copy

    def timed(function, into):
        def wrapped(*given, **options):
            begun = time.perf_counter()
            result = function(*given, **options)
            into.append((begun, time.perf_counter()))
            return result
        return wrapped

    srgan._one_update, srgan._Run.save, srgan.Backup._copy = timed(update, updates), timed(save, saves), timed(copy, copies)
    with tempfile.TemporaryDirectory() as place:
        store = srgan.prepare("synthetic", Path(place) / "store", limit=34)
        changes = {"content": "pixel", "batch_size": 1, "steps": args.updates, "save_steps": args.updates // 3}
        events = srgan.train(store, Path(place) / "run", "report", changes, backup=Path(place) / "drive")
        for event in events:
            print(f"{event.step} of {event.total}, backup: {event.backup}", flush=True)
            if event.step >= args.updates - 1:
                break
        events.close()
        size = max(path.stat().st_size for path in Path(place).glob("run/ckpt/*.pt"))
    first, (begun, ended) = saves[0][0], copies[0]
    spans = {"before the first save": [b - a for a, b in updates[2:] if b < first],
             "while the checkpoint is written": [b - a for a, b in updates if first < b < begun],
             "while it is copied": [b - a for a, b in updates if begun < a and b < ended]}
    print(f"\n{machine()}\ncheckpoint: {size / 1e9:.2f} GB; its copy took {ended - begun:.0f} s")
    print(f"one save kept training waiting for {saves[0][1] - saves[0][0]:.2f} s")
    for name, seconds in spans.items():
        if seconds:
            print(f"one update {name}: median {statistics.median(seconds):.2f} s of {len(seconds)}")


# --- memory


def private() -> float:
    """Memory of this process that is not mapped from files, MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1000


def sparse_store(folder: Path, rows: int) -> srgan.FaceStore:
    """`rows` black faces that take no room on the disk."""
    folder.mkdir()
    with open(folder / "faces.u8", "wb") as file:
        file.truncate(rows * ROW)
    blocks = []
    for start in range(0, rows, srgan._BLOCK):
        count = min(srgan._BLOCK, rows - start)
        digest = blocks[0]["sha256"] if count == srgan._BLOCK and blocks else hashlib.sha256(bytes(count * ROW)).hexdigest()
        names = [f"{number:06d}.png" for number in range(start, start + count)]
        blocks.append({"names": names, "sha256": digest, "left_out": [], "enlarged": []})
    (folder / "store.json").write_bytes(srgan._sealed(srgan._store_record("sparse", "sparse", None, blocks)))
    return srgan.FaceStore(folder)


def peak_while(events, count: int) -> float:
    most = 0.0
    for event in events:
        most = max(most, private())
        if event.step >= count:
            break
    return most


def memory_of_training(rows: int, updates: int) -> dict:
    changes = {"hr_size": 32, "patch_size": 32, "channels": 8, "residual_blocks": 1, "batch_size": 4, "precision": "fp32",
               "pretrain_steps": updates // 2, "steps": updates // 2, "save_steps": 200, "sample_steps": 200}
    with tempfile.TemporaryDirectory() as place:
        store = sparse_store(Path(place) / "store", rows)
        opened = private()
        events = srgan.train(store, Path(place) / "run", "sharp", changes)
        early, late = peak_while(events, updates // 2 + 100), peak_while(events, updates)
        events.close()
    return {"faces": rows, "store opened": opened, f"until update {updates // 2 + 100}": early, f"until update {updates}": late}


def memory_of_preparing(rows: int) -> dict:
    """Of a source whose images are all one: its names and theirs are all that can grow."""
    from PIL import Image

    image = Image.new("RGB", (178, 218))
    source = srgan.Source("one", [f"{number:06d}.png" for number in range(rows)], lambda name: image)
    most = [0.0]
    block = srgan._prepare_block

    def watched(*given):
        most[0] = max(most[0], private())
        return block(*given)

    srgan._prepare_block, srgan.open_source = watched, lambda _: source
    with tempfile.TemporaryDirectory() as place:
        before = private()
        srgan.prepare("one", Path(place) / "store")
    return {"faces": rows, "before": before, "while preparing": most[0], "store opened": private()}


def memory(args) -> None:
    """One measurement in each process, so that none has what another left."""
    from multiprocessing import get_context

    print(machine() + "; private memory, MB")
    for work, sizes in ((memory_of_preparing, [(2_000,), (args.rows,)]),
                        (memory_of_training, [(200, args.updates), (args.rows, args.updates)])):
        for given in sizes:
            with get_context("spawn").Pool(1) as pool:
                row = pool.apply(work, given)
            print(f"{work.__name__}: {json.dumps({name: round(value) for name, value in row.items()})}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    kind = kinds.add_parser("backup")
    kind.add_argument("--seconds", type=float, default=120, help="what the copy of 1.7 GB takes")
    kind.add_argument("--updates", type=int, default=60)
    kind.set_defaults(work=backup)
    kind = kinds.add_parser("memory")
    kind.add_argument("--rows", type=int, default=200_000)
    kind.add_argument("--updates", type=int, default=2_000)
    kind.set_defaults(work=memory)
    args = parser.parse_args()
    args.work(args)


if __name__ == "__main__":
    main()
