"""AdaLoRA's importance of every adapter element: smoothed sensitivity times uncertainty (Eq. 3 to 6)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from srlora_pl.lowrank.linear import AdaptedLinear, Matrix
from srlora_pl.lowrank.shards import own_part


class Importance:
    """Running averages over every element of every adapter parameter, in two flat buffers.

    One flat buffer for all layers makes an update a dozen kernels whatever the number of layers, and none of them
    waits for the device.

    Args:
        layers: the adapted layers; the parameters of each lie one behind the other in the buffers.
        beta1: decay of the smoothed sensitivity, Eq. 4.
        beta2: decay of the uncertainty, Eq. 5.
    """

    def __init__(self, layers: Sequence[AdaptedLinear], beta1: float, beta2: float) -> None:
        self.layers, self.beta1, self.beta2 = layers, beta1, beta2
        self.smoothed = torch.zeros(sum(p.numel() for p in self.parameters), dtype=self.parameters[0].dtype)
        self.uncertainty = torch.zeros_like(self.smoothed)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for layer in self.layers for p in layer.adapter_parameters()]

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor], inverse_scale: Tensor | None = None) -> None:
        """Take in one step, from the weights before the update and the gradients of that step.

        Where a gradient is NaN or infinite, the step leaves no trace: a single NaN would stay in the averages for good.

        Args:
            gradients: all that must be finite.
            inverse_scale: scalar that undoes the loss scale of gradients that nobody has unscaled.
        """
        weights: list[Tensor] = [*self.parameters]
        if all(p.grad is None for p in weights):
            return  # a step that was left out
        own = {id(p.grad) for p in weights}
        finite = all_finite([each for each in gradients if id(each) not in own])
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
        sensitivity = torch.cat([each.flatten() for each in torch._foreach_mul(weights, grads)]).abs_()  # Eq. 3
        finite = finite & sensitivity.amax().isfinite()
        if inverse_scale is not None:
            sensitivity *= inverse_scale
        self.average(sensitivity, finite)

    def average(self, sensitivity: Tensor, finite: Tensor) -> None:
        """Take in the ``sensitivity`` of one step, like the buffers and overwritten, unless the step is not ``finite``.

        Args:
            finite: a bool scalar on the device.
        """
        self.smoothed, self.uncertainty = self.smoothed.to(sensitivity), self.uncertainty.to(sensitivity)
        # In Eq. 5 |I - new average| is beta1 |I - old average|, so one difference serves both, and 0 leaves no trace.
        difference = sensitivity.sub_(self.smoothed).masked_fill_(~finite, 0)
        self.smoothed.add_(difference, alpha=1 - self.beta1)  # Eq. 4
        self.uncertainty *= 1 - (1 - self.beta2) * finite.to(self.uncertainty)
        self.uncertainty.add_(difference.abs_(), alpha=(1 - self.beta2) * self.beta1)  # Eq. 5

    def of(self, matrices: Sequence[Matrix], flat: Tensor) -> list[dict[str, Tensor]]:
        """Views of ``flat``, a tensor like the buffers, that belong to each of ``matrices``, by parameter name."""
        parameters = self.parameters
        chunks = flat.split([p.numel() for p in parameters])
        views = {id(p): chunk.view_as(p) for p, chunk in zip(parameters, chunks, strict=True)}
        return [{n: m.of(views[id(getattr(m.layer, n))]) for n in m.layer.adapter_names} for m in matrices]

    def scores(self, matrices: Sequence[Matrix]) -> list[dict[str, Tensor]]:
        """The importance of every element (Eq. 6), by parameter name for each of ``matrices``."""
        return self.of(matrices, self.smoothed * self.uncertainty)

    def state_dict(self) -> dict[str, Tensor]:
        return {"smoothed": self.smoothed.clone(), "uncertainty": self.uncertainty.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        device = self.smoothed.device
        self.smoothed = state["smoothed"].to(device, copy=True)
        self.uncertainty = state["uncertainty"].to(device, copy=True)


@torch.no_grad()
def all_finite(gradients: Sequence[Tensor]) -> Tensor:
    """Whether no gradient holds a NaN or an infinity: a bool scalar on the device, not read here.

    Of those that are split it looks at this process's part.
    """
    parts = [part for part in map(own_part, gradients) if part.numel()]
    if not parts:
        return torch.ones((), dtype=torch.bool)
    largest = torch._foreach_norm(parts, ord=float("inf"))
    return torch.isfinite(torch.stack([value.float() for value in largest])).all()
