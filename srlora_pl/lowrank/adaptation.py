"""A network under adaptation: the adapters that a method put in, and the history of its frozen weights."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from srlora_pl.lowrank import checks, groups, loop, storage
from srlora_pl.lowrank.formats import FORMAT, upgraded
from srlora_pl.lowrank.former_names import FormerNames
from srlora_pl.lowrank.frozen import FrozenWeights, Reload, freeze
from srlora_pl.lowrank.inference import Inference
from srlora_pl.lowrank.linear import Adapter, Matrix, precise
from srlora_pl.lowrank.method import Controller, Method, Sources
from srlora_pl.lowrank.methods import from_spec
from srlora_pl.lowrank.optimizer_state import parameters_of
from srlora_pl.util.errors import UserError
from srlora_pl.util.precision import full_precision


class Adaptation(Inference, FormerNames):
    """Puts ``method``'s adapters into ``net``, in place, and carries them through training.

    A training loop calls `attach` once. Or it calls `start` and `plan` once, then in every step `before_optimizer`
    between the backward pass and the optimizer, and `after_optimizer` behind it.

    Args:
        net: changed in place: the adapters are put in, all else is frozen.
        method: what to put where.
        trainable: dotted names of modules or parameters of ``net`` that train beside the adapters, such as ``head``;
            none of an adapted layer.
        pretrained: reloads the pretrained state dict of ``net``. With it a state can leave out what did not change, see
            `state_dict` and `restorable_parameters`.
        new: dotted names that the pretrained state dict does not hold, if these are more than ``trainable``.

    Attributes:
        layers: the adapters, by dotted name.
        matrices: the adapted weight matrices, in the order of the network.
        weights: the frozen parameters, and their ``ledgers``, by matrix.
        controller: the method's changes while training.
        started: whether the adapters have the values of a start.
        seed: of all random numbers after injection; part of the state, and from `start` on the same in all processes.
        steps_before: optimizer steps of earlier runs, whose steps were counted from 1 too.
        run_on_rank_zero: runs a function in one process and returns its result, on the CPU, in all processes that
            train this net together.

    Raises:
        UserError: see `srlora_pl.lowrank.targets.select`; or an entry of ``trainable`` that matches nothing.
    """

    def __init__(
        self,
        net: nn.Module,
        method: Method,
        trainable: Sequence[str] = (),
        pretrained: Reload | None = None,
        new: Sequence[str] = (),
    ) -> None:
        self.net, self.method, self.new = net, method, list(new)
        self.trainable = [trainable] if isinstance(trainable, str) else list(trainable)
        checks.require_names(net, self.trainable)
        # A random weight has no directions worth keeping, and no file holds it.
        self.layers: dict[str, Adapter] = precise(method.inject(net, [*self.trainable, *new]), method.moves_weights)
        self.matrices = [matrix for name, layer in self.layers.items() for matrix in layer.matrices(name)]
        for matrix in self.matrices:
            method.initialize(matrix)
        frozen = freeze(net, self.layers, method.frozen_adapter(), method.trains, self.trainable, self.new)
        groups.require_output_factors(method, self.layers)
        checks.require_full_precision(method, self.layers.values(), net.parameters())
        self.weights = FrozenWeights(net, frozen, self.matrices, pretrained)
        self.ledgers = self.weights.ledgers
        self.started = method.starts_from == "nothing"
        self.steps_before, self.seed = 0, torch.initial_seed()
        self._last_step = 0  # counted from the first of all runs
        self._planned: int | None = None  # the last step of the plan
        self._resumes = False  # from a loaded state that no plan has followed yet
        self._hooks: list[RemovableHandle] = []
        self._watch = checks.GradientWatch(self.layers)
        self.run_on_rank_zero: Callable[[Callable[[], Any]], Any] = loop.run_here
        self.controller: Controller = method.controller(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_hooks": []}  # of an optimizer that stays behind

    @property
    def step(self) -> int:
        """The optimizer steps of this run that are over."""
        return self._last_step - self.steps_before

    # --- before training

    def start(self, sources: Sources | None = None, device: torch.device | None = None) -> None:
        """Get the sources of the method's start and, on a network that has not started yet, set its values.

        On a network that has started (a second fit, a loaded state) the values stay.

        Args:
            sources: by default the method's own, such as `srlora_pl.lowrank.starts.spectrum.spectra`.
            device: of the run, where weights are changed, by default where each weight is.

        Raises:
            UserError: the adapters are merged; a weight was put into half precision; the pretrained weights are gone.
        """
        checks.require_unmerged(self.layers.values(), before="training")
        checks.require_full_precision(self.method, self.layers.values())
        self.weights.device = device
        self.seed = self.run_on_rank_zero(lambda: self.seed)
        if not self.started:
            checks.require_untrained(self.layers)
        # Weights that are split by now were taken before, while they were whole.
        if (not self.started and not self.weights.are_split) or self.weights.fingerprint is None:
            self.weights.identify()
        if self.started and not self.controller.awaits_sources():
            return
        self.weights.require_pretrained()
        found = (sources or self.method.sources() or checks.require_sources(self.method))(self)
        self.weights.forget_pretrained()
        if not self.started:
            self.weights.keep_pretrained()
            with full_precision():
                for matrix in self.matrices:
                    self.method.start(self, matrix, found[matrix.name])
            self.started = True
        self.controller.take(found)

    def add(self, matrix: Matrix, B: Tensor, A: Tensor, alpha: float) -> None:
        """W += alpha B A, with B (out, k) and A (k, in): the one way in which a frozen weight changes."""
        self.weights.add(matrix, B, A, alpha)

    def plan(self, last_step: int, first_step: int | None = None, strict: bool = True) -> str:
        """Spread the method's events over the optimizer steps after ``first_step`` up to ``last_step``.

        A plan that has begun and ends at ``last_step`` stays as it is; for another last step a new one is made, with a
        warning.

        Args:
            last_step: of the run.
            first_step: the steps done; by default 0, and after a state was loaded those done when it was saved. 0 then
                begins a run of its own.
            strict: whether a run that is too short for all events is refused; otherwise it has none.

        Returns:
            A remark for the user, or nothing.

        Raises:
            UserError: the run is too short.
        """
        if first_step is None:
            first_step = self.step if self._resumes else 0
        self._resumes, self._planned = False, last_step
        if last_step < first_step:
            raise UserError(f"the run ends at step {last_step}, but {first_step} are done: name a later last step")
        remark = self.controller.plan(first_step, last_step, strict)
        self.steps_before = max(self.steps_before, self._last_step - first_step)
        return remark

    def attach(self, optimizer: Optimizer, last_step: int, sources: Sources | None = None) -> None:
        """Start, plan, and have every ``optimizer.step()`` do the rest: a loop needs nothing else.

        The count of steps is part of the state, so that a loop goes on with `load_state_dict`, before or after this.

        Args:
            optimizer: trains the adapters; its step takes no closure.
            last_step: of the run.
            sources: see `start`.

        Raises:
            UserError: see `start` and `plan`; or the optimizer does not train the adapters, or nothing.
        """
        checks.require_something_to_train(self.method, parameters_of(optimizer))
        checks.require_trained(self.layers, optimizer)
        groups.require_suitable(self.method, self.layers, optimizer)
        self.start(sources)
        self.plan(last_step)
        for hook in self._hooks:  # of an earlier run, which would count each step twice
            hook.remove()
        self._hooks = loop.attach(self, optimizer)

    # --- in every step

    def before_optimizer(
        self, step: int, gradients: Sequence[Tensor] | None = None, inverse_scale: Tensor | None = None
    ) -> None:
        """Show the method the gradients of optimizer step ``step`` (from 1), before the optimizer's own.

        Args:
            gradients: all that must be finite for the step to count, by default those of the net's parameters.
            inverse_scale: scalar that undoes the loss scale, where the gradients still carry it.

        Raises:
            UserError: before `start`, while the adapters are merged, and for layers that never get a gradient.
        """
        if not self.started:
            raise UserError("the adapters train from a start only, call start() before the first step")
        checks.require_unmerged(self.layers.values(), before="training")
        self._watch.observe()
        if gradients is None:
            gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        self.controller.before_optimizer(step, gradients, inverse_scale)
        self.weights.forget_pretrained()  # not before: a controller that lacks its sources refuses the step

    def after_optimizer(self, step: int, optimizer: Optimizer | None = None) -> bool:
        """Do the events that are due once optimizer step ``step`` (from 1) is over; True if there were any."""
        self.reach(step)
        return self.controller.after_optimizer(step, optimizer)

    def reach(self, step: int) -> None:
        """Count optimizer step ``step`` of this run as over."""
        self._last_step = max(self._last_step, self.steps_before + step)

    def require_gradients(self) -> None:
        """Refuse adapters that had no gradient in any step so far."""
        self._watch.require_gradients()

    # --- state

    def restorable_parameters(self, trained: Iterable[Tensor] = ()) -> list[Tensor]:
        """The parameters that a compact state makes up for: frozen, and nobody has trained them since.

        Args:
            trained: all that the optimizer trains.
        """
        restorable = self.weights.reload is not None and self.weights.fingerprint is not None
        return [*self.weights.unchanged(trained).values()] if restorable else []

    def state_dict(self, compact: bool = False) -> dict[str, Any]:
        """All that the trajectory depends on besides the parameters; plain containers and tensors, none of which
        changes as training goes on.

        With ``compact`` also the adapted weights W, as updates of W0 or, where that is smaller, as they are. The
        parameters that this state makes up for are then those of `restorable_parameters`.
        """
        return {
            "format": FORMAT,
            "method": self.method.spec(),
            "compact": compact,
            "started": self.started,
            "steps_before": self.steps_before,
            "last_step": self._last_step,
            "seed": self.seed,
            **self.weights.state_dict(compact),
            "controller": self.controller.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        """Go on from ``state``; call it before the parameters are loaded, while the weights are still W0.

        Adapters that are merged into the weights come out of them first.

        Args:
            state: from `state_dict`, of this version or an earlier one.
            device: of the run, by default where each weight is. A compact state repeats the updates of W0 there, so
                that the weights are the same to the bit.

        Raises:
            UserError: the state belongs to another method, structure or pretrained weight, or to a later version.
        """
        state = upgraded(state, self.matrices)
        self.unmerge()
        checks.require_same_method(self.method, state["method"])
        asked = self._planned if self._last_step == self.steps_before else None  # by a plan that no step has followed
        self.weights.device = device
        self.weights.load_state_dict(state, state["compact"])
        self.started = state["started"]
        self.steps_before, self._last_step = state["steps_before"], state["last_step"]
        self.seed = state.get("seed", self.seed)
        self.controller.load_state_dict(state["controller"])
        self._resumes = True
        if asked is not None:
            self.plan(asked)

    def save(self, folder: str | Path) -> None:
        """Write the adapters, all else that trains, and the state as a safetensors file and a JSON file."""
        if self.weights.fingerprint is None:
            self.weights.identify()
        frozen = self.weights.unchanged()
        net = {name: value for name, value in self.net.state_dict().items() if name not in frozen}
        made_with = {"trainable": self.trainable, "new": self.new}
        storage.write(Path(folder), {**made_with, "adaptation": self.state_dict(compact=True), "net": net})

    @classmethod
    def load(cls, net: nn.Module, folder: str | Path, pretrained: Reload | None = None) -> "Adaptation":
        """Put into ``net``, which has its pretrained weights, the adaptation that `save` wrote.

        Raises:
            UserError: the folder holds none, or one of another network.
        """
        content = storage.read(Path(folder))
        method = from_spec(content["adaptation"]["method"])
        adaptation = cls(net, method, content["trainable"], pretrained, content["new"])
        adaptation.load_state_dict(content["adaptation"])
        own, frozen = net.state_dict(), adaptation.weights.unchanged()
        weights = {**{name: own[name] for name in frozen}, **content["net"]}
        checks.require_same_shapes(own, weights)
        net.load_state_dict(weights)
        return adaptation
