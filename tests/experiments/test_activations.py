"""Activations of few bits: factors change nothing, and each interval is rounded to its own grid."""

import pytest
import torch

import activations
from activations import (
    WAYS,
    Clock,
    Ranges,
    Rounding,
    channel_peaks,
    channels_from_end,
    channels_to_end,
    fit_range,
    round_inputs,
    shortcuts,
)
from calibrate import mse
from data import toy
from model import UNet
from quant import QuantLayer, quantize
from train import calibration_data


@pytest.fixture(scope="module")
def quantized():
    """A small UNet with weights of 4 bits."""
    torch.manual_seed(0)
    model = UNet(channels=(16, 32), attention=(1,), c_emb=32, vocab=len(toy.VOCAB))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)  # at the start of training, some layers are zero
    return quantize(model.eval(), 4, columns="channel")


def outputs(model, data):
    with torch.no_grad():
        return torch.cat([model(*batch) for batch in data])


@pytest.mark.parametrize("factors", ["peaks", "1 / s_in"])
def test_factors_fold_into_s_in(quantized, factors, monkeypatch):
    used = []

    def divide(self, layer, args):
        used.append(self.factors)
        return channels_from_end(channels_to_end(args[0]) / self.factors)

    monkeypatch.setattr(Rounding, "__call__", divide)
    data = calibration_data(n=8)
    model = round_inputs(quantized, 4, Ranges("", factors=factors), data)
    torch.testing.assert_close(outputs(model, data), outputs(quantized, data), rtol=1e-4, atol=1e-5)
    assert len(used) == sum(isinstance(m, QuantLayer) for m in quantized.modules())
    assert all((r != 1).any() for r in used)


def test_a_range_is_fitted_to_all_channels_alike(monkeypatch):
    """Few of many values are looked at, and none of the channels is left out."""
    x = torch.zeros(400, 160)  # a fixed stride of 25 would see every fifth channel
    monkeypatch.setattr(activations, "VALUES", 2560)
    for channel in range(160):
        x.zero_()
        x[:, channel] = 1
        step, _ = fit_range(x, 8)
        assert step == pytest.approx(1 / 255)


def test_a_range_is_that_of_mse():
    x = torch.randn(7, 100, dtype=torch.float64) ** 3 + 1
    step, zero_point = fit_range(x, 4)
    grid = mse(x.view(1, 1, 700, 1), 4)
    assert step == grid.s_out.item()
    assert zero_point == grid.zero_point.item()


def test_each_interval_and_each_part_has_its_own_grid():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 50, 6, generator=generator)
    interval = torch.arange(16) % 8
    size = 2.0 ** interval[:, None, None]
    x = (x + interval[:, None, None] - 4) * size * torch.tensor([1, 1, 1, 1, 100, 100])
    clock = Clock()
    rounding = Rounding(4, torch.ones(6), clock)
    rounding.fit(x, interval, [4, 2])
    assert rounding.step.shape == rounding.zero_point.shape == (8, 6)
    assert len(rounding.zero_point[:, 0].unique()) > 4

    clock.interval = interval[:5]
    rounded = rounding(None, (x[:5],))
    for n in range(5):
        for part in (slice(0, 4), slice(4, 6)):
            step, zero_point = fit_range(x[interval == n][..., part], 4)
            codes = ((x[n, :, part] / step).round() + zero_point).clamp(0, 15)
            torch.testing.assert_close(rounded[n, :, part], (codes - zero_point) * step)

    rounding.fit(x, None, [6])
    assert len(rounding.step) == 1
    assert (rounding.step == fit_range(x, 4)[0]).all()


def test_images_are_rounded_as_their_rows_of_channels():
    x = torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    rows = x.permute(0, 2, 3, 1).reshape(3, 16, 5)
    clock = Clock()
    clock.interval = torch.tensor([0, 7, 3])
    rounding = Rounding(4, torch.rand(5) + 0.5, clock)
    rounding.fit(rows, None, [2, 3])
    of_images = rounding(None, (x,))
    of_rows = rounding(None, (rows,))
    assert torch.equal(of_images.permute(0, 2, 3, 1).reshape(3, 16, 5), of_rows)

    without = Rounding(4, torch.ones(5), clock)  # the input is divided before
    without.fit(rows / rounding.factors, None, [2, 3])
    assert torch.equal(without(None, (rows / rounding.factors,)), of_rows)


def test_peaks_are_averaged_over_intervals():
    x = torch.zeros(3, 2, 2)
    x[0, 1, 0] = -4
    x[1, 0, 0] = 2
    x[2, 0, 0] = 8
    assert channel_peaks(x, torch.tensor([5, 5, 1])).tolist() == [6, 1]


def test_shortcuts_are_where_two_tensors_meet(quantized):
    firsts = []
    seen = {}
    splits = shortcuts(quantized)
    hooks = [
        quantized.middle[0].register_forward_hook(lambda m, args, y: firsts.append(y)),
        quantized.middle[1].register_forward_hook(lambda m, args, y: firsts.append(y)),
    ]
    for name in splits:
        layer = quantized.get_submodule(name)
        hooks.append(
            layer.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
        )
    outputs(quantized, calibration_data(n=2))
    for hook in hooks:
        hook.remove()
    assert list(splits) == ["up.0.0.conv1", "up.0.0.skip", "up.2.0.conv1", "up.2.0.skip"]
    split = splits["up.0.0.skip"]
    assert torch.equal(seen["up.0.0.skip"][:, :split], firsts[-1])
    assert seen["up.0.0.skip"].shape[1] > split
    assert splits["up.2.0.skip"] == 32  # of the coarser resolution
    assert seen["up.2.0.skip"].shape[1] == 32 + 16


@pytest.mark.slow
@pytest.mark.parametrize("ranges", [WAYS[0], WAYS[3]], ids=lambda ranges: ranges.name)
def test_more_bits_are_nearer_to_floats(quantized, ranges, monkeypatch):
    monkeypatch.setattr(activations, "VALUES", 500)
    data = calibration_data(n=8)
    exact = outputs(quantized, data)
    errors = []
    for bits in (2, 8):
        rounded = outputs(round_inputs(quantized, bits, ranges, data), data)
        errors.append((rounded - exact).square().mean().item())
    assert errors[0] > 100 * errors[1] > 0


def test_the_clock_reads_the_timesteps_of_the_call(quantized):
    clock = Clock()
    hook = quantized.register_forward_pre_hook(clock)
    x = torch.randn(4, 3, 16, 16)
    words = torch.zeros(4, toy.SLOTS, dtype=torch.long)
    with torch.no_grad():
        quantized(x, torch.tensor([0, 124, 125, 999]), words)
    hook.remove()
    assert clock.interval.tolist() == [0, 0, 1, 7]


def test_layers_of_8_bits_get_inputs_of_8_bits(quantized, monkeypatch):
    widths = []
    monkeypatch.setattr(Rounding, "fit", lambda self, *_: widths.append(self.n_bits))
    round_inputs(quantized, 6, WAYS[0], calibration_data(n=2))  # the weights have 4 bits
    layers = [m for m in quantized.modules() if isinstance(m, QuantLayer)]
    assert widths == [8 if layer.n_bits == 8 else 6 for layer in layers]
    assert widths.count(8) == 2
