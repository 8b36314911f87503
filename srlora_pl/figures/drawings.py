"""The paper's figures and an overview, as matplotlib's `Figure` objects.

They touch no global state and can be read without colour. Layers count from 0, as in the names of modules.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, ScalarFormatter

from srlora_pl.figures.numbers import (
    SMOOTHING,
    Curve,
    Histories,
    active_lengths,
    blocks_of,
    in_block,
    kind_labels,
    length_variances,
    smoothed,
)
from srlora_pl.lowrank.targets import block_and_kind

Style = dict[str, Any]

FIRST = "\n(1: the direction of the largest singular value)"
# They differ in lightness and, where colour is lost and lightness not enough, in lines and markers.
COLOURS = ("#000000", "#c1440e", "#0072b2", "#e69f00", "#009e73", "#56b4e9", "#9a4f83")
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"
FUSED: Style = {"facecolor": "#3b6491", "edgecolor": "#3b6491", "linewidth": 0.3}
ACTIVE: Style = {"facecolor": "#f4d6a0", "hatch": "/////", "edgecolor": "#8a5a00", "linewidth": 0.3}
LENGTHS = LinearSegmentedColormap.from_list("lengths", ["#f7ecd0", "#86b5a8", "#2c6a8c", "#14233f"])
NEVER: Style = {"facecolor": "white", "hatch": "....", "edgecolor": "#bbbbbb", "linewidth": 0.0}


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
        drawn, active = intervals[:, 0], intervals[:, 1] < 0
        ends = drawn + active_lengths(intervals, last_step)
        for shown, style in ((~active, FUSED), (active, ACTIVE)):
            numbers = 1 + shown.nonzero()[:, 0]
            rows = zip(numbers.tolist(), drawn[shown].tolist(), ends[shown].tolist(), strict=True)
            bars = [[(k - 0.4, a), (k + 0.4, a), (k + 0.4, b), (k - 0.4, b)] for k, a, b in rows]
            axes.add_collection(PolyCollection(bars, **style))
    _span(panels, max(map(len, chosen.values())))
    panels[0].set_ylim(0, max(last_step, 1))
    where = "outside the blocks" if block is None else f"of layer {block}"
    figure.suptitle(f"When each singular direction {where} was active{FIRST}")
    keys = [Patch(label="until it was fused", **FUSED), Patch(label=f"still active after step {last_step}", **ACTIVE)]
    figure.legend(handles=keys, loc="outside lower center", ncols=2, frameon=False)
    return figure


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
    for i, (kind, style) in enumerate(zip(labels, line_styles(), strict=False)):
        aside = 0.6 * ((i + 0.5) / len(labels) - 0.5)  # equal variances shall not hide each other
        axes.plot(np.array(curves[kind][0]) + aside, curves[kind][1], markersize=5, label=labels[kind], **style)
    _number_blocks(axes.xaxis, blocks, 24)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(ScalarFormatter(useMathText=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("variance of active lengths (optimizer steps²)")
    axes.set_title("How unequally long the singular directions of a matrix were active")
    tidy(axes)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def training_loss(curves: Mapping[str, Curve]) -> Figure:
    """Figure 3: the training loss of each run against optimizer steps, smoothed, with the raw curve behind."""
    rows = math.ceil(len(curves) / 2) if len(curves) > 12 else 0  # of names that do not fit beside the curves
    figure = Figure(figsize=(8, 4.5 + 0.2 * rows), layout="constrained")
    axes = figure.add_subplot()
    for i, ((name, (steps, losses)), style) in enumerate(zip(curves.items(), line_styles(), strict=False)):
        axes.plot(steps, losses, color=style["color"], linewidth=0.7, alpha=0.3)
        every = (0.04 + 0.03 * (i % 4), 0.15)  # parts of the diagonal: runs with the same losses keep their markers
        axes.plot(steps, smoothed(losses), markersize=5, markevery=every, label=name, **style)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss")
    tidy(axes)
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
    _number_blocks(panels[0].yaxis, blocks, 12)
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


def line_styles() -> Iterator[Style]:
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


def _number_blocks(axis: Axis, blocks: Sequence[int | None], most: int) -> None:
    """Ticks at no more than ``most`` of the ``blocks``, evenly."""
    ticks = range(0, len(blocks), -(-len(blocks) // most))
    axis.set_ticks(ticks, labels=["none" if blocks[i] is None else str(blocks[i]) for i in ticks])


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
