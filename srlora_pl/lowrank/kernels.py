"""How ``y = x (W + s B A)^T + b`` is computed: merged on the fly, or as two branches.

Merged: W_eff = W + s B A is built in the weight's precision, used for one product, and dropped; the backward pass
builds it again. That costs a pass over (out, in) values each way and saves passes over (rows, in) and (rows, out). In
half precision it is also nearer to the exact result, since W_eff is rounded once instead of two products and their sum.

Seconds of forward and backward over those of two branches, in fp32 on one core (AMD EPYC without AVX-512, MKL, rank 8;
``benchmarks/kernels.py``):

| out x in | 128 rows | 256 | 512 | 1,024 | 2,048 |
|---|---|---|---|---|---|
| 768 x 768 | 1.34 | 1.07 | 1.07 | 1.01 | 1.01 |
| 3072 x 768 | 1.23 | 1.15 | 1.22 | 1.11 | 1.00 |
| 768 x 3072 | 1.29 | 1.11 | 1.07 | 1.01 | 1.05 |
| 1536 x 384 | 1.05 | 1.02 | 1.05 | 0.96 | 0.97 |

On two cores, at the 1,576 rows of eight images of ViT-B/16, it is 1.03 for a fused qkv, 1.01, 1.05 and 1.00. So in
single and double precision merging never pays. In half precision, where the branches cost a rounding, the rule is the
count of passes, rows * (in + out) >= in * out (marked *). The same in bf16 autocast on two cores of an AMD EPYC with
AVX-512 BF16:

| out x in | 128 rows | 256 | 512 | 1,024 | 2,048 |
|---|---|---|---|---|---|
| 768 x 768 | 1.11 | 1.35 | 1.09* | 1.08* | 1.00* |
| 3072 x 768 | 1.42 | 1.24 | 1.27 | 1.04* | 1.01* |
| 768 x 3072 | 1.38 | 1.22 | 1.11 | 1.10* | 1.08* |
| 384 x 384 | 0.91 | 0.96* | 0.93* | 0.95* | 0.97* |
| 1536 x 384 | 1.06 | 1.04 | 1.04* | 1.02* | 0.96* |

On an Intel Xeon with AMX the marked cells lie between 0.89 and 1.14, those without a mark between 0.93 and 1.82.

On the AMD a step of ViT-B/16 (batch 8) takes 1.124 times the floor's with the rule, 1.107 always, 1.096 never merged,
and 1.111 with a merged forward and a branched backward pass: what exactness costs is one to three hundredths.

Not done: appending A's rows to W (so that one product gives x A^T too) or B's columns (dY B with dX). Copying W and an
output that is not contiguous cost more than the thin product: 1.01 to 1.04 times the seconds of two branches, forward
and backward, for these shapes at 1,576 rows in fp32 on one core.
Nor dY B and dB part by part, which spares a CPU in half precision two copies of dY for a fused qkv, a hundredth of a
step of ViT-B/16, and costs a GPU six launches instead of two.
Nor dB and dA in blocks of 128 to 256 columns: on two cores at 1,576 rows that takes 0.6 of the time in fp32, a
hundredth of a step of ViT-B/16, but 1.6 times as long in bf16 and 1.1 times at 256 rows of 768.
Nor the pairs' part of y together with the bias, as one more pair of input 1, before x W^T is added to it, and that of
dX likewise: 0.8 of what the branches add in fp32 when each layer is timed alone, 0.993 to 1.009 of a step in five runs.
Nor W + s B A in half precision as two products, one for a core: on an Intel Xeon MKL builds 3072 x 768 on one core, and
two products take 0.67 of the time, but a step 0.992 to 0.996.

What is left in fp32 are six passes, over x for x A^T and dA, over dY for dY B and dB, and over y and dX to add to them.
On that Xeon, two cores, eight images of ViT-B/16, they would take 134 ms at the speed of a plain sum or product with a
number, 0.07 of the floor's step: without fused kernels 1.07 times the floor is the least.
"""

from collections.abc import Iterator
from contextlib import contextmanager
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
    rows, (out, in_) = x.numel() // x.shape[-1], weight.shape
    halves = torch.is_autocast_enabled(x.device.type) or x.dtype.itemsize == 2
    compute = merge_on_the_fly if merging_pays(rows, out, in_, halves) else two_branches
    return compute(x, weight, bias, A, B, scaling, adapted)


def merge_on_the_fly(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    adapted: tuple[int, ...] | None,
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
    adapted: tuple[int, ...] | None,
    pairs_input: Tensor | None = None,
) -> Tensor:
    """x W^T + bias + s (x A^T) B^T; the pairs may see ``pairs_input``, x after dropout, instead of x."""
    with _outside_autocast(x, bias) as (x, bias):
        pairs_input = None if pairs_input is None else pairs_input.to(x.dtype)
        return _TwoBranches.apply(x, pairs_input, weight, bias, A, B, scaling, adapted)


def merging_pays(rows: int, out: int, in_: int, halves: bool) -> bool:
    """Whether W_eff is worth building for ``rows`` tokens in half precision, or else; see the top of this file."""
    return halves and rows * (in_ + out) >= in_ * out


@contextmanager
def _outside_autocast(x: Tensor, bias: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Operands in autocast's type, where it is on, and inside no autocast: the kernels choose each type themselves."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        yield x, bias


def merged(weight: Tensor, A: Tensor, B: Tensor, scaling: float, adapted: tuple[int, ...] | None) -> Tensor:
    """W + s B A, (out, in), in the weight's precision; shapes as in `low_rank_linear`."""
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
        dx = dA = dB = None
        if needs_x:
            dx = dy @ merged(weight, A, B, s, adapted).to(dy.dtype)
        dy, x = dy.flatten(0, -2), x.flatten(0, -2)
        if needs_A or needs_B:
            _, dA, dB = _pair_gradients(dy, x, x @ A.to(x.dtype).flatten(0, -2).T, A, B, s, adapted)
        return dx, None, dy.sum(0) if needs_bias else None, dA if needs_A else None, dB if needs_B else None, None, None


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
        adapted: tuple[int, ...] | None,
    ) -> Tensor:
        seen = x if pairs_input is None else pairs_input
        low = seen.flatten(0, -2) @ A.to(x.dtype).flatten(0, -2).T  # (rows, p r)
        ctx.save_for_backward(seen, low, weight, A, B)
        ctx.scaling, ctx.adapted = scaling, adapted
        y = F.linear(x, weight.to(x.dtype), bias)
        rank, width = A.shape[-2], B.shape[-2]
        blocks = y.view(-1, y.shape[-1]).split(width, 1)
        chosen = range(len(blocks)) if adapted is None else adapted
        for part, each, B_T in zip(chosen, low.split(rank, 1), B.to(x.dtype).mT.reshape(-1, rank, width), strict=True):
            blocks[part].addmm_(each, B_T, alpha=scaling)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        seen, low, weight, A, B = ctx.saved_tensors
        needs_x, needs_seen, _, needs_bias, needs_A, needs_B, *_ = ctx.needs_input_grad
        rows, s = dy.flatten(0, -2), ctx.scaling
        dlow, dA, dB = _pair_gradients(rows, seen.flatten(0, -2), low, A, B, s, ctx.adapted)
        dx = dseen = None
        if needs_x:
            dx = dy @ weight.to(dy.dtype)
            if not needs_seen:
                dx.view(-1, dx.shape[-1]).addmm_(dlow, A.to(dy.dtype).flatten(0, -2), alpha=s)
        if needs_seen:
            dseen = (s * (dlow @ A.to(dy.dtype).flatten(0, -2))).view(seen.shape)
        dbias = rows.sum(0) if needs_bias else None
        return dx, dseen, None, dbias, dA if needs_A else None, dB if needs_B else None, None, None


def _pair_gradients(
    dy: Tensor, x: Tensor, low: Tensor, A: Tensor, B: Tensor, s: float, adapted: tuple[int, ...] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dY B (rows, p r), dA = s (dY B)^T X and dB = s dY^T X A^T, the last two in the pairs' precision.

    Which side of these thin products is transposed decides how fast BLAS is: on a CPU (out, rows) x (rows, r) takes 5
    to 20 times as long as its transpose, and dY B is 2 to 4 times as fast where B lies in memory as (r, out).

    Args:
        dy: dY, (rows, out).
        x: X, (rows, in).
        low: X A^T, (rows, p r) for p adapted parts.
    """
    rank = A.shape[-2]
    # (parts, rows, out / parts); not by unflatten, which torch 2.11 cannot compile inside a TorchFunctionMode
    dy = dy.view(dy.shape[0], -1, B.shape[-2]).transpose(0, 1)
    if adapted is not None:
        dy = dy[list(adapted)]
    B_T = B.to(dy.dtype).mT.contiguous().view(-1, rank, B.shape[-2])  # (p, r, out / parts)
    dlow = torch.bmm(dy, B_T.mT).transpose(0, 1).flatten(1)
    dB_T = torch.bmm(low.view(low.shape[0], -1, rank).permute(1, 2, 0), dy)  # (p, r, out / parts)
    return dlow, (s * (dlow.T @ x)).view(A.shape).to(A.dtype), (s * dB_T).mT.reshape(B.shape).to(B.dtype)
