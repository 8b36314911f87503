"""The methods train as version 0.1 did, to rounding in fp64, also where a compact state is loaded in between."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.trajectories import CASES, FILE, SNAPSHOTS, digest, run

TOLERANCE = 1e-12  # of a tensor's norm, or of its largest entry
EXPECTED = load_file(FILE)


def recorded(prefix: str) -> dict[str, Tensor]:
    """The tensors of the file that lie directly under ``prefix``."""
    names = (name.rpartition("/") for name in EXPECTED)
    return {key: EXPECTED[f"{place}/{key}"] for place, _, key in names if place == prefix}


@pytest.mark.parametrize("compact", [False, True], ids=["plain", "compact"])
@pytest.mark.parametrize("name", CASES)
def test_a_trajectory_is_the_recorded_one(name: str, compact: bool) -> None:
    snapshots, digests, last = run(CASES[name], torch.float64, compact), recorded(name), recorded(f"{name}/last")
    assert len(snapshots) == len(SNAPSHOTS)
    for i, snapshot in enumerate(snapshots):
        assert snapshot.keys() == digests.keys()
        for key, value in snapshot.items():
            expected = digests[key][i]
            assert (digest(value) - expected).abs().max() <= TOLERANCE * expected[0], (key, SNAPSHOTS[i])
    for key, expected in last.items():
        assert (snapshots[-1][key] - expected).abs().max() <= TOLERANCE * expected.abs().max(), key


def test_the_file_holds_every_case() -> None:
    places = {name.split("/")[0] for name in EXPECTED}
    assert places == set(CASES)
    assert all(recorded(f"{name}/last") for name in ("srlora-sgd", "srlora-adamw"))
