"""LoRA-GA (Wang, Yu and Li 2024, arXiv 2407.05000)."""

from typing import Any, Literal

import torch
from torch import Tensor

from srlora_pl.lowrank.linear import Matrix
from srlora_pl.lowrank.method import AdaptedNetwork, Method, generator_for
from srlora_pl.lowrank.methods.lora_sb import require_samples
from srlora_pl.lowrank.starts.spectrum import Spectrum
from srlora_pl.util.errors import UserError, require_one_of

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "gd", "unit", "weights")


class LoRAGA(Method):
    """LoRA whose pairs start on singular directions of the gradient, so that the first step is full fine-tuning's.

    With G = U S V^T: A = c V^T and B = c U of r directions each, and W loses s B A, so that the output stays.

    Args:
        rank: pairs per matrix, r; the gradient needs 2 r directions.
        alpha: strength; the authors' results use ``use_rslora``, s = alpha / sqrt(rank).
        gradient_samples: how many training samples the gradient is estimated from; below 1 a share of them, of at
            least 2.
        direction: A from the first r directions and B from the next (``ArB2r``), or the other way round (``A2rBr``);
            ``ArBr``: A from the even ones and B from the odd ones of 2 r; ``random``: halves of them at random.
        scale: c: ``stable``, out^(1/4) / sqrt(gamma); ``gd``, 1 / s; ``unit``, 1; ``weights``, the mean of
            sqrt(sigma / s) over the first r singular values of W0.
        gamma: of ``stable``.
        norm_clip: shrink the pairs where the largest entry of s B A is above that of W0.
        kwargs: see `Method`.

    Raises:
        UserError: a value outside its range.
    """

    starts_from = "gradient"
    moves_weights = True

    def __init__(
        self,
        rank: int = 8,
        *,
        alpha: float = 16.0,
        gradient_samples: float = 128,
        direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r",
        scale: Literal["stable", "gd", "unit", "weights"] = "stable",
        gamma: float = 16.0,
        norm_clip: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(rank, alpha=alpha, **kwargs)
        self.gradient_samples, self.direction, self.scale = gradient_samples, direction, scale
        self.gamma, self.norm_clip = gamma, norm_clip
        require_samples(gradient_samples)
        require_one_of("method.direction", direction, DIRECTIONS)
        require_one_of("method.scale", scale, SCALES)
        if not 0 < gamma < float("inf"):
            raise UserError(f"method.gamma is {gamma}, it must be a positive number")

    def directions(self, matrix: Matrix) -> int:
        return 2 * matrix.rank

    def start(self, adaptation: AdaptedNetwork, matrix: Matrix, source: Spectrum) -> None:
        source.require(2 * matrix.rank, matrix.name)
        of_A, of_B = self._chosen(matrix, adaptation.seed)
        c = self._scale(matrix)
        A, B = c * source.Vh[of_A].to(matrix.A), c * source.U[:, of_B].to(matrix.A)
        if self.norm_clip:
            ratio = matrix.weight.abs().max() / (matrix.scaling * (B @ A).abs().max())
            shrink = ratio.clamp(max=1).sqrt()
            A, B = shrink * A, shrink * B
        adaptation.add(matrix, B, A, -matrix.scaling)
        matrix.A.copy_(A)
        matrix.B.copy_(B)

    def _chosen(self, matrix: Matrix, seed: int) -> tuple[Tensor, Tensor]:
        """The directions of A and of B, (r,) each."""
        r, all_ = matrix.rank, torch.arange(2 * matrix.rank)
        if self.direction == "ArBr":
            return all_[::2], all_[1::2]
        if self.direction == "random":
            all_ = torch.randperm(2 * r, generator=generator_for(matrix.name, seed))
        first, second = all_[:r], all_[r:]
        return (second, first) if self.direction == "A2rBr" else (first, second)

    def _scale(self, matrix: Matrix) -> float:
        """c."""
        if self.scale == "stable":
            return matrix.shape[0] ** 0.25 / self.gamma**0.5
        if self.scale == "weights":
            sigma = torch.linalg.svdvals(matrix.weight.double())[: matrix.rank]
            return float((sigma / matrix.scaling).sqrt().mean())
        return 1 / matrix.scaling if self.scale == "gd" else 1.0
