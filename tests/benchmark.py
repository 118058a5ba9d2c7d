"""What things cost, measured: `python tests/benchmark.py WHAT`; prints a table, no test.

    train     updates per second: the report's way, written plainly (reference.py), against this project, alternating, and
              against this project with one measure switched off at a time; `--json FILE` keeps the rows
    startup   what importing the module costs beside importing torch
    backup    how long training waits for a checkpoint of the `report` networks and its copy to a slow Drive
    memory    private memory while preparing and training, with few faces and many, after few updates and many
"""

import argparse
import hashlib
import itertools
import json
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from reference import ReferenceFaces, ReferenceTraining
from torch.utils.data import DataLoader

import srgan_utils as srgan

ROW = 178 * 178 * 3


def machine() -> str:
    about = srgan.environment()
    threads = f"{about['threads']} threads, {platform.machine()}"
    return f"torch {about['torch']}, {about['device']} ({threads}), Python {about['python']}"


# --- train


def plain_way(config: srgan.Config, photos: list, device: torch.device):
    """One update of the report's way at each call: fp32, channels first, PIL per image in a DataLoader."""
    vgg = torch.nn.Sequential(*list(srgan.VGGFeatures(config).network.children())[:19]).requires_grad_(True)
    training = ReferenceTraining(config.scale, config.hr_size, vgg, device)
    faces = ReferenceFaces(photos, config.hr_size, config.scale)
    loader = DataLoader(faces, config.batch_size, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    return lambda: training.update(*(each.to(device) for each in next(batches)))


def our_way(config: srgan.Config, store: srgan.FaceStore, device: torch.device, without: str = ""):
    """One update of this project at each call, its losses fetched every 50 as `train` does; `without` one measure."""
    if without == "bf16 or fp16":
        config = replace(config, precision="fp32")
    state = srgan.TrainState.create(config, device)
    if without == "channels last":
        for network in (state.generator, state.discriminator, state.vgg):
            network.to(memory_format=torch.contiguous_format)
    if without == "fused Adam":
        srgan._one_update(state, store)  # where the adversarial stage begins, its optimiser is made
        for optimizer in (state.g_optimizer, state.d_optimizer):
            optimizer.param_groups[0].update(fused=False, foreach=False)
    if without == "frozen VGG19":
        state.vgg.requires_grad_(True)
    pending = []

    def update():
        if without == "one generator pass":
            with state.autocast():
                state.generator(srgan.batch(store, config, state.update, device)[0])
        pending.append(srgan._one_update(state, store))
        if len(pending) == 50:
            [torch.stack(list(losses.values())).tolist() for losses in pending]
            pending.clear()
    return update


def seconds_of(update, seconds: float, device: torch.device) -> float:
    """Seconds of one update, over at least `seconds` and two updates."""
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds or count < 2:
        update()
        count += 1
        if device.type == "cuda" and count % 50 == 0:
            torch.cuda.synchronize()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / count


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    a = torch.randn(4096, 4096, device=device, dtype=dtype)
    return 2 * 4096 ** 3 / min(seconds_of(lambda: a @ a, 1, device) for _ in range(3))


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measured(ways: dict, rounds: int, seconds: float, device: torch.device) -> dict:
    """Median and extremes of the seconds of one update of each way, taking turns."""
    for update in ways.values():
        update()
    taken = {name: [] for name in ways}
    for _ in range(rounds):
        for name, update in ways.items():
            taken[name].append(seconds_of(update, seconds, device))
    return {name: (statistics.median(each), min(each), max(each)) for name, each in taken.items()}


def train_row(args, batch: int, place: Path) -> dict:
    from torch.utils.flop_counter import FlopCounterMode

    device = srgan.pick_device()
    changes = {"scale": args.scale, "hr_size": args.hr_size, "batch_size": batch, "vgg": "random"}
    config = srgan.Config.preset("report", **changes).for_faces(1000)
    config = replace(config, precision=srgan.resolve_precision("auto", device))
    store = srgan.FaceStore(place / "store")
    photos = sorted((place / "photos").iterdir())
    ways = {"reference": plain_way(config, photos, device), "ours": our_way(config, store, device)}
    for name in args.without:
        ways[f"without {name}"] = our_way(config, store, device, name)
    found = measured(ways, args.rounds, args.seconds, device)
    with FlopCounterMode(display=False) as counter:
        ways["ours"]()
    top = ceiling(device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision, torch.float32))
    flop, plain, ours = counter.get_total_flops(), found["reference"][0], found["ours"][0]
    print(f"\nreport {config.scale}x, {config.hr_size} px, batch {batch}, {config.precision}, vgg=random; peak memory of all "
          f"ways together {peak_memory(device) / 1e9:.1f} GB\none update: {flop / 1e12:.2f} TFLOP; a matrix product reaches "
          f"{top / 1e12:.2f} TFLOP/s, ours {flop / ours / top:.0%} of that")
    for name, (middle, low, high) in found.items():
        print(f"  {name:<28} {1 / middle:8.3f} updates/s ({1 / high:.3f} to {1 / low:.3f}), {batch / middle:8.2f} images/s, "
              f"{plain / middle:5.2f} times the reference")
    return {"preset": "report", "scale": config.scale, "hr_size": config.hr_size, "batch": batch, "device": str(device),
            "precision": config.precision, "vgg": "random", "reference": {"updates_per_s": 1 / plain},
            "ours": {"updates_per_s": 1 / ours}, "ratio": plain / ours, "flop": flop, "ceiling_flop_per_s": top,
            "all": {name: 1 / middle for name, (middle, _, _) in found.items()}}


def train(args) -> None:
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "photos").mkdir()
        for number in range(64):
            srgan.save_image(srgan.synthetic_face(number), place / "photos" / f"{number:03}.jpg")
        srgan.prepare(place / "photos", place / "store")
        rows = [train_row(args, batch, place) for batch in args.batch]
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))


# --- startup


def startup(args) -> None:
    print(machine())
    taken = {"import torch": [], "import srgan_utils": []}
    for _ in range(7):
        for code, each in taken.items():
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], cwd=Path(srgan.__file__).parent, check=True)
            each.append(time.perf_counter() - begun)
    for code, each in taken.items():
        print(f"{code}: median {statistics.median(each):.2f} s, {min(each):.2f} to {max(each):.2f} s")


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
    kind = kinds.add_parser("train")
    kind.add_argument("--scale", type=int, default=4)
    kind.add_argument("--hr-size", type=int, default=256)
    kind.add_argument("--batch", type=int, nargs="+", default=[4])
    kind.add_argument("--rounds", type=int, default=3)
    kind.add_argument("--seconds", type=float, default=10, help="of each way in each round, and at least two updates")
    kind.add_argument("--without", nargs="*", metavar="MEASURE", default=["bf16 or fp16", "channels last", "fused Adam",
                                                                          "frozen VGG19", "one generator pass"])
    kind.add_argument("--json")
    kind.set_defaults(work=train)
    kind = kinds.add_parser("startup")
    kind.set_defaults(work=startup)
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
