"""BitFit (Ben Zaken et al. 2022, arXiv 2106.10199)."""

import re
from collections.abc import Sequence

from torch import nn

from srlora_pl.lowrank.linear import Adapter
from srlora_pl.lowrank.method import Method
from srlora_pl.lowrank.target_settings import is_below, require_pattern
from srlora_pl.util.errors import UserError, did_you_mean


class BitFit(Method):
    """Every bias of the network trains, those of its norms too, and nothing else but the head.

    Args:
        biases: only those of modules with one of these names or regular expressions as a component of their dotted
            name, such as ``[query, intermediate]`` of a BERT, the paper's smaller variant; None: all.

    Raises:
        UserError: an entry of ``biases`` is no regular expression; when it is put into a network, an entry matches no
            bias there, or there is none.
    """

    layer = None
    trains_weights = True
    additive = False

    def __init__(self, biases: str | list[str] | None = None) -> None:
        self.biases = [biases] if isinstance(biases, str) else biases
        for pattern in self.biases or []:
            require_pattern(pattern)

    def inject(self, net: nn.Module, taken: Sequence[str]) -> dict[str, Adapter]:
        owners = [_owner(name) for name, _ in net.named_parameters() if _is_bias(name) and not is_below(name, taken)]
        if not owners:
            raise UserError("the network has no biases that BitFit could train: take another method, such as LoRA")
        for pattern in self.biases or []:
            if not any(_holds(pattern, owner) for owner in owners):
                near = did_you_mean(pattern, {part for owner in owners for part in owner.split(".")})
                raise UserError(f"method.biases names {pattern!r}, which matches no bias of the network{near}")
        return {}

    def trains(self, name: str, parameter: nn.Parameter) -> bool:
        chosen = self.biases is None or any(_holds(pattern, _owner(name)) for pattern in self.biases)
        return _is_bias(name) and chosen


def _is_bias(name: str) -> bool:
    return name.endswith("bias")


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _holds(pattern: str, name: str) -> bool:
    """Whether ``pattern`` is some of the components of a dotted ``name``."""
    return re.search(rf"(?:^|\.)(?:{pattern})(?:\.|$)", name) is not None
