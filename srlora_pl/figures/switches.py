"""What the switches of a run recycled and what they kept."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from srlora_pl.figures.drawings import Style, tidy
from srlora_pl.figures.numbers import AFTER, AROUND, BEFORE, CHANCE, FIRST_CHANCE, GROUPS, QUARTILES, Curve

Rows = Sequence[Mapping[str, Any]]

RECYCLED: Style = {"color": "#c1440e", "linestyle": "--", "marker": "o", "markerfacecolor": "white"}
KEPT: Style = {"color": "#0072b2", "linestyle": "-", "marker": "s"}
SHARE: Style = {"color": "#000000", "linestyle": "-", "marker": "D"}
LEVEL: Style = {"color": "#777777", "linestyle": "-.", "marker": ""}
EARLIER: Style = {"color": "#e69f00", "linestyle": ":", "marker": "v", "markerfacecolor": "white"}
LATER: Style = {"color": "#000000", "linestyle": "-", "marker": "^"}
RANKS: Style = {"color": "#9a4f83", "linestyle": "-", "marker": "P"}
COMPARED = {  # by quantity the title of its panel, and whether its scale is logarithmic
    "age": ("age (optimizer steps)", False),
    "size": ("size when drawn", False),
    "score": ("score", True),
    "change": ("change since drawn", True),
}
KEYS = {
    "recycled pairs: median, quartiles": RECYCLED,
    "kept pairs: median, quartiles": KEPT,
    "share of the newest pairs": SHARE,
    "share of all pairs (chance)": LEVEL,
    f"mean over the {AROUND} steps before": EARLIER,
    f"mean over the {AROUND} steps after": LATER,
    "mean and range over kinds of matrices": RANKS,
}


def switches(rows: Rows, last_step: int, ranks: Mapping[str, Curve] | None = None) -> Figure:
    """For each switch the pairs that it recycled and those that it kept; a panel without numbers is left out.

    Args:
        rows: of `srlora_pl.figures.numbers.switch_rows`.
        ranks: by kind of matrix: optimizer steps, and the effective ranks of W_eff - W0.
    """
    panels: dict[str, Callable[[Axes], list[Style]]] = {
        title: partial(_compare, rows, quantity, log)
        for quantity, (title, log) in COMPARED.items()
        if any(row[f"{quantity}, {group}, median"] for row in rows for group in GROUPS)
    }
    panels["recycled at the first chance"] = partial(_first_chance, rows)
    if any(row[name] is not None for row in rows for name in (BEFORE, AFTER)):
        panels["training loss around the switch"] = partial(_losses, rows)
    if ranks:
        panels["effective rank of the change"] = partial(_ranks, ranks)
    columns = -(-(len(panels) + 1) // 2)
    figure = Figure(figsize=(1 + 2.9 * columns, 6), layout="constrained")
    cells = list(figure.subplots(2, columns, sharex=True).ravel())
    used: list[Style] = []
    for title, draw in panels.items():
        axes = cells.pop(0)
        used += draw(axes)
        axes.set_title(title, fontsize="medium")
        axes.xaxis.set_tick_params(labelbottom=True)
        tidy(axes)
    axes.set_xlim(0, 1.02 * max(last_step, 1))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axes in figure.axes[columns : len(panels)]:
        axes.set_xlabel("optimizer step")
    keys = [Line2D([], [], label=label, **style) for label, style in KEYS.items() if style in used]
    for axes in cells:
        axes.set_axis_off()
    cells[-1].legend(handles=keys, loc="center", fontsize="small", frameon=False)
    figure.suptitle("The pairs that each switch recycled and those that it kept")
    return figure


def _column(rows: Rows, name: str) -> Any:
    return np.array([row[name] for row in rows], dtype=float)  # None becomes nan


def _compare(rows: Rows, quantity: str, log: bool, axes: Axes) -> list[Style]:
    """The median of the pairs that are recycled and of those that are kept, with bars from quartile to quartile."""
    steps = _column(rows, "after step")
    aside = 0.004 * steps.max()  # equal values shall not hide each other
    for group, style, shift in zip(GROUPS, (RECYCLED, KEPT), (-aside, aside), strict=True):
        low, middle, high = (_column(rows, f"{quantity}, {group}, {quartile}") for quartile in QUARTILES)
        axes.errorbar(steps + shift, middle, (middle - low, high - middle), markersize=4, elinewidth=0.8, **style)
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    return [RECYCLED, KEPT]


def _first_chance(rows: Rows, axes: Axes) -> list[Style]:
    steps = _column(rows, "after step")
    axes.plot(steps, _column(rows, CHANCE), **LEVEL)
    axes.plot(steps, _column(rows, FIRST_CHANCE), markersize=4, **SHARE)
    axes.set_ylim(-0.03, 1.03)
    return [SHARE, LEVEL]


def _losses(rows: Rows, axes: Axes) -> list[Style]:
    for name, style in ((BEFORE, EARLIER), (AFTER, LATER)):
        axes.plot(_column(rows, "after step"), _column(rows, name), markersize=4, **style)
    return [EARLIER, LATER]


def _ranks(ranks: Mapping[str, Curve], axes: Axes) -> list[Style]:
    """The mean over kinds of matrices, and the range that they lie in."""
    at_steps: dict[float, list[float]] = defaultdict(list)
    for step, value in sorted(point for curve in ranks.values() for point in zip(*curve, strict=True)):
        at_steps[step].append(value)
    steps, values = [*at_steps], [*at_steps.values()]
    axes.fill_between(steps, [*map(min, values)], [*map(max, values)], color=RANKS["color"], alpha=0.2)
    axes.plot(steps, [*map(fmean, values)], markersize=4, **RANKS)
    axes.set_ylim(bottom=0)
    return [RANKS]
