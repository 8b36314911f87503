"""The numbers in the figures. Steps are optimizer steps; directions count from 1, the largest singular value."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from srlora_pl.lowrank.switch_records import SwitchRecord
from srlora_pl.lowrank.target_settings import name_matches
from srlora_pl.lowrank.targets import ALIASES, block_and_kind
from srlora_pl.util.errors import UserError

Histories = Mapping[str, Tensor]  # the intervals (n, 2) of each matrix: drawn after and fused after which step
Curve = tuple[Sequence[float], Sequence[float]]  # steps, losses

SMOOTHING = 0.9
AROUND = 50  # so many steps before a switch and after it have the losses that are compared
QUANTITIES = ("age", "size", "score", "change")  # of `srlora_pl.lowrank.switch_records.Pairs`
GROUPS = ("recycled", "kept")
QUARTILES = ("lower quartile", "median", "upper quartile")
FIRST_CHANCE, CHANCE = "recycled at the first chance", "chance"
BEFORE, AFTER = f"loss of {AROUND} steps before", f"loss of {AROUND} steps after"
LABELS = {"attention_output": "attention output", "fc1": "FFN in", "fc2": "FFN out"}


def active_lengths(intervals: Tensor, last_step: int) -> Tensor:
    """For how many optimizer steps each direction was active, (n,); the active ones so far, up to ``last_step``.

    Args:
        intervals: of one matrix, (n, 2), a step that has not come is negative.
    """
    drawn, fused = intervals.unbind(1)
    return torch.where(fused < 0, last_step, fused) - drawn


def length_variances(histories: Histories, last_step: int) -> dict[str, float]:
    """By matrix the variance, in optimizer steps squared, of the active lengths of all directions that it has drawn."""
    lengths = {name: active_lengths(intervals, last_step).double() for name, intervals in histories.items()}
    return {name: float(each.var(correction=0)) for name, each in lengths.items()}


def smoothed(values: Sequence[float], constant: float = SMOOTHING) -> npt.NDArray[np.float64]:
    """Exponential moving average that starts without a bias and skips missing values (NaN, infinity)."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        if np.isfinite(value):
            average = constant * average + (1 - constant) * float(value)
            weight = constant * weight + 1 - constant
        result.append(average / weight if weight else np.nan)
    return np.array(result)


def blocks_of(names: Iterable[str]) -> list[int | None]:
    """The blocks that matrices of these names lie in, in order; None, of those in no block, comes last."""
    return sorted({block_and_kind(name)[0] for name in names}, key=lambda block: (block is None, block))


def middle_block(histories: Histories) -> int | None:
    """The one to show of all blocks."""
    blocks = blocks_of(histories)
    return blocks[len(blocks) // 2]


def in_block(histories: Histories, block: int | None) -> dict[str, Tensor]:
    """The matrices in ``block``.

    Raises:
        UserError: there is none.
    """
    found = {name: each for name, each in histories.items() if block_and_kind(name)[0] == block}
    if not found:
        known = ", ".join(str(each) for each in blocks_of(histories) if each is not None)
        raise UserError(f"layer {block} has no adapted matrix, give one of these layers: {known}")
    return found


def kind_labels(names: Iterable[str]) -> dict[str, str]:
    """What to call each kind of matrix: its part in a transformer block or, where that is not known, its own name."""
    labels = {block_and_kind(name)[1]: _part(name) for name in names}
    times = Counter(labels.values())
    return {kind: label if label and times[label] == 1 else kind for kind, label in labels.items()}


def _part(name: str) -> str | None:
    if name.endswith(("[q]", "[k]", "[v]")):
        return {"q": "query", "k": "key", "v": "value"}[name[-2]]
    parts = (part for part, patterns in ALIASES.items() if any(name_matches(pattern, name) for pattern in patterns))
    return next((LABELS.get(part, part) for part in parts), None)


def interval_rows(histories: Histories, last_step: int) -> list[dict[str, Any]]:
    """A row for each direction, with no step "fused after" where it is still active."""
    return [
        columns
        | {
            "direction": k,
            "drawn after step": drawn,
            "fused after step": None if fused < 0 else fused,
            "active steps": (last_step if fused < 0 else fused) - drawn,
        }
        for name, columns in _matrix_columns(histories).items()
        for k, (drawn, fused) in enumerate(histories[name].tolist(), start=1)
    ]


def variance_rows(histories: Histories, last_step: int) -> list[dict[str, Any]]:
    """A row for each matrix."""
    variances = length_variances(histories, last_step)
    return [
        columns | {"directions": len(histories[name]), "variance of active steps": variances[name]}
        for name, columns in _matrix_columns(histories).items()
    ]


def switch_rows(records: Sequence[SwitchRecord], losses: Curve = ((), ())) -> list[dict[str, Any]]:
    """A row for each switch: quartiles of the pairs that it recycled and that it kept, and the losses around it.

    Args:
        losses: optimizer steps, counted as those of ``records``, and the training losses there.
    """
    rows = []
    for record in records:
        recycled, step = record.pairs.recycled, record.step
        row: dict[str, Any] = {"after step": step, "pairs": len(recycled), "recycled": int(recycled.sum())}
        for quantity, values in zip(QUANTITIES, record.pairs[2:], strict=True):
            for group, chosen in zip(GROUPS, (recycled, ~recycled), strict=True):
                names = [f"{quantity}, {group}, {quartile}" for quartile in QUARTILES]
                row |= zip(names, _quartiles(values[chosen]), strict=True)
        row |= {FIRST_CHANCE: record.first_chance, CHANCE: row["recycled"] / row["pairs"]}
        rows.append(row | {BEFORE: _mean(losses, step - AROUND, step), AFTER: _mean(losses, step, step + AROUND)})
    return rows


def _quartiles(values: Tensor) -> list[float | None]:
    finite = values[values.isfinite()].double()
    return [None] * 3 if not len(finite) else finite.quantile(finite.new_tensor([0.25, 0.5, 0.75])).tolist()


def _mean(curve: Curve, after: int, until: int) -> float | None:
    """Of the values behind step ``after`` up to ``until``."""
    values = [value for step, value in zip(*curve, strict=True) if after < step <= until and np.isfinite(value)]
    return float(np.mean(values)) if values else None


def _matrix_columns(histories: Histories) -> dict[str, dict[str, Any]]:
    labels = kind_labels(histories)
    places = {name: block_and_kind(name) for name in histories}
    return {name: {"matrix": name, "layer": block, "kind": labels[kind]} for name, (block, kind) in places.items()}
