"""VeRA (Kopiczko et al. 2024, arXiv 2310.11454)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from srlora_pl.lowrank.linear import AdaptedLinear, Adapter, Matrix, SharedFactors
from srlora_pl.lowrank.method import Method, generator_for
from srlora_pl.util.errors import UserError

_HOLDER = "vera"


class VeRALinear(AdaptedLinear):
    """``lora_d`` (r,) and ``lora_b`` (out,) train; they scale the leading slices of the shared A and B."""

    adapter_names = ("lora_d", "lora_b")

    def build(self, p: tuple[int, ...], out: int, in_: int) -> None:
        self.lora_d = nn.Parameter(self.weight.new_zeros(math.prod(p) * self.rank))
        self.lora_b = nn.Parameter(self.weight.new_zeros(math.prod(p) * out))
        self._p = p

    def factors(self) -> tuple[Tensor, Tensor]:
        (shared,) = self.shared
        d, b = (vector.view(*self._p, -1, 1) for vector in (self.lora_d, self.lora_b))
        return b * shared.shared_B[: b.shape[-2], : self.rank], d * shared.shared_A[: self.rank, : self.in_features]


class VeRA(Method):
    """Two vectors a matrix scale random factors, frozen, that the whole network shares: dW = diag(b) B diag(d) A.

    A (r, largest in) and B (largest out, r) are Kaiming-uniform with gain sqrt 2; a smaller matrix takes their leading
    slices, and b = 0 at the start. The rank may be above min(out, in). Learning rates are some ten times LoRA's.

    Args:
        rank: rows of A, r.
        d_initial: what all of d starts from.
        kwargs: see `Method`. ``alpha`` has no meaning here: s = 1.

    Raises:
        UserError: a value outside its range; an ``alpha_pattern``, or ``use_rslora``.
    """

    layer = VeRALinear
    limits_rank = False

    def __init__(self, rank: int = 256, *, d_initial: float = 0.1, **kwargs: Any) -> None:
        super().__init__(rank, **kwargs)
        self.d_initial = d_initial
        if not (d_initial != 0 and math.isfinite(d_initial)):
            raise UserError(f"method.d_initial is {d_initial}, it must be a finite number other than 0")
        for name in ("alpha_pattern", "use_rslora"):
            if getattr(self, name):
                raise UserError(f"method.{name} is {getattr(self, name)}, but VeRA has no alpha: leave it out")

    def scaling_of(self, layer: str) -> float:
        return 1.0

    def frozen_adapter(self) -> tuple[str, ...]:
        return ("shared_A", "shared_B")

    def inject(self, net: nn.Module, taken: Sequence[str]) -> dict[str, Adapter]:
        layers = super().inject(net, taken)
        matrices = [matrix for name, layer in layers.items() for matrix in layer.matrices(name)]
        rank = max(matrix.rank for matrix in matrices)
        out, in_ = (max(sizes) for sizes in zip(*(matrix.shape for matrix in matrices), strict=True))
        generator = generator_for(_HOLDER)
        A, B = (torch.empty(shape) for shape in ((rank, in_), (out, rank)))
        for factor in (A, B):
            bound = math.sqrt(6 / factor.shape[1])
            factor.uniform_(-bound, bound, generator=generator)
        holder = SharedFactors(A, B, matrices[0].weight)
        for matrix in matrices:
            matrix.layer.shared = [holder]
        net.add_module(_HOLDER, holder)
        return {**layers, _HOLDER: holder}

    def initialize(self, matrix: Matrix) -> None:
        matrix.of(matrix.layer.get_parameter("lora_d").detach()).fill_(self.d_initial)
