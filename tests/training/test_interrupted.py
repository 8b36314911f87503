"""Runs that a signal ends or kills; they go on, by the command that they say or from their last file."""

import contextlib
import csv
import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from benchmarks.faults import curves
from srlora_pl.reporting.progress import duration
from srlora_pl.run.run import Run
from srlora_pl.training.checkpoints import AtomicCheckpointIO
from tests.helpers.cli import SMALL_RUN, cli
from tests.helpers.paths import ROOT
from tests.helpers.waiting import wait_until, words_of

RUN = f"""{SMALL_RUN}
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {{every_n_train_steps: 5, save_top_k: -1}}
    - class_path: {__name__}.SignalAt
"""

HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


class SignalAt(Checkpoint):
    """Sends this process the signal that ``SIGNAL_AT`` says, once: 'HOOK STEP SIGNAL'; after all others have saved."""

    def __init__(self) -> None:
        hook, self.step, self.signal, *self.again = os.environ.get("SIGNAL_AT", "teardown -1 0").split()
        setattr(self, hook, self.send)

    def send(self, trainer, *args, **kwargs) -> None:
        if trainer.global_step == int(self.step):
            os.environ.pop("SIGNAL_AT", None)
            self.step = "-1"
            for number in (self.signal, *self.again):
                os.kill(os.getpid(), int(number))


@contextlib.contextmanager
def signal_at(hook: str, step: int, number: int) -> Iterator[None]:
    os.environ["SIGNAL_AT"] = f"{hook} {step} {number}"
    yield
    assert "SIGNAL_AT" not in os.environ, "it was never sent"


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    return begin(tmp_path_factory.mktemp("whole"))


def begin(home: Path, *options: object, code: int = 0, says: str = "") -> Path:
    """The run folder after a fit that ends with ``code`` and a last line with ``says`` in it."""
    (home / "small.yaml").write_text(RUN)
    go_on(home, "fit", "--config", "small.yaml", *options, code=code, says=says)
    return home / "runs/small-srlora/version_0"


def kill(home: Path, *arguments: object, by: int = signal.SIGKILL) -> None:
    """The same in a process that a signal kills."""
    if (child := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            cli(*arguments, home=home)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -by
    del os.environ["SIGNAL_AT"]


def go_on(home: Path, *arguments: object, code: int = 0, says: str = "") -> list[str]:
    """The arguments of the command that the run says to go on with."""
    ended, out, err = cli(*arguments, home=home)
    assert ended == code, err
    assert says in ((out + err) if code == 0 else err.splitlines()[-1])
    assert "Traceback" not in err
    return shlex.split(err.partition("go on with: python cli.py ")[2])


def logged(folder: Path, name: str) -> list[int]:
    """The steps of the rows that hold ``name``."""
    with (folder / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row.get(name)]


def contents(folder: Path) -> dict[Path, bytes]:
    """Of all files but TensorBoard's."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".ckpt", ".csv", ".yaml")}


def assert_same(folder: Path, expected: Path) -> None:
    """Equal in all that a run leaves: curves, the choice of the best, weights and all other state."""
    assert (folder / "metrics.csv").read_text() == (expected / "metrics.csv").read_text()
    assert curves(folder) == curves(expected)
    files, theirs = ({path.name for path in each.glob("checkpoints/*")} for each in (expected, folder))
    files, theirs = ({name for name in each if not name.startswith("epoch=")} for each in (files, theirs))
    assert len(files) == 2
    assert files == theirs
    for file in files:
        one, other = (torch.load(each / "checkpoints" / file, weights_only=True) for each in (folder, expected))
        for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "srlora"):
            assert_equal(one[key], other[key])


def assert_equal(one, other) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


@pytest.mark.parametrize(
    ("hook", "step", "number", "validations"),
    [
        ("on_train_batch_start", 5, signal.SIGINT, 1),
        ("on_before_optimizer_step", 5, signal.SIGTERM, 1),
        ("on_train_batch_end", 4, signal.SIGTERM, 0),  # a validation is due
        ("on_train_batch_end", 10, signal.SIGTERM, 2),  # a row is due
        ("on_validation_batch_start", 4, signal.SIGINT, 0),
        ("on_validation_end", 8, signal.SIGTERM, 2),
        ("on_train_batch_end", 12, signal.SIGTERM, 2),  # nothing is left but a validation
        ("on_validation_end", 12, signal.SIGTERM, 3),
        ("on_test_batch_start", 12, signal.SIGINT, 3),
    ],
)
def test_a_signalled_run_goes_on_as_if_nothing_had_happened(
    hook, step, number, validations, tmp_path, expected
) -> None:
    with signal_at(hook, step, number):
        (tmp_path / "small.yaml").write_text(RUN)
        command = go_on(tmp_path, "fit", "--config", "small.yaml", code=128 + number, says=f"by {number.name}")
    folder = tmp_path / "runs/small-srlora/version_0"
    assert command[:3] == ["fit", "--config", str(folder.relative_to(tmp_path) / "config.yaml")]
    assert len(logged(folder, "val/loss")) == validations
    go_on(tmp_path, *command)
    assert_same(folder, expected)


@pytest.mark.parametrize(
    ("hook", "number", "validations"),
    [
        ("on_train_batch_end", signal.SIGTERM, 0),
        ("on_validation_batch_start", signal.SIGINT, 0),
        ("on_validation_end", signal.SIGTERM, 1),
    ],
)
def test_the_validation_at_the_end_of_a_run_is_made_up(hook, number, validations, tmp_path) -> None:
    """Of a run that is shorter than its validation interval."""
    (tmp_path / "whole").mkdir()
    whole = begin(tmp_path / "whole", "--trainer.val_check_interval", 50)
    with signal_at(hook, 12, number):
        folder = begin(tmp_path, "--trainer.val_check_interval", 50, code=128 + number, says=f"by {number.name}")
    assert len(logged(folder, "val/loss")) == validations
    command = ["--config", folder / "config.yaml", "--ckpt_path", "last"]
    code, out, err = cli("fit", *command, home=tmp_path)
    assert code == 0, err
    seconds = json.loads((folder / "summary.json").read_text())["seconds"]
    assert f", {duration(seconds)} (" in out
    assert logged(whole, "val/loss") == [11]
    assert_same(folder, whole)


@pytest.mark.slow
def test_a_run_that_is_stopped_again_and_again(tmp_path, expected) -> None:
    with signal_at("on_train_batch_start", 2, signal.SIGTERM):
        folder = begin(tmp_path, code=143)
    arguments = ["fit", "--config", "small.yaml", "--ckpt_path", "last"]
    for hook, step, saved in (
        ("on_train_batch_start", 5, 6),
        ("on_validation_batch_end", 8, 8),
        ("on_test_start", 12, 12),
    ):
        with signal_at(hook, step, signal.SIGTERM):
            go_on(tmp_path, *arguments, code=143, says="interrupted by SIGTERM")
        assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == saved
    go_on(tmp_path, *arguments)
    assert_same(folder, expected)


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_sanity_check_start", "on_validation_batch_start"])
def test_before_the_first_step_there_is_nothing_to_save(hook, tmp_path) -> None:
    with signal_at(hook, 0, signal.SIGTERM):
        (tmp_path / "small.yaml").write_text(RUN)
        assert go_on(tmp_path, "fit", "--config", "small.yaml", code=143, says="before the first step") == []
    assert not (tmp_path / "runs/small-srlora").exists()


def test_a_resumed_run_that_is_stopped_at_its_start_says_the_same_command(tmp_path, expected) -> None:
    with signal_at("on_train_batch_start", 5, signal.SIGINT):
        folder = begin(tmp_path, code=130)
    before = contents(folder)
    arguments = ["fit", "--config", "small.yaml", "--ckpt_path", "last"]
    with signal_at("setup", 0, signal.SIGINT):
        command = go_on(tmp_path, *arguments, code=130, says="before the first step")
    assert command[-1] == "runs/small-srlora/version_0/checkpoints/last.ckpt"
    assert contents(folder) == before
    go_on(tmp_path, *command)
    assert_same(folder, expected)


def test_other_commands_stop_at_once(tmp_path, expected) -> None:
    with signal_at("on_test_batch_start", 0, signal.SIGTERM):
        checkpoint = expected / "checkpoints/last.ckpt"
        (tmp_path / "small.yaml").write_text(RUN)
        code, _, err = cli("test", "--config", "small.yaml", "--ckpt_path", checkpoint, home=tmp_path)
    assert code == 143
    assert err.splitlines()[-1] == "interrupted by SIGTERM"


def test_handlers_are_put_back(expected) -> None:
    assert {number: signal.getsignal(number) for number in HANDLERS} == HANDLERS


@pytest.mark.parametrize(
    ("hook", "step", "every"),
    [
        ("on_train_batch_end", 10, 5),  # its file is written, its row is not logged yet
        pytest.param("on_train_batch_start", 11, 5, marks=pytest.mark.slow),  # rows of two steps more are logged
        ("on_validation_batch_start", 8, 8),  # of the file's own validation
        ("on_validation_end", 12, 5),  # the last file is written in the same hook
        pytest.param("on_test_batch_start", 12, 5, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_from_its_last_file(hook, step, every, tmp_path, expected) -> None:
    (tmp_path / "small.yaml").write_text(RUN.replace("every_n_train_steps: 5", f"every_n_train_steps: {every}"))
    arguments = ["fit", "--config", "small.yaml", "--ckpt_path", "last"]
    with signal_at(hook, step, signal.SIGKILL):
        kill(tmp_path, *arguments)
    go_on(tmp_path, *arguments, says=f", step {step // every * every if step < 12 else 12}\n")
    assert_same(tmp_path / "runs/small-srlora/version_0", expected)


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_last_serves_every_command(command, tmp_path, expected) -> None:
    says = "note: --ckpt_path last takes runs/small-srlora/version_0/checkpoints/last.ckpt, step 12\n"
    home = expected.parents[2]
    options = ["--output", tmp_path / "predictions.csv"] if command == "predict" else []
    go_on(home, command, "--config", "small.yaml", "--ckpt_path", "last", *options, says=says)
    go_on(home, command, "--config", expected / "config.yaml", "--ckpt_path", "last", *options, says=says)
    (tmp_path / "small.yaml").write_text(RUN)
    without = f"error: --ckpt_path last finds no checkpoint in runs{os.sep}small-srlora"
    go_on(tmp_path, command, "--config", "small.yaml", "--ckpt_path", "last", code=2, says=without)


def test_last_passes_over_what_it_cannot_read(tmp_path, expected) -> None:
    home = tmp_path / "home"
    shutil.copytree(expected.parents[2], home)
    folder = home / "runs/small-srlora/version_0"
    whole = (folder / "checkpoints/last.ckpt").read_bytes()
    for path in folder.glob("checkpoints/*"):
        if "step=5" not in path.name:
            path.write_bytes(whole[:-1000])
    (home / "runs/small-srlora/version_1/checkpoints").mkdir(parents=True)
    (home / "runs/small-srlora/version_1/checkpoints/last.ckpt").write_bytes(b"")
    code, _, err = cli("test", "--config", "small.yaml", "--ckpt_path", "last", home=home)
    assert code == 0, err
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    runs = "note: runs/small-srlora"
    assert notes[0] == f"{runs}/version_1/checkpoints/last.ckpt cannot be read and is passed over"
    assert f"{runs}/version_0/checkpoints/last.ckpt cannot be read and is passed over" in notes
    assert notes[-1].endswith("version_0/checkpoints/epoch=0-step=5.ckpt, step 5")
    assert len(notes) == 5


def test_last_begins_a_run_where_there_is_none(tmp_path) -> None:
    says = "note: --ckpt_path last finds no checkpoint in runs/small-srlora, the run begins anew\n"
    folder = begin(tmp_path, "--ckpt_path", "last", "--trainer.max_steps", 4, says=says)
    assert (folder / "checkpoints/last.ckpt").is_file()


def test_a_refused_resume_leaves_the_run_as_it_was(tmp_path, expected) -> None:
    home = tmp_path / "home"
    shutil.copytree(expected.parents[2], home)
    folder = home / "runs/small-srlora/version_0"
    before = curves(folder), contents(folder)
    arguments = ["--config", "small.yaml", "--ckpt_path", folder / "checkpoints/epoch=0-step=5.ckpt"]
    go_on(home, "fit", *arguments, "--model.lr", 1, code=2, says="model.lr")
    assert (curves(folder), contents(folder)) == before


def test_a_full_disk_ends_a_run_in_one_sentence(tmp_path, monkeypatch) -> None:
    original = os.replace

    def replace(source: Path, target: Path) -> None:
        if "best-step8" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    folder = begin(tmp_path, code=2, says="best-step8.ckpt of step 8 could not be written (No space left on device)")
    assert {path.name for path in folder.rglob("*.ckpt")} == {"best-step4.ckpt", "last.ckpt", "epoch=0-step=5.ckpt"}
    assert not list(folder.rglob("*.unfinished"))
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4


def test_a_users_way_of_writing_checkpoints_stays(tmp_path) -> None:
    with contextlib.chdir(tmp_path):
        contents = [yaml.safe_load(SMALL_RUN)]
        ours = Run("fit", ["small.yaml"], contents, []).trainer.strategy.checkpoint_io
        users = Run("fit", ["small.yaml"], contents, ["--trainer.plugins+=TorchCheckpointIO"]).trainer.strategy
    assert type(ours) is AtomicCheckpointIO
    assert type(users.checkpoint_io) is TorchCheckpointIO


def test_a_second_signal_kills(tmp_path) -> None:
    (tmp_path / "small.yaml").write_text(RUN)
    with signal_at("on_train_batch_start", 5, signal.SIGINT):
        os.environ["SIGNAL_AT"] += " 2"
        kill(tmp_path, "fit", "--config", "small.yaml", by=signal.SIGINT)
    assert {path.name for path in tmp_path.rglob("*.ckpt")} == {"best-step4.ckpt", "last.ckpt", "epoch=0-step=5.ckpt"}


QUICK = ["fit", "--config", ROOT / "configs/quickstart.yaml", "--data.num_workers", 2, "--trainer.max_steps", 40]
QUICK += ["--trainer.val_check_interval", 20, "--trainer.limit_val_batches", 2, "--trainer.limit_test_batches", 1]
QUICK += ["--trainer.log_every_n_steps", 1, "--model.method.target_rank", 16, "--trainer.enable_model_summary", "false"]


def started(home: Path, **variables: str) -> subprocess.Popen:
    """A process group that trains, after its first steps."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, ROOT / "cli.py", *QUICK]
    process = subprocess.Popen(
        [str(each) for each in command],
        cwd=home,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    metrics = home / "runs/quickstart-srlora/version_0/metrics.csv"

    def trains() -> bool:
        return process.poll() is not None or (metrics.is_file() and len(metrics.read_text().splitlines()) > 4)

    wait_until(trains, f"the fourth step in {metrics}")
    return process


@pytest.mark.slow
def test_a_signal_to_a_whole_process_group(tmp_path) -> None:
    """As a terminal sends it, and SLURM: the processes that load data get it too."""
    process = started(tmp_path)
    os.killpg(process.pid, signal.SIGTERM)
    out = words_of(process)
    assert process.returncode == 143, out
    assert "interrupted by SIGTERM, step" in out.splitlines()[-1]
    command = shlex.split(out.partition("go on with: python cli.py ")[2])
    last = torch.load(tmp_path / command[-1], weights_only=True)["global_step"]
    assert 1 < last < 40
    go_on(tmp_path, *command)
    assert logged(tmp_path / "runs/quickstart-srlora/version_0", "train/loss") == list(range(40))


SCONTROL = """#!/bin/sh
echo "$@" >> {file}
"""


@pytest.mark.slow
def test_slurm_takes_the_machine_away_and_starts_the_job_again(tmp_path) -> None:
    """A job of another run in the same folders comes between."""
    tool = tmp_path / "bin/scontrol"
    tool.parent.mkdir()
    tool.write_text(SCONTROL.format(file=tmp_path / "asked"))
    tool.chmod(0o755)
    slurm = {
        "PATH": f"{tool.parent}:{os.environ['PATH']}",
        **{"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "quick", "SLURM_NTASKS": "1"},
        **{"SLURM_NTASKS_PER_NODE": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
    }
    process = started(tmp_path, **slurm)
    (tmp_path / "runs/quickstart-srlora/version_0/hpc_ckpt_1.ckpt").write_bytes(b"of the time before")
    os.killpg(process.pid, signal.SIGUSR1)
    out = words_of(process)
    assert process.returncode == 128 + signal.SIGUSR1, out
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    folder = tmp_path / "runs/quickstart-srlora/version_0"
    assert [path.name for path in folder.glob("hpc_*")] == ["hpc_ckpt_2.ckpt"]
    step = torch.load(folder / "hpc_ckpt_2.ckpt", weights_only=True)["global_step"]
    assert f"step {step} is saved" in out.splitlines()[-1]

    os.environ |= slurm
    go_on(tmp_path, *QUICK, "--trainer.max_steps", 2, "--model.warmup_steps", 0)
    os.environ |= {"SLURM_RESTART_COUNT": "1"}
    go_on(
        tmp_path,
        *QUICK,
        says=f"note: the requeued job takes {folder.relative_to(tmp_path)}/hpc_ckpt_2.ckpt, step {step}",
    )
    assert sorted(path.name for path in folder.parent.iterdir()) == ["version_0", "version_1"]
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 40
    assert logged(folder, "train/loss") == list(range(40))
