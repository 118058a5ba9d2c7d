"""The losses against values worked out by hand."""

import math

import pytest
import torch

import srgan_utils as srgan

REAL, FAKE = torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0], [-1.0]])


def softplus(x):
    return math.log1p(math.exp(x))  # -log(sigmoid(-x))


@pytest.mark.parametrize("distance, expected", [("l1", (0.1 + 0.2 + 0.3 + 0.0) / 4), ("mse", (0.01 + 0.04 + 0.09) / 4)])
def test_pixel_loss(distance, expected):
    sr, hr = torch.tensor([[0.1, 0.7, 0.2, 1.0], [0.2, 0.5, 0.5, 1.0]]).view(2, 1, 1, 2, 2)
    assert srgan.pixel_loss(sr, hr, distance).item() == pytest.approx(expected, rel=1e-5)
    assert srgan.pixel_loss(hr, hr, distance).item() == 0


def test_pixel_loss_is_fp32():
    """In bf16 a mean of many small differences would stall."""
    loss = srgan.pixel_loss(*(torch.full((1, 1, 64, 64), value, dtype=torch.bfloat16) for value in (0, 0.125)))
    assert loss.dtype == torch.float32 and loss.item() == 0.125


def test_feature_loss():
    """The mean over maps, whatever their sizes; 0 for equal ones."""
    a, b = [torch.zeros(2, 3, 8, 8), torch.zeros(2, 6, 4, 4)], [torch.full((2, 3, 8, 8), 0.5), torch.full((2, 6, 4, 4), -2.0)]
    assert srgan.feature_loss(a, b).item() == pytest.approx((0.5 + 2) / 2)
    assert srgan.feature_loss(a, b, "mse").item() == pytest.approx((0.25 + 4) / 2)
    assert srgan.feature_loss(b, b).item() == 0


@pytest.mark.parametrize("kind, d_expected, g_expected", [
    # D 1/2 mean((real - 1)^2) + 1/2 mean(fake^2), G 1/2 mean((fake - 1)^2)
    ("least_squares", 0.5 * (1 + 1) / 2 + 0.5 * (1 + 1) / 2, 0.5 * (0 + 4) / 2),
    ("bce", (softplus(-2) + softplus(0)) / 2 + (softplus(1) + softplus(-1)) / 2, (softplus(-1) + softplus(1)) / 2)])
def test_adversarial_losses(kind, d_expected, g_expected):
    assert srgan.discriminator_loss(REAL, FAKE, kind).item() == pytest.approx(d_expected, rel=1e-6)
    assert srgan.adversarial_loss(FAKE, kind).item() == pytest.approx(g_expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["least_squares", "bce"])
def test_adversarial_losses_pull_apart(kind):
    """The discriminator wants real scores up and generated ones down; the generator wants the latter up."""
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    d_real, d_fake = torch.autograd.grad(srgan.discriminator_loss(real, fake, kind), [real, fake])
    assert d_real[1] < 0 and d_fake[0] > 0  # a real one scored 0, a generated one scored 1
    g_fake, = torch.autograd.grad(srgan.adversarial_loss(fake, kind), [fake])
    assert g_fake[1] < 0 and (g_fake <= 0).all()


def test_bce_of_large_scores_is_finite():
    scores = torch.tensor([[500.0], [-500.0]])
    assert srgan.adversarial_loss(scores, "bce").item() == pytest.approx(250)
    assert srgan.discriminator_loss(scores, scores, "bce").item() == pytest.approx(500)
