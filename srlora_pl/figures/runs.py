"""The figures of the paper, drawn from what a run keeps: which directions were active when, and its training loss.

The drawings are matplotlib's `Figure` objects and touch no global state; they can be read without colour. Steps are
optimizer steps, directions count from 1, the largest singular value, and layers from 0, as in the names of modules.
"""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, ScalarFormatter
from torch import Tensor

from srlora_pl.lowrank.formats import histories
from srlora_pl.lowrank.target_settings import name_matches
from srlora_pl.lowrank.targets import ALIASES, block_and_kind
from srlora_pl.training import checkpoints
from srlora_pl.util.errors import UserError, did_you_mean
from srlora_pl.util.files import relative, replacing

Histories = Mapping[str, Tensor]  # a matrix's name -> its MatrixState.intervals, (n, 2)
Curve = tuple[Sequence[float], Sequence[float]]  # steps, losses
Style = dict[str, Any]

SMOOTHING = 0.9
FIRST = "\n(1: the direction of the largest singular value)"
LABELS = {
    "query": "query",
    "key": "key",
    "value": "value",
    "attention_output": "attention output",
    "fc1": "FFN in",
    "fc2": "FFN out",
}
# They differ in lightness and, where colour is lost and lightness not enough, in lines and markers.
COLOURS = ("#000000", "#c1440e", "#0072b2", "#e69f00", "#009e73", "#56b4e9", "#9a4f83")
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"
FUSED: Style = {"facecolor": "#3b6491", "edgecolor": "#3b6491", "linewidth": 0.3}
ACTIVE: Style = {"facecolor": "#f4d6a0", "hatch": "/////", "edgecolor": "#8a5a00", "linewidth": 0.3}
LENGTHS = LinearSegmentedColormap.from_list("lengths", ["#f7ecd0", "#86b5a8", "#2c6a8c", "#14233f"])
NEVER: Style = {"facecolor": "white", "hatch": "....", "edgecolor": "#bbbbbb", "linewidth": 0.0}


# -- the numbers


def active_lengths(intervals: Tensor, last_step: int) -> Tensor:
    """For how many optimizer steps each direction was active, (n,); the active ones so far, up to ``last_step``.

    Args:
        intervals: of one matrix, (n, 2), as `MatrixState.intervals`.
    """
    drawn, fused = intervals.unbind(1)
    return torch.where(fused < 0, last_step, fused) - drawn


def length_variances(histories: Histories, last_step: int) -> dict[str, float]:
    """By matrix the variance, in optimizer steps squared, of the active lengths of all directions that it has drawn."""
    return {
        name: float(active_lengths(intervals, last_step).double().var(correction=0))
        for name, intervals in histories.items()
    }


def smoothed(values: Sequence[float], constant: float = SMOOTHING) -> npt.NDArray[np.float64]:
    """Exponential moving average that starts without a bias and skips missing values (NaN, infinity)."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        if np.isfinite(value):
            average = constant * average + (1 - constant) * float(value)
            weight = constant * weight + 1 - constant
        result.append(average / weight if weight else np.nan)
    return np.array(result)


def blocks_of(names: Iterable[str]) -> list[int | None]:
    """The blocks that matrices of these names lie in, in order; None, of those in no block, comes last."""
    return sorted({block_and_kind(name)[0] for name in names}, key=lambda block: (block is None, block))


def middle_block(histories: Histories) -> int | None:
    """The one to show of all blocks."""
    blocks = blocks_of(histories)
    return blocks[len(blocks) // 2]


def in_block(histories: Histories, block: int | None) -> dict[str, Tensor]:
    """The matrices in ``block``.

    Raises:
        UserError: there is none.
    """
    found = {name: each for name, each in histories.items() if block_and_kind(name)[0] == block}
    if not found:
        known = ", ".join(str(each) for each in blocks_of(histories) if each is not None)
        raise UserError(f"layer {block} has no adapted matrix, give one of these layers: {known}")
    return found


def kind_labels(names: Iterable[str]) -> dict[str, str]:
    """What to call each kind of matrix: its part in a transformer block or, where that is not known, its own name."""
    labels = {block_and_kind(name)[1]: _part(name) for name in names}
    times = Counter(labels.values())
    return {kind: label if label and times[label] == 1 else kind for kind, label in labels.items()}


def _part(name: str) -> str | None:
    if fused := re.search(r"\[([qkv])\]$", name):
        return {"q": "query", "k": "key", "v": "value"}[fused[1]]
    parts = (part for part, patterns in ALIASES.items() if any(name_matches(pattern, name) for pattern in patterns))
    return next((LABELS[part] for part in parts), None)


# -- the drawings


def direction_intervals(histories: Histories, last_step: int, block: int | None) -> Figure:
    """Figure 5: for every matrix of ``block`` the steps in which each singular direction was active.

    Raises:
        UserError: the block has no adapted matrix.
    """
    chosen = in_block(histories, block)
    labels = kind_labels(chosen)
    figure, panels = _panels(len(chosen), "optimizer step")
    for axes, (name, intervals) in zip(panels, chosen.items(), strict=True):
        axes.set_title(labels[block_and_kind(name)[1]])
        _draw_intervals(axes, intervals, last_step)
    _span(panels, max(map(len, chosen.values())))
    panels[0].set_ylim(0, max(last_step, 1))
    where = "outside the blocks" if block is None else f"of layer {block}"
    figure.suptitle(f"When each singular direction {where} was active{FIRST}")
    keys = [Patch(label="until it was fused", **FUSED), Patch(label=f"still active after step {last_step}", **ACTIVE)]
    figure.legend(handles=keys, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw_intervals(axes: Axes, intervals: Tensor, last_step: int) -> None:
    """One bar for each direction, from the step it was drawn after to the one it was fused after."""
    drawn = intervals[:, 0]
    ends = drawn + active_lengths(intervals, last_step)
    active = intervals[:, 1] < 0
    for chosen, style in ((~active, FUSED), (active, ACTIVE)):
        rows = zip((1 + chosen.nonzero()[:, 0]).tolist(), drawn[chosen].tolist(), ends[chosen].tolist(), strict=True)
        bars = [[(k - 0.4, a), (k + 0.4, a), (k + 0.4, b), (k - 0.4, b)] for k, a, b in rows]
        axes.add_collection(PolyCollection(bars, **style))


def length_variance(histories: Histories, last_step: int) -> Figure:
    """Figure 4: the variance over directions of their active lengths, for each layer and kind of matrix."""
    blocks = blocks_of(histories)
    labels = kind_labels(histories)
    curves: dict[str, tuple[list[int], list[float]]] = {kind: ([], []) for kind in labels}
    for name, variance in length_variances(histories, last_step).items():
        block, kind = block_and_kind(name)
        curves[kind][0].append(blocks.index(block))
        curves[kind][1].append(variance)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, (kind, style) in enumerate(zip(labels, _line_styles(), strict=False)):
        aside = 0.6 * ((i + 0.5) / len(labels) - 0.5)  # equal variances shall not hide each other
        axes.plot(np.array(curves[kind][0]) + aside, curves[kind][1], markersize=5, label=labels[kind], **style)
    ticks = _some(len(blocks), 24)
    axes.set_xticks(ticks, ["none" if blocks[i] is None else str(blocks[i]) for i in ticks])
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(ScalarFormatter(useMathText=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("variance of active lengths (optimizer steps²)")
    axes.set_title("How unequally long the singular directions of a matrix were active")
    _tidy(axes)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def training_loss(curves: Mapping[str, Curve]) -> Figure:
    """Figure 3: the training loss of each run against optimizer steps, smoothed, with the raw curve behind."""
    rows = math.ceil(len(curves) / 2) if len(curves) > 12 else 0  # of names that do not fit beside the curves
    figure = Figure(figsize=(8, 4.5 + 0.2 * rows), layout="constrained")
    axes = figure.add_subplot()
    for i, ((name, (steps, losses)), style) in enumerate(zip(curves.items(), _line_styles(), strict=False)):
        axes.plot(steps, losses, color=style["color"], linewidth=0.7, alpha=0.3)
        every = (0.04 + 0.03 * (i % 4), 0.15)  # parts of the diagonal: runs with the same losses keep their markers
        axes.plot(steps, smoothed(losses), markersize=5, markevery=every, label=name, **style)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss")
    _tidy(axes)
    title = f"exponential moving average (constant {SMOOTHING:g}),\nbehind it the logged values"
    if rows:
        figure.legend(title=title, loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    else:
        axes.legend(title=title, alignment="left", frameon=False)
    return figure


def directions_overview(histories: Histories, last_step: int) -> Figure:
    """Where directions were won and lost: for all matrices, how long each direction was active.

    One panel for each kind of matrix, a row for each layer. Left of a row's bar are the directions that it began with,
    right of it those won at a switch; a dot marks the ones that it still holds.
    """
    blocks = blocks_of(histories)
    labels = kind_labels(histories)
    longest = max(map(len, histories.values()))
    figure, panels = _panels(len(labels), "layer", height=1.2 + 0.12 * len(blocks))
    by_kind = dict(zip(labels, panels, strict=True))
    lengths = {kind: np.full((len(blocks), longest), np.nan) for kind in labels}
    for name, intervals in histories.items():
        block, kind = block_and_kind(name)
        row, axes = blocks.index(block), by_kind[kind]
        lengths[kind][row, : len(intervals)] = active_lengths(intervals, last_step)
        held = 1 + (intervals[:, 1] < 0).nonzero()[:, 0]
        axes.plot(held, [row] * len(held), linestyle="", zorder=3, **_held(longest))
        begun = int((intervals[:, 0] == 0).sum()) + 0.5
        axes.plot([begun, begun], [row - 0.5, row + 0.5], color="black", linewidth=1.5)
    shortest = min(float(each[each > 0].min(initial=last_step)) for each in lengths.values())
    scale = LogNorm(shortest if 0 < shortest < last_step else max(last_step, 1) / 10, max(last_step, 1))
    for kind, axes in by_kind.items():
        axes.set_title(labels[kind])
        axes.patch.set(**NEVER)
        image = axes.imshow(
            lengths[kind],
            aspect="auto",
            interpolation="nearest",
            cmap=LENGTHS,
            norm=scale,
            extent=(0.5, longest + 0.5, len(blocks) - 0.5, -0.5),
        )
    _span(panels, longest)
    ticks = _some(len(blocks), 12)
    panels[0].set_yticks(ticks, ["none" if blocks[i] is None else str(blocks[i]) for i in ticks])
    bar = figure.colorbar(image, ax=panels, label="active length (optimizer steps)", shrink=0.9)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.minorticks_off()
    figure.suptitle(f"Where singular directions were won and lost{FIRST}")
    keys = [
        Line2D([], [], linestyle="", label=f"still held after step {last_step}", **_held(1)),
        Line2D([], [], linestyle="", marker="|", markersize=12, color="black", label="left: begun with, right: won"),
        Patch(label="never drawn", **NEVER),
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _held(directions: int) -> Style:
    size = float(np.clip(120 / directions, 1.5, 4.5))
    return {"marker": "o", "markersize": size, "markerfacecolor": "white", "color": "black", "markeredgewidth": 0.6}


# -- their parts


def _line_styles() -> Iterator[Style]:
    return (
        {"color": colour, "linestyle": line, "marker": marker}
        for colour, line, marker in zip(cycle(COLOURS), cycle(LINES), cycle(MARKERS), strict=False)
    )


def _panels(number: int, upwards: str, height: float = 2.4) -> tuple[Figure, list[Axes]]:
    """A figure of ``number`` panels of directions with the same scales, at most three in a row."""
    columns = min(3, number)
    rows = -(-number // columns)
    figure = Figure(figsize=(1.5 + 2.8 * max(columns, 2), 1.4 + height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in grid[number:]:
        axes.remove()
    for lowest in grid[number - columns : number]:
        lowest.set_xlabel("singular direction")
        lowest.xaxis.set_tick_params(labelbottom=True)  # not of itself where the panel below was removed
    for left in grid[:number:columns]:
        left.set_ylabel(upwards)
    return figure, list(grid[:number])


def _span(panels: Sequence[Axes], directions: int) -> None:
    panels[0].set_xlim(0.5, directions + 0.5)
    panels[0].xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def _some(number: int, most: int) -> range:
    """Indices of ``number`` things, evenly, and no more than ``most``."""
    return range(0, number, -(-number // most))


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


# -- of runs


@dataclass(frozen=True)
class TrainedRun:
    """What a run's folder tells about its training.

    Attributes:
        histories: as far as ``last_step``; empty for a method that draws no singular directions.
        curve: optimizer steps, counted from 1, and the training losses logged there.
    """

    folder: Path
    method: str
    last_step: int
    histories: dict[str, Tensor]
    curve: tuple[list[int], list[float]]


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
    last_step += state.get("steps_before", 0)
    return TrainedRun(folder, method, last_step, drawn, loss_curve(folder / "metrics.csv"))


def loss_curve(file: Path) -> tuple[list[int], list[float]]:
    """Optimizer steps, counted from 1 (a run's metrics.csv counts from 0), and the training losses logged there.

    Raises:
        UserError: the file is missing, or holds no training loss.
    """
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            rows = [row for row in csv.DictReader(lines) if row.get("train/loss")]
        steps, losses = [int(row["step"]) + 1 for row in rows], [float(row["train/loss"]) for row in rows]
    except FileNotFoundError:
        raise UserError(f"{file} does not exist, and the training loss is drawn from it: give another run") from None
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{file} is not a run's table of steps and losses ({error}), give another run") from error
    if not steps:
        raise UserError(f"{file} has no value of train/loss: lower trainer.log_every_n_steps, or give another run")
    return steps, losses


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
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, list(self.rows[0]))
        writer.writeheader()
        writer.writerows(self.rows)
        contents = {".png": png.getvalue(), ".svg": svg.getvalue(), ".csv": table.getvalue().encode()}
        return {self.path.with_name(self.path.name + suffix): content for suffix, content in contents.items()}


def write(drawings: Iterable[Drawing]) -> None:
    """Write the files of all ``drawings``, once all of them are drawn.

    Raises:
        OSError: their folder takes no files.
    """
    files = {path: content for drawing in drawings for path, content in drawing.files().items()}
    for path, content in files.items():
        with replacing(path) as file:
            file.write(content)


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
    runs = dict(zip(_names(paths), (read_run(relative(path)) for path in paths), strict=True))
    notes = [
        f"{run.folder}: {run.method} draws no singular directions, so only the training loss is drawn"
        for run in runs.values()
        if not run.histories
    ]
    drawings = [drawing_of_losses({name: run.curve for name, run in runs.items()}, target)]
    for name, run in runs.items():
        if run.histories:
            drawings += _of_directions(run, target / name.replace("/", "-") if len(runs) > 1 else target, layer)
    try:
        write(drawings)
    except OSError as error:
        raise UserError(f"--output {target} cannot be written to ({error.strerror}): name another folder") from error
    return notes + [f"{relative(drawing.path)}.png, .svg and .csv" for drawing in drawings]


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart and at least two."""
    for depth in count(2):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(paths):
            break
    return names


def drawing_of_losses(curves: Mapping[str, Curve], folder: Path) -> Drawing:
    """`training_loss`, to be written as ``training_loss`` in ``folder``."""
    rows = [
        {"run": name, "step": step, "train/loss": loss, "smoothed": average}
        for name, (steps, losses) in curves.items()
        for step, loss, average in zip(steps, losses, smoothed(losses), strict=True)
    ]
    return Drawing(folder / "training_loss", training_loss(curves), rows)


def _of_directions(run: TrainedRun, folder: Path, layer: int | None) -> Iterator[Drawing]:
    histories, last = run.histories, run.last_step
    block = middle_block(histories) if layer is None else layer
    try:
        chosen = in_block(histories, block)
    except UserError as error:
        raise UserError(f"--layer {layer}: in {run.folder} {error}") from error
    all_rows = list(_interval_rows(histories, last))
    yield Drawing(
        folder / f"direction_intervals_{'outside_layers' if block is None else f'layer_{block}'}",
        direction_intervals(histories, last, block),
        [row for row in all_rows if row["matrix"] in chosen],
    )
    yield Drawing(folder / "length_variance", length_variance(histories, last), list(_variance_rows(histories, last)))
    yield Drawing(folder / "directions_overview", directions_overview(histories, last), all_rows)


def _matrix_columns(histories: Histories) -> dict[str, dict[str, Any]]:
    labels = kind_labels(histories)
    places = {name: block_and_kind(name) for name in histories}
    return {name: {"matrix": name, "layer": block, "kind": labels[kind]} for name, (block, kind) in places.items()}


def _interval_rows(histories: Histories, last_step: int) -> Iterator[dict[str, Any]]:
    """A direction each; one that is still active has no step that it was fused after."""
    for name, columns in _matrix_columns(histories).items():
        lengths = active_lengths(histories[name], last_step).tolist()
        for k, ((drawn, fused), length) in enumerate(zip(histories[name].tolist(), lengths, strict=True), start=1):
            yield columns | {
                "direction": k,
                "drawn after step": drawn,
                "fused after step": None if fused < 0 else fused,
                "active steps": length,
            }


def _variance_rows(histories: Histories, last_step: int) -> Iterator[dict[str, Any]]:
    variances = length_variances(histories, last_step)
    for name, columns in _matrix_columns(histories).items():
        yield columns | {"directions": len(histories[name]), "variance of active steps": variances[name]}
