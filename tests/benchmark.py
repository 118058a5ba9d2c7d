"""What things cost, measured: `python tests/benchmark.py WHAT`; prints a table, no test.

    train     updates per second: the report's way, written plainly (reference.py), against this project, alternating, and
              this project against itself with one measure switched off at a time; where the time goes
    data      faces prepared per second beside JPEG decoding alone, and batches beside the report's way of reading photos
    infer     a photo enlarged, with one measure switched off at a time, and one of 12 megapixels with its peak memory
    startup   what importing the module costs beside importing torch
    scaling   time of an update, and private memory while preparing and training, with few faces and many
    backup    how long training waits for a checkpoint of the `report` networks and its copy to a slow Drive

`--json FILE` (train, data, infer, scaling) keeps the rows. Medians, with the extremes where there are several.
"""

import argparse
import hashlib
import itertools
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
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


def keep(args, rows: list[dict]) -> None:
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))


def of_process(what: str) -> int:
    """Bytes of this process by Linux's account. (getrusage's peak is that of the parent, too.)"""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0])


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(work, seconds: float, device: torch.device) -> float:
    """Seconds of one call of `work`, over at least `seconds` and two calls."""
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds or count < 2:
        work()
        count += 1
        if count % 50 == 0:
            wait_for(device)
    wait_for(device)
    return (time.perf_counter() - begun) / count


def measured(ways: dict, rounds: int, seconds: float, device: torch.device) -> dict:
    """Median and extremes of the seconds of one call of each way, taking turns; the first call of each does not count."""
    for way in ways.values():
        way()
        wait_for(device)
    taken = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            taken[name].append(seconds_of(way, seconds, device))
    return {name: (statistics.median(each), min(each), max(each)) for name, each in taken.items()}


def drawn_photos(folder: Path, count: int) -> list[Path]:
    """So many JPEGs of synthetic faces, 178 x 218 px as CelebA's."""
    from PIL import Image

    folder.mkdir()
    for number in range(count):
        pixels = (srgan.bicubic(srgan.synthetic_face(number), (218, 178)).clamp(0, 1)[0] * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number:06}.jpg", quality=95)
    return sorted(folder.iterdir())


# --- train

MEASURES = ("bf16 or fp16", "channels last", "fused Adam", "frozen VGG19", "frozen discriminator", "one generator pass",
            "losses fetched seldom", "eager")


def plain_way(config: srgan.Config, photos: list, device: torch.device):
    """One update of the report's way at each call: fp32, channels first, PIL per image in a DataLoader."""
    vgg = torch.nn.Sequential(*list(srgan.VGGFeatures(config).network.children())[:19]).requires_grad_(True)
    training = ReferenceTraining(config.scale, config.hr_size, vgg, device)
    batches = plain_batches(config, photos)
    return lambda: training.update(*(each.to(device) for each in next(batches)))


def plain_batches(config: srgan.Config, photos: list):
    faces = ReferenceFaces(photos, config.hr_size, config.scale)
    loader = DataLoader(faces, config.batch_size, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def our_way(config: srgan.Config, folder: Path, device: torch.device, without: str = ""):
    """One update of this project at each call, its losses fetched as `train` does; `without` one of MEASURES."""
    if without == "bf16 or fp16":
        config = replace(config, precision="fp32")
    if without == "eager":
        config = replace(config, compile=True)
    store = srgan.FaceStore(folder)
    state = srgan._created(config, store)
    if without == "channels last":
        for network in (state.generator, state.discriminator, state.vgg):
            network.to(memory_format=torch.contiguous_format)
    if without == "fused Adam":
        srgan._one_update(state, store)  # where the adversarial stage begins, its optimiser is made
        for optimizer in (state.g_optimizer, state.d_optimizer):
            optimizer.param_groups[0].update(fused=False, foreach=False)
    if without == "frozen VGG19":
        state.vgg.requires_grad_(True)
    if without == "frozen discriminator":
        state.discriminator.requires_grad_ = lambda _: None
    twice, seldom = without == "one generator pass", without != "losses fetched seldom" and device.type == "cuda"
    pending = []

    def update():
        if twice:
            with state.autocast():
                state.generator(srgan.batch(store, config, state.update, device)[0])
        pending.append(srgan._one_update(state, store))
        if len(pending) == (50 if seldom else 1):
            torch.stack([torch.stack(list(losses.values())) for losses in pending]).tolist()
            pending.clear()
    return update


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    a = torch.randn(4096, 4096, device=device, dtype=dtype)
    return 2 * 4096 ** 3 / min(seconds_of(lambda: a @ a, 1, device) for _ in range(3))


def peak_memory(way, *given) -> int:
    """Bytes that two updates of `way(*given)` need at most, in a process of its own: of the GPU, else of all memory."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_peak_memory, way, *given).result()


def _peak_memory(way, *given) -> int:
    work = way(*given)
    work()
    work()
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else of_process("VmHWM")


def where_time_goes(work, device: torch.device) -> list[tuple[str, float]]:
    """Share of the six costliest operators of an update."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=kinds) as profiler:
        for _ in range(10 if device.type == "cuda" else 1):
            work()
        wait_for(device)
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = [(each.key, getattr(each, name)) for each in profiler.key_averages()]
    total = sum(value for _, value in rows)
    return [(key, value / total) for key, value in sorted(rows, key=lambda row: -row[1])[:6]]


def train_row(args, preset: str, batch: int, place: Path) -> dict:
    from torch.utils.flop_counter import FlopCounterMode

    device = srgan.pick_device()
    changes = {"scale": args.scale, "batch_size": batch, "vgg": "random"} | ({"hr_size": args.hr_size} if args.hr_size else {})
    if preset == "sharp":
        changes["pretrain_steps"] = 0  # the adversarial stage, as the report's
    config = srgan.Config.preset(preset, **changes).for_faces(1000)
    config = replace(config, precision=srgan.resolve_precision("auto", device), compile=False)
    folder, photos = place / "store", sorted((place / "photos").iterdir())
    ways = {"reference": plain_way(config, photos, device)} if preset == "report" else {}
    ways["ours"] = our_way(config, folder, device)
    found = measured(ways, args.rounds, args.seconds, device)
    with FlopCounterMode(display=False) as counter:
        ways["ours"]()
    top = ceiling(device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision, torch.float32))
    flop, ours = counter.get_total_flops(), found["ours"][0]
    goes = where_time_goes(ways["ours"], device)
    ways.clear()
    memory = {"ours": peak_memory(our_way, config, folder, device)}
    if preset == "report":
        memory["reference"] = peak_memory(plain_way, config, photos, device)
    row = {"preset": preset, "scale": config.scale, "hr_size": config.hr_size, "batch": batch, "device": str(device),
           "precision": config.precision, "vgg": "random" if config.content == "vgg" else "none",
           "reference": {"updates_per_s": 1 / found["reference"][0]} if preset == "report" else None,
           "ours": {"updates_per_s": 1 / ours, "images_per_s": batch / ours, "share_of_bound": flop / ours / top},
           "ratio": found["reference"][0] / ours if preset == "report" else None,
           "flop_per_update": flop, "ceiling_flop_per_s": top, "peak_memory": memory, "where_time_goes": goes,
           "without": {}}
    print(f"\n{preset} {config.scale}x, {config.patch} px, batch {batch}, {config.precision}, vgg={row['vgg']}; one update: "
          f"{flop / 1e12:.3f} TFLOP; a matrix product reaches {top / 1e12:.2f} TFLOP/s, ours {flop / ours / top:.0%} of that")
    for name, (middle, low, high) in found.items():
        print(f"  {name:<30} {1 / middle:8.3f} updates/s ({1 / high:.3f} to {1 / low:.3f}), {batch / middle:8.2f} images/s, "
              f"peak memory {memory[name] / 1e9:.1f} GB")
    print("  time goes into " + ", ".join(f"{key} {share:.0%}" for key, share in goes), flush=True)
    there = [name for name in MEASURES if device.type == "cuda" or name not in ("losses fetched seldom", "eager")]
    for name in there if args.without is None else args.without:
        if name == "frozen VGG19" and config.content != "vgg":
            continue
        pair = {"ours": our_way(config, folder, device), name: our_way(config, folder, device, name)}
        both = measured(pair, args.rounds, args.seconds, device)
        row["without"][name] = {"updates_per_s": 1 / both[name][0], "gain": both[name][0] / both["ours"][0]}
        print(f"  not {name:<26} {1 / both[name][0]:8.3f} updates/s, ours beside it {1 / both['ours'][0]:8.3f}: "
              f"gains {both[name][0] / both['ours'][0]:.2f} times", flush=True)
        del pair
    return row


def train(args) -> None:
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        drawn_photos(place / "photos", 100)
        srgan.prepare(place / "photos", place / "store")
        keep(args, [train_row(args, preset, batch, place) for preset in args.preset for batch in args.batch])


# --- data


def jpeg_decoding_alone(files: list[bytes]) -> float:
    """Images per second on all cores, decoded by Pillow and thrown away."""
    import io
    import os
    from concurrent.futures import ThreadPoolExecutor

    from PIL import Image

    groups = [files[start:start + 8] for start in range(0, len(files), 8)]
    begun = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda group: [Image.open(io.BytesIO(each)).load() for each in group], groups))
    return len(files) / (time.perf_counter() - begun)


def preparing(args, photos: list[Path], place: Path) -> dict:
    rates, alone = [], []
    for number in range(args.rounds):
        files = [path.read_bytes() for path in photos]
        alone.append(jpeg_decoding_alone(files))
        begun = time.perf_counter()
        srgan.prepare(photos[0].parent, place / f"store{number}")
        rates.append(len(photos) / (time.perf_counter() - begun))
    middle, decoded = statistics.median(rates), statistics.median(alone)
    print(f"{len(photos)} photos of {statistics.mean(map(len, files)) / 1000:.0f} kB: prepared {middle:.0f} per second "
          f"({min(rates):.0f} to {max(rates):.0f}); decoding alone {decoded:.0f}")
    return {"kind": "prepare", "photos": len(photos), "faces_per_s": middle, "decoding_alone": decoded}


def feeding(args, config: srgan.Config, photos: list[Path], store: srgan.FaceStore, device: torch.device) -> dict:
    """Batches of `config`, ours and by the report's way, none of them used."""
    updates, batches = itertools.count(), plain_batches(config, photos)
    if device.type == "cuda":
        store.keep_on(device)
    found = measured({"reference": lambda: [each.to(device) for each in next(batches)],
                      "ours": lambda: srgan.batch(store, config, next(updates), device)}, args.rounds, args.seconds, device)
    plain, ours = (config.batch_size / found[name][0] for name in ("reference", "ours"))
    print(f"{config.preset_name}, {config.hr_size} px, batches of {config.batch_size}: ours {ours:.0f} images/s "
          f"({1000 * found['ours'][0]:.2f} ms a batch), DataLoader {plain:.0f}: {ours / plain:.1f} times")
    return {"kind": "feed", "preset": config.preset_name, "hr_size": config.hr_size, "batch": config.batch_size,
            "device": str(device), "reference": {"images_per_s": plain}, "ours": {"images_per_s": ours}, "ratio": ours / plain}


def data(args) -> None:
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        photos = sorted(Path(args.faces).glob("*.jpg")) if args.faces else drawn_photos(place / "photos", 600)
        (place / "many").mkdir()
        for copy, path in itertools.product(range(max(1, args.photos // len(photos))), photos):
            shutil.copyfile(path, place / "many" / f"{copy}-{path.name}")
        rows = [preparing(args, sorted((place / "many").iterdir()), place)]
        store = srgan.FaceStore(place / "store0")
        for preset, batch in (("report", 8), ("sharp", 16)):
            config = srgan.Config.preset(preset, batch_size=batch).for_faces(1000)
            rows.append(feeding(args, config, photos, store, srgan.pick_device()))
        keep(args, rows)


# --- infer


def plainly(lr: torch.Tensor, generator: srgan.Generator, config: srgan.Config) -> torch.Tensor:
    """Tile by tile in fp32, channels first, with BatchNorm: what `upscale` would be without its measures."""
    margin, scale, tile = srgan.receptive_radius(config), config.scale, 1024 // config.scale
    rows = []
    for y in range(0, lr.shape[-2], tile):
        row = []
        for x in range(0, lr.shape[-1], tile):
            top, left = max(0, y - margin), max(0, x - margin)
            sr = generator(lr[..., top:y + tile + margin, left:x + tile + margin])[..., (y - top) * scale:, (x - left) * scale:]
            row.append(sr[..., :tile * scale, :tile * scale].cpu())
        rows.append(torch.cat(row, dim=-1))
    return srgan.quantise(torch.cat(rows, dim=-2))


@torch.no_grad()
def enlarging(args, preset: str, device: torch.device) -> dict:
    config = srgan.Config.preset(preset, scale=args.scale, precision=srgan.resolve_precision("auto", device))
    torch.manual_seed(0)
    generator = srgan.Generator(config).eval().to(device)
    for module in generator.modules():  # statistics that are not those of a fresh network
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    lr = srgan.quantise(srgan.bicubic(srgan.synthetic_face(0), (384, 512)).clamp(0, 1))
    ways = {"reference": lambda: plainly(lr.to(device), generator, config), "ours": lambda: srgan.upscale(lr, generator, config),
            "ours in fp32": lambda: srgan.upscale(lr, generator, replace(config, precision="fp32"))}
    difference = {name: (ways[name]() - ways["reference"]()).abs().max().item() * 255 for name in ("ours", "ours in fp32")}
    found = measured(ways, args.rounds, args.seconds, device)
    print(f"{preset} {config.scale}x, 512 x 384 px, {config.precision}")
    for name, (middle, low, high) in found.items():
        also = f"; at most {difference[name]:.0f} of 255 from the reference" if name in difference else ""
        print(f"  {name:<20} {middle:6.2f} s ({low:.2f} to {high:.2f}), {0.197 / middle:.3f} LR megapixels/s{also}", flush=True)
    return {"preset": preset, "scale": config.scale, "device": str(device), "precision": config.precision,
            "reference": {"seconds": found["reference"][0]}, "ours": {"seconds": found["ours"][0]},
            "ours_fp32": {"seconds": found["ours in fp32"][0]}, "ratio": found["reference"][0] / found["ours"][0]}


def _peak_of_command(command: list[str]) -> int:
    assert srgan.main(command) == 0
    return of_process("VmHWM")


def large_photo(args, place: Path) -> dict:
    """The command `upscale` on a photo of 4000 x 3000 px, in a process of its own."""
    config = srgan.Config.preset("sharp", scale=args.scale, precision=srgan.resolve_precision("auto", srgan.pick_device()))
    srgan.export_generator(place / "g.safetensors", srgan.Generator(config), config)
    srgan.save_image(srgan.bicubic(srgan.synthetic_face(0), (3000, 4000)), place / "photo.jpg")
    begun = time.perf_counter()
    command = ["upscale", str(place / "photo.jpg"), "--weights", str(place / "g.safetensors"), "--out", str(place)]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        peak = pool.submit(_peak_of_command, command).result()
    seconds = time.perf_counter() - begun
    print(f"sharp {args.scale}x, 12 megapixels to {12 * args.scale ** 2}, photo to PNG: {seconds:.0f} s, "
          f"peak memory {peak / 1e9:.1f} GB")
    return {"preset": "sharp", "scale": args.scale, "megapixels": 12, "seconds": seconds, "peak_bytes": peak}


def infer(args) -> None:
    print(machine())
    rows = [enlarging(args, preset, srgan.pick_device()) for preset in ("report", "sharp")]
    with tempfile.TemporaryDirectory() as place:
        rows.append(large_photo(args, Path(place)))
    keep(args, rows)


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


# --- scaling


def private() -> float:
    """Memory of this process that is not mapped from files, MB."""
    return of_process("RssAnon") / 1e6


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


def peak_while(events, count: int) -> tuple[float, float]:
    """Most private memory until update number `count`, MB, and the milliseconds of an update on the way."""
    most, begun, first = 0.0, time.perf_counter(), None
    for event in events:
        if first is None:
            begun, first = time.perf_counter(), event.step
        most = max(most, private())
        if event.step >= count:
            break
    return most, 1000 * (time.perf_counter() - begun) / max(1, event.step - first)


def memory_of_training(rows: int, updates: int) -> dict:
    changes = {"hr_size": 32, "patch_size": 32, "channels": 8, "residual_blocks": 1, "batch_size": 4, "precision": "fp32",
               "pretrain_steps": updates // 2, "steps": updates // 2, "save_steps": 200, "sample_steps": 200}
    with tempfile.TemporaryDirectory() as place:
        store = sparse_store(Path(place) / "store", rows)
        opened = private()
        events = srgan.train(store, Path(place) / "run", "sharp", changes)
        early, _ = peak_while(events, updates // 2 + 100)
        late, milliseconds = peak_while(events, updates)
        events.close()
    return {"faces": rows, "store opened": opened, f"until update {updates // 2 + 100}": early, f"until update {updates}": late,
            "ms per update": milliseconds}


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


def scaling(args) -> None:
    """One measurement in each process, so that none has what another left."""
    print(machine() + "; private memory, MB")
    kept = []
    for work, sizes in ((memory_of_preparing, [(2_000,), (args.rows,)]),
                        (memory_of_training, [(200, args.updates), (args.rows, args.updates)])):
        for given in sizes:
            with get_context("spawn").Pool(1) as pool:
                row = pool.apply(work, given)
            print(f"{work.__name__}: {json.dumps({name: round(value, 1) for name, value in row.items()})}", flush=True)
            kept.append({"kind": work.__name__} | row)
    keep(args, kept)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    commands = {work.__name__: kinds.add_parser(work.__name__) for work in (train, data, infer, startup, scaling, backup)}
    for work in (train, data, infer, startup, scaling, backup):
        commands[work.__name__].set_defaults(work=work)
    for name in ("train", "data", "infer", "scaling"):
        commands[name].add_argument("--json", metavar="FILE")
    for name in ("train", "data", "infer"):
        commands[name].add_argument("--rounds", type=int, default=3)
        commands[name].add_argument("--seconds", type=float, default=5, help="of each way in each round, and at least two calls")
    for name in ("train", "infer"):
        commands[name].add_argument("--scale", type=int, default=4)
    commands["train"].add_argument("--preset", nargs="+", default=["report"], choices=["report", "sharp"])
    commands["train"].add_argument("--hr-size", type=int, help="default: the preset's")
    commands["train"].add_argument("--batch", type=int, nargs="+", default=[4])
    commands["train"].add_argument("--without", nargs="*", metavar="MEASURE",
                                   help=f"default: all that are in use; {', '.join(MEASURES)} (which stands for torch.compile)")
    commands["data"].add_argument("--faces", metavar="FOLDER", help="JPEGs; default: drawn ones")
    commands["data"].add_argument("--photos", type=int, default=3000, help="about how many are prepared (copies, if need be)")
    commands["backup"].add_argument("--seconds", type=float, default=120, help="what the copy of 1.7 GB takes")
    commands["backup"].add_argument("--updates", type=int, default=60)
    commands["scaling"].add_argument("--rows", type=int, default=200_000)
    commands["scaling"].add_argument("--updates", type=int, default=2_000)
    args = parser.parse_args()
    args.work(args)


if __name__ == "__main__":
    main()
