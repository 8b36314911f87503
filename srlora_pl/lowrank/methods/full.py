"""Full fine-tuning."""

from torch import nn

from srlora_pl.lowrank.method import Method


class Full(Method):
    """Every parameter trains, nothing is put in."""

    layer = None
    trains_weights = True
    additive = False

    def __init__(self) -> None:
        """Takes no settings."""

    def trains(self, name: str, parameter: nn.Parameter) -> bool:
        return parameter.is_floating_point()  # counters and packed weights have no gradient
