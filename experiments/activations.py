"""Activations of few bits, simulated: the input of each quantized layer is rounded to a grid, and
stays a float tensor. No integers are multiplied, so this shows what rounding costs in quality, and
nothing of speed.

The weights have 4 bits, by gptq. The first and the last convolution have 8, and so does what
reaches them. The grids are chosen in several ways: one range for all that reaches a layer; a range
for each interval of timesteps; ranges of their own for the two tensors that a shortcut concatenates
(Q-Diffusion, arXiv 2302.04304); channels divided by factors of their own (TCAQ-DM, arXiv
2412.16700).

A channel's factor r costs nothing. The weight's column is multiplied by it, and that goes into the
scale that the column has anyway. The input is divided by it, and that goes into the step of the
input's grid:

    y[o] = sum over i of  s_out[o] * (q[o, i] - z[o]) * (s_in[i] * r[i])  *  step * (c[i] - z_x)
    c[i] = round(x[i] / (r[i] * step)) + z_x

Only if r = 1 / s_in, up to a constant, can integers alone be multiplied and summed, and scaled
afterwards. With any other r, r = 1 too, s_in[i] * r[i] stays inside the sum.
"""

import copy
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from calibrate import mse
from model import Stage, UNet
from pretrain import rate_base
from quant import QuantLayer, bucket, equal_edges, merge, quantize
from runs import DIFFUSION, PartOfTime, validation_loss
from sample import BASE, load_model
from train import calibration_data

N_BITS = (8, 6, 4)  # of an activation
INTERVALS = 8  # of timesteps, equal ones
VALUES = 20_000  # a range is fitted to at most this many


@dataclass(frozen=True)
class Ranges:
    """How grids are chosen."""

    name: str  # the log knows it by this and the bits
    by_interval: bool = False  # a range for each of the INTERVALS, else one for all
    factors: str = "1"  # of channels: "1", "peaks" or "1 / s_in"
    split: bool = False  # a range for each of two concatenated tensors, else one for both
    low: float = 0.0  # the data for the ranges are at timesteps from low * T to high * T
    high: float = 1.0


WAYS = [
    Ranges("one range"),
    Ranges("by interval", by_interval=True),
    Ranges("by interval, factors", by_interval=True, factors="peaks"),
    Ranges("by interval, factors, split", by_interval=True, factors="peaks", split=True),
    Ranges("by interval, split", by_interval=True, split=True),
    Ranges("by interval, factors 1 / s_in", by_interval=True, factors="1 / s_in"),
    Ranges("one range, data of the first third", high=1 / 3),
    Ranges("one range, data of the last third", low=2 / 3),
]


def measure(bits: int | None, ranges: Ranges | None, seed: int, n: int) -> dict[str, float]:
    """How good the base is with weights of 4 bits and activations of these bits.

    bits: None for float activations. seed: of the data that weights and ranges are fitted to, and
    of the images that are drawn, n of each kind.
    """
    model = quantized_base(seed)
    if bits is None:
        model = merge(model)
    else:
        timesteps = PartOfTime(ranges.low, ranges.high)
        data = calibration_data(seed=seed, diffusion=timesteps)
        model = round_inputs(model, bits, ranges, data)
    shares = rate_base(model, seed, n)
    return {
        "loss": validation_loss(model),
        "plain": shares["plain images"][0],  # show all that the caption says
        "creatures": shares["creatures"][1],  # match a scene, pixel by pixel
    }


@lru_cache(maxsize=1)
def quantized_base(seed: int) -> UNet:
    """The shipped base with weights of 4 bits, by gptq."""
    data = calibration_data(seed=seed)
    return quantize(load_model(BASE), 4, columns="channel", calibration="gptq", data=data)


def round_inputs(quantized: UNet, bits: int, ranges: Ranges, data: list) -> UNet:
    """A float copy of a quantized model that rounds what reaches the layers that were quantized.

    The ranges are fitted to what reaches a layer while no input is rounded. Layers whose weights
    have 8 bits get inputs of 8 bits.
    """
    model = copy.deepcopy(quantized)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}
    seen = inputs_of_layers(model, layers, data)
    splits = shortcuts(model)
    clock = Clock()
    interval = clock.interval_of(torch.cat([t for _, t, _ in data]))

    roundings = {}
    for name, layer in layers.items():
        x = seen[name]
        factors = channel_factors(layer, x, interval, ranges)
        layer.s_in.mul_(factors)
        n_bits = 8 if layer.n_bits == 8 else bits
        parts = [x.shape[-1]]
        if ranges.split and name in splits:
            parts = [splits[name], x.shape[-1] - splits[name]]
        fit_interval = interval if ranges.by_interval else None

        rounding = Rounding(n_bits, factors, clock)
        rounding.fit(x, fit_interval, parts)
        roundings[name] = rounding

    model = merge(model)
    model.register_forward_pre_hook(clock)
    for name, rounding in roundings.items():
        model.get_submodule(name).register_forward_pre_hook(rounding)
    return model


# --------------------------------------------------------------------------------------------------
# What reaches a layer
# --------------------------------------------------------------------------------------------------


def channels_to_end(x: Tensor) -> Tensor:
    """A layer's input with its channels last: (N, ..., C). In a linear layer's they are already."""
    return x.movedim(1, -1) if x.dim() == 4 else x


def channels_from_end(x: Tensor) -> Tensor:
    """The inverse of channels_to_end."""
    return x.movedim(-1, 1) if x.dim() == 4 else x


@torch.no_grad()
def inputs_of_layers(model: UNet, layers: dict[str, nn.Module], data: list) -> dict[str, Tensor]:
    """What reaches each layer when the model is called on data: (N, P, C), P positions."""
    seen = {name: [] for name in layers}

    def keep_as(name):
        def keep(layer, args):
            x = channels_to_end(args[0])
            seen[name].append(x.reshape(len(x), -1, x.shape[-1]))

        return keep

    hooks = [m.register_forward_pre_hook(keep_as(name)) for name, m in layers.items()]
    for batch in data:
        model(*batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(inputs) for name, inputs in seen.items()}


def shortcuts(model: UNet) -> dict[str, int]:
    """The layers that read two concatenated tensors, and the number of channels of the first.

    The second is the shortcut. It has as many channels as the block's output.
    """
    found = {}
    for i, stage in enumerate(model.up):
        if isinstance(stage, Stage):
            block = stage[0]
            c_in, c_out = block.norm1.num_channels, block.norm2.num_channels
            for name in ("conv1", "skip"):
                found[f"up.{i}.0.{name}"] = c_in - c_out
    return found


class Clock:
    """A forward pre-hook of a model: keeps the interval of each sample, (N,), for its Roundings."""

    def __call__(self, model, args):
        _, t, _ = args
        self.interval = self.interval_of(t)

    @staticmethod
    def interval_of(t: Tensor) -> Tensor:
        return bucket(t, equal_edges(INTERVALS, DIFFUSION.T))


# --------------------------------------------------------------------------------------------------
# Grids
# --------------------------------------------------------------------------------------------------


def channel_factors(layer: QuantLayer, x: Tensor, interval: Tensor, ranges: Ranges) -> Tensor:
    """What the channels of a layer's inputs x (N, P, C) are divided by: (C,)."""
    if ranges.factors == "peaks":
        return channel_peaks(x, interval)
    if ranges.factors == "1 / s_in":
        return 1 / layer.s_in
    return torch.ones_like(layer.s_in)


def channel_peaks(x: Tensor, interval: Tensor) -> Tensor:
    """Each channel's largest magnitude in an interval, as a mean over the intervals: (C,).

    x: (N, P, C). interval: (N,). A channel of zeros has 1.
    """
    peaks = [x[interval == b].abs().amax((0, 1)) for b in interval.unique()]
    mean = torch.stack(peaks).mean(0)
    return mean.where(mean > 0, 1)


def fit_range(x: Tensor, n_bits: int) -> tuple[Tensor, Tensor]:
    """The step and the zero point of a grid for x, of any shape: the best of 80 ranges (mse)."""
    values = x.flatten()
    if len(values) > VALUES:
        generator = torch.Generator().manual_seed(0)
        values = values[torch.randint(len(values), (VALUES,), generator=generator)]
    grid = mse(values.view(1, 1, -1, 1), n_bits)  # the values as the weights of one row
    return grid.s_out.squeeze(), grid.zero_point.squeeze()


class Rounding:
    """A forward pre-hook of a layer: divides its input by factors, and rounds that to a grid.

    factors: (C,). step, zero_point: (B, C), for B intervals, or B = 1 for all of them. Channels
    that share a range have the same.
    """

    def __init__(self, n_bits: int, factors: Tensor, clock: Clock):
        self.n_bits = n_bits
        self.factors = factors
        self.clock = clock

    def fit(self, x: Tensor, interval: Tensor | None, parts: list[int]):
        """Choose the grid for inputs x (N, P, C) of samples in these intervals (N,), or in any.

        parts: how many channels each range has.
        """
        x = x / self.factors
        samples = [slice(None)]
        if interval is not None:
            samples = [interval == b for b in range(INTERVALS)]
        self.step = torch.empty(len(samples), x.shape[-1])
        self.zero_point = torch.empty(len(samples), x.shape[-1])
        for b, of_interval in enumerate(samples):
            start = 0
            for part in x[of_interval].split(parts, -1):
                channels = slice(start, start + part.shape[-1])
                step, zero_point = fit_range(part, self.n_bits)
                self.step[b, channels] = step
                self.zero_point[b, channels] = zero_point
                start = channels.stop

    def __call__(self, layer, args):
        x = channels_to_end(args[0]) / self.factors  # (N, ..., C)
        interval = self.clock.interval  # (N,)
        if len(self.step) == 1:
            interval = torch.zeros_like(interval)
        ones = [1] * (x.dim() - 2)
        step = self.step[interval].view(len(x), *ones, -1)  # (N, 1, ..., 1, C)
        zero_point = self.zero_point[interval].view(len(x), *ones, -1)
        codes = ((x / step).round() + zero_point).clamp(0, 2**self.n_bits - 1)
        return channels_from_end((codes - zero_point) * step)
