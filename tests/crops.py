"""Portraits -> a folder of 178-px crops for `prepare`: `python tests/crops.py PORTRAITS OUT`.

Each person of the training set gives several framings, each other person one plain crop. Whose part a person belongs to, the
name of the photo decides; each crop's name is chosen so that `split_of` decides the same. So nobody is on two sides.
PORTRAITS holds the folders named in CENTRES, with one photo a person.
"""

import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from PIL import Image

import srgan_utils as srgan

SIDE = 178
# folder -> where the middle of the face is, as shares of width and height
CENTRES = {"congress": (0.50, 0.42), "house": (0.50, 0.36), "interfaces": (0.48, 0.42),
           "uk2017": (0.50, 0.45), "uk2024": (0.50, 0.42)}


def part_of(name: str) -> int:
    """As `split_of` does for a unique base name: 0 train, 1 validation, 2 test."""
    return int(np.searchsorted([84, 89], zlib.crc32(name.encode()) % 100))


def named(stem: str, number: int, part: int) -> str:
    """stem--number-suffix.png, with the first suffix that puts it into `part`."""
    names = (f"{stem}--{number}-{suffix}.png" for suffix in range(10_000))
    return next(name for name in names if part_of(name) == part)


def plain(photo: Image.Image) -> Image.Image:
    """The centre square, as `prepare` cuts it."""
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    return photo.resize((SIDE, SIDE), Image.BICUBIC, box=(left, top, left + side, top + side))


def recoloured(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another brightness, contrast, saturation and white balance; one in seven is grey. (H, W, 3), 0 to 1."""
    pixels = pixels ** np.exp(rng.uniform(-0.25, 0.25))
    pixels = 0.5 + (pixels - 0.5) * rng.uniform(0.8, 1.1)
    grey = pixels @ np.float32([0.299, 0.587, 0.114])
    if rng.random() < 1 / 7:
        return np.stack([grey] * 3, axis=-1)
    pixels = grey[..., None] + rng.uniform(0.7, 1.2) * (pixels - grey[..., None])
    return pixels * rng.uniform(0.93, 1.07, 3)


def framing(photo: Image.Image, centre: tuple[float, float], rng: np.random.Generator) -> Image.Image:
    """A random square around the face: its size and place, a small rotation, light and colour."""
    shorter = min(photo.size)
    least = min(max(172, 0.52 * shorter), shorter)  # so that a crop is never enlarged by more than a few percent
    side = np.exp(rng.uniform(np.log(least), np.log(shorter)))
    x = centre[0] * photo.width + rng.uniform(-0.14, 0.14) * side
    y = centre[1] * photo.height + rng.uniform(-0.12, 0.16) * side
    x, y = np.clip(x, side / 2, photo.width - side / 2), np.clip(y, side / 2, photo.height - side / 2)
    if side > 1.25 * SIDE and rng.random() < 0.6:  # a photo of few pixels would be blurred by it
        margin = shorter // 4
        photo = Image.fromarray(np.pad(np.asarray(photo), ((margin, margin), (margin, margin), (0, 0)), "reflect"))
        x, y = x + margin, y + margin
        photo = photo.rotate(rng.uniform(-9, 9), Image.BICUBIC, center=(x, y))
    box = np.clip((x - side / 2, y - side / 2, x + side / 2, y + side / 2), 0, photo.size * 2)
    pixels = np.asarray(photo.resize((SIDE, SIDE), Image.BICUBIC, box=tuple(box))).astype(np.float32) / 255
    return Image.fromarray(np.uint8(np.clip(np.round(recoloured(pixels, rng) * 255), 0, 255)))


def count_of(photo: Image.Image, part: int) -> int:
    """How many crops a photo gives: the more pixels it has, the more framings."""
    if part != 0:
        return 1
    if min(photo.size) >= 400:
        return 6
    return 4 if min(photo.size) >= 220 else 2


def main(portraits: str, out: str) -> None:
    folder, parts = Path(out), {}
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(path for name in CENTRES for path in Path(portraits, name).iterdir()):
        part, photo = part_of(path.name), Image.open(path).convert("RGB")
        assert path.stem not in parts, "names must be unique"
        parts[path.stem], rng = part, np.random.default_rng(zlib.crc32(path.name.encode()))
        for number in range(count_of(photo, part)):
            crop = plain(photo) if number == 0 else framing(photo, CENTRES[path.parent.name], rng)
            crop.save(folder / named(path.stem, number, part), compress_level=1)
    names = sorted(path.name for path in folder.iterdir())
    assert all(parts[name.rsplit("--", 1)[0]] == part for name, part in zip(names, srgan.split_of(names)))
    for part, word in enumerate(("training", "validation", "test")):
        print(f"{word}: {sum(each == part for each in parts.values())} people")
    print(f"{len(names)} crops; nobody is on two sides")


if __name__ == "__main__":
    main(*sys.argv[1:])
