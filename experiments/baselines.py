"""What TuneQDM is compared with: LoRA, and the same scales trained the plain way.

Each baseline changes a model in place, as quant.quantize does, and returns it. Only what is new
trains.
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrize import register_parametrization

from calibrate import minmax, rowcol
from quant import QuantConv2d, QuantLayer, quantize


class LoRA(nn.Module):
    """y = layer(x) + B(A(x)): a frozen Conv2d or Linear beside a path of low rank (Hu et al. 2021).

    A has the layer's kernel, stride and padding, B a kernel of 1. B starts at zero, so training
    starts at the layer itself.
    """

    def __init__(self, layer, rank):
        super().__init__()
        self.layer = layer
        c_out, c_in = layer.weight.shape[:2]
        if isinstance(layer, nn.Conv2d):
            geometry = (layer.kernel_size, layer.stride, layer.padding)
            self.lora_a = nn.Conv2d(c_in, rank, *geometry, bias=False)
            self.lora_b = nn.Conv2d(rank, c_out, 1, bias=False)
        else:
            self.lora_a = nn.Linear(c_in, rank, bias=False)
            self.lora_b = nn.Linear(rank, c_out, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x):
        return self.layer(x) + self.lora_b(self.lora_a(x))


class PlainLayer(nn.Module):
    """A layer of TuneQDM as the authors write it: 4-bit codes in int8, dequantized under autograd.

    It trains the scales themselves, those of columns only if train_in. Autograd keeps a float copy
    of the weight for each step of the dequantization.
    """

    def __init__(self, layer, train_in):
        super().__init__()
        weight = layer.weight.detach()  # (O, I, *kernel)
        o, i, *kernel = weight.shape
        ones = [1] * len(kernel)
        grid = minmax(weight.reshape(1, o, i, -1), n_bits=4)
        self.register_buffer("codes", grid.codes.view(weight.shape).to(torch.int8))
        self.register_buffer("zero_point", grid.zero_point.view(o, 1, *ones))
        self.s_out = nn.Parameter(grid.s_out.view(o, 1, *ones))
        self.s_in = nn.Parameter(grid.s_in.view(1, i, *ones)) if train_in else None
        self.bias = layer.bias  # which swap has frozen
        self.is_conv = isinstance(layer, nn.Conv2d)
        if self.is_conv:
            self.stride = layer.stride
            self.padding = layer.padding

    def forward(self, x):
        w = (self.codes - self.zero_point) * self.s_out  # (O, I, *kernel)
        if self.s_in is not None:
            w = w * self.s_in
        if self.is_conv:
            return F.conv2d(x, w, self.bias, self.stride, self.padding)
        return F.linear(x, w, self.bias)


class PositionRows(nn.Module):
    """A convolution whose kernel has a grid for each position: rows and columns of its own.

    What quantize's columns="position" leaves out: there a row's scale is that of all positions. In
    plain autograd, from rowcol, with deltas in exponents; without groups.
    """

    def __init__(self, layer, n_bits):
        super().__init__()
        weight = layer.weight.detach()  # (O, I, *kernel)
        self.shape = weight.shape
        grid = rowcol(weight.flatten(2).movedim(2, 0)[..., None], n_bits)  # a group for each of K
        w = grid.weight()[..., 0].movedim(0, 2)  # (O, I, K)
        self.register_buffer("w", w)
        self.d_out = nn.Parameter(torch.zeros_like(w[:, :1]))  # (O, 1, K)
        self.d_in = nn.Parameter(torch.zeros_like(w[:1]))  # (1, I, K)
        self.bias = layer.bias  # which quantize has frozen
        self.stride = layer.stride
        self.padding = layer.padding

    def forward(self, x):
        w = self.w * self.d_out.exp() * self.d_in.exp()
        return F.conv2d(x, w.view(self.shape), self.bias, self.stride, self.padding)


def with_position_rows(quantized, model):
    """Put PositionRows in the place of the convolutions of quantized, with the weights of model.

    Linear layers and 1x1 convolutions stay as they are.
    """
    for name, layer in list(quantized.named_modules()):
        if isinstance(layer, QuantConv2d) and layer.shape[2:] != (1, 1):
            quantized.set_submodule(name, PositionRows(model.get_submodule(name), layer.n_bits))
    return quantized


class RawScale(nn.Module):
    """A parametrization: train a scale s = s0 * exp(d) itself, as the paper does, and not its d.

    A scale below a thousandth of s0 counts as that, so that d is finite. s0 and s: (C,), for the
    scales of rows or of columns.
    """

    def __init__(self, s0):
        super().__init__()
        self.register_buffer("s0", s0, persistent=False)  # the layer has it already

    def forward(self, s):
        return (s / self.s0).clamp(min=1e-3).log()

    def right_inverse(self, d):
        return self.s0 * d.exp()


def train_raw_scales(model):
    """Let the scales of a quantized model with one bucket be trained, and not their deltas."""
    for layer in list(model.modules()):
        if isinstance(layer, QuantLayer):
            register_parametrization(layer, "d_out_0", RawScale(layer.s_out))
            register_parametrization(layer, "d_in_0", RawScale(layer.s_in))


def swap(model, make):
    """Freeze model, and put make(layer) in place of each of its Conv2d and Linear layers."""
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            model.set_submodule(name, make(layer))
    return model


def lora(model, rank):
    """LoRA on the float model."""
    return swap(model, partial(LoRA, rank=rank))


def lora_packed(model, rank, n_bits=4, columns="channel", calibration="minmax", data=None):
    """LoRA on the quantized model, with packed integers (as QLoRA, Dettmers et al. 2023)."""
    lora(model, rank)
    quantize(
        model,
        n_bits,
        scales="out",  # fewer deltas, which are frozen below
        columns=columns,
        calibration=calibration,
        keep_float=["*.lora_a", "*.lora_b"],
        data=data,
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def plain(model, train_in):
    """TuneQDM as the authors write it, or PEQA if columns aren't trained."""
    return swap(model, partial(PlainLayer, train_in=train_in))
