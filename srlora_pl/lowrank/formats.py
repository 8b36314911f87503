"""The formats of an adaptation's state: every earlier one is read."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from srlora_pl.lowrank.linear import Matrix
from srlora_pl.lowrank.starts.spectrum import Spectrum
from srlora_pl.lowrank.switch_records import SwitchRecord
from srlora_pl.util.errors import UserError

FORMAT = 1  # states of version 0.1 have no number


def upgraded(state: dict[str, Any], matrices: Sequence[Matrix]) -> dict[str, Any]:
    """``state`` in the present format, for a network with these ``matrices``.

    Raises:
        UserError: a later version wrote it.
    """
    number = state.get("format", 0)
    if number > FORMAT:
        raise UserError(f"the checkpoint has format {number} and this version reads up to {FORMAT}: update srlora_pl")
    return state if number == FORMAT else _from_0(state, {matrix.name: matrix for matrix in matrices})


def histories(state: dict[str, Any]) -> Mapping[str, Tensor]:
    """`Controller.histories` of a saved ``state``: empty for methods without."""
    if state.get("format", 0) > 0:
        return state["controller"].get("intervals", {})
    scored = state["smoothed"] is not None
    return {name: matrix["intervals"] for name, matrix in state["matrices"].items() if scored}


def switch_records(state: dict[str, Any]) -> list[SwitchRecord]:
    """`Controller.switch_records` of a saved ``state``: empty where it knows of none."""
    recording = state.get("controller", {}).get("recording", {})
    return [SwitchRecord.of_state(each) for each in recording.get("records", [])]


def _from_0(state: dict[str, Any], matrices: Mapping[str, Matrix]) -> dict[str, Any]:
    """Version 0.1 kept directions and fused pairs instead of updates."""
    saved: dict[str, Any] = state["matrices"]
    known = {name: each for name, each in saved.items() if name in matrices}
    return {
        **{key: state[key] for key in ("method", "base_fingerprint", "compact", "changed", "started")},
        **{key: state.get(key, 0) for key in ("steps_before", "last_step")},
        "matrices": {name: _ledger_from_0(each, matrices[name]) for name, each in known.items()},
        "controller": {} if state["smoothed"] is None else _switching_from_0(state),
    }


def _switching_from_0(state: dict[str, Any]) -> dict[str, Any]:
    saved, paces = state["matrices"], state["schedules"].items()
    return {
        **{key: state[key] for key in ("smoothed", "uncertainty", "switches_done")},
        "active": {name: each["directions"] for name, each in saved.items()},
        "intervals": {name: each["intervals"] for name, each in saved.items()},
        "paces": [{"rank": rank, "pace": {**pace, "done": state["done"][rank]}} for rank, pace in paces],
    }


def _ledger_from_0(saved: dict[str, Any], matrix: Matrix) -> dict[str, Any]:
    drawn, count, s = len(saved["intervals"]), matrix.rank, matrix.scaling
    if saved["drawn"] is None:
        known = saved["fused"] is not None  # nothing was added
        return {"rank": 0 if known else 2 * drawn - count, "updates": [] if known else None, "weight": saved["weight"]}
    spectrum = Spectrum(*saved["drawn"])
    updates = [(*spectrum.pairs(0, count, s, like=spectrum.U), -s)]
    first = count
    for B, A in saved["fused"]:
        updates += [(B, A, s), (*spectrum.pairs(first, len(A), s, like=spectrum.U), -s)]
        first += len(A)
    return {"rank": sum(len(A) for _, A, _ in updates), "updates": updates, "weight": None}
