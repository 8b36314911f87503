"""What an adapted network is to programs that know nothing of this package: plain weights, or one LoRA on W0.

Factors are computed in float64 and rounded to float32 once.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srlora_pl.lowrank.ledger import Ledger
from srlora_pl.lowrank.linear import AdaptedLinear, Adapter, Matrix, SharedFactors
from srlora_pl.lowrank.method import AdaptedNetwork
from srlora_pl.lowrank.nf4 import plain
from srlora_pl.util.errors import UserError
from srlora_pl.util.precision import full_precision, trained_dtype


@dataclass(frozen=True)
class Factors:
    """What training changed in one linear layer: W_eff = W0 + ``B @ A``.

    Attributes:
        B: (out, k), float32.
        A: (k, in), float32.
        size: Frobenius norm of ``B @ A``, before a smaller k.
        lost: Frobenius norm of what a smaller k left out of it.
        magnitudes: (out,), float32; W_eff is then W0 + ``B @ A`` with its rows scaled to these norms.
    """

    B: Tensor
    A: Tensor
    size: float
    lost: float = 0.0
    magnitudes: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.B.shape[1]

    @property
    def error(self) -> float:
        """``lost`` relative to ``size``."""
        return self.lost / self.size if self.size else 0.0

    def applied_to(self, W0: Tensor) -> Tensor:
        """W_eff (out, in), float64."""
        W = W0.double() + self.B.double() @ self.A.double()
        return W if self.magnitudes is None else self.magnitudes[:, None].double() * F.normalize(W)


def overall_error(factors: Iterable[Factors]) -> float:
    """The relative error of all layers together, in the Frobenius norm."""
    lost, size = (math.hypot(*values) for values in zip(*((f.lost, f.size) for f in factors), strict=True))
    return lost / size if size else 0.0


@full_precision()
def merged_copy(
    net: nn.Module, layers: Mapping[str, Adapter], weights: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A copy of ``net`` with plain linears instead of adapters, in float32 on the CPU, in evaluation mode.

    It computes what the adapted network computes; its state has the names of the pretrained one's. Tensors that are
    float32 on the CPU already are shared with the network.

    Args:
        net: stays as it is.
        layers: its adapters, by dotted name.
        weights: by layer, (out, in); W_eff where it is left out.

    Raises:
        UserError: an adapter is no part of a weight.
    """
    kept: dict[int, object] = {id(p): nn.Parameter(_plain(p), p.requires_grad) for p in net.parameters()}
    kept |= {id(buffer): _plain(buffer) for buffer in net.buffers()}
    shared = [name for name, layer in layers.items() if isinstance(layer, SharedFactors)]
    for name, layer in layers.items():
        if name in shared:
            continue
        if not isinstance(layer, AdaptedLinear):
            kept[id(layer.module)] = layer.merged_module().to("cpu", torch.float32).requires_grad_(False)
            continue
        weight = layer.merged_weight() if weights is None else weights[name]
        kept[id(layer)] = _linear(weight, None if layer.bias is None else kept[id(layer.bias)])
    # deepcopy takes what it finds here for copies that it has made already
    copied = copy.deepcopy(net, kept).eval()
    for name in shared:
        parent, _, child = name.rpartition(".")
        delattr(copied.get_submodule(parent), child)
    return copied


def _plain(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return plain(tensor.detach(), dtype).to("cpu").contiguous()


def _linear(weight: Tensor, bias: object) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(_plain(weight), requires_grad=False)
    linear.bias = bias  # type: ignore[assignment]
    return linear


@full_precision()
def change(
    adaptation: AdaptedNetwork, rank: int | None = None, before: Mapping[str, tuple[Tensor, Tensor]] | None = None
) -> dict[str, Factors]:
    """W_eff by layer, as a change of W0: exact, or the best approximation of at most ``rank``.

    W_eff - W0 = s B A + all updates in the ledger, where the method does not rescale it. Stacked, they are the factors;
    their rank is at most the number of their columns, in a fused linear summed over its matrices, and never above
    min(out, in). A layer in which no pair acts is left out.

    Args:
        adaptation: stays as it is.
        rank: None for the exact factors.
        before: B (out, k) and A (k, in) by layer of a LoRA that was merged into the pretrained weights before; they
            are added, for layers without adapters too.

    Raises:
        UserError: the method's change is no sum of low-rank updates; or ``rank`` is below 1 or above min(out, in) of a
            layer.
    """
    method = adaptation.method
    if not (method.additive or method.rescales):
        raise UserError(
            f"{type(method).__name__} does not train low-rank updates of weights alone, so no LoRA holds what it "
            "trained: take the merged weights (--format merged), if there are any, or the checkpoint itself"
        )
    before, factors, pretrained = before or {}, {}, None
    groups = {name: list(group) for name, group in groupby(adaptation.matrices, lambda matrix: matrix.layer_name)}
    for name in [*groups, *(name for name in before if name not in groups)]:
        stacks = [(_double(B), _double(A)) for B, A in [before[name]]] if name in before else []
        limit = sum(B.shape[1] for B, _ in stacks)
        matrices = groups.get(name, [])
        ledgers = adaptation.weights.ledgers
        limit += sum(matrix.rank + ledgers[matrix].rank for matrix in matrices)
        if any(ledgers[matrix].updates is None for matrix in matrices):
            pretrained = pretrained or adaptation.weights.pretrained()
            stacks.append(_difference(matrices[0].layer, pretrained[name]))
        else:
            stacks += [_in_rows_of_layer(matrix, *stacked(matrix, ledgers[matrix])) for matrix in matrices]
        B, A = torch.cat([B for B, _ in stacks], 1), torch.cat([A for _, A in stacks])
        smallest = min(len(B), A.shape[1])
        if rank is not None and not 1 <= rank <= smallest:
            raise UserError(f"rank {rank} does not lie between 1 and min(out, in) = {smallest} of {name}, change it")
        found = _factorize(B, A, min(limit, smallest), rank)
        if found.rank:
            factors[name] = replace(found, magnitudes=_magnitudes(adaptation, name)) if method.rescales else found
    return factors


def _magnitudes(adaptation: AdaptedNetwork, name: str) -> Tensor:
    """The row norms of a layer's W_eff, adapted or not."""
    layer = adaptation.net.get_submodule(name)
    own = layer.magnitudes() if isinstance(layer, AdaptedLinear) else None
    if own is None:
        weight = layer.get_parameter("weight")
        own = weight.to(trained_dtype(weight.dtype)).norm(dim=1)
    return _double(own).float()


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def _difference(layer: AdaptedLinear, pretrained: Tensor) -> tuple[Tensor, Tensor]:
    """W_eff - W0 where the updates are not known any more, and the identity on its smaller side."""
    difference = _double(layer.merged_weight()) - _double(pretrained)
    identity = torch.eye(min(difference.shape), dtype=torch.float64)
    return (difference, identity) if len(difference) > len(identity) else (identity, difference)


def stacked(matrix: Matrix, ledger: Ledger) -> tuple[Tensor, Tensor]:
    """W_eff - W0 of one matrix as B (out, k) @ A (k, in), float64 on the CPU; the ledger must know its updates."""
    (B, A), (past_B, past_A) = matrix.factors(), ledger.stacked()
    return torch.cat([matrix.scaling * _double(B), past_B], 1), torch.cat([_double(A), past_A])


def _in_rows_of_layer(matrix: Matrix, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """B (out of the layer, k), with the matrix's own in its rows, and A."""
    rows = B.new_zeros(matrix.layer.parts, *B.shape)
    rows[matrix.layer.adapted[matrix.index]] = B
    return rows.flatten(0, 1), A


def _factorize(B: Tensor, A: Tensor, limit: int, rank: int | None) -> Factors:
    """``B @ A``, whose rank is at most ``limit``, in at most ``rank`` pairs."""
    keep = limit if rank is None else min(rank, limit)
    if B.shape[1] <= keep:
        size = ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt()
        return Factors(B.float(), A.float(), float(size))
    # The singular values of a product are those of its small core.
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, sigma, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    root = sigma[:keep].sqrt()
    B, A = (Q_B @ U[:, :keep]) * root, root[:, None] * (Vh[:keep] @ Q_A.T)
    # What lies beyond the exact rank is rounding.
    return Factors(B.float(), A.float(), float(sigma[:limit].norm()), float(sigma[keep:limit].norm()))
