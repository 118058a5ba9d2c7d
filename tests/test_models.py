"""The networks against plainly written references of the report's, and what must hold of every preset's."""

from copy import deepcopy

import pytest
import torch
import torchvision
from conftest import TINY, flat_field, refused
from reference import MEAN, STD, ReferenceDiscriminator, ReferenceGenerator, ReferenceTraining
from safetensors.torch import save_file
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
    """Equal but for rounding, which is all that a bias before BatchNorm has: hence the network's largest as a floor."""
    pairs = [(a.grad, b.grad) for a, b in zip(ours.parameters(), reference.parameters(), strict=True)]
    largest = max(b.abs().max() for _, b in pairs)
    assert largest > 0 and all((a - b).abs().max() <= 1e-7 * b.abs().max() + 1e-9 * largest for a, b in pairs)


@pytest.fixture(scope="module")
def pair():
    """HR images with detail at every size, by scale with their LR."""
    hr = torch.cat([srgan.synthetic_face(i) for i in range(2)])[..., 17:161, 17:161]
    hr = srgan.quantise(srgan.bicubic(hr, 48))
    return lambda scale: (srgan.quantise(srgan.bicubic(hr, 48 // scale)), hr)


@pytest.mark.parametrize("scale", [4, 8])
def test_one_update_of_the_report(scale, pair, monkeypatch):
    """Outputs, losses and gradients of both networks, in float64: in float32 a rounding may tip a LeakyReLU over."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    lr, hr = (images.double() for images in pair(scale))
    hr_n, lr_n = (hr - MEAN) / STD, (lr - MEAN) / STD
    state = srgan.TrainState(config(hr_size=48, crop=144, scale=scale), CPU)
    for network in (state.generator, state.discriminator, state.vgg):
        network.double()
    g = fill(ReferenceGenerator(scale).double(), state.generator)
    d = fill(ReferenceDiscriminator(48).double(), state.discriminator)
    vgg, d_adam = state.vgg.network[:19], torch.optim.Adam(d.parameters(), lr=1e-5, betas=(0.5, 0.999))
    sr, sr_n = state.generator(lr), g(lr_n)
    torch.testing.assert_close((sr - MEAN) / STD, sr_n, rtol=1e-9, atol=1e-9)
    losses = srgan.discriminator_step(state, lr, sr, hr)
    d_loss = 0.5 * ((d(hr_n) - 1) ** 2).mean() + 0.5 * (d(sr_n.detach()) ** 2).mean()
    d_loss.backward()
    torch.testing.assert_close(losses["d_loss"], d_loss.detach(), rtol=1e-9, atol=1e-9)
    assert_same_gradients(state.discriminator, d)
    d_adam.step()
    for ours, theirs in zip(state.discriminator.parameters(), d.parameters(), strict=True):
        assert (ours - theirs).abs().max() <= 2.1e-5  # Adam's first step is the gradient's sign times 1e-5
    fill(d, state.discriminator)  # so that rounding in those signs does not spread

    losses = srgan.generator_step(state, lr, sr, hr)
    content = (vgg(sr_n) - vgg(hr_n)).abs().mean()
    g_loss = content + 1e-3 * 0.5 * ((d(sr_n) - 1) ** 2).mean()
    g_loss.backward()
    torch.testing.assert_close(losses["content"], content.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(losses["g_loss"], g_loss.detach(), rtol=1e-9, atol=1e-9)
    assert_same_gradients(state.generator, g)


def test_twenty_updates_of_the_report(store):
    """The reference's losses, at a tenth of the rate: Adam's first steps are the sign of a gradient times it, or of rounding."""
    small = config(hr_size=32, scale=4, batch_size=2, learning_rate=1e-6)
    state = srgan.TrainState(small, CPU)
    plain = ReferenceTraining(4, 32, deepcopy(state.vgg.network)[:19].requires_grad_(), CPU, 1e-6)
    fill(plain.generator, state.generator), fill(plain.discriminator, state.discriminator)
    for update in range(20):
        lr, hr = srgan.batch(store, small, update, CPU)
        expected = plain.update((lr - MEAN) / STD, (hr - MEAN) / STD)
        found = srgan._one_update(state, lr, hr)
        for name, value in expected.items():
            assert found[name].item() == pytest.approx(value, rel=1e-5, abs=1e-5), (update, name)


def test_the_same_seed_gives_the_reports_initialisation_and_a_run_starts_from_its_own():
    """Torch's default one, drawn in the report's order; a run draws the generator first and leaves the caller's numbers alone."""
    for ours, theirs, argument in ((srgan.Generator, ReferenceGenerator, 4), (srgan.Discriminator, ReferenceDiscriminator, 64)):
        torch.manual_seed(5)
        values = ours(config(hr_size=64)).state_dict().values()
        torch.manual_seed(5)
        assert all(map(torch.equal, values, theirs(argument).state_dict().values()))
    torch.manual_seed(3)
    expected, before = srgan.Generator(tiny := config("sharp", **TINY, seed=3)).state_dict(), torch.random.get_rng_state()
    state = srgan.TrainState(tiny, CPU)
    assert torch.equal(before, torch.random.get_rng_state())
    for network in (state.generator, state.ema):
        assert all(map(torch.equal, network.state_dict().values(), expected.values()))


def test_parameters_counted_by_hand_and_the_momenta_of_batch_norm():
    """Separate stages add parameters, the report's shared one does not. D: convolutions 4,685,376, BatchNorm 3,712, dense."""
    head, block, merge = 64 * (3 * 81 + 1) + 1, 2 * (64 * (64 * 9 + 1) + 128) + 1, 64 * (64 * 9 + 1) + 128
    up = 256 * (64 * 9 + 1) + 1
    report = head + 5 * block + merge + up + 3 * (64 * 81 + 1)
    for kind, preset, scale, parameters, momenta in (
            (srgan.Generator, "report", 2, report, [0.8] * 11), (srgan.Generator, "report", 8, report, [0.8] * 11),
            (srgan.Generator, "paper", 2, 1_549_462 - up, [0.1] * 33), (srgan.Generator, "paper", 4, 1_549_462, [0.1] * 33),
            (srgan.Generator, "paper", 8, 1_549_462 + up, [0.1] * 33), (srgan.Generator, "sharp", 4, None, []),
            (srgan.Discriminator, "report", 4, 138_908_865, [0.8] * 5 + [0.1, 0.8]),  # 512 16^2 1024 + 1024 and 1025
            (srgan.Discriminator, "paper", 4, 4_689_088 + 512 * 36 * 1024 + 1024 + 1025, [0.1] * 7),
            (srgan.Discriminator, "sharp", 4, None, [])):
        with torch.device("meta"):
            network = kind(config(preset, scale=scale))
        assert parameters in (None, srgan.count_parameters(network)), (preset, scale)
        assert [layer.momentum for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)] == momenta


@pytest.mark.parametrize("preset", ["report", "paper", "sharp"])
@pytest.mark.parametrize("scale", [2, 4, 8, 16])
@torch.no_grad()
def test_any_size_is_enlarged_and_each_image_gets_a_score(preset, scale):
    setting = config(preset, scale=scale, hr_size=48, channels=4, residual_blocks=1)
    generator, discriminator = srgan.Generator(setting).eval(), srgan.Discriminator(setting).eval()
    for height, width in ((7, 13), (1, 1), (2, 9)):
        assert generator(torch.rand(2, 3, height, width)).shape == (2, 3, scale * height, scale * width)
    images, lr = torch.rand(3, 3, 48, 48), torch.rand(3, 3, 48 // scale, 48 // scale)
    verdicts = discriminator(images, lr)
    for together, alone in zip(verdicts, zip(*(discriminator(*each) for each in zip(images.split(1), lr.split(1))))):
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert verdicts[-1].shape == (3, 1)


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("upsampling, icnr, factor, flat", [
    ("blur", False, 3, True),  # whatever the weights
    ("shuffle", True, 1, True), ("shuffle", False, 1, False)])  # only at the start, and only by ICNR
def test_flat_in_flat_out(scale, upsampling, icnr, factor, flat):
    torch.manual_seed(0)
    generator = srgan.Generator(config("sharp", scale=scale, residual_blocks=1, icnr=icnr, channels=16, upsampling=upsampling))
    for block in generator.upsample:
        block.conv.weight.data.mul_(factor)
    found = flat_field(generator.eval(), torch.rand(5, 3, generator=srgan.seeded(1)))  # (5,)
    assert found.max() < 0.01 if flat else found.min() > 0.05


@pytest.mark.parametrize("preset", ["report", "paper", "sharp"])
def test_the_output_is_what_the_preset_says(preset):
    """`sharp` is the bicubic enlargement plus its own branch; tanh, driven by the last bias, reaches black and white."""
    generator = srgan.Generator(config(preset, channels=4, residual_blocks=1)).eval().requires_grad_(False)
    lr = torch.rand(1, 3, 4, 4)
    if preset == "sharp":
        assert (generator(lr) - srgan.bicubic(lr, 16)).abs().max() > 1e-3
        generator.tail.load_state_dict({name: 0 * value for name, value in generator.tail.state_dict().items()})
        torch.testing.assert_close(generator(lr), srgan.bicubic(lr, 16))
        return
    for bias, extreme in ((-50.0, 0.0), (50.0, 1.0)):
        generator.tail.bias.fill_(bias)
        assert srgan.quantise(generator(lr)).eq(extreme).all()


LAST = {"vgg19": (2, 7, 16, 25, 34), "vgg16": (2, 7, 14, 21, 28)}  # of each block's convolutions, in torchvision's `features`


def length(name, layer):
    return LAST[name][int(layer[4]) - 1] + {"conv": 1, "relu": 2, "pool": 3}[layer[:4]]  # up to that place


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(network, file of its weights) by name: VGG19 whole, as torchvision writes it; VGG16's convolutions, in half precision."""
    folder, networks = tmp_path_factory.mktemp("vgg"), {}
    for name in LAST:
        networks[name] = getattr(torchvision.models, name)(weights=None).features.half().float()
    state = {f"features.{key}": value for key, value in networks["vgg19"].state_dict().items()}
    torch.save(state | {"classifier.0.bias": torch.zeros(3)}, folder / "vgg19.pt")
    save_file({key: value.half() for key, value in networks["vgg16"].state_dict().items()}, folder / "vgg16.safetensors")
    return {path.stem: (networks[path.stem], str(path)) for path in folder.iterdir()}


def test_vgg_is_torchvisions_on_normalised_images_frozen_and_passes_gradients_on(pair):
    image = pair(4)[1].clone().requires_grad_()
    torch.manual_seed(19)
    theirs, vgg = torchvision.models.vgg19(weights=None).features, srgan.VGGFeatures(config())
    features, = vgg(image)
    torch.testing.assert_close(features, theirs[:19]((image - MEAN) / STD))
    assert features.shape == (2, 256, 6, 6) and not srgan.count_parameters(vgg)
    features.square().mean().backward()
    assert (image.grad.abs().amax((1, 2, 3)) > 0).all() and all(p.grad is None for p in vgg.parameters())


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta")
@pytest.mark.parametrize("name", LAST)
@torch.no_grad()
def test_a_file_of_vgg19s_or_vgg16s_weights_is_taken_up_to_the_layer_that_is_named(name, files, pair):
    (network, path), hr = files[name], pair(4)[1]
    with torch.device("meta"):  # nothing is computed
        for layer in (f"{kind}{block}" for kind in ("conv", "relu", "pool") for block in range(1, 6)):
            ours = srgan.VGGFeatures(config(vgg=path, vgg_layers=layer)).network
            theirs = [repr(each).replace("inplace=True", "") for each in network[:length(name, layer)]]
            assert list(map(repr, ours)) == theirs, layer
            assert type(ours[-1]) is {"conv": nn.Conv2d, "relu": nn.ReLU, "pool": nn.MaxPool2d}[layer[:4]]
    ours, = srgan.VGGFeatures(config("paper", vgg=path))(hr)
    torch.testing.assert_close(ours, network[:length(name, "relu5")]((hr - MEAN) / STD))
    assert [length("vgg19", config(preset).vgg_layers) for preset in ("report", "paper")] == [19, 36]


def test_a_file_of_other_weights_or_none_is_refused_by_name(files, tmp_path):
    state = list(files["vgg19"][0].state_dict().items())
    for value in ([1, 2], dict(state[:26]), dict(state[:-2]), "no weights"):  # VGG16 has 26, too
        for name in ("wrong.pth", "wrong.safetensors"):
            torch.save(value, tmp_path / name)
            with refused(ValueError, name):
                srgan.VGGFeatures(config(vgg=str(tmp_path / name)))
    with refused(ValueError, "none.pth"):
        srgan.VGGFeatures(config(vgg=str(tmp_path / "none.pth")))


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("invalid hash value")])
def test_without_imagenet_weights_nothing_is_swapped_and_three_ways_out_are_named(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    for module in (torchvision.models._api, torch.hub):
        monkeypatch.setattr(module, "load_state_dict_from_url", fail)
    with pytest.raises(ConnectionError, match=r"vgg=FILE.*vgg=random.*content=pixel"):
        srgan.VGGFeatures(config(vgg="imagenet"))
