"""Figures: the numbers that are drawn are those of the run, the pictures are not blank, and bad input is refused."""

import csv
import io
import itertools
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import Tensor

from srlora_pl import UserError
from srlora_pl.figures import drawings
from srlora_pl.figures.drawings import direction_intervals, directions_overview, length_variance, training_loss
from srlora_pl.figures.numbers import (
    Curve,
    active_lengths,
    blocks_of,
    kind_labels,
    length_variances,
    smoothed,
    switch_rows,
)
from srlora_pl.figures.switches import switches
from srlora_pl.lowrank import Adaptation, SRLoRA
from srlora_pl.lowrank.switch_records import Pairs, SwitchRecord
from tests.helpers import waiting
from tests.helpers.cli import SMALL_RUN, cli
from tests.helpers.errors import mentions
from tests.helpers.toys import toy_batches, toy_net, train

# Two layers, written down by hand; FFN in of layer 1 has one direction less, as where a spectrum is used up.
LAST = 10
TOY = {
    "blocks.0.attn.qkv[q]": torch.tensor([[0, -1], [0, 4], [4, 7], [7, -1]]),
    "blocks.0.mlp.fc1": torch.tensor([[0, 4], [0, 7], [4, -1], [7, -1]]),
    "blocks.1.attn.qkv[q]": torch.tensor([[0, 4], [0, 4], [4, -1], [4, -1]]),
    "blocks.1.mlp.fc1": torch.tensor([[0, 7], [0, -1], [7, -1]]),
}
LENGTHS = {
    "blocks.0.attn.qkv[q]": [10, 4, 3, 3],
    "blocks.0.mlp.fc1": [4, 7, 6, 3],
    "blocks.1.attn.qkv[q]": [4, 4, 6, 6],
    "blocks.1.mlp.fc1": [7, 10, 3],
}
VARIANCES = {
    "blocks.0.attn.qkv[q]": 8.5,  # mean 5; 25, 1, 4, 4
    "blocks.0.mlp.fc1": 2.5,  # mean 5; 1, 4, 1, 4
    "blocks.1.attn.qkv[q]": 1.0,
    "blocks.1.mlp.fc1": 74 / 9,  # mean 20/3; 1/9, 100/9, 121/9
}


def records_of(histories: Mapping[str, Tensor]) -> list[SwitchRecord]:
    """Of the switches that these histories tell of; all numbers but ages are functions of the direction."""
    records = []
    for step in sorted({step for each in histories.values() for step in each[:, 0].tolist()} - {0}):
        ranks, pairs = {}, []
        for name, each in histories.items():
            if step in each[:, 0]:
                drawn, fused = each.unbind(1)
                k = ((drawn < step) & ((fused < 0) | (fused >= step))).nonzero().flatten()
                numbers = 8 / (1 + k), 10.0 ** (-4 - k), 2.0 ** (-2 - k)
                pairs.append(Pairs(k, fused[k] == step, step - drawn[k], *numbers))
                ranks[name] = len(k)
        records.append(SwitchRecord(step, ranks, Pairs.joined(pairs)))
    return records


def deberta(layers: int, directions: int, pace: int = 1) -> dict[str, Tensor]:
    """All six matrices of some layers; one direction is won every ``pace`` steps, and every fifth is held longer."""
    kinds = [f"attention.self.{part}_proj" for part in ("query", "key", "value")]
    kinds += ["attention.output.dense", "intermediate.dense", "output.dense"]
    walk = pace * torch.tensor([[k, k + 1] for k in range(directions)])
    walk[::5, 1] += 4 * pace
    walk[walk[:, 1] >= pace * directions, 1] = -1
    return {f"deberta.encoder.layer.{layer}.{kind}": walk for layer in range(layers) for kind in kinds}


# -- the numbers


def test_active_lengths_and_their_variance() -> None:
    assert {name: active_lengths(each, LAST).tolist() for name, each in TOY.items()} == LENGTHS
    assert length_variances(TOY, LAST) == pytest.approx(VARIANCES)
    later = active_lengths(TOY["blocks.0.attn.qkv[q]"], 12)
    assert later.tolist() == [12, 4, 3, 5]  # what is active goes on


def test_a_toy_run_has_known_intervals() -> None:
    # All pairs are fused at every switch; (6 - 2) / 2 = 2 switches fall after steps 5 and 10, the last one is left out.
    net = toy_net()
    adaptation = Adaptation(net, SRLoRA(rank=2, target_rank=6, fusion_ratio=1.0))
    adaptation.start()
    adaptation.plan(10)
    parameters = [p for p in net.parameters() if p.requires_grad]
    train(net, adaptation, torch.optim.SGD(parameters, 0.1), toy_batches(8))
    histories = adaptation.controller.histories()
    assert len(histories) == 12
    for intervals in histories.values():
        assert intervals.tolist() == [[0, 5], [0, 5], [5, -1], [5, -1]]
        assert active_lengths(intervals, 8).tolist() == [5, 5, 3, 3]
    assert length_variances(histories, 8) == dict.fromkeys(histories, 1.0)


def test_smoothing_starts_without_a_bias_and_skips_what_is_missing() -> None:
    nan, inf = float("nan"), float("inf")
    first, second = 4.0, (0.25 * 0.75 * 4 + 0.25 * 8) / (0.25 * 0.75 + 0.25)
    assert smoothed([4, nan, inf, 8], 0.75) == pytest.approx([first, first, first, second])
    assert smoothed([nan, 4, 4, 4]) == pytest.approx([nan, 4, 4, 4], nan_ok=True)


def test_kinds_have_names_that_people_know() -> None:
    known = ["query", "key", "value", "attention output", "FFN in", "FFN out"]
    bert = ["query", "key", "value"]
    families = {
        "timm": [f"blocks.3.{part}" for part in ("attn.qkv[q]", "attn.qkv[k]", "attn.qkv[v]", "attn.proj")]
        + ["blocks.3.mlp.fc1", "blocks.3.mlp.fc2"],
        "deberta": list(deberta(1, 2)),
        "bert": [f"bert.encoder.layer.3.attention.self.{part}" for part in bert]
        + [f"bert.encoder.layer.3.{part}.dense" for part in ("attention.output", "intermediate", "output")],
    }
    for names in families.values():
        assert list(kind_labels(names).values()) == known
    # two blocks within one, as Swin has them, and parts that nobody knows
    twice = ["layers.0.blocks.0.mlp.fc1", "layers.0.blocks.1.mlp.fc1", "layers.0.blocks.1.mlp.fc2", "net.0", "body"]
    assert kind_labels(twice) == {
        "blocks.0.mlp.fc1": "blocks.0.mlp.fc1",
        "blocks.1.mlp.fc1": "blocks.1.mlp.fc1",
        "blocks.1.mlp.fc2": "FFN out",
        "": "",
        "body": "body",
    }


def test_a_switch_has_a_row_of_quartiles_shares_and_losses() -> None:
    """Query of layer 0 holds directions 1 and 2 after step 4, and 1 and 3 after 7; FFN in 1 and 2, and 2 and 3."""
    losses: Curve = ([2, 4, 5, 7, 9], [6.0, 4.0, float("nan"), 2.0, 1.0])
    first, second = switch_rows(records_of({name: TOY[name] for name in list(TOY)[:2]}), losses)
    assert (first["after step"], first["pairs"], first["recycled"]) == (4, 4, 2)
    assert (first["recycled at the first chance"], first["chance"]) == (None, 0.5)
    assert (first["loss of 50 steps before"], first["loss of 50 steps after"]) == (5.0, 1.5)
    assert second["after step"] == 7
    # of the two of direction 3, drawn after step 4, query's goes
    assert (second["recycled at the first chance"], second["chance"]) == (0.5, 0.5)
    assert (second["loss of 50 steps before"], second["loss of 50 steps after"]) == (4.0, 1.0)
    quartiles = ("lower quartile", "median", "upper quartile")
    # recycled: query's 3 and FFN's 2; kept: query's 1 and FFN's 3
    expected = {
        "age, recycled": [3, 7],
        "age, kept": [7, 3],
        "size, recycled": [8 / 3, 4],
        "size, kept": [8, 8 / 3],
        "score, recycled": [1e-6, 1e-5],
        "score, kept": [1e-4, 1e-6],
        "change, recycled": [1 / 16, 1 / 8],
        "change, kept": [1 / 4, 1 / 16],
    }
    for name, two in expected.items():
        assert [second[f"{name}, {q}"] for q in quartiles] == pytest.approx(np.quantile(two, [0.25, 0.5, 0.75]))


def test_of_pairs_that_are_not_there_or_not_finite_there_are_no_quartiles() -> None:
    zeros = torch.zeros(2)
    sizes = torch.tensor([1.0, torch.inf])
    every = SwitchRecord(5, {"q": 2}, Pairs(zeros, zeros == 0, zeros, sizes, zeros * torch.nan, zeros))
    (row,) = switch_rows([every])
    assert row["size, recycled, median"] == 1
    assert row["score, recycled, median"] is row["age, kept, median"] is row["loss of 50 steps after"] is None


# -- what is drawn


def panel(figure: Figure, title: str) -> Any:
    (found,) = [axes for axes in figure.axes if axes.get_title() == title]
    return found


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def test_figure_5_draws_every_interval() -> None:
    figure = direction_intervals(TOY, LAST, 0)
    assert [axes.get_title() for axes in figure.axes] == ["query", "FFN in"]
    for title, name in (("query", "blocks.0.attn.qkv[q]"), ("FFN in", "blocks.0.mlp.fc1")):
        fused, active = [each for each in panel(figure, title).collections if isinstance(each, PolyCollection)]
        bars = {}
        for collection, still in ((fused, False), (active, True)):
            for path in collection.get_paths():
                (left, low), (right, high) = path.vertices.min(0), path.vertices.max(0)
                bars[(left + right) / 2] = (low, high, still)
        wanted = [(drawn, LAST if end < 0 else end, end < 0) for drawn, end in TOY[name].tolist()]
        assert [bars[k] for k in sorted(bars)] == wanted
        assert sorted(bars) == [1, 2, 3, 4]
        assert panel(figure, title).get_ylim() == (0, LAST)
    assert {"optimizer step", "singular direction", "still active after step 10"} <= set(texts(figure))
    with pytest.raises(UserError, match=mentions("layer 2", "0, 1")):
        direction_intervals(TOY, LAST, 2)


def test_figure_4_draws_every_variance() -> None:
    figure = length_variance(TOY, LAST)
    (axes,) = figure.axes
    found = {line.get_label(): (np.round(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    for label, kind in (("query", "attn.qkv[q]"), ("FFN in", "mlp.fc1")):
        layers, variances = found[label]
        assert list(layers) == [0, 1]
        assert variances == pytest.approx([VARIANCES[f"blocks.{layer}.{kind}"] for layer in (0, 1)])
    assert axes.get_ylabel() == "variance of active lengths (optimizer steps²)"
    assert axes.get_xlabel() == "layer"


def test_layers_keep_their_numbers_and_matrices_may_lie_in_none() -> None:
    some = {f"blocks.{layer}.mlp.fc1": TOY["blocks.0.mlp.fc1"] for layer in (2, 10)} | {
        "embed": TOY["blocks.1.mlp.fc1"]
    }
    for axes in (length_variance(some, LAST).axes[0].xaxis, directions_overview(some, LAST).axes[0].yaxis):
        assert [tick.get_text() for tick in axes.get_ticklabels()] == ["2", "10", "none"]
    figure = direction_intervals(some, LAST, None)
    assert [axes.get_title() for axes in figure.axes] == ["embed"]


def test_figure_3_draws_the_raw_curve_behind_the_smoothed_one() -> None:
    curves = {"a": ([1, 2, 3], [3.0, float("nan"), 1.0]), "b": ([2, 4], [5.0, 4.0])}
    (axes,) = training_loss(curves).axes
    pairs = zip(axes.lines[::2], axes.lines[1::2], strict=True)
    for (raw, smooth), (name, (steps, losses)) in zip(pairs, curves.items(), strict=True):
        assert smooth.get_label() == name
        assert list(raw.get_xdata()) == list(smooth.get_xdata()) == steps
        assert raw.get_ydata() == pytest.approx(losses, nan_ok=True)
        assert smooth.get_ydata() == pytest.approx(smoothed(losses))
        assert raw.get_color() == smooth.get_color()
        assert raw.get_linewidth() < smooth.get_linewidth()
    assert "constant 0.9" in axes.get_legend().get_title().get_text()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "training loss")


def test_the_overview_shows_what_was_won_and_lost() -> None:
    figure = directions_overview(TOY, LAST)
    for title, kind in (("query", "attn.qkv[q]"), ("FFN in", "mlp.fc1")):
        axes = panel(figure, title)
        wanted = np.full((2, 4), np.nan)
        held = set()
        for layer in (0, 1):
            name = f"blocks.{layer}.{kind}"
            wanted[layer, : len(LENGTHS[name])] = LENGTHS[name]
            held |= {(k, layer) for k, (_, end) in enumerate(TOY[name].tolist(), start=1) if end < 0}
        (image,) = axes.images
        assert image.get_array().filled(np.nan) == pytest.approx(wanted, nan_ok=True)
        assert image.get_extent() == [0.5, 4.5, 1.5, -0.5]
        dots = [line for line in axes.lines if line.get_marker() == "o"]
        assert {point for line in dots for point in zip(*line.get_data(), strict=True)} == held
        bars = [line for line in axes.lines if line.get_marker() != "o"]
        assert [list(line.get_xdata()) for line in bars] == [[2.5, 2.5]] * 2
    assert figure.axes[-1].get_ylabel() == "active length (optimizer steps)"


RANKS: dict[str, Curve] = {"mlp.fc1": ([5, 10], [2.0, 4.0]), "attn.qkv[q]": ([5, 10], [1.0, 5.0])}


def test_the_switches_are_drawn_from_their_rows() -> None:
    rows = switch_rows(records_of(TOY), ([3, 5, 8], [3.0, 2.0, 1.0]))
    figure = switches(rows, LAST, RANKS)
    for title, quantity in (("age (optimizer steps)", "age"), ("size when drawn", "size"), ("score", "score")):
        lines = [container.lines[0] for container in panel(figure, title).containers]
        for line, group in zip(lines, ("recycled", "kept"), strict=True):
            assert line.get_xdata() == pytest.approx([4, 7], abs=0.05)
            assert list(line.get_ydata()) == [row[f"{quantity}, {group}, median"] for row in rows]
    assert [panel(figure, title).get_yscale() for title in ("score", "change since drawn")] == ["log", "log"]
    chance, share = panel(figure, "recycled at the first chance").lines
    assert list(chance.get_ydata()) == [row["chance"] for row in rows]
    assert list(share.get_ydata())[1:] == [rows[1]["recycled at the first chance"]]
    before, after = panel(figure, "training loss around the switch").lines
    assert (list(before.get_ydata()), list(after.get_ydata())) == ([3.0, 2.5], [1.5, 1.0])
    (mean,) = panel(figure, "effective rank of the change").lines
    assert (list(mean.get_xdata()), list(mean.get_ydata())) == ([5, 10], [1.5, 4.5])
    silent = [replace(each, pairs=each.pairs._replace(scores=0 * each.pairs.scores)) for each in records_of(TOY)]
    less = switches(switch_rows(silent), LAST)
    assert not {"score", "training loss around the switch"} & set(texts(less))
    assert "mean over the 50 steps after" not in texts(less)
    assert "mean over the 50 steps after" in texts(figure)


def test_it_can_be_read_without_colour() -> None:
    def lightness(colour: Any) -> float:
        return float(np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)))

    assert abs(lightness(drawings.FUSED["facecolor"]) - lightness(drawings.ACTIVE["facecolor"])) > 0.4
    scale = [lightness(drawings.LENGTHS(x)) for x in np.linspace(0, 1, 50)]
    assert (np.diff(scale) < 0).all()
    assert scale[0] - scale[-1] > 0.7
    lines = length_variance(deberta(3, 4), 4).axes[0].lines
    assert len({line.get_marker() for line in lines}) == len(lines) == 6
    recycled, kept = (each.lines[0] for each in switches(switch_rows(records_of(TOY)), LAST).axes[0].containers)
    assert recycled.get_marker() != kept.get_marker()
    assert recycled.get_linestyle() != kept.get_linestyle()
    lines = training_loss({str(i): ([1, 2], [3.0, 1.0]) for i in range(8)}).axes[0].lines[1::2]
    assert len({line.get_marker() for line in lines}) == 8


PICTURES = {
    "intervals": lambda histories, last: direction_intervals(histories, last, blocks_of(histories)[0]),
    "variance": length_variance,
    "overview": directions_overview,
    "loss": lambda histories, last: training_loss(
        {name: ([1, 2, last], [3.0, 2.0, 1.5]) for name in list(histories)[:12]}
    ),
}
SUBJECTS: dict[str, tuple[Mapping[str, Tensor], int]] = {
    "toy": (TOY, LAST),
    "base model": (deberta(12, 32, 2600), 84_200),
    "many directions": (deberta(2, 508, 165), 84_200),
    "one matrix": ({"body": TOY["blocks.0.mlp.fc1"]}, LAST),
    "five kinds": ({name: each for name, each in deberta(2, 8).items() if "query" not in name}, 8),
    "no switch": ({name: torch.tensor([[0, -1]] * 4) for name in TOY}, 1),
}


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_picture_is_not_blank_and_nothing_is_cut_off_or_covered(picture: str, subject: str) -> None:
    assert_clean(PICTURES[picture](*SUBJECTS[subject]))


@pytest.mark.parametrize(
    ("subject", "known"), [("toy", "all"), ("base model", "all"), ("many directions", "records"), ("one matrix", "all")]
)
def test_the_picture_of_switches_is_clean_too(subject: str, known: str) -> None:
    histories, last = SUBJECTS[subject]
    steps = range(1, last + 1, 25 if last > 100 else 1)
    losses: Curve = (steps, [1 / step for step in steps]) if known == "all" else ((), ())
    ranks: dict[str, Curve] = {"mlp.fc1": ([last // 2, last], [2.0, 4.0])} if known == "all" else {}
    assert_clean(switches(switch_rows(records_of(histories), losses), last, ranks))


def assert_clean(figure: Figure) -> None:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=figure.dpi)
    pixels = np.asarray(Image.open(file).convert("L"))
    height = len(pixels)
    for axes in figure.axes:
        left, low, right, high = (axes.get_window_extent().extents + np.array([2, 2, -2, -2])).astype(int)
        assert (pixels[height - high : height - low, left:right] < 200).sum() > 20  # the lines of a grid are lighter
    boxes = {}
    for text in figure.findobj(Text):
        if text.get_text().strip() and text.get_visible():
            boxes[text] = text.get_window_extent()
    # of ticks those that lie beyond the axes are not drawn
    scales = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    ticks = {text for axis in scales for text in axis.get_ticklabels(which="both")}
    drawn = {text: box for text, box in boxes.items() if text not in ticks}
    assert len(drawn) >= 3
    for text, box in drawn.items():
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text
    for (one, box), (other, its) in itertools.combinations(drawn.items(), 2):
        assert not box.overlaps(its), (one, other)


def test_drawing_touches_no_global_state() -> None:
    before = dict(matplotlib.rcParams)
    for draw in PICTURES.values():
        draw(TOY, LAST).savefig(io.BytesIO(), format="svg")
    assert dict(matplotlib.rcParams) == before


# -- the command

NAMES = ["training_loss", "direction_intervals_layer_1", "length_variance", "directions_overview", "switches"]
FILES = {f"{name}.{suffix}" for name in NAMES for suffix in ("png", "svg", "csv")}
LOSSES = {f"training_loss.{suffix}" for suffix in ("png", "svg", "csv")}


def table(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def save_run(folder: Path, method: str = "SRLoRA", last: int = LAST, file: str = "last", recorded: bool = True) -> Path:
    """What a run of the toy's history leaves, as far as the figures look at it."""
    spec = {"class_path": f"srlora_pl.{method}", "init_args": {}}
    records = [record.state() for record in records_of(TOY)] if recorded else []
    state = {
        "format": 1,
        "method": spec,
        "matrices": {name: {"rank": 2} for name in TOY},
        "controller": {"intervals": TOY, "recording": {"records": records}} if method == "SRLoRA" else {},
    }
    content = {"global_step": last, "state_dict": {}, "pytorch-lightning_version": "2.6.6", "srlora": state}
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / f"checkpoints/{file}.ckpt")
    rows = "0,,0.5\n1,3.5,\n2,,0.6\n3,nan,\n5,2.5,\n"
    (folder / "metrics.csv").write_text(f"step,train/loss,val/loss\n{rows}")
    return folder


@pytest.mark.slow
def test_a_real_run(tmp_path: Path) -> None:
    # All four pairs are fused at every switch; (16 - 4) / 4 = 3 switches fall after steps 3, 6 and 10, the last one is
    # left out. So of twelve directions four each are active for 3, 3 and 4 steps: variance 2/9.
    settings = SMALL_RUN.replace("target_rank: 12", "target_rank: 16, fusion_ratio: 1.0")
    (tmp_path / "small.yaml").write_text(settings.replace("max_steps: 12", "max_steps: 10"))
    code, _, err = cli("fit", "--config", "small.yaml", "--trainer.enable_progress_bar=false", home=tmp_path)
    assert code == 0, err
    folder = Path("runs/small-srlora/version_0")
    code, out, err = cli("figures", "--run", folder, home=tmp_path)
    assert (code, err) == (0, "")
    assert out.splitlines() == [f"{folder}/figures/{name}.png, .svg and .csv" for name in NAMES]
    place = tmp_path / folder / "figures"
    assert names(place) == FILES
    rows = table(place / "directions_overview.csv")
    assert len(rows) == 2 * 6 * 12
    for row in rows:
        k = int(row["direction"])
        drawn, fused, length = [("0", "3", "3"), ("3", "6", "3"), ("6", "", "4")][(k - 1) // 4]
        assert (row["drawn after step"], row["fused after step"], row["active steps"]) == (drawn, fused, length)
    assert {row["kind"] for row in rows} == {"query", "key", "value", "attention output", "FFN in", "FFN out"}
    of_layer = table(place / "direction_intervals_layer_1.csv")
    assert of_layer == [row for row in rows if row["layer"] == "1"]
    assert len(of_layer) == 6 * 12
    variances = table(place / "length_variance.csv")
    assert [float(row["variance of active steps"]) for row in variances] == pytest.approx([2 / 9] * 12)
    assert [row["directions"] for row in variances] == ["12"] * 12
    first, second, *ranks = table(place / "switches.csv")
    for row, step, share in ((first, "3", ""), (second, "6", "1.0")):
        assert [row[name] for name in ("after step", "pairs", "recycled")] == [step, "48", "48"]
        assert [row[f"age, {group}, median"] for group in ("recycled", "kept")] == ["3.0", ""]
        assert (row["recycled at the first chance"], row["chance"]) == (share, "1.0")
        assert 0 < float(row["change, recycled, median"]) < float(row["size, recycled, median"])
    assert {row["after step"] for row in ranks} == {"4", "8", "10"}
    assert all(float(row["effective rank, mlp.fc1"]) > 1 for row in ranks)
    logged = [row for row in table(tmp_path / folder / "metrics.csv") if row["train/loss"]]
    drawn_losses = table(place / "training_loss.csv")
    assert [int(row["step"]) for row in drawn_losses] == [2, 4, 6, 8, 10]
    assert [row["train/loss"] for row in drawn_losses] == [row["train/loss"] for row in logged]
    for name in NAMES:
        assert len(set(Image.open(place / f"{name}.png").convert("L").tobytes())) > 50
        assert "</svg>" in (place / f"{name}.svg").read_text()
    before = {file: file.read_bytes() for file in place.iterdir()}
    assert cli("figures", "--run", folder, home=tmp_path)[0] == 0
    assert {file: file.read_bytes() for file in place.iterdir()} == before


def test_losses_are_of_steps_counted_from_1(tmp_path: Path) -> None:
    run = save_run(tmp_path / "a/version_0")
    assert cli("figures", "--run", run, home=tmp_path)[0] == 0
    rows = table(run / "figures/training_loss.csv")
    assert [(row["run"], row["step"], row["train/loss"]) for row in rows] == [
        ("a/version_0", "2", "3.5"),
        ("a/version_0", "4", "nan"),
        ("a/version_0", "6", "2.5"),
    ]
    assert [float(row["smoothed"]) for row in rows] == pytest.approx([3.5, 3.5, (0.9 * 3.5 + 2.5) / 1.9])


@pytest.mark.parametrize("runs", [3, 12, 13, 72])
def test_the_names_of_many_runs_leave_room_for_their_losses(runs: int) -> None:
    curve: Curve = ([1, 2, 3], [3.0, 2.0, 1.0])
    figure = training_loss({f"deberta_cola_srlora-pissa/version_{i}": curve for i in range(runs)})
    figure.draw_without_rendering()
    (axes,) = figure.axes
    (legend,) = [*figure.legends, *([axes.get_legend()] if axes.get_legend() else [])]
    assert len(legend.get_texts()) == runs
    box, edge = legend.get_window_extent(), figure.bbox
    assert edge.x0 <= box.x0 < box.x1 <= edge.x1
    assert edge.y0 <= box.y0 < box.y1 <= edge.y1
    assert axes.get_window_extent().height > 0.6 * 4.5 * figure.dpi


def test_the_layer_can_be_chosen(tmp_path: Path) -> None:
    """Of a run from before switches were recorded."""
    run = save_run(tmp_path / "a", recorded=False)
    assert cli("figures", "--run", run, "--layer", 0, home=tmp_path)[0] == 0
    rows = table(run / "figures/direction_intervals_layer_0.csv")
    assert [int(row["active steps"]) for row in rows] == LENGTHS["blocks.0.attn.qkv[q]"] + LENGTHS["blocks.0.mlp.fc1"]
    assert {row["layer"] for row in rows} == {"0"}
    assert {name for name in FILES - names(run / "figures") if "layer" not in name} == {
        f"switches.{suffix}" for suffix in ("png", "svg", "csv")
    }


def test_several_runs_share_one_figure_of_losses(tmp_path: Path) -> None:
    runs = [save_run(tmp_path / f"{name}/version_0", name) for name in ("SRLoRA", "LoRA", "PiSSA")]
    options = [option for run in runs for option in ("--run", run)]
    code, out, err = cli("figures", *options, "--output", "drawn", home=tmp_path)
    assert (code, err) == (0, "")
    drawn = tmp_path / "drawn"
    assert names(drawn) == LOSSES | {"SRLoRA-version_0"}
    assert names(drawn / "SRLoRA-version_0") == FILES - LOSSES
    for name in ("LoRA", "PiSSA"):
        assert f"{name}/version_0: {name} draws no singular directions, so only the training loss is drawn\n" in out
    found = [row["run"] for row in table(drawn / "training_loss.csv")]
    assert found == [f"{name}/version_0" for name in ("SRLoRA", "LoRA", "PiSSA") for _ in range(3)]
    assert not any((run / "figures").exists() for run in runs)


def test_ranks_stand_with_switches_and_losses_are_those_around_them(tmp_path: Path) -> None:
    run = save_run(tmp_path / "a")
    rows = "0,,0.5,\n1,3.5,,\n3,nan,,\n4,,,2.5\n5,2.5,,\n10,,,4\n"
    (run / "metrics.csv").write_text(f"step,train/loss,val/loss,change_effective_rank/mlp.fc1\n{rows}")
    assert cli("figures", "--run", run, home=tmp_path)[0] == 0
    found = table(run / "figures/switches.csv")
    assert [row["after step"] for row in found] == ["4", "7", "5", "10"]
    assert [row["effective rank, mlp.fc1"] for row in found] == ["", "", "2.5", "4.0"]
    around = [(row["loss of 50 steps before"], row["loss of 50 steps after"]) for row in found]
    assert around == [("3.5", "2.5"), ("3.0", ""), ("", ""), ("", "")]


def test_a_run_without_directions_is_no_error(tmp_path: Path) -> None:
    run = save_run(tmp_path / "lora", "LoRA")
    code, out, err = cli("figures", "--run", run, "--layer", 99, home=tmp_path)
    assert (code, err) == (0, "")
    assert "LoRA draws no singular directions" in out
    assert names(run / "figures") == LOSSES


def test_the_furthest_readable_checkpoint_counts(tmp_path: Path) -> None:
    run = save_run(tmp_path / "a", last=8)
    save_run(run, last=9, file="best-step9")
    save_run(run, last=7, file="best-step7")
    assert cli("figures", "--run", run, home=tmp_path)[0] == 0
    assert {row["active steps"] for row in table(run / "figures/directions_overview.csv")} == set("234579")
    (run / "checkpoints/best-step9.ckpt").write_bytes(b"cut off")
    assert cli("figures", "--run", run, home=tmp_path)[0] == 0
    rows = table(run / "figures/direction_intervals_layer_1.csv")
    assert [row["active steps"] for row in rows] == ["4", "4", "4", "4", "7", "8", "1"]


REFUSED = {
    "no run": ([], "figures: the following arguments are required: --run, see python cli.py figures --help"),
    "unknown option": (["--run", "run", "--leyer", "1"], "unrecognized arguments: --leyer 1"),
    "layer that is no number": (["--run", "run", "--layer", "first"], "--layer: invalid int value: 'first'"),
    "no folder": (["--run", "ru"], "--run 'ru' does not exist (did you mean 'run'?)"),
    "file": (["--run", "file"], "--run file is no folder"),
    "folder of runs": (["--run", "all"], "--run all holds no readable checkpoint, give all/version_0"),
    "no checkpoint": (["--run", "bare"], "--run bare holds no readable checkpoint"),
    "truncated checkpoint": (["--run", "cut"], "--run cut holds no readable checkpoint"),
    "another program's": (["--run", "foreign"], "last.ckpt holds no model that this package adapted"),
    "no table": (["--run", "untold"], "untold/metrics.csv cannot be read"),
    "no losses": (["--run", "silent"], "silent/metrics.csv has no value of train/loss"),
    "broken table": (["--run", "garbled"], "garbled/metrics.csv cannot be read"),
    "bytes": (["--run", "bytes"], "bytes/metrics.csv cannot be read"),
    "layer that is not there": (
        ["--run", "run", "--layer", "7"],
        "layer 7 has no adapted matrix, give one of these layers: 0, 1",
    ),
    "several without a place": (["--run", "run", "--run", "all/version_0"], "name it with --output"),
    "one of several": (["--run", "run", "--run", "bare", "--output", "new"], "--run bare holds no readable"),
    "output is a file": (["--run", "run", "--output", "file"], "file cannot be written to"),
    "output below a file": (["--run", "run", "--output", "file/new"], "file/new cannot be written to"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("figures")
    for name in ("run", "all/version_0", "bare", "cut", "foreign", "untold", "silent", "garbled", "bytes"):
        save_run(home / name)
    (home / "bare/checkpoints/last.ckpt").unlink()
    (home / "cut/checkpoints/last.ckpt").write_bytes((home / "run/checkpoints/last.ckpt").read_bytes()[:500])
    content = torch.load(home / "run/checkpoints/last.ckpt", weights_only=True)
    del content["srlora"]
    torch.save(content, home / "foreign/checkpoints/last.ckpt")
    (home / "untold/metrics.csv").unlink()
    (home / "silent/metrics.csv").write_text("step,train/loss,val/loss\n1,,3.5\n")
    (home / "garbled/metrics.csv").write_text("step,train/loss\n1,high\n")
    (home / "bytes/metrics.csv").write_bytes(b"step,train/loss\n1,\xff\n")
    (home / "file").write_text("mine")
    return home


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_drawn_is_said_in_a_sentence(home: Path, case: str) -> None:
    options, sentence = REFUSED[case]
    before = sorted(home.rglob("*"))
    code, out, err = cli("figures", *options, home=home)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sorted(home.rglob("*")) == before
    assert (home / "file").read_text() == "mine"


def test_help_is_answered_without_loading_anything(tmp_path: Path) -> None:
    code = (
        "import sys; from srlora_pl.cli import main; main(['figures', '--help']); "
        "print({'torch', 'matplotlib'} & set(sys.modules))"
    )
    done = waiting.run([sys.executable, "-c", code], check=True)
    assert "--layer N" in done.stdout
    assert done.stdout.endswith("set()\n")
