"""A plain training loop: the hooks of its optimizer, and its one process."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from srlora_pl.lowrank.optimizer_state import gradients_of
from srlora_pl.util.errors import UserError


class Steps(Protocol):
    """The part of an `Adaptation` that goes along with every step."""

    @property
    def step(self) -> int:
        """The optimizer steps that are over."""

    def before_optimizer(
        self, step: int, gradients: Sequence[Tensor] | None = None, inverse_scale: Tensor | None = None
    ) -> None: ...

    def after_optimizer(self, step: int, optimizer: Optimizer | None = None) -> bool: ...


def attach(steps: Steps, optimizer: Optimizer) -> list[RemovableHandle]:
    """Have every ``optimizer.step()`` call `before_optimizer` and `after_optimizer`; see `Adaptation.attach`.

    Returns:
        The hooks, whose ``remove()`` ends this.
    """

    def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(argument is not None for argument in (*args[1:], kwargs.get("closure"))):  # args[0] is the optimizer
            raise UserError("attach() takes no optimizer.step(closure): call backward() before, and step() without one")
        # A GradScaler leaves unscaling to an optimizer that is fused.
        scale = getattr(optimizer, "grad_scale", None)
        inverse_scale = None if scale is None else scale.reciprocal()
        steps.before_optimizer(steps.step + 1, gradients_of(optimizer), inverse_scale)

    def after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        steps.after_optimizer(steps.step + 1, optimizer)

    return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]


def run_here(compute: Callable[[], Any]) -> Any:
    """``compute`` in the one process there is; a function with a name, so that an adaptation can be pickled."""
    return compute()
