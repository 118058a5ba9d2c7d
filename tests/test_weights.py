"""The weights that ship: what their headers promise, and that they are what they were when they were measured."""

import json
from pathlib import Path

import pytest
import torch
from conftest import flat_field

import srgan_utils as srgan

each_scale = pytest.mark.parametrize("scale", [2, 4, 8])


def shipped(scale: int, ending: str = "") -> Path:
    return Path(srgan.__file__).parent / "weights" / f"srgan-x{scale}{ending}.safetensors"


@pytest.mark.parametrize("scale, kind", [(2, ""), (4, ""), (8, ""), (4, "-photo")])
def test_the_header_says_what_it_is(scale, kind):
    for ending in ("", "-pixel"):
        assert (path := shipped(scale, kind + ending)).stat().st_size <= 5e6
        _, config, about = srgan.load_generator(path, scale)
        assert (config.preset_name, config.crop, config.hr_size) == ("sharp", 176, 176) and "environment" in about
        pretrain, steps = about["config"]["pretrain_steps"], about["config"]["steps"]
        assert pretrain <= about["update"] <= (pretrain if ending else pretrain + steps)
        assert about["config"].get("degrade", False) == (kind == "-photo")
        assert "portraits" in about["data"]["source"] and "/" not in about["data"]["source"]
        assert len(about["commit"]) == 40 and about["licence"] == "MIT"
        assert about["metrics"]["split"] == "test" and about["metrics"]["srgan"]["psnr_rgb"] > about["metrics"]["bicubic"]["psnr_rgb"]
        json.dumps(about, allow_nan=False)
    parent, beside = srgan.load_generator(path)[0], srgan.load_generator(shipped(scale, kind), amount=0)[0]
    assert all(map(torch.equal, parent.state_dict().values(), beside.state_dict().values()))
    with pytest.raises(ValueError, match=f"network for {scale}x, not 16x"):
        srgan.load_generator(path, 16)


@torch.no_grad()
def test_the_network_for_photos_gains_where_the_usual_one_loses(tmp_path, capsys):
    """On JPEGs and noise, which the usual one sharpens; and only who asks for it gets it."""
    faces = torch.cat([srgan.synthetic_face(index) for index in (1, 4, 7, 11)]).mul(255).byte()
    _, hr = srgan.make_pair(faces, srgan.Config())
    networks = [srgan.load_generator(shipped(4, kind))[0] for kind in ("", "-photo")]
    for (noise, quality), margin in (((0, 50), 0.2), ((5, 99), 0.5)):
        lr = torch.cat([srgan.web_copy(face, 4, 0, noise, quality, srgan.seeded(0, n)) for n, face in enumerate(hr.split(1))])
        made = [srgan.quantise(srgan.bicubic(lr, 176)), *(srgan.super_resolve(network, lr) for network in networks)]
        plain, usual, photo = (srgan.psnr(each, hr).mean() for each in made)
        assert photo > plain + margin > usual + 2 * margin
    srgan.save_image(lr[:1], tmp_path / "face.png")
    assert srgan.main(["upscale", str(tmp_path / "face.png"), "--out", str(tmp_path), "--photo"]) == 0
    assert f"weights: {shipped(4, '-photo')}" in capsys.readouterr().out
    asked = srgan.load_image(tmp_path / "face-x4.png")
    assert torch.equal(asked, srgan.upscale(lr[:1], *srgan.load_generator(shipped(4, "-photo"))[:2]))
    assert srgan.find_generators(4).index(shipped(4)) < srgan.find_generators(4).index(shipped(4, "-photo"))


@each_scale
@torch.no_grad()
def test_they_enlarge_drawn_faces_better_than_bicubic_and_are_sharper_without_a_checkerboard(scale):
    """By about half of what they gained when they were shipped: a network that lost its weights adds noise."""
    faces, edge = torch.cat([srgan.synthetic_face(index) for index in (1, 4, 7, 11)]).mul(255).byte(), slice(scale, -scale)
    lr, hr = srgan.make_pair(faces, srgan.Config(scale=scale))
    images = [srgan.quantise(srgan.bicubic(lr, 176))]
    for ending in ("-pixel", ""):
        images.append(srgan.quantise((generator := srgan.load_generator(shipped(scale, ending))[0])(lr)))
        assert flat_field(generator, faces.float().mean((2, 3)) / 255).max() < 1
    plain, parent, final = (srgan.psnr(each[..., edge, edge], hr[..., edge, edge]).mean() for each in images)
    least = {2: (1.4, 1.1), 4: (0.9, 0.4), 8: (0.7, 0.4)}[scale]
    assert parent - plain > least[0] and final - plain > least[1]
    assert (found := [srgan.sharpness(each, hr).mean().item() for each in images]) == sorted(set(found))
    assert srgan.checkerboard_index(images[-1]).mean() < 1.2 * srgan.checkerboard_index(hr).mean()


def test_a_mixture_mixes_every_weight_and_is_refused_where_the_parent_does_not_fit(tmp_path):
    path, states = tmp_path / "generator.safetensors", []
    for blocks, name in ((2, "pretrained"), (2, "generator"), (1, "other")):
        config = srgan.Config.preset("report", scale=2, channels=4, residual_blocks=blocks)
        (generator := srgan.Generator(config))(torch.rand(2, 3, 9, 9))  # BatchNorm has statistics and a counter of its own
        srgan.export_generator(path.with_stem(name), generator, config)
        states.append(generator.state_dict())
    for amount in (0, 0.25, 1):
        for name, value in srgan.load_generator(path, 2, amount)[0].state_dict().items():
            both = states[0][name].double(), states[1][name].double()
            torch.testing.assert_close(value.double(), (1 - amount) * both[0] + amount * both[1])
    path.with_stem("other").replace(path.with_stem("pretrained"))
    with pytest.raises(ValueError, match="pretrained"):
        srgan.load_generator(path, 2, 0.5)


def test_commands_use_them_when_no_run_is_given_and_say_so_or_how_to_train_what_is_not_there(store, tmp_path, capsys):
    assert srgan.main(["compare", "--store", str(store.folder), "--out", str(tmp_path), "--count", "1"]) == 0
    assert f"weights: {shipped(4)}" in capsys.readouterr().out and '"scale": 4' in (tmp_path / "metrics.json").read_text()
    srgan.save_image(srgan.synthetic_face(0)[..., :20, :16], tmp_path / "photo.png")
    for options, used in (["--scale", "2"], (shipped(2), "1")), (["--scale", "8", "--blend", "0.5"], (shipped(8), "0.5")):
        assert srgan.main(["upscale", str(tmp_path / "photo.png"), "--out", str(tmp_path), *options]) == 0
        assert "weights: {}, blend {}\n".format(*used) in capsys.readouterr().out
    assert srgan.load_image(tmp_path / "photo-x8.png").shape == (1, 3, 160, 128)
    assert srgan.main(["compare", "--store", str(store.folder), "--out", str(tmp_path), "--scale", "16"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "x16" in told and "train" in told and "2, 4, 8" in told
