"""What the notebooks show of data and networks: costs of layers, contact sheets, histograms, a slider with its pictures."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import srgan_utils as srgan


def made(preset="sharp", scale=4, **changes):
    config = srgan.Config.preset(preset, scale=scale, **changes)
    with torch.device("meta"):
        return config, srgan.Generator(config), srgan.Discriminator(config)


# --- Costs of layers


def test_costs_of_one_convolution_by_hand():
    conv = torch.nn.Conv2d(3, 64, 9, stride=2, padding=4)
    costs = srgan.layer_costs(conv, torch.rand(2, 3, 20, 30))
    assert costs == {"": (3 * 64 * 81 + 64, 2 * 3 * 64 * 81 * 10 * 15), "all else": (0, 0)}


def test_costs_of_a_small_generator_by_hand():
    """Every layer of `report` with 8 channels on 6 x 5 px, the shared block's two uses in one row."""
    _, generator, _ = made("report", channels=8, residual_blocks=1)
    costs = srgan.layer_costs(generator, torch.empty(1, 3, 6, 5, device="meta"))
    area, block = 30, (8 * 8 * 9 + 8, 8 * 8 * 9 * 30)
    assert costs == {
        "head.0": (3 * 8 * 81 + 8, 3 * 8 * 81 * area),
        "blocks.0.body.0": block, "blocks.0.body.3": block, "merge.0": block,
        "upsample.0.conv": (8 * 32 * 9 + 32, 8 * 32 * 9 * (area + 4 * area)),
        "tail": (8 * 3 * 81 + 3, 8 * 3 * 81 * 16 * area),
        "all else": (1 + 1 + 1 + 3 * 16, 0),  # three PReLUs and three BatchNorms
    }


def test_the_blur_is_counted_with_all_else():
    """3 x 3 multiplications for each value that is blurred, and 4 for each of the kernel's own 9."""
    _, generator, _ = made(channels=8, residual_blocks=1)
    costs = srgan.layer_costs(generator, torch.empty(1, 3, 6, 5, device="meta"))
    assert costs["all else"][1] == 9 * 8 * 30 * (4 + 16) + 2 * 4 * 9


@pytest.mark.parametrize("preset", ["report", "paper", "sharp", "demo"])
def test_costs_add_up_to_the_totals_and_keep_the_mode(preset):
    config, generator, discriminator = made(preset)
    for model, side in ((generator, 16), (discriminator, config.patch)):
        x = torch.empty(1, 3, side, side, device="meta")
        costs = srgan.layer_costs(model, x)
        parameters, multiplications = map(sum, zip(*costs.values()))
        assert model.training and parameters == srgan.count_parameters(model)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.eval()(x)
        assert multiplications == counter.get_total_flops() // 2
        assert all(own > 0 and count > 0 for name, (own, count) in costs.items() if name != "all else")


def test_layers_figure():
    _, generator, _ = made("report", channels=8, residual_blocks=1)
    x = torch.empty(1, 3, 6, 5, device="meta")
    costs, figure = srgan.layer_costs(generator, x), srgan.layers_figure(generator, x)
    for ax, values in zip(figure.axes, zip(*costs.values())):
        assert [bar.get_width() for bar in ax.patches] == list(values)
        assert f"{sum(values):,}" in ax.get_title()
    share = costs["tail"][1] / sum(count for _, count in costs.values())
    alt = re.match('<div style="overflow-x: auto"><img alt="([^"]+)"', figure._repr_html_())[1]
    assert f"tail {costs['tail'][0] / srgan.count_parameters(generator):.0%} and {share:.0%}" in alt


# --- Receptive field


@pytest.mark.parametrize("preset", ["report", "paper", "sharp"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_one_more_residual_block_reaches_two_px_further(preset, blocks):
    """As an exercise in notebook 02 says, and as gradients say."""
    reach = []
    for count in (blocks, blocks + 1):
        config = srgan.Config.preset(preset, scale=4, channels=4, residual_blocks=count)
        torch.manual_seed(0)
        lr = torch.rand(1, 3, 45, 45, dtype=torch.float64, requires_grad=True)
        srgan.Generator(config).double().eval()(lr)[..., 88:92, 88:92].sum().backward()
        touched = lr.grad.abs().sum((0, 1)).nonzero() - 22
        reach.append(touched.abs().max().item())
        assert reach[-1] <= srgan.receptive_radius(config) <= reach[-1] + 4
    assert reach[1] - reach[0] == 2


# --- Histograms


def test_histogram_figure():
    torch.manual_seed(0)
    before = torch.rand(3, 40, 40)
    after = srgan.to_imagenet(before[None])[0]
    figure = srgan.histogram_figure({"before": before, "after": after})
    assert [len(ax.patches) for ax in figure.axes] == [3, 3]
    assert f"red: mean {after[0].mean():.2f}, deviation {after[0].std():.2f}" in figure.axes[1].get_legend_handles_labels()[1]
    assert f"after, from {after.min():.2f} to {after.max():.2f}" in figure._repr_html_()


# --- Contact sheets


@pytest.fixture
def mixed(tmp_path):
    """A folder of good faces and bad files, one with a hostile name; and its store."""
    source = tmp_path / "in"
    source.mkdir()
    face = srgan.synthetic_face(1)
    for name in ("a.png", "b.png", "<script>alert(1)<script>.png"):
        srgan.save_image(face, source / name)
    srgan.save_image(srgan.bicubic(face, 100), source / "c.png")
    srgan.save_image(srgan.bicubic(face, 40), source / 'tiny"&\n.png')
    srgan.save_image(srgan.bicubic(face, (64, 600)), source / "strip.png")
    (source / "cut.png").write_bytes((source / "a.png").read_bytes()[:2000])
    (source / "notes.jpg").write_text("no picture")
    return source, srgan.prepare(source, tmp_path / "store")


def tiles(sheet) -> dict[str, bool]:
    """Caption -> whether a picture is above it."""
    found = re.findall("<figure[^>]*>(.*?)<figcaption>(.*?)</figcaption></figure>", sheet.data, re.DOTALL)
    return {caption: re.match('<img alt="[^"]+"', picture) is not None for picture, caption in found}


def test_contact_sheet_of_what_was_accepted(mixed):
    _, store = mixed
    shown = tiles(srgan.contact_sheet(store))
    assert len(shown) == len(store) == 4 and all(shown.values())
    assert "c.png" in [caption.split(",")[0] for caption in shown if caption.endswith(", enlarged")]
    assert "<p>4 accepted</p>" in srgan.contact_sheet(store).data
    assert "<p>4 accepted, 3 of them shown</p>" in srgan.contact_sheet(store, count=3).data
    assert len(tiles(srgan.contact_sheet(store, count=3))) == 3
    parts = dict(caption.split(", ")[:2] for caption in shown)
    assert parts["a.png"] == ("train", "validation", "test", "unused")[store.split[store.names.index("a.png")]]


def test_contact_sheet_of_what_was_left_out(mixed):
    """Each with its reason; a picture where it can be decoded."""
    source, store = mixed
    shown = tiles(srgan.contact_sheet(store, left_out=True))
    assert len(shown) == len(store.left_out) == 4
    has = {caption.split(":")[0]: picture for caption, picture in shown.items()}
    assert has == {"cut.png": False, "notes.jpg": False, "strip.png": True, "tiny&quot;&amp; .png": True}
    assert any("too small (40 x 40 px" in caption for caption in shown)
    for path in source.iterdir():
        path.unlink()
    assert not any(tiles(srgan.contact_sheet(store, left_out=True)).values())  # the source has gone: reasons alone


@pytest.mark.parametrize("left_out", [False, True])
def test_names_in_a_contact_sheet_are_text(mixed, left_out):
    data = srgan.contact_sheet(mixed[1], left_out).data
    assert "<script" not in data and "\n" not in data


def test_a_contact_sheet_downloads_nothing(mixed, monkeypatch):
    """Where the pictures of a source that was fetched are gone, reasons alone are shown."""
    monkeypatch.setattr(mixed[1], "source", "celeba")
    monkeypatch.setattr(srgan, "open_source", lambda name: pytest.fail(f"{name} was asked for"))
    assert not any(tiles(srgan.contact_sheet(mixed[1], left_out=True)).values())


def test_contact_sheet_where_nothing_was_left_out(store):
    assert "Nothing was left out" in srgan.contact_sheet(store, left_out=True).data


# --- A slider and its pictures


def test_a_picture_slider_holds_each_picture_and_shows_one():
    figures = {f"{scale}x": srgan.show_images([torch.full((3, 8, 8), 1 / scale)], [f"face & {scale}x"]) for scale in (2, 4, 8)}
    data = srgan.picture_slider(figures, "Upscale <factor>", "4x").data
    assert re.findall(r'data-name="(.+?)".*?visibility: (\w+)".*?alt="(.+?)"', data) == [
        ("2x", "hidden", "1 images: face &amp; 2x"), ("4x", "visible", "1 images: face &amp; 4x"),
        ("8x", "hidden", "1 images: face &amp; 8x")]
    pictures = [base64.b64decode(each) for each in re.findall(r"base64,([^\"]+)", data)]
    shown = [np.asarray(Image.open(io.BytesIO(each)).convert("L")) for each in pictures]
    assert [each[each.shape[0] // 2, each.shape[1] // 2] for each in shown] == [128, 64, 32]
    assert 'min="0" max="2" value="1" aria-valuetext="4x"' in data and "Upscale &lt;factor&gt;" in data
    with pytest.raises(ValueError, match="3x"):
        srgan.picture_slider(figures, "Upscale factor", "3x")
