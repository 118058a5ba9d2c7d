"""Pixels: one bicubic, 8-bit rounding, and every kind of image file as right RGB."""

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


# --- Resize, round, luma, normalisation


@pytest.mark.parametrize("height, width", [(24, 32), (12, 16), (6, 8), (17, 23), (96, 128), (192, 256), (100, 90), (48, 64)])
def test_bicubic_is_pillows_down_and_up(height, width):
    picture = photo()
    ours = srgan.quantise(srgan.bicubic(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255, (height, width)))
    pillows = np.asarray(Image.fromarray(picture).resize((width, height), Image.BICUBIC)).astype(int)
    assert np.abs(levels(ours) - pillows).max() <= 1


def test_bicubic_takes_a_side_or_a_height_and_width_and_keeps_a_constant():
    grey = torch.full((2, 3, 20, 12), 0.3)
    assert srgan.bicubic(grey, 8).shape == (2, 3, 8, 8)
    assert srgan.bicubic(grey, (40, 6)).shape == (2, 3, 40, 6)
    torch.testing.assert_close(srgan.bicubic(grey, (5, 30)), torch.full((2, 3, 5, 30), 0.3))
    assert torch.equal(srgan.bicubic(grey, (20, 12)), grey)


def test_bicubic_is_not_clamped():
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1
    enlarged = srgan.bicubic(edge, 32)
    assert enlarged.min() < -0.01 and enlarged.max() > 1.01


def test_quantise_by_hand():
    values = torch.tensor([-0.5, 0.0, 0.4 / 255, 0.6 / 255, 100.4 / 255, 254.6 / 255, 1.0, 1.7])
    torch.testing.assert_close(srgan.quantise(values), torch.tensor([0, 0, 0, 1, 100, 255, 255, 255]) / 255)
    every = torch.arange(256) / 255
    assert torch.equal(srgan.quantise(every), every)


@pytest.mark.parametrize("colour, y", [
    ((1, 1, 1), 235), ((0, 0, 0), 16), ((1, 0, 0), 81.481), ((0, 1, 0), 144.553), ((0, 0, 1), 40.966), ((0.5, 0.5, 0.5), 125.5),
])
def test_luma_by_hand(colour, y):
    image = torch.tensor(colour, dtype=torch.float32).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    torch.testing.assert_close(srgan.luma(image), torch.full((2, 1, 4, 5), y / 255))


def test_imagenet_normalisation_by_hand_and_back():
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    image = torch.stack([mean, mean + std, torch.ones(3)]).view(3, 3, 1, 1)
    wanted = torch.stack([torch.zeros(3), torch.ones(3), (1 - mean) / std]).view(3, 3, 1, 1)
    torch.testing.assert_close(srgan.to_imagenet(image), wanted)
    random = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(srgan.from_imagenet(srgan.to_imagenet(random)), random)


# --- Files


def test_what_is_saved_is_loaded_again(tmp_path):
    picture = torch.randint(256, (3, 11, 7), generator=torch.Generator().manual_seed(1)) / 255
    for image in (picture, picture[None]):
        srgan.save_image(image, tmp_path / "a.png")
        torch.testing.assert_close(srgan.load_image(tmp_path / "a.png"), picture[None], rtol=0, atol=1e-6)
    srgan.save_image(torch.tensor([-0.3, 0.5, 1.4]).view(3, 1, 1), tmp_path / "b.png")
    assert levels(srgan.load_image(tmp_path / "b.png")).tolist() == [[[0, 128, 255]]]


def test_rgb_is_loaded_as_it_is_whatever_the_file_is_called(tmp_path):
    Image.fromarray(photo()).save(tmp_path / "photo.jpg", format="PNG")
    image = srgan.load_image(str(tmp_path / "photo.jpg"))
    assert image.dtype == torch.float32 and image.shape == (1, 3, 48, 64)
    assert np.array_equal(levels(image), photo())


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
OPACITY = np.where(np.arange(16) < 8, 0, 128).astype(np.uint8)[None].repeat(16, 0)


def palette_image() -> Image.Image:
    image = Image.fromarray(RAMP // 64).copy()  # indices 0 to 3
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([200, 0, 0, 0, 150, 0, 10, 20, 30, 255, 255, 0])
    return image


PALETTE = np.array([[200, 0, 0], [0, 150, 0], [10, 20, 30], [255, 255, 0]])[RAMP // 64]
SECOND_CLEAR = np.where((RAMP // 64 == 1)[..., None], 255, PALETTE)
ON_WHITE = (photo(16, 16) * (OPACITY[..., None] / 255) + 255 * (1 - OPACITY[..., None] / 255)).round()


@pytest.mark.parametrize("name, image, options, wanted, off_by", [
    ("grey.png", lambda: Image.fromarray(RAMP), {}, RAMP[..., None].repeat(3, -1), 0),
    ("grey.jpg", lambda: Image.fromarray(RAMP), {"quality": 100}, RAMP[..., None].repeat(3, -1), 3),
    ("one-bit.png", lambda: Image.fromarray(RAMP > 99), {}, np.where(RAMP > 99, 255, 0)[..., None].repeat(3, -1), 0),
    ("palette.png", palette_image, {}, PALETTE, 0),
    ("palette.gif", palette_image, {}, PALETTE, 0),
    ("clear.png", palette_image, {"transparency": 1}, SECOND_CLEAR, 0),
    ("clear.gif", palette_image, {"transparency": 1}, SECOND_CLEAR, 0),
    ("rgba.png", lambda: Image.fromarray(np.dstack([photo(16, 16), OPACITY])), {}, ON_WHITE, 1),
    ("grey-alpha.png", lambda: Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(OPACITY)]), {},
     (RAMP * (OPACITY / 255) + 255 * (1 - OPACITY / 255)).round()[..., None].repeat(3, -1), 1),
    ("cmyk.tif", lambda: Image.merge("CMYK", [Image.fromarray(c) for c in (RAMP, RAMP // 2, 0 * RAMP, 0 * RAMP)]), {},
     np.dstack([255 - RAMP.astype(int), 255 - RAMP // 2, 255 + 0 * RAMP.astype(int)]), 1),
    ("cmyk.jpg", lambda: Image.new("CMYK", (16, 16), (0, 0, 255, 0)), {"quality": 100}, np.tile([255, 255, 0], (16, 16, 1)), 3),
    ("sixteen.png", lambda: Image.fromarray(RAMP.astype(np.uint16) * 257), {}, RAMP[..., None].repeat(3, -1), 1),
    ("sixteen.tif", lambda: Image.fromarray(RAMP.astype(np.uint16) * 257), {}, RAMP[..., None].repeat(3, -1), 1),
    ("sixteen-dark.png", lambda: Image.fromarray(RAMP.astype(np.uint16)), {}, np.zeros((16, 16, 3)), 1),
], ids=lambda value: value if isinstance(value, str) else "")
def test_every_kind_of_file_becomes_right_rgb(tmp_path, name, image, options, wanted, off_by):
    image().save(tmp_path / name, **options)
    assert np.abs(levels(srgan.load_image(tmp_path / name)) - wanted).max() <= off_by


@pytest.mark.parametrize("orientation, upright", [  # where row 0 and column 0 of the file belong: TIFF 6.0, tag 274
    (1, lambda p: p), (2, lambda p: p[:, ::-1]), (3, lambda p: p[::-1, ::-1]), (4, lambda p: p[::-1]),
    (5, lambda p: p.swapaxes(0, 1)), (6, lambda p: np.rot90(p, -1)), (7, lambda p: np.rot90(p, 2).swapaxes(0, 1)),
    (8, lambda p: np.rot90(p)),
])
@pytest.mark.parametrize("name", ["photo.png", "photo.jpg"])
def test_exif_rotation_is_undone(tmp_path, orientation, upright, name):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(photo(16, 24)).save(tmp_path / name, exif=exif)
    stored = np.asarray(Image.open(tmp_path / name).convert("RGB"))
    assert np.array_equal(levels(srgan.load_image(tmp_path / name)), upright(stored))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises width x height; its data are a few bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 99)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
                                          for kind, data in chunks)


def cut(path) -> bytes:
    data = path.read_bytes()
    return data[:len(data) // 2]


@pytest.mark.parametrize("make, message", [
    (lambda folder: b"hello, I am text", "not an image"),
    (lambda folder: b"", "not an image"),
    (lambda folder: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # would run an interpreter
    (lambda folder: cut(folder / "whole.jpg"), "truncated or damaged"),
    (lambda folder: cut(folder / "whole.png"), "truncated or damaged"),
    (lambda folder: png_of_size(12_000, 10_000), "absurdly large"),
    (lambda folder: png_of_size(100_000, 100_000), "absurdly large"),
    (lambda folder: png_of_size(64, 64), "truncated or damaged"),
], ids=["text", "nothing", "eps", "half a jpeg", "half a png", "120 megapixels", "10 gigapixels", "no data"])
def test_what_is_no_image_is_refused_in_one_line_that_names_it(tmp_path, make, message):
    Image.fromarray(photo()).save(tmp_path / "whole.jpg")
    Image.fromarray(photo()).save(tmp_path / "whole.png")
    (tmp_path / "bad.jpg").write_bytes(make(tmp_path))
    with pytest.raises(ValueError, match=message) as caught:
        srgan.load_image(tmp_path / "bad.jpg")
    assert str(caught.value).startswith(str(tmp_path / "bad.jpg")) and "\n" not in str(caught.value)


def test_a_missing_image_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        srgan.load_image(tmp_path / "nowhere.png")
