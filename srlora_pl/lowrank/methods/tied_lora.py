"""Tied-LoRA (Renduchintala et al. 2023, arXiv 2311.09578)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from srlora_pl.lowrank.linear import AdaptedLinear, Adapter, Matrix, SharedFactors
from srlora_pl.lowrank.method import Method, kaiming_uniform
from srlora_pl.lowrank.targets import kind_of, repeated_blocks


class TiedLinear(AdaptedLinear):
    """``lora_u`` (r,) and ``lora_v`` (out,) scale the A and B that all matrices of a kind share."""

    adapter_names = ("lora_u", "lora_v")

    def build(self, p: tuple[int, ...], out: int, in_: int) -> None:
        self.lora_u = nn.Parameter(self.weight.new_ones(math.prod(p) * self.rank))
        self.lora_v = nn.Parameter(self.weight.new_ones(math.prod(p) * out))
        self._p = p

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = ([getattr(each, name) for each in self.shared] for name in ("shared_A", "shared_B"))
        u, v = (vector.view(*self._p, -1, 1) for vector in (self.lora_u, self.lora_v))
        return v * (torch.stack(B) if self._p else B[0]), u * (torch.stack(A) if self._p else A[0])


class TiedLoRA(Method):
    """All blocks share the A and B of each kind of matrix, two vectors a matrix scale them: dW = s diag(v) B diag(u) A.

    All four train (the paper's variant TL6). A starts Kaiming-uniform, B = 0, u = v = 1. Matrices of one place in their
    blocks, but of other shapes or ranks, share among themselves.
    """

    layer = TiedLinear

    def inject(self, net: nn.Module, taken: Sequence[str]) -> dict[str, Adapter]:
        layers = super().inject(net, taken)
        blocks, groups = repeated_blocks(net), dict[tuple[str, int, int, int], list[Matrix]]()
        for matrix in [matrix for name, layer in layers.items() for matrix in layer.matrices(name)]:
            groups.setdefault((kind_of(matrix.name, blocks), *matrix.shape, matrix.rank), []).append(matrix)
        holders: dict[str, Adapter] = {}
        for (kind, out, in_, rank), matrices in groups.items():
            name = "tied_" + "".join(letter if letter.isalnum() else "_" for letter in kind)
            name += f"_{out}_{in_}_{rank}" * (name in holders)
            A, B = kaiming_uniform((rank, in_), name), torch.zeros(out, rank)
            holders[name] = holder = SharedFactors(A, B, matrices[0].weight)
            for matrix in matrices:  # in the order of a fused layer's parts
                matrix.layer.shared = [*matrix.layer.shared, holder]
            net.add_module(name, holder)
        return {**layers, **holders}
