"""Curves and figures besides loss, scores and learning rates."""

import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import chain
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from srlora_pl.data.protocols import data_of
from srlora_pl.lowrank import Adaptation
from srlora_pl.lowrank.measures import by_kind, drawn_after, scores_by_kind, size_of_change, switches_survived
from srlora_pl.reporting.csv_log import ResumableCSVLogger
from srlora_pl.reporting.curves import ResumableTensorBoardLogger
from srlora_pl.reporting.events import SHOW_IMAGES, log_histogram, log_image, log_text
from srlora_pl.reporting.progress import MATRICES, adaptation_of, matrix_rows, parameter_line
from srlora_pl.training import lightning_internals as internals
from srlora_pl.util.system import device_name, peak_memory_bytes, versions
from srlora_pl.util.tables import markdown

_KEY = "monitor"
_MEASUREMENTS = 10  # of W_eff - W0 in a run, at most
# From how many to how many switches a curve of ages counts; -1: since the start, never recycled.
_AGES = {
    "initial": (-1, -1),
    "survived_0": (0, 0),
    "survived_1": (1, 1),
    "survived_2_to_3": (2, 3),
    "survived_4_or_more": (4, math.inf),
}
_MACHINE = ("time/", "memory/")  # curves that differ from run to run
_LOG: dict[str, Callable[[Logger, str, Any, int], None]] = {
    "histogram": log_histogram,
    "image": log_image,
    "text": log_text,
}

Event = tuple[str, str, Any]  # its kind (scalar, histogram, image, text), its tag, and the value


class Monitor(Callback):
    """Gives the loggers of a run whose module is an `srlora_pl.SRLoRAMixin` more than its losses.

    All of them get the numbers; TensorBoard and W&B the histograms too, and both and MLflow pictures and text.

    Every ``trainer.log_every_n_steps`` steps, with the step that the other curves have:

    * ``scores/KIND``: mean pair score S_k (Eq. 7) of a kind of matrix, and ``log10_scores/KIND``: the histogram of
      the decimal logarithms of those above 0.
    * ``srlora/directions``: how many singular directions the matrix that is furthest has drawn.
    * ``age/initial``: share of all pairs that were never recycled; ``age/survived_0``, ``age/survived_1``,
      ``age/survived_2_to_3`` and ``age/survived_4_or_more``: of those recycled, by the switches since (the five add
      up to 1); ``age_in_steps``: the histogram of the optimizer steps since these were drawn.
    * Of the last switch, ``srlora/first_chance``: the share that it recycled of the pairs that the switch before had
      drawn; ``srlora/score_recycled`` and ``srlora/score_kept``: the median scores of the pairs that it recycled and of
      those that it kept.
    * ``time/step``: seconds of an optimizer step, the mean since the last row, without validations; and
      ``memory/peak``, GiB: of the GPU, or of the process where there is none.

    At validations, at most ten times in a run, and at the end: ``change_norm/KIND``, ``change_stable_rank/KIND`` and
    ``change_effective_rank/KIND`` of W_eff - W0, each the mean over a kind's first, middle and last
    matrix (see `srlora_pl.lowrank.measures.Size`). A matrix whose fused pairs are not kept any more is left out.

    At the start of every process ``run``, a card with command, versions, device and parameters, and the settings. At
    the end ``figures/directions_block_N`` (the paper's Figure 5, of the middle block) and ``figures/length_variance``
    (its Figure 4) and ``figures/switches``, if matplotlib is installed; and in TensorBoard the hyperparameters with
    the final scores.

    No other step waits for the device. Only the first process writes. In ``metrics.csv`` and TensorBoard a resumed run
    has the same events as an uninterrupted one, except ``time/*`` and ``memory/*``, which ``metrics.csv`` leaves out.

    Args:
        figures_at_validation: draw the figures after every validation too.
    """

    def __init__(self, figures_at_validation: bool = False) -> None:
        self.figures_at_validation = figures_at_validation
        self._step = 0  # of the curves, that the last events belong to
        self._events: list[Event] = []  # of that step, without numbers, which `ResumableCurves` repeats
        self._draws = True
        self._measured = 0  # up to which tenth of the run W_eff - W0 was measured
        self._since, self._steps_before, self._paused = 0.0, 0, 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After `ResumableCurves` has cut the curves of a resumed run and repeated their numbers."""
        cut, self._events, adaptation = self._events, [], adaptation_of(pl_module)
        self._draws = _can_draw(trainer, adaptation)
        self._write(trainer, self._step, [("text", "run", _card(trainer, pl_module))])
        resumed = [logger for logger in trainer.loggers if isinstance(logger, ResumableTensorBoardLogger)]
        self._write(trainer, self._step, [event for event in cut if event[0] != "image"], resumed)
        if any(kind == "image" for kind, _, _ in cut):  # drawn again
            last = adaptation.steps_before + self._step + 1
            self._write(trainer, self._step, self._figures(adaptation, last), resumed)
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):  # which gets them at the end, with the scores
                logger.log_hyperparams(_settings(trainer, adaptation))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since, self._steps_before = time.perf_counter(), trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *rest: Any) -> None:
        if internals.logs_this_step(trainer):
            adaptation = adaptation_of(pl_module)
            directions = _directions(adaptation, _all_steps(trainer))
            events = chain(_scores(adaptation), directions, _last_switch(adaptation), self._cost(trainer))
            self._write(trainer, internals.logged_step(trainer), events)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        adaptation, step = adaptation_of(pl_module), internals.logged_step(trainer)
        self._write(trainer, step, self._change(adaptation, self._part(trainer)))
        if self.figures_at_validation:
            self._write(trainer, step, self._figures(adaptation, _all_steps(trainer)))
        self._since += time.perf_counter() - self._paused

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Also for a finished run that is started again, whose last events were cut."""
        if last := trainer.global_step:
            adaptation = adaptation_of(pl_module)
            self._write(trainer, last, self._change(adaptation, _MEASUREMENTS))
            self._write(trainer, last, self._figures(adaptation, _all_steps(trainer)))
            scores = dict.fromkeys(_final_scores(trainer), 0.0)  # the HPARAMS tab takes values from their own curves
            for summary in hparams(_hyperparameters(trainer, pl_module), scores):
                for writer in _writers(trainer):
                    writer.file_writer.add_summary(summary, last)

    def _part(self, trainer: Trainer) -> int:
        """How many tenths of the run are over; without a known end, its steps."""
        steps = trainer.estimated_stepping_batches
        return int(trainer.global_step * _MEASUREMENTS // steps) if 0 < steps < math.inf else trainer.global_step

    def _cost(self, trainer: Trainer) -> Iterator[Event]:
        now, steps = time.perf_counter(), trainer.global_step - self._steps_before
        yield "scalar", "time/step", (now - self._since) / max(steps, 1)
        yield "scalar", "memory/peak", peak_memory_bytes(trainer.strategy.root_device) / 2**30
        self._since, self._steps_before = now, trainer.global_step

    def _change(self, adaptation: Adaptation, part: int) -> Iterator[Event]:
        if part <= self._measured:
            return
        self._measured = part
        for kind, matrices in by_kind(adaptation).items():
            sample = [matrices[i] for i in sorted({0, len(matrices) // 2, len(matrices) - 1})]
            found = (size_of_change(adaptation, matrix) for matrix in sample)
            sizes = [size for size in found if size is not None]
            for name in ("norm", "stable_rank", "effective_rank") if sizes else ():
                yield "scalar", f"change_{name}/{kind}", statistics.mean(getattr(size, name) for size in sizes)

    def _figures(self, adaptation: Adaptation, last_step: int) -> Iterator[Event]:
        return _figures(adaptation, last_step) if self._draws else iter(())

    def _write(
        self, trainer: Trainer, step: int, events: Iterable[Event], loggers: Sequence[Logger] | None = None
    ) -> None:
        """Log ``events``, which are computed only if there is a logger, by default to all of them."""
        loggers = trainer.loggers if loggers is None else loggers
        if not (loggers and trainer.is_global_zero):
            return
        if self._step != step:
            self._step, self._events = step, []
        numbers: dict[str, float] = {}
        for kind, tag, value in events:
            if kind == "scalar":
                numbers[tag] = value
                continue
            for logger in loggers:
                _LOG[kind](logger, tag, value, step)
            self._events.append((kind, tag, value))
        same = {tag: value for tag, value in numbers.items() if not tag.startswith(_MACHINE)}
        for logger in loggers:
            if found := same if isinstance(logger, ResumableCSVLogger) else numbers:
                logger.log_metrics(found, step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the events of the checkpoint's step: curves are cut before it, see `ResumableCurves`."""
        step = internals.logged_step(trainer)
        kept = [each for each in self._events if each[0] != "text"]
        events = [(kind, tag, None if kind == "image" else value) for kind, tag, value in kept]
        checkpoint[_KEY] = {"step": step, "events": events if self._step == step else [], "measured": self._measured}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(_KEY, {"step": checkpoint["global_step"], "events": [], "measured": 0})
        self._step, self._events, self._measured = saved["step"], saved["events"], saved["measured"]


def _writers(trainer: Trainer) -> list[Any]:
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [logger.experiment for logger in loggers] if trainer.is_global_zero else []


def _all_steps(trainer: Trainer) -> int:
    """Optimizer steps of this fit and of earlier ones of the module, as the histories of its pairs count them."""
    return adaptation_of(trainer.lightning_module).steps_before + trainer.global_step


def _scores(adaptation: Adaptation) -> Iterator[Event]:
    for kind, scores in scores_by_kind(adaptation).items():
        yield "scalar", f"scores/{kind}", scores.mean().item()
        if (positive := scores[(scores > 0) & scores.isfinite()]).numel():
            yield "histogram", f"log10_scores/{kind}", positive.log10()


def _directions(adaptation: Adaptation, step: int) -> Iterator[Event]:
    if not (histories := adaptation.controller.histories()):
        return
    yield "scalar", "srlora/directions", float(max(map(len, histories.values())))
    drawn = drawn_after(histories)
    ages = switches_survived(histories, drawn).where(drawn > 0, -1)
    for name, (low, high) in _AGES.items():
        yield "scalar", f"age/{name}", ((low <= ages) & (ages <= high)).double().mean().item()
    if (recycled := drawn[drawn > 0]).numel():
        yield "histogram", "age_in_steps", step - recycled


def _last_switch(adaptation: Adaptation) -> Iterator[Event]:
    if not (records := adaptation.controller.switch_records()):
        return
    if (share := records[-1].first_chance) is not None:
        yield "scalar", "srlora/first_chance", share
    pairs = records[-1].pairs
    for name, chosen in (("recycled", pairs.recycled), ("kept", ~pairs.recycled)):
        if chosen.any() and pairs.scores.any():
            yield "scalar", f"srlora/score_{name}", pairs.scores[chosen].median().item()


def _figures(adaptation: Adaptation, last_step: int) -> Iterator[Event]:
    if not (histories := adaptation.controller.histories()):
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from srlora_pl.figures import drawings  # with matplotlib, which takes its time
    from srlora_pl.figures.numbers import middle_block, switch_rows
    from srlora_pl.figures.switches import switches

    middle, rows = middle_block(histories), switch_rows(adaptation.controller.switch_records())
    for tag, figure in (
        (f"figures/directions_block_{middle}", drawings.direction_intervals(histories, last_step, middle)),
        ("figures/length_variance", drawings.length_variance(histories, last_step)),
        *([("figures/switches", switches(rows, last_step))] if rows else []),
    ):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        yield "image", tag, np.asarray(canvas.buffer_rgba())[..., :3]


def _can_draw(trainer: Trainer, adaptation: Adaptation) -> bool:
    """Whether figures can be drawn and shown; says so where only matplotlib is missing."""
    if not (adaptation.controller.histories() and any(isinstance(each, SHOW_IMAGES) for each in trainer.loggers)):
        return False
    installed = find_spec("matplotlib") is not None
    if not installed and trainer.is_global_zero:
        print("note: no figures are logged without matplotlib: pip install 'srlora_pl[figures]'", file=sys.stderr)
    return installed


def _card(trainer: Trainer, pl_module: LightningModule) -> str:
    """This process's command, device, versions and method, as a table in Markdown."""
    method = adaptation_of(pl_module).method
    given = {name: value for name, value in method.spec()["init_args"].items() if value not in (None, [], {})}
    rows = {
        "command": f"`{shlex.join(sys.argv)}`",
        "device": device_name(trainer.strategy.root_device)
        + (f", {trainer.world_size} processes" if trainer.world_size > 1 else ""),
        "precision": str(trainer.precision),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "method": ": ".join(filter(None, [type(method).__name__, ", ".join(f"{n} {given[n]}" for n in given)])),
        "parameters": parameter_line(pl_module),
    }
    about = markdown(["", ""], [[f"**{name}**", text] for name, text in rows.items()])
    rows_of_matrices = matrix_rows(adaptation_of(pl_module))
    return f"{about}\n\n{markdown(MATRICES, rows_of_matrices)}" if rows_of_matrices else about


def _hyperparameters(trainer: Trainer, pl_module: LightningModule) -> dict[str, int | float | str]:
    """The module's hyperparameters and `_settings`, as TensorBoard takes them: ``method.NAME`` are the method's."""
    settings = _settings(trainer, adaptation_of(pl_module))
    method = settings.pop("method")
    chosen = {
        **pl_module.hparams,
        "method": method["class_path"].rpartition(".")[2],
        **{f"method.{name}": value for name, value in method["init_args"].items()},
        **settings,
    }
    return {
        name: value if isinstance(value, int | float) else str(value)
        for name, value in chosen.items()
        if value is not None
    }


def _settings(trainer: Any, adaptation: Adaptation) -> dict[str, Any]:
    """The method, which not every module has among its hyperparameters, and the run's own."""
    return {
        "method": adaptation.method.spec(),
        "seed": os.environ.get("PL_GLOBAL_SEED"),
        "precision": trainer.precision,
        "max_steps": trainer.max_steps,
        "max_epochs": trainer.max_epochs,
        "batch_size": data_of(trainer).batch_size,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "devices": trainer.world_size,
    }


def _final_scores(trainer: Any) -> list[str]:
    """The curves of validation, and those that the test after the run will have."""
    scores = [name for name in trainer.callback_metrics if name.startswith("val")]
    tests = data_of(trainer).has_test_labels
    return [*scores, *(f"test{name[3:]}" for name in scores if tests)]
