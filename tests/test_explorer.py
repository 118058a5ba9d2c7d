"""The upscale factor by hand: `enlarge`, the panels, before/after, and the `Explorer` driven by the labels of its controls."""

import html
import io
import os
import re
import shutil
import sys
from base64 import b64decode
from datetime import datetime
from pathlib import Path
from unittest import mock

import colab_standin
import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image

import srgan_utils as srgan

NET = {"channels": 8, "residual_blocks": 1, "precision": "fp32"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict:
    """A small network for each factor, with a parent beside it that is another network."""
    folder, paths = tmp_path_factory.mktemp("weights"), {}
    for scale in (2, 4, 8):
        paths[scale] = folder / str(scale) / "generator.safetensors"
        paths[scale].parent.mkdir()
        for number, name in enumerate(("generator", "pretrained")):
            torch.manual_seed(10 * scale + number)
            generator = srgan.Generator(config := srgan.Config.preset("sharp", **NET, scale=scale))
            torch.nn.init.normal_(generator.tail.weight, std=0.02)  # not just bicubic
            srgan.export_generator(paths[scale].with_stem(name), generator, config)
    return paths


def by(path, image, amount=1.0):
    return srgan.upscale(image, *srgan.load_generator(path, amount=amount)[:2])


@pytest.mark.parametrize("factor, networks, note", [
    (1, [2], "2x network, reduced to 1x"), (3, [4], "4x network, reduced to 3x"), (4.1, [8], "8x network, reduced to 4.1x"),
    (8, [8], "8x network"), (12.5, [8, 2], "8x then 2x network, reduced to 12.5x"), (16, [8, 2], "8x then 2x network")])
def test_any_factor_is_the_next_larger_network_and_a_reduction_or_two_in_a_row(weights, factor, networks, note):
    photo = srgan.quantise(torch.rand(1, 3, 19, 26, generator=srgan.seeded(4)))
    expected, size = photo, (round(19 * factor), round(26 * factor))
    for scale in networks:
        expected = by(weights[scale], expected, 0.5)
    if expected.shape[-2:] != size:
        expected = srgan.quantise(srgan.bicubic(expected, size))
    sr, told = srgan.enlarge(photo, factor, weights, 0.5)
    assert torch.equal(sr, expected) and told == note
    for wrong in (0.9, 16.1, float("nan")):
        with refused(ValueError, r"^factor \S+: give a number from 1 to 16$"):
            srgan.enlarge(photo, wrong, weights)


def test_networks_are_listed_newest_first_then_the_shipped_one_then_demos(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    srgan.export_generator("demo", srgan.Generator(config := srgan.Config.preset("demo", **NET, scale=4)), config)
    for age, (place, source) in enumerate({"srgan-work/runs/a": weights[4], "drive/b": weights[4], "drive/two": weights[2],
                                           "drive/damaged": Path(__file__), "drive/demo": Path("demo")}.items()):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "generator.safetensors").write_bytes(source.read_bytes())
        os.utime(tmp_path / place / "generator.safetensors", (1e9 + age, 1e9 + age))
    found = [path.resolve().parent.name for path in srgan.find_generators(4, tmp_path / "drive", tmp_path / "missing")]
    assert found == ["b", "a", "weights", "weights", "demo"]  # the last but one: for compressed photos


def test_panels_of_a_picture_that_is_shrunk_first_and_of_one_that_is_the_lr(weights):
    picture = srgan.quantise(torch.rand(1, 3, 50, 70, generator=srgan.seeded(1)))
    panels, note = srgan.factor_panels(picture, 4, True, weights)
    hr = picture[..., :48, :68]  # the largest multiples of 4
    lr = srgan.quantise(srgan.bicubic(hr, (12, 17)))
    plain, sr = srgan.quantise(srgan.bicubic(lr, (48, 68))), by(weights[4], lr)
    assert [title for title, _, _ in panels] == ["LR, 17 px", "bicubic", "SRGAN 4x", "HR, 68 px"] and note == "4x network"
    for (_, image, _), expected in zip(panels, (lr.repeat_interleave(4, 2).repeat_interleave(4, 3), plain, sr, hr)):
        assert torch.equal(image, expected)
    inner = [image[..., 4:-4, 4:-4] for image in (sr, hr)]
    assert panels[2][2].startswith(f"{srgan.psnr(*inner).item():.2f} dB, SSIM {srgan.ssim(*inner).item():.3f}\ncheckerboard ")
    panels, note = srgan.factor_panels(lr, 2.5, False, weights)
    assert [title for title, _, _ in panels] == ["LR, 17 px", "bicubic", "SRGAN 2.5x"] and note == "4x network, reduced to 2.5x"
    assert not any("dB" in text for _, _, text in panels)  # there is no truth to measure against
    for size, factor, message in (((24, 24), 8, "24 x 24 px are too few"), ((99, 99), 3, "by 2, 4 or 8 to be tested, not by 3")):
        with pytest.raises(ValueError, match=message):
            srgan.factor_panels(torch.rand(1, 3, *size), factor, True, weights)


def images_in(text: str) -> list[tuple[str, np.ndarray]]:
    """(alt, pixels) of each <img> in HTML."""
    found = re.findall(r'<img alt="([^"]*)"[^>]*src="data:image/png;base64,([^"]+)"', text)
    return [(html.unescape(alt), np.asarray(Image.open(io.BytesIO(b64decode(data))))) for alt, data in found]


def test_before_after_holds_both_images_and_a_line_that_needs_no_script():
    left, right = (srgan.quantise(torch.rand(1, 3, 20, 30)) for _ in range(2))
    text = srgan.before_after(left, right, ("a < b", "c"), 'a "face" <script>').data
    assert "<script" not in text and "http" not in text and "a < b" not in text and '<input type="range"' in text
    expected = {'a "face" <script>: c': right, 'a "face" <script>: a < b': left}  # the left one lies above, cut by the line
    assert list(found := dict(images_in(text))) == list(expected)
    assert all(np.array_equal(found[name], image[0].mul(255).round().byte().permute(1, 2, 0)) for name, image in expected.items())


class Driven:
    """An Explorer, as a person drives it, by labels: `drive(label, value)` gives the status and the words of the picture."""

    def __init__(self, store, path):
        self.explorer = srgan.Explorer(store, path, path.parents[1])

    def __call__(self, label: str = "", value=None) -> str:
        if control := self.explorer.controls.get(label):
            if isinstance(value, tuple):  # (name, bytes) of a photo, in the form of the installed ipywidgets, 7 or 8
                one = {"name": value[0], "type": "", "size": 9, "content": memoryview(value[1]), "last_modified": datetime.now()}
                value = {value[0]: one | {"metadata": {}}} if isinstance(control.value, dict) else (one,)
            control.click() if value is None else control.set_trait("value", value)
        said = re.fullmatch('<div role="status">([^\n]*)</div>', self.explorer.status.value)[1]
        return " | ".join([html.unescape(said), *(alt for alt, _ in images_in(self.explorer.picture.value))])


@pytest.fixture
def drive(store, weights, tmp_path, monkeypatch) -> Driven:
    """The panel at 4x, as the notebook opens it, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return Driven(store, weights[4])


def png(width: int, height: int) -> bytes:
    """Left half dark, right half light, with noise."""
    pixels = np.random.default_rng(0).integers(0, 60, (height, width, 3), dtype=np.uint8)
    pixels[:, width // 2:] += 150
    Image.fromarray(pixels).save(buffer := io.BytesIO(), format="png")
    return buffer.getvalue()


def store_face(store, number: int):
    return srgan.make_pair(store.faces(store.indices("test")[number:number + 1]), srgan.Config())[1]


def test_it_opens_with_what_the_plain_functions_make_and_each_control_changes_it(drive, store, weights, tmp_path):
    panels, _ = srgan.factor_panels(store_face(store, 0), 4, True, weights)
    assert re.match(r"face 0 4x, by the 4x network; \d+\.\d\d s \| ", drive()) and all(text in drive() for _, _, text in panels)
    assert all(control.description == label for label, control in drive.explorer.controls.items() if label != "Choose a photo")
    seen = {drive() + drive.explorer.picture.value}
    for label, value, expected in (("Upscale factor", "2x", "by the 2x network"), ("Face", 1, "face 1"), ("Zoom left", 1, "2x"),
                                   ("Faithful to sharp", 0.5, "2x"), ("Faithful to sharp", 0, "2x"), ("Zoom top", 0, "2x"),
                                   ("Upscale factor", "all factors", "face 1 all factors")):
        assert expected in drive(label, value) and drive.explorer.picture.value not in seen, label
        seen.add(drive.explorer.picture.value)
    assert [f"SRGAN {factor}x" in drive() for factor in (2, 4, 8)] == [True] * 3
    own = [srgan.factor_panels(store_face(store, 1), factor, True, weights, 0)[0][2][2] for factor in (2, 4, 8)]
    assert all(caption in drive() for caption in own)  # a person's own networks, not the shipped ones
    drive("Before/after", "SRGAN | HR")
    assert [alt.split(": ")[-1] for alt, _ in images_in(drive.explorer.line.value)] == ["HR", "SRGAN"]
    network = drive.explorer.controls["Network"]
    drive("Upscale factor", "4x")
    assert [label.split("/")[-2:] for label, _ in network.options] == [
        ["4", "generator"], ["weights", "srgan-x4"], ["weights", "srgan-x4-photo"]]
    assert drive("Network", network.options[1][1]) and drive.explorer.picture.value not in seen


def test_a_photo_of_ones_own_is_cropped_tested_enlarged_and_saved(drive):
    assert drive("Picture", "Your photo") == "choose a photo first, with the button above"
    assert drive("Choose a photo", ("me.png", png(300, 200))).startswith("me 4x, by the 4x network;")
    assert "HR, 176 px" in drive() and "dB, SSIM" in drive()
    assert "HR, 64 px" in drive("Crop size", 0.32) and "HR, 32 px" in drive("Reduce crop to", 32)
    for left, dark in ((0, True), (1, False)):
        drive("Crop left", left)
        assert (images_in(drive.explorer.line.value)[1][1].mean() < 80) == dark
    assert "LR, 32 px" in drive("Mode", "Enlarge it") and not re.search("HR, |dB", drive())
    assert "me 2.5x, by the 4x network, reduced to 2.5x" in drive("Any factor", 2.5)
    assert "me 10x, by the 8x then 2x network, reduced to 10x" in drive("Any factor", 10.0)
    for number in ("", "-2"):  # nothing that was saved is written over
        assert drive("Save", None).startswith(f"saved: srgan-work/me 10x, blend 1{number}.png")
        assert srgan.load_image(f"srgan-work/me 10x, blend 1{number}, enlarged.png").shape[-2:] == (320, 320)
    drive("Crop size", 1.0), drive("Any factor", 16.0)
    drive("Choose a photo", ("large.png", png(600, 600)))
    assert "4096 px are the most here" in drive("Reduce crop to", 600) and "Test it" not in drive()
    assert "large 1x" in drive("Any factor", 1.0)
    assert "notes.png: not an image that Pillow can read" in drive("Choose a photo", ("notes.png", b"no picture"))


def test_what_cannot_be_shown_is_said_and_the_rest_goes_on(store, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "alone").mkdir(parents=True)
    drive = Driven(store, Path(shutil.copy(weights[4], tmp_path / "runs" / "alone")))
    assert "a mixture needs the faithful parent" in drive("Faithful to sharp", 0.5) and drive.explorer.picture.value == ""
    drive("Faithful to sharp", 1.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(srgan, "factor_panels", mock.Mock(side_effect=KeyboardInterrupt))
        drive("Face", 1)
    assert drive("Face", 0).startswith("face 0 4x")  # the panel goes on
    with monkeypatch.context() as patch:
        patch.setattr(srgan, "find_generators", lambda *_: [])
        assert drive("Upscale factor", "8x").startswith("there is no network for 8x yet: train one with scale = 8 (notebook 3)")
        assert drive("Save") == "there is nothing to show yet"
    assert "SRGAN 4x" in drive("Upscale factor", "4x")
    explorer = srgan.Explorer(store, weights[8])  # a network that it is given is offered wherever it lies
    assert explorer.controls["Network"].value == weights[8] and "SRGAN 8x" in explorer.picture.value


def test_in_colab_a_button_opens_colabs_own_dialog(store, weights, tmp_path, monkeypatch):
    machine = colab_standin.Machine(tmp_path, tmp_path / "cloud")
    for name, module in colab_standin.modules(machine).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(srgan, "in_colab", lambda: True)
    monkeypatch.setattr(srgan, "workspace", lambda: tmp_path / "work")
    monkeypatch.chdir(tmp_path)
    drive = Driven(store, weights[4])  # which must not open it
    drive("Picture", "Your photo")
    for machine.chosen in ({"me.png": png(80, 80)}, ""):  # "": cancelled, and the photo stays
        assert drive("Choose a photo").startswith("me 4x, by the 4x network")
