"""The losses, one update and the schedules against values worked out by hand."""

import math
from copy import deepcopy

import pytest
import torch
from conftest import TINY

import srgan_utils as srgan

CPU = torch.device("cpu")


def softplus(x):
    return math.log1p(math.exp(x))  # -log(sigmoid(-x))


@pytest.mark.parametrize("distance, expected", [("l1", (0.1 + 0.2 + 0.3 + 0.0) / 4), ("mse", (0.01 + 0.04 + 0.09) / 4)])
def test_pixel_loss(distance, expected):
    sr, hr = torch.tensor([[0.1, 0.7, 0.2, 1.0], [0.2, 0.5, 0.5, 1.0]]).view(2, 1, 1, 2, 2)
    assert srgan.pixel_loss(sr, hr, distance).item() == pytest.approx(expected, rel=1e-5)
    assert srgan.pixel_loss(hr, hr, distance).item() == 0
    half = srgan.pixel_loss(*(torch.full((1, 1, 64, 64), value, dtype=torch.bfloat16) for value in (0, 0.125)))
    assert half.dtype == torch.float32 and half.item() == 0.125  # in bf16 a mean of many would stall


@pytest.mark.parametrize("kind, d_expected, g_expected", [
    # D 1/2 mean((real - 1)^2) + 1/2 mean(fake^2), G 1/2 mean((fake - 1)^2)
    ("least_squares", 0.5 * (1 + 1) / 2 + 0.5 * (1 + 1) / 2, 0.5 * (0 + 4) / 2),
    ("bce", (softplus(-2) + softplus(0)) / 2 + (softplus(1) + softplus(-1)) / 2, (softplus(-1) + softplus(1)) / 2)])
def test_adversarial_losses(kind, d_expected, g_expected):
    """The discriminator wants real scores up and generated ones down; the generator wants the latter up."""
    real, fake = (torch.tensor(scores, requires_grad=True) for scores in ([[2.0], [0.0]], [[1.0], [-1.0]]))
    d_loss, g_loss = srgan.discriminator_loss([real], [fake], kind), srgan.adversarial_loss([fake], kind)
    assert (d_loss.item(), g_loss.item()) == pytest.approx((d_expected, g_expected), rel=1e-6)
    (d_real, d_fake), (g_fake,) = torch.autograd.grad(d_loss, [real, fake]), torch.autograd.grad(g_loss, [fake])
    assert d_real[1] < 0 and d_fake[0] > 0 and g_fake[1] < 0 and (g_fake <= 0).all()
    large = torch.tensor([[500.0], [-500.0]])
    assert srgan.adversarial_loss([large], "bce").item() == pytest.approx(250)  # finite
    assert srgan.discriminator_loss([large], [large], "bce").item() == pytest.approx(500)


def tiny_state(preset="sharp", **changes):
    config = srgan.Config.preset(preset, **(TINY | changes)).for_faces(8)
    return srgan.TrainState(config, CPU)


def images():
    hr = srgan.quantise(srgan.bicubic(torch.cat([srgan.synthetic_face(index) for index in (0, 1)]), 32))
    return srgan.quantise(srgan.bicubic(hr, 8)), hr


def changed(a, b):
    """The names of the tensors that differ."""
    return {name for name in a.keys() | b.keys() if not torch.equal(a[name], b[name])}


def test_pretraining_lowers_the_loss():
    """Repeated on one batch; the loss is the pixel loss of the network that was."""
    state = tiny_state(pretrain_learning_rate=2e-3, pretrain_steps=100, warmup_steps=0, decay="none")
    lr, hr = images()
    first = srgan.pixel_loss(deepcopy(state.generator)(lr), hr).item()
    losses = [srgan.pretrain_step(state, lr, hr)["pixel"].item() for _ in range(15)]
    assert losses[0] == pytest.approx(first) and losses[-1] < 0.8 * first


@pytest.mark.parametrize("preset, changes", [
    ("sharp", {}), ("sharp", {"adversarial": "bce"}), ("sharp", {"content": "vgg", "vgg": "random"}), ("report", {})])
def test_every_generator_weight_gets_a_gradient(preset, changes):
    """From content and adversarial loss together, and from the adversarial alone."""
    for only in ({}, {"content_weight": 0.0, "pixel_weight": 0.0}):
        state, (lr, hr) = tiny_state(preset, pretrain_steps=0, **changes, **only), images()
        assert srgan.generator_step(state, lr, state.generator(lr), hr)["content"] > 0
        for name, p in state.generator.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, name


def test_generator_loss_by_hand():
    """content_weight content + pixel_weight pixel + the ramp's share of adversarial_weight adversarial."""
    state, (lr, hr) = tiny_state(content="vgg", vgg="random", ramp_steps=4, adversarial_weight=0.5, content_weight=2.0,
                                 pixel_weight=3.0), images()
    for state.update, share in ((3, 1 / 4), (4, 2 / 4), (6, 1.0), (9, 1.0)):
        losses = srgan.generator_step(state, lr, state.generator(lr), hr)
        expected = 2 * losses["content"] + 3 * losses["pixel"] + share * 0.5 * losses["adversarial"]
        torch.testing.assert_close(losses["g_loss"], expected)
        assert min(losses[name].item() for name in ("content", "pixel", "adversarial")) > 1e-3


def test_moving_average_by_hand():
    """Update k (from 0) keeps min(ema, (1 + k) / (10 + k)) of the old, of BatchNorm's statistics too; its counter is copied."""
    state, (lr, hr) = tiny_state("report", ema=0.15, pretrain_steps=0), images()
    expected = deepcopy(dict(state.generator.state_dict()))
    for keep in (0.1, 0.15, 0.15):
        srgan._one_update(state, lr, hr)
        for name, value in state.generator.state_dict().items():
            expected[name] = keep * expected[name] + (1 - keep) * value if value.is_floating_point() else value
        torch.testing.assert_close(dict(state.ema.state_dict()), expected)
    assert not torch.allclose(expected["merge.1.running_mean"], state.generator.state_dict()["merge.1.running_mean"])
    assert state.best is state.ema and not any(p.requires_grad for p in state.ema.parameters())


def test_learning_rate_by_hand():
    """Each stage warms up, then falls to a hundredth along a cosine; past its planned end it stays there."""
    lengths = {"learning_rate": 1e-3, "pretrain_learning_rate": 1e-2, "pretrain_steps": 100, "steps": 50, "decay_steps": 50}

    def rates(updates, **changes):
        """Those of the generator's optimiser in these updates."""
        state, pair, found = tiny_state(**lengths, **changes), images(), {}
        for state.update in updates:
            srgan.pretrain_step(state, *pair)
            found[state.update] = state.g_optimizer.param_groups[0]["lr"]
        assert state.g_optimizer.param_groups[0]["betas"] == (state.config.beta1, state.config.beta2)
        return found

    def cosine(base, done):
        return base * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)

    expected = {0: 1e-2 / 4, 1: cosine(1e-2, 0.01) / 2, 3: cosine(1e-2, 0.03), 50: 1e-2 * 0.505, 99: cosine(1e-2, 0.99),
                100: 1e-3 / 4, 103: cosine(1e-3, 0.06), 125: 1e-3 * 0.505, 149: cosine(1e-3, 0.98), 150: 1e-5, 1000: 1e-5}
    assert rates(expected, warmup_steps=4) == pytest.approx(expected)
    constant = {0: 1e-2, 50: 1e-2, 99: 1e-2, 100: 1e-3, 500: 1e-3}
    assert rates(constant, warmup_steps=0, decay="none") == pytest.approx(constant)
    state = tiny_state(discriminator_rate=3.0, pretrain_steps=0, warmup_steps=0)
    srgan._one_update(state, *images())
    assert [adam.param_groups[0]["lr"] for adam in (state.g_optimizer, state.d_optimizer)] == pytest.approx([2e-4, 6e-4])
