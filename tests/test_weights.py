"""The weights that ship: what their headers promise, and that they are what they were when they were measured."""

import json

import pytest
import torch

import srgan_utils as srgan

SCALES = (2, 4, 8)
each_file = pytest.mark.parametrize("ending", ["", "-pixel"])
each_scale = pytest.mark.parametrize("scale", SCALES)


def shipped(scale: int, ending: str = ""):
    path = srgan._shipped_weights(scale)
    return path.with_name(f"{path.stem}{ending}.safetensors")


@pytest.fixture(scope="module")
def drawn() -> torch.Tensor:
    """Faces of another kind than the networks were trained on, uint8 (4, 3, 178, 178)."""
    return torch.cat([srgan.synthetic_face(index) for index in (1, 4, 7, 11)]).mul(255).byte()


def gain(generator, config, faces) -> float:
    """Mean gain over bicubic in RGB PSNR, dB."""
    edge = slice(config.scale, -config.scale)
    lr, hr = srgan.make_pair(faces, config)
    with torch.no_grad():
        images = srgan.quantise(generator(lr)), srgan.quantise(srgan.bicubic(lr, config.hr_size))
    ours, plain = (srgan.psnr(each[..., edge, edge], hr[..., edge, edge]).mean().item() for each in images)
    return ours - plain


@each_scale
@each_file
def test_the_header_says_what_it_is(scale, ending):
    path = shipped(scale, ending)
    assert path.stat().st_size <= 4e6
    _, config, about = srgan.load_generator(path, scale)
    assert (config.preset_name, config.crop, config.hr_size) == ("sharp", 176, 176)
    assert {"config", "update", "data", "metrics", "commit", "licence", "environment"} <= about.keys()
    assert config.pretrain_steps <= about["update"] <= (config.pretrain_steps if ending else config.total_steps)
    assert "portraits" in about["data"]["source"] and "/" not in about["data"]["source"]
    assert len(about["commit"]) == 40 and about["licence"] == "MIT"
    assert about["metrics"]["split"] == "test" and about["metrics"]["srgan"]["psnr_rgb"] > about["metrics"]["bicubic"]["psnr_rgb"]
    json.dumps(about, allow_nan=False)


@each_scale
def test_they_enlarge_faces_that_are_drawn_better_than_bicubic(scale, drawn):
    """By about half of what they gained when they were shipped: a network that lost its weights adds noise."""
    parent, config, _ = srgan.load_generator(shipped(scale, "-pixel"))
    final, _, _ = srgan.load_generator(shipped(scale))
    least = {2: (1.4, 1.1), 4: (0.9, 0.4), 8: (0.7, 0.4)}[scale]
    assert gain(parent, config, drawn) > least[0] and gain(final, config, drawn) > least[1]


@each_scale
def test_the_final_network_is_sharper_without_a_checkerboard(scale, drawn):
    """Sharper than its parent and than bicubic; no grid, neither on a flat colour nor on faces."""
    colours = drawn.float().mean((2, 3)) / 255
    lr, hr = srgan.make_pair(drawn, srgan.Config(scale=scale))
    found = []
    for ending in ("-pixel", ""):
        generator, _, _ = srgan.load_generator(shipped(scale, ending))
        assert srgan.flat_field(generator, colours).max() < 1
        with torch.no_grad():
            found.append(srgan.quantise(generator(lr)))
    parent, final = (srgan.sharpness(sr, hr).mean() for sr in found)
    assert srgan.sharpness(srgan.bicubic(lr, 176), hr).mean() < parent < final
    assert srgan.checkerboard_index(found[1]).mean() < 1.2 * srgan.checkerboard_index(hr).mean()


@each_scale
def test_parent_and_final_are_ends_of_one_slider(scale, drawn):
    ends = [srgan.load_generator(shipped(scale, ending))[0] for ending in ("-pixel", "")]
    assert srgan.find_parent(shipped(scale)) == shipped(scale, "-pixel")
    lr, _ = srgan.make_pair(drawn[:1], srgan.Config(scale=scale))
    with torch.no_grad():
        faithful, sharp = (network(lr) for network in ends)
        middle = srgan.interpolate_generators(*ends, 0.5)(lr)
    distance = srgan.pixel_loss(faithful, sharp)
    assert 0 < srgan.pixel_loss(faithful, middle) < distance and 0 < srgan.pixel_loss(middle, sharp) < distance


def test_compare_and_upscale_use_them_when_no_run_is_given_and_say_so(store, tmp_path, capsys):
    assert srgan.main(["compare", "--store", str(store.folder), "--out", str(tmp_path), "--count", "1"]) == 0
    assert f"weights: {shipped(4)}\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.json").read_text())["scale"] == 4
    photo = tmp_path / "photo.png"
    srgan.save_image(srgan.synthetic_face(0)[..., :20, :16], photo)
    for options, used in (["--scale", "2"], shipped(2)), (["--scale", "8", "--blend", "0.5"], f"{shipped(8)} (--blend 0.5)"):
        assert srgan.main(["upscale", str(photo), "--out", str(tmp_path), *options]) == 0
        assert f"weights: {used}\n" in capsys.readouterr().out
    assert srgan.load_image(tmp_path / "photo-x8.png").shape == (1, 3, 160, 128)


def test_a_factor_without_weights_says_how_to_train_it(store, tmp_path, capsys):
    assert srgan.main(["compare", "--store", str(store.folder), "--out", str(tmp_path), "--scale", "16"]) == 2
    assert "no shipped weights for 16x: train a run" in capsys.readouterr().err


def test_one_s_own_run_is_preferred_to_them(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(srgan, "workspace", lambda: tmp_path)
    assert [srgan.find_generator(scale) for scale in (4, 16)] == [shipped(4), None]
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    own = tmp_path / "runs" / "mine" / "generator.safetensors"
    own.write_bytes((tiny_run / "generator.safetensors").read_bytes())
    assert [srgan.find_generator(scale) for scale in (2, 4)] == [shipped(2), own]
