"""What training costs, measured: `python tests/benchmark.py train` says the machine and the versions, then a line for each way.

Updates per second of the report's way, written plainly (reference.py), beside this project, taking turns. `--beside FILE`: the
whole `train` of another version of srgan_utils.py takes turns with ours (`git show COMMIT:srgan_utils.py > FILE`).
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
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from reference import ReferenceFaces, ReferenceTraining
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import srgan_utils as srgan

DEVICE = srgan.pick_device()
ON_GPU = DEVICE.type == "cuda"
wait = torch.cuda.synchronize if ON_GPU else lambda: None


def seconds_of(way, seconds: float) -> float:
    """Seconds of one update by `way`, over at least `seconds` and two calls; a call may return how many updates it was."""
    begun, turns, calls = time.perf_counter(), 0, 0
    while time.perf_counter() - begun < seconds or calls < 2:
        turns, calls = turns + (way() or 1), calls + 1
        if calls % 50 == 0:
            wait()
    wait()
    return (time.perf_counter() - begun) / turns


def measured(args, ways: dict):
    """A row for each way, which take turns. First calls are not counted."""
    for way in ways.values():
        seconds_of(way, 0)
    taken = {name: [] for name in ways}
    for _, (name, way) in itertools.product(range(args.rounds), ways.items()):
        taken[name].append(1 / seconds_of(way, args.seconds))
    first = statistics.median(next(iter(taken.values())))
    for name, speeds in taken.items():
        median = statistics.median(speeds)
        yield {"way": name, "per_s": median, "slowest": min(speeds), "fastest": max(speeds), "times_the_first": median / first,
               "images_per_s": args.batch * median}


def plain_way(config: srgan.Config, place: Path):
    """One update of the report's way at each call: fp32, channels first, PIL per image in a DataLoader."""
    vgg = torch.nn.Sequential(*list(srgan.VGGFeatures(config).network.children())[:19]).requires_grad_(True)
    training = ReferenceTraining(config.scale, config.hr_size, vgg, DEVICE)
    faces = ReferenceFaces(sorted((place / "photos").iterdir()), config.hr_size, config.scale)
    loader = DataLoader(faces, config.batch_size, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
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
    (place / "photos").mkdir()
    for number in range(32):  # as large as CelebA's
        srgan.save_image(srgan.bicubic(srgan.synthetic_face(number), (218, 178)), place / "photos" / f"{number:06}.jpg")
    changes = {"hr_size": args.hr_size} if args.hr_size else {}
    if args.preset == "sharp":
        changes["pretrain_steps"] = 0  # the adversarial stage, as the report's
    changes |= {"scale": args.scale, "batch_size": args.batch, "precision": srgan._resolve_precision("auto", DEVICE)}
    config = srgan.Config.preset(args.preset, vgg="random", **changes).for_faces(100_000)
    ways = {"reference": plain_way(config, place)} if args.preset == "report" else {}
    ways["ours"] = our_way(config, place)
    if args.beside:
        ways |= {"beside, whole": whole_way(args.beside, "beside", config, place),
                 "ours, whole": whole_way(srgan.__file__, "whole", config, place)}
    with FlopCounterMode(display=False) as counter:
        ways["ours"]()
    yield {"preset": args.preset, "scale": config.scale, "px": config.patch, "batch": args.batch, "precision": config.precision,
           "flop_per_update": counter.get_total_flops()}
    yield from measured(args, ways)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train"])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="of each way in each round, and at least two calls")
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--preset", default="report", choices=["report", "sharp"])
    parser.add_argument("--hr-size", type=int, help="default: the preset's")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--beside", metavar="FILE", help="another version of srgan_utils.py")
    args = parser.parse_args()
    rows = [{"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads(),
             "device": torch.cuda.get_device_name() if ON_GPU else "cpu", "machine": platform.machine()}]
    print(", ".join(f"{name} {value}" for name, value in rows[0].items()))
    with tempfile.TemporaryDirectory() as place:
        for row in train(args, Path(place)):
            cells = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
            print("  ".join(cells), flush=True)
            rows.append(row)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
