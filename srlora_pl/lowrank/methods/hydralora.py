"""HydraLoRA (Tian et al. 2024, arXiv 2404.19245)."""

from typing import Any

import torch
from torch import Tensor, nn

from srlora_pl.lowrank.kernels import linear
from srlora_pl.lowrank.linear import AdaptedLinear, Adapter, Matrix
from srlora_pl.lowrank.method import Method, kaiming_uniform
from srlora_pl.util.errors import UserError


class HydraLinear(AdaptedLinear):
    """``y = x W^T + bias + s sum_i w_i(x) (x A^T) B_i^T``, with w the softmax of x ``lora_route``^T, for each token.

    ``lora_A`` is (r, in), ``lora_B`` (out, heads * r) holds B_1, B_2, ... beside each other, ``lora_route`` is
    (heads, in). With dropout the pairs see the dropped x, the router does not.
    """

    adapter_names = ("lora_A", "lora_B", "lora_route")
    merge = Adapter.merge

    def build(self, p: tuple[int, ...], out: int, in_: int, heads: int = 1) -> None:
        self.lora_A = nn.Parameter(self.weight.new_zeros(*p, self.rank, in_))
        self.lora_B = nn.Parameter(self.weight.new_zeros(*p, out, heads * self.rank))
        self.lora_route = nn.Parameter(self.weight.new_zeros(*p, heads, in_))

    def adapted_forward(self, x: Tensor) -> Tensor:
        count = len(self.adapted)
        y = linear(x, self.weight, self.bias).chunk(self.parts, -1)
        logits = linear(x, self.lora_route.view(-1, self.in_features)).unflatten(-1, (count, -1))
        shares = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))  # (..., p, heads)
        low = linear(self.dropout(x), self.lora_A.view(-1, self.in_features)).unflatten(-1, (count, 1, -1))
        mixed = (shares.to(low.dtype).unsqueeze(-1) * low).flatten(-2)  # (..., p, heads r)
        heads = self.lora_B.view(count, -1, mixed.shape[-1])
        change = {part: linear(mixed[..., i, :], heads[i]) for i, part in enumerate(self.adapted)}
        rows = [each + self.scaling * change[part] if part in change else each for part, each in enumerate(y)]
        return rows[0] if self.parts == 1 else torch.cat(rows, -1)

    def merged_weight(self) -> Tensor:
        raise UserError("HydraLoRA's change depends on the input, so it cannot be merged: keep the adapted network")


class HydraLoRA(Method):
    """One A and several B a matrix, whose shares a router decides for each token; there is no weight W_eff.

    A and the router start Kaiming-uniform, every B at 0. The authors' settings are rank 4, alpha 32 and 4 heads.

    Args:
        rank: rows of A, and columns of each B, r.
        alpha: strength; s = alpha / rank.
        heads: how many B there are; 1 is LoRA.
        kwargs: see `Method`.

    Raises:
        UserError: a value outside its range.
    """

    layer = HydraLinear
    additive = False

    def __init__(self, rank: int = 4, *, alpha: float = 32.0, heads: int = 4, **kwargs: Any) -> None:
        super().__init__(rank, alpha=alpha, **kwargs)
        self.heads = heads
        if not isinstance(heads, int) or heads < 1:
            raise UserError(f"method.heads is {heads}, it must be a whole number of at least 1")

    def layer_options(self, name: str) -> dict[str, Any]:
        return {"heads": self.heads}

    def initialize(self, matrix: Matrix) -> None:
        route = matrix.of(matrix.layer.get_parameter("lora_route").detach())
        matrix.A.copy_(kaiming_uniform(matrix.A.shape, matrix.name))
        route.copy_(kaiming_uniform(route.shape, f"{matrix.name} route"))
