"""The loss of predicted tokens, a few rows of logits at a time: all of them at once are rows x vocabulary numbers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states: ``z = scale * (h W^T + b)``, then ``cap * tanh(z / cap)`` (Gemma 2).

    Attributes:
        weight: W, (vocabulary, hidden).
        bias: b, (vocabulary,), where there is one.
        scale: 1 for most models.
        soft_cap: cap; None for none.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    def cast(self, dtype: torch.dtype) -> "Head":
        """With W and b in ``dtype``."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return Head(self.weight.to(dtype), bias, self.scale, self.soft_cap)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, hidden) -> (n, vocabulary), at least in float32 from the product on."""
        z = torch.nn.functional.linear(hidden, self.weight, self.bias)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        z = z if self.scale == 1 else z.mul_(self.scale)
        return z if self.soft_cap is None else z.div_(self.soft_cap).tanh_().mul_(self.soft_cap)

    def logits_gradient(self, dz: Tensor, z: Tensor) -> Tensor:
        """The gradient of ``h W^T + b``, from that of the logits z; changes ``dz``."""
        dz = dz if self.soft_cap is None else dz.mul_(1 - (z / self.soft_cap).square_())
        return dz if self.scale == 1 else dz.mul_(self.scale)


def summed_loss(hidden: Tensor, target: Tensor, head: Head, chunk: int) -> Tensor:
    """The sum over rows of -log p(target), a scalar; ``head.weight`` and ``head.bias`` get gradients if they train.

    The gradients are computed on the way forward, chunk by chunk, so that nothing but them waits for the backward pass.

    Args:
        hidden: (n, hidden).
        target: the right token of each row, int64 (n,).
        head: frozen or not.
        chunk: rows of logits in memory at a time.
    """
    return _SummedLoss.apply(hidden, head.weight, head.bias, target, head, chunk)


@torch.no_grad()
def token_losses(hidden: Tensor, target: Tensor, head: Head, chunk: int) -> tuple[Tensor, Tensor]:
    """-log p(target) of each row, (n,), and whether the most probable token is the target, bool (n,)."""
    losses, right = [hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))], [target[:0].bool()]
    dtype = _computed_in(hidden)
    head = head.cast(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _chunks(len(target), chunk):
            z = head.logits(hidden[rows].to(dtype))
            losses.append(z.logsumexp(-1) - z.gather(1, target[rows, None])[:, 0])
            right.append(z.argmax(-1) == target[rows])
    return torch.cat(losses), torch.cat(right)


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, head: Head, chunk: int
    ) -> Tensor:
        for_hidden, for_weight, for_bias, *_ = ctx.needs_input_grad
        dtype = _computed_in(hidden)
        exact = torch.promote_types(dtype, torch.float32)
        total = hidden.new_zeros((), dtype=exact)
        dh = torch.empty_like(hidden) if for_hidden else None
        dW = torch.zeros_like(weight, dtype=exact) if for_weight else None
        db = torch.zeros_like(bias, dtype=exact) if for_bias and bias is not None else None
        head = head.cast(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(len(target), chunk):
                h, wanted = hidden[rows].to(dtype), target[rows, None]
                z = head.logits(h)
                norm = z.logsumexp(-1, keepdim=True)
                total += (norm - z.gather(1, wanted)).sum()
                # d loss / d z = softmax(z) - onehot(target); z itself is needed again only below a soft cap.
                dz = (z - norm if head.soft_cap else z.sub_(norm)).exp_()
                dz.scatter_add_(1, wanted, dz.new_full((1, 1), -1.0).expand_as(wanted))
                dz = head.logits_gradient(dz, z)
                if db is not None:
                    db += dz.sum(0)
                dz = dz.to(dtype)
                if dh is not None:
                    dh[rows] = dz @ head.weight
                if dW is not None:
                    dW += dz.T @ h
        ctx.save_for_backward(dh, dW, db)
        ctx.dtypes = [None if each is None else each.dtype for each in (hidden, weight, bias)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = [
            None if each is None else (each * gradient).to(dtype)
            for each, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *found, None, None, None


def _computed_in(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _chunks(rows: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, rows, size))
