"""Checkpoints that version 0.1 wrote are read: they give its scores, and resumed runs end with its weights."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.helpers.resumed import EXPECTED, FILES, FOLDER, prepare, resume, score
from tests.helpers.trajectories import digest

pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = 1e-12  # of a tensor's norm
RESULTS = json.loads(EXPECTED.read_text())
# Where each was saved: optimizer steps, micro-batches, switches done.
MOMENTS = {"mid": (7, 15, 2), "switch": (6, 12, 1), "last": (12, 24, 3)}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """A run sets the seed of its process; the next test shall not see it."""
    with mock.patch.dict(os.environ):
        yield


def require_equal(tensors: dict[str, Tensor], expected: dict[str, list[float]]) -> None:
    assert tensors.keys() == expected.keys()
    for name, value in tensors.items():
        assert (digest(value) - torch.tensor(expected[name], dtype=torch.float64)).abs().max() <= (
            TOLERANCE * expected[name][0]
        ), name


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_of_its_moment_and_of_no_format(file: str) -> None:
    content: dict[str, Any] = torch.load(FOLDER / f"{file}.ckpt", weights_only=True)
    processed = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
    steps, batches, switches = MOMENTS[file.rpartition("-")[2]]
    assert (content["global_step"], processed) == (steps, batches)
    assert content["srlora"]["switches_done"] == (switches if "-srlora-" in file else 0)
    assert content["srlora"]["compact"] == ("-compact-" in file)
    assert "format" not in content
    assert "format" not in content["srlora"]


@pytest.mark.parametrize("file", FILES)
def test_a_file_gives_its_scores_and_weights(file: str, home: Path) -> None:
    scores, merged = score(FOLDER / f"{file}.ckpt", home)
    assert scores == pytest.approx(RESULTS[file]["scores"], rel=TOLERANCE, abs=0)
    require_equal(merged, RESULTS[file]["merged"])


@pytest.mark.parametrize("file", FILES)
def test_a_run_resumed_from_a_file_ends_with_its_weights(file: str, home: Path) -> None:
    require_equal(resume(file, home), RESULTS[file]["last"])
