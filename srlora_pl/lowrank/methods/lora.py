"""LoRA (Hu et al. 2022, arXiv 2106.09685)."""

import math

from torch import nn

from srlora_pl.lowrank.linear import Matrix
from srlora_pl.lowrank.method import Method


class LoRA(Method):
    """A from Kaiming-uniform(a = sqrt 5), B = 0, the weight as it was; s = alpha / rank."""

    continues_lora = True

    def initialize(self, matrix: Matrix) -> None:
        nn.init.kaiming_uniform_(matrix.A, a=math.sqrt(5))
