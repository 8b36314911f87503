"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from srlora_pl.lowrank.kernels import linear
from srlora_pl.lowrank.linear import Adapter
from srlora_pl.lowrank.method import Method, kaiming_uniform
from srlora_pl.lowrank.targets import select_whole
from srlora_pl.util.errors import UserError
from srlora_pl.util.precision import trained_dtype


class BottleneckLinear(Adapter):
    """``h + up GELU(down h + down_bias) + up_bias`` of the output h = ``x @ weight.T + bias`` of a frozen linear.

    It stands in for the linear that it is made from and keeps that layer's ``weight`` (out, in) and ``bias``, so a
    state keeps their names, and copies and pickles need no hooks.

    Args:
        linear: the layer to follow; its parameters are taken over, not copied.
        size: rows of ``down`` (size, out).
        name: of the layer in its network, on which the start of ``down`` depends.
    """

    adapter_names = ("down", "down_bias", "up", "up_bias")

    def __init__(self, linear: nn.Linear, size: int, name: str) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        out, dtype = self.out_features, trained_dtype(self.weight.dtype)
        self.down = nn.Parameter(kaiming_uniform((size, out), name).to(self.weight.device, dtype))
        self.down_bias = nn.Parameter(self.weight.new_zeros(size))
        self.up = nn.Parameter(self.weight.new_zeros(out, size))
        self.up_bias = nn.Parameter(self.weight.new_zeros(out))
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        h = linear(x, self.weight, self.bias)
        if self.disabled:
            return h
        return h + linear(F.gelu(linear(h, self.down, self.down_bias)), self.up, self.up_bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, size={len(self.down)}"


class Bottleneck(Method):
    """Small networks behind the attention's output and the feed-forward's, before the residual addition.

    At the start their up-projections are 0, so that they change nothing. They are no part of any weight: there is
    nothing to merge, and no LoRA to export.

    Args:
        size: width of the bottleneck, m; 2 m out + m + out numbers train behind each layer.
        target_modules: the linears to follow, see `Method`; of a fused qkv all parts.
        exclude_modules: see `Method`.
        layers: see `Method`.

    Raises:
        UserError: a value outside its range.
    """

    additive = False

    def __init__(
        self,
        size: int = 64,
        *,
        target_modules: str | list[str] | None = None,
        exclude_modules: str | list[str] | None = None,
        layers: str | int | list[int] | None = None,
    ) -> None:
        targets = target_modules or ["attention_output", "fc2"]
        super().__init__(1, target_modules=targets, exclude_modules=exclude_modules, layers=layers)
        self.size = size
        if not isinstance(size, int) or size < 1:
            raise UserError(f"method.size is {size}, it must be a whole number of at least 1")

    def inject(self, net: nn.Module, taken: Sequence[str]) -> dict[str, Adapter]:
        adapters: dict[str, Adapter] = {}
        for target in select_whole(net, self, taken, "a bottleneck follows its whole output"):
            parent, _, child = target.name.rpartition(".")
            adapters[target.name] = BottleneckLinear(target.module, self.size, target.name)
            setattr(net.get_submodule(parent), child, adapters[target.name])
        return adapters
