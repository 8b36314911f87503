"""Other directions for re-drawn pairs than the next singular ones: the gradient's, and random ones.

Names for ``model.method.class_path``: SRLoRA but for the directions. They count what they draw as SRLoRA counts
singular directions, up to ``target_rank``.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srlora_pl.lowrank import SRLoRA
from srlora_pl.lowrank.linear import Matrix
from srlora_pl.lowrank.method import AdaptedNetwork, generator_for
from srlora_pl.lowrank.methods.recording import Recording
from srlora_pl.lowrank.methods.switching import Switching
from srlora_pl.lowrank.starts.spectrum import Spectrum
from srlora_pl.lowrank.switch_records import Pairs

WINDOW = 4  # steps before a switch whose gradients add up


class RandomDirections(SRLoRA):
    """Pairs along random directions."""

    def controller(self, adaptation: AdaptedNetwork) -> Switching:
        return _Random(self, adaptation)


class GradientDirections(SRLoRA):
    """Pairs along the leading directions of dL/dW_eff that the pairs which stay cannot reach.

    With Q_B and Q_A orthonormal bases of these pairs' columns and rows they are singular vectors of
    (I - Q_B Q_B^T) G (I - Q_A Q_A^T).
    """

    def controller(self, adaptation: AdaptedNetwork) -> Switching:
        return _ByGradient(self, adaptation)


class _Unknown(Recording):
    """How far pairs are from what they were drawn as is not known: that is no part of the spectrum."""

    def look(self, *args: Any) -> Pairs:
        pairs = super().look(*args)
        return pairs._replace(changes=torch.full_like(pairs.changes, torch.nan))


class _Random(Switching):
    def __init__(self, method: SRLoRA, adaptation: AdaptedNetwork) -> None:
        super().__init__(method, adaptation)
        self.recording = _Unknown()

    def directions_of(self, matrix: Matrix, recycled: Tensor) -> tuple[Tensor, Tensor]:
        """Orthonormal U (out, r') and Vh (r', in)."""
        drawn = len(self.intervals[matrix.name])
        generator = generator_for(f"{matrix.name} {drawn}", self.adaptation.seed)
        U, V = (torch.randn(n, len(recycled), dtype=torch.float64, generator=generator) for n in matrix.shape)
        return torch.linalg.qr(U).Q.to(matrix.A), torch.linalg.qr(V).Q.T.to(matrix.A)

    def redrawn(self, matrix: Matrix, recycled: Tensor, spectrum: Spectrum) -> tuple[Tensor, Tensor]:
        B, A = super().redrawn(matrix, recycled, spectrum)
        U, Vh = self.directions_of(matrix, recycled)
        return U * B.norm(dim=0), A.norm(dim=1)[:, None] * Vh


class _ByGradient(_Random):
    def __init__(self, method: SRLoRA, adaptation: AdaptedNetwork) -> None:
        super().__init__(method, adaptation)
        self._listens = False
        self._gradients: dict[str, Tensor] = {}
        for name, layer in adaptation.layers.items():
            layer.register_forward_hook(partial(self._listen, name))

    def _listen(self, name: str, layer: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> None:
        if self._listens and output.requires_grad:
            x = inputs[0].detach().flatten(0, -2)
            output.register_hook(lambda dy: self._add(name, dy.flatten(0, -2).T @ x))

    def _add(self, name: str, gradient: Tensor) -> None:
        self._gradients[name] = gradient + self._gradients.get(name, 0)

    def after_optimizer(self, step: int, optimizer: Optimizer | None) -> bool:
        switched = super().after_optimizer(step, optimizer)
        if switched:
            self._gradients.clear()
        coming = self.progress().next_step
        self._listens = coming is not None and coming - step <= WINDOW
        return switched

    def directions_of(self, matrix: Matrix, recycled: Tensor) -> tuple[Tensor, Tensor]:
        G: Any = matrix.of_weight(self._gradients[matrix.layer_name])
        stay = [k for k in range(matrix.rank) if k not in recycled.tolist()]
        Q_B, Q_A = torch.linalg.qr(matrix.B[:, stay]).Q, torch.linalg.qr(matrix.A[stay].T).Q
        G = G - Q_B @ (Q_B.T @ G)
        G = G - (G @ Q_A) @ Q_A.T
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        return U[:, : len(recycled)], Vh[: len(recycled)]
