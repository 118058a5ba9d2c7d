"""What the notebooks show of networks (costs of layers, receptive fields, shapes, source code) and what they measure."""

import ast
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import srgan_utils as srgan

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def made(preset="sharp", scale=4, **changes):
    config = srgan.Config.preset(preset, scale=scale, **changes)
    with torch.device("meta"):
        return config, srgan.Generator(config), srgan.Discriminator(config)


def test_costs_and_shapes_of_a_small_generator_by_hand():
    """Every layer of `report` with 8 channels on two images of 6 x 5 px, the shared block's two uses in one row."""
    (_, generator, _), images = made("report", channels=8, residual_blocks=1), torch.empty(2, 3, 6, 5, device="meta")
    area, block = 2 * 30, (8 * 8 * 9 + 8, 8 * 8 * 9 * 2 * 30)
    assert srgan.layer_costs(generator, images) == {
        "head.0": (3 * 8 * 81 + 8, 3 * 8 * 81 * area),
        "blocks.0.body.0": block, "blocks.0.body.3": block, "merge.0": block,
        "upsample.0.conv": (8 * 32 * 9 + 32, 8 * 32 * 9 * (area + 4 * area)),
        "tail": (8 * 3 * 81 + 3, 8 * 3 * 81 * 16 * area),
        "all else": (1 + 1 + 1 + 3 * 16, 0),  # three PReLUs and three BatchNorms
    }
    lines = srgan.shape_walk(generator, images).splitlines()  # in the order of the forward pass
    assert [line.split()[0][:8] for line in lines] == ["head", "blocks", "merge", "upsample", "upsample", "tail"]
    assert "(2, 8, 12, 10) -> (2, 8, 24, 20)" in " ".join(lines[4].split()) and generator.training
    assert lines[0].split()[-1] == f"{srgan.count_parameters(generator.head):,}" == "1,953"


@pytest.mark.parametrize("preset", ["report", "paper", "sharp", "demo"])
def test_costs_add_up_to_the_totals_and_keep_the_mode(preset):
    config, generator, discriminator = made(preset)
    small, patch = (torch.empty(1, 3, side, side, device="meta") for side in (16, config.patch))
    for model, inputs in ((generator, [small]), (discriminator, [patch, small])):
        costs = srgan.layer_costs(model, *inputs)
        parameters, multiplications = map(sum, zip(*costs.values()))
        assert model.training and parameters == srgan.count_parameters(model)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.eval()(*inputs)
        assert multiplications == counter.get_total_flops() // 2
        assert all(own > 0 and count > 0 for name, (own, count) in costs.items() if name != "all else")


@pytest.mark.parametrize("preset, changes", [("report", {}), ("paper", {}), *(("sharp", {"upsampling": kind}) for kind in (
    "shuffle", "blur")), ("sharp", {"residual_blocks": 3}), ("sharp", {"residual_blocks": 6, "dilation": 2})], ids=str)
@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.filterwarnings("ignore:TF32")  # of torch's, about another machine
def test_the_receptive_radius_is_how_far_a_pixel_sees(preset, changes, scale):
    """LR px that a pixel of SR depends on, by gradients: none beyond the radius, some within a few px of it."""
    config = srgan.Config.preset(preset, **{"scale": scale, "channels": 4, "residual_blocks": 2} | changes)
    torch.manual_seed(0)
    generator, radius = srgan.Generator(config).eval(), srgan.receptive_radius(config)
    middle = radius + 3
    touched = torch.zeros(2 * middle + 1, 2 * middle + 1)
    for corner in (middle * scale, (middle + 1) * scale - 1):
        lr = torch.rand(1, 3, *touched.shape, requires_grad=True)
        with torch.backends.mkldnn.flags(enabled=False):  # the plain convolution: exact zeros stay zeros
            generator(lr)[..., corner, corner].sum().backward()
        touched += lr.grad[0].abs().amax(0)
    assert radius - 4 <= (touched.nonzero() - middle).abs().max() <= radius


def names_of(stem: str, ident: str, whole: bool = False, **given) -> dict:
    """What a notebook's cell defines, with what other cells would have given it; not whole: only its functions are run."""
    (cell,) = [cell for cell in json.loads((NOTEBOOKS / f"{stem}.ipynb").read_text())["cells"] if cell["id"] == ident]
    tree = ast.parse("".join(cell["source"]))
    tree.body = [node for node in tree.body if whole or isinstance(node, (ast.FunctionDef, ast.Import, ast.ImportFrom))]
    names = {"srgan": srgan, "torch": torch} | given
    exec(compile(tree, ident, "exec"), names)
    return names


def test_the_newest_picture_is_found_whatever_its_name(tmp_path):
    newest_photo, photo = names_of("04_compare", "04-newest")["newest_photo"], srgan.synthetic_face(1)
    assert newest_photo(tmp_path)[1] is None
    srgan.save_image(photo, tmp_path / "old.png")
    (tmp_path / "old.png").rename(tmp_path / "old")
    srgan.save_image(1 - photo, tmp_path / "older.png")
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (tmp_path / "a folder.jpg").mkdir()
    for age, name in enumerate(("a folder.jpg", ".DS_Store", "old", "older.png")):
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    name, found = newest_photo(tmp_path)
    assert name == "old" and found.equal(photo)


def test_the_blind_test_knows_which_ones_are_real(store, monkeypatch):
    drawn = []
    monkeypatch.setattr(srgan, "show_images", lambda images, *_, **__: drawn.extend(images))
    monkeypatch.setattr(srgan, "show", lambda *_: None)
    test, black = np.arange(20), lambda network, lr: torch.zeros(len(lr), 3, 176, 176)
    given = {"store": store, "test": test, "config": srgan.Config(), "enlarged": black, "mixture": None,
             "verdict": lambda answers, truths: ""}
    truths = names_of("04_compare", "quiz", whole=True, **given)["truths"]
    is_real = [image.sum().item() > 0 for image in drawn]
    assert len(truths) == 10 and set(truths) == {"L", "R"}
    assert list(zip(is_real[::2], is_real[1::2])) == [(truth == "L", truth == "R") for truth in truths]


def test_the_blind_test_tells_the_share_and_wilsons_interval():
    """Against the values of published tables, and by its definition: at its ends the share is 1.96 deviations away."""
    names = names_of("04_compare", "quiz-score")
    interval, verdict = names["interval"], names["verdict"]
    assert interval(7, 10) == pytest.approx((0.3968, 0.8922), abs=1e-4)
    assert interval(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)
    for right, asked in ((1, 4), (5, 10), (9, 10)):
        for end in interval(right, asked):
            assert abs(right / asked - end) == pytest.approx(1.96 * (end * (1 - end) / asked) ** 0.5)
    told = verdict("LLRL", "LLRR")
    assert told.startswith("3 of 4 right; 95 % interval of your share: 30% to 95%.") and told.endswith("LLRR")
    for unanswered in ("", "LLR", "LLR?", "LLRRL", "1234"):
        assert verdict(unanswered, "LLRR") == "4 answers, L or R, are needed."
    buttons = names_of("04_compare", "quiz-buttons", whole=True, truths="LLRR", verdict=verdict)
    for choice, letter in zip(buttons["choices"], "LLRL", strict=True):
        choice.value = letter
    assert buttons["outcome"].value == told


def test_one_step_of_back_projection_comes_nearer_to_lr():
    back_projected = names_of("04_compare", "consistency")["back_projected"]
    hr = srgan.synthetic_face(2)[..., 1:-1, 1:-1]
    lr = srgan.quantise(srgan.bicubic(hr, 44))
    sr = srgan.bicubic(lr, 176)
    before, after = (srgan.psnr(srgan.bicubic(each, 44), lr).item() for each in (sr, back_projected(sr, lr)))
    assert after > before + 6  # half of the error
    assert back_projected(hr, srgan.bicubic(hr, 44)).equal(srgan.quantise(hr))  # nothing to move


def test_energy_is_where_the_frequency_is():
    energy = names_of("03_train", "03-energy")["energy"]
    wave = (torch.arange(64) * torch.pi / 4).cos().expand(2, 3, 64, 64)  # of 8 px
    power = energy(wave)
    assert divmod(power[:, :32].argmax().item(), 32) == (0, 8) and power[2:-2].sum() < 1e-6 * power.sum()
    assert torch.allclose(energy(3 * wave + 0.5), 9 * power, rtol=1e-3, atol=1e-2)


def test_spectra_are_one_where_the_network_gives_hr(store):
    config = srgan.Config(hr_size=64)
    faces = store.faces([0, 1])
    oracle = srgan.Generator(srgan.Config.preset("report", channels=4, residual_blocks=1))
    oracle.forward = lambda lr: srgan.make_pair(faces, config)[1]
    energies, hr, frequency = names_of("03_train", "03-energy")["spectra"]({"oracle": oracle}, config, faces)
    assert energies["oracle"].equal(hr) and frequency.max() == pytest.approx(0.5 ** 0.5) and frequency[0, 0] == 0
    fine = frequency > 1 / 8  # beyond LR
    assert energies["bicubic"][fine].sum() < 0.5 * hr[fine].sum()


def test_the_discriminator_is_asked_about_the_same_places(store, tiny_run):
    contest = names_of("03_train", "03-contest")["contest"]
    saved = srgan.newest_checkpoint(tiny_run / "ckpt")
    config, faces = srgan.Config.from_dict(saved["config"]), store.faces(store.indices("test"))
    discriminator, generator = srgan.Discriminator(config).eval(), srgan.Generator(config).eval()
    discriminator.load_state_dict(saved["discriminator"])
    generator.load_state_dict(saved["generator"])
    lr, hr = srgan.make_pair(faces, config)
    inner = saved | {"config": saved["config"] | {"patch_size": 16}}  # the middle of each
    with torch.no_grad():
        for found, images, its_lr in zip((*contest(saved, faces), contest(inner, faces)[0]),
                                         (hr, generator(lr), hr[..., 8:24, 8:24]), (lr, lr, lr[..., 2:6, 2:6])):
            verdicts = discriminator(images, its_lr)
            assert torch.allclose(found, torch.cat([each.flatten() for each in verdicts]))


def test_beyond_the_receptive_field_nothing_changes_the_centre(store):
    """By the shipped network for 2x, with radius 22: a swap of all but 23 px is not seen, one of all but the centre is."""
    names = names_of("02_model", "02-swap", store=store, test=store.indices("test"))
    changes, radius = names["change_at_the_centre"](2, (0, 23))
    assert radius == 22 and changes[23] < 1e-3 and changes[0] > 1
