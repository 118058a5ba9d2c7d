"""What `sharp` is made of: verdicts by place, a loss that looks, LR as the web makes it."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import srgan_utils as srgan

CPU = torch.device("cpu")
SMALL = {"hr_size": 64, "scale": 4, "channels": 8, "residual_blocks": 3, "batch_size": 2, "precision": "fp32", "content": "pixel",
         "pretrain_steps": 2, "steps": 10, "warmup_steps": 0}


def small_state(**changes):
    return srgan.TrainState(srgan.Config(**(SMALL | changes)).for_faces(8), CPU)


def images():
    hr = srgan.quantise(srgan.bicubic(torch.cat([srgan.synthetic_face(index) for index in (0, 1)]), 64))
    return srgan.quantise(srgan.bicubic(hr, 16)), hr


def test_a_verdict_for_each_place_and_one_for_the_whole_which_depend_on_lr():
    config = srgan.Config(**SMALL)
    discriminator, (lr, hr) = srgan.Discriminator(config).eval(), images()
    place, whole = discriminator(hr, lr)
    assert place.shape == (2, 1, 8, 8) and whole.shape == (2, 1)
    for mine, others in zip(discriminator(hr, lr), discriminator(hr, lr.flip(0))):
        assert (mine - others).abs().min() > 0  # the detail of *this* face
    changed = hr.clone()
    changed[..., :8, :8] = 0
    apart = (discriminator(changed, lr)[0] - place).abs()[0, 0]
    assert apart[0, 0] > 0 and apart[-1, -1] == 0  # a place is judged by what is near it


def test_each_kind_of_verdict_counts_the_same_and_so_does_each_depth_over_hrs_own_magnitude():
    place, whole = torch.full((2, 1, 9, 9), 0.5), torch.full((2, 1), -1.0)
    assert srgan.adversarial_loss([place, whole], "least_squares").item() == pytest.approx((0.5 * 0.25 + 0.5 * 4) / 2)
    assert srgan.discriminator_loss([place, whole], [whole, place], "least_squares").item() == pytest.approx(
        (0.5 * 0.25 + 0.5 * 4) / 2 + (0.5 * 1 + 0.5 * 0.25) / 2)
    a, b = ([torch.full((2, 3, 8, 8), value), torch.full((2, 6, 4, 4), large)] for value, large in ((3.0, 80.0), (-2.0, 100.0)))
    assert srgan.feature_loss(a, b).item() == pytest.approx((5 / 2 + 20 / 100) / 2)
    assert srgan.feature_loss(a, b, "mse", rescale=2.0).item() == pytest.approx((25 / 4 + 400 / 4) / 2)
    a, b = torch.rand(2, 4, 3, 8, 8)  # of a batch it is the mean over the images, so that processes may share them
    parts = [srgan.feature_loss([one], [other]) for one, other in zip(a.split(2), b.split(2))]
    torch.testing.assert_close(srgan.feature_loss([a], [b]), torch.stack(parts).mean())


def test_vgg_gives_the_layers_that_are_named_before_their_activation():
    """Maps of convolutions have negative values: the ReLU behind them must not work in place."""
    maps = srgan.VGGFeatures(srgan.Config(vgg="random", vgg_layers="conv3,relu1,conv2"))(images()[1])
    assert [tuple(each.shape) for each in maps] == [(2, 256, 16, 16), (2, 64, 64, 64), (2, 128, 32, 32)]
    assert [bool((each < 0).any()) for each in maps] == [True, False, True]


def test_vgg_sees_a_window_that_is_a_function_of_seed_and_update():
    """The same in a resumed run; elsewhere the content loss asks for nothing. Over the updates all places come."""
    windows = []
    for update in (3, 3, 4):
        state, (lr, hr) = small_state(content="vgg", vgg="random", vgg_window=24, vgg_layers="conv1", pixel_weight=0.0,
                                      adversarial_weight=0.0), images()
        state.update, sr = update, (0.9 * hr).requires_grad_()
        srgan.generator_step(state, lr, sr, hr)
        rows, columns = (sr.grad.abs().sum((0, 1)).amax(axis).nonzero().flatten() for axis in (1, 0))
        windows.append((rows[0].item(), columns[0].item()))
        assert rows[-1] - rows[0] < 24 and columns[-1] - columns[0] < 24
    assert windows[0] == windows[1] != windows[2]


def test_weighted_terms_add_up_to_the_loss():
    state, (lr, hr) = small_state(content="vgg", vgg="random", vgg_layers="conv1", content_weight=0.7, adversarial_weight=0.2,
                                  ramp_steps=4, pixel_weight=2.0), images()
    state.update = state.config.pretrain_steps + 1  # half of the ramp
    losses = srgan.generator_step(state, lr, state.generator(lr), hr)
    assert losses["weighted_content"].item() == pytest.approx(0.7 * losses["content"].item())
    assert losses["weighted_adversarial"].item() == pytest.approx(0.5 * 0.2 * losses["adversarial"].item())
    torch.testing.assert_close(losses["g_loss"], losses["weighted_content"] + losses["weighted_adversarial"] + 2 * losses["pixel"])


def test_the_adversarial_stage_starts_from_the_average_and_averages_anew():
    state, (lr, hr) = small_state(ema=0.9), images()
    for _ in range(2):
        srgan._one_update(state, lr, hr)
    parent = {name: value.clone() for name, value in state.ema.state_dict().items()}
    assert any(not torch.equal(value, parent[name]) for name, value in state.generator.state_dict().items())
    srgan._one_update(state, lr, hr)
    for name, value in state.generator.state_dict().items():
        assert (value - parent[name]).abs().max() <= 1.01 * 2e-4  # Adam's first step from there: the rate at most
        torch.testing.assert_close(state.ema.state_dict()[name], 0.1 * parent[name] + 0.9 * value)  # update 0 of the stage


def test_the_papers_rate_falls_half_way():
    changes = SMALL | {"pretrain_steps": 10, "steps": 20}
    state, (lr, hr) = srgan.TrainState(srgan.Config.preset("paper", **changes).for_faces(100), CPU), images()
    for state.update, rate in ((0, 1e-4), (9, 1e-4), (10, 1e-4), (19, 1e-4), (20, 1e-5), (29, 1e-5)):
        srgan.pretrain_step(state, lr, hr)
        assert state.g_optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_lpips_is_asked_of_the_network_that_is_named(store, tiny_run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(srgan, "lpips", lambda sr, hr, net: asked.append(net) or torch.zeros(len(sr)))
    generator, config, _ = srgan.load_generator(tiny_run / "generator.safetensors")
    row, = srgan.evaluate(generator, config, store, [0], "squeeze")
    assert asked == ["squeeze"] * 2 and row["srgan_lpips"] == row["bicubic_lpips"] == 0
    compare = ["compare", "--store", store.folder, "--out", tmp_path, "--run", tiny_run, "--count", 1, "--lpips"]
    assert srgan.main(list(map(str, compare))) == 0 and asked[2:] == ["alex"] * 2


def test_a_web_copy_is_blurred_reduced_noisy_and_a_jpeg():
    hr = images()[1][:1]
    plain = srgan.quantise(srgan.bicubic(hr, 16))
    assert torch.equal(srgan.web_copy(hr, 4, 0, 0, 99, srgan.seeded(1)), plain)
    noisy = srgan.web_copy(torch.full((1, 3, 256, 256), 0.5), 4, 0, 8, 99, srgan.seeded(1))
    assert noisy.std().item() * 255 == pytest.approx(8, rel=0.05)
    blurred = srgan.web_copy(hr, 4, 0.8, 0, 99, srgan.seeded(1))
    assert srgan.sharpness(blurred, plain).item() < 0.8
    file = io.BytesIO()
    Image.fromarray((plain[0].permute(1, 2, 0) * 255).byte().numpy()).save(file, format="jpeg", quality=40)
    expected = torch.tensor(np.array(Image.open(file))).permute(2, 0, 1) / 255
    assert (srgan.web_copy(hr, 4, 0, 0, 40, srgan.seeded(1))[0] - expected).abs().max() < 2 / 255  # rounded a moment later


def test_degraded_batches_are_a_function_of_seed_and_update_and_hr_stays_clean(store):
    config = srgan.Config(**(TINY | {"degrade": True, "batch_size": 4}))
    clean = replace(config, degrade=False)
    (lr, hr), again = (srgan.batch(store, config, 5, CPU) for _ in range(2))
    assert torch.equal(lr, again[0]) and torch.equal(hr, again[1]) and torch.equal(hr, srgan.batch(store, clean, 5, CPU)[1])
    damaged = [not torch.equal(a, b) for update in range(8)  # each damage in half of the faces: an eighth has none
               for a, b in zip(*(srgan.batch(store, each, update, CPU)[0] for each in (config, clean)))]
    assert 20 <= sum(damaged) < 32
    halves = [srgan.batch(store, config, 5, CPU, (number, 2))[0] for number in (0, 1)]  # each process makes its own
    assert torch.equal(torch.cat(halves), lr)


def test_evaluation_under_a_degradation_can_be_made_again(store, tiny_run):
    generator, config, _ = srgan.load_generator(tiny_run / "generator.safetensors")

    def measured(faces, numbers):
        return [row["srgan_psnr_rgb"] for row in srgan.evaluate(generator, config, store, faces, degradation=numbers)]

    degraded = measured([1, 2, 3], (0, 8, 50))
    assert degraded == measured([1, 2, 3], (0, 8, 50)) and degraded != measured([1, 2, 3], (0, 8, 60))
    assert degraded[1:] == pytest.approx(measured([2, 3], (0, 8, 50)))  # whoever is measured beside it
    assert all(a < b for a, b in zip(degraded, measured([1, 2, 3], None)))
