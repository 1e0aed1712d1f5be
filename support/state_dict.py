"""What a quantized model's state_dict holds beside weights: for whoever saves, loads or adapts one.

With several buckets it also holds the edges between them: with other edges, the scales of a bucket
would serve other timesteps, and all keys would match. And it is told apart here what training
moves, which travels in an adapter, and what stays, the base.
"""

import torch
import torch.nn as nn
from torch import Tensor

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of BatchNorm


def add_edges(model: nn.Module) -> list:
    """Let model.state_dict() hold the edges in model.quant_config, and load_state_dict take them.

    Returns the handles of the hooks that do it.
    """
    return [
        model.register_state_dict_post_hook(save_edges),
        model.register_load_state_dict_pre_hook(load_edges),
    ]


def save_edges(model, state, prefix, metadata):
    """After state_dict: add the edges, in float64 whatever the model's dtype."""
    state[prefix + "quant_edges"] = torch.tensor(model.quant_config["edges"], dtype=torch.float64)


def load_edges(model, state, prefix, metadata, strict, missing, unexpected, errors):
    """Before load_state_dict: take the edges out, and into the model."""
    edges = state.pop(prefix + "quant_edges", None)
    count = len(model.quant_config["edges"])
    if edges is None:
        missing.append(prefix + "quant_edges")
    elif len(edges) != count:
        errors.append(f"it has {len(edges) - 1} buckets, and the model {count - 1}")
    else:
        model.quant_config["edges"] = edges.tolist()


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


def others_and_base(model: nn.Module, deltas: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's state_dict without deltas: what else training moves, and what stays.

    Training moves parameters that require a gradient, and the running statistics of BatchNorm.
    """
    mine = {id(delta) for delta in deltas.values()}
    others = {}
    base = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in mine or not torch.is_tensor(tensor):
            continue
        name = name.replace("_orig_mod.", "")  # torch.compile has it in the names of its parts
        if tensor.requires_grad or name.endswith(STATISTICS):
            others[name] = tensor
        else:
            base[name] = tensor
    return others, base
