"""The former home of `srlora_pl.lowrank.delta`."""

from collections.abc import Mapping

from torch import Tensor, nn

from srlora_pl.lowrank.adaptation import Adaptation
from srlora_pl.lowrank.delta import merged_copy

__all__ = ["plain_copy"]


def plain_copy(adaptation: Adaptation, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    """See `srlora_pl.lowrank.delta.merged_copy`."""
    return merged_copy(adaptation.net, adaptation.layers, weights)
