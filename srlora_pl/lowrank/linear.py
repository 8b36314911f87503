"""The adapted linear layer, and the matrices inside it."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from srlora_pl.lowrank.kernels import linear, low_rank_linear, merged, two_branches
from srlora_pl.lowrank.nf4 import NF4
from srlora_pl.lowrank.shards import is_split
from srlora_pl.lowrank.weights import FourBits, Halves, Plain, Split, join, split
from srlora_pl.util.errors import UserError
from srlora_pl.util.precision import full_precision, trained_dtype


class Adapter(nn.Module):
    """A module that a method puts into a network.

    Attributes:
        adapter_names: its own parameters, trained or not, in the order of a state.
        output_factors: which of them are the B of a low-rank update, next to its output; see `lr_ratio`.
        disabled: whether it lets its input pass as the pretrained network would; see `Adaptation.disabled`.
    """

    adapter_names: ClassVar[tuple[str, ...]] = ()
    output_factors: ClassVar[tuple[str, ...]] = ("lora_B",)
    disabled = False
    merged = False

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The parameters of ``adapter_names`` as they are now: loading with ``assign=True`` replaces them."""
        return [getattr(self, name) for name in self.adapter_names]

    def matrices(self, name: str) -> "list[Matrix]":
        """The adapted matrices of this module, which is called ``name`` in its network."""
        return []

    @property
    def module(self) -> nn.Module:
        """What stands in the network."""
        return self

    def merged_module(self) -> nn.Module:
        """What takes its place in a copy of the network without adapters; it may share tensors.

        Raises:
            UserError: nothing can.
        """
        raise UserError(f"{type(self).__name__} is no part of a weight, so it cannot be merged: keep the checkpoint")

    def merge(self) -> None:
        """Make the adapter part of the pretrained weights, for inference.

        Raises:
            UserError: it cannot be part of them.
        """
        raise UserError(f"{type(self).__name__} is no part of a weight, so it cannot be merged: leave out merge()")

    def unmerge(self) -> None:
        """Undo `merge`, to the bit."""


def precise(layers: dict[str, Adapter], moves_weights: bool) -> dict[str, Adapter]:
    """``layers`` whose changes are not rounded to the half precision that a frozen weight may have.

    Their parameters are in float32 at least. With ``moves_weights`` so is a weight in bfloat16: the bits that it gains
    stay on the CPU.

    Raises:
        UserError: a weight that is to gain bits is not finite.
    """
    for parameter in (each for layer in layers.values() for each in layer.adapter_parameters()):
        parameter.data = parameter.data.to(trained_dtype(parameter.dtype))
    for name, layer in layers.items():
        if not (moves_weights and isinstance(layer, AdaptedLinear)) or isinstance(layer.weight, NF4):
            continue
        if (weight := layer.weight).dtype == torch.bfloat16:
            if not (weight.is_meta or weight.isfinite().all()):
                raise UserError(f"the weight of {name} holds NaN or infinity, see to the pretrained weights")
            layer.rest = torch.zeros(weight.shape, dtype=torch.int16, device="meta" if weight.is_meta else "cpu")
    return layers


class AdaptedLinear(Adapter):
    """A frozen linear layer with a low-rank update: ``y = x @ (W + scaling * B @ A).T + bias``.

    It stands in for the ``nn.Linear`` it is made from and keeps that layer's own ``weight`` (frozen) and ``bias``, so
    its state keeps their names. Its state is that without `merge`, and a state that is loaded undoes it. A subclass
    makes its parameters in `build` and gives ``B`` and ``A`` in `factors`.

    Where one linear holds several matrices (a fused qkv, ``parts=3``), ``weight`` is (out, in), and the factors of its
    p adapted parts are B (p, out / parts, r) and A (p, r, in).

    Args:
        linear: the layer to adapt; its parameters are taken over, not copied.
        rank: columns of B, r.
        scaling: s, dimensionless.
        parts: into how many equal blocks of rows ``weight`` falls.
        adapted: which of these blocks have factors.
        dropout: probability with which an input element is dropped on the way to the factors only.
        options: of the subclass, from `Method.layer_options`; handed to `build`.

    Attributes:
        shared: factors that other layers use too; in a list, so that they are no submodules.
        evaluation_rank: how many of the first pairs act outside training, where the method is `nested`.
        rest: int16 (out, in), of a weight in bfloat16 that changes, see `Halves`; else None. It stays on the CPU.
    """

    shared: "Sequence[SharedFactors]" = ()
    evaluation_rank: int | None = None

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        scaling: float,
        parts: int = 1,
        adapted: tuple[int, ...] = (0,),
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rank, self.scaling, self.parts, self.adapted = rank, scaling, parts, adapted
        self.weight = linear.weight.requires_grad_(False)
        self.bias = linear.bias
        self.dropout = nn.Dropout(dropout)
        self.rest: Tensor | None = None
        self._unmerged: Tensor | None = None
        self.build(() if parts == 1 else (len(adapted),), self.out_features // parts, self.in_features, **options)
        self.train(linear.training)

    def build(self, p: tuple[int, ...], out: int, in_: int) -> None:
        """Make the parameters of ``adapter_names``.

        Args:
            p: the leading dimensions, () or (adapted parts,).
            out: rows of one matrix.
            in_: its columns.
        """
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (..., out, r) and A (..., r, in), differentiable."""
        raise NotImplementedError

    def training_factors(self) -> tuple[Tensor, Tensor]:
        """The factors that a forward pass in training mode uses, where they are others."""
        return self.factors()

    def magnitudes(self) -> Tensor | None:
        """The norms that the rows of W_eff, (out,), are scaled to, where the layer scales them."""
        return None

    def acting(self) -> Tensor | None:
        """Which pairs act, bool (..., r); None: all of them. The others are no part of what is exported."""
        return None

    @property
    def merged(self) -> bool:  # type: ignore[override]
        """Whether the update is at present part of ``weight``."""
        return self._unmerged is not None

    @property
    def unmerged_weight(self) -> Tensor:
        """W, (out, in), also while the update is part of ``weight``."""
        return self.weight.detach() if self._unmerged is None else self._unmerged.detach().to(self.weight.device)

    @property
    def frozen(self) -> Plain:
        """W, also while the update is part of ``weight``."""
        W = self.unmerged_weight
        if isinstance(W, NF4):
            return FourBits(W)
        kept = Plain(W) if self.rest is None else Halves(W, self.rest)
        return Split(kept) if is_split(W) else kept

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.merged or self.disabled:
            return linear(x, self.weight, self.bias)
        return self.adapted_forward(x)

    def adapted_forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), with the adapter beside the weight."""
        with torch.autocast(x.device.type, enabled=False):  # products of factors are as exact as the factors
            B, A = self.training_factors() if self.training else self.factors()
        operands = (x, self.weight, self.bias, A, B, self.scaling, self._some_parts)
        if self.training and self.dropout.p > 0:
            return two_branches(*operands, pairs_input=self.dropout(x))
        return low_rank_linear(*operands)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W_eff = W + scaling * B @ A, a new tensor of shape (out, in), in the precision of the factors."""
        if self.merged:
            return self.weight.detach().clone()
        with full_precision():
            B, A = self.factors()
            return merged(self.frozen.dense(), A, B, self.scaling, self._some_parts)

    @property
    def _some_parts(self) -> tuple[int, ...] | None:
        """The adapted parts in the kernels' terms: None for all of them."""
        return None if len(self.adapted) == self.parts else self.adapted

    def merge(self) -> None:
        """Add the update to ``weight``: inference then costs one product. Merging twice is merging once.

        A weight in half precision rounds the sum, once.

        Raises:
            UserError: the weight is split over several processes.
        """
        self._require_enabled("merge")
        if is_split(self.weight):
            raise UserError("merge() needs weights that are whole in one process: load the checkpoint there")
        if not self.merged:
            effective = self.merged_weight().to(self.weight.dtype)
            vars(self)["_unmerged"] = self.weight  # as an attribute it would be a second parameter
            self.put(effective)

    def unmerge(self) -> None:
        """Undo `merge`, to the bit: the weight from before is put back, not computed back."""
        self._require_enabled("unmerge")
        if self._unmerged is not None:
            moved = self._unmerged.device != self.weight.device
            self.put(self.unmerged_weight if moved else self._unmerged)
            self._unmerged = None

    def put(self, weight: Tensor) -> None:
        """Let ``weight`` (out, in) stand in the place of the frozen weight; the other stays what it is."""
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)

    def _require_enabled(self, what: str) -> None:
        if self.disabled:
            raise UserError(f"{what}() has no meaning while the adapters are disabled(), call it outside")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[f"{prefix}weight"] = self.unmerged_weight
        if self.rest is not None:
            destination[f"{prefix}rest"] = self.rest

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.unmerge()
        weight, rest = state_dict.get(f"{prefix}weight"), state_dict.pop(f"{prefix}rest", None)
        if weight is not None:  # of a layer that may keep its weight in another way
            W = weight if rest is None else join(weight, rest)
            if self.rest is not None:
                W, rest = split(W.float())
                self.rest.copy_(rest)
            state_dict[f"{prefix}weight"] = W
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> "AdaptedLinear":
        W = None if self.rest is None else self.frozen.dense()
        super()._apply(fn, *args)
        if W is not None and self.weight.dtype != torch.bfloat16:  # so that no bit is lost
            self.rest = None
            if self.merged:
                self._unmerged = W
            else:
                self.weight.data = W.to(self.weight)
        return self

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


class LowRankLinear(AdaptedLinear):
    """The layer of LoRA: ``lora_A`` (r, in) and ``lora_B`` (out, r) train; where the linear is fused, p of each."""

    adapter_names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")

    def build(self, p: tuple[int, ...], out: int, in_: int) -> None:
        self.lora_A = nn.Parameter(self.weight.new_zeros(*p, self.rank, in_))
        self.lora_B = nn.Parameter(self.weight.new_zeros(*p, out, self.rank))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_B, self.lora_A


class SharedFactors(Adapter):
    """Factors that several layers use, so that they stand once in a network and in its state.

    A layer refers to it without owning it, see `AdaptedLinear`.

    Args:
        shared_A: (..., r, in).
        shared_B: (..., out, r).
        weight: of one of these layers, on whose device, and in whose type or float32 at least, they are kept.
    """

    adapter_names = ("shared_A", "shared_B")
    output_factors = ("shared_B",)

    def __init__(self, shared_A: Tensor, shared_B: Tensor, weight: Tensor) -> None:
        super().__init__()
        A, B = (each.to(weight.device, trained_dtype(weight.dtype)) for each in (shared_A, shared_B))
        self.shared_A, self.shared_B = nn.Parameter(A), nn.Parameter(B)

    def merge(self) -> None:
        """The layers do."""

    def unmerge(self) -> None:
        """The layers do."""


class Matrix:
    """One adapted weight matrix: a whole `AdaptedLinear`, or one of q, k, v in a fused one.

    Holds no values: ``A`` (r, in) and ``B`` (out, r) are detached views into the layer.
    """

    def __init__(self, name: str, layer_name: str, layer: AdaptedLinear, index: int) -> None:
        self.name, self.layer_name, self.layer, self.index = name, layer_name, layer, index
        self.rank, self.scaling = layer.rank, layer.scaling
        self.shape = (layer.out_features // layer.parts, layer.in_features)

    def of_weight(self, tensor: Tensor) -> Tensor:
        """(out of the layer, in) -> view (out, in)."""
        return tensor.view(self.layer.parts, *self.shape)[self.layer.adapted[self.index]]

    def of(self, tensor: Tensor) -> Tensor:
        """A tensor shaped like one of the layer's adapter parameters -> view of this matrix's part.

        Vectors of several matrices lie one behind the other: as vectors they are not decayed.
        """
        if self.layer.parts == 1:
            return tensor
        return tensor.chunk(len(self.layer.adapted))[self.index] if tensor.dim() == 1 else tensor[self.index]

    @property
    def frozen(self) -> Plain:
        """W, to be read or changed."""
        return self.layer.frozen.part(self.of_weight)

    @property
    def weight(self) -> Tensor:
        """W (out, in), to be read only: a new tensor where the layer keeps less than float32."""
        return self.frozen.dense()

    @property
    def dtype(self) -> torch.dtype:
        """Of the values of ``weight``."""
        return trained_dtype(self.layer.weight.dtype)

    @property
    def device(self) -> torch.device:
        return self.layer.weight.device

    @property
    def A(self) -> Tensor:
        return self.of(self.layer.lora_A.detach())  # type: ignore[union-attr, operator]

    @property
    def B(self) -> Tensor:
        return self.of(self.layer.lora_B.detach())  # type: ignore[union-attr, operator]

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (out, k) and A (k, in) of the pairs that act now, detached; ``scaling * B @ A`` is the update."""
        B, A = (self.of(factor.detach()) for factor in self.layer.factors())
        acting = self.layer.acting()
        return (B, A) if acting is None else (B[:, self.of(acting)], A[self.of(acting)])
