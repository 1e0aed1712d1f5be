"""Activations of few bits, simulated: what reaches a quantized layer is rounded to a grid, and goes
on as floats. No integers are multiplied, so this shows what rounding costs in quality, and nothing
of speed.

The weights have 4 bits, by gptq. The grids are chosen in several ways, from coarse to fine: one
range for all that reaches a layer; a range for each interval of timesteps; channels divided by
factors of their own (TCAQ-DM, arXiv 2412.16700); a range for each half of a concatenated shortcut
(Q-Diffusion, arXiv 2302.04304).

The factor r of a channel costs nothing when a model runs. The layer gets x / r, and its scale of
that column becomes s_in * r:

    y[o] = sum over i of  s_out[o] * (q[o, i] - z[o]) * s_in[i] r[i]  *  x[i] / r[i]

A layer that multiplied integers could take no r but 1 / s_in: what is left of the columns' scales
would stand inside of the sum.
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
from runs import DIFFUSION, validation_loss
from runtime import BASE, load_model
from train import calibration_data

WIDTHS = (8, 6, 4)  # bits of an activation
INTERVALS = equal_edges(8, DIFFUSION.T)
VALUES = 20_000  # that a range is fitted to, at most


@dataclass(frozen=True)
class Ranges:
    """How grids are chosen."""

    name: str  # what the log knows it by
    by_interval: bool = False  # a range for each of INTERVALS, else one for all
    factors: str = "1"  # of channels: "1", "peaks" or "1 / s_in"
    halves: bool = False  # a range for each half of a shortcut, else one for both
    low: float = 0.0  # the data are at timesteps from low * T to high * T
    high: float = 1.0


LADDER = [
    Ranges("one range"),
    Ranges("a range for each interval", by_interval=True),
    Ranges("+ factors of channels", by_interval=True, factors="peaks"),
    Ranges("+ halves of shortcuts", by_interval=True, factors="peaks", halves=True),
    Ranges("a range for each interval, factors 1 / s_in", by_interval=True, factors="1 / s_in"),
    Ranges("one range, data of the first third", high=1 / 3),
    Ranges("one range, data of the last third", low=2 / 3),
]


def measure(bits: int | None, ranges: Ranges | None, seed: int) -> dict[str, float]:
    """The quality of the base with weights of 4 bits and activations of some: a line of the log.

    bits: None for float activations. seed: of the data that weights and ranges are fitted to.
    """
    model = quantized_base(seed)
    if bits is None:
        model = merge(model)
    else:
        data = calibration_data(seed=seed, low=ranges.low, high=ranges.high)
        model = round_inputs(model, bits, ranges, data)
    shares = rate_base(model, seed, n=50)
    return {
        "loss": validation_loss(model),
        "plain": shares["plain images"][0],
        "creatures": shares["creatures"][1],
    }


@lru_cache(maxsize=1)
def quantized_base(seed: int) -> UNet:
    """The shipped base with weights of 4 bits, by gptq."""
    return quantize(load_model(BASE), 4, calibration="gptq", data=calibration_data(seed=seed))


def round_inputs(quantized: UNet, bits: int, ranges: Ranges, data: list) -> UNet:
    """A float copy of a quantized model that rounds what reaches the layers that were quantized.

    Layers whose weights have 8 bits get inputs of 8 bits.
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
        factors = {
            "1": torch.ones_like(layer.s_in),
            "peaks": channel_peaks(x, interval),
            "1 / s_in": 1 / layer.s_in,
        }[ranges.factors]
        layer.s_in.mul_(factors)
        n_bits = 8 if layer.n_bits == 8 else bits
        roundings[name] = Rounding(n_bits, factors, clock)

        parts = [x.shape[-1]]
        if ranges.halves and name in splits:
            parts = [splits[name], x.shape[-1] - splits[name]]
        roundings[name].fit(x, interval if ranges.by_interval else None, parts)

    model = merge(model)
    model.register_forward_pre_hook(clock)
    for name, rounding in roundings.items():
        model.get_submodule(name).register_forward_pre_hook(rounding)
    return model


# --------------------------------------------------------------------------------------------------
# What reaches a layer
# --------------------------------------------------------------------------------------------------


def channels_last(x: Tensor) -> Tensor:
    """What reaches a convolution, or a linear layer as it is: (N, ..., C)."""
    return x.movedim(1, -1) if x.dim() == 4 else x


def channels_back(x: Tensor) -> Tensor:
    """The inverse of channels_last."""
    return x.movedim(-1, 1) if x.dim() == 4 else x


@torch.no_grad()
def inputs_of_layers(model: UNet, layers: dict[str, nn.Module], data: list) -> dict[str, Tensor]:
    """What reaches each layer when the model is called on data: (N, P, C), P positions."""
    seen = {name: [] for name in layers}

    def keep_as(name):
        def keep(layer, args):
            x = channels_last(args[0])
            seen[name].append(x.reshape(len(x), -1, x.shape[-1]))

        return keep

    hooks = [m.register_forward_pre_hook(keep_as(name)) for name, m in layers.items()]
    for batch in data:
        model(*batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(inputs) for name, inputs in seen.items()}


def shortcuts(model: UNet) -> dict[str, int]:
    """The layers that read two concatenated tensors, and the number of channels of the first."""
    found = {}
    for i, stage in enumerate(model.up):
        if isinstance(stage, Stage):
            block = stage[0]
            c_in, c_out = block.norm1.num_channels, block.norm2.num_channels
            for name in ("conv1", "skip"):
                found[f"up.{i}.0.{name}"] = c_in - c_out  # a shortcut has as many as the output
    return found


class Clock:
    """A forward pre-hook of a model: remembers the interval of each sample of the batch, (N,)."""

    def __call__(self, model, args):
        x, t, _ = args
        self.interval = self.interval_of(t).expand(len(x))

    @staticmethod
    def interval_of(t: Tensor) -> Tensor:
        return bucket(t, INTERVALS)


# --------------------------------------------------------------------------------------------------
# Grids
# --------------------------------------------------------------------------------------------------


def channel_peaks(x: Tensor, interval: Tensor) -> Tensor:
    """The largest magnitude of each channel in an interval, averaged over the intervals: (C,).

    x: (N, P, C). interval: (N,). A channel of zeros has 1.
    """
    peaks = [x[interval == b].abs().amax((0, 1)) for b in interval.unique()]
    mean = torch.stack(peaks).mean(0)
    return mean.where(mean > 0, 1)


def fit_range(x: Tensor, n_bits: int) -> tuple[Tensor, Tensor]:
    """The step and the zero point of the grid that x, of any shape, is rounded to best."""
    values = x.flatten()
    stride = -(-len(values) // VALUES)
    grid = mse(values[::stride].view(1, 1, -1, 1), n_bits)  # x as the weights of one row
    return grid.s_out.squeeze(), grid.zero_point.squeeze()


class Rounding:
    """A forward pre-hook of a layer: divides its input by factors, and rounds that to a grid.

    factors: (C,). The grid of the B intervals and C channels, scale and zero_point (B, C), is the
    same for all channels of a range. B is 1 if all intervals share their ranges.
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
            samples = [interval == b for b in range(len(INTERVALS) - 1)]
        scale = []
        zero_point = []
        for of_interval in samples:
            fitted = [fit_range(part, self.n_bits) for part in x[of_interval].split(parts, -1)]
            for found, values in ((scale, 0), (zero_point, 1)):
                found.append(torch.cat([f[values].expand(c) for f, c in zip(fitted, parts)]))
        self.scale = torch.stack(scale)
        self.zero_point = torch.stack(zero_point)

    def __call__(self, layer, args):
        x = channels_last(args[0]) / self.factors  # (N, ..., C)
        row = self.clock.interval if len(self.scale) > 1 else torch.zeros(len(x), dtype=torch.long)
        ones = [1] * (x.dim() - 2)
        scale = self.scale[row].view(len(x), *ones, -1)  # (N, 1, ..., 1, C)
        zero_point = self.zero_point[row].view(len(x), *ones, -1)
        codes = ((x / scale).round() + zero_point).clamp(0, 2**self.n_bits - 1)
        return channels_back((codes - zero_point) * scale)
