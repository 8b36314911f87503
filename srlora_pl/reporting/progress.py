"""A run's console output: the adapted matrices, the progress bar, the closing line."""

import math
import time
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.table import Table

from srlora_pl.lowrank import Adaptation
from srlora_pl.lowrank.measures import by_kind
from srlora_pl.training import lightning_internals as internals
from srlora_pl.util.system import peak_memory_bytes

_REPAINTS = 2  # of the bar, a second: more would take more than 0.5 % of a small network's steps
MATRICES = ("matrix", "count", "shape", "rank", "directions", "parameters")


def adaptation_of(pl_module: LightningModule) -> Adaptation:
    """Of a module that is an `srlora_pl.SRLoRAMixin`."""
    return pl_module.adaptation  # type: ignore[return-value]


class Progress(internals.ResumableRichBar):
    """A progress bar with loss, score and switches (or restarts) that never waits for the device.

    The loss is that of the last row of the curves (``trainer.log_every_n_steps``), the score that of the last
    validation, and ``switches 3/13, next 215`` says how many of the planned ones are done and after which optimizer
    step the next one comes.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=_REPAINTS)
        self._read: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if internals.metrics_are_fresh(trainer):
            self._keep(trainer, "train/loss")
        super().on_train_batch_end(trainer, *rest)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._keep(trainer, "val/score")
        super().on_validation_end(trainer, pl_module)

    def _keep(self, trainer: Trainer, name: str) -> None:
        if self.is_enabled and name in trainer.callback_metrics:
            self._read[name] = float(trainer.callback_metrics[name])

    @property
    def total_train_batches(self) -> int | float:
        """Micro-batches of the epoch, fewer where the run ends in it; those done before a resume count."""
        trainer: Any = self.trainer
        batches, progress = trainer.num_training_batches, internals.batches_in_epoch(trainer)
        done = progress.processed if progress.completed < progress.processed else 0  # before an epoch: of the last one
        if trainer.max_steps == -1:
            return batches
        accumulated = trainer.accumulate_grad_batches
        coming = (trainer.max_steps - trainer.global_step) * accumulated - done % accumulated
        return done if done == batches else min(batches, done + coming)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        shown: dict[str, Any] = {**super().get_metrics(trainer, pl_module), **self._read}
        shown.pop("v_num", None)  # the last letters of the version's name
        controller = adaptation_of(pl_module).controller
        done, planned, coming = controller.progress()
        if planned:
            shown[controller.events] = f"{done}/{planned}" + (f", next {coming}" if coming else "")
        return shown


class ProgressLines(ProgressBar):
    """What `Progress` shows, in lines, where nobody sees a bar move: in a file, a pipe, the log of a job.

    Every ``trainer.log_every_n_steps`` steps one such as ``step 50 of 360, loss 1.234, lr 0.00098, 3.2 steps/s, 97.0 s
    left``, and one with the scores of each validation. The time left is that of the steps at their mean speed so far,
    validations included. It waits for the device where `Progress` does.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_on = True
        self._first_step, self._begin, self._lr = 0, 0.0, 0.0

    def disable(self) -> None:  # Lightning calls it in all processes but the first
        self._is_on = False

    def enable(self) -> None:
        self._is_on = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step, self._begin = trainer.global_step, time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
        self._lr = float(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if not (self._is_on and internals.logs_this_step(trainer)):
            return
        step, steps = trainer.global_step, trainer.estimated_stepping_batches
        seconds = (time.perf_counter() - self._begin) / max(step - self._first_step, 1)
        known = 0 < steps < math.inf
        loss = trainer.callback_metrics.get("train/loss")
        print(", ".join([
            f"step {step:,}" + (f" of {int(steps):,}" if known else ""),
            *([] if loss is None else [f"loss {float(loss):.4g}"]),
            f"lr {self._lr:.3g}",
            f"{1 / seconds:.3g} steps/s",
            *([f"{duration((steps - step) * seconds)} left"] if known and step < steps else []),
        ]), flush=True)  # fmt: skip

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_on and trainer.state.fn == "fit" and not trainer.sanity_checking:
            scores = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("val")}
            words = (f"{name} {float(value):.4g}" for name, value in scores.items())
            print(f"validation after step {trainer.global_step:,}: {', '.join(words)}", flush=True)


def bar_or_lines() -> ProgressBar:
    """A bar on a terminal or in a notebook, else lines."""
    console = Console()
    return Progress() if console.is_terminal or console.is_jupyter else ProgressLines()


class MatrixTable(Callback):
    """Prints the adapted matrices once before training, instead of Lightning's summary."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        table = Table(*MATRICES)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in matrix_rows(adaptation_of(pl_module)):
            table.add_row(*row)
        parts = [table, parameter_line(pl_module)] if table.rows else [parameter_line(pl_module)]
        Console(highlight=False, soft_wrap=True, markup=False).print(*parts, sep="\n")


def matrix_rows(adaptation: Adaptation) -> list[Sequence[str]]:
    """A row of `MATRICES` for each kind of matrix: ``8-12`` where values differ, parameters summed."""
    rows: list[Sequence[str]] = []
    for kind, matrices in by_kind(adaptation).items():
        shapes = sorted({matrix.shape for matrix in matrices})
        parameters = sum(m.of(p).numel() for m in matrices for p in m.layer.adapter_parameters() if p.requires_grad)
        rows.append((
            kind,
            str(len(matrices)),
            ", ".join(f"{out} x {into}" for out, into in shapes),
            _span([matrix.rank for matrix in matrices]),
            _span([adaptation.controller.directions(matrix) for matrix in matrices]),
            f"{parameters:,}",
        ))  # fmt: skip
    return rows


def _span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}-{high}" if low < high else str(high) if high else "none"


def parameter_line(pl_module: LightningModule) -> str:
    """The numbers of trained and of all parameters, in words."""
    pairs, trained, everything = parameter_counts(pl_module).values()
    line = f"{trained:,} of {everything:,} parameters train ({trained / everything:.2%})"
    matrices = len(adaptation_of(pl_module).matrices)
    where = f"adapters of {matrices} matrices" if matrices else "adapters"
    return f"{line}: {pairs:,} in {where}, {trained - pairs:,} beside them" if pairs else line


def parameter_counts(pl_module: LightningModule) -> dict[str, int]:
    """Numbers of parameters in the ``adapters``, of all ``trained`` ones, and of ``all``."""
    layers = adaptation_of(pl_module).layers.values()
    return {
        "adapters": sum(p.numel() for layer in layers for p in layer.adapter_parameters() if p.requires_grad),
        "trained": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
        "all": sum(p.numel() for p in pl_module.parameters()),
    }


def closing_line(trainer: Trainer, adaptation: Adaptation, seconds: float, earlier: float = 0.0) -> str:
    """A run's cost, such as ``360 steps, 5 of 5 switches, 2 min 3 s, 410 MiB of memory at the peak``.

    Args:
        seconds: of all processes of the run, before and after a resume.
        earlier: of the processes before this one.
    """
    controller = adaptation.controller
    done, planned, _ = controller.progress()
    device = trainer.strategy.root_device
    return ", ".join([
        f"{trainer.global_step:,} steps",
        *([f"{done} of {planned} {controller.events}"] if planned else []),
        duration(seconds) + (f" ({duration(seconds - earlier)} of it now)" if earlier else ""),
        f"{peak_memory_bytes(device) / 2**20:,.0f} MiB of {'GPU ' if device.type == 'cuda' else ''}memory at the peak",
    ])  # fmt: skip


def duration(seconds: float) -> str:
    """``12.3 s``, ``2 min 3 s`` or ``1 h 2 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
