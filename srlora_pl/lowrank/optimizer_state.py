"""The optimizer's memory of pairs."""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from srlora_pl.util.errors import UserError

# Names of the running mean of gradients and of their running size, both shaped like the parameter: SGD, Adam, AdamW
# (amsgrad too), NAdam, RAdam, Lion, RMSprop, Adagrad.
FIRST_MOMENTS = {"exp_avg", "momentum_buffer", "grad_avg"}
SECOND_MOMENTS = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All that ``optimizer`` trains."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """The gradients that ``optimizer`` is about to use."""
    return [parameter.grad for parameter in parameters_of(optimizer) if parameter.grad is not None]


def recycle(
    optimizer: Optimizer,
    parameter: Tensor,
    rows_of: Callable[[Tensor], Tensor],
    recycled: Tensor,
    growth: Tensor,
    how: Literal["warm", "zero"],
) -> set[str]:
    """Give the ``recycled`` pairs of ``parameter``, which have just been re-drawn, a fitting optimizer state.

    ``warm``: first moments to 0; second moments times ``growth``. ``zero``: both to 0.

    Args:
        rows_of: from a tensor like ``parameter`` to a view with one row a pair, (r, n).
        recycled: indices of rows, (r',).
        growth: of the squared gradient, (r',); see `growth_of`.

    Returns:
        Names of states that are neither of the moments known here; they were set to 0.
    """
    unknown = set()
    for name, state in _shaped_states(optimizer, parameter):
        rows = rows_of(state)
        if how == "warm" and name in SECOND_MOMENTS:
            rows[recycled] = rows[recycled] * growth[:, None].to(rows.dtype)
        else:
            rows[recycled] = 0
        unknown |= {name} - FIRST_MOMENTS - SECOND_MOMENTS
    return unknown


def growth_of(new: Tensor, old: Tensor) -> Tensor:
    """Squared norms of ``new`` over those of ``old``, both (r', n), by row.

    The gradient of a vector of a pair scales with the norm of its partner. A partner of norm 0 has given no gradient,
    and counts as 1.
    """
    squares = new.square().sum(1), old.square().sum(1)
    return torch.where(squares[1] > 0, squares[0] / squares[1], torch.ones_like(squares[1]))


def prune(
    optimizer: Optimizer, parameter: Tensor, view: Callable[[Tensor], Tensor], choose: Callable[[Tensor], Tensor]
) -> None:
    """Set the same elements of all states that are shaped like ``parameter`` to 0.

    A first moment without its second would be divided by almost nothing.

    Args:
        view: from a tensor like ``parameter`` to a view of the part that is pruned.
        choose: from that part of the first moment to the elements, a bool tensor like it.
    """
    states = sorted(_shaped_states(optimizer, parameter), key=lambda each: each[0] not in FIRST_MOMENTS)
    if states:
        chosen = choose(view(states[0][1]))
        for _, state in states:
            view(state).masked_fill_(chosen, 0)


def require_recyclable(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Refuse, at the first step, an optimizer whose state a later switch could not handle.

    Raises:
        UserError: it keeps one history for all parameters, or a factored state.
    """
    if isinstance(optimizer, LBFGS):
        raise UserError(
            "LBFGS keeps one history of all parameters, in which single pairs cannot be recycled: set "
            "model.method.optimizer_state to 'keep' or take another optimizer"
        )
    for parameter in parameters:
        _shaped_states(optimizer, parameter)


def _shaped_states(optimizer: Optimizer, parameter: Tensor) -> list[tuple[str, Tensor]]:
    """The states of ``parameter`` that have its shape; scalars such as ``step`` belong to the whole tensor."""
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
