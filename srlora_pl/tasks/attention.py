"""The backward pass of attention on a CPU in half precision.

torch's own goes tile by tile in products too small for a CPU's matrix units, and takes a quarter of a step of ViT-B/16
in bf16. Here each of its five products is one for all samples and heads. Scores are recomputed, so that no more is kept
than torch keeps, and in fp32, since their rounding would weigh most. Relative errors of the gradients of query, key and
value are 3.3, 3.3 and 2.4 thousandths in bf16 (standard normal operands, 197 tokens), torch's own 2.4, 3.3 and 3.3.

Milliseconds of forward and backward in bf16 on two cores with AMX, torch's own and this, heads of 64:

| samples, heads, tokens | 8, 12, 197 | 32, 3, 65 | 32, 6, 197 | 8, 12, 257 | 8, 12, 394 | 2, 12, 577 | 8, 12, 577 |
|---|---|---|---|---|---|---|---|
| torch | 36.5 | 16.6 | 63.5 | 45.7 | 79.5 | 45.9 | 179 |
| whole products | 18.8 | 3.2 | 42.4 | 37.1 | 100.4 | 40.2 | 212 |

In fp32, and in forward passes, torch's own is as fast or faster.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

MOST_TOKENS = 300  # see the table


class WholeProductAttention(TorchFunctionMode):
    """Inside ``with``, ``scaled_dot_product_attention`` takes the backward pass of this file where that is faster.

    The forward pass is always torch's own.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and (operands := _operands(*args, **kwargs)):
            return _WholeProducts.apply(*operands)
        return func(*args, **kwargs)


def faster_attention(net: nn.Module, device: torch.device) -> AbstractContextManager[Any]:
    """What to run ``net`` in on ``device``: `WholeProductAttention`, or nothing where that cannot help."""
    if device.type != "cpu":  # a function mode costs every call in it some host time
        return nullcontext()
    # A compiled block cannot see that activation checkpointing will run it again, outside of `with`.
    again = any(getattr(module, "grad_checkpointing", False) for module in net.modules())
    return nullcontext() if again else WholeProductAttention()


def _operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Query, key and value of a call that this file speeds up, or None for one that is left to torch."""
    plain = attn_mask is None and dropout_p == 0 and not is_causal and scale is None and not enable_gqa
    alike = query.shape[:-2] == key.shape[:-2] == value.shape[:-2] and query.shape[-1] == value.shape[-1]
    few = max(query.shape[-2], key.shape[-2]) <= MOST_TOKENS
    halves = query.device.type == "cpu" and query.dtype.itemsize == 2
    pays = plain and alike and few and halves and torch.is_grad_enabled() and not _to_be_run_again()
    return (query, key, value) if pays else None


def _to_be_run_again() -> bool:
    """Whether activation checkpointing will run this again, outside of `with`, and compare what was kept."""
    if torch.compiler.is_compiling():  # see faster_attention
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == checkpoint.__name__


class _WholeProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return F.scaled_dot_product_attention(query, key, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
        shapes = [each.shape for each in ctx.saved_tensors]
        dtype, scale = upstream.dtype, shapes[0][-1] ** -0.5
        query, key, value, upstream = (each.reshape(-1, *each.shape[-2:]) for each in (*ctx.saved_tensors, upstream))
        probabilities = torch.softmax(torch.bmm(query.float() * scale, key.float().mT), -1).to(dtype)
        dvalue = torch.bmm(probabilities.mT, upstream)
        dscores = torch._softmax_backward_data(torch.bmm(upstream, value.mT), probabilities, -1, dtype)
        dquery, dkey = torch.bmm(dscores, key).mul_(scale), torch.bmm(dscores.mT, query).mul_(scale)
        return tuple(each.view(shape) for each, shape in zip((dquery, dkey, dvalue), shapes, strict=True))
