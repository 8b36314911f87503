"""The product of the adapted layer, ``y = x (W + s B A)^T + b``: merged on the fly, or as two branches.

Merged: W_eff = W + s B A is built in the weight's precision, used for one product, and dropped; the backward pass
builds it again. That costs a pass over (out, in) values each way and saves passes over (rows, in) and (rows, out).

Two branches: the adapter's part goes first. BLAS adds x W^T to what is in y already, be it the bias alone or
[x A^T, 1] [s B, b]^T, and dY W to s (dY B) A; so the passes over y are those of a plain linear layer. In half precision
the adapter's part is rounded before the other, larger one is added to it, which keeps the sum nearly as exact as the
merged product.

The measurements behind the choice, and what was tried and not done, are in ``benchmarks/kernels.md``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Parts = tuple[int, ...] | None  # the adapted parts of a fused weight; None: all


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, adapted: Parts
) -> Tensor:
    """y = x (W + s B A)^T + bias, with gradients for all but the frozen weight.

    Args:
        x: (..., in).
        weight: (out, in), frozen.
        bias: (out,) or None.
        A: (r, in), or (p, r, in) for p adapted parts of a fused weight.
        B: (out, r), or (p, out / parts, r).
        scaling: s.
        adapted: which parts of a fused weight have pairs, when not all of them have.

    Returns:
        (..., out), in autocast's type where autocast is on.
    """
    rows, (out, in_) = x.numel() // x.shape[-1], weight.shape
    # A weight in half precision is read as it is by two branches, and no sum with it is rounded.
    halves = (torch.is_autocast_enabled(x.device.type) or x.dtype.itemsize == 2) and weight.dtype.itemsize > 2
    compute = merge_on_the_fly if merging_pays(rows, out, in_, halves, x.device) else two_branches
    return compute(x, weight, bias, A, B, scaling, adapted)


def merge_on_the_fly(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, adapted: Parts
) -> Tensor:
    """x (W + s B A)^T + bias as one product; shapes as in `low_rank_linear`."""
    with _outside_autocast(x, bias) as (x, bias):
        return _Merged.apply(x, weight, bias, A, B, scaling, adapted)


def two_branches(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    adapted: Parts,
    pairs_input: Tensor | None = None,
) -> Tensor:
    """x W^T + bias + s (x A^T) B^T; the pairs may see ``pairs_input``, x after dropout, instead of x."""
    with _outside_autocast(x, bias) as (x, bias):
        pairs_input = None if pairs_input is None else pairs_input.to(x.dtype)
        return _TwoBranches.apply(x, pairs_input, weight, bias, A, B, scaling, adapted)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, in autocast's type or else in that of x, whatever the types of W and bias."""
    if not torch.is_autocast_enabled(x.device.type):
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return F.linear(x, weight, bias)


def merging_pays(rows: int, out: int, in_: int, halves: bool, device: torch.device) -> bool:
    """Whether W_eff is worth building for ``rows`` tokens in half precision, or else; see `benchmarks/kernels.md`."""
    fewer_passes = rows * (in_ + out) >= in_ * out
    return halves and fewer_passes and (device.type != "cpu" or min(in_, out) < 768)


@contextmanager
def _outside_autocast(x: Tensor, bias: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Operands in autocast's type, where it is on, and inside no autocast: the kernels choose each type themselves."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    with torch.autocast(x.device.type, enabled=False):
        yield x, None if bias is None else bias.to(x.dtype)


def merged(weight: Tensor, A: Tensor, B: Tensor, scaling: float, adapted: Parts) -> Tensor:
    """W + s B A, (out, in), in the pairs' precision; shapes as in `low_rank_linear`."""
    weight = weight.to(A.dtype)
    if A.dim() == 2:
        return torch.addmm(weight, B, A, alpha=scaling)
    parts = weight.view(-1, B.shape[1], weight.shape[1])
    if adapted is None:
        return torch.baddbmm(parts, B, A, alpha=scaling).flatten(0, 1)
    result = parts.clone()
    for i, part in enumerate(adapted):
        result[part].addmm_(B[i], A[i], alpha=scaling)
    return result.flatten(0, 1)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, adapted: Parts
    ) -> Tensor:
        ctx.save_for_backward(x, weight, A, B)  # not W_eff: it would be kept for every layer at once
        ctx.scaling, ctx.adapted = scaling, adapted
        return F.linear(x, merged(weight, A, B, scaling, adapted).to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B = ctx.saved_tensors
        s, adapted = ctx.scaling, ctx.adapted
        needs_x, _, needs_bias, needs_A, needs_B, *_ = ctx.needs_input_grad
        dx = dA = dB = None
        if needs_x:
            dx = dy @ merged(weight, A, B, s, adapted).to(dy.dtype)
        dy, x = _rows(dy), _rows(x)
        if needs_A or needs_B:
            low = x @ A.to(x.dtype).flatten(0, -2).T if needs_B else None
            _, dA, dB = _pair_gradients(dy, x if needs_A else None, low, A, B, s, adapted)
        return dx, None, dy.sum(0) if needs_bias else None, dA, dB, None, None


class _TwoBranches(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        pairs_input: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        adapted: Parts,
    ) -> Tensor:
        seen = x if pairs_input is None else pairs_input
        B_T = _transposed(B, weight.shape[0], adapted)  # (p r, out)
        A1 = F.pad(A.to(x.dtype).flatten(0, -2), (0, 0, 0, 1))  # (p r + 1, in)
        low = _rows(seen) @ A1.T
        low[:, -1] = 1  # (rows, p r + 1): X A^T, and what the bias is multiplied by
        ctx.save_for_backward(seen, low, weight, A, B)
        ctx.scaling, ctx.adapted = scaling, adapted
        bias = x.new_zeros(weight.shape[0]) if bias is None else bias
        y = x.new_empty(*x.shape[:-1], len(bias))
        rows = torch.mm(low, torch.cat([(scaling * B_T).to(x.dtype), bias[None]]), out=y.view(-1, len(bias)))
        rows.addmm_(_rows(x), weight.to(x.dtype).T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        seen, low, weight, A, B = ctx.saved_tensors
        needs_x, needs_seen, _, needs_bias, needs_A, needs_B, *_ = ctx.needs_input_grad
        rows, s = _rows(dy), ctx.scaling
        of_A, of_B = (_rows(seen) if needs_A else None), (low[:, :-1] if needs_B else None)
        dlow, dA, dB = _pair_gradients(rows, of_A, of_B, A, B, s, ctx.adapted)
        dx = dseen = None
        if needs_x or needs_seen:
            of_pairs = (s * dlow) @ A.to(dy.dtype).flatten(0, -2)
            dseen = of_pairs.view(seen.shape) if needs_seen else None
        if needs_x:
            W = weight.to(dy.dtype)
            dx = dy @ W if needs_seen else of_pairs.addmm_(rows, W).view(seen.shape)
        dbias = rows.sum(0) if needs_bias else None
        return dx, dseen, None, dbias, dA, dB, None, None


def _rows(x: Tensor) -> Tensor:
    """(..., n) -> (rows, n), a view where there can be one."""
    return x.reshape(-1, x.shape[-1])


def _pair_gradients(
    dy: Tensor, x: Tensor | None, low: Tensor | None, A: Tensor, B: Tensor, s: float, adapted: Parts
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dY B (rows, p r), dA = s (dY B)^T X and dB = s dY^T X A^T, the last two in the pairs' precision.

    Which side of these thin products is transposed, and which lies in memory so, decides how fast BLAS is: on a CPU
    (out, rows) x (rows, r) takes 5 to 20 times as long as its transpose, and dY B is 2 to 4 times as fast where B lies
    in memory as (r, out).

    Args:
        dy: dY, (rows, out).
        x: X, (rows, in); None: A does not train.
        low: X A^T, (rows, p r) for p adapted parts; None: B does not train.
    """
    dlow = dy @ _transposed(B, dy.shape[1], adapted).to(dy.dtype).T
    dA = dB = None
    if x is not None:
        dA = (s * (dlow.T.contiguous() @ x)).view(A.shape).to(A.dtype)
    if low is not None:
        dB_T = s * (low.T.contiguous() @ dy)  # (p r, out)
        if B.dim() == 3:
            dB_T = torch.stack([each[:, columns] for each, columns in _blocks(dB_T, B, adapted)])
        dB = dB_T.mT.to(B.dtype)
    return dlow, dA, dB


def _transposed(B: Tensor, out: int, adapted: Parts) -> Tensor:
    """B^T, (p r, out); of p parts of a fused weight one below the other, zero outside their own columns."""
    if B.dim() == 2:
        return B.T.contiguous()
    B_T = B.new_zeros(len(B) * B.shape[2], out)
    for each, (rows, columns) in zip(B, _blocks(B_T, B, adapted), strict=True):
        rows[:, columns] = each.T
    return B_T


def _blocks(B_T: Tensor, B: Tensor, adapted: Parts) -> Iterator[tuple[Tensor, slice]]:
    """For each of p adapted parts its r rows of ``B_T``, (p r, out), and its own columns in them."""
    width = B.shape[1]
    for part, rows in zip(adapted or range(len(B)), B_T.split(B.shape[2]), strict=True):
        yield rows, slice(part * width, (part + 1) * width)
