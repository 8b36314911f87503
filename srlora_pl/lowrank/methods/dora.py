"""DoRA (Liu et al. 2024, arXiv 2402.09353)."""

import torch
from torch import Tensor, nn

from srlora_pl.lowrank.kernels import linear, low_rank_linear
from srlora_pl.lowrank.linear import LowRankLinear, Matrix
from srlora_pl.lowrank.method import Method, kaiming_uniform
from srlora_pl.lowrank.shards import whole


class DoRALinear(LowRankLinear):
    """``y = g * (x (W + s B A)^T) + bias``, with the gain g = m / (row norms of W + s B A).

    ``lora_magnitude`` is m (out,), ``weight_norm`` (out,) that of the frozen rows. The gradient takes the norms of
    W + s B A for constants (section 4.3).
    """

    adapter_names = ("lora_A", "lora_B", "lora_magnitude", "weight_norm")

    def build(self, p: tuple[int, ...], out: int, in_: int) -> None:
        super().build(p, out, in_)
        self.lora_magnitude = nn.Parameter(self.weight.new_zeros(len(self.adapted) * out))
        self.weight_norm = nn.Parameter(self.weight.new_zeros(len(self.adapted) * out))

    @torch.no_grad()
    def norms(self) -> Tensor:
        """The row norms of W + s B A, (adapted rows,), without a temporary of (out, in)."""
        with torch.autocast(self.weight.device.type, enabled=False):
            A, B = (each.view(-1, *each.shape[-2:]) for each in (self.lora_A, self.lora_B))
            parts = whole(self.weight).to(A.dtype).view(self.parts, -1, self.in_features)
            # ||W_i + s B_i A||^2 = ||W_i||^2 + s (2 W_i A^T + s B_i A A^T) B_i^T
            of_W = torch.stack([A_p @ parts[part].T for part, A_p in zip(self.adapted, A, strict=True)]).mT
            change = self.scaling * ((2 * of_W + self.scaling * B @ (A @ A.mT)) * B).sum(-1)
            # A row of zeros stays one.
            return (self.weight_norm.square() + change.flatten()).clamp(min=torch.finfo(change.dtype).tiny).sqrt()

    def gain(self) -> Tensor:
        """g (out,), differentiable; 1 in the rows that are not adapted."""
        gain = self.lora_magnitude / self.norms()
        if self._some_parts is None:
            return gain
        ones = torch.ones_like(gain[: self.out_features // self.parts])
        adapted = dict(zip(self.adapted, gain.chunk(len(self.adapted)), strict=True))
        return torch.cat([adapted.get(part, ones) for part in range(self.parts)])

    def magnitudes(self) -> Tensor:
        norms = torch.linalg.vector_norm(self.frozen.dense(), dim=1).view(self.parts, -1)
        norms[list(self.adapted)] = self.lora_magnitude.detach().view(len(self.adapted), -1)
        return norms.flatten()

    def adapted_forward(self, x: Tensor) -> Tensor:
        """With dropout the base part of the gain sees the dropped x too, as in the authors' code and PEFT's."""
        B, A = self.factors()
        gain = self.gain()  # in full precision also where y is not: half of it would lose a change below 0.4 %
        if self.training and self.dropout.p > 0:  # x W^T + (g - 1) x~ W^T + g s x~ A^T B^T + bias
            seen = self.dropout(x)
            y = low_rank_linear(seen, self.weight, None, A, B, self.scaling, self._some_parts)
            return (gain * y + linear(x - seen, self.weight, self.bias)).to(y.dtype)
        y = low_rank_linear(x, self.weight, self.bias, A, B, self.scaling, self._some_parts)
        # With the bias in y a gain of 1 changes no bit.
        return (gain * y if self.bias is None else torch.addcmul(self.bias * (1 - gain), gain, y)).to(y.dtype)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        weight = super().merged_weight()
        return weight if self.merged else self.gain()[:, None] * weight


class DoRA(Method):
    """LoRA's pairs turn the rows of the weight, a vector m of magnitudes sets their lengths.

    W_eff = diag(m / ||W + s B A||_row) (W + s B A); m starts at the row norms of the weight, A Kaiming-uniform, B = 0.
    """

    layer = DoRALinear
    additive = False
    rescales = True

    def frozen_adapter(self) -> tuple[str, ...]:
        return ("weight_norm",)

    def initialize(self, matrix: Matrix) -> None:
        matrix.A.copy_(kaiming_uniform(matrix.A.shape, matrix.name))
        for name in ("weight_norm", "lora_magnitude"):
            matrix.of(matrix.layer.get_parameter(name).detach()).copy_(matrix.weight.to(matrix.A.dtype).norm(dim=1))
