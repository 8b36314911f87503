"""How ``y = x (W + s B A)^T + b`` is computed: merged on the fly, or as two branches.

Merged: W_eff = W + s B A is built in the weight's precision, used for one product, and dropped; the backward pass
builds it again. That costs a pass over (out, in) values each way and saves passes over (rows, in) and (rows, out), so
it pays once rows * (in + out) exceeds in * out. In half precision it is also nearer to the exact result, since W_eff is
rounded once instead of two products and their sum.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    adapted: tuple[int, ...] | None,
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
    rows = x.numel() // x.shape[-1]
    if rows * sum(weight.shape) < weight.numel():
        return two_branches(x, weight, bias, A, B, scaling, adapted)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
            return _Merged.apply(x, weight, bias, A, B, scaling, adapted)
    return _Merged.apply(x, weight, bias, A, B, scaling, adapted)


def two_branches(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    adapted: tuple[int, ...] | None,
    pairs_input: Tensor | None = None,
) -> Tensor:
    """x W^T + bias + s (x A^T) B^T; the pairs may see ``pairs_input``, x after dropout, instead of x."""
    y = F.linear(x, weight, bias)
    low = scaling * F.linear(x if pairs_input is None else pairs_input, A.flatten(0, -2))
    if A.dim() == 2:
        return y + F.linear(low, B)
    update = torch.einsum("...pr,por->...po", low.unflatten(-1, A.shape[:2]), B)
    if adapted is None:
        return y + update.flatten(-2)
    where = torch.tensor(adapted, device=x.device)
    parts = y.unflatten(-1, (-1, B.shape[1]))
    return parts.index_add(-2, where, update.to(y.dtype)).flatten(-2)


def merged(weight: Tensor, A: Tensor, B: Tensor, scaling: float, adapted: tuple[int, ...] | None) -> Tensor:
    """W + s B A, (out, in), in the weight's precision; shapes as in `low_rank_linear`."""
    if A.dim() == 2:
        return torch.addmm(weight, B, A, alpha=scaling)
    parts = weight.unflatten(0, (-1, B.shape[1]))
    if adapted is None:
        return torch.baddbmm(parts, B, A, alpha=scaling).flatten(0, 1)
    result = parts.clone()
    for i, part in enumerate(adapted):
        result[part].addmm_(B[i], A[i], alpha=scaling)
    return result.flatten(0, 1)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        adapted: tuple[int, ...] | None,
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
        dx = dbias = dA = dB = None
        if needs_x:
            dx = dy @ merged(weight, A, B, s, adapted).to(dy.dtype)
        dy, x = dy.flatten(0, -2), x.flatten(0, -2)
        if needs_bias:
            dbias = dy.sum(0)
        if needs_A or needs_B:
            dA, dB = _pair_gradients(dy, x, A, B, s, adapted)
        return dx, None, dbias, dA if needs_A else None, dB if needs_B else None, None, None


def _pair_gradients(
    dy: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, adapted: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:
    """dA = s (dY B)^T X and dB = s dY^T (X A^T), for dY (rows, out) and X (rows, in), in the pairs' precision.

    Which side of these thin products is transposed decides how fast BLAS is: on a CPU (out, rows) x (rows, r) takes 5
    to 20 times as long as its transpose, and dY B is 2 to 4 times as fast where B lies in memory as (r, out).
    """
    rank = A.shape[-2]
    dy = dy.unflatten(-1, (-1, B.shape[-2])).transpose(0, 1)  # (parts, rows, out / parts)
    if adapted is not None:
        dy = dy[list(adapted)]
    B_T = B.to(dy.dtype).mT.contiguous().view(-1, rank, B.shape[-2])  # (p, r, out / parts)
    low = x @ A.to(x.dtype).flatten(0, -2).T  # (rows, p r)
    dlow = torch.bmm(dy, B_T.mT).transpose(0, 1).flatten(1)  # (rows, p r)
    dB_T = torch.bmm(low.unflatten(-1, (-1, rank)).permute(1, 2, 0), dy)  # (p, r, out / parts)
    return (s * (dlow.T @ x)).view(A.shape).to(A.dtype), (s * dB_T).mT.reshape(B.shape).to(B.dtype)
