"""The linear probe."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from srlora_pl.lowrank.linear import Adapter
from srlora_pl.lowrank.method import AdaptedNetwork, Controller, Method
from srlora_pl.lowrank.target_settings import is_below
from srlora_pl.util.errors import UserError


class _FixedFeatures(Controller):
    def before_optimizer(self, step: int, gradients: Sequence[Tensor], inverse_scale: Tensor | None) -> None:
        if self.adaptation.net.training:
            raise UserError(
                "LinearProbe fixes the features when the network is called, but since its last train() only parts "
                "of it were: call the whole network, net(...)"
            )


class LinearProbe(Method):
    """The head (and what else is new) trains on fixed features: all else is frozen and stays in evaluation mode.

    Dropout and the batches' own statistics would make other features of a sample in every step. So each call of the
    network first takes all but the head back into evaluation mode, whoever has called ``train()`` since.
    """

    layer = None
    additive = False

    def __init__(self) -> None:
        """Takes no settings."""

    def inject(self, net: nn.Module, taken: Sequence[str]) -> dict[str, Adapter]:
        net.register_forward_pre_hook(partial(_evaluate_all_but, tuple(taken)))
        return {}

    def controller(self, adaptation: AdaptedNetwork) -> Controller:
        return _FixedFeatures(adaptation)


def _evaluate_all_but(trained: tuple[str, ...], net: nn.Module, args: tuple[Any, ...]) -> None:
    """A function with a name, so that the network can be copied and pickled."""
    if net.training:  # which is false until the next train()
        for name, module in net.named_modules():
            if not is_below(name, trained):
                module.training = False
