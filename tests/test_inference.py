"""Tiled enlargement, evaluation and figures, against the same done by hand."""

import csv
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import srgan_utils as srgan

LEVEL, LUMA = 1 / 255, np.float32([65.481, 128.553, 24.966]).reshape(3, 1, 1) / 255


def network(preset, scale=4, **changes):
    """A network whose weights are large enough that a pixel far away still matters; it wants no gradients."""
    tiny = {"channels": 8, "residual_blocks": 2, "precision": "fp32", "scale": scale, "hr_size": 64}
    config = srgan.Config.preset(preset, **tiny | changes)
    torch.manual_seed(1)
    generator = srgan.Generator(config).eval().requires_grad_(False)
    for name, value in generator.named_parameters():
        if name.endswith("weight") and value.dim() == 4 and "tail" not in name:
            value.mul_(1.6)
    return generator, config


@pytest.fixture(scope="module")
def photo():
    """(1, 3, 53, 47), of noise and a slope: every pixel counts."""
    return srgan.quantise(0.7 * torch.rand(1, 3, 53, 47, generator=srgan.seeded(4)) + 0.3 * torch.linspace(0, 1, 47))


@pytest.mark.parametrize("preset", ["sharp", "report", "paper"])
@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("height, width, tile", [(53, 47, 16), (53, 47, 23), (16, 33, 16), (17, 5, 16), (3, 47, 1)])
def test_tiled_equals_untiled(preset, scale, height, width, tile, photo, monkeypatch):
    generator, config = network(preset, scale)
    whole = srgan.super_resolve(generator, image := photo[..., :height, :width])
    tiled = srgan.upscale(image, generator, config, tile=tile)
    assert whole.std() > 0.02 and tiled.shape == (1, 3, height * scale, width * scale)
    assert (tiled - whole).abs().max() <= 1.01 * LEVEL
    torch.testing.assert_close(tiled * 255, (tiled * 255).round().clamp(0, 255), rtol=0, atol=1e-4)
    if (width, tile) == (47, 16):  # these images would show a seam: without an overlap they do
        monkeypatch.setattr(srgan, "receptive_radius", lambda config: -4)  # the margin of the back-projection goes, too
        assert (srgan.upscale(image, generator, config, tile=tile) - whole).abs().max() > 10 * LEVEL


@pytest.mark.parametrize("preset, changes", [("sharp", {}), ("sharp", {"degrade": True}), ("report", {}), ("paper", {})], ids=str)
def test_pictures_are_true_to_lr_but_the_reports_the_papers_and_those_of_damaged_lr_stay_theirs(preset, changes, photo):
    """What SR lacks of LR when it is made small again is added, in one step; noise must not come back."""
    generator, _ = network(preset, **changes)
    raw, sr = generator(photo), srgan.super_resolve(generator.train(), photo)
    assert generator.training  # left as it was
    if preset != "sharp" or changes:
        assert torch.equal(sr, srgan.quantise(generator.eval()(photo)))
        return
    truer = raw + srgan.bicubic(photo - srgan.bicubic(raw, (53, 47)), (212, 188))
    assert torch.equal(sr, srgan.quantise(truer))
    lost = [(srgan.bicubic(each, (53, 47)) - photo).square().mean() for each in (sr, srgan.quantise(raw))]
    assert lost[0] < 0.5 * lost[1]


def test_upscale_bounds_what_the_network_sees_however_large_the_photo_and_tells_how_far_it_is(photo, capfd):
    (generator, config), seen = network("sharp", 2), []
    generator.register_forward_hook(lambda module, inputs, output: seen.append(max(inputs[0].shape[-2:])))
    srgan.upscale(photo.repeat(1, 1, 3, 3), generator, config, tile=20)
    assert max(seen) <= 20 + 2 * (srgan.receptive_radius(config) + 4)  # a tile and its overlap
    assert len(seen) == math.ceil(159 / 20) * math.ceil(141 / 20) and "enlarging: 100%" in capfd.readouterr().err


@pytest.mark.parametrize("trained, here, used", [("bf16", "bf16", True), ("fp32", "fp32", False), ("bf16", "fp32", False),
                                                 ("fp16", "bf16", False)])  # bf16 is coarser than what a T4 trained in
def test_upscale_in_the_precision_of_the_training_or_a_finer_one(trained, here, used, photo, monkeypatch):
    (generator, config), found = network("sharp", 2), []
    exact = srgan.upscale(photo, generator, config)
    generator.register_forward_hook(lambda module, inputs, output: found.append(torch.is_autocast_enabled("cpu")))
    monkeypatch.setattr(srgan, "_resolve_precision", lambda precision, device: here)  # as on a CPU that has it or not
    away = (srgan.upscale(photo, generator, replace(config, precision=trained)) - exact).abs()
    assert found == [used] and (away.max() > 0) == used and away.max() < 8 * LEVEL and away.mean() < LEVEL


@pytest.fixture(scope="module")
def measured(store):
    """Rows of 10 faces (more than one chunk) by a 4x network in the view 144 -> 64."""
    generator, config = network("sharp", crop=144)
    return srgan.evaluate(generator, config, store, range(10)), generator, config


def luma(image):
    return 16 / 255 + (image * LUMA).sum(-3, keepdims=True)


def by_hand(image, hr):
    """PSNR (RGB, Y) and sharpness of (3, H, W) float64 arrays."""
    mse, mse_y = ((image - hr) ** 2).mean(), ((luma(image) - luma(hr)) ** 2).mean()
    energy = [(np.diff(each, axis=1) ** 2).mean() + (np.diff(each, axis=2) ** 2).mean() for each in (image, hr)]
    return -10 * math.log10(mse), -10 * math.log10(mse_y), energy[0] / energy[1]


def test_evaluate_by_hand(measured, store):
    """8-bit images that lose a border of `scale` px, each on its own."""
    rows, generator, config = measured
    assert [row["name"] for row in rows] == store.names[:10]
    for index in (0, 7, 8, 9):
        lr, hr = srgan.make_pair(store.faces([index]), config)
        for method, image in {"srgan": srgan.super_resolve(generator, lr), "bicubic": srgan.bicubic(lr, 64)}.items():
            # rounded in float32, as by `quantise`: a tie that goes the other way moves the index by a thousandth or two
            levels = [np.clip(np.round(each[0].numpy() * 255).astype(np.float64), 0, 255)[:, 4:60, 4:60] for each in (image, hr)]
            pair, row = torch.tensor(np.stack(levels) / 255, dtype=torch.float32), rows[index]
            found = [row[f"{method}_{metric}"] for metric in ("psnr_rgb", "psnr_y", "sharpness")]
            assert found == pytest.approx(by_hand(levels[0] / 255, levels[1] / 255), rel=1e-3)
            for metric, images in (("ssim_rgb", pair), ("ssim_y", torch.tensor(luma(pair.numpy())))):
                assert row[f"{method}_{metric}"] == pytest.approx(srgan.ssim(images[:1], images[1:]).item(), abs=1e-4)
            found = [row[f"{method}_checkerboard"], row["hr_checkerboard"]]
            assert found == pytest.approx(srgan.checkerboard_index(pair).tolist(), rel=3e-3)


def test_a_summary_holds_means_of_per_image_values_and_the_gain_with_its_interval(measured):
    """Under the names that metrics.json promises. Of many values the interval is the normal one, of one there is none."""
    rows, _, config = measured
    summary = srgan.summarise(rows, config, "all")
    assert {key: summary[key] for key in ("scale", "split", "images", "crop", "hr_size")} == {
        "scale": 4, "split": "all", "images": 10, "crop": 144, "hr_size": 64}
    for method in ("bicubic", "srgan"):
        assert set(summary[method]) == {"psnr_rgb", "ssim_rgb", "psnr_y", "ssim_y", "sharpness", "checkerboard"}
        for metric, value in summary[method].items():
            assert value == pytest.approx(sum(row[f"{method}_{metric}"] for row in rows) / 10, rel=1e-4)
    assert set(summary["hr"]) == {"sharpness", "checkerboard"} and summary["hr"]["sharpness"] == 1
    gains = [row["srgan_psnr_rgb"] - row["bicubic_psnr_rgb"] for row in rows]
    assert min(gains) < summary["gain"]["psnr_rgb"]["low"] < summary["gain"]["psnr_rgb"]["high"] < max(gains)
    gains = np.random.default_rng(5).normal(3, 2, 1000)
    for values, half in ((gains, 1.96 * gains.std() / math.sqrt(1000)), (gains[:1], 0)):
        summary = srgan.summarise([rows[0] | {"bicubic_psnr_rgb": 0.0, "srgan_psnr_rgb": gain} for gain in values], config, "all")
        expected = {"mean": values.mean(), "low": values.mean() - half, "high": values.mean() + half}
        assert summary["gain"]["psnr_rgb"] == pytest.approx(expected, abs=0.1 * half + 1e-5)
        assert ("interval" in srgan.results_table(summary)) == (len(values) > 1)
    black = rows[0] | {"bicubic_psnr_rgb": math.inf, "srgan_psnr_rgb": math.inf}  # takes no gain from the others
    assert srgan.summarise([*rows, black], config, "all")["gain"]["psnr_rgb"]["mean"] == pytest.approx(
        srgan.summarise(rows, config, "all")["gain"]["psnr_rgb"]["mean"])


def test_a_summary_is_json_even_where_a_value_is_not_finite(store):
    """No index below 32 px, inf where an image is reproduced exactly: null, which JSON has, and no NaN."""
    generator, config = network("sharp", hr_size=32)
    rows = [row | {"srgan_psnr_rgb": math.inf} for row in srgan.evaluate(generator, config, store, [0, 1])]
    summary = srgan.summarise(rows, config, "test")
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary and summary["bicubic"]["psnr_rgb"] > 0
    assert summary["srgan"]["checkerboard"] is None and summary["srgan"]["psnr_rgb"] is None
    table = srgan.results_table(summary)
    assert [line.split()[0] for line in table.splitlines()[2:5]] == ["bicubic", "srgan", "hr"] and "nan" not in table.lower()


def test_stages_figure_shows_the_pixels_themselves_their_numbers_and_errors(measured, store):
    """Four panels a face and one of errors, with the numbers that `evaluate` gives; below each a part of it, enlarged."""
    rows, generator, config = measured
    faces, networks = store.faces([2, 8]), {"SRGAN 4x": generator}
    assert len(srgan.stages_figure(networks, config, faces, zoom=None).axes) == 2 * 4
    axes, below = np.array(srgan.stages_figure(networks, config, faces, True, (0.25, 0.5)).axes).reshape(2, 2, 5).swapaxes(0, 1)
    assert [ax.get_title() for ax in axes[0]] == ["LR, 16 px", "bicubic", "SRGAN 4x", "HR, 64 px", "error, 4 times"]
    for whole, part in zip(axes.flat, below.flat):
        assert np.array_equal(part.images[0].get_array(), whole.images[0].get_array()[24:40, 12:28])
    lr, hr = srgan.make_pair(faces, config)
    columns = [lr.repeat_interleave(4, 2).repeat_interleave(4, 3), srgan.bicubic(lr, 64), srgan.super_resolve(generator, lr), hr]
    columns.append((srgan.quantise(columns[2]) - hr).abs() * 4)
    for number, (panels, row) in enumerate(zip(axes, (rows[2], rows[8]))):
        for ax, images, most in zip(panels, columns, (1, 1, 1, 1, 4)):  # a level's rounding is four of the error's
            expected, (shown,) = images[number].mul(255).round().clamp(0, 255).permute(1, 2, 0).numpy(), ax.images
            assert shown.get_array().dtype == np.uint8 and shown.get_interpolation() == "nearest" and shown.get_clim() == (0, 255)
            assert np.abs(np.asarray(shown.get_array(), dtype=int) - expected).max() <= most
        for ax, method in ((panels[1], "bicubic"), (panels[2], "srgan")):
            psnr, ssim, index = (float(each) for each in re.findall(r"\d+\.\d+", ax.get_xlabel()))
            assert (psnr, index) == pytest.approx((row[f"{method}_psnr_rgb"], row[f"{method}_checkerboard"]), abs=0.02)
            assert ssim == pytest.approx(row[f"{method}_ssim_rgb"], abs=0.002) and "dB" not in panels[3].get_xlabel()


def test_history_figure_has_a_line_for_each_loss_and_shows_a_single_update(tiny_run, tmp_path):
    text = (tiny_run / "history.csv").read_text()
    lines = {line.get_label(): line for ax in srgan.history_figure(tiny_run / "history.csv").axes for line in ax.lines}
    expected = [float(row["d_loss"]) for row in csv.DictReader(text.splitlines()) if row["d_loss"]]
    assert set(lines) == {"pixel", "content", "adversarial", "d_loss", "d_real", "d_fake"} and len(expected) == 3
    assert list(lines["pixel"].get_xdata()) == [1, 2, 3, 4, 5, 6] and list(lines["d_loss"].get_ydata()) == pytest.approx(expected)
    (tmp_path / "history.csv").write_text("\n".join(text.splitlines()[:2]))  # one value makes no line; D has none yet
    generator, discriminator = srgan.history_figure(tmp_path / "history.csv").axes
    assert [(line.get_marker() in ("", "None"), len(line.get_xdata())) for line in generator.lines] == [(False, 1)]
    assert not discriminator.lines and "not yet" in discriminator.texts[0].get_text()
