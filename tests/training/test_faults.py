"""What breaks in the middle of a run: one sentence, nothing is lost, and it resumes as if nothing had been."""

import errno
import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from benchmarks.faults import SAVE_OFTEN, difference, outcome
from srlora_pl import ImageClassifier, UserError
from srlora_pl.data.loader import _watch_workers
from srlora_pl.reporting.csv_log import ResumableCSVLogger
from tests.helpers.cli import SMALL_RUN, cli, complaint
from tests.helpers.digits import SmallDigits, assert_equal, model, trainer
from tests.helpers.errors import mentions
from tests.helpers.faults import in_step
from tests.helpers.paths import ROOT
from tests.helpers.waiting import PATIENCE, run

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("backbone")]
FIT = ["fit", "--config", "small.yaml", "--ckpt_path", "last"]


def prepared(home: Path, **data: Any) -> Path:
    """A folder with a config of 12 steps, validations after 4, 8 and 12, and a file after every second."""
    settings = yaml.safe_load(SMALL_RUN)
    settings["trainer"] |= {"callbacks": [SAVE_OFTEN], "enable_progress_bar": False}
    settings["data"]["init_args"] |= data
    home.mkdir(parents=True, exist_ok=True)
    (home / "small.yaml").write_text(yaml.safe_dump(settings))
    return home


def finished(home: Path) -> dict[str, Any]:
    code, _, err = cli(*FIT, home=home)
    assert code == 0, err
    return outcome(home)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run leaves that nothing happened to."""
    return finished(prepared(tmp_path_factory.mktemp("whole")))


def broken(home: Path) -> str:
    """What a run that a fault ends says."""
    code, _, err = cli(*FIT, home=home)
    assert code == 2, err
    return complaint(err.replace("begins anew", "").replace("note: --ckpt_path last finds no checkpoint", "note: "))


def step_of_last(home: Path) -> int:
    files = home.glob("runs/*/*/checkpoints/*.ckpt")
    states = [torch.load(file, weights_only=True) for file in files]
    for state in states:
        assert all(value.isfinite().all() for value in state["state_dict"].values() if value.is_floating_point())
    return max(state["global_step"] for state in states)


# -- numbers


def test_a_loss_that_is_not_finite(tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    home = prepared(tmp_path)
    with monkeypatch.context() as patch:
        in_step(patch, 9, lambda task: task.net.head.bias.data.fill_(torch.nan))
        sentence = broken(home)
    assert "loss became NaN or infinite in steps 9 to 10" in sentence
    assert step_of_last(home) == 8
    assert difference(finished(home), whole) is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_gradients_that_are_not_finite(
    bad: float, tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the step is finite, so only the weights tell."""
    home = prepared(tmp_path)

    def poison(task: ImageClassifier) -> None:
        parameter = task.net.head.weight
        handle = parameter.register_hook(lambda gradient: (handle.remove(), torch.full_like(gradient, bad))[1])

    with monkeypatch.context() as patch:
        in_step(patch, 10, poison)
        sentence = broken(home)
    assert "weights became NaN or infinite before step 11, though the loss was finite" in sentence
    assert step_of_last(home) == 8
    assert difference(finished(home), whole) is None


class Overflow(Callback):
    """Gradients of one step that half precision cannot hold; and the model before that step and after its switch."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_start(self, run: L.Trainer, module: ImageClassifier, *_: Any) -> None:
        if run.global_step in (self.step - 1, self.step):
            layers = module.adaptation.layers.items()
            merged = {name: layer.merged_weight().detach().clone() for name, layer in layers}
            head = module.net.head.weight.detach().clone()
            controller = module.adaptation.controller
            scores = controller.scores().values()
            pairs = [active.tolist() for active in controller.active.values()]
            state = {"merged": merged, "head": head, "switches": controller.switches_done}
            self.seen.append(state | {"lowest": [each.argmin().item() for each in scores], "directions": pairs})

    def on_after_backward(self, run: L.Trainer, module: ImageClassifier) -> None:
        if run.global_step == self.step - 1:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.inf)


def scaled_run(folder: Path, *callbacks: Callback, ckpt_path: Path | None = None) -> ImageClassifier:
    L.seed_everything(3, verbose=False)
    module = model()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
    run = trainer(folder, *callbacks, plugins=[plugin])
    run.fit(module, datamodule=SmallDigits(), ckpt_path=ckpt_path)
    return module


def test_an_overflow_in_the_very_step_before_a_switch(tmp_path: Path) -> None:
    """14 steps with switches after 3, 7 and 10; the scaler leaves step 3 out, and the switch comes all the same."""
    overflow = Overflow(3)
    expected = scaled_run(tmp_path / "whole", overflow)
    assert expected.adaptation.controller.progress().done == 3
    before, after = overflow.seen
    assert (before["switches"], after["switches"]) == (0, 1)
    assert torch.equal(before["head"], after["head"])
    # The averages are those of the steps that counted: each matrix has re-drawn the pair that was lowest in them.
    assert set(before["lowest"]) == {0, 1}
    assert [pair.index(2) for pair in after["directions"]] == before["lowest"]
    for name, weight in before["merged"].items():
        torch.testing.assert_close(after["merged"][name], weight, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(expected.adaptation.controller.importance.smoothed).all()
    for step in (3, 4):  # the first of these files was written before the switch
        resumed = scaled_run(tmp_path / f"from {step}", ckpt_path=tmp_path / f"whole/step={step}.ckpt")
        assert_equal(resumed, expected)


# -- processes and files


def bury(workers: list[Any]) -> None:
    """Wait for the ends of killed workers: torch's handler of SIGCHLD raises at any line, once for each loader."""
    try:
        for worker in workers:
            worker.kill()
            worker.join(PATIENCE)
            assert not worker.is_alive(), f"{worker} outlives SIGKILL"
    except RuntimeError:
        bury(workers)


def test_a_worker_that_is_killed(tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    home = prepared(tmp_path, num_workers=1)
    workers: list[Any] = []  # one of the training's loader, one of the validation's

    def kill(_: ImageClassifier) -> None:
        workers.extend(multiprocessing.active_children())
        for worker in workers:
            worker.kill()

    with monkeypatch.context() as patch:
        in_step(patch, 7, kill)
        sentence = broken(home)
    assert workers
    bury(workers)
    assert "a process that loads data died" in sentence.lower()  # said where it is noticed first
    assert "data.num_workers" in sentence
    assert step_of_last(home) in (6, 8)  # the batches that were ready may have been used up
    assert difference(finished(home), whole) is None


@pytest.mark.parametrize("error", [ConnectionResetError, EOFError, RuntimeError, FileNotFoundError])
def test_what_a_dying_worker_raises_has_many_names(error: type[Exception]) -> None:
    class Batches:
        def __init__(self, seconds: int) -> None:
            self._workers = [multiprocessing.Process(target=time.sleep, args=(seconds,), daemon=True)]
            self._workers[0].start()

        def __next__(self) -> Any:
            raise error

    with pytest.raises(UserError, match=mentions("process that loads data died")):
        next(_watch_workers(Batches(0)))
    alive = Batches(60)
    with pytest.raises(error):
        next(_watch_workers(alive))
    alive._workers[0].kill()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_between_epochs(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):  # larger than what is kept in memory
        file = tmp_path / "pictures" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (130, 130, 3), np.uint8)
        Image.fromarray(pixels).save(file)
    data = {"name": None, "root": "../pictures", "batch_size": 3, "val_fraction": 0.25, "num_workers": workers}
    expected = finished(prepared(tmp_path / "whole", **data))
    home = prepared(tmp_path / "broken", **data)
    kept = [Path("../pictures/a/2.png"), Path("../pictures/b/5.png"), Path("../pictures/a/0.png")]

    def vanish(_: ImageClassifier) -> None:
        for file in kept:
            shutil.move(home / file, tmp_path / file.name)

    with monkeypatch.context() as patch:
        in_step(patch, 6, vanish)  # an epoch has 3 steps
        sentence = broken(home)
    assert any(f"The image {file} cannot be read ([Errno 2] No such file or directory" in sentence for file in kept)
    assert step_of_last(home) >= 4
    for file in kept:
        shutil.move(tmp_path / file.name, home / file)
    assert difference(finished(home), expected) is None


@pytest.mark.parametrize(("kind", "hook"), [(ResumableCSVLogger, "log_metrics"), (SummaryWriter, "add_scalar")])
def test_a_disk_that_is_full_for_the_curves(
    kind: type, hook: str, tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = prepared(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.csv")

    with monkeypatch.context() as patch:
        in_step(patch, 7, lambda _: patch.setattr(kind, hook, full))
        sentence = broken(home)
    assert "metrics.csv could not be written (No space left on device)" in sentence
    assert step_of_last(home) in (6, 8)
    assert difference(finished(home), whole) is None


# -- kills


@pytest.mark.slow
def test_kills_with_sigkill() -> None:
    """The short form of ``benchmarks/faults.py``."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.faults", "--images", "3", "--texts", "0"]
    done = run(command, cwd=ROOT, seconds=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert sum(tried for tried, _ in result["images"].values()) == 3
    assert sum(survived for _, survived in result["images"].values()) == 3
