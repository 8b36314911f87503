"""LoRA-Pro (Wang et al. 2024, arXiv 2407.18242)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from srlora_pl.lowrank.method import AdaptedNetwork
from srlora_pl.lowrank.methods.lora import LoRA
from srlora_pl.lowrank.own_optimizer import OwnOptimizer
from srlora_pl.util.errors import UserError
from srlora_pl.util.precision import float64_device

_DAMPING = 1e-8


class LoRAProOptimizer(OwnOptimizer):
    """Trains pairs so that B A changes as closely as it can to how a full weight would (Theorem 1).

    An own group holds A (..., r, in) and B (..., out, r) in turns, with ``rank`` and ``scaling``. The moments are those
    of the change of W, (..., out, in), in the state of B. It waits for the device once a step and group.
    """

    own = ("rank", "scaling")

    def step_own(self, group: dict[str, Any]) -> None:
        ours = zip(group["params"][::2], group["params"][1::2], strict=True)
        pairs = [(A, B) for A, B in ours if A.grad is not None and B.grad is not None]
        if not pairs:
            return
        grams = torch.cat([_grams(A, B) for A, B in pairs])
        finite = grams.isfinite().all(-1).all(-1)[:, None, None]  # otherwise so are the gradients, which is seen later
        values, vectors = torch.linalg.eigh(torch.where(finite, grams, torch.zeros_like(grams)))
        sizes = [2 * A.shape[:-2].numel() for A, _ in pairs]
        for (A, B), of_pair, vectors_of_pair in zip(pairs, values.split(sizes), vectors.split(sizes), strict=True):
            shape = (2, *A.shape[:-2])
            spectra = (of_pair.unflatten(0, shape), vectors_of_pair.unflatten(0, shape))
            self._step_pair(Pair(A, B, group["scaling"], *spectra), group)

    def _step_pair(self, pair: "Pair", group: dict[str, Any]) -> None:
        h_A, h_B = pair.closest(pair.A.grad, pair.B.grad)  # type: ignore[arg-type]
        G = self.direction(pair.B, pair.scaling * (pair.B @ h_A + h_B @ pair.A), group)
        g_A, g_B = pair.scaling * pair.B.mT @ G, pair.scaling * G @ pair.A.mT
        h_A, h_B = pair.closest(g_A, g_B)
        X = pair.shift(g_A)
        h_A, h_B = h_A + X @ pair.A, h_B - pair.B @ X
        self.move(pair.A, h_A, group)
        self.move(pair.B, h_B, group)


def _grams(A: Tensor, B: Tensor) -> Tensor:
    """B^T B and A A^T, (2 p, r, r), float64."""
    A, B = (each.to(float64_device(each.device)).double() for each in (A, B))
    return torch.stack([B.mT @ B, A @ A.mT]).flatten(0, -3)


class Pair:
    """A and B at one step, s, and the spectra of B^T B and of A A^T, which are damped: B starts at 0."""

    def __init__(self, A: Tensor, B: Tensor, scaling: float, values: Tensor, vectors: Tensor) -> None:
        self.A, self.B, self.scaling = A, B, scaling
        self._values, self._vectors = values.clamp(min=0) + _DAMPING, vectors
        inverses = (vectors / self._values[..., None, :]) @ vectors.mT
        self.inverse_BB, self.inverse_AA = inverses.to(A)

    def closest(self, g_A: Tensor, g_B: Tensor) -> tuple[Tensor, Tensor]:
        """The changes of A and B for which s (B h_A + h_B A) is closest to the gradient of W (Eq. 9, with X = 0).

        Args:
            g_A, g_B: the gradients of A and B.
        """
        outside = g_B - self.B @ (self.inverse_BB @ (self.B.mT @ g_B))
        return self.inverse_BB @ g_A / self.scaling**2, outside @ self.inverse_AA / self.scaling**2

    def shift(self, g_A: Tensor) -> Tensor:
        """X (r, r): of all changes that are as close, A + X A and B - B X are nearest to the gradients (Theorem 3).

        It solves B^T B X + X A A^T = -(B^T B)^-1 g_A A^T / s^2.
        """
        right = (self.inverse_BB @ g_A @ self.A.mT / -(self.scaling**2)).to(self._values)
        (b, a), (U, V) = self._values, self._vectors
        return (U @ ((U.mT @ right @ V) / (b[..., :, None] + a[..., None, :])) @ V.mT).to(self.A)


class LoRAPro(LoRA):
    """LoRA whose optimizer follows full fine-tuning: its moments are those of the full weight, 2 out x in numbers.

    Raises:
        UserError: see `Method`; or ``lr_ratio`` is not 1.
    """

    own_optimizer = LoRAProOptimizer

    def __init__(self, rank: int = 8, **kwargs: Any) -> None:
        super().__init__(rank, **kwargs)
        if self.lr_ratio != 1:
            raise UserError(
                f"method.lr_ratio is {self.lr_ratio}, but the changes of A and B that LoRAPro finds belong together: "
                "leave it at 1"
            )

    def own_settings(self, adaptation: AdaptedNetwork) -> Mapping[int, dict[str, Any]]:
        adapters = adaptation.layers.values()
        ranks_and_scalings = {id(p): (each.rank, each.scaling) for each in adapters for p in each.adapter_parameters()}
        return {key: {"rank": rank, "scaling": scaling} for key, (rank, scaling) in ranks_and_scalings.items()}
