"""The figures of runs, from their checkpoints and their metrics.csv."""

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

from srlora_pl.figures.drawings import direction_intervals, directions_overview, length_variance, training_loss
from srlora_pl.figures.numbers import (
    Curve,
    in_block,
    interval_rows,
    middle_block,
    smoothed,
    switch_rows,
    variance_rows,
)
from srlora_pl.figures.switches import switches
from srlora_pl.lowrank.formats import histories, switch_records
from srlora_pl.lowrank.switch_records import SwitchRecord
from srlora_pl.training import checkpoints
from srlora_pl.util.errors import UserError, did_you_mean
from srlora_pl.util.files import relative, write_whole, writing_to
from srlora_pl.util.tables import csv_of

_LOSS, _RANK = "train/loss", "change_effective_rank/"  # columns of metrics.csv


@dataclass(frozen=True)
class TrainedRun:
    """What a run's folder tells about its training.

    Attributes:
        histories: as far as ``last_step``; empty for a method that draws no singular directions.
        curve: optimizer steps, counted from 1, and the training losses logged there.
        records: of its switches; empty where there are none.
        ranks: by kind of matrix: optimizer steps, and the effective ranks of W_eff - W0 logged there.
        steps_before: of earlier runs, which ``last_step`` and the records count too.
    """

    folder: Path
    method: str
    last_step: int
    histories: dict[str, Tensor]
    curve: Curve
    records: list[SwitchRecord]
    ranks: dict[str, Curve]
    steps_before: int


def read_run(folder: Path) -> TrainedRun:
    """The run in ``folder``, as far as its furthest checkpoint.

    Raises:
        UserError: the folder is no run's, or its checkpoints or its metrics.csv cannot be used.
    """
    if not folder.is_dir():
        near = did_you_mean(str(folder), map(str, folder.parent.glob("*/")))
        raise UserError(f"--run {folder} is no folder{near}, give a run's own, such as runs/NAME-METHOD/version_0")
    found = checkpoints.newest(checkpoints.files_of(folder))
    if found is None:
        versions = ", ".join(map(str, sorted([*folder.glob("version_*/"), *folder.glob("*/version_*/")])))
        other = versions or "the folder of a run that has written one"
        raise UserError(f"--run {folder} holds no readable checkpoint, give {other}")
    file, last_step = found
    state = checkpoints.read(file).get("srlora")
    if state is None:
        raise UserError(f"--run {folder}: {file} holds no model that this package adapted, give another run")
    method = state["method"]["class_path"].rpartition(".")[2]
    drawn = {name: intervals.clone() for name, intervals in histories(state).items()}
    before = state.get("steps_before", 0)
    curves = _curves(folder / "metrics.csv")
    ranks = {name.removeprefix(_RANK): curve for name, curve in curves.items() if name.startswith(_RANK)}
    return TrainedRun(folder, method, before + last_step, drawn, curves[_LOSS], switch_records(state), ranks, before)


def _curves(file: Path) -> dict[str, Curve]:
    """The columns of training losses and of the effective ranks of each kind of matrix."""
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
        curves: dict[str, Curve] = {}
        for name in rows[0] if rows else ():
            if name == _LOSS or name.startswith(_RANK):
                points = [(int(row["step"]) + 1, float(row[name])) for row in rows if row[name]]
                curves[name] = [step for step, _ in points], [value for _, value in points]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as a run's steps and losses ({error}), give another run") from error
    if not curves.get(_LOSS, ((), ()))[0]:
        raise UserError(f"{file} has no value of train/loss: lower trainer.log_every_n_steps, or give another run")
    return curves


@dataclass(frozen=True)
class Drawing:
    """A figure with the data behind it, and the path of its files without their suffix."""

    path: Path
    figure: Figure
    rows: list[dict[str, Any]]

    def files(self) -> dict[Path, bytes]:
        """What to write: PNG, SVG and CSV."""
        png, svg = io.BytesIO(), io.BytesIO()
        self.figure.savefig(png, format="png", dpi=200)
        with matplotlib.rc_context({"svg.hashsalt": "srlora_pl"}):  # the same data give the same file
            self.figure.savefig(svg, format="svg", metadata={"Date": None})
        contents = {".png": png.getvalue(), ".svg": svg.getvalue(), ".csv": csv_of(self.rows).encode()}
        return {self.path.with_name(self.path.name + suffix): content for suffix, content in contents.items()}


def write(drawings: Iterable[Drawing]) -> None:
    """Write the files of all ``drawings``, once all of them are drawn."""
    files = [file for drawing in drawings for file in drawing.files().items()]
    for path, content in files:
        write_whole(path, content)


def draw_runs(folders: Sequence[str], output: str | None = None, layer: int | None = None) -> list[str]:
    """Draw the training losses of the runs in ``folders`` in one figure, and the directions of each in its own.

    Args:
        output: the folder to write to; by default that of one run, ``figures`` in it. Of several runs each gets a
            folder there.
        layer: what Figure 5 shows, by default the middle one.

    Returns:
        What was written, in words.

    Raises:
        UserError: before anything is written, see `read_run` and `in_block`; or ``output`` cannot be written to.
    """
    paths = list(dict.fromkeys(Path(folder).expanduser().resolve() for folder in folders))
    if output is None and len(paths) > 1:
        raise UserError("several runs are drawn into one folder, name it with --output")
    target = Path(output).expanduser().resolve() if output else paths[0] / "figures"
    for depth in count(2):  # as many of the last parts of the paths as tell them apart
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(paths):
            break
    runs = dict(zip(names, (read_run(relative(path)) for path in paths), strict=True))
    silent = [run for run in runs.values() if not run.histories]
    notes = [
        f"{run.folder}: {run.method} draws no singular directions, so only the training loss is drawn" for run in silent
    ]
    drawings = [drawing_of_losses({name: run.curve for name, run in runs.items()}, target)]
    for name, run in runs.items():
        if run.histories:
            drawings += _of_directions(run, target / name.replace("/", "-") if len(runs) > 1 else target, layer)
    with writing_to(f"--output {target}"):
        write(drawings)
    return notes + [f"{relative(drawing.path)}.png, .svg and .csv" for drawing in drawings]


def drawing_of_losses(curves: Mapping[str, Curve], folder: Path) -> Drawing:
    """`training_loss`, to be written as ``training_loss`` in ``folder``."""
    rows = [
        {"run": name, "step": step, "train/loss": loss, "smoothed": average}
        for name, (steps, losses) in curves.items()
        for step, loss, average in zip(steps, losses, smoothed(losses), strict=True)
    ]
    return Drawing(folder / "training_loss", training_loss(curves), rows)


def _of_directions(run: TrainedRun, folder: Path, layer: int | None) -> list[Drawing]:
    drawn, last = run.histories, run.last_step
    block = middle_block(drawn) if layer is None else layer
    chosen = in_block(drawn, block)
    rows = interval_rows(drawn, last)
    name = f"direction_intervals_{'outside_layers' if block is None else f'layer_{block}'}"
    shown = [row for row in rows if row["matrix"] in chosen]
    return [
        Drawing(folder / name, direction_intervals(drawn, last, block), shown),
        Drawing(folder / "length_variance", length_variance(drawn, last), variance_rows(drawn, last)),
        Drawing(folder / "directions_overview", directions_overview(drawn, last), rows),
        *([_of_switches(run, folder)] if run.records else []),
    ]


def _of_switches(run: TrainedRun, folder: Path) -> Drawing:
    """With steps as the records count them; the rank at the end of a run is logged as if of one step more."""
    last, before = run.last_step, run.steps_before
    losses = [step + before for step in run.curve[0]], run.curve[1]
    ranks = {
        kind: ([min(step + before, last) for step in steps], values) for kind, (steps, values) in run.ranks.items()
    }
    rows = switch_rows(run.records, losses)
    figure = switches(rows, last, ranks)
    by_step: dict[float, dict[str, Any]] = defaultdict(dict)
    for kind, curve in ranks.items():
        for step, value in zip(*curve, strict=True):
            by_step[step][f"effective rank, {kind}"] = value
    rows += [{"after step": step, **values} for step, values in by_step.items()]
    return Drawing(folder / "switches", figure, rows)
