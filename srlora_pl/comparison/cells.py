"""The runs that a comparison consists of: each a run of the command line in a folder of its own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

from srlora_pl.reporting.summary import FILE as SUMMARY
from srlora_pl.util.errors import Interrupted, UserError
from srlora_pl.util.files import lock

_CLI = "from srlora_pl.cli import main; raise SystemExit(main())"


@dataclass(frozen=True)
class Cell:
    """One run: a method, a point of the grid (setting and value, as on the command line) and a seed."""

    method: str
    point: tuple[tuple[str, str], ...]
    seed: int

    @property
    def name(self) -> str:
        """Of its folder, such as ``lora-lr0.001-seed0``."""
        settings = (f"{key.rpartition('.')[2]}{value}".replace("/", "_") for key, value in self.point)
        return "-".join([Path(self.method).stem, *settings, f"seed{self.seed}"])


@dataclass(frozen=True)
class Plan:
    """What a comparison on one task consists of.

    Attributes:
        configs: the task's config files, laid over each other.
        methods: by name, the overlay file.
        grid: by setting, the values to choose among for each method; every combination is a point.
        seeds: the first one also chooses the point.
        options: of every run.
        folder: where the runs and the results go.
    """

    configs: tuple[str, ...]
    methods: Mapping[str, Path]
    grid: Mapping[str, Sequence[str]]
    seeds: tuple[int, ...]
    options: tuple[str, ...]
    folder: Path

    @property
    def points(self) -> list[tuple[tuple[str, str], ...]]:
        return [tuple(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]

    @property
    def trials(self) -> list[Cell]:
        """The runs that choose each method's point: all points with the first seed."""
        return [Cell(method, point, self.seeds[0]) for method in self.methods for point in self.points]

    def repetitions(self, chosen: Mapping[str, tuple[tuple[str, str], ...]]) -> list[Cell]:
        """The runs of the other seeds, seed by seed, so that methods can be compared early on."""
        return [Cell(method, point, seed) for seed in self.seeds[1:] for method, point in chosen.items()]

    @property
    def size(self) -> int:
        return len(self.trials) + len(self.methods) * (len(self.seeds) - 1)

    def arguments(self, cell: Cell) -> list[str]:
        """Those of the command line for ``cell``: it begins the run, or goes on with it."""
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
        """What a finished run says of itself; None for one that has not finished."""
        file = next((self.folder / cell.name).glob(f"*/version_*/{SUMMARY}"), None)
        return None if file is None else json.loads(file.read_text()) | {"folder": str(file.parent)}


@dataclass
class Runner:
    """Runs cells, one after the other, and none twice.

    Attributes:
        failed: the sentence of every run that ended with an error.
    """

    lock: BinaryIO
    failed: dict[str, str] = field(default_factory=dict)

    def run(self, plan: Plan, cell: Cell) -> bool:
        """Whether ``cell`` has finished, now or earlier."""
        if plan.summary(cell) is not None:
            return True
        folder = plan.folder / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("ab") as log:
            begin = log.tell()
            command = [sys.executable, "-c", _CLI, *plan.arguments(cell)]
            code = self._wait(
                # A session of its own: Ctrl+C reaches it as one signal, from here. The lock is its as well: should
                # this process be killed, nobody begins the cell anew while it still runs.
                subprocess.Popen(
                    command, stdout=log, stderr=log, start_new_session=True, pass_fds=(self.lock.fileno(),)
                )
            )
        if code == 0 and plan.summary(cell) is not None:
            return True
        said = (folder / "log.txt").read_bytes()[begin:].decode(errors="replace").strip().splitlines() or [""]
        self.failed[str(folder)] = f"{said[-1]} (exit code {code}, see {folder / 'log.txt'})"
        return False

    def _wait(self, process: subprocess.Popen) -> int:
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """What writes into ``folder`` for the first time.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written to ({error.strerror}): give another folder") from error


@contextmanager
def runner(folder: Path) -> Iterator[Runner]:
    """A `Runner` of the comparisons in ``folder``, alone with them, that can be interrupted.

    Raises:
        UserError: the folder cannot be made or written to, or another process is at work in it.
        Interrupted: by SIGINT or SIGTERM; the run of that moment has saved where it was.
    """

    def stop(number: int, frame: Any) -> None:
        words = "the same command goes on from here"
        raise Interrupted(f"interrupted by {signal.Signals(number).name}; {words}", 128 + number)

    with writing_to(folder):
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
            os.set_inheritable(file.fileno(), True)
            yield Runner(file)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
