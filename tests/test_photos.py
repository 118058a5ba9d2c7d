"""Whatever photos people bring: colours, greys, cut-outs, odd files, odd sources, odd names. (Splits, lists: test_data.py.)"""

import io
import os
import struct
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageDraw, JpegImagePlugin, PngImagePlugin, features

import srgan_utils as srgan

FACE = srgan.synthetic_face(3)[0].permute(1, 2, 0).mul(255).byte().numpy()
SKIN = np.full((4, 4, 3), (173, 127, 114), np.uint8)


def shown(path) -> np.ndarray:
    """What `load_image` makes of a file, (H, W, 3), whole levels."""
    return srgan.load_image(path)[0].permute(1, 2, 0).mul(255).round().numpy().astype(int)


def done(capsys, *arguments, status: int = 0) -> str:
    """What a command, which must end with that status, told."""
    capsys.readouterr()
    ended, told = srgan.main([str(argument) for argument in arguments]), capsys.readouterr()
    assert ended == status, told.err
    return told.out if status == 0 else told.err.strip().split("\n")[-1]


# --- Colour profiles, made by hand from what defines the spaces: primaries, white, tone curve

SPACES = {"Display P3": ([[0.680, 0.320], [0.265, 0.690], [0.150, 0.060]], None), "Adobe RGB": (
    [[0.64, 0.33], [0.21, 0.71], [0.15, 0.06]], 2.2), "ProPhoto": ([[0.7347, 0.2653], [0.1596, 0.8404], [0.0366, 0.0001]], 1.8),
    "sRGB": ([[0.64, 0.33], [0.30, 0.60], [0.15, 0.06]], None)}
D50, D65 = np.array([0.9642, 1, 0.8249]), np.array([0.95047, 1, 1.08883])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def to_xyz(space: str) -> np.ndarray:
    """From linear RGB of that space to XYZ under D50, (3, 3)."""
    white, xy = D50 if space == "ProPhoto" else D65, np.array(SPACES[space][0])
    primaries = np.stack([xy[:, 0] / xy[:, 1], np.ones(3), (1 - xy.sum(1)) / xy[:, 1]])
    adapted = np.linalg.inv(BRADFORD) @ np.diag(BRADFORD @ D50 / (BRADFORD @ white)) @ BRADFORD
    return adapted @ (primaries * np.linalg.solve(primaries, white))


def linear(levels, gamma=None):
    share = np.asarray(levels) / 255
    return share ** gamma if gamma else np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def encoded(light, gamma=None):
    share = light.clip(0, 1)
    if gamma:
        return 255 * share ** (1 / gamma)
    return 255 * np.where(share <= 0.0031308, share * 12.92, 1.055 * share ** (1 / 2.4) - 0.055)


def profile(space: str, gamma=None) -> bytes:
    """An ICC profile, version 2: of one of SPACES, or "GRAY" of that gamma."""
    def s15(values):
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    gamma = SPACES[space][1] if space in SPACES else gamma
    curve = b"curv\0\0\0\0" + (struct.pack(">IH", 1, round(gamma * 256)) if gamma else struct.pack(">I", 1024) + np.round(
        linear(np.linspace(0, 255, 1024)) * 65535).astype(">u2").tobytes())
    tags = {b"wtpt": b"XYZ \0\0\0\0" + s15(D50), b"desc": b"desc\0\0\0\0\0\0\0\2x\0" + bytes(78)}
    if space == "GRAY":
        tags[b"kTRC"] = curve
    else:
        columns = zip((b"rXYZ", b"gXYZ", b"bXYZ"), to_xyz(space).T)
        tags |= {tag: b"XYZ \0\0\0\0" + s15(column) for tag, column in columns}
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, data = struct.pack(">I", len(tags)), b""
    for tag, value in tags.items():
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    kind = b"GRAY" if space == "GRAY" else b"RGB "
    head = struct.pack(">I4xI4s4s4s12x4s28x", 128 + len(table + data), 0x02100000, b"mntr", kind, b"XYZ ", b"acsp") + s15(D50)
    return head.ljust(128, b"\0") + table + data


def as_seen_in(space: str, picture: np.ndarray) -> np.ndarray:
    """The levels in that space of what `picture` shows in sRGB."""
    light = linear(picture) @ (np.linalg.inv(to_xyz(space)) @ to_xyz("sRGB")).T
    return encoded(light, SPACES[space][1]).round().astype(np.uint8)


@pytest.mark.parametrize("space, off_by", [("Display P3", 2), ("Adobe RGB", 2), ("ProPhoto", 4)])
@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "webp"])
def test_colours_of_other_spaces_are_converted_to_srgb(tmp_path, space, off_by, kind):
    lossless = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(kind, {})
    for name, picture in (("skin", SKIN), ("face", FACE)):
        there = as_seen_in(space, picture)
        Image.fromarray(there).save(tmp_path / f"{name}.{kind}", icc_profile=profile(space), **lossless)
        assert np.abs(shown(tmp_path / f"{name}.{kind}") - picture).mean() <= off_by
    assert np.abs(there.astype(int) - picture).mean() > 2.5  # which it would be otherwise


def test_colours_are_converted_in_a_store_as_well_and_in_the_visible_part_of_a_cut_out(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    Image.fromarray(as_seen_in("Adobe RGB", FACE)).save(tmp_path / "in" / "a.png", icc_profile=profile("Adobe RGB"))
    stored = srgan.prepare(tmp_path / "in", tmp_path / "store").faces([0])[0].permute(1, 2, 0).numpy().astype(int)
    assert np.array_equal(stored, shown(tmp_path / "in" / "a.png")) and np.abs(stored - FACE).mean() < 2
    flat = Image.fromarray(as_seen_in("Display P3", SKIN.repeat(6, 0).repeat(6, 1)))
    flat.putalpha(128)
    flat.save(tmp_path / "flat.png", icc_profile=profile("Display P3"))
    done(capsys, "upscale", tmp_path / "flat.png", "--scale", 2, "--out", tmp_path / "out")
    large = np.asarray(Image.open(tmp_path / "out" / "flat-x2.png")).astype(int)
    assert np.abs(large - (*SKIN[0, 0], 128)).max() <= 4


@pytest.mark.parametrize("icc", [
    profile("sRGB"), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"", b"\0" * 500,
    profile("Adobe RGB")[:300], profile("GRAY", 1.8)], ids=["sRGB", "littlecms", "empty", "zeros", "half", "another mode's"])
def test_srgb_passes_bit_for_bit_and_a_profile_that_cannot_be_used_is_ignored(tmp_path, icc):
    Image.fromarray(FACE).save(tmp_path / "a.png", icc_profile=icc)
    assert np.array_equal(shown(tmp_path / "a.png"), FACE)
    ink = Image.fromarray(FACE).convert("CMYK")
    for name, options in (("cmyk.jpg", {"quality": 100}), ("cmyk.tif", {})):
        ink.save(tmp_path / name, icc_profile=icc, **options)
        assert np.abs(shown(tmp_path / name) - FACE).mean() < 2


@pytest.mark.parametrize("gamma", [None, 1.8, 2.2])
def test_grey_profiles_count_and_leave_grey(tmp_path, gamma):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    light, icc = linear(ramp, gamma), profile("GRAY", gamma)
    Image.fromarray(ramp).save(tmp_path / "a.png", icc_profile=icc)
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "sixteen.tif", icc_profile=icc)
    Image.merge("LA", [Image.fromarray(ramp), Image.new("L", (16, 16), 255)]).save(tmp_path / "la.png", icc_profile=icc)
    for name in ("a.png", "sixteen.tif", "la.png"):
        seen = shown(tmp_path / name)
        assert np.ptp(seen, axis=-1).max() == 0 and np.abs(seen[..., 0] - encoded(light)).max() <= 2


# --- Grey in, grey out


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
        torch.testing.assert_close(srgan._keep_grey(image, raw), raw.mean(1, keepdim=True).expand_as(raw))
    assert spread(srgan.enlarge(grey, 3, {4: path})[0]) < 1e-3
    raw = generator(coloured)
    assert torch.equal(srgan._keep_grey(coloured, raw), raw)
    right = srgan.super_resolve(generator, coloured)
    assert spread(right) > 20 and (srgan.upscale(coloured, generator, config, tile=16) - right).abs().max() <= 1.01 / 255
    both = srgan._keep_grey(torch.cat([coloured, grey]), torch.cat([raw, raw]))  # each by itself
    assert torch.equal(both[:1], raw) and spread(both[1:]) < 1e-3


def test_grey_faces_are_measured_and_shown_grey(colourist, tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(2):
        Image.fromarray(FACE[..., number]).save(tmp_path / "in" / f"grey-{number}.png")
    Image.fromarray(FACE).save(tmp_path / "in" / "colour.png")
    generator, config, _ = colourist
    store = srgan.prepare(tmp_path / "in", tmp_path / "store")
    lr, hr = srgan.make_pair(store.faces(range(3)), config)
    edge, right = slice(4, -4), srgan.super_resolve(generator, lr)
    assert spread(right[:1]) > 20 and spread(right[1:]) < 1e-3
    rows = srgan.evaluate(generator, config, store, range(3))
    psnr = srgan.psnr(right[..., edge, edge], hr[..., edge, edge]).tolist()
    assert [row["srgan_psnr_rgb"] for row in rows] == pytest.approx(psnr, abs=1e-4)
    axes = np.array(srgan.stages_figure({"SRGAN": generator}, config, store.faces(range(3)), zoom=None).axes).reshape(3, 4)
    panels = [np.asarray(ax.images[0].get_array()).astype(int) for ax in axes[:, 2]]
    assert [np.ptp(panel, axis=-1).max() > 0 for panel in panels] == [True, False, False]


# --- Cut-outs


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


# --- More levels than 8 bits have

RAMP = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize("name, levels, options", [
    ("float.tif", (RAMP / 255).astype(np.float32), {}), ("float-255.tif", RAMP.astype(np.float32), {}),
    ("float-over.tif", np.where(RAMP == 255, 1.2, RAMP / 255).astype(np.float32), {}),
    ("float-16.tif", (RAMP * 257).astype(np.float32), {}),
    ("float-nan.tif", np.where(RAMP == 0, np.nan, RAMP / 255).astype(np.float32), {}),
    *((f"{bits}-in-16.{kind}", np.round(RAMP / 255 * (2**bits - 1)).astype(np.uint16), {})
      for kind in ("png", "tif") for bits in (8, 10, 12, 14, 16)),
    ("32.tif", (RAMP * 2**20).astype(np.int32), {}),
], ids=lambda value: value if isinstance(value, str) else "")
def test_pictures_of_more_than_8_bits_fill_the_range(tmp_path, name, levels, options):
    Image.fromarray(levels).save(tmp_path / name)
    assert np.abs(shown(tmp_path / name) - RAMP[..., None]).max() <= 1


def test_a_dark_picture_stays_dark_where_the_file_states_its_range_and_16_bit_grey_keeps_its_transparency(tmp_path):
    Image.fromarray((RAMP * 2).astype(np.uint16)).save(tmp_path / "dark.tif", tiffinfo={281: 4095})  # MaxSampleValue
    assert np.abs(shown(tmp_path / "dark.tif") - RAMP[..., None] / 8).max() <= 1
    Image.fromarray((RAMP * 257).astype(np.uint16)).save(tmp_path / "clear.png", transparency=40 * 257)
    assert np.abs(shown(tmp_path / "clear.png") - np.where(RAMP == 40, 255, RAMP)[..., None]).max() <= 1


# --- Odd files that any viewer opens


def photo_of(kind: str, **options) -> bytes:
    Image.fromarray(FACE).save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def long_text() -> PngImagePlugin.PngInfo:
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "node " * 600_000, zip=True)
    return text


def text_at_the_end() -> bytes:
    whole, plain = photo_of("PNG", pnginfo=long_text()), photo_of("PNG")
    start = whole.index(b"zTXt") - 4
    length = struct.unpack(">I", whole[start:start + 4])[0]
    return plain[:-12] + whole[start:start + 12 + length] + plain[-12:]


# Turned by a quarter, and a resolution of 72 / 0
ZERO = b"Exif\0\0MM\0*\0\0\0\x08\0\2\1\x12\0\3\0\0\0\1\0\6\0\0\1\x1a\0\5\0\0\0\1\0\0\0\x26\0\0\0\0\0\0\0H\0\0\0\0"
BROKEN = b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\x12\x01" * 9


ODD_FILES = {
    "motion photo": (photo_of("JPEG", quality=100) + b"\0\0\0\x18ftypmp42" + bytes(8_000_000), False, 3),
    "long text": (photo_of("PNG", pnginfo=long_text()), False, 0), "long text at the end": (text_at_the_end(), False, 0),
    "large profile": (photo_of("PNG", icc_profile=profile("sRGB") + bytes(3_000_000)), False, 0),
    "broken Exif in a PNG": (photo_of("PNG", exif=BROKEN), False, 0),
    "in a JPEG": (photo_of("JPEG", quality=100, exif=BROKEN), False, 3),
    "in a WebP": (photo_of("WEBP", lossless=True, exif=BROKEN), False, 0),
    **{f"a zero denominator in a {kind}": (photo_of(kind, exif=ZERO, **options), True, off_by) for kind, options, off_by in (
        ("PNG", {}, 0), ("JPEG", {"quality": 100}, 3), ("WEBP", {"lossless": True}, 0))},
    "icon": (photo_of("ICO", sizes=[(178, 178)]), False, 0),
}


@pytest.mark.parametrize("kind", ODD_FILES)
@pytest.mark.filterwarnings("ignore")  # Pillow's, about damage
def test_files_that_any_viewer_opens_are_read(tmp_path, kind):
    data, turned, off_by = ODD_FILES[kind]
    (tmp_path / "photo").write_bytes(data)
    right = np.rot90(FACE, -1) if turned else FACE
    assert np.abs(shown(tmp_path / "photo") - right).mean() <= off_by


@pytest.mark.parametrize("kind, feature", [("AVIF", "avif"), ("JPEG2000", "jpg_2000")])
def test_newer_formats_are_read_where_pillow_can(tmp_path, kind, feature):
    if not features.check(feature):
        pytest.skip(f"this Pillow has no {kind}")
    (tmp_path / "photo").write_bytes(photo_of(kind, quality=95) if kind == "AVIF" else photo_of(kind))
    assert np.abs(shown(tmp_path / "photo") - FACE).mean() <= 3


def test_what_to_do_with_heic_and_with_a_zip_among_photos_is_said(tmp_path):
    (tmp_path / "iphone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    with zipfile.ZipFile(tmp_path / "more.jpg", "w") as archive:
        archive.writestr("a.jpg", b"")
    (tmp_path / "notes.txt").write_text("words")
    for name in ("iphone.heic", "more.jpg", "notes.txt"):
        with pytest.raises(ValueError, match=f"{name}: not an image .*save HEIC as JPEG, give a zip as the source by itself"):
            srgan.load_image(tmp_path / name)


def test_large_jpegs_are_reduced_while_a_store_decodes_them_and_whole_otherwise(tmp_path, monkeypatch):
    sizes, load = [], JpegImagePlugin.JpegImageFile.load
    big = Image.fromarray(FACE).resize((3000, 3000), Image.BICUBIC)
    (tmp_path / "in").mkdir()
    big.save(tmp_path / "in" / "big.jpg", quality=95)
    Image.fromarray(FACE).resize((1400, 1000)).save(tmp_path / "in" / "small.jpg")
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", lambda image: (sizes.append(image.size), load(image))[1])
    stored = srgan.prepare(tmp_path / "in", tmp_path / "store").faces([0])[0].permute(1, 2, 0).numpy().astype(int)
    assert set(sizes) == {(750, 750), (1400, 1000)} and np.abs(stored - FACE).mean() < 2
    assert srgan.load_image(tmp_path / "in" / "big.jpg").shape == (1, 3, 3000, 3000)


def test_a_result_that_no_machine_can_hold_is_said_in_one_line_with_what_it_needs(tmp_path, capsys, monkeypatch):
    with pytest.raises(MemoryError, match="160000 x 160000 px need 256.0 GB of memory, more than this machine has: reduce"):
        monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 4_000_000}.get)
        srgan.enlarge(torch.zeros(1, 3, 1, 1).expand(1, 3, 20_000, 20_000), 8)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 50}.get)
    for name, side in (("a.png", 90), ("b.png", 8)):  # the second fits
        Image.new("RGB", (side, side)).save(tmp_path / name)
    line = done(capsys, "upscale", tmp_path / "a.png", tmp_path / "b.png", "--scale", 2, "--out", tmp_path / "out", status=2)
    assert "1 of 2" in line and "a.png: 180 x 180 px need" in line and (tmp_path / "out" / "b-x2.png").exists()


# --- Odd names and places


def test_a_name_that_the_console_cannot_print_is_escaped_and_the_command_succeeds(tmp_path, monkeypatch):
    Image.fromarray(FACE[:9, :9]).save(tmp_path / "фото 1.jpg")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(console := io.BytesIO(), "cp1252"))  # as PYTHONIOENCODING=cp1252 makes it
        assert srgan.main(["upscale", str(tmp_path / "фото 1.jpg"), "--scale", "2", "--out", str(tmp_path / "out")]) == 0
        sys.stdout.flush()
        assert b"\\u0444\\u043e\\u0442\\u043e 1-x2.png" in console.getvalue()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["фото 1-x2.png"]


def test_upscale_takes_any_factor_folders_patterns_and_weights_by_their_run_or_file(colourist, tmp_path, capsys):
    path, run = colourist[2], colourist[2].parent
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    for name in ("a.png", "b [1].png", ".hidden.png"):
        Image.fromarray(FACE[:20, :30]).save(tmp_path / "in" / name)

    def made(*arguments) -> dict:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
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
    expected = srgan.enlarge(srgan.load_image(tmp_path / "in" / "a.png"), 1.5, {4: path})
    assert expected[1] == "4x network, reduced to 1.5x"
    last = max(tmp_path.glob("out*"), key=lambda out: int(out.name[3:]))
    assert torch.equal(srgan.load_image(last / "a-x1.5.png"), expected[0])
    for nothing in ("in/*.jpg", "in/deeper"):
        assert "1 of 1" in done(capsys, "upscale", tmp_path / nothing, "--out", tmp_path / "o", status=2)


def test_links_are_followed_once_and_other_archives_and_single_pictures_are_told_what_to_do(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere").mkdir()
    Image.fromarray(FACE).save(tmp_path / "elsewhere" / "a.jpg")
    for link, target in (("linked", tmp_path / "elsewhere"), ("back", tmp_path / "in"), ("again", tmp_path / "elsewhere")):
        (tmp_path / "in" / link).symlink_to(target)
    (name,) = srgan.prepare(tmp_path / "in", tmp_path / "store").names
    assert name in ("linked/a.jpg", "again/a.jpg")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "elsewhere" / "a.jpg")
    for source in (tmp_path / "a.tar.gz", tmp_path / "elsewhere" / "a.jpg"):
        with pytest.raises(ValueError, match="not a zip .*: fetch it again; of pictures, or of another archive"):
            srgan.prepare(source, tmp_path / "store 2")


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_photos_can_be_enlarged_and_shown(tmp_path, count):
    for number in range(count):
        Image.fromarray(FACE).save(tmp_path / f"IMG_{number}.jpg")
        assert srgan.enlarge(srgan.load_image(tmp_path / f"IMG_{number}.jpg"), 2)[0].shape == (1, 3, 356, 356)
