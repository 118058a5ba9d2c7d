"""Tiled enlargement, evaluation and figures, against the same done by hand."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import srgan_utils as srgan

NET = {"channels": 8, "residual_blocks": 2, "precision": "fp32"}
LEVEL = 1 / 255


def network(preset, scale=4, **changes):
    """A network whose weights are large enough that a pixel far away still matters."""
    config = srgan.Config.preset(preset, **(NET | {"scale": scale, "hr_size": 64} | changes))
    torch.manual_seed(1)
    generator = srgan.Generator(config).eval()
    with torch.no_grad():
        for name, value in generator.named_parameters():
            if name.endswith("weight") and value.dim() == 4 and "tail" not in name:
                value.mul_(1.6)
    return generator, config


@pytest.fixture(scope="module")
def photo():
    """(1, 3, 53, 47), of noise and a slope: every pixel counts."""
    noise = torch.rand(1, 3, 53, 47, generator=srgan.seeded(4))
    return srgan.quantise(0.7 * noise + 0.3 * torch.linspace(0, 1, 47))


# --- upscale


@pytest.mark.parametrize("preset", ["sharp", "report", "paper"])
@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("height, width, tile", [(53, 47, 16), (53, 47, 23), (16, 33, 16), (17, 5, 16), (3, 47, 1)])
def test_tiled_equals_untiled(preset, scale, height, width, tile, photo):
    generator, config = network(preset, scale)
    image = photo[..., :height, :width]
    with torch.no_grad():
        whole = srgan.quantise(generator(image))
    assert whole.std() > 0.02
    tiled = srgan.upscale(image, generator, config, tile=tile)
    assert tiled.shape == (1, 3, height * scale, width * scale)
    assert (tiled - whole).abs().max() <= 1.01 * LEVEL


@pytest.mark.parametrize("preset", ["sharp", "report", "paper"])
def test_tiles_need_their_overlap(preset, photo, monkeypatch):
    """The images above would show a seam: without an overlap they do."""
    generator, config = network(preset)
    whole = srgan.upscale(photo, generator, config, tile=64)
    monkeypatch.setattr(srgan, "receptive_radius", lambda config: 0)
    assert (srgan.upscale(photo, generator, config, tile=16) - whole).abs().max() > 10 * LEVEL


@pytest.mark.parametrize("scale", [2, 16])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (70, 2)])
def test_upscale_takes_any_size(scale, size):
    generator, config = network("sharp", scale)
    sr = srgan.upscale(torch.rand(1, 3, *size), generator, config)
    assert sr.shape == (1, 3, size[0] * scale, size[1] * scale)
    assert sr.min() >= 0 and sr.max() <= 1
    torch.testing.assert_close(sr * 255, (sr * 255).round(), rtol=0, atol=1e-4)


def test_upscale_bounds_what_the_network_sees(photo):
    """No call gets more than a tile and its overlap, however large the photo."""
    generator, config = network("sharp", 2)
    seen = []
    generator.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[-2:]))
    srgan.upscale(photo.repeat(1, 1, 3, 3), generator, config, tile=20)
    most = 20 + 2 * srgan.receptive_radius(config)
    assert len(seen) == math.ceil(159 / 20) * math.ceil(141 / 20)
    assert max(max(shape) for shape in seen) <= most


@pytest.mark.parametrize("preset", ["report", "paper"])
def test_batch_norm_is_folded(preset, photo):
    """The same image without the layers, and the network that was given keeps its own."""
    generator, config = network(preset)
    with torch.no_grad():
        for module in generator.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.3, 3)
                module.weight.uniform_(0.5, 2)
        folded = srgan._for_inference(generator)
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
        assert any(isinstance(module, torch.nn.BatchNorm2d) for module in generator.modules())
        torch.testing.assert_close(folded(photo), generator(photo), rtol=0, atol=1e-5)


def test_tiles_of_one_shape_go_together(photo, monkeypatch):
    generator, config = network("sharp", 2)
    one_by_one = srgan.upscale(photo, generator, config, tile=12)
    seen = []
    generator.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    monkeypatch.setitem(srgan._TILES_TOGETHER, "cpu", 3)
    together = srgan.upscale(photo, generator, config, tile=12)
    assert sum(seen) == 20 and max(seen) == 3
    assert (together - one_by_one).abs().max() <= 1.01 * LEVEL


def test_upscale_in_the_precision_of_the_training(photo, monkeypatch):
    generator, config = network("sharp", 2, precision="bf16")
    used = []
    generator.register_forward_hook(lambda module, inputs, output: used.append(torch.is_autocast_enabled("cpu")))
    monkeypatch.setattr(srgan, "resolve_precision", lambda precision, device: precision)  # as on a CPU that has it
    low = srgan.upscale(photo, generator, config)
    high = srgan.upscale(photo, generator, replace(config, precision="fp32"))
    assert used == [True, False]
    assert 0 < (low - high).abs().max() < 8 * LEVEL and (low - high).abs().mean() < LEVEL


# --- evaluate


@pytest.fixture(scope="module")
def measured(store):
    """Rows of 10 faces (more than one chunk) by a 4x network in the view 144 -> 64."""
    generator, config = network("sharp", crop=144)
    return srgan.evaluate(generator, config, store, range(10)), generator, config


def by_hand(image, hr):
    """PSNR (RGB, Y) and gradient energy of (3, H, W) float64 arrays."""
    weights = np.array([65.481, 128.553, 24.966]).reshape(3, 1, 1) / 255
    mse = ((image - hr) ** 2).mean()
    mse_y = (((image - hr) * weights).sum(0) ** 2).mean()
    energy = [(np.diff(each, axis=1) ** 2).mean() + (np.diff(each, axis=2) ** 2).mean() for each in (image, hr)]
    return -10 * math.log10(mse), -10 * math.log10(mse_y), energy[0] / energy[1]


def test_evaluate_by_hand(measured, store):
    """8-bit images that lose a border of `scale` px, each on its own."""
    rows, generator, config = measured
    assert [row["name"] for row in rows] == store.names[:10]
    for index in (0, 7, 8, 9):
        lr, hr = srgan.make_pair(store.faces([index]), config)
        with torch.no_grad():
            images = {"srgan": generator(lr), "bicubic": srgan.bicubic(lr, 64)}
        hr = hr[0].double().numpy()[:, 4:60, 4:60]
        for method, image in images.items():
            # rounded in float32, as by `quantise`: a tie that goes the other way in float64 moves the index by a thousandth
            image = np.clip(np.round(image[0].numpy() * 255).astype(np.float64), 0, 255)[:, 4:60, 4:60] / 255
            expected = by_hand(image, hr)
            values = [rows[index][f"{method}_{metric}"] for metric in ("psnr_rgb", "psnr_y", "sharpness")]
            assert values == pytest.approx(expected, rel=1e-3)
            pair = torch.tensor(np.stack([image, hr]), dtype=torch.float32)
            assert rows[index][f"{method}_ssim_rgb"] == pytest.approx(srgan.ssim(pair[:1], pair[1:]).item(), abs=1e-4)
            ys = srgan.luma(pair)
            assert rows[index][f"{method}_ssim_y"] == pytest.approx(srgan.ssim(ys[:1], ys[1:]).item(), abs=1e-4)
            assert rows[index][f"{method}_checkerboard"] == pytest.approx(srgan.checkerboard_index(pair[:1]).item(), rel=1e-3)
        assert rows[index]["hr_checkerboard"] == pytest.approx(srgan.checkerboard_index(pair[1:]).item(), rel=1e-3)


def test_evaluate_of_bicubic_is_bicubic(store):
    """A network that adds nothing has bicubic's numbers."""
    generator, config = network("sharp", 2)
    for value in generator.tail.parameters():
        torch.nn.init.zeros_(value)
    for row in srgan.evaluate(generator, config, store, store.indices("test")):
        for metric in ("psnr_rgb", "ssim_rgb", "psnr_y", "ssim_y", "sharpness", "checkerboard"):
            assert row[f"srgan_{metric}"] == pytest.approx(row[f"bicubic_{metric}"], rel=1e-4)


def test_too_small_to_measure(store):
    generator, config = network("sharp", 16, hr_size=32)
    with pytest.raises(ValueError, match="hr_size=32"):
        srgan.evaluate(generator, config, store, [0])


def test_summarise(measured):
    """Means of per-image values, under the names that metrics.json promises."""
    rows, _, config = measured
    summary = srgan.summarise(rows, config, "all")
    assert {key: summary[key] for key in ("scale", "split", "images", "crop", "hr_size")} == {
        "scale": 4, "split": "all", "images": 10, "crop": 144, "hr_size": 64}
    metrics = {"psnr_rgb", "ssim_rgb", "psnr_y", "ssim_y", "sharpness", "checkerboard"}
    for method in ("bicubic", "srgan"):
        assert set(summary[method]) == metrics
        for metric in metrics:
            assert summary[method][metric] == pytest.approx(sum(row[f"{method}_{metric}"] for row in rows) / 10, rel=1e-4)
    assert set(summary["hr"]) == {"sharpness", "checkerboard"} and summary["hr"]["sharpness"] == 1


def test_summary_is_json_even_where_a_value_is_not_finite(store):
    """No index below 32 px, inf where an image is reproduced exactly: null, which JSON has, and no NaN."""
    generator, config = network("sharp", hr_size=32)
    rows = srgan.evaluate(generator, config, store, [0, 1])
    rows[0]["srgan_psnr_rgb"] = math.inf
    summary = srgan.summarise(rows, config, "test")
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["srgan"]["checkerboard"] is None and summary["srgan"]["psnr_rgb"] is None
    assert summary["bicubic"]["psnr_rgb"] > 0
    lines = srgan.results_table(summary).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["bicubic", "srgan", "hr"]
    assert "nan" not in srgan.results_table(summary).lower()


# --- Figures


def test_comparison_figure(measured, store, tmp_path):
    """Four panels a face, one range of colours, the pixels themselves, the numbers that `evaluate` gives below."""
    rows, generator, config = measured
    figure = srgan.comparison_figure(generator, config, store.faces([2, 5, 8]))
    assert len(figure.axes) == 4 * 3
    assert {ax.images[0].get_clim() for ax in figure.axes} == {(0, 255)}
    lr, hr = srgan.make_pair(store.faces([2, 5, 8]), config)
    with torch.no_grad():
        columns = [lr, srgan.bicubic(lr, 64), generator(lr), hr]
    for row, index in enumerate((2, 5, 8)):
        panels = figure.axes[4 * row:4 * row + 4]
        for ax, images in zip(panels, columns):
            expected = (images[row] * 255).round().clamp(0, 255).permute(1, 2, 0).numpy()
            assert ax.images[0].get_array().dtype == np.uint8 and ax.images[0].get_interpolation() == "nearest"
            assert np.abs(np.asarray(ax.images[0].get_array(), dtype=int) - expected).max() <= 1
        for ax, method in ((panels[1], "bicubic"), (panels[2], "srgan")):
            label = ax.get_xlabel()
            psnr, ssim = (float(part.split()[-1 if "SSIM" in part else 0]) for part in label.split(","))
            assert psnr == pytest.approx(rows[index][f"{method}_psnr_rgb"], abs=0.02)
            assert ssim == pytest.approx(rows[index][f"{method}_ssim_rgb"], abs=0.002)
        assert not panels[0].get_xlabel().strip() and not panels[3].get_xlabel().strip()
    assert [ax.get_title() for ax in figure.axes[:4]] == ["LR, 16 px", "bicubic", "SRGAN 4x", "HR, 64 px"]
    figure.savefig(tmp_path / "panels.png")
    assert srgan.load_image(tmp_path / "panels.png").std() > 0.05


def test_image_strip(measured, store):
    _, generator, config = measured
    strip = srgan.image_strip(generator, config, store.faces([0, 1, 2]))
    lr, hr = srgan.make_pair(store.faces([0, 1, 2]), config)
    assert strip.shape == (1, 3, 3 * 64, 4 * 64) and strip.device.type == "cpu"
    for row in range(3):
        panels = strip[0, :, row * 64:(row + 1) * 64].split(64, dim=-1)
        assert torch.equal(panels[0][:, ::4, ::4], lr[row]) and torch.equal(panels[0][:, 3::4, 3::4], lr[row])
        assert torch.equal(panels[3], hr[row])
        torch.testing.assert_close(panels[1], srgan.bicubic(lr, 64)[row])
        with torch.no_grad():
            torch.testing.assert_close(panels[2], generator(lr)[row].clamp(0, 1), rtol=1e-4, atol=1e-4)


def test_history_figure(tiny_run):
    """One line for each loss that the run has, over its updates."""
    figure = srgan.history_figure(tiny_run / "history.csv")
    with open(tiny_run / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = {line.get_label(): line for ax in figure.axes for line in ax.lines}
    assert set(lines) == {"pixel", "content", "adversarial", "d_loss", "d_real", "d_fake"}
    assert lines["pixel"].get_xdata().tolist() == [1, 2, 3, 4, 5, 6]
    assert lines["d_loss"].get_ydata().tolist() == pytest.approx([float(row["d_loss"]) for row in rows[3:]])


def test_a_history_of_one_update_is_seen(tiny_run, tmp_path):
    """One value makes no line; and the discriminator, which has none yet, no empty axes."""
    rows = (tiny_run / "history.csv").read_text().splitlines()[:2]
    (tmp_path / "history.csv").write_text("\n".join(rows))
    generator, discriminator = srgan.history_figure(tmp_path / "history.csv").axes
    assert [(line.get_marker(), len(line.get_xdata())) for line in generator.lines] == [("o", 1)]
    assert not discriminator.lines and "not yet" in discriminator.texts[0].get_text() and not len(discriminator.get_xticks())


def test_the_bootstrap_interval_of_many_values_is_the_normal_one():
    values = np.random.default_rng(5).normal(3, 2, 1000)
    found, half = srgan._interval(values), 1.96 * values.std() / math.sqrt(1000)
    assert found["mean"] == pytest.approx(values.mean(), abs=1e-5)
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert srgan._interval([1.5]) == {"mean": 1.5, "low": 1.5, "high": 1.5}


def test_the_gain_is_that_of_the_rows(measured):
    rows, _, config = measured
    summary = srgan.summarise(rows, config, "all")
    gains = [row["srgan_psnr_rgb"] - row["bicubic_psnr_rgb"] for row in rows]
    assert summary["gain"]["psnr_rgb"]["mean"] == pytest.approx(np.mean(gains), abs=1e-5)
    assert min(gains) < summary["gain"]["psnr_rgb"]["low"] < np.mean(gains) < summary["gain"]["psnr_rgb"]["high"] < max(gains)


def test_scores_figure(measured):
    rows, _, _ = measured
    plain, ours = srgan.scores_figure(rows).axes[0].collections
    assert plain.get_offsets()[3].tolist() == [rows[3]["bicubic_psnr_rgb"], rows[3]["bicubic_sharpness"]]
    assert ours.get_offsets()[9].tolist() == [rows[9]["srgan_psnr_rgb"], rows[9]["srgan_sharpness"]]


def test_the_error_panel(store):
    generator, config = network("sharp")
    faces = store.faces([0, 1])
    axes = srgan.comparison_figure(generator, config, faces, errors=True).axes
    ours, hr, error = (np.asarray(axes[column].images[0].get_array()).astype(int) for column in (2, 3, 4))
    assert len(axes) == 10 and np.abs(error - np.clip(4 * np.abs(ours - hr), 0, 255)).max() <= 1


# --- from faithful to sharp


def test_interpolated_generators():
    (faithful, _), (sharp, _) = network("report"), network("report")
    with torch.no_grad():
        for value in sharp.state_dict().values():
            value.copy_(value * 2 + 1)
    ends = [srgan.interpolate_generators(faithful, sharp, amount).state_dict() for amount in (0, 1)]
    for name, value in srgan.interpolate_generators(faithful, sharp, 0.25).state_dict().items():
        a, b = faithful.state_dict()[name], sharp.state_dict()[name]
        assert torch.equal(ends[0][name], a) and torch.equal(ends[1][name], b)
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * a + 0.25 * b)
    with pytest.raises(ValueError, match="different shapes"):
        srgan.interpolate_generators(faithful, network("report", residual_blocks=1)[0], 0.5)


def test_stages_figure(measured, store):
    """Each panel is what that network makes, with PSNR and index of just that image; the part below it is its middle."""
    _, generator, config = measured
    faces = store.faces([2, 5])
    lr, hr = srgan.make_pair(faces, config)
    figure = srgan.stages_figure({"first": generator, "last": generator}, config, faces, "a note")
    axes = [figure.axes[row * 5:row * 5 + 5] for row in range(4)]
    assert [ax.get_title() for ax in axes[0]] == ["LR, 16 px", "bicubic", "first", "last", "HR"]
    with torch.no_grad():
        sr = srgan.quantise(generator(lr))
    for row in range(2):
        whole, part = (np.asarray(axes[2 * row + below][3].images[0].get_array()) for below in (0, 1))
        assert np.array_equal(whole, sr[row].mul(255).round().byte().permute(1, 2, 0).numpy())
        assert np.array_equal(part, whole[24:40, 24:40])
        inner, truth = sr[row:row + 1, :, 4:-4, 4:-4], hr[row:row + 1, :, 4:-4, 4:-4]
        assert axes[2 * row + 1][3].get_xlabel() == (f"{srgan.psnr(inner, truth).item():.2f} dB, index "
                                                     f"{srgan.checkerboard_index(inner).item():.2f}")
    assert figure.get_supxlabel() == "a note"
