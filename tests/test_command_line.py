"""The command line: the whole way, and one clear line for every bad input."""

import csv
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from safetensors.torch import save_file

import srgan_utils as srgan

METRICS = {"psnr_rgb", "ssim_rgb", "psnr_y", "ssim_y", "sharpness", "checkerboard"}
VIEW = ("scale", "split", "images", "crop", "hr_size")


def contents(*folders) -> dict:
    """Every file below `folders` with its bytes."""
    return {path: path.read_bytes() for folder in folders for path in Path(folder).rglob("*") if path.is_file()}


def done(capsys, *arguments, status: int = 0):
    """What a command, which must end with that status, told."""
    capsys.readouterr()
    ended, told = srgan.main([str(argument) for argument in arguments]), capsys.readouterr()
    assert ended == status, told.err
    return told.out if status == 0 else told.err


def refusal(capsys, *arguments) -> str:
    """The one line on standard error with which the command must end; progress bars before it do not count."""
    lines = [line for line in done(capsys, *arguments, status=2).split("\n") if line and not line.startswith("\r")]
    assert len(lines) == 1 and "Traceback" not in lines[0] and "usage:" not in lines[0], lines
    return lines[0]


def saved(path: Path, width: int = 13, height: int = 9, mode: str = "RGB", **options) -> Path:
    """A photo in some colours, with a chessboard of alpha where the mode has one."""
    path.parent.mkdir(exist_ok=True)
    y, x = np.mgrid[:height, :width]
    image = Image.fromarray(np.stack([60 + 9 * x, 200 - 11 * y, 100 + 4 * (x + y)], -1).astype(np.uint8))
    image = image.quantize(8) if mode == "P" else image.convert(mode)
    if "A" in mode:
        image.putalpha(Image.fromarray(((x + y) % 2 * 200 + 30).astype(np.uint8)))
    image.save(path, **options)
    return path


@pytest.fixture(scope="module")
def weights(tiny_run, tmp_path_factory) -> Path:
    """The tiny 4x generator, apart from its run."""
    return Path(shutil.copy(tiny_run / "generator.safetensors", tmp_path_factory.mktemp("weights")))


def test_prepare_train_compare_upscale(tmp_path, capsys):
    store, run, out = tmp_path / "store", tmp_path / "run", tmp_path / "out"
    assert "17 train" in done(capsys, "prepare", "synthetic", "--store", store, "--limit", 17)
    tiny = [f"{name}={value}" for name, value in TINY.items()]
    train = ["train", "--store", store, "--run", run, "--scale", 2, "--set", *tiny[:4], "--set", *tiny[4:]]
    assert "finished" not in done(capsys, *train, "--max-minutes", "1e-6")  # stops after the first update
    for _ in range(2):  # finished, it does nothing more
        assert "finished" in done(capsys, *train)
    record = json.loads((run / "config.json").read_text())
    assert record["config"].items() >= (TINY | {"scale": 2, "preset_name": "sharp"}).items()
    assert record["store"] == srgan.FaceStore(store).fingerprint
    assert [row["step"] for row in csv.DictReader((run / "history.csv").read_text().splitlines())] == list("123456")
    assert (run / "pretrained.safetensors").exists() and any((run / "ckpt").iterdir()) and any((run / "samples").iterdir())
    compare = ["compare", "--store", store, "--run", run, "--out", out]
    table, metrics = done(capsys, *compare), json.loads((out / "metrics.json").read_text())
    assert set(metrics) == {"scale", "split", "images", "crop", "hr_size", "bicubic", "srgan", "hr", "gain", "added"}
    assert [metrics[name] for name in VIEW] == [2, "test", 2, 176, 32] and metrics["hr"]["sharpness"] == 1
    assert set(metrics["bicubic"]) == set(metrics["srgan"]) == METRICS > set(metrics["hr"]) == {"sharpness", "checkerboard"}
    rows, width = list(csv.DictReader((out / "metrics.csv").read_text().splitlines())), Image.open(out / "panels.png").width
    for method, name in itertools.product(("bicubic", "srgan"), METRICS):  # means of per-image values
        mean = np.mean([float(row[f"{method}_{name}"]) for row in rows])
        assert len(rows) == 2 and metrics[method][name] == (pytest.approx(mean, abs=2e-5) if np.isfinite(mean) else None)
    assert f"{metrics['bicubic']['psnr_rgb']:.2f}" in table and Image.open(out / "curves.png").width > 300
    done(capsys, *compare, "--errors", "--split", "all", "--count", 5, "--set", "crop=144", "hr_size=48")
    assert [json.loads((out / "metrics.json").read_text())[name] for name in VIEW] == [2, "all", 5, 144, 48]
    assert Image.open(out / "panels.png").width == pytest.approx(width * 5 / 4, rel=0.01)  # a fifth panel
    assert "photo-x2.png" in done(capsys, "upscale", saved(tmp_path / "photo.jpg"), "--out", out, "--run", run)
    assert Image.open(out / "photo-x2.png").size == (26, 18)


def test_blend_goes_from_the_pixel_loss_parent_to_the_final_generator(store, tiny_run, tmp_path, capsys):
    def compared(*arguments):
        done(capsys, "compare", "--store", store.folder, "--out", tmp_path / "out", "--count", 2, *arguments)
        return json.loads((tmp_path / "out" / "metrics.json").read_text())["srgan"]

    ends = [compared("--weights", tiny_run / f"{name}.safetensors") for name in ("pretrained", "generator")]
    assert ends[0] != ends[1] and [compared("--run", tiny_run, "--blend", amount) for amount in ("0", "1.0")] == ends
    between = compared("--run", tiny_run, "--blend", "0.5")
    for name, ending in (("pretrained", "-pixel"), ("generator", "")):  # as the shipped ones are called
        shutil.copy(tiny_run / f"{name}.safetensors", tmp_path / f"srgan-x4{ending}.safetensors")
    assert between not in ends and compared("--weights", tmp_path / "srgan-x4.safetensors", "--blend", "0.5") == between


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_upscale_writes_what_the_network_makes_and_keeps_alpha(weights, tmp_path, capsys, mode):
    photo = saved(tmp_path / "my.photo.png", mode=mode, **({"transparency": 3} if mode == "P" else {}))
    done(capsys, "upscale", photo, "--out", tmp_path / "deep" / "out", "--weights", weights)
    (written,) = (tmp_path / "deep" / "out").iterdir()
    large, alpha = Image.open(written), Image.open(photo).convert("RGBA").getchannel("A")
    Image.open(photo).convert("RGBA").convert("RGB").save(tmp_path / "colours.png")
    expected = srgan.upscale(srgan.load_image(tmp_path / "colours.png"), *srgan.load_generator(weights)[:2])
    assert (written.name, large.size, large.mode) == ("my.photo-x4.png", (52, 36), "RGB" if mode == "RGB" else "RGBA")
    made = torch.from_numpy(np.array(large.convert("RGB"))).permute(2, 0, 1)[None] / 255
    if mode != "P":  # which hides colours: test_photos.py
        torch.testing.assert_close(made, expected, rtol=0, atol=1.01 / 255)
    wanted = np.asarray(alpha.resize((52, 36), Image.BICUBIC)).astype(int)
    assert (mode == "RGB") == (wanted.min() == 255) and np.abs(np.asarray(large.convert("RGBA"))[..., 3] - wanted).max() <= 1


def test_upscale_turns_photos_upright_writes_over_nothing_and_names_bad_ones_at_the_end(weights, tmp_path, capsys):
    exif = Image.Exif()
    exif[274] = 6
    one, two = saved(tmp_path / "a.jpg", exif=exif), saved(tmp_path / "other" / "a.png", 10, 10)
    (tmp_path / "notes.png").write_text("not an image")
    (tmp_path / "cut.jpg").write_bytes(one.read_bytes()[:300])
    line = refusal(capsys, "upscale", tmp_path / "notes.png", one, tmp_path / "cut.jpg", tmp_path / "nowhere.jpg", two,
                   "--out", tmp_path / "out", "--weights", weights)
    assert "3 of 5" in line and all(name in line for name in ("notes.png: not an image", "cut.jpg", "nowhere.jpg"))
    assert sorted(Image.open(path).size for path in (tmp_path / "out").iterdir()) == [(36, 52), (40, 40)]


def test_bad_sources(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    (tmp_path / "empty").mkdir()
    saved(tmp_path / "small" / "a.png", 63, 63)
    for path in (saved(tmp_path / "no picture" / "a.png"), tmp_path / "no zip"):
        path.write_text("<html>")
    before = contents(tmp_path)
    for name, message in (("missing", "no such source"), ("empty", "empty"), ("no zip", "not a zip"),
                          ("no picture", "no usable image"), ("small", "too small")):
        assert message in refusal(capsys, "prepare", tmp_path / name, "--store", tmp_path / "store")
    assert "or use the source 'synthetic'" in refusal(capsys, "prepare", "portraits", "--store", tmp_path / "store")
    assert contents(tmp_path) == before | contents(tmp_path / "store") and not (tmp_path / "store" / "store.json").exists()


@pytest.mark.parametrize("scale", ["3", "0", "32", "four", "-2", "2.5", ""])
def test_impossible_scales(store, tmp_path, monkeypatch, capsys, scale):
    monkeypatch.chdir(saved(tmp_path / "a.png").parent)
    for command in ("train --run new --set scale=", "train --run new --max-minutes 1e-6 --scale=", "compare --out new --scale="):
        assert "2, 4, 8" in refusal(capsys, *f"{command}{scale} --store".split(), store.folder).replace("'", "")
    assert not Path("new").exists()


@pytest.mark.parametrize("arguments, message", [
    ("train --preset shrap", "did you mean 'sharp'"), ("train --set batchsize=8", "did you mean 'batch_size'"),
    ("train --set batch_size", "batch_size= must be a whole number"), ("train --set batch_size=many", "whole number"),
    ("train --set batch_size=0", "nearest valid: 1"), ("train --set content=pixels", "did you mean 'pixel'"),
    ("train --set hr_size=90", "nearest that is: 8"), ("train --set steps=3 crop=400", "nearest valid: 178"),
    ("train --set epochs=1 steps=3", "give one of them"), ("train --colour red", "--colour"),
    ("train --max-minutes soon", "number above 0"), ("train --max-minutes 0", "number above 0"),
    ("train --for-minutes nan", "number above 0"), ("train --max-minutes 1 --for-minutes 1", "not both"),
    ("train --backup run", "--backup and --run are one folder"),
    ("compare --split tset", "test"), ("compare --count 0", "above 0"), ("compare --count 2.5", "whole number"),
    ("compare --set steps=3", "crop and hr_size"), ("compare --set hr_size=50", "nearest that is: "),
    ("compare --set crop=500", "nearest valid: 178"), ("compare --set hr_size=16", "too small to measure"),
    ("compare --blend 1.1", "from 0 to 1"), ("compare --blend much", "from 0 to 1"), ("compare --blend 0.5", "leave it out"),
    *((f"upscale a.png --out out --scale={scale}", "from 1 to 16") for scale in ("0.9", "16.1", "four", "nan", "")),
    ("", "command"), ("paint", "paint"), ("prepare", "source"), ("upscale a.png", "--out"),
    ("prepare synthetic --store s --limit 0", "above 0"), ("prepare synthetic --store s --limit x", "whole number")])
def test_bad_options_are_told_and_leave_nothing(store, weights, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics.json").write_text("older")
    more = {"train": f"--store {store.folder} --run run", "compare": f"--store {store.folder} --weights {weights} --out ."}
    assert message in refusal(capsys, *arguments.split(), *more.get(arguments.partition(" ")[0], "").split())
    assert contents(tmp_path) == {tmp_path / "metrics.json": b"older"} and not (tmp_path / "run").exists()


def test_a_run_of_another_kind_or_of_other_faces_is_left_as_it_is(store, tiny_run, tmp_path, capsys):
    other, before = srgan.prepare("synthetic", tmp_path / "other", limit=1).folder, contents(tiny_run)
    for arguments, message in (
            ("--scale 8", "scale=4, not 8"), ("--preset paper", "sharp"), ("--set batch_size=4", "batch_size=2, not 4"),
            ("--set seed=1 steps=9", "seed=0, not 1"), ("--set hr_size=64", "=32, not 64"), (f"--store {other}", "other faces")):
        assert message in refusal(capsys, "train", "--store", store.folder, "--run", tiny_run, *arguments.split())
    assert contents(tiny_run) == before


def test_bad_weights_are_refused_before_anything_is_written(store, weights, tmp_path, capsys):
    data, out, photo = weights.read_bytes(), tmp_path / "new", saved(tmp_path / "photo.jpg")
    bad = {"cut": data[:-50], "five": data[:5], "none": b"", "pickle": b"PK\x03\x04 from torch.save", "foreign": b"", "16x": b""}
    for name in bad:
        (tmp_path / name).write_bytes(bad[name])
    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "foreign")
    srgan.export_generator(tmp_path / "16x", srgan.load_generator(weights)[0], srgan.Config(scale=16))  # it has other tensors
    before = contents(tmp_path)
    for arguments, message in (
            *((["--weights", tmp_path / name], f"{name} is damaged") for name in bad),
            (["--weights", "missing"], "no such weights"), (["--weights", weights, "--scale", "8"], "4x, not 8x"),
            (["--run", tmp_path], "train it first")):
        assert message in refusal(capsys, "upscale", photo, "--out", out, *arguments)
        assert message in refusal(capsys, "compare", "--store", store.folder, "--out", out, *arguments)
    assert contents(tmp_path) == before and not out.exists()


def test_prepare_names_what_it_left_out_and_a_store_that_is_of_no_use_says_what_to_do(weights, tmp_path, capsys):
    damaged, nowhere, out = tmp_path / "damaged", tmp_path / "nowhere", tmp_path / "out"
    srgan.prepare("synthetic", damaged, limit=1)
    (damaged / "faces.u8").write_bytes(b"cut off")
    saved(tmp_path / "in" / "a.png", 80, 80)  # crc32 mod 100: 47, a training face
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    told, before = done(capsys, "prepare", tmp_path / "in", "--store", tmp_path / "one"), contents(tmp_path)
    assert "1 left out" in told and "notes.txt: not an image" in told
    for command in (["train", "--run", out], ["compare", "--out", out]):
        assert "prepare SOURCE" in refusal(capsys, *command, "--store", nowhere)
        assert "prepare it again" in refusal(capsys, *command, "--store", damaged)
    assert "prepare it again" in refusal(capsys, "prepare", "synthetic", "--limit", 1, "--store", damaged)
    assert "--split all" in refusal(capsys, *command, "--weights", weights, "--store", tmp_path / "one")
    assert contents(tmp_path) == before


def test_folders_that_cannot_be_written_are_named(store, weights, tmp_path, capsys):
    photo = saved(tmp_path / "photo.jpg")
    (tmp_path / "file").write_text("a file")
    before, train = contents(tmp_path), ["train", "--store", store.folder, "--preset", "demo", "--run"]
    for folder in (tmp_path / "file" / "folder", tmp_path / "file"):  # which even root cannot make
        for arguments in (["demo", "--out", folder], ["prepare", "synthetic", "--limit", 1, "--store", folder],
                          [*train, folder], [*train, tmp_path / "run", "--backup", folder],
                          ["compare", "--store", store.folder, "--weights", weights, "--out", folder],
                          ["upscale", photo, "--weights", weights, "--out", folder]):
            assert str(tmp_path / "file") in refusal(capsys, *arguments)
    assert contents(tmp_path) == before


def test_as_a_script_it_ends_with_status_2_and_one_line_and_help_names_the_commands(tmp_path):
    failed, helped = (subprocess.run([sys.executable, srgan.__file__, *arguments], cwd=tmp_path, capture_output=True, text=True)
                      for arguments in (["prepare", "nowhere", "--store", "s"], ["--help"]))
    assert (failed.returncode, failed.stdout, helped.returncode, helped.stderr) == (2, "", 0, "")
    assert len(failed.stderr.splitlines()) == 1 and "no such source: " in failed.stderr and "nowhere;" in failed.stderr
    assert all(f" {command} " in helped.stdout for command in ("demo", "prepare", "train", "compare", "upscale"))
