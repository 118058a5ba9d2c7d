"""The metrics against values worked out by hand and patterns drawn by rule."""

import math

import pytest
import torch
import torch.nn.functional as F

import srgan_utils as srgan


@pytest.fixture(scope="module")
def faces():
    """(6, 3, 176, 176) at 8-bit levels."""
    return srgan.quantise(torch.cat([srgan.synthetic_face(i) for i in range(6)])[..., 1:177, 1:177])


def blurred(images, factor):
    return srgan.bicubic(srgan.bicubic(images, images.shape[-1] // factor), images.shape[-1])


def test_psnr_of_offsets_by_hand():
    """An offset of d gives -20 log10(d), none inf."""
    hr = torch.rand(4, 3, 16, 16, generator=srgan.seeded(0)) * 0.4
    offsets = torch.tensor([0.1, 0.01, 0.5, 0.0]).view(4, 1, 1, 1)
    assert srgan.psnr(hr + offsets, hr).tolist() == pytest.approx([20, 40, 6.0206, math.inf], abs=1e-3)


@pytest.mark.parametrize("metric", [srgan.psnr, srgan.ssim, srgan.sharpness])
def test_metrics_are_per_image_and_fall_with_blur(metric, faces):
    """One number for each image, the one it has alone: not the batch's. The more is lost, the lower."""
    worse = torch.cat([blurred(faces[:2], 2), blurred(faces[2:4], 8)])
    together, alone = metric(worse, faces[:4]), torch.cat([metric(worse[i:i + 1], faces[i:i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    values = torch.stack([metric(faces, faces)] + [metric(blurred(faces, factor), faces) for factor in (2, 4, 8)])
    assert (values[:-1] > values[1:]).all()


def test_ssim_is_wangs(faces):
    """Wang et al. 2004 in float64: a Gaussian of 11 px, sigma 1.5, borders reflected (as in torchmetrics); the channels' mean."""
    line = torch.exp(-torch.arange(-5, 6, dtype=torch.float64) ** 2 / 4.5)
    kernel = torch.outer(line, line)[None, None] / line.sum() ** 2

    def mean(images):
        return F.conv2d(F.pad(images, (5, 5, 5, 5), mode="reflect"), kernel)

    hr, sr = faces[:2], blurred(faces[:2], 4)
    a, b = (images.double().reshape(6, 1, 176, 176) for images in (sr, hr))
    var_a, var_b, cov = mean(a * a) - mean(a) ** 2, mean(b * b) - mean(b) ** 2, mean(a * b) - mean(a) * mean(b)
    values = (2 * mean(a) * mean(b) + 1e-4) * (2 * cov + 9e-4) / ((mean(a) ** 2 + mean(b) ** 2 + 1e-4) * (var_a + var_b + 9e-4))
    assert srgan.ssim(sr, hr).tolist() == pytest.approx(values.view(2, -1).mean(1).tolist(), abs=5e-4)


def test_sharpness_of_noise_and_of_less_contrast(faces):
    """1 for itself, as SSIM; below for blurred, above for noisy; contrast counts squared."""
    noise = torch.randn(faces.shape, generator=srgan.seeded(0)) * 0.05
    for metric in (srgan.sharpness, srgan.ssim):
        assert metric(faces, faces).tolist() == pytest.approx([1.0] * 6, abs=1e-4)
    assert srgan.sharpness(blurred(faces, 4), faces).max() < 0.9 and srgan.sharpness(faces + noise, faces).min() > 1.1
    assert srgan.sharpness(faces * 0.5, faces).tolist() == pytest.approx([0.25] * 6)


def grid(kind, period, side=176):
    """Squares that alternate, or one bright line, every `period` px; of amplitude 1."""
    at = torch.arange(side)
    if kind == "checker":
        return ((at[:, None] // (period // 2) + at // (period // 2)) % 2).float()
    return ((at[:, None] % period == 0) | (at % period == 0)).float()


@pytest.mark.parametrize("kind", ["checker", "lines"])
@pytest.mark.parametrize("period", [2, 4, 8])
def test_checkerboard_index_rises_with_a_grid(faces, kind, period):
    means = [srgan.checkerboard_index(faces + amplitude / 255 * grid(kind, period)).mean().item() for amplitude in (0, 1, 2, 4)]
    assert means == sorted(set(means)) and means[-1] > 1.5 * means[0]


def test_checkerboard_index_is_per_image_near_1_without_a_grid_and_measures_what_is_large_enough(faces):
    """A grid in one image raises none of the others. From 32 px; 0 of a flat image."""
    for scale in (1, 2, 4, 8):  # HR and its bicubic enlargement, whose interpolation is itself periodic
        assert 0.3 < srgan.checkerboard_index(srgan.quantise(blurred(faces, scale))).mean() <= 1.1
    images = faces.clone()
    images[2] += 8 / 255 * grid("checker", 2)
    before, after = srgan.checkerboard_index(faces), srgan.checkerboard_index(images)
    assert after[2] > 3 * before[2]
    torch.testing.assert_close(after[[0, 1, 3, 4, 5]], before[[0, 1, 3, 4, 5]])
    for size, measured in (((31, 200), False), ((200, 31), False), ((32, 32), True), ((39, 77), True)):
        index = srgan.checkerboard_index(torch.rand(2, 3, *size, generator=srgan.seeded(0)))
        assert index.shape == (2,) and (index.isfinite() if measured else index.isnan()).all()
    assert srgan.checkerboard_index(torch.full((1, 3, 64, 64), 0.5)).item() < 0.1


def test_flat_energy_by_hand():
    """Ten blocks of 8 x 8 px, each a slope across, steeper from block to block: the first is the flattest tenth."""
    slopes = torch.arange(1, 11).repeat_interleave(8) / 250
    hr = slopes.cumsum(0).expand(1, 3, 8, 80)
    grid = 0.008 * (torch.arange(8)[:, None] % 2).expand(1, 3, 8, 80)
    # 0.004 from column to column there, and the grid adds 0.008 from row to row
    assert srgan.flat_energy(hr + grid, hr).item() == pytest.approx(1 + 0.008 ** 2 / 0.004 ** 2, rel=1e-3)
    assert srgan.flat_energy(hr, hr).item() == pytest.approx(1, rel=1e-3)
    # without any energy of its own, HR counts as rounded: 4 twelfths of a level squared
    assert srgan.flat_energy(hr * 0 + grid, hr * 0).item() == pytest.approx((0.008 * 255) ** 2 * 3, rel=1e-3)


def test_detail_correlation():
    random = srgan.seeded(3)
    plain, detail = torch.rand(4, 3, 16, 16, generator=random), torch.randn(4, 3, 16, 16, generator=random)
    hr, noise = plain + detail, torch.randn(4, 3, 16, 16, generator=random)
    for share in (1.0, 0.2, -0.5):  # however much of the detail is added
        expected = torch.full((4,), math.copysign(1, share))
        torch.testing.assert_close(srgan.detail_correlation(plain + share * detail + 0.1, plain, hr), expected, rtol=0, atol=1e-3)
    assert srgan.detail_correlation(plain, plain, hr).abs().max() == 0
    assert srgan.detail_correlation(plain + noise, plain, hr).abs().max() < 0.15
