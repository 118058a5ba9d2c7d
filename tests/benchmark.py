"""What things cost, measured: `python tests/benchmark.py WHAT` says the machine and the versions, then a line for each way.

    train     updates per second: the report's way, written plainly (reference.py), beside this project, taking turns; then this
              project beside itself with one measure switched off at a time. --beside FILE: another version of srgan_utils.py
              (`git show COMMIT:srgan_utils.py > FILE`) takes turns, too, by its whole `train`, and ours by its own beside it
    data      faces prepared per second beside JPEG decoding alone, and batches beside the report's way of reading photos
    infer     a photo enlarged, plainly and by this project, and one of 12 megapixels with its peak memory
    scaling   time of an update, and memory while training, with few faces and with many

`--json FILE` keeps all that is said. Medians over the rounds, with the extremes where speeds are compared.
"""

import argparse
import importlib.util
import itertools
import json
import math
import platform
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from PIL import Image
from reference import ReferenceFaces, ReferenceTraining
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import srgan_utils as srgan

DEVICE = srgan.pick_device()
ON_GPU = DEVICE.type == "cuda"
wait = torch.cuda.synchronize if ON_GPU else lambda: None


def of_process(what: str) -> float:
    """MB of this process by Linux's account. (getrusage's peak is that of the parent, too.)"""
    return int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0]) / 1000


def in_a_process(work, *given):
    """`work(*given)` in a process of its own, which has nothing that others left."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def peak_memory(work, *given) -> float:
    """GB, of the GPU, else of all memory, that `work(*given)` needs at most, with two calls of the way that it may return."""
    way = work(*given)
    for _ in range(2 if callable(way) else 0):
        way()
    return torch.cuda.max_memory_allocated() / 1e9 if ON_GPU else of_process("VmHWM") / 1000


def seconds_of(way, seconds: float) -> float:
    """Seconds of one turn of `way`, over at least `seconds` and two calls; a call may return how many turns it was."""
    begun, turns, calls = time.perf_counter(), 0, 0
    while time.perf_counter() - begun < seconds or calls < 2:
        turns, calls = turns + (way() or 1), calls + 1
        if calls % 50 == 0:
            wait()
    wait()
    return (time.perf_counter() - begun) / turns


def measured(args, ways: dict) -> dict:
    """Median and extremes of the seconds of one turn of each way, one after the other; first calls are not counted."""
    for way in ways.values():
        seconds_of(way, 0)
    taken = {name: [] for name in ways}
    for _, (name, way) in itertools.product(range(args.rounds), ways.items()):
        taken[name].append(seconds_of(way, args.seconds))
    return {name: (statistics.median(each), min(each), max(each)) for name, each in taken.items()}


def drawn_photos(folder: Path, count: int) -> list[Path]:
    """So many JPEGs of drawn faces, 178 x 218 px as CelebA's."""
    folder.mkdir()
    for number in range(count):
        srgan.save_image(srgan.bicubic(srgan.synthetic_face(number), (218, 178)), folder / f"{number:06}.jpg")
    return sorted(folder.iterdir())


# --- train

MEASURES = ("bf16 or fp16", "channels last", "fused Adam", "frozen VGG19", "frozen discriminator", "one generator pass",
            "losses fetched seldom")


def plain_batches(config: srgan.Config, photos: list):
    faces = ReferenceFaces(photos, config.hr_size, config.scale)
    loader = DataLoader(faces, config.batch_size, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def plain_way(config: srgan.Config, place: Path):
    """One update of the report's way at each call: fp32, channels first, PIL per image in a DataLoader."""
    vgg = torch.nn.Sequential(*list(srgan.VGGFeatures(config).network.children())[:19]).requires_grad_(True)
    training = ReferenceTraining(config.scale, config.hr_size, vgg, DEVICE)
    batches = plain_batches(config, sorted((place / "photos").iterdir()))
    return lambda: training.update(*(each.to(DEVICE) for each in next(batches))) and 1


def our_way(config: srgan.Config, place: Path, without: str = ""):
    """One update of this project at each call, its losses fetched as `train` does; `without` one of MEASURES."""
    if without == "bf16 or fp16":
        config = replace(config, precision="fp32")
    store, state = srgan.FaceStore(place / "store"), srgan.TrainState(config, DEVICE)
    store.keep_on(DEVICE if ON_GPU else None)
    if without == "channels last":
        for network in filter(None, (state.generator, state.discriminator, state.vgg)):
            network.to(memory_format=torch.contiguous_format)
    if without == "fused Adam":
        srgan._one_update(state, *srgan.batch(store, config, 0, DEVICE))  # it makes the optimiser of the adversarial stage
        for optimizer in (state.g_optimizer, state.d_optimizer):
            optimizer.param_groups[0].update(fused=False, foreach=False)
    if without == "frozen VGG19":
        state.vgg.requires_grad_(True)
    if without == "frozen discriminator":
        state.discriminator.requires_grad_ = lambda _: None
    pending, together = [], 50 if without != "losses fetched seldom" and ON_GPU else 1

    def update():
        lr, hr = srgan.batch(store, config, state.update, DEVICE)
        if without == "one generator pass":
            with state.autocast():
                state.generator(lr)
        pending.append(srgan._one_update(state, lr, hr))
        if len(pending) == together:
            torch.stack([torch.stack(list(losses.values())) for losses in pending]).tolist()
            pending.clear()
    return update


def whole_way(file: str, name: str, config: srgan.Config, place: Path):
    """About a second of the `train` of another srgan_utils.py at each call, with its reports, strips and checkpoints."""
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plain, done = asdict(srgan.Config.preset(config.preset_name)), [0]
    changes = {field: value for field, value in asdict(config).items() if value != plain[field]}
    store, run = module.prepare(place / "photos", place / f"{name}-store"), place / f"{name}-{time.time_ns()}"
    events = module.train(store, run, config.preset_name, changes)

    def advance():
        done.append(next(events).step)
        return done[-1] - done[-2]
    return advance


def train(args, place: Path):
    drawn_photos(place / "photos", 32)
    srgan.prepare(place / "photos", place / "store")
    changes = {"hr_size": args.hr_size} if args.hr_size else {}
    if args.preset == "sharp":
        changes["pretrain_steps"] = 0  # the adversarial stage, as the report's
    changes |= {"scale": args.scale, "batch_size": args.batch, "precision": srgan._resolve_precision("auto", DEVICE)}
    config = srgan.Config.preset(args.preset, vgg="random", **changes).for_faces(100_000)
    makers = {"reference": plain_way, "ours": our_way} if args.preset == "report" else {"ours": our_way}
    ways = {name: make(config, place) for name, make in makers.items()}
    if args.beside:
        ways |= {name: whole_way(file, name.replace(" ", "_"), config, place)
                 for name, file in (("ours, whole", srgan.__file__), ("beside, whole", args.beside))}
    found = measured(args, ways)
    with FlopCounterMode(display=False) as counter:
        ways["ours"]()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.precision]
    square = torch.randn(4096, 4096, device=DEVICE, dtype=dtype)
    product = seconds_of(lambda: (square @ square) is None, args.seconds)
    yield {"preset": args.preset, "scale": config.scale, "px": config.patch, "batch": args.batch, "precision": config.precision,
           "flop_per_update": counter.get_total_flops(), "matrix_product_flop_per_s": 2 * 4096 ** 3 / product}
    ways.clear()
    for name, (middle, low, high) in found.items():
        row = {"way": name, "updates_per_s": 1 / middle, "slowest": 1 / high, "fastest": 1 / low,
               "images_per_s": args.batch / middle, "times_the_reference": found.get("reference", [math.nan])[0] / middle}
        yield row | ({"peak_gb": in_a_process(peak_memory, makers[name], config, place)} if args.memory and name in makers else {})
    for name in MEASURES if args.without is None else args.without:
        if name == "frozen VGG19" and config.content != "vgg" or name == "losses fetched seldom" and not ON_GPU:
            continue
        ours, without = measured(args, {"ours": our_way(config, place), name: our_way(config, place, name)}).values()
        yield {"way": f"not {name}", "updates_per_s": 1 / without[0], "ours_beside_it": 1 / ours[0], "gain": without[0] / ours[0]}


def data(args, place: Path):
    photos = sorted(Path(args.faces).glob("*.jpg")) if args.faces else drawn_photos(place / "photos", 600)
    (place / "many").mkdir()
    many = [Path(shutil.copyfile(path, place / "many" / f"{copy}-{path.name}"))
            for copy, path in itertools.product(range(max(1, 3_000 // len(photos))), photos)]
    with ThreadPoolExecutor() as pool:
        ways = {"JPEGs decoded alone": lambda: list(pool.map(lambda path: Image.open(path).load() and None, many)) and len(many),
                "prepare": lambda: len(srgan.prepare(place / "many", place / f"store-{time.time_ns()}"))}
        for name, (middle, low, high) in measured(argparse.Namespace(rounds=args.rounds, seconds=0), ways).items():
            yield {"way": name, "photos": len(many), "faces_per_s": 1 / middle, "slowest": 1 / high, "fastest": 1 / low}
    store = srgan.FaceStore(next(place.glob("store-*")))
    store.keep_on(DEVICE if ON_GPU else None)
    for preset, size in (("report", 8), ("sharp", 16)):
        config = srgan.Config.preset(preset, batch_size=size)
        batches, updates = plain_batches(config, photos), itertools.count()
        ways = {"reference": lambda: [each.to(DEVICE) for each in next(batches)] and 1,
                "ours": lambda: srgan.batch(store, config, next(updates), DEVICE) and 1}
        for name, (middle, low, high) in measured(args, ways).items():
            yield {"way": f"batches, {name}", "preset": preset, "hr_size": config.hr_size, "batch": size,
                   "images_per_s": size / middle, "slowest": size / high, "fastest": size / low}


def plainly(lr: torch.Tensor, generator: srgan.Generator, config: srgan.Config) -> torch.Tensor:
    """Tile by tile in fp32, channels first: what `upscale` would be without its measures."""
    margin, scale, tile, rows = srgan.receptive_radius(config), config.scale, 1024 // config.scale, []
    for y in range(0, lr.shape[-2], tile):
        row = []
        for x in range(0, lr.shape[-1], tile):
            top, left = max(0, y - margin), max(0, x - margin)
            sr = generator(lr[..., top:y + tile + margin, left:x + tile + margin])[..., (y - top) * scale:, (x - left) * scale:]
            row.append(sr[..., :tile * scale, :tile * scale].cpu())
        rows.append(torch.cat(row, dim=-1))
    return srgan.quantise(torch.cat(rows, dim=-2))


@torch.no_grad()
def infer(args, place: Path):
    lr, made = srgan.bicubic(srgan.synthetic_face(0), (384, 512)), {}
    for preset in ("report", "sharp"):
        config = srgan.Config.preset(preset, scale=args.scale, precision=srgan._resolve_precision("auto", DEVICE))
        generator, fp32 = srgan.Generator(config).eval().to(DEVICE), replace(config, precision="fp32")
        found = measured(args, {
            "reference": lambda: made.update(reference=plainly(lr.to(DEVICE), generator, config)),
            "ours": lambda: made.update(ours=srgan.upscale(lr, generator, config)),
            "ours in fp32": lambda: made.update({"ours in fp32": srgan.upscale(lr, generator, fp32)})})
        for name, (middle, low, high) in found.items():
            yield {"way": name, "preset": preset, "scale": args.scale, "px": "512 x 384", "precision": config.precision,
                   "seconds": middle, "fastest": low, "slowest": high, "times_the_reference": found["reference"][0] / middle,
                   "levels_from_the_reference": 255 * (made[name] - made["reference"]).abs().max().item()}
    srgan.export_generator(place / "g.safetensors", generator, config)
    srgan.save_image(srgan.bicubic(lr, (3000, 4000)), place / "photo.jpg")
    command = ["upscale", f"{place}/photo.jpg", "--weights", f"{place}/g.safetensors", "--out", str(place)]
    begun, peak = time.perf_counter(), in_a_process(peak_memory, srgan.main, command)
    yield {"way": "command upscale, 12 megapixels", "preset": preset, "scale": args.scale, "peak_gb": peak,
           "seconds": time.perf_counter() - begun}


def training(faces: int, place: Path) -> dict:
    """A tiny network, so that feeding it shows, on so many black faces that take no room on the disk; private memory."""
    changes = {"hr_size": 32, "patch_size": 32, "channels": 8, "residual_blocks": 1, "batch_size": 4, "precision": "fp32",
               "pretrain_steps": 1_000, "steps": 1_000, "save_steps": 200, "sample_steps": 200}
    names, late = [f"{number:06}.png" for number in range(faces)], []
    record = {"names": names, "split": srgan.split_of(names).tolist(), "left_out": [], "enlarged": [], "source": "sparse",
              "limit": None, "title": "sparse", "state": "", "fingerprint": "sparse"}
    (place / "store.json").write_text(json.dumps(record))
    with open(place / "faces.u8", "wb") as file:
        file.truncate(faces * 178 * 178 * 3)
    store, opened = srgan.FaceStore(place), of_process("RssAnon")
    for event in srgan.train(store, place / "run", "sharp", changes):
        if event.step > 1_000:
            late.append((event.step, time.perf_counter(), of_process("RssAnon")))
    (first, begun, early), (last, ended, end) = late[0], late[-1]
    return {"ms_per_update": 1000 * (ended - begun) / (last - first), "opened_mb": opened, "middle_mb": early, "end_mb": end}


def scaling(args, place: Path):
    for faces in (2_000, 200_000):
        (place / str(faces)).mkdir()
        yield {"way": "training", "faces": faces} | in_a_process(training, faces, place / str(faces))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    works = {work.__name__: work for work in (train, data, infer, scaling)}
    parser.add_argument("what", choices=works)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="of each way in each round, and at least two calls")
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--preset", default="report", choices=["report", "sharp"], help="train")
    parser.add_argument("--hr-size", type=int, help="train; default: the preset's")
    parser.add_argument("--batch", type=int, default=4, help="train")
    parser.add_argument("--memory", action="store_true", help="train: peak memory, too, each way in a process of its own")
    parser.add_argument("--beside", metavar="FILE", help="train: another version of srgan_utils.py")
    parser.add_argument("--without", nargs="*", metavar="MEASURE", help=f"train; default: all of {', '.join(MEASURES)}")
    parser.add_argument("--faces", metavar="FOLDER", help="data: JPEGs; default: drawn ones")
    args, rows = parser.parse_args(), [srgan._environment() | {"machine": platform.machine()}]
    print(", ".join(f"{name} {value}" for name, value in rows[0].items()))
    with tempfile.TemporaryDirectory() as place:
        for row in works[args.what](args, Path(place)):
            cells = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
            print("  ".join(cells), flush=True)
            rows.append(row)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
