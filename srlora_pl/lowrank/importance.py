"""How important each pair is: AdaLoRA's smoothed sensitivity times uncertainty (Eq. 3 to 7)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from srlora_pl.lowrank.linear import LowRankLinear, Matrix


class Importance:
    """Running averages over every element of every pair, kept in two flat buffers.

    One flat buffer for all layers makes an update a dozen kernels whatever the number of layers, and none of them
    waits for the device.

    Args:
        layers: the adapted layers; ``lora_A`` then ``lora_B`` of each lie one behind the other in the buffers.
        beta1: decay of the smoothed sensitivity, Eq. 4.
        beta2: decay of the uncertainty, Eq. 5.
    """

    def __init__(self, layers: Sequence[LowRankLinear], beta1: float, beta2: float) -> None:
        self.layers = layers
        self.beta1, self.beta2 = beta1, beta2
        self.smoothed = torch.zeros(sum(p.numel() for p in self.parameters), dtype=self.parameters[0].dtype)
        self.uncertainty = torch.zeros_like(self.smoothed)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The pairs as they are now: loading with ``assign=True`` puts others into the layers."""
        return [p for layer in self.layers for p in (layer.lora_A, layer.lora_B)]

    @torch.no_grad()
    def update(self, finite: Tensor, inverse_scale: Tensor | None = None) -> None:
        """Take in one step, from the weights before the update and the gradients of that step.

        Args:
            finite: bool scalar on the device, whether the gradients of all else are finite. Where they are not, or
                these are not, the step leaves no trace (a single NaN would stay in the averages for good).
            inverse_scale: scalar that undoes the loss scale of gradients that nobody has unscaled.
        """
        weights: list[Tensor] = [*self.parameters]
        if all(p.grad is None for p in weights):
            return  # a step that was left out
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
        sensitivity = torch.cat([each.flatten() for each in torch._foreach_mul(weights, grads)]).abs_()  # Eq. 3
        self.smoothed, self.uncertainty = self.smoothed.to(sensitivity), self.uncertainty.to(sensitivity)
        finite = finite & sensitivity.amax().isfinite()
        if inverse_scale is not None:
            sensitivity *= inverse_scale
        # In Eq. 5 |I - new average| is beta1 |I - old average|, so one difference serves both, and 0 leaves no trace.
        difference = sensitivity.sub_(self.smoothed).masked_fill_(~finite, 0)
        self.smoothed.add_(difference, alpha=1 - self.beta1)  # Eq. 4
        self.uncertainty *= 1 - (1 - self.beta2) * finite.to(self.uncertainty)
        self.uncertainty.add_(difference.abs_(), alpha=(1 - self.beta2) * self.beta1)  # Eq. 5

    def _split(self, flat: Tensor) -> dict[int, Tensor]:
        """The buffer as one view per parameter, by the parameter's id."""
        chunks = flat.split([p.numel() for p in self.parameters])
        return {id(p): chunk.view_as(p) for p, chunk in zip(self.parameters, chunks, strict=True)}

    def pair_scores(self, matrices: Sequence[Matrix]) -> list[Tensor]:
        """S_k of every pair, (r,) for each of ``matrices`` (Eq. 6 and 7)."""
        score = self._split(self.smoothed * self.uncertainty)  # Eq. 6
        return [
            m.of_B(score[id(m.layer.lora_B)]).mean(0) + m.of_A(score[id(m.layer.lora_A)]).mean(1)  # Eq. 7
            for m in matrices
        ]

    def reset(self, recycled: Mapping[Matrix, Tensor | None] | None = None) -> None:
        """Start the averages anew: all, or those of some matrices, and of these all or some pairs (their indices)."""
        for buffer in (self.smoothed, self.uncertainty):
            if recycled is None:
                buffer.zero_()
                continue
            views = self._split(buffer)
            for matrix, some in recycled.items():
                pairs: Any = slice(None) if some is None else some
                matrix.of_A(views[id(matrix.layer.lora_A)])[pairs] = 0
                matrix.of_B(views[id(matrix.layer.lora_B)])[:, pairs] = 0


@torch.no_grad()
def all_finite(gradients: Sequence[Tensor]) -> Tensor:
    """Whether no gradient holds a NaN or an infinity: a bool scalar on the device, not read here."""
    if not gradients:
        return torch.ones((), dtype=torch.bool)
    largest = torch._foreach_norm(list(gradients), ord=float("inf"))
    return torch.isfinite(torch.stack([value.float() for value in largest])).all()
