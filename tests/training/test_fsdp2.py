"""Two processes with split weights against one process that has batches twice as large."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from tests.helpers import ddp_program
from tests.helpers import fsdp2_program as program
from tests.helpers.errors import mentions
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")


def _made(tmp_path_factory: pytest.TempPathFactory, what: str) -> Path:
    """The folder of one run of the program, made by whichever worker of pytest-xdist comes first."""
    base = tmp_path_factory.getbasetemp()
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"fsdp2-{what}"
    with FileLock(home.with_suffix(".lock"), timeout=1500):
        if not home.exists():
            home.mkdir()
            ddp_program.prepare(home)
            if what == "everything":
                program.fitted(home, 1, "srlora", program.Files("one"), **program.ACCUMULATED)
            run_processes([sys.executable, "-m", "tests.helpers.fsdp2_program", str(home), what], home / "said.txt")
    return home


def run_processes(command: list[str], said: Path, **environment: str) -> None:
    """Run ``command``, which starts others like it, and end them all."""
    launched = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")
    kept = {name: value for name, value in os.environ.items() if name not in launched}
    with said.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**kept, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(said.parent / "cache"), **environment},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=1200)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, said.read_text()[-3000:]


def _ranks(home: Path) -> list[dict[str, Any]]:
    return [torch.load(home / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="session")
def few_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _made(tmp_path_factory, "few")


@pytest.fixture(scope="session")
def all_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _made(tmp_path_factory, "everything")


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """A run sets the seed of its process."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


def worst(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((float((value - other[name]).abs().max()) for name, value in one.items()), default=0.0)


def assert_same_run(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    assert one["events"] == other["events"]
    for name, directions in one["directions"].items():
        assert torch.equal(directions, other["directions"][name])
    for recorded, same in zip(one["records"], other["records"], strict=True):
        for name, values in recorded.items():
            torch.testing.assert_close(values, same[name], rtol=0, atol=tolerance)
    assert worst(one["effective"], other["effective"]) < tolerance
    assert worst(one["state"], other["state"]) < tolerance
    assert len(one["scores"]) == len(other["scores"])
    for each, same in zip(one["scores"], other["scores"], strict=True):
        assert each["val/loss"] == pytest.approx(same["val/loss"], rel=tolerance)


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, value in one["state"].items():
        assert torch.equal(value, other["state"][name]), name


# -- in every run of the tests


def test_switches_in_double_precision_equal_one_process(few_home):
    one, two = program.fitted(few_home, 1, "srlora"), _ranks(few_home)
    assert_same_run(one, two[0]["srlora"], 1e-10)
    assert_equal(two[0]["srlora"], two[1]["srlora"])
    assert one["events"] == 3


def test_full_fine_tuning_equals_one_process(few_home):
    one, two = program.fitted(few_home, 1, "full"), _ranks(few_home)
    assert_same_run(one, two[0]["full"], 1e-10)
    assert_equal(two[0]["full"], two[1]["full"])


@pytest.mark.parametrize("method", ["srlora", "full"])
def test_each_process_holds_half_of_what_is_split(few_home, method):
    """But for the rounding of rows: a class token has one, which one process holds."""
    two = _ranks(few_home)
    held = [each[method]["held"] for each in two]
    for name, whole in two[0][method]["state"].items():
        parts = [each[name] for each in held]
        splits = method == "full" or ("lora" not in name and "head" not in name)
        assert parts == ([whole.numel()] * 2 if not splits else parts), name
        if splits:
            assert sum(parts) == whole.numel()
            assert abs(parts[0] - parts[1]) <= whole[0].numel(), name


def test_a_resumed_run_equals_the_uninterrupted_one(few_home):
    """From between the two micro-batches of a step."""
    file = torch.load(few_home / "split5.ckpt", weights_only=True)
    assert file["exact_resume"]["gradients"]
    for each in _ranks(few_home):
        assert_equal(each["accumulated"], each["resumed"]["split5"])


def test_a_file_is_that_of_an_unsplit_run(few_home, tmp_path):
    """One that holds what changed, none of the frozen weights; one process goes on from it."""
    file = torch.load(few_home / "split5.ckpt", weights_only=True)
    names = file["state_dict"]
    assert names
    assert all("lora_" in name or "head" in name for name in names)
    one = program.fitted(few_home, 1, "srlora", ckpt_path=few_home / "split5.ckpt", **program.ACCUMULATED)
    assert_same_run(one | {"scores": []}, _ranks(few_home)[0]["accumulated"] | {"scores": []}, 1e-10)


# -- everything


@pytest.mark.slow
@pytest.mark.parametrize("method", program.TRAINED)
def test_methods_in_double_precision_equal_one_process(all_home, method):
    one, two = program.fitted(all_home, 1, method), _ranks(all_home)
    # LoRA-GA's pairs are quotients of small numbers.
    assert_same_run(one, two[0][method], 1e-8 if method == "lora_ga" else 1e-10)
    assert_equal(two[0][method], two[1][method])
    assert (one["events"] == 3) == (method in ("srlora", "relora"))


@pytest.mark.slow
@pytest.mark.parametrize("method", program.SINGLE)
def test_methods_in_single_precision_stay_near(all_home, method):
    one = program.fitted(all_home, 1, method, optimizer="sgd", lr=0.1, precision="32-true")
    assert_same_run(one, _ranks(all_home)[0][f"{method} 32"], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["srlora", "full"])
def test_micro_batches_and_clipping_equal_one_process(all_home, method):
    one = program.fitted(all_home, 1, method, **program.ACCUMULATED)
    assert_same_run(one, _ranks(all_home)[0][f"{method} accumulated"], 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["srlora5", "srlora10", "full5", "full10", "dense10"])
def test_resumed_runs_equal_the_uninterrupted_ones(all_home, file):
    """Also where the file has to hold matrices, as their updates have become larger."""
    state = torch.load(all_home / f"{file}.ckpt", weights_only=True)["srlora"]
    dense = [each["weight"] is not None for each in state["matrices"].values()]
    assert any(dense) == (file == "dense10")
    for each in _ranks(all_home):
        assert_equal(each[f"{file.rstrip('0123456789')} accumulated"], each[file])


@pytest.mark.slow
def test_a_whole_checkpoint_holds_all_weights_and_resumes(all_home):
    for each in _ranks(all_home):
        assert_equal(each["whole"], each["whole5"])
    file = torch.load(all_home / "whole5.ckpt", weights_only=True)
    assert {name: value.shape for name, value in file["state_dict"].items()} == {
        name: value.shape for name, value in _ranks(all_home)[0]["whole"]["state"].items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("file", ["one5", "ddp5"])
def test_files_of_other_runs_go_on_with_split_weights(all_home, file):
    two = _ranks(all_home)[0]
    assert_same_run(two["srlora accumulated"] | {"scores": []}, two[file] | {"scores": []}, 1e-10)


@pytest.mark.slow
def test_half_precision_trains(all_home):
    one = program.fitted(all_home, 1, "srlora", precision="bf16-mixed")
    two = _ranks(all_home)[0]["bf16"]
    assert one["events"] == two["events"] == 3
    assert worst(one["effective"], two["effective"]) < 2e-2


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "tolerance"), [("float32", 1e-10), ("bfloat16", 1e-3)])
def test_answers_equal_one_process_and_resume(all_home, weights, tolerance):
    two = _ranks(all_home)
    runs = program.answers(all_home, 1, weights), two[0][weights]
    for run in runs if weights == "bfloat16" else ():  # whose rests are bits of rounding
        run["state"] = {name: value for name, value in run["state"].items() if not name.endswith(".rest")}
    assert_same_run(*runs, tolerance)
    for each in _ranks(all_home):
        assert_equal(each[weights], each[f"{weights} resumed"])
        assert re.search(mentions("srlora test", "one device"), each[weights]["refused"])


@pytest.mark.slow
def test_scores_of_split_weights_are_those_of_one_process(all_home):
    one, two = program.evaluated(all_home, 1), _ranks(all_home)
    for each in two:
        for scores in ("last", "loaded"):
            assert each["evaluated"][scores] == pytest.approx(one[scores], rel=1e-10), scores
    assert worst(one["effective"], two[0]["evaluated"]["effective"]) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("averages", ("WeightAveraging", "fsdp2", "ddp")),
        ("scaled", ("16-mixed", "bf16-mixed")),
        ("galore", ("GaLore", "ddp")),
        ("plain", ("ModelParallelStrategy", "fsdp2")),
    ],
)
def test_what_needs_whole_weights_is_refused(all_home, what, words):
    for each in _ranks(all_home):
        assert re.search(mentions(*words), each["refused"][what])
