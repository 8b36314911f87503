"""The two roles of a method: its settings (`Method`), and all that it changes while training (`Controller`)."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srlora_pl.lowrank.frozen import FrozenWeights
from srlora_pl.lowrank.linear import AdaptedLinear, Adapter, LowRankLinear, Matrix
from srlora_pl.lowrank.own_optimizer import OwnOptimizer, split
from srlora_pl.lowrank.switch_records import SwitchRecord
from srlora_pl.lowrank.target_settings import TargetSettings
from srlora_pl.lowrank.targets import select
from srlora_pl.util.signatures import arguments_of_class


class AdaptedNetwork(Protocol):
    """The part of an `Adaptation` that its method may use."""

    net: nn.Module
    method: "Method"
    trainable: list[str]
    new: list[str]
    layers: dict[str, Adapter]
    matrices: list[Matrix]
    steps_before: int
    seed: int
    run_on_rank_zero: Callable[[Callable[[], Any]], Any]
    weights: FrozenWeights

    @property
    def step(self) -> int:
        """The optimizer steps of this run that are over."""

    def add(self, matrix: Matrix, B: Tensor, A: Tensor, alpha: float) -> None:
        """W += alpha B A."""


ShowProgress = Callable[[list[Matrix]], Iterable[Matrix]]
# Called in all processes that train together, and equal in all of them.
Sources = Callable[[AdaptedNetwork], Mapping[str, Any]]


def generator_for(name: str, seed: int | None = None) -> torch.Generator:
    """The random numbers of ``name`` alone, such as a matrix.

    Args:
        seed: by default torch's, as right after injection; later `AdaptedNetwork.seed`, which all processes share.
    """
    digest = hashlib.sha256(f"{torch.initial_seed() if seed is None else seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Gradient(NamedTuple):
    """The gradient of the loss with respect to one frozen weight, over some training samples.

    Attributes:
        total: the sum over the samples, (out, in).
        samples: how many.
        lr: the learning rate with which full fine-tuning would take its first step; None if unknown.
    """

    total: Tensor
    samples: int
    lr: float | None


def kaiming_uniform(shape: Sequence[int], name: str) -> Tensor:
    """The A (..., in) that LoRA starts from, uniform in +-1 / sqrt(in), of the random numbers of ``name``."""
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(*shape).uniform_(-bound, bound, generator=generator_for(name))


class Progress(NamedTuple):
    """How far the events of a run (`Controller.events`) are: so many done of so many planned."""

    done: int = 0
    planned: int = 0
    next_step: int | None = None

    @property
    def missing(self) -> int:
        return self.planned - self.done


class Controller:
    """All that a method changes while training besides the optimizer's steps, and its state; here nothing.

    One for each adapted network. Steps are counted from 1 in each run.
    """

    needs_length: ClassVar[bool] = False  # of the run, for `plan`
    events: ClassVar[str] = "switches"  # what `progress` counts, in the words of users

    def __init__(self, adaptation: AdaptedNetwork) -> None:
        self.adaptation = adaptation

    def awaits_sources(self) -> bool:
        """Whether `take` is still to come, on a network that has started too."""
        return False

    def take(self, sources: Mapping[str, Any]) -> None:
        """Keep the sources of the start, by matrix; on a resumed run too, whose values stay."""

    def require_room(self, steps: int) -> None:
        """Refuse a run of so many optimizer steps.

        Raises:
            UserError: they are too few.
        """

    def plan(self, first_step: int, last_step: int, strict: bool) -> str:
        """Spread the events over the optimizer steps after ``first_step`` up to ``last_step``.

        Args:
            strict: a run that is too short is refused; otherwise it has no events.

        Returns:
            A remark for the user, or nothing.
        """
        return ""

    def before_optimizer(self, step: int, gradients: Sequence[Tensor], inverse_scale: Tensor | None) -> None:
        """Read the gradients of step ``step`` or change them; without waiting for the device.

        Args:
            gradients: all that the optimizer will use.
            inverse_scale: scalar that undoes the loss scale, where the gradients still carry it.
        """

    def after_optimizer(self, step: int, optimizer: Optimizer | None) -> bool:
        """Do the events that are due once step ``step`` is over; True if there were any. Twice is the same as once."""
        return False

    def progress(self) -> Progress:
        return Progress()

    def metrics(self, step: int) -> Mapping[str, float]:
        """Numbers for the logger, as they will be once step ``step`` is over."""
        return {"switches": 0.0}

    def directions(self, matrix: Matrix) -> int:
        """How many singular directions the pairs of ``matrix`` may use."""
        return self.adaptation.method.directions(matrix)

    def histories(self) -> Mapping[str, Tensor]:
        """By matrix: the steps after which each direction was drawn and fused (-1: it is active), (n, 2), int64."""
        return {}

    def switch_records(self) -> Sequence[SwitchRecord]:
        """What the pairs were like at each switch so far, on the CPU."""
        return ()

    def scores(self) -> Mapping[str, Tensor]:
        """By matrix: the importance of its pairs, (r,), on the device."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The state, in plain containers with text as keys; no tensor of it changes later."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""


class Method(TargetSettings):
    """The settings of a method: what a config names under ``model.method``. Holds nothing of any network.

    Attributes:
        layer: the class that replaces the chosen linears; None: nothing is put in.
        starts_from: the source of the start, by matrix: nothing, or a `Spectrum`, of the pretrained weight or of the
            gradient of the loss with respect to it. Until such a start all adapter parameters are 0.
        compensates: the start leaves the network's output as it was.
        moves_weights: changes frozen weights, so that none may be in half precision.
        trains_weights: trains parameters of the network itself, see `trains`.
        averages: a parameter means the same throughout, so that weights may be averaged.
        additive: W_eff - W0 is the sum of low-rank updates, so that it can be written as one LoRA.
        rescales: W_eff is W0 and low-rank updates with its rows scaled to `AdaptedLinear.magnitudes`, so that it can be
            written as PEFT's DoRA.
        gradient_samples: how many training samples a task estimates gradients from; below 1 a share of them.
        continues_lora: a LoRA that was trained elsewhere can be the start.
        own_optimizer: the only class of optimizer that trains it, see `optimizer`; None: any does.
        lr_ratio: see `TargetSettings`; 1 for methods without.
        nested: the first pairs of a matrix, any number of them, are a model of their own; see `Adaptation.at_rank`.
        free_settings: arguments that do not touch training: a checkpoint's may differ.
        added_tokens: that it puts before every text, by which texts must be shorter than the network's limit.
    """

    layer: ClassVar[type[AdaptedLinear] | None] = LowRankLinear
    starts_from: ClassVar[Literal["nothing", "spectrum", "gradient"]] = "nothing"
    compensates: ClassVar[bool] = True
    moves_weights: ClassVar[bool] = False
    trains_weights: ClassVar[bool] = False
    averages: ClassVar[bool] = True
    additive: ClassVar[bool] = True
    rescales: ClassVar[bool] = False
    gradient_samples: float = 0.001
    continues_lora: ClassVar[bool] = False
    own_optimizer: ClassVar[type[OwnOptimizer] | None] = None
    lr_ratio: float = 1.0
    nested: ClassVar[bool] = False
    free_settings: ClassVar[tuple[str, ...]] = ()
    added_tokens: int = 0

    def inject(self, net: nn.Module, taken: Sequence[str]) -> dict[str, Adapter]:
        """Put the adapters into ``net``, in place; returns them by dotted name. Here: replace linears by ``layer``.

        Args:
            taken: dotted names of parts that are new or train whole, which no adapter belongs into.
        """
        layers: dict[str, Adapter] = {}
        if self.layer is None:
            return layers
        for target in select(net, self, taken):
            parent, _, child = target.name.rpartition(".")
            layers[target.name] = self.layer(
                target.module,
                self.rank_of(target.name),
                self.scaling_of(target.name),
                parts=3 if target.fused else 1,
                adapted=tuple(sorted(target.parts)) if target.fused else (0,),
                dropout=self.dropout,
                **self.layer_options(target.name),
            )
            setattr(net.get_submodule(parent), child, layers[target.name])
        return layers

    def layer_options(self, name: str) -> dict[str, Any]:
        """Arguments of ``layer`` for the layer ``name``, beside rank, scaling, parts and dropout."""
        return {}

    def frozen_adapter(self) -> Sequence[str]:
        """Names of adapter parameters that do not train."""
        return ()

    def trains(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether a parameter of the network itself trains, whose dotted name is ``name``."""
        return False

    def initialize(self, matrix: Matrix) -> None:
        """Set the values right after injection; they must leave the network's output as it was."""

    def directions(self, matrix: Matrix) -> int:
        """How many singular directions of this matrix the method may ever use."""
        return 0 if self.starts_from == "nothing" else matrix.rank

    def sources(self, progress: ShowProgress = iter, cache: Path | None = None) -> Sources | None:
        """The sources of a start to which none are given; None: it needs none, or only the user can give them.

        Args:
            progress: wraps the list of matrices to show how far a long computation is.
            cache: a folder that may keep the sources for the next start on these weights.
        """
        return None

    def step_of(self, gradient: Gradient) -> Tensor:
        """What a start from gradients decomposes, (out, in); here the gradient itself."""
        return gradient.total

    def start(self, adaptation: AdaptedNetwork, matrix: Matrix, source: Any) -> None:
        """Set the values of the start, once per network and before training."""

    def optimizer(
        self, adaptation: AdaptedNetwork, groups: list[dict[str, Any]], form: str = "adamw", momentum: float = 0.9
    ) -> Optimizer | None:
        """The method's own optimizer, in place of that called ``form``; None: it has none.

        Args:
            groups: of `Adaptation.param_groups`.
            form: ``adamw`` or ``sgd``.
            momentum: of ``sgd``.

        Raises:
            UserError: another form.
        """
        if self.own_optimizer is None:
            return None
        return self.own_optimizer(split(groups, self.own_settings(adaptation)), form, momentum)

    def own_settings(self, adaptation: AdaptedNetwork) -> Mapping[int, dict[str, Any]]:
        """By id of a parameter: the settings that `own_optimizer` trains it with."""
        return {}

    def rate_factor(self, step: int, last_step: float, factor: Callable[[int], float]) -> float:
        """The factor of the learning rate in optimizer step ``step`` (from 0) of a run of ``last_step`` steps.

        Args:
            last_step: infinite where nobody knows it.
            factor: that of the training loop's own schedule, warm-up and all, by step.
        """
        return factor(step)

    def controller(self, adaptation: AdaptedNetwork) -> Controller:
        return Controller(adaptation)

    def spec(self) -> dict[str, Any]:
        """``{"class_path", "init_args"}`` in plain containers: what a config holds and a checkpoint keeps."""
        home = type(self).__module__
        path = "srlora_pl" if home.startswith("srlora_pl.lowrank.") else home
        return {
            "class_path": f"{path}.{type(self).__qualname__}",
            "init_args": {name: getattr(self, name) for name in arguments_of_class(type(self))},
        }
