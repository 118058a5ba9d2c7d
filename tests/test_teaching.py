"""What the notebooks show of networks: costs of layers, receptive fields, shapes on the way, source code."""

import inspect

import IPython.display
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import srgan_utils as srgan


def made(preset="sharp", scale=4, **changes):
    config = srgan.Config.preset(preset, scale=scale, **changes)
    with torch.device("meta"):
        return config, srgan.Generator(config), srgan.Discriminator(config)


def test_costs_of_one_convolution_by_hand():
    conv = torch.nn.Conv2d(3, 64, 9, stride=2, padding=4)
    costs = srgan.layer_costs(conv, torch.rand(2, 3, 20, 30))
    assert costs == {"": (3 * 64 * 81 + 64, 2 * 3 * 64 * 81 * 10 * 15), "all else": (0, 0)}


def test_costs_of_a_small_generator_by_hand():
    """Every layer of `report` with 8 channels on 6 x 5 px, the shared block's two uses in one row."""
    _, generator, _ = made("report", channels=8, residual_blocks=1)
    area, block = 30, (8 * 8 * 9 + 8, 8 * 8 * 9 * 30)
    assert srgan.layer_costs(generator, torch.empty(1, 3, 6, 5, device="meta")) == {
        "head.0": (3 * 8 * 81 + 8, 3 * 8 * 81 * area),
        "blocks.0.body.0": block, "blocks.0.body.3": block, "merge.0": block,
        "upsample.0.conv": (8 * 32 * 9 + 32, 8 * 32 * 9 * (area + 4 * area)),
        "tail": (8 * 3 * 81 + 3, 8 * 3 * 81 * 16 * area),
        "all else": (1 + 1 + 1 + 3 * 16, 0),  # three PReLUs and three BatchNorms
    }


@pytest.mark.parametrize("preset", ["report", "paper", "sharp", "demo"])
def test_costs_add_up_to_the_totals_and_keep_the_mode(preset):
    config, generator, discriminator = made(preset)
    for model, side in ((generator, 16), (discriminator, config.patch)):
        x = torch.empty(1, 3, side, side, device="meta")
        costs = srgan.layer_costs(model, x)
        parameters, multiplications = map(sum, zip(*costs.values()))
        assert model.training and parameters == srgan.count_parameters(model)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.eval()(x)
        assert multiplications == counter.get_total_flops() // 2
        assert all(own > 0 and count > 0 for name, (own, count) in costs.items() if name != "all else")
        if preset == "sharp" and model is generator:  # the blur: 9 for each value, and 4 for each of its kernel's own 9
            assert costs["all else"][1] == 9 * 64 * 16 * 16 * (4 + 16) + 2 * 4 * 9


@pytest.mark.parametrize("preset, upsampling", [("report", "shuffle"), ("paper", "shuffle"), ("sharp", "shuffle"),
                                                ("sharp", "blur"), ("sharp", "resize")])
@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.filterwarnings("ignore:TF32")  # of torch's, about another machine
def test_receptive_radius(preset, upsampling, scale):
    """LR px that a pixel of SR depends on, by gradients: none beyond the radius, some not far inside; one more block adds 2."""
    reach = []
    for blocks in (1, 2):
        config = srgan.Config.preset(preset, scale=scale, channels=4, residual_blocks=blocks, upsampling=upsampling)
        torch.manual_seed(0)
        generator, radius, touched = srgan.Generator(config).eval(), srgan.receptive_radius(config), torch.zeros(41, 41)
        for corner in (20 * scale, 21 * scale - 1):
            lr = torch.rand(1, 3, 41, 41).requires_grad_()
            with torch.backends.mkldnn.flags(enabled=False):  # the plain convolution: exact zeros stay zeros
                generator(lr)[..., corner, corner].sum().backward()
            touched += lr.grad[0].abs().amax(0)
        reach.append((touched.nonzero() - 20).abs().max().item())
        assert radius - 4 <= reach[-1] <= radius < 20
    assert reach[1] - reach[0] == 2


def test_shapes_are_told_in_the_order_of_the_forward_pass():
    _, generator, _ = made("report", channels=8, residual_blocks=1)
    lines = srgan.shape_walk(generator, torch.empty(2, 3, 6, 5, device="meta")).splitlines()
    assert [line.split()[0][:8] for line in lines] == ["head", "blocks", "merge", "upsample", "upsample", "tail"]
    assert "(2, 8, 12, 10) -> (2, 8, 24, 20)" in " ".join(lines[4].split()) and generator.training
    assert lines[0].split()[-1] == f"{srgan.count_parameters(generator.head):,}" == "1,953"


def test_source_is_shown_as_it_stands_in_the_file(monkeypatch):
    shown = []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    srgan.show_source(srgan.ResidualBlock, srgan.pixel_loss)
    assert [each.data for each in shown] == [f"```python\n{inspect.getsource(each)}```"
                                             for each in (srgan.ResidualBlock, srgan.pixel_loss)]
