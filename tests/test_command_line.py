"""The command line: the whole way, and one clear line for every bad input."""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import srgan_utils as srgan

TINY_SET = [f"{name}={value}" for name, value in TINY.items()]
METRICS = {"psnr_rgb", "ssim_rgb", "psnr_y", "ssim_y", "sharpness", "checkerboard"}


def contents(*folders) -> dict:
    """Every file below `folders` with its bytes."""
    return {path: path.read_bytes() for folder in folders for path in Path(folder).rglob("*") if path.is_file()}


def refusal(capsys, *arguments) -> str:
    """The one line on standard error with which the command must end; progress bars before it do not count."""
    capsys.readouterr()
    assert srgan.main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.split("\n") if line and not line.startswith("\r")]
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0] and "usage:" not in lines[0]
    return lines[0]


def done(capsys, *arguments) -> str:
    """Standard output of a command that must succeed."""
    capsys.readouterr()
    status, told = srgan.main([str(argument) for argument in arguments]), capsys.readouterr()
    assert status == 0, told.err
    return told.out


def picture(width: int = 13, height: int = 9) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([60 + 9 * x, 200 - 11 * y, 100 + 4 * (x + y)], -1).astype(np.uint8)


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.fromarray(picture()).save(tmp_path / "photo.jpg", quality=95)
    return tmp_path / "photo.jpg"


@pytest.fixture(scope="module")
def weights(tiny_run, tmp_path_factory) -> Path:
    """The tiny 4x generator, apart from its run."""
    return Path(shutil.copy(tiny_run / "generator.safetensors", tmp_path_factory.mktemp("weights")))


@pytest.fixture
def blocked(tmp_path) -> Path:
    """A folder that cannot be made, even by root: it would lie below a file."""
    (tmp_path / "file").write_text("a file")
    return tmp_path / "file" / "folder"


# --- The whole way


def test_prepare_train_compare_upscale(tmp_path, photo, capsys):
    store, run, out = tmp_path / "store", tmp_path / "run", tmp_path / "out"
    assert "17 train" in done(capsys, "prepare", "synthetic", "--store", store, "--limit", 17)
    told = done(capsys, "train", "--store", store, "--run", run, "--scale", 2, "--set", *TINY_SET[:4], "--set", *TINY_SET[4:])
    assert "finished" in told
    config = json.loads((run / "config.json").read_text())
    assert config["config"]["scale"] == 2 and config["config"]["preset_name"] == "sharp"
    assert {name: config["config"][name] for name in TINY} == TINY
    assert config["store"] == srgan.FaceStore(store).fingerprint
    with open(run / "history.csv", newline="") as file:
        assert next(csv.reader(file))[0] == "step"
    assert (run / "pretrained.safetensors").exists() and any((run / "ckpt").iterdir()) and any((run / "samples").iterdir())

    table = done(capsys, "compare", "--store", store, "--run", run, "--out", out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics) == {"scale", "split", "images", "crop", "hr_size", "bicubic", "srgan", "hr", "gain", "added"}
    assert (metrics["scale"], metrics["split"], metrics["images"], metrics["crop"], metrics["hr_size"]) == (2, "test", 2, 176, 32)
    assert set(metrics["bicubic"]) == set(metrics["srgan"]) == METRICS and set(metrics["hr"]) == {"sharpness", "checkerboard"}
    assert metrics["hr"]["sharpness"] == 1
    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    for method in ("bicubic", "srgan"):  # means of per-image values
        for name in METRICS:
            mean = np.mean([float(row[f"{method}_{name}"]) for row in rows])
            assert metrics[method][name] == (pytest.approx(mean, abs=2e-5) if np.isfinite(mean) else None)
    assert f"{metrics['bicubic']['psnr_rgb']:.2f}" in table
    assert Image.open(out / "panels.png").size[0] > 300 and Image.open(out / "curves.png").size[0] > 300

    assert "photo-x2.png" in done(capsys, "upscale", photo, "--out", out, "--run", run)
    assert Image.open(out / "photo-x2.png").size == (26, 18)


def test_compare_takes_a_view_a_split_and_a_count(store, weights, tmp_path, capsys):
    done(capsys, "compare", "--store", store.folder, "--weights", weights, "--out", tmp_path, "--split", "all", "--count", 5,
         "--set", "crop=144", "hr_size=48")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [metrics[key] for key in ("scale", "split", "images", "crop", "hr_size")] == [4, "all", 5, 144, 48]


def test_blend_goes_from_the_pixel_loss_parent_to_the_final_generator(store, tiny_run, tmp_path, capsys):
    def compared(*arguments):
        done(capsys, "compare", "--store", store.folder, "--out", tmp_path / "out", "--count", 2, *arguments)
        return json.loads((tmp_path / "out" / "metrics.json").read_text())["srgan"]

    ends = [compared("--weights", tiny_run / f"{name}.safetensors") for name in ("pretrained", "generator")]
    assert ends[0] != ends[1]
    assert [compared("--run", tiny_run, "--blend", amount) for amount in ("0", "1.0")] == ends
    between = compared("--run", tiny_run, "--blend", "0.5")
    assert between not in ends and compared("--weights", tiny_run / "generator.safetensors", "--blend", "0.5") == between


def test_the_parent_is_found_beside_a_generator(tmp_path):
    for name in ("generator", "pretrained", "srgan-x8", "srgan-x8-pixel", "alone"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    parents = {name: srgan.find_parent(tmp_path / f"{name}.safetensors") for name in ("generator", "srgan-x8", "alone")}
    assert {name: parent and parent.stem for name, parent in parents.items()} == {
        "generator": "pretrained", "srgan-x8": "srgan-x8-pixel", "alone": None}


def test_the_error_panel_is_drawn_on_demand(store, weights, tmp_path, capsys):
    widths = []
    for more in ([], ["--errors"]):
        done(capsys, "compare", "--store", store.folder, "--weights", weights, "--out", tmp_path, "--count", 1, *more)
        widths.append(Image.open(tmp_path / "panels.png").width)
    assert widths[1] == pytest.approx(widths[0] * 5 / 4, rel=0.01) and (tmp_path / "scores.png").exists()


def test_report_makes_a_figure_and_a_table_for_each_scale(store, tmp_path, capsys):
    told = done(capsys, "report", "--store", store.folder, "--out", tmp_path, "--scales", 2, 4, "--epochs", 0.1, "--set",
                "hr_size=48", "channels=4", "residual_blocks=1", "content=pixel", "batch_size=2")
    for scale in (2, 4):
        assert srgan.stages_table(tmp_path / f"x{scale}") in told
        assert Image.open(tmp_path / f"x{scale}" / "stages.png").width > 600


@pytest.mark.parametrize("arguments, message", [
    (["--scales", "3"], "choose 2, 4, 8 or 16"), (["--epochs", "0"], "above 0"), (["--set", "vgg"], "FIELD=VALUE"),
    (["--set", "chanels=4"], "did you mean 'channels'"), (["--set", "vgg=nowhere.pth"], "no such file"),
])
def test_bad_options_of_report(store, tmp_path, capsys, arguments, message):
    assert message in refusal(capsys, "report", "--store", store.folder, "--out", tmp_path / "out", *arguments)


def test_train_on_a_finished_run_does_nothing_more(store, tiny_run, capsys):
    before = contents(tiny_run / "ckpt")
    assert "finished" in done(capsys, "train", "--store", store.folder, "--run", tiny_run)
    assert contents(tiny_run / "ckpt") == before


def test_prepare_names_what_it_left_out(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    Image.fromarray(picture(80, 90)).save(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    told = done(capsys, "prepare", tmp_path / "in", "--store", tmp_path / "store")
    assert "1 left out" in told and "notes.txt: not an image" in told


# --- upscale


def test_upscale_writes_stem_and_scale_and_what_the_network_makes(weights, tmp_path, capsys):
    Image.fromarray(picture()).save(tmp_path / "my.photo.png")
    done(capsys, "upscale", tmp_path / "my.photo.png", "--out", tmp_path / "deep" / "out", "--weights", weights)
    (written,) = (tmp_path / "deep" / "out").iterdir()
    generator, config, _ = srgan.load_generator(weights)
    expected = srgan.upscale(srgan.load_image(tmp_path / "my.photo.png"), generator, config)
    assert written.name == "my.photo-x4.png" and Image.open(written).mode == "RGB"
    torch.testing.assert_close(srgan.load_image(written), expected, rtol=0, atol=1.01 / 255)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P"])
def test_upscale_keeps_alpha(weights, tmp_path, capsys, kind):
    image, alpha = Image.fromarray(picture()), Image.fromarray((np.indices((9, 13)).sum(0) % 2 * 200 + 30).astype(np.uint8))
    if kind == "P":
        image, clear = image.quantize(8), 3
        alpha = Image.fromarray(np.where(np.asarray(image) == clear, 0, 255).astype(np.uint8))
        image.save(tmp_path / "a.png", transparency=clear)
    else:
        image = image.convert(kind)
        image.putalpha(alpha)
        image.save(tmp_path / "a.png")
    done(capsys, "upscale", tmp_path / "a.png", "--out", tmp_path / "out", "--weights", weights)
    large = Image.open(tmp_path / "out" / "a-x4.png")
    assert (large.mode, large.size) == ("RGBA", (52, 36))
    expected = np.asarray(alpha.resize((52, 36), Image.BICUBIC)).astype(int)
    assert np.abs(np.asarray(large.getchannel("A")) - expected).max() <= 1


def test_upscale_turns_a_photo_upright(weights, tmp_path, capsys):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(picture(13, 9)).save(tmp_path / "a.jpg", exif=exif)
    done(capsys, "upscale", tmp_path / "a.jpg", "--out", tmp_path, "--weights", weights)
    assert Image.open(tmp_path / "a-x4.png").size == (36, 52)


def test_two_images_with_one_name_are_refused_before_anything_is_written(weights, photo, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    Image.fromarray(picture()).save(tmp_path / "other" / "photo.png")
    line = refusal(capsys, "upscale", photo, tmp_path / "other" / "photo.png", "--out", tmp_path / "out", "--weights", weights)
    assert "photo-x4.png" in line and str(photo) in line
    assert not contents(tmp_path / "out")


def test_one_bad_image_does_not_keep_the_others_back(weights, photo, tmp_path, capsys):
    (tmp_path / "notes.png").write_text("not an image")
    (tmp_path / "cut.jpg").write_bytes(photo.read_bytes()[:300])
    line = refusal(capsys, "upscale", tmp_path / "notes.png", photo, tmp_path / "cut.jpg", tmp_path / "nowhere.jpg",
                   "--out", tmp_path / "out", "--weights", weights)
    assert "3 of 4" in line and all(name in line for name in ("notes.png: not an image", "cut.jpg", "nowhere.jpg"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["photo-x4.png"]


# --- Bad input: one line, status 2, nothing lost


@pytest.mark.parametrize("make, message", [
    (lambda path: None, "no such source"),
    (lambda path: path.mkdir(), "empty"),
    (lambda path: path.write_text("<html>"), "not a zip"),
    (lambda path: (path.mkdir(), (path / "a.txt").write_text("no image")), "no usable image"),
    (lambda path: (path.mkdir(), Image.new("RGB", (63, 63)).save(path / "a.png")), "too small"),
], ids=["missing", "empty", "no zip", "no image", "small"])
def test_bad_sources(tmp_path, capsys, make, message):
    make(tmp_path / "in.zip")
    before = contents(tmp_path)
    assert message in refusal(capsys, "prepare", tmp_path / "in.zip", "--store", tmp_path / "store")
    assert contents(tmp_path).items() >= before.items() and not (tmp_path / "store" / "store.json").exists()


@pytest.mark.parametrize("scale", ["3", "0", "32", "four", "-2", "2.5", ""])
def test_impossible_scales(store, weights, photo, tmp_path, capsys, scale):
    out = tmp_path / "new"
    for arguments in (["train", "--store", store.folder, "--run", out, f"--scale={scale}"],
                      ["train", "--store", store.folder, "--run", out, "--set", f"scale={scale}"],
                      ["upscale", photo, "--out", out, "--weights", weights, f"--scale={scale}"],
                      ["compare", "--store", store.folder, "--out", out, f"--scale={scale}"]):
        assert "2, 4, 8 or 16" in refusal(capsys, *arguments)
    assert not out.exists()


@pytest.mark.parametrize("arguments, message", [
    (["--preset", "shrap"], "did you mean 'sharp'"),
    (["--set", "batchsize=8"], "did you mean 'batch_size'"), (["--set", "batch_size"], "FIELD=VALUE"),
    (["--set", "batch_size=many"], "whole number"), (["--set", "batch_size=0"], "nearest valid: 1"),
    (["--set", "content=pixels"], "did you mean 'pixel'"), (["--set", "hr_size=90"], "nearest that is: 8"),
    (["--set", "steps=3", "crop=400"], "nearest valid: 178"), (["--max-minutes", "soon"], "number above 0"),
    (["--max-minutes", "0"], "number above 0"), (["--for-minutes", "nan"], "number above 0"),
    (["--max-minutes", "1", "--for-minutes", "1"], "not both"), (["--colour", "red"], "--colour"),
])
def test_bad_options_of_train_make_no_run(store, tmp_path, capsys, arguments, message):
    assert message in refusal(capsys, "train", "--store", store.folder, "--run", tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, message", [
    (["--scale", "8"], "scale=4, not 8"), (["--preset", "paper"], "sharp"), (["--set", "batch_size=4"], "batch_size=2, not 4"),
    (["--set", "seed=1", "steps=9"], "seed=0, not 1"), (["--set", "hr_size=64"], "hr_size=32, not 64"),
])
def test_a_run_of_another_kind_is_left_as_it_is(store, tiny_run, capsys, arguments, message):
    before = contents(tiny_run)
    assert message in refusal(capsys, "train", "--store", store.folder, "--run", tiny_run, *arguments)
    assert contents(tiny_run) == before


def test_a_run_on_other_faces_is_left_as_it_is(store, tiny_run, tmp_path, capsys):
    srgan.prepare("synthetic", tmp_path / "other", limit=1)
    before = contents(tiny_run)
    assert "other faces" in refusal(capsys, "train", "--store", tmp_path / "other", "--run", tiny_run)
    assert contents(tiny_run) == before


def flip_a_byte(data: bytes) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


@pytest.mark.parametrize("spoil, message", [
    (lambda data: data[:-50], "damaged"), (flip_a_byte, "checksum"), (lambda data: data[:5], "damaged"),
    (lambda data: b"", "damaged"),
    (lambda data: b"PK\x03\x04 a pickle from torch.save", "not a safetensors file"), (None, "no such weights"),
], ids=["cut", "flipped", "five bytes", "nothing", "pickle", "missing"])
def test_bad_weights(store, weights, photo, tmp_path, capsys, spoil, message):
    path, out = tmp_path / "w.safetensors", tmp_path / "new"
    if spoil:
        path.write_bytes(spoil(weights.read_bytes()))
    before = contents(tmp_path)
    assert message in refusal(capsys, "upscale", photo, "--out", out, "--weights", path)
    assert message in refusal(capsys, "compare", "--store", store.folder, "--out", out, "--weights", path)
    assert contents(tmp_path) == before


def test_foreign_and_mismatched_weights(store, weights, photo, tmp_path, capsys):
    from safetensors.torch import save_file

    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    generator, config, _ = srgan.load_generator(weights)
    srgan.export_generator(tmp_path / "wrong.safetensors", generator, replace(config, scale=8))
    for arguments, message in (
            (["--weights", tmp_path / "foreign.safetensors"], "not a generator of this project"),
            (["--weights", tmp_path / "wrong.safetensors"], "wrong.safetensors"),  # an 8x header on the tensors of 4x
            (["--weights", weights, "--scale", "8"], "4x, not 8x"), (["--run", tmp_path], "train it first"),
            (["--run", weights.parent, "--scale", "2"], "4x, not 2x"),
            (["--run", weights.parent, "--weights", weights], "not both")):
        assert message in refusal(capsys, "upscale", photo, "--out", tmp_path / "new", *arguments)
        assert message in refusal(capsys, "compare", "--store", store.folder, "--out", tmp_path / "new", *arguments)
    assert not (tmp_path / "new").exists()


def test_a_store_from_a_newer_format_or_none_at_all(weights, tmp_path, capsys):
    folder = tmp_path / "store"
    srgan.prepare("synthetic", folder, limit=1)
    record = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps(record | {"format": record["format"] + 1}))
    before = contents(folder)
    for where, message in ((folder, "newer"), (tmp_path / "nowhere", "prepare SOURCE")):
        assert message in refusal(capsys, "train", "--store", where, "--run", tmp_path / "run")
        assert message in refusal(capsys, "compare", "--store", where, "--weights", weights, "--out", tmp_path / "out")
    assert "newer" in refusal(capsys, "prepare", "synthetic", "--limit", 1, "--store", folder)
    assert contents(folder) == before and not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


def test_folders_that_cannot_be_written(store, weights, photo, blocked, tmp_path, capsys):
    before = contents(tmp_path)
    for folder in (blocked, blocked.parent):  # below a file, and the file itself
        for arguments in (["demo", "--out", folder], ["prepare", "synthetic", "--limit", 1, "--store", folder],
                          ["train", "--store", store.folder, "--run", folder],
                          ["train", "--store", store.folder, "--run", tmp_path / "run", "--backup", folder],
                          ["compare", "--store", store.folder, "--weights", weights, "--out", folder],
                          ["upscale", photo, "--weights", weights, "--out", folder]):
            assert f"cannot write into {folder}" in refusal(capsys, *arguments)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("arguments, message", [
    (["--split", "tset"], "did you mean 'test'"), (["--count", "0"], "above 0"), (["--count", "2.5"], "whole number"),
    (["--set", "steps=3"], "crop and hr_size"), (["--set", "hr_size=50"], "nearest that is: "),
    (["--set", "crop=500"], "nearest valid: 178"),
    (["--set", "hr_size=16"], "too small to measure"), (["--blend", "1.1"], "from 0 (faithful) to 1 (sharp)"),
    (["--blend", "much"], "from 0 (faithful) to 1 (sharp)"), (["--blend", "0.5"], "leave it out, or give a run"),
])
def test_bad_options_of_compare(store, weights, tmp_path, capsys, arguments, message):
    (tmp_path / "metrics.json").write_text("older")
    assert message in refusal(capsys, "compare", "--store", store.folder, "--weights", weights, "--out", tmp_path, *arguments)
    assert contents(tmp_path) == {tmp_path / "metrics.json": b"older"}


@pytest.mark.parametrize("arguments, message", [
    ([], "COMMAND"), (["paint"], "paint"), (["prepare"], "SOURCE"), (["upscale", "a.png"], "--out"),
    (["prepare", "synthetic", "--store", "s", "--limit", "0"], "above 0"),
    (["prepare", "synthetic", "--store", "s", "--limit", "x"], "whole number"),
])
def test_commands_that_are_not_whole(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, *arguments)
    assert not contents(tmp_path)


def test_an_empty_test_split_is_said_in_one_line(weights, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    Image.fromarray(picture(80, 80)).save(tmp_path / "in" / "a.png")  # crc32 mod 100: 47, a training face
    srgan.prepare(tmp_path / "in", tmp_path / "store")
    line = refusal(capsys, "compare", "--store", tmp_path / "store", "--weights", weights, "--out", tmp_path / "out")
    assert "no test faces" in line and "--split all" in line


def test_failures_to_fetch_are_told_too(monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise ConnectionError("the portraits could not be fetched: use 'synthetic'")

    monkeypatch.setattr(srgan, "_open_portraits", fail)
    assert "'synthetic'" in refusal(capsys, "prepare", "portraits", "--store", tmp_path)


def test_as_a_script_it_ends_with_status_2_and_one_line(tmp_path):
    script = str(Path(srgan.__file__))
    command = [sys.executable, script, "prepare", "nowhere", "--store", "s"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert len(ran.stderr.splitlines()) == 1 and "no such source: nowhere" in ran.stderr


def test_help_needs_no_store_and_names_the_commands():
    script = str(Path(srgan.__file__))
    ran = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stderr == ""
    assert all(f" {command} " in ran.stdout for command in ("demo", "prepare", "train", "compare", "upscale"))
