"""How timm and transformers, each in its own layout, build, run, save and load their networks."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from srlora_pl.data.protocols import Batch
from srlora_pl.models.heads import FoundHead


class ModelFamily(Protocol):
    """One network of one library: tasks build and run it, the export saves and loads it."""

    task_type: ClassVar[str | None]  # PEFT's name of the task

    @property
    def name(self) -> str:
        """``model.backbone``."""

    @property
    def random(self) -> bool:
        """Whether its weights are random, so that they cannot be loaded again."""

    @property
    def base(self) -> tuple[str, str | None]:
        """The folder or hub name of the pretrained network, as PEFT's settings give it, and its revision."""

    @property
    def recipe(self) -> str:
        """The call that loads the pretrained network with the library alone."""

    def build(self) -> tuple[nn.Module, FoundHead | None]:
        """The network in training mode, and its head if that is not new."""

    def heads(self, net: nn.Module) -> tuple[str, ...]:
        """Dotted names of the modules that the pretrained weights do not bring along."""

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        """The outputs of ``net`` for a batch of the task's."""

    def example_inputs(self, net: nn.Module) -> list[Batch]:
        """A few random inputs of the right shape for ``net``, the same in every call, float32 or int64 on the CPU."""

    def save(self, net: nn.Module, folder: Path, class_names: Sequence[str], card: dict[str, Any]) -> list[str]:
        """Write ``net`` in the library's layout, with ``card`` in its configuration; returns notes for the user."""

    def load(self, folder: Path) -> nn.Module:
        """Load what `save` wrote, with nothing but the library."""

    def served(self, net: nn.Module) -> nn.Module:
        """``net`` as a server calls it: tensors of the `served_inputs` by name to logits (B, classes)."""

    def served_inputs(self, net: nn.Module, samples: int, length: int, seed: int) -> dict[str, Tensor]:
        """Random inputs by name, whose first axis and, of texts, second one may have any size."""

    def hub_name(self, net: nn.Module) -> str | None:
        """The repository of the pretrained network on the hub, ``owner/name``; None where it has none."""


@torch.no_grad()
def example_outputs(family: ModelFamily, net: nn.Module, like: nn.Module) -> Tensor:
    """The outputs of ``net`` in evaluation mode for the example inputs of ``like``, float64 on the CPU."""
    weight = next(net.parameters())

    def there(batch: Batch) -> Batch:
        return {name: x.to(weight) if x.is_floating_point() else x.to(weight.device) for name, x in batch.items()}

    with in_evaluation(net):
        return torch.cat([family.logits(net, there(batch)) for batch in family.example_inputs(like)]).cpu().double()


@contextmanager
def in_evaluation(module: nn.Module) -> Iterator[None]:
    """Puts ``module`` into evaluation mode; afterwards modes and buffers (a count of calls, say) are as before."""
    modes = [(each, each.training) for each in module.modules()]
    buffers = [
        (each, name, buffer, buffer.clone())
        for each in module.modules()
        for name, buffer in each.named_buffers(recurse=False)
    ]
    module.eval()
    try:
        yield
    finally:
        for each, training in modes:
            each.training = training
        for each, name, buffer, value in buffers:
            setattr(each, name, buffer.copy_(value))


class Backbone:
    """A network by the arguments of a task.

    Attributes:
        name: ``model.backbone``.
        kwargs: ``model.backbone_kwargs``.
        checkpoint: ``model.backbone_checkpoint``.
        weights: their type, one of `srlora_pl.models.weights.DTYPES`.
    """

    name: str
    kwargs: dict[str, Any] | None
    checkpoint: str | None
    weights: str

    @property
    def random(self) -> bool:
        return not (self.checkpoint or (self.kwargs or {}).get("pretrained", True))

    def recipe_of(self, call: str) -> str:
        options = {key: value for key, value in (self.kwargs or {}).items() if key != "pretrained"}
        arguments = "".join(f", {key}={value!r}" for key, value in options.items())
        return f"{call}{arguments})" + (f" with the weights of {self.checkpoint}" if self.checkpoint else "")


@dataclass(frozen=True)
class Classifier(Backbone):
    """A classification network by the arguments of a task.

    Attributes:
        num_classes: outputs of the head.
    """

    name: str
    num_classes: int
    kwargs: dict[str, Any] | None = None
    checkpoint: str | None = None
    weights: str = "float32"


def about_of(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a folder in either layout."""
    return json.loads((folder / "config.json").read_text("utf-8"))


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Write it back."""
    (folder / "config.json").write_text(json.dumps(about, indent=2), "utf-8")
