"""The switches of SRLoRA: score every pair in every step, fuse the lowest at intervals and re-draw them."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from srlora_pl.lowrank.checks import require_trained
from srlora_pl.lowrank.importance import Importance
from srlora_pl.lowrank.linear import LowRankLinear, Matrix
from srlora_pl.lowrank.method import AdaptedNetwork, Controller, Progress, generator_for
from srlora_pl.lowrank.methods.recording import Recording
from srlora_pl.lowrank.optimizer_state import growth_of, recycle, require_recyclable
from srlora_pl.lowrank.schedule import Pace, Schedule
from srlora_pl.lowrank.starts.spectrum import Spectrum, lengths_of
from srlora_pl.lowrank.switch_records import Pairs, SwitchRecord
from srlora_pl.util.errors import UserError
from srlora_pl.util.precision import full_precision


class Settings(Protocol):
    """The settings of `SRLoRA` that switches depend on."""

    rank: int
    target_rank: int
    fusion_ratio: float
    beta1: float
    beta2: float
    reset_scores: Any
    optimizer_state: Any
    select: Any
    redraw_scale: Any
    redraw_directions: Any

    def recycled_rank(self, rank: int) -> int:
        """r' = gamma * rank."""


class Switching(Controller):
    """The scores and the history of all pairs of one network.

    Attributes:
        spectra: by matrix, perhaps each in a file of its own; empty until the start.
        active: by matrix, the singular direction that each pair was last drawn from, (r,).
        intervals: by matrix, the steps after which each direction was drawn and fused (-1: it is active), (n, 2),
            int64; counted from the first step of all runs.
        recording: what the pairs were like at each switch.
        paces: by rank; with a ``rank_pattern`` each rank switches at its own pace.
        switches_done: of the rank that switches most often, in all runs.
    """

    needs_length = True

    def __init__(self, method: Settings, adaptation: AdaptedNetwork) -> None:
        super().__init__(adaptation)
        self.method = method
        layers = [layer for layer in adaptation.layers.values() if isinstance(layer, LowRankLinear)]
        self.importance = Importance(layers, method.beta1, method.beta2)
        self.spectra: Mapping[str, Spectrum] = {}
        self._lengths: dict[str, int] = {}
        self.active = {matrix.name: torch.arange(matrix.rank) for matrix in adaptation.matrices}
        self.intervals = {m.name: torch.tensor([[0, -1]]).repeat(m.rank, 1) for m in adaptation.matrices}
        self.recording = Recording()
        self.paces: dict[int, Pace] = {}
        self.switches_done = 0
        self._scores_pairs = False

    # --- before training

    def awaits_sources(self) -> bool:
        return not self.spectra

    def take(self, sources: Mapping[str, Spectrum]) -> None:
        self.spectra, self._lengths = sources, lengths_of(sources)

    def directions(self, matrix: Matrix) -> int:
        return self._lengths.get(matrix.name, super().directions(matrix))

    @property
    def _reach(self) -> int:
        """r_target, or the largest min(out, in) of the adapted matrices where that is smaller."""
        return max(self.adaptation.method.directions(matrix) for matrix in self.adaptation.matrices)

    def require_room(self, steps: int) -> None:
        self._planned(steps)

    def _planned(self, steps: int) -> dict[int, int]:
        """N_switch (Eq. 13) of the directions that remain, by rank, which must fit into so many ``steps``."""
        method = self.method
        used: dict[int, int] = {}  # directions, by rank
        for matrix in self.adaptation.matrices:
            used[matrix.rank] = max(used.get(matrix.rank, 0), len(self.intervals[matrix.name]))
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

    def plan(self, first_step: int, last_step: int, strict: bool) -> str:
        """Spread the switches that remain (Eq. 13, 14); a plan that has begun and ends at ``last_step`` stays."""
        begun = self.paces if first_step > 0 else {}
        if begun and {pace.schedule.last_step for pace in begun.values()} == {last_step}:
            return ""
        try:
            planned = self._planned(last_step - first_step)
            self._warn_of_limits()
        except UserError:
            if strict:
                raise
            planned = dict.fromkeys((matrix.rank for matrix in self.adaptation.matrices), 0)
        self.paces = {rank: Pace(Schedule(first_step, last_step, count)) for rank, count in planned.items()}
        to_do = max(pace.missing for pace in self.paces.values())
        if begun:
            warnings.warn(
                f"the run now ends at step {last_step}: {to_do} switches are spread over the steps from "
                f"{first_step} on",
                stacklevel=3,
            )
            return ""
        return "" if to_do else f"No switch falls into these {last_step - first_step} optimizer steps."

    def _warn_of_limits(self) -> None:
        reach, short, uneven = self._reach, [], set()
        for matrix in self.adaptation.matrices:
            recycled, available = self.method.recycled_rank(matrix.rank), self.directions(matrix)
            if (reach - len(self.intervals[matrix.name])) % recycled:
                uneven.add((matrix.rank, recycled))
            if available < reach:
                short.append(f"{matrix.name} ({available})")
        remarks = [
            f"the directions left up to {reach} are no whole number of switches of {recycled} for rank {rank}; the "
            "remainder stays unused"
            for rank, recycled in sorted(uneven)
        ]
        if self.method.target_rank > reach:
            remarks.append(
                f"target_rank {self.method.target_rank} is above min(out, in) of every adapted matrix; switches are "
                f"planned for {reach}"
            )
        if short:
            remarks.append(
                f"these matrices have fewer than {reach} singular directions and stop switching when theirs are used "
                f"up: {', '.join(short)}"
            )
        for remark in remarks:
            warnings.warn(remark, stacklevel=4)

    # --- in every step

    def before_optimizer(self, step: int, gradients: Sequence[Tensor], inverse_scale: Tensor | None) -> None:
        if self._has_more:
            self._require_directions()
        self._scores_pairs = True
        if self.method.select == "importance":
            self.importance.update(gradients, inverse_scale)

    def _require_directions(self) -> None:
        if not self.spectra:
            raise UserError(
                "a loaded state does not hold the directions of the switches to come, call start() too, before the "
                "first step"
            )

    def after_optimizer(self, step: int, optimizer: Optimizer | None) -> bool:
        """Do the switches that are due; one that a stopped run missed is made up for."""
        if not self.paces:
            raise UserError("no switch is planned, call plan() before training")
        if optimizer is not None and step == 1 and self._recycles_state and self._has_more:
            adapters = (layer.adapter_parameters() for layer in self.adaptation.layers.values())
            require_recyclable(optimizer, (parameter for layer in adapters for parameter in layer))
        before, switched = self._most_done, False
        while ranks := {rank for rank, pace in self.paces.items() if pace.schedule.due(step) > pace.done}:
            chosen = [matrix for matrix in self.adaptation.matrices if matrix.rank in ranks]
            self._switch(chosen, self.adaptation.steps_before + step, optimizer)
            self.paces |= {rank: self.paces[rank].one_more() for rank in ranks}
            switched = True
        self.switches_done += self._most_done - before
        return switched

    @property
    def _has_more(self) -> bool:
        """Whether the plan holds switches that are not done."""
        return any(pace.missing > 0 for pace in self.paces.values())

    @property
    def _recycles_state(self) -> bool:
        return self.method.optimizer_state != "keep"

    @property
    def _most_done(self) -> int:
        """Switches since the plan, of the rank that has done most."""
        return max((pace.done for pace in self.paces.values()), default=0)

    def _switch(self, matrices: list[Matrix], step: int, optimizer: Optimizer | None) -> None:
        if not self._scores_pairs:
            raise UserError("nothing has scored the pairs, call before_optimizer() in every step")
        self._require_directions()
        if optimizer is not None:
            require_trained(self.adaptation.layers, optimizer)
        scores = self.scores()
        recycled_pairs = self._choose(matrices, scores)
        unknown: set[str] = set()
        seen: dict[Matrix, Pairs] = {}
        with full_precision():
            for matrix, recycled in recycled_pairs.items():
                active, ages = self.active[matrix.name], step - self.intervals[matrix.name][:, 0]
                spectrum = self.drawn_from(matrix)
                seen[matrix] = self.recording.look(matrix, active, ages, recycled, scores.get(matrix.name), spectrum)
                unknown |= self.recompose(matrix, recycled, spectrum, step, optimizer)
                self.recording.drawn(matrix, recycled)
            self.recording.add(step, seen)
            # All of those that walk at this pace; with a rank_pattern the others score on.
            self._reset(dict.fromkeys(matrices) if self.method.reset_scores == "all" else recycled_pairs)
        if unknown:
            warnings.warn(
                f"{type(optimizer).__name__} keeps {', '.join(sorted(unknown))}, unknown to a switch: set to 0 for "
                "recycled pairs",
                stacklevel=4,
            )

    def _choose(self, matrices: list[Matrix], scores: Mapping[str, Tensor]) -> dict[Matrix, Tensor]:
        """The pairs to recycle, (r',) of each matrix whose spectrum is not used up; one process decides for all."""
        counts = {matrix: self.method.recycled_rank(matrix.rank) for matrix in matrices}
        counts = {m: n for m, n in counts.items() if len(self.intervals[m.name]) + n <= self.directions(m)}
        if not counts:
            return {}
        if self.method.select == "age":  # directions are numbered in the order in which they are drawn
            return {matrix: lowest(self.active[matrix.name], n).to(matrix.device) for matrix, n in counts.items()}

        def lowest_of_each() -> Tensor:
            return torch.cat([lowest(scores[matrix.name], n) for matrix, n in counts.items()]).cpu()

        chosen = self.adaptation.run_on_rank_zero(lowest_of_each).to(self.importance.smoothed.device)
        return dict(zip(counts, chosen.split(list(counts.values())), strict=True))

    def drawn_from(self, matrix: Matrix) -> Spectrum:
        """The directions that pairs of ``matrix`` are drawn from, in this order."""
        spectrum = self.spectra[matrix.name]  # read from its file, perhaps
        if self.method.redraw_directions == "singular":
            return spectrum
        number = [*self.active].index(matrix.name)  # a fused layer's parts draw as layers of their own would
        return spectrum.scattered(matrix.rank, generator_for(f"directions {number}", self.adaptation.seed))

    @torch.no_grad()
    def recompose(
        self, matrix: Matrix, recycled: Tensor, spectrum: Spectrum, step: int, optimizer: Optimizer | None = None
    ) -> set[str]:
        """Fuse the pairs ``recycled`` and re-draw them from unused directions (Eq. 9 to 12); W + s B A stays.

        Args:
            matrix: changed in place.
            recycled: indices of pairs, ascending, (r',); they take the next unused directions in this order.
            spectrum: see `drawn_from`.
            step: the optimizer step that is over, counted from the first of all runs.

        Returns:
            Names of states of the optimizer that are unknown here.
        """
        B, A, s = matrix.B, matrix.A, matrix.scaling
        old_B, old_A = B[:, recycled], A[recycled]
        size = None if self.method.redraw_scale == "sigma" else s * (B.norm(dim=0) * A.norm(dim=1)).median()
        first = len(self.intervals[matrix.name])
        new_B, new_A = spectrum.pairs(first, len(recycled), s, A, size)
        self.adaptation.add(matrix, old_B, old_A, s)  # Eq. 9, 10
        B[:, recycled], A[recycled] = new_B, new_A  # Eq. 11
        self.adaptation.add(matrix, new_B, new_A, -s)  # Eq. 12
        self._record(matrix, recycled.cpu(), step)
        if optimizer is None or not self._recycles_state:
            return set()
        how, layer = self.method.optimizer_state, matrix.layer
        growth_B, growth_A = growth_of(new_A, old_A), growth_of(new_B.T, old_B.T)
        return recycle(
            optimizer, layer.get_parameter("lora_B"), lambda x: matrix.of(x).T, recycled, growth_B, how
        ) | recycle(optimizer, layer.get_parameter("lora_A"), matrix.of, recycled, growth_A, how)

    def _record(self, matrix: Matrix, recycled: Tensor, step: int) -> None:
        ends, active, count = self.intervals[matrix.name].clone(), self.active[matrix.name].clone(), len(recycled)
        ends[active[recycled], 1] = step
        active[recycled] = torch.arange(len(ends), len(ends) + count)
        self.active[matrix.name] = active
        self.intervals[matrix.name] = torch.cat([ends, torch.tensor([[step, -1]]).repeat(count, 1)])

    def _reset(self, recycled: Mapping[Matrix, Tensor | None]) -> None:
        """Start the averages of some matrices anew; of each all pairs, or those with the given indices."""
        for buffer in (self.importance.smoothed, self.importance.uncertainty):
            for part, some in zip(self.importance.of([*recycled], buffer), recycled.values(), strict=True):
                pairs: Any = slice(None) if some is None else some
                part["lora_A"][pairs] = 0
                part["lora_B"][:, pairs] = 0

    # --- what others look at

    def _pair_scores(self, matrices: Sequence[Matrix]) -> list[Tensor]:
        """S_k of every pair, (r,) for each of ``matrices`` (Eq. 7)."""
        return [part["lora_B"].mean(0) + part["lora_A"].mean(1) for part in self.importance.scores(matrices)]

    def scores(self) -> dict[str, Tensor]:
        if self.method.select == "age":
            return {}
        matrices = self.adaptation.matrices
        return {m.name: scores for m, scores in zip(matrices, self._pair_scores(matrices), strict=True)}

    def histories(self) -> dict[str, Tensor]:
        return self.intervals

    def switch_records(self) -> Sequence[SwitchRecord]:
        return self.recording.read()

    def progress(self) -> Progress:
        missing = max((pace.missing for pace in self.paces.values()), default=0)
        coming = [pace.next_step for pace in self.paces.values() if pace.next_step is not None]
        return Progress(self.switches_done, self.switches_done + missing, min(coming, default=None))

    def metrics(self, step: int) -> dict[str, float]:
        due = max((pace.schedule.due(step) for pace in self.paces.values()), default=0)
        return {"switches": float(self.switches_done + max(due - self._most_done, 0))}

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.importance.state_dict(),
            "active": dict(self.active),
            "intervals": dict(self.intervals),
            "recording": self.recording.state_dict(),
            "paces": [{"rank": rank, "pace": pace.state()} for rank, pace in self.paces.items()],
            "switches_done": self.switches_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.importance.load_state_dict(state)
        self.active = {name: each.cpu().clone() for name, each in state["active"].items()}
        self.intervals = {name: each.cpu().clone() for name, each in state["intervals"].items()}
        self.recording.load_state_dict(state.get("recording", {}))
        self.paces = {each["rank"]: Pace.of_state(each["pace"]) for each in state["paces"]}
        self.switches_done = state["switches_done"]
        self._scores_pairs = bool(self.paces)


def lowest(pair_scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` lowest of ``pair_scores`` (r,), ascending; ties go to the lower index."""
    return torch.argsort(pair_scores, stable=True)[:count].sort().values
