"""The share of a run that its callbacks of curves, bar and tables take, at default settings.

    python -m benchmarks.overhead --config configs/quickstart.yaml --steps 200

One run of the command line, whose every call of `Monitor`, `Progress` and `MatrixTable` is timed, and every repaint of
the bar in its own thread (processor time). The ratio is what they took from the first step to the last, validations
among them, over the whole of that time, so the load of the machine cancels. On a GPU the device is waited for before
a call that is timed, so that only its own work counts. What the start and the end of a run take is reported in seconds.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, whose folder holds a kernels.py that transformers would take for a package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from lightning.pytorch import Callback

from benchmarks.report import report
from srlora_pl import cli
from srlora_pl.reporting import MatrixTable, Monitor, Progress
from srlora_pl.run import defaults
from srlora_pl.run.run import Run
from srlora_pl.util.system import device_name

ONCE = ("on_fit_start", "on_fit_end")


class Stopwatch(Callback):
    """Seconds by callback and hook while a run trains, and in what is called once."""

    def __init__(self) -> None:
        self.training: Counter[str] = Counter()
        self.once: Counter[str] = Counter()
        self.steps, self.begin, self.end = 0, 0.0, 0.0

    def on_train_start(self, *_: Any) -> None:
        self.training.clear()
        self.begin = time.perf_counter()

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        self.end, self.steps = time.perf_counter(), trainer.global_step
        self.took = Counter(self.training)

    def timed(self, name: str, function: Callable[..., Any], clock: Callable[[], float]) -> Callable[..., Any]:
        counts = self.once if name.endswith(ONCE) else self.training

        def call(*arguments: Any, **options: Any) -> Any:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            begin = clock()
            try:
                return function(*arguments, **options)
            finally:
                counts[name] += clock() - begin

        return call


def watch(stopwatch: Stopwatch) -> None:
    """Time the callbacks of every run that is made from now on."""
    defaults.bar_or_lines = Progress  # whatever this program writes to
    build, start_bar = Run.instantiate_trainer, Progress._init_progress

    def with_stopwatch(self: Run, **options: Any) -> Any:
        trainer = build(self, **options)
        for callback in trainer.callbacks:
            for hook in dir(Callback) if isinstance(callback, Monitor | Progress | MatrixTable) else ():
                if hook.startswith("on_"):
                    name = f"{type(callback).__name__}.{hook}"
                    setattr(callback, hook, stopwatch.timed(name, getattr(callback, hook), time.perf_counter))
        trainer.callbacks.append(stopwatch)
        return trainer

    def on_a_terminal(self: Progress, trainer: Any) -> None:
        self._console_kwargs = {"force_terminal": True, "file": open(os.devnull, "w"), "width": 120}  # noqa: SIM115
        start_bar(self, trainer)
        live: Any = self.progress and self.progress.live
        if live and not hasattr(live, "timed"):
            live.timed, live.refresh = True, stopwatch.timed("repaint of the bar", live.refresh, time.thread_time)

    Run.instantiate_trainer, Progress._init_progress = with_stopwatch, on_a_terminal  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--steps", type=int, default=200)
    arguments, options = parser.parse_known_args()
    stopwatch = Stopwatch()
    watch(stopwatch)
    with tempfile.TemporaryDirectory() as home:
        code = cli.main([
            "fit", "--config", arguments.config, "--trainer.max_steps", str(arguments.steps),
            "--trainer.default_root_dir", home, "--trainer.limit_test_batches", "1", *options,
        ])  # fmt: skip
    if code:
        sys.exit(code)
    seconds = stopwatch.end - stopwatch.begin
    ratio = stopwatch.took.total() / seconds
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rows = [[name, took, f"{took / seconds:.3%}"] for name, took in stopwatch.took.most_common(8)]
    rows += [["all of it", stopwatch.took.total(), f"{ratio:.3%}"]]
    rows += [[f"{name}, once", took, ""] for name, took in stopwatch.once.most_common(4)]
    report(
        f"{arguments.config}, {stopwatch.steps} steps in {seconds:.1f} s, {device}",
        ["", "seconds", "of the run"],
        rows,
        {
            "benchmark": "overhead",
            "arguments": {**vars(arguments), "options": options},
            "device": device,
            "ratios": {"overhead": ratio},
            "seconds": {"run": seconds, "callbacks": dict(stopwatch.took), "once": dict(stopwatch.once)},
        },
    )


if __name__ == "__main__":
    main()
