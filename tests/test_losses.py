"""The losses, one update and the schedules against values worked out by hand."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import TINY

import srgan_utils as srgan

CPU = torch.device("cpu")
REAL, FAKE = torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0], [-1.0]])
REPORT = {"hr_size": 32, "channels": 8, "residual_blocks": 1, "batch_size": 2, "precision": "fp32", "content": "pixel"}


def softplus(x):
    return math.log1p(math.exp(x))  # -log(sigmoid(-x))


@pytest.mark.parametrize("distance, expected", [("l1", (0.1 + 0.2 + 0.3 + 0.0) / 4), ("mse", (0.01 + 0.04 + 0.09) / 4)])
def test_pixel_loss(distance, expected):
    sr, hr = torch.tensor([[0.1, 0.7, 0.2, 1.0], [0.2, 0.5, 0.5, 1.0]]).view(2, 1, 1, 2, 2)
    assert srgan.pixel_loss(sr, hr, distance).item() == pytest.approx(expected, rel=1e-5)
    assert srgan.pixel_loss(hr, hr, distance).item() == 0
    half = srgan.pixel_loss(*(torch.full((1, 1, 64, 64), value, dtype=torch.bfloat16) for value in (0, 0.125)))
    assert half.dtype == torch.float32 and half.item() == 0.125  # in bf16 a mean of many would stall


def test_feature_loss():
    """The mean over maps, whatever their sizes; 0 for equal ones."""
    a, b = [torch.zeros(2, 3, 8, 8), torch.zeros(2, 6, 4, 4)], [torch.full((2, 3, 8, 8), 0.5), torch.full((2, 6, 4, 4), -2.0)]
    assert srgan.feature_loss(a, b, rescale=1).item() == pytest.approx((0.5 + 2) / 2)
    assert srgan.feature_loss(a, b, "mse", rescale=1).item() == pytest.approx((0.25 + 4) / 2)
    assert srgan.feature_loss(b, b).item() == 0


@pytest.mark.parametrize("kind, d_expected, g_expected", [
    # D 1/2 mean((real - 1)^2) + 1/2 mean(fake^2), G 1/2 mean((fake - 1)^2)
    ("least_squares", 0.5 * (1 + 1) / 2 + 0.5 * (1 + 1) / 2, 0.5 * (0 + 4) / 2),
    ("bce", (softplus(-2) + softplus(0)) / 2 + (softplus(1) + softplus(-1)) / 2, (softplus(-1) + softplus(1)) / 2)])
def test_adversarial_losses(kind, d_expected, g_expected):
    """The discriminator wants real scores up and generated ones down; the generator wants the latter up."""
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    d_loss, g_loss = srgan.discriminator_loss([real], [fake], kind), srgan.adversarial_loss([fake], kind)
    assert (d_loss.item(), g_loss.item()) == pytest.approx((d_expected, g_expected), rel=1e-6)
    (d_real, d_fake), (g_fake,) = torch.autograd.grad(d_loss, [real, fake]), torch.autograd.grad(g_loss, [fake])
    assert d_real[1] < 0 and d_fake[0] > 0 and g_fake[1] < 0 and (g_fake <= 0).all()
    large = torch.tensor([[500.0], [-500.0]])
    assert srgan.adversarial_loss([large], "bce").item() == pytest.approx(250)  # finite
    assert srgan.discriminator_loss([large], [large], "bce").item() == pytest.approx(500)


# --- One update


def tiny_state(preset="sharp", **changes):
    config = srgan.Config.preset(preset, **((TINY if preset == "sharp" else REPORT) | changes)).for_faces(8)
    return srgan.TrainState(config, CPU)


def images():
    hr = srgan.quantise(srgan.bicubic(torch.cat([srgan.synthetic_face(index) for index in (0, 1)]), 32))
    return srgan.quantise(srgan.bicubic(hr, 8)), hr


def update(state, store):
    return srgan._one_update(state, *srgan.batch(store, state.config, state.update, CPU))


def weights(network):
    return {name: value.clone() for name, value in network.named_parameters()}


def changed(a, b):
    """The names of the tensors that differ."""
    return {name for name in a.keys() | b.keys() if not torch.equal(a[name], b[name])}


@pytest.mark.parametrize("preset", ["sharp", "report"])
def test_pretraining_lowers_the_loss(preset):
    """Repeated on one batch; the loss is the pixel loss of the network that was."""
    state = tiny_state(preset, pretrain_learning_rate=2e-3, pretrain_steps=100, warmup_steps=0, decay="none")
    lr, hr = images()
    first = srgan.pixel_loss(deepcopy(state.generator)(lr), hr).item()
    losses = [srgan.pretrain_step(state, lr, hr)["pixel"].item() for _ in range(15)]
    assert losses[0] == pytest.approx(first) and losses[-1] < 0.8 * first


def test_each_step_moves_its_own_network():
    """Neither weights nor gradients of the other, while D's step sees sr of a graph that reaches into G."""
    state, (lr, hr) = tiny_state(pretrain_steps=0), images()
    generator, discriminator, sr = state.generator, state.discriminator, state.generator(lr)
    before = weights(generator), weights(discriminator)
    srgan.discriminator_step(state, lr, sr, hr)
    assert not changed(weights(generator), before[0]) and all(p.grad is None for p in generator.parameters())
    assert changed(weights(discriminator), before[1]) == before[1].keys()
    middle, gradients = weights(discriminator), {name: p.grad.clone() for name, p in discriminator.named_parameters()}
    srgan.generator_step(state, lr, sr, hr)
    assert not changed(weights(discriminator), middle) and changed(weights(generator), before[0]) == before[0].keys()
    assert not changed({name: p.grad for name, p in discriminator.named_parameters()}, gradients)
    assert all(p.requires_grad for p in discriminator.parameters())


@pytest.mark.parametrize("preset, changes", [
    ("sharp", {}), ("sharp", {"adversarial": "bce"}), ("sharp", {"content": "vgg", "vgg": "random"}), ("report", {})])
def test_every_generator_weight_gets_a_gradient(preset, changes):
    """From content and adversarial loss together, and from the adversarial alone."""
    for only in ({}, {"content_weight": 0.0, "pixel_weight": 0.0}):
        state, (lr, hr) = tiny_state(preset, pretrain_steps=0, **changes, **only), images()
        assert srgan.generator_step(state, lr, state.generator(lr), hr)["content"] > 0
        for name, p in state.generator.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, name


@pytest.mark.parametrize("done, share", [(3, 1 / 4), (4, 2 / 4), (6, 1.0), (9, 1.0)])
def test_generator_loss_by_hand(done, share):
    """content_weight content + pixel_weight pixel + the ramp's share of adversarial_weight adversarial."""
    state, (lr, hr) = tiny_state(content="vgg", vgg="random", ramp_steps=4, adversarial_weight=0.5, content_weight=2.0,
                                   pixel_weight=3.0), images()
    state.update = done
    losses = srgan.generator_step(state, lr, state.generator(lr), hr)
    expected = 2 * losses["content"] + 3 * losses["pixel"] + share * 0.5 * losses["adversarial"]
    torch.testing.assert_close(losses["g_loss"], expected)
    assert min(losses[name].item() for name in ("content", "pixel", "adversarial")) > 1e-3


# --- Moving average and schedule


def test_moving_average_by_hand(store):
    """Update k (from 0) keeps min(ema, (1 + k) / (10 + k)) of the old, of BatchNorm's statistics too; its counter is copied."""
    state = tiny_state("report", ema=0.15)
    expected = deepcopy(dict(state.generator.state_dict()))
    for keep in (0.1, 0.15, 0.15):
        update(state, store)
        for name, value in state.generator.state_dict().items():
            expected[name] = keep * expected[name] + (1 - keep) * value if value.is_floating_point() else value
        torch.testing.assert_close(dict(state.ema.state_dict()), expected)
    assert not torch.allclose(expected["merge.1.running_mean"], state.generator.state_dict()["merge.1.running_mean"])
    assert state.best is state.ema and not any(p.requires_grad for p in state.ema.parameters())


def test_learning_rate_by_hand(store):
    """Each stage warms up, then falls to a hundredth along a cosine; past its planned end it stays there."""
    config = srgan.Config(learning_rate=1e-3, pretrain_learning_rate=1e-2, warmup_steps=4, pretrain_steps=100, steps=50,
                          decay_steps=50)

    def cosine(base, done):
        return base * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)

    expected = {0: 1e-2 / 4, 1: cosine(1e-2, 0.01) / 2, 3: cosine(1e-2, 0.03), 50: 1e-2 * 0.505, 99: cosine(1e-2, 0.99),
                100: 1e-3 / 4, 103: cosine(1e-3, 0.06), 125: 1e-3 * 0.505, 149: cosine(1e-3, 0.98), 150: 1e-5, 1000: 1e-5}
    assert {done: srgan._learning_rate(config, done) for done in expected} == pytest.approx(expected)
    constant = replace(config, decay="none", warmup_steps=0)
    assert [srgan._learning_rate(constant, done) for done in (0, 50, 99, 100, 500)] == [1e-2] * 3 + [1e-3] * 2
    state = tiny_state()  # and it reaches the optimisers
    for done in range(5):
        update(state, store)
        assert state.g_optimizer.param_groups[0]["lr"] == pytest.approx(srgan._learning_rate(state.config, done))
    assert state.d_optimizer.param_groups[0]["lr"] == pytest.approx(2 * srgan._learning_rate(state.config, 4))
    assert state.g_optimizer.param_groups[0]["betas"] == (state.config.beta1, state.config.beta2)
