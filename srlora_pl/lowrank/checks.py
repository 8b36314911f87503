"""Refusals of a training loop that would go wrong in silence."""

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim import Optimizer

from srlora_pl.lowrank.linear import AdaptedLinear, Adapter
from srlora_pl.lowrank.nf4 import NF4
from srlora_pl.lowrank.optimizer_state import parameters_of
from srlora_pl.lowrank.target_settings import is_below
from srlora_pl.util.errors import UserError, did_you_mean
from srlora_pl.util.signatures import defaults_of_class

_PATIENCE = 20  # steps within which every adapter must have had a gradient


def require_names(net: nn.Module, trainable: Iterable[str]) -> None:
    """Refuse an entry of ``trainable`` that matches no parameter of ``net``."""
    names = [name for name, _ in net.named_parameters()]
    for entry in trainable:
        if not any(is_below(name, [entry]) for name in names):
            near = did_you_mean(entry, {name.rpartition(".")[0] for name in names})
            raise UserError(f"trainable names {entry!r}, which matches no parameter of the model{near}")


def require_something_to_train(method: Any, parameters: Iterable[torch.Tensor]) -> None:
    """Refuse ``parameters`` of which none trains, as of a linear probe without its head."""
    if not any(parameter.requires_grad for parameter in parameters):
        raise UserError(
            f"nothing trains: {type(method).__name__} itself trains no weights of this network, name its head in "
            "trainable, such as ['head']"
        )


def require_unmerged(layers: Iterable[Adapter], before: str) -> None:
    """Refuse adapters that are merged into the weights ``before`` something that needs both."""
    if any(layer.merged for layer in layers):
        raise UserError(f"the adapters are merged into the weights, call unmerge() before {before}")


def require_full_precision(method: Any, layers: Iterable[Adapter], parameters: Iterable[torch.Tensor] = ()) -> None:
    """Refuse half precision in weights that ``method`` moves and in those of the ``parameters`` that train."""
    changed = [parameter for parameter in parameters if parameter.requires_grad]
    if method.moves_weights:
        changed += [each.weight for each in layers if isinstance(each, AdaptedLinear) and each.rest is None]
    if any(isinstance(weight, NF4) for weight in changed):
        raise UserError(
            f"{type(method).__name__} changes pretrained weights, which cannot be done in four bits (model.weights "
            "nf4): keep them in bfloat16 or float32, or take a method that leaves them, such as LoRA"
        )
    coarse = next((weight.dtype for weight in changed if weight.dtype.itemsize < 4), None)
    if coarse is not None:
        way_out = " (model.weights), or take a method that leaves them, such as LoRA" if method.trains_weights else ""
        raise UserError(
            f"{type(method).__name__} changes weights that are {coarse}, which would round the changes: keep "
            f"{'them' if method.trains_weights else 'what trains or moves'} in float32{way_out}"
        )


def require_untrained(layers: Mapping[str, Adapter]) -> None:
    """Refuse to put trained adapters, and a weight without them, for a pretrained weight."""
    if any(bool(parameter.any()) for layer in layers.values() for parameter in layer.adapter_parameters()):
        raise UserError(
            "the adapters hold values before their start, from a state that was loaded: load that of the adaptation "
            "too, and first (adaptation.load_state_dict), or a whole checkpoint of Lightning"
        )


def require_trained(layers: Mapping[str, Adapter], optimizer: Optimizer) -> None:
    """Refuse an ``optimizer`` that does not train the adapters, as one made before they were there."""
    trained = set(map(id, parameters_of(optimizer)))
    if not trained:
        return  # Lightning's stand-in for no optimizer
    for name, layer in layers.items():
        if not {id(p) for p in layer.adapter_parameters() if p.requires_grad} <= trained:
            raise UserError(
                f"the optimizer does not train the adapters of {name}: make it after the adaptation, from all "
                "parameters with requires_grad"
            )


def require_sources(method: Any) -> NoReturn:
    """Refuse a start without its sources, which only the user can give."""
    name, kind = type(method).__name__, method.starts_from
    raise UserError(f"{name} starts from a {kind} of each weight: give start() or attach() its sources")


def require_same_method(method: Any, theirs: dict[str, Any]) -> None:
    """Refuse a state of another method, or of ``method`` with other values, but for its free settings.

    Args:
        theirs: the `Method.spec` of the state; a setting that it lacks had its default before there was a choice.
    """
    ours = method.spec()
    if ours["class_path"] != theirs["class_path"]:
        raise UserError(
            f"the checkpoint was made with {theirs['class_path']} and model.method is {ours['class_path']}, "
            "use the checkpoint's method"
        )
    saved = {**defaults_of_class(type(method)), **theirs["init_args"]}
    differing = [
        f"{key} {saved.get(key)!r} (now {value!r})"
        for key, value in ours["init_args"].items()
        if saved.get(key) != value and key not in method.free_settings
    ]
    if differing:
        raise UserError(f"the checkpoint was made with method.{', '.join(differing)}, use the checkpoint's values")


def require_same_shapes(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """Refuse a state dict ``theirs`` that does not fit into the network whose is ``ours``."""
    for name in [*ours, *theirs]:
        here, there = (
            f"has shape {tuple(state[name].shape)}" if name in state else "is absent" for state in (ours, theirs)
        )
        if here != there:
            raise UserError(f"{name} {there} in the saved adaptation and {here} in this network, load it into its own")


class GradientWatch:
    """Finds adapters that never get a gradient, because the forward pass goes around them.

    It asks after a few steps, as a step may leave out layers on purpose (LayerDrop).
    """

    def __init__(self, layers: Mapping[str, Adapter]) -> None:
        self.layers, self._watched = layers, 0
        self._silent = [n for n, layer in layers.items() if any(p.requires_grad for p in layer.adapter_parameters())]

    def observe(self) -> None:
        """Look at the gradients of one step."""
        if not self._silent:
            return
        self._silent = [name for name in self._silent if not self._has_gradient(self.layers[name])]
        self._watched += 1
        if self._watched == _PATIENCE:
            self.require_gradients()

    @staticmethod
    def _has_gradient(layer: Adapter) -> bool:
        return any(parameter.grad is not None for parameter in layer.adapter_parameters())

    def require_gradients(self) -> None:
        """Refuse adapters without a gradient in all the steps so far."""
        if self._watched and self._silent:
            more = f" and {len(self._silent) - 3} more" if len(self._silent) > 3 else ""
            raise UserError(
                f"no gradient has reached {', '.join(self._silent[:3])}{more} in {self._watched} steps, so the "
                "adapters there do not train: where the forward pass never calls these layers, add them to "
                "method.exclude_modules; where it checkpoints them, do so with use_reentrant=False"
            )
