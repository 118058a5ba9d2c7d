"""The networks against plainly written references of the report's, and what must hold of every preset's."""

import pytest
import torch
import torchvision
from conftest import TINY
from reference import MEAN, STD, ReferenceDiscriminator, ReferenceGenerator, ReferenceTraining
from torch import nn

import srgan_utils as srgan

CPU = torch.device("cpu")


def config(preset="report", **changes):
    return srgan.Config.preset(preset, **({"precision": "fp32", "vgg": "random"} | changes)).for_faces(8)


def fill(reference, ours):
    """Copy weights and buffers in the order of registration."""
    theirs, values = reference.state_dict(), list(ours.state_dict().values())
    assert [v.shape for v in theirs.values()] == [v.shape for v in values]
    reference.load_state_dict(dict(zip(theirs, values)))
    return reference


def assert_same_gradients(ours, reference):
    """Equal but for rounding; a bias before BatchNorm has no gradient but rounding, hence the network's largest as a floor."""
    pairs = [(a.grad, b.grad) for a, b in zip(ours.parameters(), reference.parameters(), strict=True)]
    largest = max(b.abs().max() for _, b in pairs)
    assert largest > 0
    for a, b in pairs:
        assert (a - b).abs().max() <= 2e-3 * b.abs().max() + 2e-5 * largest


@pytest.fixture(scope="module")
def pair():
    """HR images with detail at every size, by scale with their LR."""
    hr = torch.cat([srgan.synthetic_face(i) for i in range(2)])[..., 17:161, 17:161]
    hr = srgan.quantise(srgan.bicubic(hr, 64))
    return lambda scale: (srgan.quantise(srgan.bicubic(hr, 64 // scale)), hr)


@pytest.fixture(scope="module")
def vgg():
    return srgan.VGGFeatures(config())


# --- The report, to the last parameter


@pytest.mark.parametrize("scale", [4, 8])
def test_one_update_of_the_report(scale, pair):
    """Outputs, losses and gradients of both networks: the discriminator first, then the generator against the new one."""
    lr, hr = pair(scale)
    state = srgan.TrainState.create(config(hr_size=64, crop=144, scale=scale), CPU)
    g, d = fill(ReferenceGenerator(scale), state.generator), fill(ReferenceDiscriminator(64), state.discriminator)
    vgg = nn.Sequential(*list(state.vgg.network.children())[:19])
    d_adam = torch.optim.Adam(d.parameters(), lr=1e-5, betas=(0.5, 0.999))
    hr_n, lr_n = (hr - MEAN) / STD, (lr - MEAN) / STD

    sr = state.generator(lr)
    sr_n = g(lr_n)
    torch.testing.assert_close((sr - MEAN) / STD, sr_n, rtol=1e-4, atol=1e-4)

    losses = srgan.discriminator_step(state, sr, hr)
    d_loss = 0.5 * ((d(hr_n) - 1) ** 2).mean() + 0.5 * (d(sr_n.detach()) ** 2).mean()
    d_loss.backward()
    torch.testing.assert_close(losses["d_loss"], d_loss.detach(), rtol=1e-4, atol=1e-5)
    assert_same_gradients(state.discriminator, d)
    d_adam.step()
    for ours, theirs in zip(state.discriminator.parameters(), d.parameters(), strict=True):
        assert (ours - theirs).abs().max() <= 2.1e-5  # Adam's first step is the gradient's sign times 1e-5
    fill(d, state.discriminator)  # so that rounding in those signs does not spread

    losses = srgan.generator_step(state, sr, hr)
    content = (vgg(sr_n) - vgg(hr_n)).abs().mean()
    g_loss = content + 1e-3 * 0.5 * ((d(sr_n) - 1) ** 2).mean()
    g_loss.backward()
    torch.testing.assert_close(losses["content"], content.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["g_loss"], g_loss.detach(), rtol=1e-4, atol=1e-6)
    assert_same_gradients(state.generator, g)


def test_twenty_updates_of_the_report(store):
    """The same losses as the plain reference, though that enlarges every batch twice and freezes nothing.

    With a tenth of the report's learning rate: Adam's first steps are a gradient's sign times it, also where that is rounding.
    """
    small = config(hr_size=32, scale=4, batch_size=4, learning_rate=1e-6)
    state = srgan.TrainState.create(small, CPU)
    plain = ReferenceTraining(4, 32, nn.Sequential(*list(state.vgg.network.children())[:19]), CPU, 1e-6)
    fill(plain.generator, state.generator)
    fill(plain.discriminator, state.discriminator)
    plain.vgg.requires_grad_(True)
    for update in range(20):
        lr, hr = srgan.batch(store, small, update, CPU)
        expected = plain.update((lr - MEAN) / STD, (hr - MEAN) / STD)
        state.vgg.requires_grad_(False)
        found = srgan._one_update(state, store)
        plain.vgg.requires_grad_(True)
        for name, value in expected.items():
            assert found[name].item() == pytest.approx(value, rel=1e-5, abs=1e-5), (update, name)


@pytest.mark.parametrize("name", ["generator", "discriminator"])
def test_the_same_seed_gives_the_reports_initialisation(name):
    """Torch's default one, drawn in the report's order."""
    torch.manual_seed(5)
    ours = srgan.Generator(config()) if name == "generator" else srgan.Discriminator(config(hr_size=64))
    torch.manual_seed(5)
    theirs = ReferenceGenerator(4) if name == "generator" else ReferenceDiscriminator(64)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_run_starts_from_its_seed():
    """`TrainState` draws the generator first, from `seed` alone, and leaves the caller's random numbers alone."""
    tiny = config("sharp", **TINY, seed=3)
    torch.manual_seed(3)
    expected = srgan.Generator(tiny).state_dict()
    before = torch.random.get_rng_state()
    state = srgan.TrainState.create(tiny, CPU)
    assert torch.equal(before, torch.random.get_rng_state())
    for network in (state.generator, state.ema):
        assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


# Counted by hand: head 64 (3 81 + 1) + 1, block 2 (64 (64 9 + 1) + 128) + 1, merge 64 (64 9 + 1) + 128,
# up-sampling 256 (64 9 + 1) + 1, tail 3 (64 81 + 1)
HEAD, BLOCK, MERGE, UP, TAIL = 15_617, 74_113, 37_056, 147_713, 15_555


@pytest.mark.parametrize("preset, scale, expected", [
    ("paper", 2, 1_549_462 - UP), ("paper", 4, 1_549_462), ("paper", 8, 1_549_462 + UP),
    ("report", 2, HEAD + 5 * BLOCK + MERGE + UP + TAIL), ("report", 8, HEAD + 5 * BLOCK + MERGE + UP + TAIL),
])
def test_generator_parameters(preset, scale, expected):
    """Separate stages add parameters, the report's shared one does not."""
    with torch.device("meta"):
        assert srgan.count_parameters(srgan.Generator(config(preset, scale=scale))) == expected


def test_discriminator_parameters():
    """Convolutions 4,685,376, BatchNorm 3,712, dense 512 16^2 1024 + 1024 and 1025."""
    with torch.device("meta"):
        assert srgan.count_parameters(srgan.Discriminator(config())) == 138_908_865
        assert srgan.count_parameters(srgan.Discriminator(config("paper"))) == 4_689_088 + 512 * 36 * 1024 + 1024 + 1025


@pytest.mark.parametrize("preset, generator, discriminator", [
    ("report", [0.8] * 11, [0.8, 0.8, 0.8, 0.8, 0.8, 0.1, 0.8]),  # the first layer has none: the sixth here is the seventh
    ("paper", [0.1] * 33, [0.1] * 7),
    ("sharp", [], []),
])
def test_batch_norm_momenta(preset, generator, discriminator):
    def momenta(network):
        return [layer.momentum for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]

    with torch.device("meta"):
        assert momenta(srgan.Generator(config(preset))) == generator
        assert momenta(srgan.Discriminator(config(preset))) == discriminator


# --- Shapes and up-sampling


@pytest.mark.parametrize("preset", ["report", "paper", "sharp"])
@pytest.mark.parametrize("scale", [2, 4, 8, 16])
def test_output_shape(preset, scale):
    generator = srgan.Generator(config(preset, scale=scale, hr_size=64, channels=4, residual_blocks=1)).eval()
    with torch.no_grad():
        for size in ((7, 13), (1, 1), (2, 9)):
            assert generator(torch.rand(2, 3, *size)).shape == (2, 3, scale * size[0], scale * size[1])


@pytest.mark.parametrize("preset, side", [("report", 48), ("paper", 48), ("sharp", 48), ("sharp", 37)])
def test_discriminator_scores_each_image(preset, side):
    network = srgan.Discriminator(config(preset, scale=2, hr_size=48)).eval()
    assert network(torch.rand(3, 3, side, side)).shape == (3, 1)


def test_shared_and_separate_upsampling():
    """Separate stages with equal weights do what the shared one does; with their own they do something else."""
    tiny = dict(scale=8, channels=8, residual_blocks=1)
    shared = srgan.Generator(config(**tiny)).eval()
    separate = srgan.Generator(config(shared_upsampling=False, **tiny)).eval()
    lr = torch.rand(1, 3, 6, 6)
    assert len(shared.upsample) == 1 and len(separate.upsample) == 3
    weights = shared.state_dict()
    weights |= {f"upsample.{stage}.{name}": value for stage in (1, 2) for name, value in shared.upsample[0].state_dict().items()}
    separate.load_state_dict(weights)
    torch.testing.assert_close(separate(lr), shared(lr))
    with torch.no_grad():
        separate.upsample[2].conv.weight.mul_(1.5)
    assert (separate(lr) - shared(lr)).abs().max() > 1e-3


def test_icnr_starts_as_a_nearest_neighbour_enlargement():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 7)
    block = srgan.UpsampleBlock(8, icnr=True)
    quarter = block.conv(x)[:, ::4]
    nearest = quarter.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(block.shuffle(block.conv(x)), nearest)
    assert quarter.std() > 0.1  # of distinct filters
    plain = srgan.UpsampleBlock(8)
    shuffled = plain.shuffle(plain.conv(x))
    assert (shuffled[..., ::2, ::2] - shuffled[..., 1::2, ::2]).abs().max() > 0.1  # torch's default start is not


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("upsampling", ["blur", "resize"])
def test_blur_and_resize_keep_flat_flat_whatever_the_weights(scale, upsampling):
    colours = torch.rand(3, 3, generator=srgan.seeded(1))
    torch.manual_seed(0)
    generator = srgan.Generator(config("sharp", scale=scale, residual_blocks=1, icnr=False, channels=16, upsampling=upsampling))
    with torch.no_grad():
        for block in generator.upsample:
            block.conv.weight.mul_(3)
    assert srgan.flat_field(generator.eval(), colours).max() < 0.01


def test_the_blur_is_binomial():
    block = srgan.UpsampleBlock(4, "blur")
    x, weights = torch.zeros(1, 4, 5, 5), torch.tensor([1.0, 2, 1])
    with torch.no_grad():
        block.conv.weight.zero_()
        block.conv.bias.zero_()
        block.conv.weight[0, 0, 1, 1] = 1.0  # the first phase of the first channel passes its input
        x[0, 0, 2, 2] = 1.0
        sr = block(x)
    expected = torch.zeros(10, 10)
    expected[3:6, 3:6] = torch.outer(weights, weights) / 16
    torch.testing.assert_close(sr[0, 0], expected)
    assert sr[0, 1:].abs().max() == 0


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_only_icnr_starts_without_a_checkerboard(scale):
    colours = torch.rand(5, 3, generator=srgan.seeded(1))
    fields = {}
    for icnr in (True, False):
        torch.manual_seed(0)
        generator = srgan.Generator(config("sharp", scale=scale, residual_blocks=1, icnr=icnr, channels=16,
                                           upsampling="shuffle")).eval()
        fields[icnr] = srgan.flat_field(generator, colours)
    assert fields[True].shape == (5,) and fields[True].max() < 0.01 and fields[False].min() > 0.05


@pytest.mark.parametrize("scale", [2, 4, 8, 16])
def test_sharp_is_bicubic_plus_its_own_branch(scale):
    """With the last convolution at 0, it is the bicubic enlargement exactly."""
    generator = srgan.Generator(config("sharp", **(TINY | {"scale": scale}))).eval()
    lr = torch.rand(1, 3, 6, 9)
    enlarged = srgan.bicubic(lr, (6 * scale, 9 * scale))
    with torch.no_grad():
        assert (generator(lr) - enlarged).abs().max() > 1e-3
        generator.tail.weight.zero_()
        generator.tail.bias.zero_()
        torch.testing.assert_close(generator(lr), enlarged)


@pytest.mark.parametrize("preset, low, high", [("report", 0.0, 1.0), ("paper", 0.0, 1.0)])
def test_output_spans_black_and_white(preset, low, high):
    """And reaches them: the last convolution's bias drives tanh to either end."""
    generator = srgan.Generator(config(preset, channels=4, residual_blocks=1)).eval()
    ends = []
    for value in (-50.0, 50.0):
        with torch.no_grad():
            generator.tail.bias.fill_(value)
            ends.append(generator(torch.rand(1, 3, 4, 4)))
    assert ends[0].max() <= low + 0.01 and ends[1].min() >= high - 0.01
    if preset == "report":  # 2.38 tanh + 0.26 reaches just beyond: [-2.12, 2.64]
        torch.testing.assert_close(ends[1], (2.64 * STD + MEAN).expand_as(ends[1]))
        torch.testing.assert_close(ends[0], (-2.12 * STD + MEAN).expand_as(ends[0]))


@pytest.mark.parametrize("preset, upsampling", [("report", "shuffle"), ("paper", "shuffle"), ("sharp", "shuffle"),
                                                ("sharp", "blur"), ("sharp", "resize")])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_receptive_radius(preset, upsampling, scale):
    """Which LR pixels a pixel of SR depends on, by its gradient: none beyond the radius, some not far inside it."""
    setting = config(preset, scale=scale, channels=4, residual_blocks=2, upsampling=upsampling)
    torch.manual_seed(0)
    generator = srgan.Generator(setting).eval()
    radius, side = srgan.receptive_radius(setting), 41
    reach = 0
    for corner in (0, scale - 1):
        lr = torch.rand(1, 3, side, side).requires_grad_()
        with torch.backends.mkldnn.flags(enabled=False):  # the plain convolution: exact zeros stay zeros
            generator(lr)[..., side // 2 * scale + corner, side // 2 * scale + corner].sum().backward()
        touched = lr.grad[0].abs().amax(0).nonzero() - side // 2
        reach = max(reach, touched.abs().max().item())
    assert radius - 4 <= reach <= radius < side // 2


# --- VGG19


def test_vgg_is_torchvisions_on_normalised_images(vgg, pair):
    """The first 19 layers: normalisation inside, divided by `vgg_rescale`."""
    _, hr = pair(4)
    torch.manual_seed(19)
    theirs = torchvision.models.vgg19(weights=None).features[:19].eval()
    with torch.no_grad():
        torch.testing.assert_close(vgg(hr), theirs((hr - MEAN) / STD))
        assert vgg(hr).shape == (2, 256, 8, 8)  # after the third max-pool
        vgg.rescale, before = 4.0, vgg.rescale
        torch.testing.assert_close(vgg(hr), theirs((hr - MEAN) / STD) / 4)
        vgg.rescale = before


@pytest.mark.parametrize("preset, last", [("report", nn.MaxPool2d), ("paper", nn.ReLU), ("sharp", nn.Conv2d)])
def test_vgg_ends_where_the_preset_says(preset, last):
    """After the third pool; relu5_4; conv5_4 before its ReLU."""
    setting = config(preset)
    with torch.device("meta"):
        layers = torchvision.models.vgg19(weights=None).features[:setting.vgg_layers]
    kinds = [type(layer) for layer in layers]
    assert kinds[-1] is last
    assert kinds.count(nn.MaxPool2d) == (3 if preset == "report" else 4)
    assert kinds.count(nn.Conv2d) == (8 if preset == "report" else 16)


def test_vgg_is_frozen_and_passes_gradients_on(vgg, pair):
    _, hr = pair(4)
    vgg.train()
    assert not any(module.training for module in vgg.modules())
    assert not any(p.requires_grad for p in vgg.parameters()) and srgan.count_parameters(vgg) == 0
    image = hr.clone().requires_grad_()
    vgg(image).square().mean().backward()
    assert (image.grad.abs().amax((1, 2, 3)) > 0).all()
    assert all(p.grad is None for p in vgg.parameters())


def test_vgg_from_a_file(vgg, tmp_path, pair):
    """As torchvision's whole network or its features alone write it, and nothing else."""
    from safetensors.torch import save_file

    _, hr = pair(4)
    torch.manual_seed(7)
    features = torchvision.models.vgg19(weights=None).features
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}
               | {"classifier.0.bias": torch.zeros(3)}, tmp_path / "vgg.pth")
    save_file(features.state_dict(), tmp_path / "vgg.safetensors")
    for name in ("vgg.pth", "vgg.safetensors"):
        loaded = srgan.VGGFeatures(config(vgg=str(tmp_path / name)))
        with torch.no_grad():
            torch.testing.assert_close(loaded(hr), features[:19]((hr - MEAN) / STD))


def write_text(path):
    path.write_text("not weights")


def write_others(path):
    torch.save({"0.weight": torch.zeros(2)}, path)


def write_list(path):
    torch.save([1, 2], path)


@pytest.mark.parametrize("write", [write_text, write_others, write_list])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_wrong_vgg_file_is_named(write, ending, tmp_path):
    path = tmp_path / f"wrong.{ending}"
    write(path)
    with pytest.raises(ValueError, match=r"wrong\.") as caught:
        srgan.VGGFeatures(config(vgg=str(path)))
    assert "\n" not in str(caught.value)


def test_a_missing_vgg_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pth"):
        srgan.VGGFeatures(config(vgg=str(tmp_path / "none.pth")))


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("invalid hash value")])
def test_no_imagenet_weights(monkeypatch, error):
    """Nothing is swapped silently: the three ways out are named."""
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fail)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    with pytest.raises(ConnectionError, match=r"vgg=FILE.*vgg=random.*content=pixel"):
        srgan.VGGFeatures(config(vgg="imagenet"))
