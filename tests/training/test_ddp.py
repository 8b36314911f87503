"""Two processes against one that has batches twice as large, and against each other."""

import csv
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from filelock import FileLock
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from srlora_pl import UserError
from srlora_pl.cli import main
from srlora_pl.data.loader import Share
from srlora_pl.run.processes import ending_together
from tests.helpers import ddp_program
from tests.helpers.ddp_program import FewDigits, classifier, trainer
from tests.helpers.errors import mentions
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run of `tests.helpers.ddp_program`, made by whichever worker of pytest-xdist comes first."""
    base = tmp_path_factory.getbasetemp()
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ddp"
    with FileLock(home.with_suffix(".lock"), timeout=1500):
        if not home.exists():
            home.mkdir()
            ddp_program.prepare(home)
            _run(home)
    return home


def _run(home: Path) -> None:
    launched = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    environment |= {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(home / "cache")}
    command = [sys.executable, "-m", "tests.helpers.ddp_program", str(home)]
    with (home / "said.txt").open("w") as said:
        program = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said, start_new_session=True)
        try:
            code = program.wait(timeout=1200)
        finally:
            with_children = program.pid  # a process that waits for ever for the other would stay behind
            if program.poll() is None:
                os.killpg(with_children, signal.SIGKILL)
    assert code == 0, (home / "said.txt").read_text()[-3000:]


@pytest.fixture(scope="session")
def ranks(home: Path) -> list[dict[str, Any]]:
    return [torch.load(home / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture
def alone(home: Path) -> Iterator[Path]:
    """Where one process finds what the two have found; a run sets the seed of its process."""
    before = dict(os.environ)
    yield home
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


def worst(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


def assert_same_run(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    assert one["switches"] == other["switches"] == 3
    for kind in ("directions", "intervals"):
        for name, value in one[kind].items():
            assert torch.equal(value, other[kind][name]), (kind, name)
    assert worst(one["effective"], other["effective"]) < tolerance
    assert worst(one["state"], other["state"]) < tolerance
    assert len(one["scores"]) == len(other["scores"]) > 2
    for each, same in zip(one["scores"], other["scores"], strict=True):
        each.pop("train/loss", None)
        assert each == pytest.approx({name: same[name] for name in each}, rel=max(tolerance, 1e-12), nan_ok=True)


def assert_saw_the_same(one: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    assert len(one["seen"]) == ddp_program.STEPS
    for batch, *parts in zip(one["seen"], *(each["seen"] for each in ranks), strict=True):
        assert sorted(batch) == sorted(index for part in parts for index in part)


# -- training


def test_images_in_double_precision_equal_one_process(ranks, alone):
    two = [each["images"] for each in ranks]
    one = ddp_program.images(alone, 1, "64-true")
    assert_saw_the_same(one, two)
    assert_same_run(one, two[0], 1e-9)
    assert worst(one["effective"], two[0]["effective"]) > 0  # or it was one process after all


def test_images_in_single_precision_stay_near(ranks, alone):
    assert worst(ddp_program.images(alone, 1, "32-true")["effective"], ranks[0]["images32"]["effective"]) < 1e-3


def test_texts_in_double_precision_equal_one_process(ranks, alone):
    two = [each["texts"] for each in ranks]
    one = ddp_program.texts(alone, 1)
    assert_saw_the_same(one, two)
    assert_same_run(one, two[0], 1e-9)
    assert two[0]["test"] == two[1]["test"] == pytest.approx(one["test"], rel=1e-12)


def test_answers_in_double_precision_equal_one_process(ranks, alone):
    """Micro-batches hold unequal numbers of answer tokens, and each question is answered once."""
    two = [each["answers"] for each in ranks]
    one = ddp_program.answers(alone, 1)
    assert_same_run(one, two[0], 1e-9)
    assert two[0]["test"] == two[1]["test"] == pytest.approx(one["test"], rel=1e-12)
    together, apart = ((alone / f"answers{processes}.jsonl").read_text() for processes in (2, 1))
    assert together == apart
    assert together.count("\n") == ddp_program.HELD_OUT
    assert not [*alone.glob("*.part")]


@pytest.mark.parametrize("run", ["images", "images32", "texts", "dropout"])
def test_processes_stay_equal_to_the_bit(ranks, run):
    one, other = (each[run] for each in ranks)
    for kind in ("effective", "state", "directions", "intervals"):
        for name, value in one[kind].items():
            assert torch.equal(value, other[kind][name]), (kind, name)
    for averages in ("smoothed", "uncertainty"):
        assert torch.equal(one[averages], other[averages])
        assert one[averages].any()


def test_each_process_draws_its_own_dropout(ranks):
    one, other = (each["dropout"]["masks"] for each in ranks)
    assert one[0].any()
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[0], one[1])


def test_one_process_decides_and_says_so_once_a_switch(ranks):
    assert [each["spectra"] for each in ranks] == [12, 0]  # two blocks of q, k, v, proj, fc1, fc2
    for each in ranks:
        start, *steps = each["images"]["shared"]
        assert start == 13  # the seed, and the directions of one matrix after the other
        assert Counter(steps) == {0: ddp_program.STEPS - 4, 1: 3}


def test_one_process_tokenises_for_all(ranks):
    assert [each["tokenised"] for each in ranks] == [[50, 1, ddp_program.HELD_OUT], []]


def test_what_one_process_decides_is_what_all_do(home):
    """The other one's own scores do not matter."""
    module = classifier(home)
    adaptation = module.adaptation
    adaptation.start()
    adaptation.plan(last_step=4)
    importance = adaptation.controller.importance
    importance.smoothed += torch.rand(importance.smoothed.shape)
    importance.uncertainty += 1
    expected = torch.arange(len(adaptation.matrices)) % 2
    adaptation.run_on_rank_zero = lambda compute: expected
    adaptation.before_optimizer(1)  # of no gradient, which leaves no trace
    adaptation.after_optimizer(1)
    assert [active.tolist() for active in adaptation.controller.active.values()] == [[2, 1], [0, 2]] * 6


def test_a_nan_of_one_process_is_seen_by_all(ranks):
    for each in ranks:
        assert each["nan"]["finite"] == [True, True, False, False]
        assert each["nan"]["smoothed"].isfinite().all()
        assert "loss became NaN or infinite" in each["nan"]["message"]


def test_what_the_first_process_refuses_all_refuse(ranks):
    assert "is zero and has no singular directions" in ranks[0]["zero"]
    assert ranks[0]["zero"] == ranks[1]["zero"]


# -- resume


@pytest.mark.parametrize("position", [5, 10])
def test_a_resumed_run_equals_the_uninterrupted_one(home, ranks, position):
    """Also from between the two micro-batches of a step, where each process holds gradients of its own."""
    saved = torch.load(home / f"{position}.ckpt", weights_only=True)["exact_resume"]["gradients"]
    assert bool(saved) == (position == 5)
    for each in ranks:
        whole, resumed = each["dropout"], each["resumed"][position]
        for name, value in whole["state"].items():
            assert torch.equal(value, resumed["state"][name]), name
        assert torch.equal(whole["smoothed"], resumed["smoothed"])
        assert resumed["seen"] == whole["seen"][position:]


def test_another_number_of_processes_with_other_batches_is_refused(alone):
    L.seed_everything(3, verbose=False)
    with pytest.raises(UserError, match=mentions("processes", "1", "2")):
        trainer(alone, 1, accumulate_grad_batches=2, max_steps=7).fit(
            classifier(alone, dropout=0.3, mixup=0.3), FewDigits(2), ckpt_path=alone / "10.ckpt"
        )


def test_batches_larger_than_the_data_of_all_devices_together(alone):
    data = FewDigits(1)
    data.batch_size = 31
    run = trainer(alone, 2)
    data.trainer = run
    module = classifier(alone)
    run.strategy.connect(module)
    with pytest.raises(UserError, match=mentions("data.batch_size", "31", "2 devices", "60")):
        data.setup("fit")


# -- evaluation


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 17, 21])
def test_every_sample_is_scored_once(count, batch_size, world):
    shares = [Share(range(count), batch_size, rank, world) for rank in range(world)]
    batches = [torch.tensor([*share]).split(batch_size) if len(share) else () for share in shares]
    assert len({len(each) for each in batches}) == 1
    counted = [
        row
        for share, each in zip(shares, batches, strict=True)
        for i, batch in enumerate(each)
        for row in batch.tolist()
        if "spare" not in share.mark(i, {})
    ]
    assert sorted(counted) == list(range(count))
    assert not count or "spare" not in shares[0].mark(len(batches[0]) - 1, {})


# -- the command line


def test_a_run_of_two_processes_is_written_once(home, ranks):
    (run,) = (home / "runs/quickstart-srlora").iterdir()
    for each in ranks:
        assert each["command"] == {"codes": [0, 0], "folder": run.name}
    kinds = {path.name.split(".")[0] for path in run.iterdir()}
    assert kinds == {"config", "metrics", "hparams", "predictions", "checkpoints", "events", "summary"}
    assert len({path.name.split(".")[-2] for path in run.glob("events*")}) == 1  # written by one process
    assert {path.name for path in (run / "checkpoints").iterdir()} >= {"last.ckpt"}
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["val/loss"]] == ["1", "3"]
    assert [row["step"] for row in rows if row["train/loss"]] == ["0", "1", "2", "3"]


def test_a_run_of_two_processes_speaks_once(home, ranks):
    said = (home / "said.txt").read_text()
    for once in ("run written to", "best checkpoint", "5 predictions written to"):
        assert said.count(once) == 1, once
    assert "sync_dist" not in said
    assert "Warning" not in said


def test_predictions_are_all_there_and_in_order(home, ranks):
    """Five pictures in batches of four on each of two processes."""
    with (home / "runs/quickstart-srlora/version_0/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["sample"]).name for row in rows] == [f"{i}.png" for i in range(5)]
    assert all(row["label"] in "0123456789" and 0 < float(row["probability"]) <= 1 for row in rows)


def test_copies_of_the_model_are_not_trained(tmp_path, capsys):
    options = [f"--trainer.default_root_dir={tmp_path}", "--trainer.devices=2", "--trainer.strategy=ddp_spawn"]
    assert main(["fit", "--config", str(ROOT / "configs/quickstart.yaml"), *options]) == 2
    assert "ddp_notebook train a copy of the model" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_copies_of_the_model_are_not_trained_from_python_either(alone):
    module = classifier(alone)
    module.trainer = trainer(alone, 2, strategy="ddp_spawn")
    with pytest.raises(UserError, match=mentions("ddp_notebook", "copy")):
        module._refuse_what_cannot_be_right()


def ending(error: Exception, *children: subprocess.Popen) -> None:
    """``error`` in the process that started ``children``."""
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=SimpleNamespace(procs=children)))
    with ending_together(trainer):
        raise error


def child(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-S", "-c", code])


def test_an_error_ends_the_other_processes():
    waiting = child("import time; time.sleep(600)")
    with pytest.raises(UserError, match="once"):
        ending(UserError("said once"), waiting)
    assert waiting.wait(60) == -signal.SIGKILL


def test_what_another_process_has_refused_is_no_bug_here():
    with pytest.raises(SystemExit) as stop:
        ending(RuntimeError("Connection closed by peer"), child("raise SystemExit(2)"))
    assert stop.value.code == 2


def test_a_bug_stays_one():
    with pytest.raises(RuntimeError, match="bug"):
        ending(RuntimeError("bug"), child("raise SystemExit(0)"))


def test_the_first_process_speaks_first(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("srlora_pl.run.processes.time.sleep", waits.append)
    with pytest.raises(UserError):
        ending(UserError("said once"))
    assert not waits
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with pytest.raises(UserError):
        ending(UserError("said by the first"))
    assert len(waits) == 1
