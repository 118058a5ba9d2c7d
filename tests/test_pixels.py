"""Pixels: one bicubic, 8-bit rounding, and every kind of image file as right RGB."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import srgan_utils as srgan


def levels(image: torch.Tensor) -> np.ndarray:
    """(1, 3, H, W) in [0, 1] as whole 8-bit levels (H, W, 3); the values must lie on them."""
    scaled = image[0].permute(1, 2, 0).numpy().astype(np.float64) * 255
    assert np.abs(scaled - scaled.round()).max() < 1e-3
    return scaled.round().astype(int)


def photo(height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth picture with an edge and no symmetry, uint8, away from black and white (no clamping between passes)."""
    y, x = np.mgrid[:height, :width]
    picture = np.stack([40 + 2 * x, 220 - 2 * y - x, 90 + 60 * np.sin(x / 5) * np.cos(y / 7)], axis=-1)
    picture[height // 3:, width // 2:] += 20
    return picture.round().clip(30, 225).astype(np.uint8)


def shown(path) -> np.ndarray:
    """What `load_image` makes of a file, (H, W, 3), whole levels."""
    return levels(srgan.load_image(path))


def file_of(picture: np.ndarray, kind: str, **options) -> bytes:
    Image.fromarray(picture).save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


@pytest.fixture(autouse=True)
def pillows_own_limit(monkeypatch):
    """It is not in the way of any test here, and none loses it."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    yield
    assert Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.parametrize("height, width", [(24, 32), (12, 16), (6, 8), (17, 23), (96, 128), (192, 256), (100, 90), (48, 64)])
def test_bicubic_is_pillows_down_and_up(height, width):
    picture = photo()
    ours = srgan.quantise(srgan.bicubic(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255, (height, width)))
    pillows = np.asarray(Image.fromarray(picture).resize((width, height), Image.BICUBIC)).astype(int)
    assert np.abs(levels(ours) - pillows).max() <= 1


def test_bicubic_takes_a_side_or_a_height_and_width_and_is_not_clamped():
    grey = torch.full((2, 3, 20, 12), 0.3)
    assert srgan.bicubic(grey, 8).shape == (2, 3, 8, 8) and torch.equal(srgan.bicubic(grey, (20, 12)), grey)
    edge = srgan.bicubic(torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1]).expand(1, 3, 8, 8), 32)
    assert edge.min() < -0.01 and edge.max() > 1.01


def test_quantise_by_hand():
    every, odd = torch.arange(256) / 255, torch.tensor([-127.5, 0, 0.4, 0.6, 100.4, 254.6, 255, 433]) / 255
    torch.testing.assert_close(srgan.quantise(odd), torch.tensor([0, 0, 0, 1, 100, 255, 255, 255]) / 255)
    assert torch.equal(srgan.quantise(every), every)


def test_imagenets_normalisation_by_hand():
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for colour, wanted in ((mean, torch.zeros(3)), (mean + std, torch.ones(3)), (torch.ones(3), (1 - mean) / std)):
        torch.testing.assert_close(srgan.to_imagenet(colour.view(1, 3, 1, 1)), wanted.view(1, 3, 1, 1))


def test_what_is_saved_is_loaded_again_and_clamped_and_rounded(tmp_path):
    picture = torch.randint(256, (3, 11, 7), generator=torch.Generator().manual_seed(1)) / 255
    for image in (picture, picture[None]):
        srgan.save_image(image, tmp_path / "a.png")
        torch.testing.assert_close(srgan.load_image(str(tmp_path / "a.png")), picture[None], rtol=0, atol=1e-6)
    srgan.save_image(torch.tensor([-0.3, 0.5, 1.4]).view(3, 1, 1), tmp_path / "b.png")
    assert shown(tmp_path / "b.png").tolist() == [[[0, 128, 255]]]


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
GREY = RAMP[..., None].repeat(3, -1)
OPACITY = np.where(np.arange(16) < 8, 0, 128).astype(np.uint8)[None].repeat(16, 0)
ALPHA = OPACITY[..., None] / 255
FOUR_COLOURS = Image.frombytes("P", (16, 16), (RAMP // 64).tobytes())
FOUR_COLOURS.putpalette([200, 0, 0, 0, 150, 0, 10, 20, 30, 255, 255, 0])
PALETTE = np.array([[200, 0, 0], [0, 150, 0], [10, 20, 30], [255, 255, 0]])[RAMP // 64]
SECOND_CLEAR = np.where((RAMP // 64 == 1)[..., None], 255, PALETTE)


@pytest.mark.parametrize("name, image, options, wanted, off_by", [
    ("named.jpg", Image.fromarray(photo()), {"format": "PNG"}, photo(), 0),  # what is in it decides, not its name
    ("grey.png", Image.fromarray(RAMP), {}, GREY, 0), ("grey.jpg", Image.fromarray(RAMP), {"quality": 100}, GREY, 3),
    ("one-bit.png", Image.fromarray(RAMP > 99), {}, np.where(GREY > 99, 255, 0), 0),
    *((f"palette.{kind}", FOUR_COLOURS, {}, PALETTE, 0) for kind in ("png", "gif")),
    *((f"clear.{kind}", FOUR_COLOURS, {"transparency": 1}, SECOND_CLEAR, 0) for kind in ("png", "gif")),
    ("rgba.png", Image.fromarray(np.dstack([photo(16, 16), OPACITY])), {}, photo(16, 16) * ALPHA + 255 * (1 - ALPHA), 1),
    ("grey-alpha.png", Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(OPACITY)]), {}, 255 + (GREY - 255.0) * ALPHA, 1),
    ("cmyk.tif", Image.merge("CMYK", [Image.fromarray(c) for c in (RAMP, RAMP // 2, 0 * RAMP, 0 * RAMP)]), {},
     np.dstack([255 - RAMP.astype(int), 255 - RAMP // 2, 255 + 0 * RAMP.astype(int)]), 1),
    ("cmyk.jpg", Image.new("CMYK", (16, 16), (0, 0, 255, 0)), {"quality": 100}, np.tile([255, 255, 0], (16, 16, 1)), 3),
], ids=lambda value: value if isinstance(value, str) else "")
def test_every_kind_of_file_becomes_right_rgb(tmp_path, name, image, options, wanted, off_by):
    image.save(tmp_path / name, **options)
    assert np.abs(shown(tmp_path / name) - wanted).max() <= off_by


@pytest.mark.parametrize("orientation, upright", [  # where row 0 and column 0 of the file belong: TIFF 6.0, tag 274
    (1, lambda p: p), (2, lambda p: p[:, ::-1]), (3, lambda p: p[::-1, ::-1]), (4, lambda p: p[::-1]),
    (5, lambda p: p.swapaxes(0, 1)), (6, lambda p: np.rot90(p, -1)), (7, lambda p: np.rot90(p, 2).swapaxes(0, 1)), (8, np.rot90),
])
@pytest.mark.parametrize("name", ["photo.png", "photo.jpg"])
def test_exif_rotation_is_undone(tmp_path, orientation, upright, name):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(photo(16, 24)).save(tmp_path / name, exif=exif)
    assert np.array_equal(shown(tmp_path / name), upright(np.asarray(Image.open(tmp_path / name))))


def png_that_says(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return file_of(photo(), "PNG")[:12] + header + struct.pack(">I", zlib.crc32(header)) + file_of(photo(), "PNG")[33:]


ADVICE = "not an image .*save HEIC as JPEG, give a zip as the source by itself"


@pytest.mark.parametrize("data, message", {
    "text": (b"hello, I am text", ADVICE), "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), ADVICE),
    "a zip": (b"PK\5\6" + bytes(18), ADVICE), "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", ADVICE),
    "nothing": (b"", "not an image"), "no row": (png_that_says(6400, 64), "truncated or damaged"),
    **{f"half a {kind}": (file_of(photo(), kind)[:600], "truncated or damaged") for kind in ("JPEG", "PNG")},
    "10 GP": (png_that_says(10**5, 10**5), "absurdly large"), "200.02 MP": (png_that_says(20_000, 10_001), "absurdly large"),
    "400 MB": (bytes(5), "absurdly large file"),
}.values())
def test_what_is_no_image_is_refused_in_one_line_that_names_it(tmp_path, data, message):
    (tmp_path / "bad.jpg").write_bytes(data)
    if "file" in message:
        os.truncate(tmp_path / "bad.jpg", 400_000_001)  # a hole, which takes no disk
    with pytest.raises(ValueError, match=message) as caught:
        srgan.load_image(tmp_path / "bad.jpg")
    assert str(caught.value).startswith(str(tmp_path / "bad.jpg")) and str(caught.value).isprintable()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
@pytest.mark.filterwarnings("ignore")  # Pillow's, about damage
def test_damage_gives_a_picture_or_one_line(tmp_path, kind):
    whole, random, refused = file_of(photo(24, 40), kind), np.random.default_rng(0), 0
    for _ in range(60):
        data = bytearray(whole)
        for at in random.integers(0, (64, len(data)), (4, 2)).flatten():  # half of it in the header
            data[at] = random.integers(256)
        (tmp_path / "a").write_bytes(data[:random.integers(len(data) // 2, 2 * len(data))])
        try:
            assert srgan.load_image(tmp_path / "a").shape[:2] == (1, 3)
        except ValueError as error:
            refused += str(error).isprintable()
    (tmp_path / "a").write_bytes(whole)
    assert refused > 5 and np.abs(shown(tmp_path / "a") - photo(24, 40)).mean() < 12
