"""For quant.py and gptq.py: what quantize, adapter, load_adapter and merge refuse, and why.

Each check raises ValueError with one sentence that names the culprit and the remedy, before
anything is changed. Users with models of their own meet it. What it lets pass, it returns: the
layers to replace, patterns and batches as lists.
"""

import inspect
import reprlib
from collections.abc import Mapping
from fnmatch import fnmatch
from itertools import zip_longest

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parameter import is_lazy

from calibrate import CALIBRATIONS
from support.files import hash_of

# --------------------------------------------------------------------------------------------------
# quantize: its arguments
# --------------------------------------------------------------------------------------------------


def check_buckets(num_buckets, T):
    """0 .. T can be cut into num_buckets intervals."""
    if not 0 < T < float("inf"):
        raise ValueError(f"T must be a positive number, not {T}")
    if num_buckets not in range(1, 10**6):
        raise ValueError(f"num_buckets must be a whole number from 1 on, not {num_buckets!r}")


def check_arguments(model, n_bits, edges, scales, columns, calibration, timestep):
    """All arguments of quantize are in range, and the model isn't quantized or compiled."""
    if hasattr(model, "quant_config"):
        raise ValueError("the model is quantized already; give the float model, or merge this one")
    if n_bits not in range(2, 9):
        raise ValueError(f"n_bits must be 2 to 8, not {n_bits!r}")
    rising = all(low < high for low, high in zip(edges, edges[1:]))
    if len(edges) < 2 or not rising:
        raise ValueError(f"edges must be two or more increasing numbers, not {edges}")
    if scales not in ("out", "out+in"):
        raise ValueError(f"scales must be out or out+in, not {scales}")
    if columns not in ("channel", "position"):
        raise ValueError(f"columns must be channel or position, not {columns}")
    calibrations = [*CALIBRATIONS, "gptq"]
    if calibration not in calibrations:
        raise ValueError(f"calibration must be {' or '.join(calibrations)}, not {calibration}")
    if hasattr(model, "_orig_mod"):
        raise ValueError("the model is compiled; quantize it first, then compile it")
    if len(edges) > 2:
        check_timestep(model, timestep)


def check_timestep(model, timestep):
    """model.forward has an argument of this name."""
    named = names_of(signature_of(model))
    if not named:
        raise ValueError(
            "model.forward names no arguments, so the timesteps can't be told apart; "
            "quantize the model inside of this wrapper"
        )
    if timestep not in named:
        raise ValueError(f"timestep must be {' or '.join(named)}, not {timestep}")


def signature_of(model) -> inspect.Signature:
    """The signature of model.forward, or of its class's.

    Add-ons that cache or compile replace a model's forward by one of *args, **kwargs.
    """
    own = inspect.signature(model.forward)
    if names_of(own):
        return own
    return inspect.signature(type(model).forward.__get__(model))


def names_of(signature) -> list[str]:
    """The names of all arguments but *args and **kwargs."""
    arguments = signature.parameters.values()
    return [a.name for a in arguments if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]


# --------------------------------------------------------------------------------------------------
# quantize: which layers
# --------------------------------------------------------------------------------------------------


def matches(name: str, patterns: list[str]) -> bool:
    """True if a pattern fits the name of a layer, or of a module that the layer is part of."""
    return any(fnmatch(name, p) or fnmatch(name, f"{p}.*") for p in patterns)


def as_patterns(model: nn.Module, argument: str, patterns) -> list[str]:
    """patterns, or a single one, as a list. Each fits a module of the model."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(
                f"{argument} has '{pattern}', which fits no module; correct or remove it"
            )
    return patterns


def layers_to_replace(model: nn.Module, keep_float: list[str]) -> dict[nn.Module, list[str]]:
    """Every Conv2d and Linear to replace, with its names: two, if it is used in two places.

    A layer is kept float in all places if one of its names is in keep_float. Refused are the first
    that can't be quantized, and a model without any.
    """
    modules = list(model.named_modules(remove_duplicate=False))
    kept = {module for name, module in modules if matches(name, keep_float)}
    layers = {}
    for name, module in modules:
        if module in kept:
            continue
        if "parametrizations" in name.split("."):  # part of how a replaced layer makes its weight
            continue
        if not is_layer(module):
            continue
        reason = reason_to_refuse(model, name, module)
        if reason and name == "":
            raise ValueError(f"the model itself {reason}")
        if reason:
            raise ValueError(f"layer '{name}' {reason}, or name it in keep_float")
        layers.setdefault(module, []).append(name)
    if not layers:
        raise ValueError("the model has no Conv2d or Linear to quantize")
    return layers


def is_layer(module: nn.Module) -> bool:
    """True for what is quantized, and for what looks like it but can't be."""
    return isinstance(module, (nn.Conv2d, nn.Linear, nn.MultiheadAttention)) or is_quantized(module)


def is_quantized(module: nn.Module) -> bool:
    """True for a QuantLayer, whose class this file can't import."""
    return hasattr(module, "d_out_0")


def reason_to_refuse(model: nn.Module, name: str, layer: nn.Module) -> str | None:
    """Why this layer can't be quantized, and what to do about it; None if it can."""
    kind = type(layer).__name__
    if isinstance(layer, nn.MultiheadAttention) or is_quantized(layer) or name == "":
        return f"is a {kind}: give float Conv2d and Linear layers inside a module"

    if is_lora(name):
        return "belongs to a LoRA: merge it into its layer and unload it"

    weight = layer.weight
    if is_lazy(weight) or weight.is_meta or weight.numel() == 0:
        return "has no weights: give a model with values"
    for key in ("weight", "bias"):
        reason = reason_to_refuse_values(getattr(layer, key))
        if reason:
            return f"has a {key} {reason}"
    if not weight.isfinite().all():
        return "has weights that aren't all finite: repair them"
    owners = [module for module in model.modules() if module._parameters.get("weight") is weight]
    if len(owners) > 1:
        return "shares its weight with another: give each its own"

    # A quantized layer does what Conv2d or Linear do, and no more.
    plain = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    methods = ("forward", "_conv_forward") if plain is nn.Conv2d else ("forward",)
    for method in methods:
        own = getattr(type(layer), method) is not getattr(plain, method)
        if own or method in vars(layer):
            return f"is a {kind} with a {method} of its own: replace it by a plain {plain.__name__}"
    if has_hooks(layer):
        return "has hooks, such as those of weight_norm, that would be lost: remove them"
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        return (
            "is in an nn.TransformerEncoderLayer, which reads its weight instead of calling it: "
            "write that module out"
        )

    if plain is nn.Conv2d:
        if layer.padding_mode != "zeros":
            return f"pads with {layer.padding_mode} values instead of zeros: pad before the layer"
        odd = [d * (k - 1) % 2 for d, k in zip(layer.dilation, layer.kernel_size)]
        if layer.padding == "same" and any(odd):
            return "pads unevenly, one pixel more on one side: pad before the layer"
    return None


def is_lora(name: str) -> bool:
    """True for the two factors of a LoRA, in the names of peft and of others."""
    parts = name.lower().split(".")
    return any(part in ("lora_a", "lora_b", "lora_down", "lora_up") for part in parts)


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def reason_to_refuse_values(values: torch.Tensor | None) -> str | None:
    """Why a layer's weight or bias can't be computed with, and what to do about it."""
    if values is None:
        return None
    kind = type(values)
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:  # it holds other tensors
        return f"of type {kind.__name__}: make it plain by full_tensor() or dequantize()"
    if values.layout != torch.strided:
        return f"of layout {values.layout}: make it dense by to_dense()"
    if values.dtype not in FLOATS:
        return f"of dtype {values.dtype}: cast or dequantize it to bfloat16 or float32"
    return None


def has_hooks(layer: nn.Module) -> bool:
    """True if something runs before or after the layer's forward or backward."""
    forward = layer._forward_pre_hooks or layer._forward_hooks
    backward = layer._backward_pre_hooks or layer._backward_hooks
    return bool(forward or backward)


def pixels(conv: nn.Module) -> tuple[int, ...]:
    """The padding of a Conv2d in pixels; conv.padding may be "same" or "valid".

    Layers for which "same" isn't the same on both sides are refused.
    """
    if conv.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size))
    return (0, 0) if conv.padding == "valid" else conv.padding


# --------------------------------------------------------------------------------------------------
# backward
# --------------------------------------------------------------------------------------------------


def saved_tensors(ctx):
    """What a layer has kept for backward. Says what to do if it was changed in place."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"what {ctx.layer} keeps for backward, its input or output, was changed in place; "
            "write h = h + skip instead of h += skip"
        ) from error


# --------------------------------------------------------------------------------------------------
# gptq: its data
# --------------------------------------------------------------------------------------------------


MOST_BATCHES = 256  # a hundred images suffice, even one by one


def as_batches(data) -> list:
    """data as a list of batches, each of which a model takes. They must come to an end."""
    batches = []
    for batch in () if data is None else data:
        if not isinstance(batch, (tuple, list, Mapping)):
            raise ValueError(
                "each batch of data must be a tuple of positional arguments of the model, "
                f"or a dict of keyword arguments; one is a {type(batch).__name__}"
            )
        if len(batches) == MOST_BATCHES:
            raise ValueError(
                f"data doesn't end after {MOST_BATCHES} batches; a hundred images suffice, so give "
                "larger batches or fewer, such as itertools.islice(data, 10)"
            )
        batches.append(batch)
    if not batches:
        raise ValueError("gptq needs data: batches that the model is called with")
    return batches


def check_called(layers, calls):
    """The first batch reaches every layer."""
    for layer, names in layers.items():
        if layer not in calls:
            raise ValueError(
                f"the first batch of data doesn't reach layer '{names[0]}'; "
                "give one that does, or name the layer in keep_float"
            )


NOT_THE_SAME = "layer '{}' isn't called in the same way each time; name it in keep_float"


def check_repeated(layers, calls, again):
    """Called on a batch again, the model calls the same layers with the same inputs.

    calls, again: pairs of a layer and a part of its input. They may differ by a hundredth: some
    sums on a GPU round differently each time.
    """
    for (layer, x), (layer_again, x_again) in zip_longest(calls, again, fillvalue=(None, None)):
        name = layers[layer or layer_again][0]
        if layer is not layer_again or x.shape != x_again.shape:
            raise ValueError(NOT_THE_SAME.format(name))
        if (x - x_again).norm() > 0.01 * x.norm():
            raise ValueError(
                f"layer '{name}' sees other inputs when the model is called on the same batch "
                "again; let the model draw random numbers from PyTorch's global generator, "
                "or give them in data"
            )


def check_inputs(name, x, x_float):
    """A layer gets as many inputs, of the same shapes, in the quantized and the float network."""
    if not x or [a.shape for a in x] != [a.shape for a in x_float]:
        raise ValueError(NOT_THE_SAME.format(name))


def check_moments(name, moments):
    """The sums over what a layer sees are finite."""
    size = moments.h.diagonal(dim1=-2, dim2=-1).sum(-1)  # no element of a sum of x x^T is larger
    if not size.isfinite().all() or not moments.cross.isfinite().all():
        raise ValueError(
            f"layer '{name}' sees inputs that aren't finite, or too large to be squared; "
            "correct data or model"
        )


# --------------------------------------------------------------------------------------------------
# adapter, load_adapter, merge
# --------------------------------------------------------------------------------------------------

GIVE = "give the quantized model that it was trained on"


def unwrapped(model: nn.Module) -> nn.Module:
    """The quantized model, if DistributedDataParallel or torch.compile is around it.

    Raises ValueError if there is none.
    """
    while "quant_config" not in vars(model):
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if inner is None:
            raise ValueError(
                "the model isn't quantized, or is inside of others; call quantize first"
            )
        model = inner
    return model


def check_trained(model: nn.Module, values: dict):
    """What an adapter would hold is finite, and is all that was trained."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "no parameter requires a gradient, so what was trained can't be told; "
            "call adapter before requires_grad_(False)"
        )
    for name, value in values.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} isn't finite: the training has diverged, lower its rate")


def check_adapter(saved, which: str, config: dict, count: int, tensors: dict):
    """An adapter belongs to a model, and is whole.

    which: what it is called. config: the model's. count: of its deltas. tensors: all others in its
    state_dict.
    """
    other = f"{which} was made for another base"
    theirs = saved.get("quant_config") if isinstance(saved, dict) else None
    if not isinstance(theirs, dict):
        raise ValueError(f"{other}, or is damaged: it has no quant_config; {GIVE}")
    others = saved.get("others")
    if not isinstance(others, dict) or not others.keys() <= tensors.keys():
        raise ValueError(f"{other}, or is damaged: it has no parameters that fit; {GIVE}")

    base = {name: tensor for name, tensor in tensors.items() if name not in others}
    same_base = saved.get("fingerprint") == hash_of(sorted(base.items()))
    for key, value in config.items():
        if same_base and key in ("calibration", "keep8", "keep_float"):
            continue  # other ways to the same integers and scales, such as a saved base
        if repr(theirs.get(key)) != repr(value):  # a damaged file may hold what can't be compared
            is_not = f"{reprlib.repr(theirs.get(key))} instead of {reprlib.repr(value)}"
            raise ValueError(f"{other}, of {key} {is_not}; {GIVE}")
    if not same_base:
        raise ValueError(
            f"{other}, of another dtype or other weights (an adapter with more than deltas changes "
            f"them, and quantizing on another processor rounds differently); {GIVE}"
        )

    if not is_finite_tensor(saved.get("deltas"), (count,)):
        raise ValueError(
            f"{which} is damaged: its deltas aren't {count} finite numbers; copy it again"
        )
    for name, value in others.items():
        if not is_finite_tensor(value, tensors[name].shape):
            raise ValueError(
                f"{which} is damaged: its {name} isn't finite, or of another shape; copy it again"
            )


def check_sum(adapters, strength: float, total: Tensor):
    """Only deltas add up, and can be scaled. total: their sum times strength."""
    if not total.half().isfinite().all():
        raise ValueError(
            f"the deltas times strength {strength} aren't finite numbers in float16; lower it"
        )
    for saved in adapters:
        if saved["others"] and (len(adapters) > 1 or strength != 1):
            name = next(iter(saved["others"]))
            raise ValueError(
                f"only deltas can be added or scaled, and an adapter holds '{name}', too; "
                "load it alone, at strength 1"
            )


def is_finite_tensor(value, shape) -> bool:
    """True if value, read from a file, is a plain tensor of finite real numbers of this shape."""
    if not torch.is_tensor(value) or value.layout != torch.strided:
        return False
    if value.dtype not in (*FLOATS, torch.int64):  # of others, float8 among them, it can't be told
        return False
    return value.shape == torch.Size(shape) and bool(value.isfinite().all())


def check_merge(model: nn.Module, b: int):
    """Bucket b can be merged: it exists, and merging loses nothing."""
    num_buckets = len(model.quant_config["edges"]) - 1
    if not 0 <= b < num_buckets:
        raise IndexError(f"there is no bucket {b}: the last one is {num_buckets - 1}")
    for name, module in model.named_modules():
        if name and hasattr(module, "quant_config"):
            raise ValueError(f"'{name}' is a quantized model inside of this one; merge it first")
        if is_quantized(module) and has_hooks(module):
            raise ValueError(f"layer '{name}' has hooks that would be lost; remove them")
