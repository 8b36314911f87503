"""Runs that a signal ends, and the command that they say to go on with."""

import contextlib
import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.test_cli import SMALL_RUN, _no_trace, cli  # noqa: F401

RUN = SMALL_RUN + "  callbacks: [{class_path: tests.test_interrupts.SignalAt}]\n"


class SignalAt(Callback):
    """Sends this process the signal that ``SIGNAL_AT`` says, once: 'HOOK STEP SIGNAL'."""

    def __init__(self) -> None:
        hook, self.step, self.signal = os.environ.get("SIGNAL_AT", "teardown -1 0").split()
        setattr(self, hook, self.send)

    def send(self, trainer, *args, **kwargs) -> None:
        if trainer.global_step == int(self.step):
            os.environ.pop("SIGNAL_AT", None)
            self.step = "-1"
            os.kill(os.getpid(), int(self.signal))


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


def go_on(home: Path, *arguments: object, code: int = 0, says: str = "") -> list[str]:
    """The arguments of the command that the run says to go on with."""
    ended, out, err = cli(*arguments, home=home)
    assert ended == code, err
    assert says in ((out + err) if code == 0 else err.splitlines()[-1])
    assert "Traceback" not in err
    return shlex.split(err.partition("go on with: python cli.py ")[2])


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_same(folder: Path, expected: Path) -> None:
    """Equal in all that a run leaves: curves, the choice of the best, weights and all other state."""
    assert (folder / "metrics.csv").read_text() == (expected / "metrics.csv").read_text()
    assert curves(folder) == curves(expected)
    files = sorted(path.name for path in expected.glob("checkpoints/*"))
    assert sorted(path.name for path in folder.glob("checkpoints/*")) == files
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
    ("hook", "step", "number"),
    [
        ("on_train_batch_start", 5, signal.SIGINT),
        ("on_before_optimizer_step", 5, signal.SIGTERM),
        ("on_train_batch_end", 4, signal.SIGTERM),  # a validation is due
        ("on_train_batch_end", 10, signal.SIGTERM),  # a row is due
        ("on_validation_batch_start", 4, signal.SIGINT),
        ("on_validation_end", 8, signal.SIGTERM),
        ("on_train_batch_end", 12, signal.SIGTERM),  # nothing is left but a validation
        ("on_validation_end", 12, signal.SIGTERM),
        ("on_test_batch_start", 12, signal.SIGINT),
    ],
)
def test_a_signalled_run_goes_on_as_if_nothing_had_happened(hook, step, number, tmp_path, expected) -> None:
    with signal_at(hook, step, number):
        (tmp_path / "small.yaml").write_text(RUN)
        command = go_on(tmp_path, "fit", "--config", "small.yaml", code=128 + number, says=f"by {number.name}")
    folder = tmp_path / "runs/small-srlora/version_0"
    assert command[:3] == ["fit", "--config", str(folder.relative_to(tmp_path) / "config.yaml")]
    go_on(tmp_path, *command)
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
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".ckpt", ".csv", ".yaml")}
    arguments = ["fit", "--config", "small.yaml", "--ckpt_path", "last"]
    with signal_at("setup", 0, signal.SIGINT):
        command = go_on(tmp_path, *arguments, code=130, says="before the first step")
    assert command[-1] == "runs/small-srlora/version_0/checkpoints/last.ckpt"
    assert {path: path.read_bytes() for path in before} == before
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
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
