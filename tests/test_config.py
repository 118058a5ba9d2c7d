"""Config: the presets' numbers, and what is refused with which advice."""

import json
import re
from dataclasses import asdict, fields

import pytest

import srgan_utils as srgan

BLANK = {"hr_size": 64, "patch_size": None}  # a view that suits every scale


@pytest.mark.parametrize("name, numbers", [
    ("report", {"crop": 144, "hr_size": 256, "patch": 256, "flip": False, "channels": 64, "residual_blocks": 5, "kernel_size": 9,
                "batch_norm": 0.8, "shared_upsampling": True, "icnr": False, "skip": False, "output": "report",
                "discriminator": "dense", "distance": "l1", "content": "vgg", "content_weight": 1, "pixel_weight": 0,
                "vgg": "imagenet", "vgg_layers": 19, "vgg_rescale": 1, "adversarial": "least_squares",
                "adversarial_weight": 1e-3, "ramp_steps": 0,
                "warmup_steps": 0, "decay": "none", "ema": 0, "learning_rate": 1e-5, "beta1": 0.5, "beta2": 0.999,
                "batch_size": 8, "pretrain_steps": 0, "epochs": 3}),
    ("paper", {"crop": 178, "hr_size": 128, "flip": True, "residual_blocks": 16, "kernel_size": 9, "batch_norm": 0.1,
               "shared_upsampling": False, "skip": False, "output": "tanh", "discriminator": "dense", "distance": "mse",
               "content": "vgg", "pixel_weight": 0, "vgg_layers": 36, "vgg_rescale": 12.75, "adversarial": "bce",
               "adversarial_weight": 1e-3, "learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.999, "batch_size": 16}),
    ("sharp", {"crop": 176, "hr_size": 176, "flip": True, "batch_norm": 0, "shared_upsampling": False, "icnr": True, "skip": True,
               "discriminator": "pooled", "distance": "l1", "content": "features", "pixel_weight": 1}),
    ("demo", {"scale": 4, "content": "features"}),  # needs no download
])
def test_preset_has_the_numbers_of_the_design(name, numbers):
    config = srgan.Config.preset(name)
    assert config.preset_name == name
    assert {field: getattr(config, field) for field in numbers} == numbers


def test_sharp_is_the_default_and_takes_celeba_as_it_is():
    assert srgan.Config() == srgan.Config.preset("sharp")
    assert [176 // scale for scale in (2, 4, 8)] == [88, 44, 22]
    for scale in (2, 4, 8):
        assert srgan.Config(scale=scale).hr_size == srgan.Config(scale=scale).crop == 176


@pytest.mark.parametrize("name", srgan.PRESETS)
@pytest.mark.parametrize("scale, stages", [(2, 1), (4, 2), (8, 3), (16, 4)])
def test_every_preset_takes_every_scale(name, scale, stages):
    config = srgan.Config.preset(name, scale=scale)
    assert (config.scale, config.stages) == (scale, stages)


@pytest.mark.parametrize("scale", [0, 1, 3, 6, 32, -4, 4.5, "four", "3", None, True])
def test_an_impossible_scale_is_refused_with_a_sentence(scale):
    with pytest.raises(ValueError, match=r"scale=.* 2, 4, 8 or 16") as caught:
        srgan.Config(scale=scale)
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_preset_or_field_is_answered_with_the_nearest_name():
    with pytest.raises(ValueError, match="no preset 'sharpp': did you mean 'sharp'"):
        srgan.Config.preset("sharpp")
    with pytest.raises(ValueError, match="no field 'residual_block': did you mean 'residual_blocks'"):
        srgan.Config.preset("sharp", residual_block=3)
    with pytest.raises(ValueError, match="no field 'learning_rates': did you mean 'learning_rate'"):
        srgan.Config.from_dict({"learning_rates": 1})
    with pytest.raises(ValueError, match="did you mean 'pixel'"):
        srgan.Config(content="pixels")


@pytest.mark.parametrize("field, value", [
    ("crop", 179), ("crop", 15), ("hr_size", 2048), ("hr_size", 0), ("hr_size", -16), ("batch_size", 0), ("residual_blocks", 0),
    ("residual_blocks", 65), ("channels", 2), ("learning_rate", 0.0), ("learning_rate", 2.0), ("pretrain_learning_rate", -1e-4),
    ("steps", -1), ("pretrain_steps", 2 * 10**9), ("adversarial_weight", -0.1), ("beta1", 1.0), ("beta2", 1.0), ("ema", 1.0),
    ("batch_norm", 1.5), ("vgg_layers", 38), ("vgg_layers", 0), ("vgg_rescale", 0.0), ("save_steps", 0), ("save_minutes", 0.0),
    ("kernel_size", 11), ("kernel_size", 4), ("seed", -1), ("seed", 2**32), ("learning_rate", float("inf")), ("epochs", -1.0),
])
def test_the_nearest_valid_number_that_a_refusal_names_is_valid(field, value):
    with pytest.raises(ValueError, match=f"^{field}=") as caught:
        srgan.Config(**{field: value})
    nearest = float(re.search(r"(?:nearest valid:|try) (\S+)$", str(caught.value))[1])
    assert getattr(srgan.Config(**BLANK | {field: nearest}), field) == nearest


@pytest.mark.parametrize("field, value, wanted", [
    ("batch_size", "8", "a whole number"), ("batch_size", 8.5, "a whole number"), ("batch_size", True, "a whole number"),
    ("batch_size", None, "a whole number"), ("learning_rate", "small", "a number"), ("learning_rate", float("nan"), "a number"),
    ("flip", 1, "true or false"), ("flip", "true", "true or false"), ("vgg", 5, "a word"), ("steps", [1], "a whole number"),
])
def test_a_value_of_the_wrong_type_is_refused(field, value, wanted):
    with pytest.raises(ValueError, match=f"^{field}=.*must be {wanted}"):
        srgan.Config(**{field: value})


def test_numbers_are_kept_as_their_fields_are_declared():
    config = srgan.Config(batch_size=8.0, ema=0, patch_size=None)
    assert (type(config.batch_size), type(config.ema), config.patch_size) == (int, float, None)


@pytest.mark.parametrize("discriminator, grid", [("pooled", 1), ("dense", 16)])
@pytest.mark.parametrize("scale", [2, 4, 8, 16])
@pytest.mark.parametrize("hr_size", [17, 22, 25, 100, 136, 1018])
def test_a_bad_hr_size_is_answered_with_the_nearest_good_one(discriminator, grid, scale, hr_size):
    def make(size):
        return srgan.Config(scale=scale, hr_size=size, patch_size=None, discriminator=discriminator)

    needed = max(scale, grid)  # both are powers of two
    if hr_size % needed == 0:
        assert make(hr_size).hr_size == hr_size
        return
    with pytest.raises(ValueError, match=f"hr_size={hr_size} is not a multiple of") as caught:
        make(hr_size)
    nearest = int(re.search(r"nearest that is: (\d+)$", str(caught.value))[1])
    assert make(nearest).hr_size == nearest
    valid = range(16, 1025, needed)
    assert abs(nearest - hr_size) == min(abs(size - hr_size) for size in valid)


def test_a_patch_larger_than_hr_size_means_hr_size():
    assert srgan.Config(hr_size=64, patch_size=96).patch == 64
    assert srgan.Config(hr_size=96, patch_size=48).patch == 48
    assert srgan.Config(hr_size=96, patch_size=None).patch == 96
    with pytest.raises(ValueError, match="patch_size=50 is not a multiple of scale=4; the nearest that is: (48|52)$"):
        srgan.Config(patch_size=50)


def test_epochs_become_updates():
    report = srgan.Config.preset("report").for_faces(20_000)
    assert (report.pretrain_steps, report.steps, report.decay_steps, report.total_steps) == (0, 7_500, 7_500, 7_500)
    assert srgan.Config.preset("report").for_faces(10).steps == 4  # 3 x 10 / 8, rounded up
    paper = srgan.Config.preset("paper", pretrain_epochs=2, epochs=0.5).for_faces(160)
    assert (paper.pretrain_steps, paper.steps) == (20, 5)
    given = srgan.Config.preset("report", steps=11).for_faces(20_000)
    assert (given.steps, srgan.Config(steps=7, decay_steps=3).for_faces(9).decay_steps) == (11, 3)


@pytest.mark.parametrize("field, text, value", [
    ("flip", "true", True), ("flip", "False", False),
    ("patch_size", "none", None), ("patch_size", "None", None), ("patch_size", "64", 64),
    ("learning_rate", "3e-4", 3e-4), ("learning_rate", "1", 1.0), ("ema", "0", 0.0), ("steps", "1e3", 1000), ("steps", "20", 20),
    ("scale", "8", 8), ("content", "pixel", "pixel"), ("vgg", "weights/vgg19.pth", "weights/vgg19.pth"),
])
def test_set_reads_what_the_field_is(field, text, value):
    parsed = getattr(srgan.Config.from_dict({field: srgan._parsed(text)}), field)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize("field, text, message", [
    ("flip", "yes", "flip='yes' must be true or false"), ("flip", "1", "true or false"),
    ("batch_size", "many", "whole number"), ("batch_size", "none", "whole number"), ("batch_size", "8.5", "whole number"),
    ("batch_size", "", "whole number"), ("learning_rate", "nan", "a number"), ("scale", "four", "2, 4, 8 or 16"),
    ("scale", "32", "2, 4, 8 or 16"), ("content", "pixels", "did you mean 'pixel'"),
    ("batchsize", "8", "did you mean 'batch_size'"), ("batch_size", "0", "nearest valid: 1$"),
    ("crop", "500", "nearest valid: 178$"), ("learning_rate", "-1", "nearest valid: 1e-08$"),
])
def test_set_refuses_in_the_same_words(field, text, message):
    with pytest.raises(ValueError, match=message):
        srgan.Config.from_dict({field: srgan._parsed(text)})


@pytest.mark.parametrize("name", srgan.PRESETS)
def test_a_config_survives_json(name):
    config = srgan.Config.preset(name, scale=8, seed=2**32 - 1).for_faces(1234)
    assert srgan.Config.from_dict(json.loads(json.dumps(asdict(config)))) == config


def test_the_fields_that_others_rely_on_are_there():
    wanted = ("scale hr_size crop residual_blocks batch_size learning_rate pretrain_steps steps seed content vgg "
              "adversarial_weight precision save_steps save_minutes")
    assert set(wanted.split()) <= {item.name for item in fields(srgan.Config)}
