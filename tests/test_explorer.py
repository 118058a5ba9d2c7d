"""The upscale factor by hand: `enlarge`, the panels, before/after, and the `Explorer` driven as a browser drives it."""

import html
import io
import os
import re
import sys
import time
from base64 import b64decode
from datetime import datetime
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import srgan_utils as srgan

NET = {"channels": 8, "residual_blocks": 1, "precision": "fp32"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict:
    """A small network for each factor, with a parent beside it that is another network."""
    folder, paths = tmp_path_factory.mktemp("weights"), {}
    for scale in (2, 4, 8):
        paths[scale] = folder / f"net-x{scale}.safetensors"
        for number, path in enumerate((paths[scale], folder / f"net-x{scale}-pixel.safetensors")):
            config = srgan.Config.preset("sharp", **NET, scale=scale, hr_size=176)
            torch.manual_seed(10 * scale + number)
            generator = srgan.Generator(config)
            torch.nn.init.normal_(generator.tail.weight, std=0.02)  # not just bicubic
            srgan.export_generator(path, generator, config)
    return paths


@pytest.fixture(scope="module")
def photo():
    return srgan.quantise(0.7 * torch.rand(1, 3, 19, 26, generator=srgan.seeded(4)) + 0.3 * torch.linspace(0, 1, 26))


def by(path, image):
    """What the network in `path` makes of `image`."""
    generator, config, _ = srgan.load_generator(path)
    return srgan.upscale(image, generator, config)


# --- enlarge


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_at_a_networks_own_factor_enlarge_is_upscale(weights, photo, scale):
    sr, note = srgan.enlarge(photo, scale, weights)
    assert torch.equal(sr, by(weights[scale], photo)) and note == f"{scale}x network"


@pytest.mark.parametrize("factor, network", [(1, 2), (1.3, 2), (3, 4), (4.1, 8), (7.9, 8)])
def test_between_them_the_next_larger_network_and_a_reduction(weights, photo, factor, network):
    sr, note = srgan.enlarge(photo, factor, weights)
    size = (round(19 * factor), round(26 * factor))
    assert torch.equal(sr, srgan.quantise(srgan.bicubic(by(weights[network], photo), size)))
    assert note == f"{network}x network, reduced to {factor:g}x"


def test_above_eight_two_networks_in_a_row(weights, photo):
    both = by(weights[2], by(weights[8], photo))
    sr, note = srgan.enlarge(photo, 16, weights)
    assert torch.equal(sr, both) and note == "8x then 2x network"
    sr, note = srgan.enlarge(photo, 12.5, weights)
    assert torch.equal(sr, srgan.quantise(srgan.bicubic(both, (round(19 * 12.5), 325))))
    assert note == "8x then 2x network, reduced to 12.5x"


def test_enlarge_says_what_is_wrong_in_one_line(weights, photo, tmp_path, monkeypatch):
    for factor in (0.9, 16.1, float("nan")):
        with pytest.raises(ValueError, match=r"^factor \S+: give a number from 1 to 16$"):
            srgan.enlarge(photo, factor, weights)
    monkeypatch.setattr(srgan, "_shipped_weights", lambda scale: tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no network for 8x yet: train one in notebook 3 with scale = 8") as error:
        srgan.enlarge(photo, 5, {4: weights[4]})
    assert "\n" not in str(error.value)


def test_enlarge_tells_how_far_it_is(weights, monkeypatch):
    monkeypatch.setattr(srgan, "_TILE", 64)
    shares = []
    srgan.enlarge(torch.rand(1, 3, 40, 64), 2, weights, progress=shares.append)
    assert shares == pytest.approx([0.4, 0.8, 0.9, 1.0]) and shares[-1] == 1


def test_blended_generators_are_kept_until_the_file_changes(weights, tmp_path, photo):
    path, parent = tmp_path / "generator.safetensors", tmp_path / "pretrained.safetensors"
    path.write_bytes(weights[2].read_bytes())
    with pytest.raises(FileNotFoundError, match="needs the pixel-loss parent"):
        srgan.blended_generator(path, 2, 0.5)
    parent.write_bytes(weights[2].with_name("net-x2-pixel.safetensors").read_bytes())
    expected = srgan.interpolate_generators(srgan.load_generator(parent)[0], srgan.load_generator(path)[0], 0.25)
    first, config = srgan.blended_generator(path, 2, 0.25)
    assert all(map(torch.equal, first.state_dict().values(), expected.state_dict().values())) and config.scale == 2
    assert srgan.blended_generator(path, 2, 0.25)[0] is first
    with pytest.raises(ValueError, match="is a network for 2x, not 4x"):
        srgan.blended_generator(path, 4)
    path.write_bytes(parent.read_bytes())  # as training replaces it
    time.sleep(0.01)
    path.touch()
    assert not torch.equal(srgan.blended_generator(path, 2, 0.25)[0].tail.weight, first.tail.weight)


def test_generators_are_listed_newest_first_then_the_shipped_one(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = tmp_path / "shipped.safetensors"
    shipped.write_bytes(weights[4].read_bytes())
    monkeypatch.setattr(srgan, "_shipped_weights", lambda scale: shipped if scale == 4 else tmp_path / "none")
    paths = [tmp_path / place / "generator.safetensors" for place in ("srgan-work/runs/a", "drive/b", "drive/two", "drive/bad")]
    for age, (path, data) in enumerate(zip(paths, [weights[4].read_bytes()] * 2 + [weights[2].read_bytes(), b"damaged"])):
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        os.utime(path, (1e9 + age, 1e9 + age))
    found = [path.resolve() for path in srgan.find_generators(4, tmp_path / "drive", tmp_path / "missing")]
    assert found == [paths[1], paths[0], shipped]
    quick = tmp_path / "drive" / "quick" / "generator.safetensors"  # of two minutes on a CPU
    quick.parent.mkdir()
    config = srgan.Config.preset("demo", **NET, scale=4)
    srgan.export_generator(quick, srgan.Generator(config), config)
    found = [path.resolve() for path in srgan.find_generators(4, tmp_path / "drive")]
    assert found == [paths[1], paths[0], shipped, quick]
    assert list(srgan.find_generators(8, tmp_path / "drive")) == [] and srgan.find_generator(8) is None


# --- Panels


def test_four_panels_of_a_picture_that_is_shrunk_first(weights):
    picture = torch.rand(1, 3, 50, 70, generator=srgan.seeded(1))
    panels, note = srgan.factor_panels(picture, 4, True, weights)
    hr = picture[..., :48, :68]  # the largest multiples of 4
    lr = srgan.quantise(srgan.bicubic(hr, (12, 17)))
    expected = [lr.repeat_interleave(4, 2).repeat_interleave(4, 3), srgan.quantise(srgan.bicubic(lr, (48, 68))),
                by(weights[4], lr), hr]
    assert [title for title, _, _ in panels] == ["LR, 17 px", "bicubic", "SRGAN 4x", "HR, 68 px"] and note == "4x network"
    assert all(torch.equal(image, other) for (_, image, _), other in zip(panels, expected))
    inner = [image[..., 4:-4, 4:-4] for image in expected]
    for i in (1, 2):
        mse = (inner[i].double() - inner[3].double()).square().mean().item()
        assert panels[i][2] == f"{-10 * np.log10(mse):.2f} dB, SSIM {srgan.ssim(inner[i], inner[3]).item():.3f}"
    assert panels[0][2] == panels[3][2] == ""


def test_three_panels_without_numbers_of_a_picture_that_is_the_lr(weights, photo):
    panels, note = srgan.factor_panels(photo, 2.5, False, weights)
    assert [title for title, _, _ in panels] == ["LR, 26 px", "bicubic", "SRGAN 2.5x"]
    assert {tuple(image.shape) for _, image, _ in panels} == {(1, 3, 48, 65)}
    assert [caption for _, _, caption in panels] == ["", "", note] and note == "4x network, reduced to 2.5x"


@pytest.mark.parametrize("size, factor, message", [((99, 24), 8, "24 x 99 px are too few to be shrunk 8x .* take 32 px"),
                                                   ((99, 99), 3, "by 2, 4 or 8 to be tested, not by 3")])
def test_what_cannot_be_tested_is_refused(weights, size, factor, message):
    with pytest.raises(ValueError, match=message):
        srgan.factor_panels(torch.rand(1, 3, *size), factor, True, weights)
    if factor == 8:
        assert len(srgan.factor_panels(torch.rand(1, 3, 32, 32), 8, True, weights)[0]) == 4  # what it asks for suffices


def test_the_sheet_of_all_factors_shows_one_part_of_all(weights):
    """A row for each factor; the part below each panel is a quarter of its side, at one place in all."""
    picture = torch.rand(1, 3, 64, 64, generator=srgan.seeded(2))
    rows = {f"{scale}x": srgan.factor_panels(picture, scale, True, weights)[0] for scale in (2, 4, 8)}
    figure = srgan.panels_figure(rows, zoom=(0.25, 0.5))
    axes = np.array(figure.axes).reshape(3, 2, 4)
    assert [row[0, 0].get_ylabel() for row in axes] == ["2x", "4x", "8x"]
    for row, (name, panels) in zip(axes, rows.items()):
        for column, (title, image, caption) in enumerate(panels):
            whole, part = (np.asarray(ax.images[0].get_array()) for ax in row[:, column])
            assert np.array_equal(whole, image[0].mul(255).round().byte().permute(1, 2, 0).numpy())
            assert np.array_equal(part, whole[24:40, 12:28])
            assert row[0, column].get_title() == title and row[0, column].get_xlabel().strip() == caption
            frame = row[0, column].patches[0]
            assert (frame.get_xy(), frame.get_width()) == ((11.5, 23.5), 16)  # pixel 12 begins at 11.5
            assert caption in figure._repr_html_()
    assert len(srgan.panels_figure(rows, zoom=None).axes) == 12


def images_in(text: str) -> list[tuple[str, Image.Image]]:
    """(alt, picture) of each <img> in HTML."""
    found = re.findall(r'<img alt="([^"]*)"[^>]*src="data:image/png;base64,([^"]+)"', text)
    return [(html.unescape(alt), Image.open(io.BytesIO(b64decode(data)))) for alt, data in found]


def test_before_after_holds_both_images_and_a_slider_that_needs_no_script():
    left, right = (srgan.quantise(torch.rand(1, 3, 20, 30)) for _ in range(2))
    text = srgan.before_after(left, right, ("a < b", "c"), 'a "face" <script>').data
    assert "<script" not in text and "http" not in text and "a < b" not in text
    found = dict(images_in(text))
    assert list(found) == ['a "face" <script>: c', 'a "face" <script>: a < b']  # the left one lies above, cut by the line
    for image, picture in zip((right, left), found.values()):
        assert np.array_equal(np.asarray(picture), image[0].mul(255).round().byte().permute(1, 2, 0).numpy())
    slider = re.search(r'<input type="range"[^>]*>', text).group()
    assert 'aria-label="a &lt; b left of the line, c right of it: per cent"' in slider
    assert "this.parentNode).style.setProperty('--cut', this.value + '%')" in slider and "display: none" not in text


# --- Explorer


@pytest.fixture
def explorer(store, weights, tmp_path, monkeypatch):
    """The panel at 4x, as the notebook opens it, in an empty folder; the small networks are the shipped ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(srgan, "_shipped_weights", weights.get)
    return srgan.Explorer(store, weights[4])


def status(explorer) -> str:
    said = re.fullmatch("<div>(.*)</div>", explorer.status.value, re.DOTALL)[1]
    assert "Traceback" not in said and "\n" not in said
    return html.unescape(said)


def choose(explorer, name: str, data: bytes) -> None:
    """What the browser does when a file was chosen, in the form of the installed ipywidgets, 7 or 8."""
    widget = explorer.controls["Choose a photo"]
    eight = ({"name": name, "type": "image/png", "size": len(data), "content": memoryview(data),
              "last_modified": datetime(2026, 1, 1)},)
    widget.set_trait("value", {name: {"metadata": {}, "content": data}} if isinstance(widget.value, dict) else eight)


def png(width: int, height: int) -> bytes:
    """Left half dark, right half light, with noise."""
    pixels = np.random.default_rng(0).integers(0, 60, (height, width, 3), dtype=np.uint8)
    pixels[:, width // 2:] += 150
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


def with_photo(explorer, width=90, height=70):
    explorer.controls["Picture"].value = "Your photo"
    choose(explorer, "me.png", png(width, height))


def visible(explorer) -> set[str]:
    return {label for label, control in explorer.controls.items() if control.layout.display != "none"}


def test_it_opens_with_the_panels_that_the_plain_functions_make(explorer, store, weights):
    hr = srgan.make_pair(store.faces(store.indices("test")[:1]), srgan.load_generator(weights[4])[1])[1]
    panels, _ = srgan.factor_panels(hr, 4, True, weights)
    found = images_in(explorer.pictures.value)
    assert [alt for alt, _ in found[::2]] == [f"{title} {caption}".strip() for title, _, caption in panels]
    for (_, picture), (_, image, _) in zip(found[::2], panels):
        assert np.array_equal(np.asarray(picture), image[0].mul(255).round().byte().permute(1, 2, 0).numpy())
    assert {picture.size for _, picture in found[1::2]} == {(44, 44)}
    assert panels[2][2] in explorer.pictures.value and len(images_in(explorer.slider.value)) == 2
    assert re.fullmatch(r"test face 0, shrunk, then enlarged 4x by the 4x network; \d+\.\d\d s", status(explorer))
    assert all(control.description == label for label, control in explorer.controls.items())


def test_each_control_changes_what_is_shown(explorer):
    seen = {explorer.pictures.value}

    def changed(label, value):
        explorer.controls[label].value = value
        new = explorer.pictures.value not in seen
        seen.add(explorer.pictures.value)
        return new

    assert changed("Upscale factor", 2) and "LR, 88 px" in explorer.pictures.value and "by the 2x network" in status(explorer)
    assert changed("Face", 1) and status(explorer).startswith("test face 1,")
    assert changed("Faithful to sharp", 0.5) and changed("Faithful to sharp", 0)
    assert changed("Zoom left", 1) and changed("Zoom top", 0)
    before = explorer.slider.value
    explorer.controls["Before/after"].value = "SRGAN | HR"
    assert [alt.split(": ")[1] for alt, _ in images_in(explorer.slider.value)] == ["HR", "SRGAN"] != before


def test_arrows_go_round_the_test_faces(explorer, store):
    last = len(store.indices("test")) - 1
    for label, face in (("Next face", 1), ("Previous face", 0), ("Previous face", last), ("Next face", 0)):
        explorer.controls[label].click()
        assert explorer.controls["Face"].value == face and status(explorer).startswith(f"test face {face},")


def test_networks_of_the_factor_are_offered_and_used(explorer, weights, tiny_run, tmp_path):
    own = tmp_path / "srgan-work" / "runs" / "mine"
    own.mkdir(parents=True)
    for name in ("generator.safetensors", "pretrained.safetensors"):
        (own / name).write_bytes((tiny_run / name).read_bytes())
    network = explorer.controls["Network"]
    explorer.controls["Upscale factor"].value = 2
    assert [name for name, _ in network.options] == ["shipped with the project"]
    explorer.controls["Upscale factor"].value = 4
    assert [name for name, _ in network.options] == ["shipped with the project", "srgan-work/runs/mine"]
    network.value = network.options[1][1]
    assert "HR, 32 px" in explorer.pictures.value  # the view that it was trained in
    explorer.controls["Upscale factor"].value = 8
    explorer.controls["Upscale factor"].value = 4
    assert network.label == "srgan-work/runs/mine"  # remembered
    assert not explorer.controls["Faithful to sharp"].disabled
    (own / "pretrained.safetensors").unlink()
    explorer.controls["Face"].value = 1
    assert explorer.controls["Faithful to sharp"].disabled


def test_a_factor_without_weights_says_how_to_train_it(store, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(srgan, "_shipped_weights", {2: weights[2], 4: weights[4], 8: tmp_path / "none"}.get)
    explorer = srgan.Explorer(store, weights[4])
    explorer.controls["Upscale factor"].value = 8
    assert "no network for 8x yet: train one in notebook 3 with scale = 8" in status(explorer)
    assert explorer.pictures.value == explorer.slider.value == "" and explorer.controls["Network"].label == "none yet"
    explorer.controls["Save figure"].click()
    assert status(explorer) == "there is no figure to save yet"
    explorer.controls["Compare all factors"].click()
    assert "all-factors.png" in status(explorer) and "no network for 8x yet" in status(explorer)
    explorer.controls["Upscale factor"].value = 4
    assert "SRGAN 4x" in explorer.pictures.value


def test_own_photo_in_two_modes(explorer):
    explorer.controls["Picture"].value = "Your photo"
    assert status(explorer) == "choose a photo first, with the button above" and explorer.pictures.value == ""
    assert "Face" not in visible(explorer) and "Crop left" not in visible(explorer)
    choose(explorer, "me.png", png(90, 70))
    assert status(explorer).startswith("me, 70 px, shrunk, then enlarged 4x by the 4x network;")
    assert "HR, 68 px" in explorer.pictures.value and "dB, SSIM" in explorer.pictures.value
    assert {"Crop left", "Crop top", "Crop size", "Reduce crop to", "Mode"} <= visible(explorer)
    assert "Any factor" not in visible(explorer)
    explorer.controls["Before/after"].value = "SRGAN | HR"
    explorer.controls["Mode"].value = "Enlarge it"
    assert "LR, 70 px" in explorer.pictures.value and not re.search("HR, |dB, ", explorer.pictures.value)
    assert explorer.controls["Before/after"].options == ("bicubic | SRGAN",) and "Any factor" in visible(explorer)
    for label, value, expected in (("Any factor", 2.5, "enlarged 2.5x by the 4x network, reduced to 2.5x;"),
                                   ("Any factor", 10.0, "enlarged 10x by the 8x then 2x network, reduced to 10x (two in a row"),
                                   ("Upscale factor", 2, "enlarged 2x by the 2x network;"),
                                   ("Upscale factor", 8, "enlarged 8x by the 8x network;")):
        explorer.controls[label].value = value
        assert status(explorer).startswith(f"me, 70 px, {expected}")
    explorer.controls["Any factor"].value = 3.0
    assert explorer.controls["Upscale factor"].value == 4 and explorer.controls["Network"].label == "shipped with the project"


def test_crop_by_sliders_and_by_clicking(explorer):
    with_photo(explorer, 300, 200)
    assert status(explorer).startswith("me, 200 px reduced to 176, shrunk")
    explorer.controls["Crop size"].value = 64
    explorer.controls["Crop left"].value = 0

    def brightness():
        return np.asarray(images_in(explorer.pictures.value)[6][1]).mean()

    assert brightness() < 60  # HR: the dark half
    explorer.clicked.value = "crop 0.8 0.5"
    assert [explorer.controls[f"Crop {what}"].value for what in ("left", "top", "size")] == [208, 68, 64]
    assert brightness() > 140 and "left: 69.33%; top: 34.00%; width: 21.33%; height: 32.00%" in explorer.photo.value
    explorer.clicked.value = "crop 1.0 1.0"  # as far as there is photo
    assert [explorer.controls[f"Crop {what}"].value for what in ("left", "top", "size")] == [236, 136, 64]
    explorer.controls["Crop size"].value = 200
    assert [explorer.controls[f"Crop {what}"].value for what in ("left", "top", "size")] == [100, 1, 200]
    assert explorer._crop() == (100, 0, 200)  # a slider's bounds must differ
    for _ in range(2):  # the same place again, after a slider has moved the part away
        explorer.clicked.value = "zoom 0.5 0.0"
        assert (explorer.controls["Zoom left"].value, explorer.controls["Zoom top"].value) == (0.5, 0)
        explorer.controls["Zoom left"].value = 0.9


@pytest.mark.parametrize("width, height", [(1, 1), (3, 500)])
def test_photos_too_small_to_test_can_be_enlarged(explorer, width, height):
    with_photo(explorer, width, height)
    assert "too few to be shrunk 4x and measured" in status(explorer) and explorer.pictures.value == ""
    explorer.controls["Mode"].value = "Enlarge it"
    assert f"LR, {width} px" in explorer.pictures.value


def test_what_is_no_photo_is_refused_in_one_line_and_the_last_one_stays(explorer):
    with_photo(explorer)
    shown = explorer.pictures.value
    choose(explorer, "notes.png", b"no picture")
    assert status(explorer) == "notes.png: not an image that Pillow can read; the photo before it stays"
    assert explorer.pictures.value == shown
    assert [path.name for path in explorer._uploads.iterdir()] == ["me.png"]  # or 4.7 would take it for the newest photo


def test_large_photos_show_progress_and_have_a_bound(explorer, monkeypatch):
    with_photo(explorer, 600, 600)
    explorer.controls["Mode"].value = "Enlarge it"
    said, say = [], explorer._say
    monkeypatch.setattr(explorer, "_say", lambda text: (said.append(text), say(text)))
    explorer.controls["Reduce crop to"].value = 304
    assert said[0] == "enlarging to 1216 px ..." and re.fullmatch(r"enlarging: \d+%", said[1]) and len(said) == 5  # 4 tiles
    explorer.controls["Any factor"].value = 16
    assert "304 px would become 4864 px, and 4096 are the most here" in status(explorer) and explorer.pictures.value == ""
    explorer.controls["Reduce crop to"].value = 600
    explorer.controls["Compare all factors"].click()
    assert "600 px would become 4800 px" in status(explorer)


def test_an_unforeseen_error_stands_in_the_status_line(explorer, monkeypatch):
    monkeypatch.setattr(srgan, "factor_panels", lambda *_: {}["nothing\nhere"])
    explorer.controls["Next face"].click()
    assert status(explorer).startswith("KeyError: ") and explorer.pictures.value == ""


def test_the_figure_is_saved(explorer, tmp_path):
    explorer.controls["Save figure"].click()
    path = tmp_path / "srgan-work" / "test-face-0-4x.png"
    assert status(explorer) == f"saved: {path.relative_to(tmp_path)}"
    with Image.open(path) as picture:
        assert picture.size == (12 * 120, 6.5 * 120)
    with_photo(explorer, 40, 40)
    explorer.controls["Mode"].value = "Enlarge it"
    explorer.controls["Any factor"].value = 2.5
    explorer.controls["Save figure"].click()
    with Image.open(tmp_path / "srgan-work" / "me-40-px-2.5x.png") as figure:
        assert figure.size == (9 * 120, 6.5 * 120)
    enlarged = srgan.load_image(tmp_path / "srgan-work" / "me-40-px-2.5x-enlarged.png")
    assert torch.equal(enlarged, explorer._panels[2][1]) and enlarged.shape[-2:] == (100, 100)


def test_nothing_that_was_saved_is_written_over(explorer, tmp_path):
    def saved(name):
        before = {path: path.read_bytes() for path in (tmp_path / "srgan-work").glob("*.png")}
        explorer.controls["Save figure"].click()
        assert status(explorer) == f"saved: srgan-work/{name}.png"
        assert (tmp_path / "srgan-work" / f"{name}.png") not in before
        assert all(path.read_bytes() == data for path, data in before.items())

    saved("test-face-0-4x")
    explorer.controls["Zoom left"].value = 0.9
    saved("test-face-0-4x-2")
    explorer.controls["Faithful to sharp"].value = 0.5
    saved("test-face-0-4x-blend-0.5")
    explorer.controls["Picture"].value = "Your photo"
    for name in ("照片", "写真"):
        choose(explorer, f"{name}.png", png(90, 80))
        saved(f"{name}-80-px-4x-blend-0.5")


def test_a_mixture_needs_the_parent_of_each_network_in_use(store, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(weights[2].read_bytes())
    monkeypatch.setattr(srgan, "_shipped_weights", (weights | {2: alone}).get)
    explorer = srgan.Explorer(store, weights[4])
    slider = explorer.controls["Faithful to sharp"]
    slider.value = 0.5
    explorer.controls["Compare all factors"].click()
    assert "2x: sharp, since no faithful network is kept beside it" in status(explorer)
    assert re.findall("SRGAN .x", images_in(explorer.sheet.value)[0][0]) == ["SRGAN 2x", "SRGAN 4x", "SRGAN 8x"]
    with_photo(explorer, 40, 40)
    explorer.controls["Mode"].value = "Enlarge it"
    for factor, disabled in ((8.0, False), (12.0, True), (2.0, True), (3.0, False)):
        explorer.controls["Any factor"].value = factor
        assert slider.disabled == disabled and f"enlarged {factor:g}x" in status(explorer), factor


def test_all_factors_of_a_small_crop_are_those_that_can_be_measured(explorer):
    with_photo(explorer, 24, 24)
    explorer.controls["Compare all factors"].click()
    assert "8x: 24 x 24 px are too few" in status(explorer)
    assert re.findall("SRGAN .x", images_in(explorer.sheet.value)[0][0]) == ["SRGAN 2x", "SRGAN 4x"]


def test_networks_are_listed_anew_for_another_scale_only(explorer, monkeypatch):
    with_photo(explorer, 40, 40)
    explorer.controls["Mode"].value = "Enlarge it"
    asked, find = [], srgan.find_generators
    monkeypatch.setattr(srgan, "find_generators", lambda scale, *folders: asked.append(scale) or find(scale, *folders))
    for factor in (3.0, 3.5, 2.5, 6.0, 7.0, 4.0):
        explorer.controls["Any factor"].value = factor
    assert asked == [8, 4]


def test_compare_all_factors(explorer, tmp_path):
    explorer.controls["Compare all factors"].click()
    path = tmp_path / "srgan-work" / "test-face-0-all-factors.png"
    assert status(explorer) == f"all factors, saved: {path.relative_to(tmp_path)}"
    (alt, shown), = images_in(explorer.sheet.value)
    with Image.open(path) as picture:
        assert picture.size == shown.size == (1200, 3 * 650)
    assert re.findall("SRGAN .x", alt) == ["SRGAN 2x", "SRGAN 4x", "SRGAN 8x"]
    explorer.controls["Next face"].click()
    assert explorer.sheet.value == ""  # no sheet of another face


def test_in_colab_a_button_opens_colabs_own_dialog(store, weights, tmp_path, monkeypatch):
    def upload():
        (tmp_path / "me.png").write_bytes(png(80, 80))
        return {"me.png": png(80, 80)}

    colab = ModuleType("google.colab")
    colab.files = SimpleNamespace(upload=upload)
    monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setattr(srgan, "in_colab", lambda: True)
    monkeypatch.setattr(srgan, "workspace", lambda: tmp_path / "work")
    monkeypatch.setattr(srgan, "_shipped_weights", weights.get)
    monkeypatch.chdir(tmp_path)
    explorer = srgan.Explorer(store, weights[4])  # which must not open it
    assert not (tmp_path / "work" / "photos").exists()
    explorer.controls["Picture"].value = "Your photo"
    explorer.controls["Choose a photo"].click()
    assert status(explorer).startswith("me, 80 px, shrunk, then enlarged 4x")
    explorer.controls["Crop size"].value = 40
    shown = explorer.pictures.value
    colab.files.upload = dict  # cancelled: photo and crop stay
    explorer.controls["Choose a photo"].click()
    assert status(explorer) == "no photo was chosen" and explorer.pictures.value == shown
    colab.files.upload = lambda: (tmp_path / "bad.png").write_bytes(b"bad") and {"bad.png": b"bad"}
    explorer.controls["Choose a photo"].click()
    assert status(explorer) == "bad.png: not an image that Pillow can read; the photo before it stays"
    colab.files.upload = dict
    explorer.controls["Choose a photo"].click()
    assert status(explorer) == "no photo was chosen" and explorer.pictures.value == shown
    explorer.controls["Upscale factor"].value = 2
    assert status(explorer).startswith("me, 40 px, shrunk, then enlarged 2x")
