"""How a network keeps the weights that stay frozen."""

from collections.abc import Sequence

import torch
from torch import nn

from srlora_pl.lowrank import Method
from srlora_pl.lowrank.nf4 import quantize
from srlora_pl.lowrank.target_settings import is_below
from srlora_pl.lowrank.targets import linears_in_blocks
from srlora_pl.models.peft_folder import PeftFolder
from srlora_pl.util.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NF4 = "nf4"  # linears in four bits, all else in one of these


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


def prepared(
    adapter: PeftFolder | None, method: Method, heads: Sequence[str], weights: str, net: nn.Module
) -> nn.Module:
    """A freshly built ``net`` as a run begins with it, in place.

    Args:
        adapter: what it starts from, see `PeftFolder.prepare`.
        heads: dotted names of what trains whole.
        weights: with ``nf4`` the linears inside the repeated blocks are put into four bits.

    Raises:
        UserError: there are no such linears.
    """
    if adapter is not None:
        adapter.prepare(net, method, heads)
    if weights == NF4:
        linears = linears_in_blocks(net, heads)
        if not linears:
            raise UserError(
                f"model.weights is {weights!r}, but model.backbone has no linear layers inside repeated blocks that "
                "could be put into four bits: take bfloat16"
            )
        quantize(linears.values())
    return net
