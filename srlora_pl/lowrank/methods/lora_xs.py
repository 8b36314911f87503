"""LoRA-XS (Balazy et al. 2024, arXiv 2405.17604)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from srlora_pl.lowrank.linear import LowRankLinear, Matrix
from srlora_pl.lowrank.method import AdaptedNetwork, Method, ShowProgress, Sources, generator_for
from srlora_pl.lowrank.starts.spectrum import Spectrum, spectra
from srlora_pl.util.errors import UserError


class CoreLinear(LowRankLinear):
    """``lora_R`` (r, r) trains between ``lora_B`` (out, r) and ``lora_A`` (r, in), which are frozen."""

    adapter_names = ("lora_A", "lora_B", "lora_R")

    def build(self, p: tuple[int, ...], out: int, in_: int) -> None:
        super().build(p, out, in_)
        self.lora_R = nn.Parameter(self.weight.new_zeros(*p, self.rank, self.rank))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_B, self.lora_R @ self.lora_A


class LoRAXS(Method):
    """A core R between the leading singular directions of the weight: dW = s B R A with B = U_r, A = diag(sigma) V_r^T.

    Args:
        rank: r; r x r numbers train in each matrix.
        alpha: strength; s = alpha / rank.
        init_std: of the normal distribution that R starts from.
        kwargs: see `Method`.

    Raises:
        UserError: a value outside its range.
    """

    layer = CoreLinear
    starts_from = "spectrum"
    compensates = False  # R starts near 0, not at it

    def __init__(self, rank: int = 8, *, alpha: float = 16.0, init_std: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(rank, alpha=alpha, **kwargs)
        self.init_std = init_std
        if not 0 <= init_std < float("inf"):
            raise UserError(f"method.init_std is {init_std}, it must be 0 or a positive number")

    def frozen_adapter(self) -> tuple[str, ...]:
        return ("lora_A", "lora_B")

    def sources(self, progress: ShowProgress = iter, cache: Path | None = None) -> Sources:
        return spectra(progress, cache)

    def start(self, adaptation: AdaptedNetwork, matrix: Matrix, source: Spectrum) -> None:
        source.require(matrix.rank, matrix.name)
        leading = source.first(matrix.rank)
        matrix.B.copy_(leading.U)
        matrix.A.copy_(leading.sigma[:, None] * leading.Vh)
        R = matrix.of(matrix.layer.get_parameter("lora_R").detach())
        R.copy_(torch.randn(R.shape, generator=generator_for(matrix.name, adaptation.seed)) * self.init_std)
