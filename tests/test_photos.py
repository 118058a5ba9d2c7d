"""Whatever photos people bring: colours, greys, cut-outs, odd files, odd sources, odd names. (Splits, lists: test_data.py.)"""

import io
import os
import shutil
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageDraw, JpegImagePlugin, PngImagePlugin, features
from test_command_line import done
from test_pixels import file_of, shown

import srgan_utils as srgan

FACE = srgan.synthetic_face(3)[0].permute(1, 2, 0).mul(255).byte().numpy()
SKIN = np.full((4, 4, 3), (173, 127, 114), np.uint8)
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def saved(path, picture: np.ndarray, **options):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(picture).save(path, **options)
    return path


# Colour spaces by what defines them: from linear RGB to XYZ under D50, and the gamma, None for the curve of sRGB
SPACES = {
    "sRGB": ([[0.4361, 0.3851, 0.1430], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7139]], None),
    "Display P3": ([[0.5152, 0.2919, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0010, 0.0419, 0.7841]], None),
    "Adobe RGB": ([[0.6098, 0.2052, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7445]], 2.2),
    "ProPhoto": ([[0.7977, 0.1352, 0.0313], [0.2880, 0.7119, 0.0001], [0.0000, 0.0000, 0.8249]], 1.8)}


def linear(levels, gamma=None):
    share = np.asarray(levels) / 255
    return share ** gamma if gamma else np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def levels_of(light, gamma=None):
    share = light.clip(0, 1)
    if gamma:
        return 255 * share ** (1 / gamma)
    return 255 * np.where(share <= 0.0031308, share * 12.92, 1.055 * share ** (1 / 2.4) - 0.055)


def profile(space: str = "sRGB", gamma=None, grey=False) -> bytes:
    """littlecms' own of sRGB, with the colours of one of SPACES and its or that gamma written into it; or made one for greys."""
    matrix, gamma = SPACES[space][0], gamma or SPACES[space][1]
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    numbers = [(tag, 8, column) for tag, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), zip(*matrix))]
    if gamma:
        numbers.append((b"rTRC", 12, (gamma, 1, 0, 0, 0)))  # which g and b share
    for tag, offset, values in numbers:
        (place,) = struct.unpack_from(">I", data, data.index(tag) + 4)  # from the table of tags
        struct.pack_into(f">{len(values)}i", data, place + offset, *(round(value * 65536) for value in values))
    return bytes(data.replace(b"RGB ", b"GRAY", 1).replace(b"rTRC", b"kTRC", 1) if grey else data)


def as_seen_in(space: str, picture: np.ndarray) -> np.ndarray:
    """The levels in that space of what `picture` shows in sRGB."""
    matrix, gamma = SPACES[space]
    light = linear(picture) @ (np.linalg.inv(matrix) @ SPACES["sRGB"][0]).T
    return levels_of(light, gamma).round().astype(np.uint8)


@pytest.mark.parametrize("space, off_by", [("Display P3", 2), ("Adobe RGB", 2), ("ProPhoto", 4)])
@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "webp"])
def test_colours_of_other_spaces_are_converted_to_srgb(tmp_path, space, off_by, kind):
    lossless = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(kind, {})
    for name, picture in (("skin", SKIN), ("face", FACE)):
        there = as_seen_in(space, picture)
        path = saved(tmp_path / f"{name}.{kind}", there, icc_profile=profile(space), **lossless)
        assert np.abs(shown(path) - picture).mean() <= off_by
    assert np.abs(there.astype(int) - picture).mean() > 2.5  # which it would be otherwise


def test_colours_are_converted_in_the_visible_part_of_a_cut_out(tmp_path, capsys):
    flat = Image.fromarray(as_seen_in("Display P3", SKIN.repeat(6, 0).repeat(6, 1)))
    flat.putalpha(128)
    flat.save(tmp_path / "flat.png", icc_profile=profile("Display P3"))
    done(capsys, "upscale", tmp_path / "flat.png", "--scale", 2, "--out", tmp_path / "out")
    large = np.asarray(Image.open(tmp_path / "out" / "flat-x2.png")).astype(int)
    assert np.abs(large - (*SKIN[0, 0], 128)).max() <= 4


@pytest.mark.parametrize("icc", [profile(), b"", b"\0" * 500, profile("Adobe RGB")[:300], profile(gamma=1.8, grey=True)],
                         ids=["sRGB", "empty", "zeros", "half", "another mode's"])
def test_srgb_passes_bit_for_bit_and_a_profile_that_cannot_be_used_is_ignored(tmp_path, icc):
    assert np.array_equal(shown(saved(tmp_path / "a.png", FACE, icc_profile=icc)), FACE)
    ink = Image.fromarray(FACE).convert("CMYK")
    for name, options in (("cmyk.jpg", {"quality": 100}), ("cmyk.tif", {})):
        ink.save(tmp_path / name, icc_profile=icc, **options)
        assert np.abs(shown(tmp_path / name) - FACE).mean() < 2


@pytest.mark.parametrize("gamma", [None, 1.8, 2.2])
def test_grey_profiles_count_and_leave_grey(tmp_path, gamma):
    light = linear(RAMP, gamma)
    with_alpha = np.asarray(Image.merge("LA", [Image.fromarray(RAMP), Image.new("L", (16, 16), 255)]))
    for name, picture in (("a.png", RAMP), ("sixteen.tif", RAMP * np.uint16(257)), ("la.png", with_alpha)):
        seen = shown(saved(tmp_path / name, picture, icc_profile=profile(gamma=gamma, grey=True)))
        assert np.ptp(seen, axis=-1).max() == 0 and np.abs(seen[..., 0] - levels_of(light)).max() <= 2


@pytest.fixture(scope="module")
def colourist(tmp_path_factory):
    """A network of 4x that puts colours into everything: its generator, config and file."""
    config = srgan.Config.preset("sharp", scale=4, channels=8, residual_blocks=1, hr_size=64, precision="fp32")
    torch.manual_seed(1)
    generator = srgan.Generator(config).eval().requires_grad_(False)
    torch.nn.init.normal_(generator.tail.weight, std=0.05)
    torch.nn.init.normal_(generator.tail.bias, std=0.1)
    path = tmp_path_factory.mktemp("weights") / "generator.safetensors"
    srgan.export_generator(path, generator, config)
    return generator, config, path


def spread(images) -> float:
    """The largest difference between R, G and B, levels."""
    return (images.amax(1) - images.amin(1)).max().item() * 255


def test_a_grey_photo_stays_grey_and_one_spot_of_colour_anywhere_leaves_all_colours(colourist):
    generator, config, path = colourist
    grey = (torch.randint(254, (1, 1, 40, 33), generator=srgan.seeded(2)) / 255).repeat(1, 3, 1, 1)
    almost, coloured = grey.clone(), grey.clone()
    almost[0, 0, 3, 5] += 1 / 255  # as JPEG rounds
    coloured[0, 0, 3, 5] += 2 / 255
    for image in (grey, almost):
        raw, right = generator(image), srgan.super_resolve(generator, image)
        for sr in (right, srgan.upscale(image, generator, config, tile=16), srgan.enlarge(image, 4, {4: path})[0]):
            assert spread(sr) < 1e-3 < 30 < spread(raw) and (sr - right).abs().max() <= 1.01 / 255
    assert spread(srgan.enlarge(grey, 3, {4: path})[0]) < 1e-3
    right, beside = srgan.super_resolve(generator, torch.cat([coloured, grey])).split(1)  # each by itself
    assert spread(beside) < 1e-3 and spread(right) > 20
    assert (srgan.upscale(coloured, generator, config, tile=16) - right).abs().max() <= 1.01 / 255


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("hidden", [(0, 0, 0), (255, 255, 255)])
def test_a_cut_out_keeps_its_colour_to_the_rim_whatever_is_hidden_around_it(tmp_path, capsys, scale, hidden):
    colour, alpha = (200, 170, 150), Image.new("L", (192, 160))
    ImageDraw.Draw(alpha).ellipse((20, 30, 150, 130), fill=255)
    alpha = alpha.resize((48, 40), Image.BOX)  # a smooth rim
    visible = alpha.point(lambda a: 255 * (a > 0))
    disc = Image.composite(Image.new("RGB", (48, 40), colour), Image.new("RGB", (48, 40), hidden), visible)
    disc.putalpha(alpha)
    disc.save(tmp_path / "disc.png")
    done(capsys, "upscale", tmp_path / "disc.png", "--scale", scale, "--out", tmp_path)
    large = Image.open(tmp_path / f"disc-x{scale}.png")
    laid = Image.alpha_composite(Image.new("RGBA", large.size, colour), large).convert("RGB")
    assert np.abs(np.asarray(laid).astype(int) - colour).max() <= 4 and large.getchannel("A").getextrema() == (0, 255)


@pytest.mark.parametrize("name, levels", [
    ("float.tif", RAMP / np.float32(255)), ("float-255.tif", RAMP.astype(np.float32)), ("float-16.tif", RAMP * np.float32(257)),
    ("float-over.tif", np.where(RAMP == 255, 1.2, RAMP / 255).astype(np.float32)),
    ("float-nan.tif", np.where(RAMP == 0, np.nan, RAMP / 255).astype(np.float32)),
    *((f"{bits}-in-16.{kind}", np.round(RAMP / 255 * (2**bits - 1)).astype(np.uint16))
      for kind in ("png", "tif") for bits in (8, 10, 12, 14, 16)),
    ("32.tif", RAMP * np.int32(2**20)),
], ids=lambda value: value if isinstance(value, str) else "")
def test_pictures_of_more_than_8_bits_fill_the_range(tmp_path, name, levels):
    assert np.abs(shown(saved(tmp_path / name, levels)) - RAMP[..., None].astype(int)).max() <= 1


def test_a_dark_picture_stays_dark_where_the_file_states_its_range_and_16_bit_grey_keeps_its_transparency(tmp_path):
    dark = saved(tmp_path / "dark.tif", RAMP * np.uint16(2), tiffinfo={281: 4095})  # MaxSampleValue
    assert np.abs(shown(dark) - RAMP[..., None] / 8).max() <= 1
    clear = saved(tmp_path / "clear.png", RAMP * np.uint16(257), transparency=40 * 257)
    assert np.abs(shown(clear) - np.where(RAMP == 40, 255, RAMP)[..., None].astype(int)).max() <= 1


TEXT = PngImagePlugin.PngInfo()
TEXT.add_text("workflow", "node " * 600_000, zip=True)
PLAIN, LONG = file_of(FACE, "PNG"), file_of(FACE, "PNG", pnginfo=TEXT)
AT_THE_END = PLAIN[:-12] + LONG[LONG.index(b"zTXt") - 4:LONG.index(b"IDAT") - 4] + PLAIN[-12:]
# Turned by a quarter, and a resolution of 72 / 0
ZERO = b"Exif\0\0MM\0*\0\0\0\x08\0\2\1\x12\0\3\0\0\0\1\0\6\0\0\1\x1a\0\5\0\0\0\1\0\0\0\x26\0\0\0\0\0\0\0H\0\0\0\0"
BROKEN = b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\x12\x01" * 9

ODD_FILES = {
    "motion photo": (file_of(FACE, "JPEG", quality=100) + b"\0\0\0\x18ftypmp42" + bytes(8_000_000), False, 3),
    "long text": (LONG, False, 0), "long text at the end": (AT_THE_END, False, 0),
    "large profile": (file_of(FACE, "PNG", icc_profile=profile() + bytes(3_000_000)), False, 0),
    **{f"{what} in a {kind}": (file_of(FACE, kind, exif=exif, **options), exif is ZERO, off_by)
       for what, exif in (("broken Exif", BROKEN), ("a zero denominator", ZERO))
       for kind, options, off_by in (("PNG", {}, 0), ("JPEG", {"quality": 100}, 3), ("WEBP", {"lossless": True}, 0))},
    "icon": (file_of(FACE, "ICO", sizes=[(178, 178)]), False, 0),
    **{kind: (file_of(FACE, kind, **options), False, 3) for kind, feature, options in (  # where this Pillow can
        ("AVIF", "avif", {"quality": 95}), ("JPEG2000", "jpg_2000", {})) if features.check(feature)},
}


@pytest.mark.parametrize("kind", ODD_FILES)
@pytest.mark.filterwarnings("ignore")  # Pillow's, about damage
def test_files_that_any_viewer_opens_are_read(tmp_path, kind):
    data, turned, off_by = ODD_FILES[kind]
    (tmp_path / "photo").write_bytes(data)
    right = np.rot90(FACE, -1) if turned else FACE
    assert np.abs(shown(tmp_path / "photo") - right).mean() <= off_by


def test_large_jpegs_are_reduced_while_a_store_decodes_them_and_whole_otherwise(tmp_path, monkeypatch):
    sizes, load = [], JpegImagePlugin.JpegImageFile.load
    for name, size in (("big", (3000, 3000)), ("small", (1400, 1000))):
        saved(tmp_path / "in" / f"{name}.jpg", np.asarray(Image.fromarray(FACE).resize(size, Image.BICUBIC)), quality=95)
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", lambda image: (sizes.append(image.size), load(image))[1])
    stored = srgan.prepare(tmp_path / "in", tmp_path / "store").faces([0])[0].permute(1, 2, 0).numpy().astype(int)
    assert set(sizes) == {(750, 750), (1400, 1000)} and np.abs(stored - FACE).mean() < 2
    assert srgan.load_image(tmp_path / "in" / "big.jpg").shape == (1, 3, 3000, 3000)


def test_a_result_that_no_machine_can_hold_is_said_in_one_line_with_what_it_needs(tmp_path, capsys, monkeypatch):
    with pytest.raises(MemoryError, match="160000 x 160000 px need 768.0 GB of memory, more than this machine has: reduce"):
        monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 4_000_000}.get)
        srgan.enlarge(torch.zeros(1, 3, 1, 1).expand(1, 3, 20_000, 20_000), 8)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 50}.get)
    for name, side in (("a.png", 90), ("b.png", 8)):  # the second fits
        saved(tmp_path / name, np.zeros((side, side, 3), np.uint8))
    line = done(capsys, "upscale", tmp_path / "a.png", tmp_path / "b.png", "--scale", 2, "--out", tmp_path / "out", status=2)
    assert "1 of 2" in line and "a.png: 180 x 180 px need" in line and (tmp_path / "out" / "b-x2.png").exists()


def test_a_name_that_the_console_cannot_print_is_escaped_and_the_command_succeeds(tmp_path, monkeypatch):
    photo = saved(tmp_path / "фото 1.jpg", FACE[:9, :9])
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(console := io.BytesIO(), "cp1252"))  # as PYTHONIOENCODING=cp1252 makes it
        assert srgan.main(["upscale", str(photo), "--scale", "2", "--out", str(tmp_path / "out")]) == 0
        sys.stdout.flush()
        assert b"\\u0444\\u043e\\u0442\\u043e 1-x2.png" in console.getvalue()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["фото 1-x2.png"]


def test_upscale_takes_any_factor_folders_patterns_and_weights_by_their_run_or_file(colourist, tmp_path, capsys):
    path, run, out = colourist[2], colourist[2].parent, tmp_path / "out"
    for name in ("a.png", "b [1].png", ".hidden.png"):
        saved(tmp_path / "in" / name, FACE[:20, :30])
    (tmp_path / "in" / "deeper").mkdir()

    def made(*arguments) -> dict:
        shutil.rmtree(out, ignore_errors=True)
        done(capsys, "upscale", *arguments, "--out", out)
        return {path.name: Image.open(path).size for path in sorted(out.iterdir())}

    both = {"a-x2.png": (60, 40), "b [1]-x2.png": (60, 40)}
    assert made(tmp_path / "in", "--scale", 2) == made(tmp_path / "in" / "*.png", "--scale", 2) == both
    assert made(tmp_path / "in" / "b [1].png", "--scale", 3) == {"b [1]-x3.png": (90, 60)}
    assert made(tmp_path / "in" / "a.png", "--scale", 1.5) == {"a-x1.5.png": (45, 30)}
    for named in (["--run", run], ["--run", path], ["--weights", path], ["--weights", run]):
        assert made(tmp_path / "in" / "a.png", *named) == {"a-x4.png": (120, 80)}
        assert made(tmp_path / "in" / "a.png", *named, "--scale", 1.5) == {"a-x1.5.png": (45, 30)}
        assert "4x, not 5x" in done(capsys, "upscale", tmp_path / "in", *named, "--scale", 5, "--out", tmp_path / "o", status=2)
    picture, note = srgan.enlarge(srgan.load_image(tmp_path / "in" / "a.png"), 1.5, {4: path})
    assert note == "4x network, reduced to 1.5x" and torch.equal(srgan.load_image(out / "a-x1.5.png"), picture)
    for nothing in ("in/*.jpg", "in/deeper"):
        assert "1 of 1" in done(capsys, "upscale", tmp_path / nothing, "--out", tmp_path / "o", status=2)


def test_links_are_followed_once(tmp_path):
    saved(tmp_path / "elsewhere" / "a.jpg", FACE)
    (tmp_path / "in").mkdir()
    for link, target in (("linked", tmp_path / "elsewhere"), ("back", tmp_path / "in"), ("again", tmp_path / "elsewhere")):
        (tmp_path / "in" / link).symlink_to(target)
    (name,) = srgan.prepare(tmp_path / "in", tmp_path / "store").names
    assert name in ("linked/a.jpg", "again/a.jpg")
