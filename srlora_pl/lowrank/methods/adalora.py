"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512)."""

import math
from typing import Any

from torch import Tensor, nn

from srlora_pl.lowrank.linear import AdaptedLinear, Matrix
from srlora_pl.lowrank.method import AdaptedNetwork, Method, generator_for
from srlora_pl.lowrank.methods.budget import Budget
from srlora_pl.util.errors import UserError


class TripletLinear(AdaptedLinear):
    """``lora_E`` (r,) between ``lora_B`` (out, r) and ``lora_A`` (r, in); a triplet whose E is 0 does not act."""

    adapter_names = ("lora_A", "lora_B", "lora_E")

    def build(self, p: tuple[int, ...], out: int, in_: int) -> None:
        self.lora_A = nn.Parameter(self.weight.new_zeros(*p, self.rank, in_))
        self.lora_B = nn.Parameter(self.weight.new_zeros(*p, out, self.rank))
        self.lora_E = nn.Parameter(self.weight.new_zeros(math.prod(p) * self.rank))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_B, self.lora_E.view(*self.lora_A.shape[:-1], 1) * self.lora_A

    def acting(self) -> Tensor:
        return (self.lora_E.detach() != 0).view(self.lora_A.shape[:-1])


class AdaLoRA(Method):
    """dW = s B diag(E) A with B and A kept near orthonormal, of whose triplets the least important lose their E.

    The budget, the triplets of all matrices together, falls from ``init_rank`` to ``rank`` for each matrix on average,
    so that important matrices keep more than others. s = alpha / (init_rank + 1e-5), as in the authors' code.

    Args:
        rank: triplets per matrix at the end, on average; ``rank_pattern`` changes a layer's share of the budget.
        init_rank: triplets per matrix at the beginning; by default 1.5 times ``rank``.
        initial_share: of the run's steps, before the budget begins to fall.
        final_share: of the run's steps, after the budget is reached; the triplets stay the same there.
        interval_share: of the run's steps, from one choice of triplets to the next.
        beta1: decay of the smoothed sensitivity.
        beta2: decay of its uncertainty.
        orthogonality: weight of the mean of ||A A^T - I|| and ||B^T B - I|| in what training minimises. It reaches the
            gradients only; a loss that is logged is without it.
        kwargs: see `Method`.

    Raises:
        UserError: a value outside its range.
    """

    layer = TripletLinear
    averages = False  # an average of E before and after a choice would bring back triplets that are gone

    def __init__(
        self,
        rank: int = 8,
        *,
        init_rank: int | None = None,
        initial_share: float = 0.1,
        final_share: float = 0.3,
        interval_share: float = 0.001,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orthogonality: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(rank, **kwargs)
        self.init_rank = math.ceil(1.5 * rank) if init_rank is None else init_rank
        self.initial_share, self.final_share, self.interval_share = initial_share, final_share, interval_share
        self.beta1, self.beta2, self.orthogonality = beta1, beta2, orthogonality
        if not isinstance(self.init_rank, int) or self.init_rank < rank:
            raise UserError(f"method.init_rank is {init_rank}, it must be a whole number of at least the rank {rank}")
        for value, where in ((beta1, "beta1"), (beta2, "beta2")):
            if not 0 < value < 1:
                raise UserError(f"method.{where} is {value}, it must lie between 0 and 1")
        for value, where in ((initial_share, "initial_share"), (final_share, "final_share")):
            if not 0 <= value < 1:
                raise UserError(f"method.{where} is {value}, it must lie in [0, 1)")
        if initial_share + final_share >= 1:
            raise UserError(
                f"method.initial_share {initial_share} and final_share {final_share} leave no step in which the budget "
                "could fall: their sum must be below 1"
            )
        if not 0 <= interval_share <= 1:
            raise UserError(f"method.interval_share is {interval_share}, it must lie in [0, 1]")
        if not 0 <= orthogonality < math.inf:
            raise UserError(f"method.orthogonality is {orthogonality}, it must be 0 or a positive number")

    def target_of(self, layer: str) -> int:
        """The layer's share of the final budget, for each of its matrices."""
        return super().rank_of(layer)

    def rank_of(self, layer: str) -> int:
        return round(self.target_of(layer) * self.init_rank / self.rank)

    def scaling_of(self, layer: str) -> float:
        rank = self.rank_of(layer)
        return super().scaling_of(layer) * rank / (rank + 1e-5)

    def initialize(self, matrix: Matrix) -> None:
        generator = generator_for(matrix.name)
        for factor in (matrix.A, matrix.B):
            drawn = factor.new_empty(factor.shape, device="cpu").normal_(std=0.02, generator=generator)
            factor.copy_(drawn)

    def controller(self, adaptation: AdaptedNetwork) -> Budget:
        return Budget(self, adaptation)
