"""Frozen weights in NF4, four bits a value (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

bitsandbytes packs and unpacks them: its kernels run on CPUs, CUDA and ROCm. On one core of an AMD EPYC it quantises a
4096 x 4096 in 0.8 s and gives its values back in 0.05 s (in bfloat16 0.03 s). The alternative, torchao, needs 2.0 s and
0.33 s (0.20 s), takes matrices of certain sizes alone, and quantises again whenever one is copied.
"""

import logging
import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from srlora_pl.util.errors import UserError
from srlora_pl.util.program import require_extra

BLOCK = 64  # values that share a scale
_aten = torch.ops.aten


@cache
def _ops() -> Any:
    """The operators of bitsandbytes, which is imported where there is something in four bits alone."""
    require_extra("nf4", "bitsandbytes", "model.weights nf4")
    # On some CPUs it says at its import that a kernel is missing, which nothing here calls.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes  # noqa: F401

    return torch.ops.bitsandbytes


class NF4(Tensor):
    """A matrix in four bits a value, and a scale for each 64 of them along its rows: 0.53 bytes a value.

    It has the shape of its values, and a ``dtype`` in which they are read. Moving, copying and converting keep the four
    bits; all other operators see the values, which are computed for them and dropped. It cannot be written to, but for
    loading a state, which rounds what is not in four bits.

    Values are rounded on the device where they are, and equal to the bit on all CPUs. Scales are bfloat16, which is
    exact for weights that were published so. Quantising the values again gives the same bits.

    Attributes:
        packed: uint8, two values in each.
        scales: bfloat16, the largest absolute value of each block.
        is_transposed: whether ``packed`` holds the rows of the transpose.
    """

    packed: Tensor
    scales: Tensor
    is_transposed: bool
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: "type[NF4]",
        packed: Tensor,
        scales: Tensor,
        shape: torch.Size,
        dtype: torch.dtype,
        is_transposed: bool = False,
    ) -> "NF4":
        strides = (1, shape[0]) if is_transposed else (shape[1], 1)
        make = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        self = make(cls, shape, strides, dtype=dtype, device=packed.device)
        self.packed, self.scales, self.is_transposed = packed, scales, is_transposed
        return self

    def __init__(self, *args: Any) -> None:
        super().__init__()

    @classmethod
    def of(cls, weight: Tensor) -> "NF4":
        """The nearest to ``weight`` (out, in), on its device, to be read in its type."""
        values = weight.detach().contiguous()
        values = values if values.dtype in (torch.float32, torch.bfloat16) else values.float()
        packed, scales = _ops().quantize_4bit(values, BLOCK, "nf4", torch.uint8)
        return cls(packed, scales.bfloat16(), weight.shape, weight.dtype)

    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values, a plain tensor, rounded once to ``dtype``, by default the tensor's."""
        dtype = dtype or self.dtype
        read = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
        rows = self.shape[::-1] if self.is_transposed else self.shape
        row = (1, 2 * self.packed.numel())  # whose length is even, as the kernel of CPUs wants it
        values = _ops().dequantize_4bit(self.packed, self.scales.float(), BLOCK, "nf4", row, read)
        values = values[0, : self.numel()].view(rows).to(dtype)
        return values.T if self.is_transposed else values

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return self.packed.nbytes + self.scales.nbytes

    def _with(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> "NF4":
        parts = change(self.packed), change(self.scales)
        return NF4(*parts, self.shape, dtype or self.dtype, self.is_transposed)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"NF4({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:  # torch's own cannot be loaded to a device that is named
        parts = self.packed, self.scales, tuple(self.shape), self.dtype, self.is_transposed
        return _rebuilt, (*parts, isinstance(self, nn.Parameter))

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return ["packed", "scales"], (self.dtype, self.is_transposed)

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], meta: tuple[Any, ...], shape: torch.Size, _: Any) -> "NF4":
        return NF4(parts["packed"], parts["scales"], shape, *meta)

    def _stable_hash_for_caching(self) -> str:
        """What torch.compile compiles for anew."""
        return f"{self!r} {self.is_transposed}"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, first = dict(kwargs or {}), args[0] if args else None
        if isinstance(first, NF4):
            if func in (_aten.detach.default, _aten.clone.default, _aten._to_copy.default):
                dtype = kwargs.pop("dtype", None)
                return first._with(lambda part: func(part, **kwargs), dtype)
            if func is _aten.t.default:  # a linear layer keeps it for its backward pass
                return NF4(first.packed, first.scales, first.shape[::-1], first.dtype, not first.is_transposed)
            if func is _aten.copy_.default:
                other = args[1] if isinstance(args[1], NF4) else NF4.of(args[1])
                first.packed.copy_(other.packed)
                first.scales.copy_(other.scales)
                return first
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if isinstance(given, NF4) and argument.alias_info is not None and argument.alias_info.is_write:
                raise UserError(f"{func} would change a weight in four bits, which stays as it is (model.weights nf4)")
        return func(*tree_map_only(NF4, NF4.values, args), **tree_map_only(NF4, NF4.values, kwargs))


def plain(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``weight`` as a plain tensor in ``dtype``, by default its own; itself where it is one."""
    return weight.values(dtype) if isinstance(weight, NF4) else weight.to(dtype or weight.dtype)


def _rebuilt(*given: Any) -> NF4:
    *parts, is_parameter = given
    weight = NF4(*parts)
    return nn.Parameter(weight, requires_grad=False) if is_parameter else weight  # type: ignore[return-value]


torch.serialization.add_safe_globals([_rebuilt])  # a whole checkpoint holds it


def relative_error(weights: Iterable[Tensor]) -> float:
    """How far all ``weights`` together lie from what four bits keep of them, in the Frobenius norm."""
    lost = size = 0.0
    for weight in weights:
        W = weight.detach().double()
        lost, size = lost + float((NF4.of(weight).values() - W).square().sum()), size + float(W.square().sum())
    return math.sqrt(lost / size) if size else 0.0


def quantize(linears: Iterable[nn.Linear]) -> None:
    """Put the weights of ``linears`` into four bits, in place; they are frozen then."""
    for linear in linears:
        linear.weight = nn.Parameter(NF4.of(linear.weight), requires_grad=False)
