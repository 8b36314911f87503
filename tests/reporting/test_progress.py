"""What a run says on the console, held against what it did."""

import contextlib
import csv
import re
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console

from srlora_pl.lowrank import LoRA, ReLoRA, SRLoRA
from srlora_pl.reporting.progress import (
    Progress,
    ProgressLines,
    bar_or_lines,
    closing_line,
    duration,
    matrix_rows,
    parameter_line,
)
from srlora_pl.training.resume import ExactResume
from tests.helpers.toy_module import Toy, loader, srlora, trainer
from tests.helpers.watched import Watched


class Exact(ExactResume, Toy):
    pass


class Falling(Toy):
    """Its learning rate is another in every step."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Shown(Callback):
    """What the bar says at the end of every step."""

    def __init__(self):
        self.said = []

    def on_train_batch_start(self, fitting, module, *args):
        if fitting.global_step:
            self.said.append(fitting.progress_bar_callback.get_metrics(fitting, module))


def bar_of(module, tmp_path, **options):
    shown, logger = Shown(), CSVLogger(tmp_path)
    callbacks = [shown, Progress()]
    fitting = trainer(logger=logger, callbacks=callbacks, enable_progress_bar=True, **options)
    fitting.fit(module, loader(), loader(3))
    return shown.said, logger


def test_the_bar_says_loss_and_switches(tmp_path):
    """12 steps, switches after 3, 6 and 9; the loss is read every 4 steps."""
    said, logger = bar_of(Toy(), tmp_path, max_steps=12, log_every_n_steps=4)
    switches = [each["switches"] for each in said]
    assert switches == [
        *["0/3, next 3"] * 2,
        *["1/3, next 6"] * 3,
        *["2/3, next 9"] * 3,
        *["3/3"] * 3,
    ]
    assert all("v_num" not in each for each in said)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    shown = [each.get("train/loss") for each in said]
    assert shown == [None] * 3 + [pytest.approx(losses[0])] * 4 + [pytest.approx(losses[1])] * 4
    assert losses[0] != losses[1]


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass by themselves: one with each training batch, five with each validation."""

    class Clock(Callback):
        now = 100.0

        def on_train_batch_start(self, *_):
            self.now += 1

        def on_validation_start(self, *_):
            self.now += 5

    clock = Clock()
    monkeypatch.setattr("srlora_pl.reporting.progress.time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_lines_say_what_the_curves_say_and_when_the_run_will_be_over(clock, tmp_path, capsys):
    """12 optimizer steps of two batches each, logged every 4, validated after every 4."""
    rows = CSVLogger(tmp_path)
    options = {"accumulate_grad_batches": 2, "val_check_interval": 8, "log_every_n_steps": 4, "max_steps": 12}
    callbacks = [clock, ProgressLines(), LearningRateMonitor("step")]
    fitting = trainer(logger=rows, callbacks=callbacks, enable_progress_bar=True, num_sanity_val_steps=0, **options)
    fitting.fit(Falling(LoRA(rank=2)), loader(), loader(3))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("step", "validation"))]
    with (Path(rows.log_dir) / "metrics.csv").open() as file:
        logged = list(csv.DictReader(file))
    losses, rates, scores = (
        [float(row[name]) for row in logged if row[name]] for name in ("train/loss", "lr-AdamW", "val/loss")
    )
    rates = rates[1::2]  # of the second batch of each step
    assert len(losses) == len(rates) == len(scores) == 3
    assert lines == [
        f"step 4 of 12, loss {losses[0]:.4g}, lr {rates[0]:.3g}, 0.5 steps/s, 16.0 s left",
        f"validation after step 4: val/loss {scores[0]:.4g}",
        f"step 8 of 12, loss {losses[1]:.4g}, lr {rates[1]:.3g}, 0.381 steps/s, 10.5 s left",
        f"validation after step 8: val/loss {scores[1]:.4g}",
        f"step 12 of 12, loss {losses[2]:.4g}, lr {rates[2]:.3g}, 0.353 steps/s",
        f"validation after step 12: val/loss {scores[2]:.4g}",
    ]


def test_lines_of_a_resumed_run_count_its_own_seconds_and_other_processes_print_none(clock, tmp_path, capsys):
    def fit(steps, lines, ckpt_path=None):
        options = {"enable_progress_bar": True, "log_every_n_steps": 4, "max_steps": steps}
        fitting = trainer(tmp_path, callbacks=[clock, lines], logger=CSVLogger(tmp_path), **options)
        fitting.fit(Exact(LoRA(rank=2)), loader(), ckpt_path=ckpt_path)
        fitting.save_checkpoint(tmp_path / "a.ckpt")
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]

    assert len(fit(8, ProgressLines())) == 2
    (line,) = fit(15, ProgressLines(), tmp_path / "a.ckpt")
    assert line.startswith("step 12 of 15, ")
    assert line.endswith(", 1 steps/s, 3.0 s left")
    silent = ProgressLines()
    silent.setup = lambda *_, **__: silent.disable()  # as in the second process
    assert fit(8, silent) == []


@pytest.mark.parametrize(("is_terminal", "kind"), [(True, Progress), (False, ProgressLines)])
def test_a_bar_needs_a_terminal(is_terminal, kind, monkeypatch):
    monkeypatch.setattr("srlora_pl.reporting.progress.Console", lambda: Console(force_terminal=is_terminal))
    assert type(bar_or_lines()) is kind


def test_the_bar_of_a_method_without_switches(tmp_path):
    said, _ = bar_of(Toy(LoRA(rank=2)), tmp_path, max_steps=3)
    assert len(said) == 2
    assert all("switches" not in each for each in said)


class Positions(Callback):
    """What the bars show of batches done, and of how many, in training and in validation."""

    def __init__(self):
        self.train, self.val, self.strides = [], [], set()

    def on_train_batch_end(self, fitting, *args):
        shown = fitting.progress_bar_callback.train_progress_bar
        self.train.append((shown.completed, shown.total))
        self.strides |= {sample.completed for sample in shown._progress}  # what rich takes the speed from

    def on_validation_batch_end(self, fitting, *args):
        shown = fitting.progress_bar_callback.val_progress_bar
        self.val.append((shown.completed, shown.total))


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({"max_steps": 20}, [(12, 12), (8, 8)]),
        ({"max_steps": 9}, [(9, 9)]),
        ({"max_steps": 9, "max_epochs": 3}, [(9, 9)]),
        ({"max_steps": -1, "max_epochs": 2}, [(12, 12)] * 2),
        ({"max_steps": 7, "accumulate_grad_batches": 5}, [(12, 12), (12, 12), (5, 5)]),
        ({"max_steps": 20, "limit_train_batches": 7}, [(7, 7), (7, 7), (6, 6)]),
    ],
)
@pytest.mark.parametrize("stop", [6, 7])  # the validation after the sixth batch is owed, or done
def test_the_bar_of_a_resumed_epoch_goes_on(options, epochs, stop, tmp_path):
    def positions(*callbacks, ckpt_path=None):
        seen = Positions()
        fitting = trainer(
            tmp_path,
            callbacks=[Progress(), seen, *callbacks],
            enable_progress_bar=True,
            val_check_interval=6,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            **{"max_epochs": -1, **options},
        )
        with contextlib.suppress(InterruptedError):
            fitting.fit(Exact(LoRA(rank=2)), loader(12), loader(3), ckpt_path=ckpt_path)
        return seen

    class Interrupt(Callback):
        def on_train_batch_end(self, fitting, *args):
            if fitting.fit_loop.epoch_loop.batch_progress.total.processed == stop:
                fitting.save_checkpoint(tmp_path / "a.ckpt")
                raise InterruptedError

    L.seed_everything(0)
    whole, first = positions(), positions(Interrupt())
    second = positions(ckpt_path=tmp_path / "a.ckpt")
    assert whole.train == [(batch + 1, total) for batches, total in epochs for batch in range(batches)]
    assert first.train + second.train == whole.train
    assert first.val + second.val == whole.val
    assert second.strides == {1}
    assert set(whole.val) == {(1, 3), (2, 3), (3, 3)}


def test_the_table_counts_every_matrix_and_every_parameter():
    module = Toy(SRLoRA(rank=2, target_rank=16, rank_pattern={"blocks.1.fc1": 4}))
    rows = {row[0]: row[1:] for row in matrix_rows(module.adaptation)}
    assert list(rows) == ["qkv[q]", "qkv[k]", "qkv[v]", "proj", "fc1", "fc2"]
    assert rows["qkv[k]"] == ("2", "12 x 12", "2", "12", str(2 * 2 * 24))
    assert rows["fc1"] == ("2", "20 x 12", "2-4", "12", str((2 + 4) * 32))
    pairs = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in module.adaptation.layers.values())
    assert sum(int(row[-1].replace(",", "")) for row in rows.values()) == pairs
    everything = sum(p.numel() for p in module.parameters())
    assert parameter_line(module).startswith(f"{pairs} of {everything:,} parameters train")
    assert f"{pairs} in adapters of 12 matrices, 0 beside them" in parameter_line(module)


def test_a_method_without_a_spectrum_has_no_directions():
    assert {row[4] for row in matrix_rows(Toy(LoRA(rank=2)).adaptation)} == {"none"}


def test_the_console_of_a_run(run: Watched):
    assert run.out.count("attn.qkv[k]") == 1
    assert re.search(r"│ mlp.fc2\s+│\s+2 │ 32 x 128 │\s+4 │\s+12 │\s+1,280 │", run.out)
    assert "Trainable params" not in run.out
    assert re.search(r"\n12 steps, 3 of 3 switches, [\d.]+ s, [\d,]+ MiB of memory at the peak\n", run.out)


def test_the_closing_line_of_a_method_without_switches():
    module = Toy(LoRA(rank=2))
    fitted = trainer(max_steps=3)
    fitted.fit(module, loader())
    assert re.fullmatch(
        r"3 steps, 2 min 3 s, [\d,]+ MiB of memory at the peak", closing_line(fitted, module.adaptation, 123)
    )


def test_the_events_of_a_method_have_its_own_name(tmp_path):
    """3 restarts in 12 steps; the bar and the curves count them, and no switches."""
    module = Toy(ReLoRA(rank=2, restart_warmup=0))
    said, logger = bar_of(module, tmp_path, max_steps=12, log_every_n_steps=4)
    assert said[-1]["restarts"] == "3/3"
    assert "switches" not in said[-1]
    assert ", 3 of 3 restarts, " in closing_line(module.trainer, module.adaptation, 1)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["srlora/restarts"]]
    assert [(row["srlora/restarts"], row["srlora/switches"]) for row in rows] == [
        ("1.0", "0.0"), ("2.0", "0.0"), ("3.0", "0.0")
    ]  # fmt: skip


def test_the_closing_line_of_a_resumed_run_tells_all_its_seconds_and_those_of_now():
    module = Toy(LoRA(rank=2))
    fitted = trainer(max_steps=3)
    fitted.fit(module, loader())
    assert closing_line(fitted, module.adaptation, 123, 83).startswith("3 steps, 2 min 3 s (40.0 s of it now), ")


def test_a_run_that_ends_early_says_what_it_missed():
    module = Toy(srlora())

    class Stop(Callback):
        def on_train_batch_end(self, fitting, *args):
            fitting.should_stop = fitting.global_step == 7

    fitted = trainer(max_steps=12, callbacks=[Stop()])
    fitted.fit(module, loader())
    assert closing_line(fitted, module.adaptation, 1).startswith("7 steps, 2 of 3 switches, 1.0 s, ")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 0 s"), (3599.6, "1 h 0 min"), (8100, "2 h 15 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
