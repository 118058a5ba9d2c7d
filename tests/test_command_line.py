"""The command line: the whole way, and one clear line for every bad input."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import srgan_utils as srgan

VIEW = ("scale", "split", "images", "crop", "hr_size")


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    return Path(shutil.copy(tiny_run / "generator.safetensors", tmp_path_factory.mktemp("apart-from-its-run")))


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
    assert (run / "history.csv").exists() and any((run / "ckpt").iterdir()) and any((run / "samples").iterdir())
    before, other = contents(run), srgan.prepare("synthetic", tmp_path / "other", limit=1).folder
    for arguments, message in ((("--scale", 8), "scale=2, not 8"), (("--preset", "paper"), "sharp"),
                               (("--set", "seed=1", "steps=9"), "seed=0, not 1"), (("--store", other), "other faces")):
        assert message in refusal(capsys, *train, *arguments)
    assert contents(run) == before
    compare = ["compare", "--store", store, "--run", run, "--out", out]
    table, metrics = done(capsys, *compare), json.loads((out / "metrics.json").read_text())
    assert [metrics[name] for name in VIEW] == [2, "test", 2, 176, 32] and f"{metrics['bicubic']['psnr_rgb']:.2f}" in table
    rows, width = list(csv.DictReader((out / "metrics.csv").read_text().splitlines())), Image.open(out / "panels.png").width
    for method, name in (("bicubic", "psnr_rgb"), ("srgan", "ssim_y")):  # means of per-image values
        assert metrics[method][name] == pytest.approx(np.mean([float(row[f"{method}_{name}"]) for row in rows]), abs=2e-5)
    assert len(rows) == 2 and Image.open(out / "curves.png").width > 300
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
    between = compared("--run", tiny_run, "--blend", "0.5")  # of shipped ones: test_weights.py
    assert between not in ends and compared("--weights", tiny_run / "generator.safetensors", "--blend", "0.5") == between


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


def test_upscale_turns_photos_upright_writes_over_nothing_and_names_bad_ones_at_the_end(weights, tmp_path, capsys, monkeypatch):
    exif = Image.Exif()
    exif[274] = 6
    one, two = saved(tmp_path / "a.jpg", exif=exif), saved(tmp_path / "other" / "a.png", 10, 10)
    (tmp_path / "notes.png").write_text("not an image")
    (tmp_path / "cut.jpg").write_bytes(one.read_bytes()[:300])
    line = refusal(capsys, "upscale", tmp_path / "notes.png", one, tmp_path / "cut.jpg", tmp_path / "nowhere.jpg", two,
                   "--out", tmp_path / "out", "--weights", weights)
    assert "3 of 5" in line and all(name in line for name in ("notes.png: not an image", "cut.jpg", "nowhere.jpg"))
    assert sorted(Image.open(path).size for path in (tmp_path / "out").iterdir()) == [(36, 52), (40, 40)]
    monkeypatch.setattr(srgan, "enlarge", mock.Mock(side_effect=RuntimeError("not enough memory: you tried to allocate")))
    assert "2 of 2" in refusal(capsys, "upscale", one, two, "--out", tmp_path / "out")


@pytest.mark.parametrize("arguments, message", [
    *((f"{command}={scale}", "2, 4, 8") for command in ("train --scale", "train --set scale", "compare --scale")
      for scale in ("3", "0", "32", "four", "-2", "2.5", "")),
    ("train --preset shrap", "did you mean 'sharp'"), ("train --set batchsize=8", "did you mean 'batch_size'"),
    ("train --set batch_size", "batch_size= must be a whole number"), ("train --set steps=3 crop=400", "a whole number from 16 to 178"),
    ("train --set epochs=1 steps=3", "give one of them"), ("train --colour red", "--colour"),
    ("train --max-minutes soon", "number above 0"), ("train --max-minutes 0", "number above 0"),
    ("train --for-minutes nan", "number above 0"), ("train --max-minutes 1 --for-minutes 1", "not allowed with"),
    ("train --backup run", "--backup and --run are one folder"),
    ("compare --split tset", "test"), ("compare --count 0", "above 0"), ("compare --count 2.5", "whole number"),
    ("compare --set steps=3", "crop and hr_size"), ("compare --set hr_size=50", "nearest that is: "),
    ("compare --blend 1.1", "from 0 to 1"), ("compare --blend much", "from 0 to 1"), ("compare --blend 0.5", "leave it out"),
    ("compare --set hr_size=16", "too small to measure"), ("", "command"), ("paint", "paint"), ("prepare", "source"),
    *((f"upscale a.png --out out --scale={scale}", "from 1 to 16") for scale in ("0.9", "16.1", "four", "nan", "")),
    ("upscale a.png", "--out"), ("upscale a.png --out out --photo --run r", "not both"), ("prepare synthetic --store s --limit 0", "above 0"),
    ("prepare synthetic --store s --limit x", "whole number")])
def test_bad_options_are_told_and_leave_nothing(store, weights, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics.json").write_text("older")
    more = {"train": f"--store {store.folder} --run run", "compare": f"--store {store.folder} --weights {weights} --out ."}
    told = refusal(capsys, *arguments.split(), *more.get(arguments.partition(" ")[0], "").split())
    assert message.replace("'", "") in told.replace("'", "")  # which some versions of argparse put around choices
    assert contents(tmp_path) == {tmp_path / "metrics.json": b"older"} and not (tmp_path / "run").exists()


def test_bad_weights_are_refused_before_anything_is_written(store, weights, tmp_path, capsys):
    out, photo = tmp_path / "new", saved(tmp_path / "photo.jpg")
    (tmp_path / "cut").write_bytes(weights.read_bytes()[:-50])  # damage of other kinds: test_checkpoints.py
    before = contents(tmp_path)
    for arguments, message in (
            (["--weights", tmp_path / "cut"], "cut is damaged"), (["--weights", "missing"], "no such weights"),
            (["--weights", weights, "--scale", "8"], "4x, not 8x"), (["--run", tmp_path], "train it first")):
        assert message in refusal(capsys, "upscale", photo, "--out", out, *arguments)
        assert message in refusal(capsys, "compare", "--store", store.folder, "--out", out, *arguments)
    assert contents(tmp_path) == before and not out.exists()


def test_a_store_that_is_of_no_use_says_what_to_do(weights, tmp_path, capsys):
    damaged, out = srgan.prepare("synthetic", tmp_path / "damaged", limit=1).folder, tmp_path / "out"
    (damaged / "faces.u8").write_bytes(b"cut off")
    saved(tmp_path / "in" / "a.png", 80, 80)  # crc32 mod 100: 47, a training face
    one, before = srgan.prepare(tmp_path / "in", tmp_path / "one").folder, contents(tmp_path)
    for command in (["train", "--run", out], ["compare", "--out", out]):
        assert "prepare SOURCE" in refusal(capsys, *command, "--store", tmp_path / "nowhere")
        assert "prepare it again" in refusal(capsys, *command, "--store", damaged)
    assert "--split all" in refusal(capsys, *command, "--weights", weights, "--store", one)
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
