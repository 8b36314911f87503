"""The adapted linear layer, and the matrices inside it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srlora_pl.lowrank.kernels import low_rank_linear, merged, two_branches
from srlora_pl.util.errors import UserError
from srlora_pl.util.precision import full_precision


class LowRankLinear(nn.Module):
    """A frozen linear layer plus trainable rank-1 pairs: ``y = x @ (W + scaling * B @ A).T + bias``.

    It stands in for the ``nn.Linear`` it is made from and keeps that layer's own ``weight`` (frozen; changed only
    by a start or a switch) and ``bias``, so its state keeps their names. Its state is that without `merge`, and a state
    that is loaded undoes it.

    Where one linear holds several matrices (a fused qkv, ``parts=3``) each adapted part has pairs of its own.

    Shapes: ``weight`` (out, in); ``lora_A`` (r, in) and ``lora_B`` (out, r), or for p adapted parts of a fused
    linear (p, r, in) and (p, out / parts, r).

    Args:
        linear: the layer to adapt; its parameters are taken over, not copied.
        rank: pairs per matrix, r.
        scaling: s, dimensionless.
        parts: into how many equal blocks of rows ``weight`` falls.
        adapted: which of these blocks have pairs.
        dropout: probability with which an input element is dropped on the way to the pairs only.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        scaling: float,
        parts: int = 1,
        adapted: tuple[int, ...] = (0,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rank, self.scaling, self.parts, self.adapted = rank, scaling, parts, adapted
        self.weight = linear.weight.requires_grad_(False)
        self.bias = linear.bias
        shape = () if parts == 1 else (len(adapted),)
        self.lora_A = nn.Parameter(self.weight.new_zeros(*shape, rank, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(*shape, self.out_features // parts, rank))
        self.dropout = nn.Dropout(dropout)
        self.disabled = False
        self._unmerged: Tensor | None = None
        self.train(linear.training)

    @property
    def merged(self) -> bool:
        """Whether the pairs are at present part of ``weight``."""
        return self._unmerged is not None

    @property
    def unmerged_weight(self) -> Tensor:
        """W, (out, in), also while the pairs are part of ``weight``."""
        return self.weight.detach() if self._unmerged is None else self._unmerged.to(self.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.merged or self.disabled:
            return F.linear(x, self.weight, self.bias)
        operands = (x, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling, self._some_parts)
        if self.training and self.dropout.p > 0:
            return two_branches(*operands, pairs_input=self.dropout(x))
        return low_rank_linear(*operands)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W_eff = W + scaling * B @ A, a new tensor of shape (out, in)."""
        if self.merged:
            return self.weight.detach().clone()
        with full_precision():
            return merged(self.weight.detach(), self.lora_A, self.lora_B, self.scaling, self._some_parts)

    @property
    def _some_parts(self) -> tuple[int, ...] | None:
        """The adapted parts in the kernels' terms: None for all of them."""
        return None if len(self.adapted) == self.parts else self.adapted

    def merge(self) -> None:
        """Put the pairs into ``weight``: inference then costs one product. Merging twice is merging once."""
        self._require_enabled("merge")
        if not self.merged:
            effective = self.merged_weight()
            self._unmerged = self.weight.data
            self.weight.data = effective

    def unmerge(self) -> None:
        """Undo `merge`, to the bit: the weight from before is put back, not computed back."""
        self._require_enabled("unmerge")
        if self._unmerged is not None:
            self.weight.data = self.unmerged_weight
            self._unmerged = None

    def _require_enabled(self, what: str) -> None:
        if self.disabled:
            raise UserError(f"{what}() has no meaning while the pairs are disabled(), call it outside")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[f"{prefix}weight"] = self.unmerged_weight

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    def matrices(self, name: str) -> "list[Matrix]":
        """The adapted matrices of this layer, which is called ``name`` in its network."""
        if self.parts == 1:
            return [Matrix(name, name, self, 0)]
        return [Matrix(f"{name}[{'qkv'[part]}]", name, self, i) for i, part in enumerate(self.adapted)]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, rank={self.rank}, scaling={self.scaling:g}"
            + (f", parts={self.parts}, adapted={self.adapted}" if self.parts > 1 else "")
        )


class Matrix:
    """One adapted weight matrix: a whole `LowRankLinear`, or one of q, k, v in a fused one.

    Holds no values: ``weight`` (out, in), ``A`` (r, in) and ``B`` (out, r) are detached views into the layer, and
    the ``of_*`` methods give the same view into any tensor of the layer's shape, such as an optimizer's state.
    """

    def __init__(self, name: str, layer_name: str, layer: LowRankLinear, index: int) -> None:
        self.name, self.layer_name, self.layer, self.index = name, layer_name, layer, index
        self.rank, self.scaling = layer.rank, layer.scaling
        self.shape = (layer.out_features // layer.parts, layer.in_features)

    def of_weight(self, tensor: Tensor) -> Tensor:
        """(out of the layer, in) -> view (out, in)."""
        return tensor.view(self.layer.parts, *self.shape)[self.layer.adapted[self.index]]

    def of_A(self, tensor: Tensor) -> Tensor:
        """A tensor shaped like ``layer.lora_A`` -> view (r, in)."""
        return tensor.view(-1, self.rank, self.shape[1])[self.index]

    def of_B(self, tensor: Tensor) -> Tensor:
        """A tensor shaped like ``layer.lora_B`` -> view (out, r)."""
        return tensor.view(-1, self.shape[0], self.rank)[self.index]

    @property
    def weight(self) -> Tensor:
        return self.of_weight(self.layer.weight.detach())

    @property
    def A(self) -> Tensor:
        return self.of_A(self.layer.lora_A.detach())

    @property
    def B(self) -> Tensor:
        return self.of_B(self.layer.lora_B.detach())
