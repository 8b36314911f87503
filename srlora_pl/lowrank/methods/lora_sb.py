"""LoRA-SB (Ponkshe et al. 2024, arXiv 2411.19557)."""

from typing import Any, Literal

import torch
from torch import Tensor

from srlora_pl.lowrank.linear import Matrix
from srlora_pl.lowrank.method import AdaptedNetwork, Gradient, Method, generator_for
from srlora_pl.lowrank.methods.lora_xs import CoreLinear
from srlora_pl.lowrank.starts.spectrum import Spectrum
from srlora_pl.util.errors import UserError, require_one_of


class LoRASB(Method):
    """A core R between orthonormal B and A that starts at the first step of full fine-tuning (Eq. 7 to 11).

    With D the first step, dW = s B R A starts as the best approximation of D of rank r; it is not taken off the weight.

    Args:
        rank: r; r x r numbers train in each matrix.
        alpha: strength; s = alpha / rank; None is s = 1, as in the paper.
        gradient_samples: how many training samples the first step is estimated from; below 1 a share of them, of at
            least 2.
        first_step: of the optimizer that full fine-tuning would use: ``adamw``, -lr sign(G), or ``sgd``, -lr G.
        kwargs: see `Method`.

    Raises:
        UserError: a value outside its range; an ``alpha_pattern`` or ``use_rslora`` without ``alpha``.
    """

    layer = CoreLinear
    starts_from = "gradient"
    compensates = False

    def __init__(
        self,
        rank: int = 8,
        *,
        alpha: float | None = None,
        gradient_samples: float = 0.001,
        first_step: Literal["adamw", "sgd"] = "adamw",
        **kwargs: Any,
    ) -> None:
        super().__init__(rank, alpha=rank if alpha is None else alpha, **kwargs)
        self.alpha, self.gradient_samples, self.first_step = alpha, gradient_samples, first_step  # type: ignore[assignment]
        require_samples(gradient_samples)
        require_one_of("method.first_step", first_step, ("adamw", "sgd"))
        for name in ("alpha_pattern", "use_rslora") if alpha is None else ():
            if value := getattr(self, name):
                raise UserError(f"method.{name} is {value}, but without method.alpha s is 1: give that too, or neither")

    def scaling_of(self, layer: str) -> float:
        return 1.0 if self.alpha is None else super().scaling_of(layer)

    def frozen_adapter(self) -> tuple[str, ...]:
        return ("lora_A", "lora_B")

    def step_of(self, gradient: Gradient) -> Tensor:
        if gradient.lr is None:
            raise UserError("LoRASB starts with a first step, give gradients() its lr")
        G = gradient.total.sign() if self.first_step == "adamw" else gradient.total / gradient.samples
        return -gradient.lr * G

    def start(self, adaptation: AdaptedNetwork, matrix: Matrix, source: Spectrum) -> None:
        generator = generator_for(matrix.name, adaptation.seed)
        matrix.B.copy_(_completed(source.U, matrix.rank, generator))
        matrix.A.copy_(_completed(source.Vh.T, matrix.rank, generator).T)
        R = matrix.of(matrix.layer.get_parameter("lora_R").detach())
        R.zero_().diagonal()[: len(source)] = source.sigma / matrix.scaling


def _completed(columns: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Orthonormal ``columns`` (n, k) and random ones orthogonal to them, (n, count).

    A first step of rank k < r is its own best approximation; the other directions start at 0 and train.
    """
    n, k = columns.shape
    more = torch.randn(n, count - k, generator=generator, dtype=columns.dtype)
    return torch.cat([columns, torch.linalg.qr(torch.cat([columns, more], 1)).Q[:, k:]], 1)


def require_samples(gradient_samples: float) -> None:
    """Refuse a count of samples that is no positive share and no whole number."""
    if not (0 < gradient_samples < 1 or (gradient_samples >= 1 and float(gradient_samples).is_integer())):
        raise UserError(
            f"method.gradient_samples is {gradient_samples}, it must be a share between 0 and 1 or a whole number"
        )
