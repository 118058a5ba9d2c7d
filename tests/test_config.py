"""Config: the presets' numbers, and what is refused with which advice."""

import json
import re
from dataclasses import asdict

import pytest
from conftest import refused

import srgan_utils as srgan


@pytest.mark.parametrize("name, numbers", [
    ("report", {"crop": 144, "hr_size": 256, "patch": 256, "flip": False, "channels": 64, "residual_blocks": 5, "kernel_size": 9,
                "batch_norm": 0.8, "shared_upsampling": True, "upsampling": "shuffle", "icnr": False, "skip": False,
                "output": "report", "discriminator": "dense", "distance": "l1", "content": "vgg", "content_weight": 1,
                "pixel_weight": 0, "vgg": "imagenet", "vgg_layers": "pool3", "vgg_rescale": 1, "adversarial": "least_squares",
                "adversarial_weight": 1e-3, "ramp_steps": 0, "warmup_steps": 0, "decay": "none", "ema": 0, "learning_rate": 1e-5,
                "beta1": 0.5, "beta2": 0.999, "batch_size": 8, "pretrain_steps": 0, "epochs": 3}),
    ("paper", {"crop": 178, "hr_size": 128, "flip": True, "residual_blocks": 16, "kernel_size": 9, "batch_norm": 0.1,
               "shared_upsampling": False, "skip": False, "output": "tanh", "discriminator": "dense", "distance": "mse",
               "content": "vgg", "pixel_weight": 0, "vgg_layers": "relu5", "vgg_rescale": 12.75, "adversarial": "bce",
               "adversarial_weight": 1e-3, "learning_rate": 1e-4, "decay": "step", "beta1": 0.9, "beta2": 0.999,
               "batch_size": 16}),
    ("sharp", {"crop": 176, "hr_size": 176, "flip": True, "batch_norm": 0, "shared_upsampling": False, "icnr": True, "skip": True,
               "discriminator": "places", "distance": "l1", "content": "vgg", "pixel_weight": 1}),
    ("demo", {"scale": 4, "content": "pixel"}),  # needs no download
])
def test_preset_has_the_numbers_of_the_design_and_takes_every_scale(name, numbers):
    config = srgan.Config.preset(name)
    assert config.preset_name == name and {field: getattr(config, field) for field in numbers} == numbers
    assert srgan.Config() == srgan.Config.preset("sharp")  # the default
    for stages, scale in enumerate([2, 4, 8, 16], start=1):
        other = srgan.Config.preset(name, scale=scale).for_faces(1234)
        assert other.stages == stages and srgan.Config.from_dict(json.loads(json.dumps(asdict(other)))) == other


@pytest.mark.parametrize("values, message", [
    ({"preset_name": "sharpp"}, "preset_name=sharpp: did you mean 'sharp'"), ({"content": "pixels"}, "did you mean 'pixel'"),
    ({"residual_block": 3}, "no field 'residual_block': did you mean 'residual_blocks'"), ({"vgg_layer": 19}, "'vgg_layers'"),
    ({"kernel_size": 4}, "3, 5, 7, 9"), ({"precision": "half"}, "auto, fp32, bf16, fp16"),
    *(({"vgg_layers": layers}, "vgg_layers.*as in conv2,conv3") for layers in ("pool6", "conv2, conv3", "", "fc1"))])
def test_an_unknown_name_is_answered_with_the_nearest_or_with_all(values, message):
    with refused(ValueError, message):
        srgan.Config.from_dict(values)
    with pytest.raises(ValueError, match=message):
        srgan.Config.preset(values.pop("preset_name", "sharp"), **values)


@pytest.mark.parametrize("field, value", [
    ("crop", 179), ("crop", "15"), ("hr_size", 2048), ("hr_size", 0), ("hr_size", -16), ("batch_size", "0"), ("steps", -1),
    ("residual_blocks", 0), ("residual_blocks", 65), ("channels", 2), ("learning_rate", 0.0), ("pretrain_learning_rate", "-1e-4"),
    ("learning_rate", 2.0), ("pretrain_steps", 2 * 10**9), ("adversarial_weight", -0.1), ("beta1", 1.0), ("beta2", 1.0),
    ("ema", 1.0), ("batch_norm", 1.5), ("vgg_rescale", -1.0), ("save_steps", 0), ("save_minutes", 0.0), ("seed", -1),
    ("seed", 2**32), ("learning_rate", float("inf")), ("epochs", -1.0), ("patch_size", 8)])
def test_the_ends_of_the_range_that_a_refusal_names_are_valid(field, value):
    with pytest.raises(ValueError, match=f"^{field}=") as caught:
        srgan.Config(**{field: value})
    low, high = map(float, re.search(r"number from (\S+) to (\S+)$", str(caught.value)).groups())
    for end in (low, high):
        assert getattr(srgan.Config(**{"hr_size": 64, "patch_size": None} | {field: end}), field) == end
    assert not low <= float(value) <= high


@pytest.mark.parametrize("field, value, message", [
    *(("scale", value, ": .*2, 4, 8,? (or )?16") for value in (0, 1, 3, 6, 32, -4, 4.5, "four", "3", "", None, True)),
    *(("batch_size", value, " must be a whole number from .*") for value in (8.5, True, None, "many", "8.5", "inf")),
    *(("learning_rate", value, " must be a number from .*") for value in ("small", "nan", None)),
    *(("flip", value, ": choose from true, false") for value in (1, "yes")), ("steps", [1], " must be a whole number from .*")])
def test_a_value_of_the_wrong_kind_is_refused_and_an_impossible_scale_with_the_possible_ones(field, value, message):
    with pytest.raises(ValueError, match=rf"^{field}={re.escape(str(value))}{message}$"):
        srgan.Config(**{field: value})


@pytest.mark.parametrize("field, given, value", [
    ("flip", "true", True), ("flip", "False", False), ("patch_size", "none", None), ("patch_size", "None", None),
    ("patch_size", "64", 64), ("learning_rate", "3e-4", 3e-4), ("learning_rate", "1", 1.0), ("ema", "0", 0.0), ("ema", 0, 0.0),
    ("steps", "1e3", 1000), ("steps", "20", 20), ("batch_size", 8.0, 8), ("scale", "8", 8), ("content", "pixel", "pixel"),
    ("vgg", "weights/vgg19.pth", "weights/vgg19.pth")])
def test_numbers_and_their_texts_are_kept_as_the_field_is_declared(field, given, value):
    kept = getattr(srgan.Config.from_dict({field: given}), field)
    assert kept == value and type(kept) is type(value)


@pytest.mark.parametrize("discriminator, needed", [("places", 8), ("dense", 16)])
@pytest.mark.parametrize("hr_size", [17, 22, 25, 100, 1018])
def test_a_bad_hr_size_or_patch_size_is_answered_with_the_nearest_good_one(discriminator, needed, hr_size):
    given = {"scale": 8, "patch_size": None, "discriminator": discriminator}
    with pytest.raises(ValueError, match=f"hr_size={hr_size} is not a multiple of {needed} ") as caught:
        srgan.Config(hr_size=hr_size, **given)
    nearest = int(re.search(r"nearest that is: (\d+)$", str(caught.value))[1])
    assert srgan.Config(hr_size=nearest, **given).hr_size == nearest
    assert abs(nearest - hr_size) == min(abs(size - hr_size) for size in range(16, 1025, needed))
    with pytest.raises(ValueError, match="patch_size=50 is not a multiple of 4 .*; the nearest that is: (48|52)$"):
        srgan.Config(patch_size=50)
    for hr_size, patch_size, patch in ((64, 96, 64), (96, 48, 48), (96, None, 96)):  # a larger patch means hr_size
        assert srgan.Config(hr_size=hr_size, patch_size=patch_size).patch == patch


def test_epochs_become_updates_and_take_the_place_of_steps():
    report = srgan.Config.preset("report").for_faces(20_000)
    assert (report.pretrain_steps, report.steps, report.decay_steps, report.total_steps) == (0, 7_500, 7_500, 7_500)
    assert srgan.Config.preset("report").for_faces(10).steps == 4  # 3 x 10 / 8, rounded up
    for preset, steps in (("paper", (20, 5)), ("sharp", (40, 10))):  # `sharp` counts its updates otherwise
        given = srgan.Config.preset(preset, pretrain_epochs="2", epochs=0.5).for_faces(160)
        assert (given.pretrain_steps, given.steps, given.decay_steps) == steps + steps[1:]
    assert srgan.Config.preset("report", steps=11).for_faces(20_000).steps == 11
    assert srgan.Config(steps=7, decay_steps=3).for_faces(9).decay_steps == 3
    for name in ("epochs", "pretrain_epochs"):
        with pytest.raises(ValueError, match=f"{name}=2 and {name.replace('epochs', 'steps')}=5 both set one length"):
            srgan.Config.preset("report", **{name: 2, name.replace("epochs", "steps"): 5})
