"""What things cost, measured: `python tests/benchmark.py WHAT` says the machine and the versions, then a line for each way.

    train     updates per second: the report's way, written plainly (reference.py), beside this project, taking turns.
              --beside FILE: the whole `train` of another version of srgan_utils.py takes turns with ours
              (`git show COMMIT:srgan_utils.py > FILE`)
    prepare   faces per second beside JPEG decoding alone, and batches beside the report's way of reading photos
    upscale   a photo of 512 x 384 px, by the network alone in fp32 and by this project

`--json FILE` keeps all that is said. Speeds are medians over the rounds, with their extremes.
"""

import argparse
import importlib.util
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
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


def seconds_of(way, seconds: float) -> float:
    """Seconds of one turn of `way`, over at least `seconds` and two calls; a call may return how many turns it was."""
    begun, turns, calls = time.perf_counter(), 0, 0
    while time.perf_counter() - begun < seconds or calls < 2:
        turns, calls = turns + (way() or 1), calls + 1
        if calls % 50 == 0:
            wait()
    wait()
    return (time.perf_counter() - begun) / turns


def measured(args, ways: dict, per_turn: int = 1):
    """A row for each way, which take turns: how much of what a turn makes a second gives. First calls are not counted."""
    for way in ways.values():
        seconds_of(way, 0)
    taken = {name: [] for name in ways}
    for _, (name, way) in itertools.product(range(args.rounds), ways.items()):
        taken[name].append(per_turn / seconds_of(way, args.seconds))
    first = statistics.median(next(iter(taken.values())))
    for name, speeds in taken.items():
        median = statistics.median(speeds)
        yield {"way": name, "per_s": median, "slowest": min(speeds), "fastest": max(speeds), "times_the_first": median / first}


def drawn_photos(folder: Path, count: int) -> list[Path]:
    """So many JPEGs of drawn faces, 178 x 218 px as CelebA's."""
    folder.mkdir()
    for number in range(count):
        srgan.save_image(srgan.bicubic(srgan.synthetic_face(number), (218, 178)), folder / f"{number:06}.jpg")
    return sorted(folder.iterdir())


def plain_batches(config: srgan.Config, photos: list[Path]):
    faces = ReferenceFaces(photos, config.hr_size, config.scale)
    loader = DataLoader(faces, config.batch_size, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True)
    return itertools.chain.from_iterable(itertools.repeat(loader))


# --- train


def plain_way(config: srgan.Config, place: Path):
    """One update of the report's way at each call: fp32, channels first, PIL per image in a DataLoader."""
    vgg = torch.nn.Sequential(*list(srgan.VGGFeatures(config).network.children())[:19]).requires_grad_(True)
    training = ReferenceTraining(config.scale, config.hr_size, vgg, DEVICE)
    batches = plain_batches(config, sorted((place / "photos").iterdir()))
    return lambda: training.update(*(each.to(DEVICE) for each in next(batches))) and 1


def our_way(config: srgan.Config, place: Path):
    """One update of this project at each call, its losses fetched as seldom as `train` does."""
    store, state = srgan.prepare(place / "photos", place / "store"), srgan.TrainState(config, DEVICE)
    store.keep_on(DEVICE if ON_GPU else None)
    pending, together = [], 50 if ON_GPU else 1

    def update():
        pending.append(srgan._one_update(state, *srgan.batch(store, config, state.update, DEVICE)))
        if len(pending) == together:
            torch.stack([torch.stack(list(losses.values())) for losses in pending]).tolist()
            pending.clear()
    return update


def whole_way(file: str, name: str, config: srgan.Config, place: Path):
    """About a second of the `train` in `file` at each call, with its reports, strips and checkpoints."""
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plain, done = asdict(srgan.Config.preset(config.preset_name)), [0]
    changes = {field: value for field, value in asdict(config).items() if value != plain[field]}
    store = module.prepare(place / "photos", place / f"{name}-store")
    events = module.train(store, place / name, config.preset_name, changes)

    def advance():
        done.append(next(events).step)
        return done[-1] - done[-2]
    return advance


def train(args, place: Path):
    drawn_photos(place / "photos", 32)
    changes = {"hr_size": args.hr_size} if args.hr_size else {}
    if args.preset == "sharp":
        changes["pretrain_steps"] = 0  # the adversarial stage, as the report's
    changes |= {"scale": args.scale, "batch_size": args.batch, "precision": srgan._resolve_precision("auto", DEVICE)}
    config = srgan.Config.preset(args.preset, vgg="random", **changes).for_faces(100_000)
    ways = {"ours": our_way(config, place)}
    if args.preset == "report":
        ways = {"reference": plain_way(config, place)} | ways
    if args.beside:
        ways |= {"beside, whole": whole_way(args.beside, "beside", config, place),
                 "ours, whole": whole_way(srgan.__file__, "whole", config, place)}
    with FlopCounterMode(display=False) as counter:
        ways["ours"]()
    yield {"preset": args.preset, "scale": config.scale, "px": config.patch, "batch": args.batch, "precision": config.precision,
           "flop_per_update": counter.get_total_flops()}
    for row in measured(args, ways):
        yield row | {"images_per_s": args.batch * row["per_s"]}


# --- prepare and upscale


def prepare(args, place: Path):
    photos = sorted(Path(args.faces).glob("*.jpg")) if args.faces else drawn_photos(place / "photos", 600)
    folder = photos[0].parent
    with ThreadPoolExecutor() as pool:
        ways = {"JPEGs decoded alone": lambda: list(pool.map(lambda path: Image.open(path).load() and None, photos)) and 1,
                "prepare": lambda: srgan.prepare(folder, place / f"store-{time.time_ns()}") and 1}
        yield from measured(argparse.Namespace(rounds=args.rounds, seconds=0), ways, len(photos))
    store = srgan.prepare(folder, place / "store")
    store.keep_on(DEVICE if ON_GPU else None)
    for preset, size in (("report", 8), ("sharp", 16)):
        config = srgan.Config.preset(preset, batch_size=size)
        batches, updates = plain_batches(config, photos), itertools.count()
        ways = {"reference": lambda: [each.to(DEVICE) for each in next(batches)] and 1,
                "ours": lambda: srgan.batch(store, config, next(updates), DEVICE) and 1}
        for row in measured(args, ways, size):
            yield {"preset": preset, "hr_size": config.hr_size, "batch": size} | row


@torch.no_grad()
def upscale(args, place: Path):
    lr, made = srgan.bicubic(srgan.synthetic_face(0), (384, 512)), {}
    for preset in ("report", "sharp"):
        config = srgan.Config.preset(preset, scale=args.scale, precision=srgan._resolve_precision("auto", DEVICE))
        generator, fp32 = srgan.Generator(config).eval().to(DEVICE), replace(config, precision="fp32")
        ways = {"reference": lambda: made.update(reference=srgan.quantise(generator(lr.to(DEVICE))).cpu()),
                "ours": lambda: made.update(ours=srgan.upscale(lr, generator, config)),
                "ours in fp32": lambda: made.update({"ours in fp32": srgan.upscale(lr, generator, fp32)})}
        for row in measured(args, ways):
            levels = 255 * (made[row["way"]] - made["reference"]).abs().max().item()
            yield {"preset": preset, "scale": args.scale, "precision": config.precision} | row | {"levels_off": levels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    works = {work.__name__: work for work in (train, prepare, upscale)}
    parser.add_argument("what", choices=works)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="of each way in each round, and at least two calls")
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--preset", default="report", choices=["report", "sharp"], help="train")
    parser.add_argument("--hr-size", type=int, help="train; default: the preset's")
    parser.add_argument("--batch", type=int, default=4, help="train")
    parser.add_argument("--beside", metavar="FILE", help="train: another version of srgan_utils.py")
    parser.add_argument("--faces", metavar="FOLDER", help="prepare: JPEGs; default: drawn ones")
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
