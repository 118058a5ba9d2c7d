"""Turn a run into the weights that the project ships: `python tests/ship.py RUN --store FACES --data WORDS [--amount A]`.

Writes weights/srgan-xS.safetensors and its pixel-loss parent, srgan-xS-pixel.safetensors, in half precision, with what they
were trained with and what they reach on the test faces in their headers, and prints that. The final network is that of the
run, or, with --amount above 1, one that goes so many times as far from its parent, in the same direction.
"""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import srgan_utils as srgan

ROOT = Path(srgan.__file__).parent


def ship(source: Path, target: Path, store: srgan.FaceStore, data: str, amount: float = 1.0) -> None:
    generator, config, about = srgan.load_generator(source, amount=amount)
    kept = {key: about[key] for key in ("update", "environment")} | {"data": about["data"] | {"source": data}, "amount": amount}
    commit = subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True).strip()
    srgan.export_generator(target, generator.half(), config)
    shipped, _, _ = srgan.load_generator(target)  # as its users will have it
    metrics = srgan.summarise(srgan.evaluate(shipped, config, store, store.indices("test")), config, "test")
    srgan.export_generator(target, generator, config, **kept, metrics=metrics, commit=commit, licence="MIT")
    print(f"{target.name}, {target.stat().st_size / 1e6:.1f} MB\n{srgan.results_table(metrics)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--store", type=srgan.FaceStore, required=True)
    parser.add_argument("--data", required=True, help="what the faces are, for the header")
    parser.add_argument("--amount", type=float, default=1.0, help="how far from its parent the final network goes (its own: 1)")
    args = parser.parse_args()
    target = ROOT / "weights" / f"srgan-x{srgan.load_generator(args.run / 'generator.safetensors')[1].scale}.safetensors"
    target.parent.mkdir(exist_ok=True)
    ship(args.run / "pretrained.safetensors", target.with_stem(f"{target.stem}-pixel"), args.store, args.data)
    ship(args.run / "generator.safetensors", target, args.store, args.data, args.amount)


if __name__ == "__main__":
    main()
