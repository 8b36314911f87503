"""What happens to one matrix: the start along its leading directions, and a switch."""

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from srlora_pl.lowrank.linear import Matrix
from srlora_pl.lowrank.starts.spectrum import Spectrum
from srlora_pl.util.errors import UserError

# What optimizers call their running mean of gradients and their running size of gradients, both shaped like the
# parameter: SGD, Adam, AdamW (amsgrad too), NAdam, RAdam, Lion, RMSprop, Adagrad.
FIRST_MOMENTS = {"exp_avg", "momentum_buffer", "grad_avg"}
SECOND_MOMENTS = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}


def start(matrix: Matrix, spectrum: Spectrum) -> None:
    """Put the pairs on the leading singular directions and take these out of the weight (Eq. 2)."""
    B, A = spectrum.pairs(0, matrix.rank, matrix.scaling, like=matrix.weight)
    matrix.weight.addmm_(B, A, alpha=-matrix.scaling)
    matrix.B.copy_(B)
    matrix.A.copy_(A)


def replay(W: Tensor, matrix: Matrix, drawn: Spectrum, fused: list[tuple[Tensor, Tensor]]) -> None:
    """Do to W0, given as ``W`` (out, in), what `start` and `recompose` did: the same operations in the same order.

    Args:
        W: changed in place.
        matrix: whose rank and scaling hold; its values play no part.
        drawn: the directions drawn so far.
        fused: the pairs fused so far, in order, each B (out, r') and A (r', in).
    """
    s, first = matrix.scaling, matrix.rank
    W.addmm_(*drawn.pairs(0, first, s, like=W), alpha=-s)
    for B, A in fused:
        W.addmm_(B.to(W.device), A.to(W.device), alpha=s)
        W.addmm_(*drawn.pairs(first, len(A), s, like=W), alpha=-s)
        first += len(A)


def lowest(pair_scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` lowest of ``pair_scores`` (r,), ascending; ties go to the lower index."""
    return torch.argsort(pair_scores, stable=True)[:count].sort().values


def recompose(matrix: Matrix, recycled: Tensor, spectrum: Spectrum, first: int) -> tuple[Tensor, Tensor]:
    """Fuse the ``recycled`` pairs into the weight and re-draw them from direction ``first`` on (Eq. 9 to 12).

    W + scaling * B @ A, and so the layer's output, stays what it was.

    Args:
        matrix: changed in place.
        recycled: indices of pairs, ascending, (r',); they take directions ``first``, ``first + 1``, ... in this order.
        spectrum: of the pretrained weight of this matrix.
        first: the first unused direction.

    Returns:
        The fused pairs: B (out, r') and A (r', in).
    """
    W, B, A, s = matrix.weight, matrix.B, matrix.A, matrix.scaling
    fused_B, fused_A = B[:, recycled], A[recycled]
    new_B, new_A = spectrum.pairs(first, len(recycled), s, like=W)
    W.addmm_(fused_B, fused_A, alpha=s)  # Eq. 9, 10
    B[:, recycled], A[recycled] = new_B, new_A  # Eq. 11
    W.addmm_(new_B, new_A, alpha=-s)  # Eq. 12
    return fused_B, fused_A


def recycle_optimizer_state(
    optimizer: Optimizer, matrix: Matrix, recycled: Tensor, fused: tuple[Tensor, Tensor], how: str
) -> set[str]:
    """Give the ``recycled`` pairs, which have just been re-drawn, a fitting optimizer state.

    ``warm``: first moments to 0; second moments times the squared norm of the pair's new partner over that of its
    old one, since the gradient of B[:, k] scales with the norm of A[k, :]. ``zero``: both to 0.

    Args:
        optimizer: the one that trains the pairs.
        matrix: with the new pairs in place.
        recycled: their indices, (r',).
        fused: the old ones, B (out, r') and A (r', in).
        how: ``warm`` or ``zero``.

    Returns:
        Names of states that are neither of the moments known here; they were set to 0.
    """
    fused_B, fused_A = fused
    growth_B = _ratio(matrix.A[recycled].square().sum(1), fused_A.square().sum(1))
    growth_A = _ratio(matrix.B[:, recycled].square().sum(0), fused_B.square().sum(0))
    layer, unknown = matrix.layer, set()
    for parameter, rows_of, growth in (
        (layer.lora_B, lambda state: matrix.of_B(state).T, growth_B),
        (layer.lora_A, matrix.of_A, growth_A),
    ):
        for name, state in _shaped_states(optimizer, parameter):
            rows = rows_of(state)  # (r, out or in), a view
            if how == "warm" and name in SECOND_MOMENTS:
                rows[recycled] = rows[recycled] * growth[:, None].to(rows.dtype)
            else:
                rows[recycled] = 0
            unknown |= {name} - FIRST_MOMENTS - SECOND_MOMENTS
    return unknown


def _ratio(new: Tensor, old: Tensor) -> Tensor:
    """new / old, and 1 where old is 0: a partner of norm 0 has given no gradient to rescale."""
    return torch.where(old > 0, new / old, torch.ones_like(old))


def _shaped_states(optimizer: Optimizer, parameter: Tensor) -> list[tuple[str, Tensor]]:
    """The states of ``parameter`` that have its shape; scalars such as ``step`` belong to the whole tensor.

    Raises:
        UserError: for a factored state, whose rows and columns cannot be given to single pairs.
    """
    states = []
    for name, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or value.numel() == 1:
            continue
        if value.shape != parameter.shape:
            raise UserError(
                f"{type(optimizer).__name__} keeps {name!r} in shape {tuple(value.shape)} for pairs of shape "
                f"{tuple(parameter.shape)}, so single pairs cannot be recycled: set model.method.optimizer_state to "
                "'keep' or take another optimizer"
            )
        states.append((name, value))
    return states


def check_optimizer(optimizer: Optimizer, matrices: list[Matrix]) -> None:
    """Refuse, at the first step, an optimizer whose state a later switch could not handle (see `_shaped_states`)."""
    if isinstance(optimizer, LBFGS):
        raise UserError(
            "LBFGS keeps one history of all parameters, in which single pairs cannot be recycled: set "
            "model.method.optimizer_state to 'keep' or take another optimizer"
        )
    for matrix in matrices:
        _shaped_states(optimizer, matrix.layer.lora_A)
        _shaped_states(optimizer, matrix.layer.lora_B)
