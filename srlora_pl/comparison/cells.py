"""The runs of a comparison: each is a run of the command line in a folder of its own."""

import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

from srlora_pl.reporting.summary import FILE as SUMMARY
from srlora_pl.run import config
from srlora_pl.util import json_text
from srlora_pl.util.errors import Interrupted, UserError
from srlora_pl.util.files import lock, writing_to
from srlora_pl.util.program import program

_COMMAND_LINE = (sys.executable, "-m", "srlora_pl")


@dataclass(frozen=True)
class Cell:
    """One run: a method, a seed, and a point of the grid (setting and value, as on the command line)."""

    method: str
    point: tuple[tuple[str, str], ...]
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder, such as ``lora-lr0.001-seed0``."""
        settings = (f"{key.rpartition('.')[2]}{value}".replace("/", "_") for key, value in self.point)
        return "-".join([self.method, *settings, f"seed{self.seed}"])


@dataclass(frozen=True)
class Plan:
    """A comparison on one task.

    Attributes:
        configs: the task's config files, laid over each other.
        methods: the overlay file of each.
        grids: by method, the values of each setting to choose among; every combination is a point.
        seeds: the first one also chooses the point.
        options: of the command line, for every run.
        folder: of the runs and the results.
    """

    configs: tuple[str, ...]
    methods: Mapping[str, Path]
    grids: Mapping[str, Mapping[str, Sequence[str]]]
    seeds: tuple[int, ...]
    options: tuple[str, ...]
    folder: Path

    def points(self, method: str) -> list[tuple[tuple[str, str], ...]]:
        grid = self.grids[method]
        return [tuple(zip(grid, values, strict=True)) for values in product(*grid.values())]

    @property
    def chooses(self) -> bool:
        """Whether a method has several points."""
        return any(len(self.points(method)) > 1 for method in self.methods)

    @property
    def trials(self) -> list[Cell]:
        """The runs that choose each method's point: all points with the first seed."""
        return [Cell(method, point, self.seeds[0]) for method in self.methods for point in self.points(method)]

    def repetitions(self, best: Iterable[Cell]) -> list[Cell]:
        """The ``best`` cells with the other seeds, seed by seed, so that methods can be compared early on."""
        return [replace(cell, seed=seed) for seed in self.seeds[1:] for cell in best]

    @property
    def size(self) -> int:
        return len(self.trials) + len(self.methods) * (len(self.seeds) - 1)

    def command(self, grids: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
        """The command line that goes on with this comparison on other ``grids``."""
        entries = [f"{name}.{key}={','.join(values)}" for name, grid in grids.items() for key, values in grid.items()]
        words = [word for file in self.configs for word in ("--config", config.name_of(file))]
        methods = (config.name_of(file).removeprefix("methods/") for file in self.methods.values())
        words += ["--methods", ",".join(methods), "--seeds", str(len(self.seeds))]
        words += ["--output", str(self.folder), *self.options, "--grid", *entries]
        return f"{program()} {shlex.join(['compare', *words])}"

    def arguments(self, cell: Cell) -> list[str]:
        """The words of the command line that begin the run of ``cell`` or go on with it."""
        files = [*self.configs, str(self.methods[cell.method])]
        settings = [("seed_everything", str(cell.seed)), *cell.point]
        return [
            "fit",
            *(word for file in files for word in ("--config", file)),
            *self.options,
            *(word for key, value in settings for word in (f"--{key}", value)),
            *("--trainer.default_root_dir", str(self.folder / cell.name)),
            *("--ckpt_path", "last"),
        ]

    def summary(self, cell: Cell) -> dict[str, Any] | None:
        """The ``summary.json`` of a finished run with its ``folder``; None for a run that has not finished."""
        file = next((self.folder / cell.name).glob(f"*/version_*/{SUMMARY}"), None)
        return None if file is None else json_text.read(file.read_text()) | {"folder": str(file.parent)}


def run(plan: Plan, cell: Cell, held: BinaryIO) -> str | None:
    """Run ``cell``, unless it has finished, in a process that holds the file ``held`` too.

    Returns:
        What went wrong; None if it has finished.
    """
    if plan.summary(cell) is not None:
        return None
    file = plan.folder / cell.name / "log.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as log:
        begin = log.tell()
        command = [*_COMMAND_LINE, *plan.arguments(cell)]
        # A session of its own: Ctrl+C reaches it as one signal, from here. It holds the lock as well: should this
        # process be killed, nobody begins the cell anew while it still runs.
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, pass_fds=(held.fileno(),))
        try:
            code = process.wait()
        finally:
            process.terminate()  # does nothing to a process that has ended
            process.wait()
    if code == 0 and plan.summary(cell) is not None:
        return None
    said = file.read_bytes()[begin:].decode(errors="replace").strip().splitlines() or [""]
    return f"{said[-1]} (exit code {code}, see {file})"


@contextmanager
def comparing_in(folder: Path) -> Iterator[BinaryIO]:
    """Holds a file in ``folder``, as no other comparison may, for `run`.

    Raises:
        UserError: the folder cannot be made or written to, or another process is at work in it.
        Interrupted: by SIGINT or SIGTERM; the run of that moment has written a checkpoint.
    """

    def stop(number: int, frame: Any) -> None:
        words = "the same command goes on from here"
        raise Interrupted(f"interrupted by {signal.Signals(number).name}; {words}", 128 + number)

    with writing_to(f"--output {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("ab")
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with file:
            if not lock(file):
                raise UserError(
                    f"another comparison, or a run that one has left behind, is at work in {folder} (or its file "
                    "system has no locks): wait for it or stop it, or give another --output"
                )
            yield file
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
