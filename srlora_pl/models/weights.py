"""The type in which a network keeps the weights that stay frozen."""

from collections.abc import Sequence

import torch
from torch import nn

from srlora_pl.lowrank.target_settings import is_below

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def store(net: nn.Module, weights: str, new: Sequence[str]) -> nn.Module:
    """``net`` with the matrices of its linear layers, in place, in another type.

    Its embeddings, norms and biases stay in float32, and so do the modules ``new``, which train.

    Args:
        weights: one of `DTYPES`.
        new: dotted names.
    """
    for name, module in net.named_modules():
        if type(module) is nn.Linear and not is_below(name, new):
            module.weight.data = module.weight.data.to(DTYPES[weights])
    return net
