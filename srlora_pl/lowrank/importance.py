"""How important each pair is: AdaLoRA's smoothed sensitivity times uncertainty (Eq. 3 to 7)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from srlora_pl.lowrank.layer import LowRankLinear, Matrix


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
        self.parameters = [p for layer in layers for p in (layer.lora_A, layer.lora_B)]
        self.beta1, self.beta2 = beta1, beta2
        self.smoothed = torch.zeros(sum(p.numel() for p in self.parameters), dtype=self.parameters[0].dtype)
        self.uncertainty = torch.zeros_like(self.smoothed)

    @torch.no_grad()
    def update(self, finite: Tensor, inverse_scale: Tensor | None = None) -> None:
        """Take in one step, from the weights before the update and the gradients of that step.

        Args:
            finite: bool scalar on the device; where it is False the step must leave no trace (a single NaN would
                stay in the averages for good).
            inverse_scale: scalar that undoes the loss scale of gradients that nobody has unscaled.
        """
        weight = torch.cat([p.detach().flatten() for p in self.parameters])
        grad = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters])
        self.smoothed, self.uncertainty = self.smoothed.to(weight), self.uncertainty.to(weight)
        sensitivity = weight.mul_(grad).abs_()  # Eq. 3
        if inverse_scale is not None:
            sensitivity *= inverse_scale
        smoothed = torch.lerp(self.smoothed, sensitivity, 1 - self.beta1)  # Eq. 4
        deviation = sensitivity.sub_(smoothed).abs_()
        uncertainty = torch.lerp(self.uncertainty, deviation, 1 - self.beta2)  # Eq. 5, with the new average
        self.smoothed = torch.where(finite, smoothed, self.smoothed)
        self.uncertainty = torch.where(finite, uncertainty, self.uncertainty)

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

    def reset(self, recycled: dict[Matrix, Tensor] | None = None) -> None:
        """Start the averages anew: all of them, or only those of the ``recycled`` pairs (indices per matrix)."""
        for buffer in (self.smoothed, self.uncertainty):
            if recycled is None:
                buffer.zero_()
                continue
            views = self._split(buffer)
            for matrix, pairs in recycled.items():
                matrix.of_A(views[id(matrix.layer.lora_A)])[pairs] = 0
                matrix.of_B(views[id(matrix.layer.lora_B)])[:, pairs] = 0


@torch.no_grad()
def all_finite(gradients: Sequence[Tensor]) -> Tensor:
    """Whether no gradient holds a NaN or an infinity: a bool scalar on the device, not read here."""
    largest = torch._foreach_norm(list(gradients), ord=float("inf"))
    return torch.isfinite(torch.stack([value.float() for value in largest])).all()
