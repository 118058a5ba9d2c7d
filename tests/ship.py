"""From portraits to weights: how the networks in weights/ were made, for anyone who has the photos.

    python tests/crops.py PORTRAITS crops
    python srgan_utils.py prepare crops --store store
    python srgan_utils.py train --store store --run run --scale 8 --set vgg=vgg16-features.safetensors
    python tests/ship.py run --store FACES --data WORDS [--name srgan-x8]

The last writes weights/NAME.safetensors and its faithful parent, NAME-pixel.safetensors, in half precision. Their headers say
what they were trained on (WORDS), for how long, and what they reach on the test faces of FACES. It prints that, too.
"""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import srgan_utils as srgan

ROOT = Path(srgan.__file__).parent


def ship(source: Path, target: Path, store: srgan.FaceStore, data: str) -> None:
    generator, _, about = srgan.load_generator(source)
    config = srgan.Config.from_dict(about["config"])
    srgan.export_generator(target, generator.half(), config)
    shipped, _, _ = srgan.load_generator(target)  # as its users will have it
    metrics = srgan.summarise(srgan.evaluate(shipped, config, store, store.indices("test")), config, "test")
    commit = subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True).strip()
    kept = {"data": about["data"] | {"source": data}, "update": about["update"], "environment": about["environment"]}
    srgan.export_generator(target, generator, config, **kept, metrics=metrics, commit=commit, licence="MIT")
    print(f"{target.name}, {target.stat().st_size / 1e6:.1f} MB\n{srgan.results_table(metrics)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--store", type=srgan.FaceStore, required=True)
    parser.add_argument("--data", required=True, help="what it was trained on, with the licences")
    parser.add_argument("--name", help="default: srgan-xS")
    args = parser.parse_args()
    scale = srgan.load_generator(args.run / "generator.safetensors")[1].scale
    target = ROOT / "weights" / f"{args.name or f'srgan-x{scale}'}.safetensors"
    ship(args.run / "pretrained.safetensors", target.with_stem(f"{target.stem}-pixel"), args.store, args.data)
    ship(args.run / "generator.safetensors", target, args.store, args.data)


if __name__ == "__main__":
    main()
