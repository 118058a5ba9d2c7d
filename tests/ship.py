"""Turn a run into the weights that the project ships: `python tests/ship.py RUN --store FACES --data WORDS`.

Writes weights/srgan-xS.safetensors and its pixel-loss parent, srgan-xS-pixel.safetensors, in half precision, with what they
were trained with and what they reach on the test faces in their headers, and prints that.
"""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import srgan_utils as srgan

ROOT = Path(srgan.__file__).parent


def ship(source: Path, target: Path, store: srgan.FaceStore, data: str) -> None:
    generator, config, about = srgan.load_generator(source)
    half = generator.half()
    kept = {key: about[key] for key in ("update", "environment")} | {"data": about["data"] | {"source": data}}
    commit = subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True).strip()
    srgan.export_generator(target, half, config)
    generator, _, _ = srgan.load_generator(target)  # as its users will have it
    metrics = srgan.summarise(srgan.evaluate(generator, config, store, store.indices("test")), config, "test")
    srgan.export_generator(target, half, config, **kept, metrics=metrics, commit=commit, licence="MIT")
    print(f"{target.name}, {target.stat().st_size / 1e6:.1f} MB\n{srgan.results_table(metrics)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--store", required=True)
    parser.add_argument("--data", required=True, help="what the faces are, for the header")
    args = parser.parse_args()
    store = srgan.FaceStore(args.store)
    _, config, _ = srgan.load_generator(args.run / "generator.safetensors")
    (ROOT / "weights").mkdir(exist_ok=True)
    for name, ending in (("pretrained", "-pixel"), ("generator", "")):
        ship(args.run / f"{name}.safetensors", ROOT / "weights" / f"srgan-x{config.scale}{ending}.safetensors", store, args.data)


if __name__ == "__main__":
    main()
