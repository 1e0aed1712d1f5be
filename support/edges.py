"""For quant.py: the edges of the buckets travel in a model's state_dict.

With other edges, the scales of a bucket would serve other timesteps, and all keys would match.
"""

import torch
import torch.nn as nn


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
    edges = torch.tensor(model.quant_config["edges"], dtype=torch.float64, device="cpu")
    state[prefix + "quant_edges"] = edges


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
