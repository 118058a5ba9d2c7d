"""Why `sharp` is as it is: one choice changed at a time, equal updates, measured on faces that training never sees.

    python tests/ablation.py --store FACES --out FOLDER [--only NAME ...] [--seeds N] [--json FILE]

Each row is a run of the project's own `train` at 8x with 64-px patches in batches of 8, 1,000 updates of pre-training and 500
adversarial ones, in a folder of its own: stopped, it continues where it was; finished, it is only measured. Measured on the
validation faces (the test faces are kept for the final figures), as `compare` does; prints the table for docs/ablation.md.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import srgan_utils as srgan

BASE = {"scale": 8, "patch_size": 64, "batch_size": 8, "pretrain_steps": 1_000, "steps": 500, "ramp_steps": 100}
COLUMNS = ("psnr_rgb", "ssim_rgb", "psnr_y", "ssim_y", "sharpness", "checkerboard", "flat_energy", "detail_correlation")


def rows() -> dict[str, dict]:
    """What each row changes in `sharp`."""
    changes, sharp = {"sharp": {}}, srgan.Config()
    for shared, icnr, upsampling in itertools.product((False, True), (True, False), ("shuffle", "resize", "blur")):
        row = {"shared_upsampling": shared, "icnr": icnr, "upsampling": upsampling}
        if icnr and upsampling == "resize" or all(getattr(sharp, field) == value for field, value in row.items()):
            continue  # ICNR is for the pixel shuffle
        changes[f"{'shared' if shared else 'separate'}, {'ICNR' if icnr else 'default'}, {upsampling}"] = row
    return changes | {
        "without the bicubic skip": {"skip": False},
        "without EMA": {"ema": 0.0},
        "without the ramp": {"ramp_steps": 0},
        "without feature matching": {"content": "pixel", "content_weight": 1.0},
    } | {f"adversarial weight {weight}": {"adversarial_weight": weight} for weight in (0.005, 0.03, 0.3)}


def measured(store: srgan.FaceStore, folder: Path, changes: dict) -> dict:
    """Train the run in `folder`, or what is left of it; its means over the validation faces, and those of its parent."""
    for _ in srgan.progress_bar(srgan.train(store, folder, "sharp", BASE | changes)):
        pass
    means = {}
    for name in ("pretrained", "generator"):
        generator, config, _ = srgan.load_generator(folder / f"{name}.safetensors")
        found = srgan.summarise(srgan.evaluate(generator, config, store, store.indices("validation")), config, "validation")
        means[name] = found["srgan"] | found["added"]
    return means | {"bicubic": found["bicubic"], "hr": found["hr"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--only", nargs="+", choices=list(rows()), metavar="ROW", help="; ".join(map(repr, rows())))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    store, kept = srgan.FaceStore(args.store), {}
    print(srgan._environment())
    for number, name in enumerate(rows()):
        for seed in range(args.seeds if name in (args.only or rows()) else 0):
            found = measured(store, args.out / f"{number:02}-{seed}", rows()[name] | {"seed": seed})
            kept.setdefault(name, []).append(found)
            for part in ("pretrained", "generator"):
                cells = " | ".join(f"{found[part][key]:.3f}" for key in COLUMNS)
                print(f"| {name}, seed {seed} | {part} | {cells} |", flush=True)
            if args.json:
                args.json.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
