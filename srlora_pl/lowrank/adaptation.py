"""A network under adaptation: its pairs, their spectra and scores, and the switches done and to come."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srlora_pl.lowrank import recompose
from srlora_pl.lowrank.importance import Importance, all_finite
from srlora_pl.lowrank.linear import LowRankLinear, Matrix
from srlora_pl.lowrank.matrix_state import MatrixState
from srlora_pl.lowrank.methods import Method, SRLoRA
from srlora_pl.lowrank.methods.base import is_below
from srlora_pl.lowrank.schedule import Schedule
from srlora_pl.lowrank.starts.spectrum import Spectrum, SpectrumCache, fingerprint
from srlora_pl.lowrank.targets import inject
from srlora_pl.util.errors import UserError, did_you_mean
from srlora_pl.util.precision import float64_device, full_precision

_PATIENCE = 20  # steps within which every layer must have had a gradient


class Adaptation:
    """Puts ``method``'s pairs into ``net``, in place, and carries them through training.

    A training loop calls `start` and `plan` once, then in every step `observe` between the backward pass and the
    optimizer, and `switch_if_due` after it.

    Args:
        net: changed in place: the chosen linears become `LowRankLinear`, all else is frozen.
        method: what to put where.
        trainable: dotted names of modules or parameters of ``net`` that train beside the pairs, such as ``head``;
            none of an adapted layer.
        pretrained: gives the state of ``net`` as it is now once more, from the file or the name that it came from.
            With it a state can leave out what did not change, see `state_dict` and `untouched`.
        new: dotted names of what ``pretrained`` does not give, if that is more than ``trainable``.

    Raises:
        UserError: see `srlora_pl.lowrank.targets.select`; or an entry of ``trainable`` that matches nothing.
    """

    def __init__(
        self,
        net: nn.Module,
        method: Method,
        trainable: Sequence[str] = (),
        pretrained: Callable[[], Mapping[str, Tensor]] | None = None,
        new: Sequence[str] = (),
    ) -> None:
        self.net, self.method, self.pretrained = net, method, pretrained
        trainable = [trainable] if isinstance(trainable, str) else trainable
        # A random weight has no directions worth keeping, and nothing gives it once more.
        self.layers: dict[str, LowRankLinear] = inject(net, method, [*trainable, *new])
        self.matrices = [matrix for name, layer in self.layers.items() for matrix in layer.matrices(name)]
        self.states = {matrix: MatrixState(matrix) for matrix in self.matrices}
        for matrix in self.matrices:
            method.initialize(matrix)
        self._freeze(trainable)
        # All that a pretrained state holds and training leaves alone, with torch's counts of writes to it.
        frozen = {name: p for name, p in net.named_parameters() if not p.requires_grad}
        self._base = {name: p._version for name, p in frozen.items() if not is_below(name, new)}
        self._changed: set[str] = set()  # of these, what somebody else has trained
        self.importance: Importance | None = None
        if isinstance(method, SRLoRA):
            self.importance = Importance(list(self.layers.values()), method.beta1, method.beta2)
        self.started = not method.needs_spectrum
        self.base_fingerprint: str | None = None  # of W0; known from the start or from a loaded state on
        self.schedules: dict[int, Schedule] = {}  # by rank: with a rank_pattern each rank walks at its own pace
        self.switches_done = 0  # of the rank that switches most often
        self._done: dict[int, int] = {}  # by rank, since the plan
        self.steps_before = 0  # of earlier runs, whose steps were counted from 0 too; what `intervals` add to a step
        self._last_step = 0  # in the count of `intervals`
        self._resumes = False  # from a loaded state, which no plan has followed yet
        # W0 of every layer and the fingerprint, kept from a start until training, for a load that may come between,
        # and from a load until the start that may follow
        self._kept: tuple[dict[str, Tensor], str] | None = None
        self._silent, self._watched = list(self.layers), 0  # layers without a gradient in this many steps
        self._observes = False  # now, or in the run of a loaded state
        # Runs a function in one process and gives its result, on the CPU, to all that train this net together.
        self.once: Callable[[Callable[[], Any]], Any] = _in_the_only_process

    def _freeze(self, trainable: Sequence[str]) -> None:
        pairs = {id(p) for layer in self.layers.values() for p in (layer.lora_A, layer.lora_B)}
        names = [name for name, _ in self.net.named_parameters()]
        for entry in trainable:
            if not any(is_below(name, [entry]) for name in names):
                near = did_you_mean(entry, {name.rpartition(".")[0] for name in names})
                raise UserError(f"trainable names {entry!r}, which matches no parameter of the model{near}")
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(id(parameter) in pairs or is_below(name, trainable))

    # --- before training -----------------------------------------------------------------------------------------

    def start(
        self,
        device: torch.device | None = None,
        progress: Callable[[list[Matrix]], Iterable[Matrix]] = iter,
        cache: Path | None = None,
    ) -> None:
        """Compute the spectra and, on a model that has not started yet, put the pairs on them (Eq. 1 and 2).

        On a model that has started (a second fit, a loaded state) the values stay. For methods without a spectrum
        nothing happens.

        Args:
            device: where to compute the spectra and the start, by default where each weight is.
            progress: wraps the list of matrices to show how far the computation is.
            cache: a folder that keeps the spectra for the next start on these weights.

        Raises:
            UserError: the pairs are merged into the weights.
        """
        self.require_unmerged()
        coarse = [matrix.weight.dtype for matrix in self.matrices if matrix.weight.dtype.itemsize < 4]
        if coarse and self.method.needs_spectrum:
            raise UserError(f"the weights are {coarse[0]}, which a start or a switch would round, keep them in float32")
        if not self.started:
            self._require_new()
        if not self.started or self.base_fingerprint is None:
            if any(p._version != self._base[name] for name, p in self._base_parameters().items()):
                self.pretrained = None  # other weights were loaded after it was given
            self.base_fingerprint = self._fingerprint()
        if not self.method.needs_spectrum:
            return
        if any(state.spectrum is None for state in self.states.values()):
            self._take_spectra(device, progress, cache)
        if not self.started:
            self._keep_pretrained(self.base_fingerprint)
            with full_precision():
                for matrix, state in self.states.items():
                    assert state.spectrum is not None
                    self.method.start(matrix, state.spectrum)
                    if device is not None and device != matrix.weight.device:
                        self._replay_start(matrix, state, device)
            self.started = True

    def require_unmerged(self, before: str = "training") -> None:
        """Refuse pairs that are merged into the weights ``before`` something that needs both."""
        if any(layer.merged for layer in self.layers.values()):
            raise UserError(f"the pairs are merged into the weights, call unmerge() before {before}")

    def _require_new(self) -> None:
        """Refuse to put trained pairs, and a weight without them, for a pretrained weight."""
        if any(bool(matrix.A.any() or matrix.B.any()) for matrix in self.matrices):
            raise UserError(
                "the pairs hold values before their start, from a state that was loaded: load that of the adaptation "
                "too, and first (adaptation.load_state_dict), or a whole checkpoint of Lightning"
            )

    def _replay_start(self, matrix: Matrix, state: MatrixState, device: torch.device) -> None:
        """Set the weight to what a compact state will be replayed to on ``device``, which may round differently."""
        assert self._kept is not None
        assert state.drawn is not None
        W = matrix.of_weight(self._kept[0][matrix.layer_name]).to(device, copy=True)
        recompose.replay(W, matrix, state.drawn, [])
        matrix.weight.copy_(W)

    def _take_spectra(
        self,
        device: torch.device | None,
        progress: Callable[[list[Matrix]], Iterable[Matrix]],
        cache: Path | None,
    ) -> None:
        if self.started and self._kept is None:
            raise UserError(
                "the model has already started and its pretrained weights are gone, so their singular directions "
                "cannot be computed: call start() before loading weights, or let the trainer load with ckpt_path"
            )
        kept, their_fingerprint = self._kept or ({}, self.base_fingerprint)
        self._require_base(their_fingerprint)
        spectra = self.once(partial(self._spectra, kept, device, progress, cache))
        for matrix, state in self.states.items():
            drawn = state.drawn
            state.spectrum = spectra[matrix.name]
            state.drawn = drawn
        self._kept = None

    def _spectra(
        self,
        kept: Mapping[str, Tensor],
        device: torch.device | None,
        progress: Callable[[list[Matrix]], Iterable[Matrix]],
        cache: Path | None,
    ) -> dict[str, Spectrum]:
        """Of every matrix, from ``cache``, or of W0: the weight in ``kept`` or, where there is none, the layer's."""
        directions = {matrix.name: self.method.directions(matrix) for matrix in self.matrices}
        dtype = str(self.matrices[0].weight.dtype).removeprefix("torch.")
        file = None if cache is None else SpectrumCache(cache, f"{self.base_fingerprint}-{dtype}")
        if file is not None and (found := file.read(directions)) is not None:
            return found
        spectra = {}
        with full_precision():
            for matrix in progress(self.matrices):
                weight = matrix.of_weight(kept.get(matrix.layer_name, matrix.layer.weight.detach()))
                weight = weight.to(matrix.weight.device if device is None else device, matrix.weight.dtype)
                spectra[matrix.name] = Spectrum.of(weight, directions[matrix.name], matrix.name)
        if file is not None:
            file.write(spectra, directions)
        return spectra

    def _keep_pretrained(self, base_fingerprint: str) -> None:
        kept = {name: layer.weight.detach().to("cpu", copy=True) for name, layer in self.layers.items()}
        self._kept = kept, base_fingerprint

    def _fingerprint(self) -> str:
        return fingerprint(self._base_parameters())

    def _base_parameters(self) -> dict[str, Tensor]:
        parameters = dict(self.net.named_parameters())
        return {name: parameters[name] for name in self._base}

    def plan(self, last_step: int, first_step: int | None = None) -> None:
        """Spread the switches that remain over the optimizer steps ``first_step`` to ``last_step`` (Eq. 13, 14).

        A plan that has begun and ends at ``last_step`` stays as it is; that of a longer or shorter run is made anew,
        with a warning.

        Args:
            last_step: of the run.
            first_step: the steps done; by default 0, and after a state was loaded those done when it was saved. 0 then
                begins a run of its own.

        Raises:
            UserError: more switches than steps.
        """
        if first_step is None:
            first_step = self._last_step - self.steps_before if self._resumes else 0
        self._resumes = False
        begun = self.schedules if first_step > 0 else {}
        if begun and {schedule.last_step for schedule in begun.values()} == {last_step}:
            return
        if last_step < first_step:
            raise UserError(f"the run ends at step {last_step}, but {first_step} are done: name a later last step")
        self._take_plan(self.require_room(last_step - first_step), last_step, first_step)
        if begun:
            warnings.warn(
                f"the run now ends at step {last_step}: {self.switches_to_do} switches are spread over the steps from "
                f"{first_step} on",
                stacklevel=2,
            )
        if self.schedules:
            self._warn_of_limits()

    def _take_plan(self, planned: dict[int, int], last_step: int, first_step: int) -> None:
        self.schedules = {rank: Schedule(first_step, last_step, count) for rank, count in planned.items()}
        self._done = dict.fromkeys(planned, 0)
        self.steps_before = max(self.steps_before, self._last_step - first_step)

    def require_room(self, steps: int) -> dict[int, int]:
        """N_switch (Eq. 13) of the directions that remain, by rank; empty for methods that never switch.

        Raises:
            UserError: more switches than ``steps``.
        """
        method = self.method
        if not isinstance(method, SRLoRA):
            return {}
        used: dict[int, int] = {}  # directions, by rank
        for matrix, state in self.states.items():
            used[matrix.rank] = max(used.get(matrix.rank, 0), state.next_direction)
        planned = {r: max(self._reach - n, 0) // method.recycled_rank(r) for r, n in sorted(used.items())}
        rank, most = max(planned.items(), key=lambda each: each[1])
        if most > steps:
            # As far as `steps` switches go and directions too few for one more, at every rank.
            fits = min(n + method.recycled_rank(r) * (steps + 1) - 1 for r, n in used.items())
            # Not where directions were drawn already, nor below a rank.
            can_be_lower = all(r == n for r, n in used.items()) and fits >= max(method.rank, *used)
            raise UserError(
                f"{most} switches (method.target_rank {method.target_rank}, rank {rank}, fusion_ratio "
                f"{method.fusion_ratio}) do not fit into {steps} optimizer steps, "
                f"{f'lower method.target_rank to {fits} or ' if can_be_lower else ''}raise trainer.max_steps by "
                f"{most - steps}"
            )
        return planned

    @property
    def _reach(self) -> int:
        """r_target, or the largest min(out, in) of the adapted matrices where that is smaller."""
        return max(self.method.directions(matrix) for matrix in self.matrices)

    def forgo_switches(self, last_step: int, first_step: int = 0) -> None:
        """A plan without any switch, for runs too short for one."""
        self._take_plan(dict.fromkeys((matrix.rank for matrix in self.matrices), 0), last_step, first_step)

    def _warn_of_limits(self) -> None:
        assert isinstance(self.method, SRLoRA)
        reach, short, uneven = self._reach, [], set()
        for matrix, state in self.states.items():
            recycled = self.method.recycled_rank(matrix.rank)
            if (reach - state.next_direction) % recycled:
                uneven.add((matrix.rank, recycled))
            if self.available(matrix) < reach:
                short.append(f"{matrix.name} ({self.available(matrix)})")
        if self.method.target_rank > reach:
            warnings.warn(
                f"target_rank {self.method.target_rank} is above min(out, in) of every adapted matrix; switches are "
                f"planned for {reach}",
                stacklevel=3,
            )
        for rank, recycled in sorted(uneven):
            warnings.warn(
                f"the directions left up to {reach} are no whole number of switches of {recycled} for rank {rank}; "
                "the remainder stays unused",
                stacklevel=3,
            )
        if short:
            warnings.warn(
                f"these matrices have fewer than {reach} singular directions and stop switching when theirs are used "
                f"up: {', '.join(short)}",
                stacklevel=3,
            )

    def available(self, matrix: Matrix) -> int:
        """How many singular directions the pairs of ``matrix`` may walk through; 0 for methods without a spectrum."""
        spectrum = self.states[matrix].spectrum
        return self.method.directions(matrix) if spectrum is None else len(spectrum)

    # --- in every step -------------------------------------------------------------------------------------------

    def observe(self, gradients: Sequence[Tensor] | None = None, inverse_scale: Tensor | None = None) -> None:
        """Take the gradients of this step into the scores (Eq. 3 to 5); call it before the optimizer's step.

        Args:
            gradients: all that must be finite for the step to count, by default those of the net's parameters.
            inverse_scale: scalar that undoes the loss scale, where the gradients still carry it.

        Raises:
            UserError: before `start`, while the pairs are merged, and for layers that never get a gradient.
        """
        if not self.started:
            raise UserError("the pairs train from a start only, call start() before the first step")
        self.require_unmerged()
        if self._kept is not None and self.switches_missed:
            self._require_directions()
        self._kept, self._observes = None, True
        if self._silent:
            self._silent = [name for name in self._silent if self.layers[name].lora_B.grad is None]
            self._watched += 1
            if self._watched == _PATIENCE:
                self.require_gradients()
        if self.importance is None:
            return
        if gradients is None:
            gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        own = {id(p.grad) for p in self.importance.parameters}
        self.importance.update(all_finite([each for each in gradients if id(each) not in own]), inverse_scale)

    def _require_directions(self) -> None:
        if any(state.spectrum is None for state in self.states.values()):
            raise UserError(
                "a loaded state does not hold the directions of the switches to come, call start() too, before the "
                "first step"
            )

    def require_gradients(self) -> None:
        """Refuse layers that no step observed so far had a gradient for: their pairs do not train.

        `observe` asks this after a few steps, as a step may leave out layers on purpose (LayerDrop).
        """
        if self._watched and self._silent:
            more = f" and {len(self._silent) - 3} more" if len(self._silent) > 3 else ""
            raise UserError(
                f"no gradient has reached {', '.join(self._silent[:3])}{more} in {self._watched} steps, so the pairs "
                "there do not train: where the forward pass never calls these layers, add them to "
                "method.exclude_modules; where it checkpoints them, do so with use_reentrant=False"
            )

    def switch_if_due(self, step: int, optimizer: Optimizer | None = None) -> bool:
        """Do the switches that are due once optimizer step ``step`` (counted from 1) is over; True if there were any.

        How many are due is compared with how many were done, so that a switch that a stopped run missed is made up.
        """
        if self.importance is not None and not self.schedules:
            raise UserError("no switch is planned, call plan() before training")
        self.reached(step)
        due = {rank: schedule.due(step) for rank, schedule in self.schedules.items()}
        if optimizer is not None and step == 1 and self._recycles_state():
            recompose.check_optimizer(optimizer, self.matrices)
        before, switched = self._most_done, False
        while ranks := {rank for rank in due if due[rank] > self._done[rank]}:
            self._switch([m for m in self.matrices if m.rank in ranks], self.steps_before + step, optimizer)
            for rank in ranks:
                self._done[rank] += 1
            switched = True
        self.switches_done += self._most_done - before
        return switched

    def reached(self, step: int) -> None:
        """Optimizer step ``step`` of this run is over: another one, which counts from 0 again, goes on from there."""
        self._last_step = max(self._last_step, self.steps_before + step)

    def switches_after(self, step: int) -> int:
        """How many switches will have been done once optimizer step ``step`` is over."""
        due = max((schedule.due(step) for schedule in self.schedules.values()), default=0)
        return self.switches_done + max(due - self._most_done, 0)

    @property
    def _most_done(self) -> int:
        """Switches since the plan, of the rank that has done most."""
        return max(self._done.values(), default=0)

    def _recycles_state(self) -> bool:
        return isinstance(self.method, SRLoRA) and self.method.optimizer_state != "keep" and self.switches_to_do > 0

    def _switch(self, matrices: list[Matrix], step: int, optimizer: Optimizer | None) -> None:
        method, importance = self.method, self.importance
        assert isinstance(method, SRLoRA)
        assert importance is not None
        self.require_unmerged()
        if not self._observes:
            raise UserError("nothing has scored the pairs, call observe() in every step, before that of the optimizer")
        self._require_directions()
        if optimizer is not None:
            self.require_trained(optimizer)
        recycled_pairs = self._choose(matrices, method, importance)
        unknown: set[str] = set()
        with full_precision():
            for matrix, recycled in recycled_pairs.items():
                state = self.states[matrix]
                assert state.spectrum is not None
                fused = recompose.recompose(matrix, recycled, state.spectrum, state.next_direction)
                if optimizer is not None and method.optimizer_state != "keep":
                    unknown |= recompose.recycle_optimizer_state(
                        optimizer, matrix, recycled, fused, method.optimizer_state
                    )
                state.record(recycled.cpu(), fused, step)
                if self.pretrained is not None and state.outgrows(matrix.shape):
                    state.fused = None
            # All of those that walk at this pace; with a rank_pattern the others score on.
            importance.reset(dict.fromkeys(matrices) if method.reset_scores == "all" else recycled_pairs)
        if unknown:
            warnings.warn(
                f"{type(optimizer).__name__} keeps {', '.join(sorted(unknown))}, unknown to a switch: set to 0 for "
                "recycled pairs",
                stacklevel=2,
            )

    def require_trained(self, optimizer: Optimizer) -> None:
        """Refuse an ``optimizer`` that does not train the pairs, as one made before they were there."""
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not trained:
            return  # Lightning's stand-in for no optimizer
        for name, layer in self.layers.items():
            if not {id(p) for p in (layer.lora_A, layer.lora_B) if p.requires_grad} <= trained:
                raise UserError(
                    f"the optimizer does not train the pairs of {name}: make it after the adaptation, from all "
                    "parameters with requires_grad"
                )

    def _choose(self, matrices: list[Matrix], method: SRLoRA, importance: Importance) -> dict[Matrix, Tensor]:
        """The pairs to recycle, (r',) of each matrix whose spectrum is not used up; one process decides for all."""
        counts = {matrix: method.recycled_rank(matrix.rank) for matrix in matrices}
        counts = {m: n for m, n in counts.items() if self.states[m].next_direction + n <= self.available(m)}
        if not counts:
            return {}

        def lowest_of_each() -> Tensor:
            scores = importance.pair_scores(list(counts))
            return torch.cat([recompose.lowest(s, n) for s, n in zip(scores, counts.values(), strict=True)]).cpu()

        chosen = self.once(lowest_of_each).to(importance.smoothed.device)
        return dict(zip(counts, chosen.split(list(counts.values())), strict=True))

    @property
    def switches_to_do(self) -> int:
        """How many switches the plan holds that fall before its end."""
        return max((schedule.to_do for schedule in self.schedules.values()), default=0)

    @property
    def switches_missed(self) -> int:
        """How many of the plan's switches have not been done."""
        return max((schedule.to_do - self._done[rank] for rank, schedule in self.schedules.items()), default=0)

    @property
    def next_switch(self) -> int | None:
        """The optimizer step after which the plan's next switch falls; None where there is none to come."""
        plans = [(schedule, self._done[rank]) for rank, schedule in self.schedules.items()]
        return min((plan.step_of(done + 1) for plan, done in plans if done < plan.to_do), default=None)

    @property
    def switches_planned(self) -> int:
        """N_switch of Eq. 13; the last of them would fall on the last step and is not done."""
        return max((schedule.planned for schedule in self.schedules.values()), default=0)

    # --- looking at the result -----------------------------------------------------------------------------------

    def merge(self) -> None:
        """Put all pairs into the weights, for inference."""
        for layer in self.layers.values():
            layer.merge()

    def unmerge(self) -> None:
        """Undo `merge`, to the bit."""
        for layer in self.layers.values():
            layer.unmerge()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the net computes with the pretrained weights W0 (equal to rounding) and without pairs.

        What trains beside the pairs, such as a head, stays as trained, and so do statistics that a forward pass
        updates (BatchNorm).
        """
        if self._is_disabled:
            yield
            return
        weights = {name: layer.weight.data for name, layer in self.layers.items()}
        pretrained = self.pretrained_weights()
        try:
            for name, layer in self.layers.items():
                layer.weight.data, layer.disabled = pretrained[name], True
            yield
        finally:
            for name, layer in self.layers.items():
                layer.weight.data, layer.disabled = weights[name], False

    @property
    def _is_disabled(self) -> bool:
        return any(layer.disabled for layer in self.layers.values())

    @torch.no_grad()
    def pretrained_weights(self) -> dict[str, Tensor]:
        """W0 of every layer; equal to rounding where only W, the fused pairs and the spectra are left to tell it."""
        if self._is_disabled:
            return {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        weights = {name: layer.unmerged_weight.clone() for name, layer in self.layers.items()}
        if not (self.started and self.method.needs_spectrum):
            return weights
        if self._kept is not None and self._kept[1] == self.base_fingerprint:
            source: Mapping[str, Tensor] = self._kept[0]
        elif self.pretrained is not None:
            state = self.pretrained()
            self._require_base(fingerprint({name: state[name] for name in self._base}))
            source = {name: state[f"{name}.weight"] for name in self.layers}
        else:
            return self._without_history(weights)
        return {name: source[name].to(weight, copy=True) for name, weight in weights.items()}

    def _without_history(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """``weights`` after all that the start and the switches did to them is undone, in place."""
        with full_precision():
            for matrix, state in self.states.items():
                drawn = state.drawn
                assert drawn is not None
                assert state.fused is not None
                W0, s = matrix.of_weight(weights[matrix.layer_name]), matrix.scaling
                for B, A in state.fused:
                    W0.addmm_(B.to(W0.device), A.to(W0.device), alpha=-s)
                W0.addmm_(*drawn.pairs(0, state.next_direction, s, like=W0), alpha=s)
        return weights

    # --- state ---------------------------------------------------------------------------------------------------

    def state_dict(self, compact: bool = False) -> dict[str, Any]:
        """All that the trajectory depends on besides the parameters; plain containers and tensors, none of which
        changes as training goes on.

        With ``compact`` also the adapted weights W, as what was done to W0 or, where that is smaller, as they are.
        The parameters that this state makes up for are then those that `untouched` names.
        """
        return {
            "method": self.method.spec(),
            "base_fingerprint": self.base_fingerprint,
            "compact": compact,
            "changed": sorted(self._changed),
            "started": self.started,
            "switches_done": self.switches_done,
            "done": dict(self._done),
            "steps_before": self.steps_before,
            "last_step": self._last_step,
            "schedules": {rank: asdict(schedule) for rank, schedule in self.schedules.items()},
            "smoothed": None if self.importance is None else self.importance.smoothed.clone(),
            "uncertainty": None if self.importance is None else self.importance.uncertainty.clone(),
            "matrices": {matrix.name: self._matrix_state(matrix, compact) for matrix in self.matrices},
        }

    def _matrix_state(self, matrix: Matrix, compact: bool) -> dict[str, Any]:
        state = self.states[matrix]
        dense = state.fused is None or (compact and state.outgrows(matrix.shape))
        drawn = None if dense or not self.started else state.drawn
        return {
            "directions": state.directions.clone(),
            "intervals": state.intervals.clone(),
            "fused": None if dense else list(state.fused or ()),
            "drawn": drawn and (drawn.U, drawn.sigma, drawn.Vh),
            "weight": matrix.of_weight(matrix.layer.unmerged_weight).clone() if dense and compact else None,
        }

    def untouched(self, trained: Iterable[Tensor] = ()) -> list[Tensor]:
        """The parameters that a state may leave out: the method froze them, and nobody has trained them since.

        Args:
            trained: what the optimizer trains.
        """
        if self.pretrained is None or self.base_fingerprint is None:
            return []
        trained_ids = {id(parameter) for parameter in trained}
        base = self._base_parameters()
        self._changed |= {name for name, p in base.items() if p.requires_grad or id(p) in trained_ids}
        return [parameter for name, parameter in base.items() if name not in self._changed]

    def load_state_dict(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        """Continue from ``state``; call it before the parameters are loaded, while the weights are still W0.

        Pairs that are merged into the weights come out of them first.

        Args:
            state: from `state_dict`.
            device: that of the run, by default where each weight is: a compact state does there once more what the
                start and the switches did, so that the weights are the same to the bit.

        Raises:
            UserError: the state belongs to another method, another structure or another pretrained weight.
        """
        self.unmerge()
        asked = {plan.last_step for plan in self.schedules.values() if self._last_step == self.steps_before}
        fresh = not self.started or not self.method.needs_spectrum  # the weights are W0
        if state["compact"] and self.base_fingerprint is None:
            self.base_fingerprint = self._fingerprint()
        self._require_same(state)
        if state["started"] and self.method.needs_spectrum and fresh:
            self._keep_pretrained(self.base_fingerprint or self._fingerprint())
        if state["compact"]:
            self._rebuild(state, {} if fresh else self.pretrained_weights(), device)
        self.started, self.base_fingerprint = state["started"], state["base_fingerprint"]
        self.switches_done, self._done = state["switches_done"], dict(state["done"])
        self.steps_before, self._last_step = state.get("steps_before", 0), state.get("last_step", 0)
        self.schedules = {rank: Schedule(**schedule) for rank, schedule in state["schedules"].items()}
        self._changed = set(state["changed"])
        self._observes = state["started"]
        if self.importance is not None:
            averages = self.importance.smoothed.device
            self.importance.smoothed = state["smoothed"].to(averages, copy=True)
            self.importance.uncertainty = state["uncertainty"].to(averages, copy=True)
        for matrix in self.matrices:
            saved, own = state["matrices"][matrix.name], self.states[matrix]
            own.directions, own.intervals = saved["directions"].cpu().clone(), saved["intervals"].cpu().clone()
            own.fused = None if saved["fused"] is None else [(B.cpu(), A.cpu()) for B, A in saved["fused"]]
            own.drawn = saved["drawn"] and Spectrum(*(part.cpu() for part in saved["drawn"]))
        self._resumes = True
        for last_step in asked:  # by a plan that no step has followed
            self.plan(last_step)

    def _rebuild(self, state: dict[str, Any], pretrained: dict[str, Tensor], device: torch.device | None) -> None:
        """Set every adapted weight to what ``state`` says of it, from W0 (of ``pretrained``, or in place)."""
        with full_precision():
            for matrix in self.matrices:
                saved, own = state["matrices"][matrix.name], matrix.weight
                W = matrix.of_weight(pretrained.get(matrix.layer_name, matrix.layer.weight.detach()))
                if saved["weight"] is not None:
                    W = saved["weight"]
                elif saved["drawn"] is not None:
                    drawn = Spectrum(*saved["drawn"])
                    place = own.device if device is None else device
                    if drawn.U.dtype == torch.float64:  # a run in double precision, perhaps from another machine
                        place = float64_device(place)
                    W = W.to(place, drawn.U.dtype, copy=True)
                    recompose.replay(W, matrix, drawn, saved["fused"])
                own.copy_(W)

    def _require_same(self, state: dict[str, Any]) -> None:
        ours, theirs = self.method.spec(), state["method"]
        if ours["class_path"] != theirs["class_path"]:
            raise UserError(
                f"the checkpoint was made with {theirs['class_path']} and model.method is {ours['class_path']}, "
                "use the checkpoint's method"
            )
        differing = [
            f"{key} {theirs['init_args'].get(key)!r} (now {value!r})"
            for key, value in ours["init_args"].items()
            if theirs["init_args"].get(key) != value
        ]
        if differing:
            raise UserError(f"the checkpoint was made with method.{', '.join(differing)}, use the checkpoint's values")
        if list(state["matrices"]) != [matrix.name for matrix in self.matrices]:
            raise UserError("the checkpoint adapts other layers than this model has, use the backbone it was made with")
        # A model that has not started takes its weights from the file; only a later start needs W0, and checks it then.
        if self.base_fingerprint is not None:
            self._require_base(state["base_fingerprint"])

    def _require_base(self, expected: str | None) -> None:
        if self.base_fingerprint != expected:
            raise UserError(
                "the checkpoint was made from other pretrained weights than this model's, use the backbone and "
                "backbone_checkpoint that it was made with"
            )


def _in_the_only_process(compute: Callable[[], Any]) -> Any:
    return compute()
