"""The groups of parameters that an optimizer trains at rates of their own."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from srlora_pl.lowrank.linear import Adapter
from srlora_pl.lowrank.method import Method
from srlora_pl.util.errors import UserError


def param_groups(
    parameters: Iterable[nn.Parameter], rate_of: Callable[[nn.Parameter], float], weight_decay: float
) -> list[dict[str, Any]]:
    """The parameters that train, one group per distinct (learning rate, weight decay).

    Fewer groups mean fewer kernel launches. Vectors (biases, norms) are not decayed: decay pulls a scale to 0.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate_of(parameter), decay), []).append(parameter)
    return [{"params": ps, "lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]


def output_factors(layers: Mapping[str, Adapter]) -> list[Tensor]:
    """The B of all ``layers`` that trains."""
    names = ((layer, name) for layer in layers.values() for name in layer.output_factors if name in layer.adapter_names)
    return [factor for layer, name in names if (factor := getattr(layer, name)).requires_grad]


def require_output_factors(method: Method, layers: Mapping[str, Adapter]) -> None:
    """Refuse a ``lr_ratio`` of a method that has no B to train at another rate."""
    if method.lr_ratio != 1 and not output_factors(layers):
        raise UserError(
            f"method.lr_ratio is {method.lr_ratio}, but {type(method).__name__} trains no B that it could speed up: "
            "leave it at 1"
        )


def require_suitable(method: Method, layers: Mapping[str, Adapter], optimizer: Optimizer) -> None:
    """Refuse an ``optimizer`` that is not the method's own, or not made from groups with its ``lr_ratio``."""
    if not any(group["params"] for group in optimizer.param_groups):
        return  # Lightning's stand-in for no optimizer
    name, own = type(method).__name__, method.own_optimizer
    if own is not None and not isinstance(optimizer, own):
        raise UserError(
            f"{name} has an optimizer of its own, and {type(optimizer).__name__} is another: take method.optimizer("
            "adaptation, adaptation.param_groups(lr))"
        )
    fast = {id(factor) for factor in output_factors(layers)} if method.lr_ratio != 1 else set()
    for group in optimizer.param_groups:
        if len({id(parameter) in fast for parameter in group["params"]}) > 1:
            raise UserError(
                f"method.lr_ratio is {method.lr_ratio}, but the optimizer trains B and all else at one rate: make it "
                "from adaptation.param_groups(lr)"
            )
