"""AdamW and SGD for methods that have an optimizer of their own."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from srlora_pl.util.errors import UserError
from srlora_pl.util.precision import full_precision

FORMS = ("adamw", "sgd")


class OwnOptimizer(Optimizer):
    """AdamW or SGD with momentum, whose moments may be those of another tensor than a parameter's gradient.

    A subclass trains the groups that have a value in ``own`` in a way of its own, on the gradients as clipping and
    unscaling leave them; all other groups train as with torch's, but that the weight decay is decoupled in SGD too.
    Its state is plain tensors and its groups hold plain numbers, so that it is loaded with ``weights_only=True``.

    Args:
        groups: parameters with ``lr``, ``weight_decay`` and, in own groups, the settings named in ``own``.
        form: ``adamw`` or ``sgd``.
        momentum: of ``sgd``.
        betas, eps: of ``adamw``.

    Raises:
        UserError: another form.
    """

    own: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        groups: list[dict[str, Any]],
        form: str = "adamw",
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if form not in FORMS:
            raise UserError(
                f"model.optimizer is {form!r}, but the method has an optimizer of its own, {type(self).__name__}, in "
                f"the forms {' and '.join(FORMS)}: set it to one of them"
            )
        defaults = {"lr": 1e-3, "weight_decay": 0.0, "form": form, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__(groups, {**defaults, **dict.fromkeys(self.own)})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with full_precision():
            for group in self.param_groups:
                if any(group[name] is not None for name in self.own):
                    self.step_own(group)
                else:
                    for parameter in (each for each in group["params"] if each.grad is not None):
                        self.move(parameter, self.direction(parameter, parameter.grad, group), group)
        return loss

    def step_own(self, group: dict[str, Any]) -> None:
        """One step of the parameters of an own ``group``."""
        raise NotImplementedError

    def direction(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """What to subtract for ``gradient`` at a learning rate of 1; the moments go into ``parameter``'s state."""
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)  # on the CPU, where reading it waits for no device
            moments = ("exp_avg", "exp_avg_sq") if group["form"] == "adamw" else ("momentum_buffer",)
            state.update({name: torch.zeros_like(gradient) for name in moments})
        state["step"] += 1
        if group["form"] == "sgd":
            return state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        step, (beta1, beta2) = float(state["step"]), group["betas"]
        mean, square = state["exp_avg"].lerp_(gradient, 1 - beta1), state["exp_avg_sq"]
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        return mean / (1 - beta1**step) / (square.sqrt() / (1 - beta2**step) ** 0.5 + group["eps"])

    @staticmethod
    def move(parameter: Tensor, direction: Tensor, group: dict[str, Any]) -> None:
        """Decay ``parameter`` and take a step against ``direction``."""
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])


def split(groups: list[dict[str, Any]], settings: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """``groups`` with those parameters apart that have ``settings`` of their own, by id, and grouped by these."""
    made: list[dict[str, Any]] = []
    for group in groups:
        parts: dict[tuple[Any, ...], dict[str, Any]] = {}
        for parameter in group["params"]:
            own = settings.get(id(parameter), {})
            part = parts.setdefault(tuple(own.items()), {**group, **own, "params": []})
            part["params"].append(parameter)
        made += parts.values()
    return made
