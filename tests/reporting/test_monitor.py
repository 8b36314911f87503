"""What a run leaves in TensorBoard's files, read back: against its checkpoint, and after it was broken and resumed."""

import csv
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from srlora_pl.lowrank.measures import by_kind
from srlora_pl.reporting import Monitor
from tests.helpers.cli import cli
from tests.helpers.faults import in_step
from tests.helpers.toy_module import Toy, loader, trainer
from tests.helpers.watched import FIT, HPARAMS, Watched, finished, prepared

LOGGED, VALIDATED, END = [1, 3, 5, 7, 9, 11], [3, 7, 11], 12
KINDS = ["attn.proj", "attn.qkv[k]", "attn.qkv[q]", "attn.qkv[v]", "mlp.fc1", "mlp.fc2"]


def test_scores_are_those_of_the_pairs(run: Watched) -> None:
    """No switch follows the last step, so the last file holds the averages that were shown there."""
    adaptation = run.last_state().adaptation
    scores = adaptation.controller.scores()
    for kind in KINDS:
        expected = torch.cat([scores[matrix.name] for matrix in by_kind(adaptation)[kind]])
        steps, means = run.curve(f"scores/{kind}")
        assert steps == LOGGED
        assert means[-1] == pytest.approx(expected.mean().item(), rel=1e-5)
        shown = run.events.Histograms(f"log10_scores/{kind}")
        assert [event.step for event in shown] == LOGGED
        assert shown[-1].histogram_value.num == expected.numel() == 2 * 4
        assert shown[-1].histogram_value.min == pytest.approx(expected.min().log10().item(), rel=1e-5)
        assert shown[-1].histogram_value.max == pytest.approx(expected.max().log10().item(), rel=1e-5)


class Diverges(Callback):
    def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
        if trainer.global_step == 6:
            module.adaptation.controller.importance.smoothed.fill_(torch.inf)
            module.adaptation.layers["blocks.0.fc1"].lora_A.data.fill_(torch.inf)


def test_what_diverged_is_left_out(tmp_path: Path) -> None:
    """It is for the module to end such a run, with its own words."""
    watching = {"callbacks": [Diverges(), Monitor()], "logger": TensorBoardLogger(tmp_path, ""), "log_every_n_steps": 1}
    run = trainer(tmp_path, max_steps=6, **watching)
    run.fit(Toy(), loader())
    events = EventAccumulator(run.log_dir, {"histograms": 0, "scalars": 0}).Reload()
    assert [event.step for event in events.Histograms("log10_scores/fc2")] == [0, 1, 2, 3, 4]
    assert [event.value for event in events.Scalars("scores/fc2")][5:] == [np.inf]
    assert "change_norm/fc1" in events.Tags()["scalars"]


def test_directions_and_ages(run: Watched) -> None:
    """Two of four pairs are recycled after steps 3, 6 and 9; a row shows the state before the switch of its step."""
    assert run.curve("srlora/directions") == (LOGGED, [4, 6, 6, 8, 10, 10])
    names = ["initial", "survived_0", "survived_1", "survived_2_to_3", "survived_4_or_more"]
    shares = {name: run.curve(f"age/{name}")[1] for name in names}
    assert [sum(values) for values in zip(*shares.values(), strict=True)] == pytest.approx([1.0] * 6)
    assert shares["initial"][:2] == [1.0, 0.5]
    controller = run.last_state().adaptation.controller
    drawn = [int(controller.intervals[name][each, 0]) for name, active in controller.active.items() for each in active]
    for name, step in (("initial", 0), ("survived_0", 9), ("survived_1", 6), ("survived_2_to_3", 3)):
        assert shares[name][-1] == pytest.approx(drawn.count(step) / len(drawn), rel=1e-6)
        assert drawn.count(step) > 0
    ages = run.events.Histograms("age_in_steps")
    assert [event.step for event in ages] == LOGGED[1:]
    recycled = [12 - step for step in drawn if step]
    assert (ages[-1].histogram_value.num, ages[-1].histogram_value.sum) == (len(recycled), sum(recycled))


def test_the_last_switch(run: Watched) -> None:
    first, second, third = run.last_state().adaptation.controller.switch_records()
    shares = [record.first_chance for record in (second, third, third)]
    assert run.curve("srlora/first_chance") == (LOGGED[3:], pytest.approx(shares))
    for name in ("recycled", "kept"):
        steps, values = run.curve(f"srlora/score_{name}")
        medians = []
        for record in (first, first, second, third, third):
            chosen = record.pairs.recycled if name == "recycled" else ~record.pairs.recycled
            medians.append(record.pairs.scores[chosen].median().item())
        assert steps == LOGGED[1:]
        assert values == pytest.approx(medians)


def test_the_change_since_the_pretrained_weights(run: Watched) -> None:
    """A block has two matrices of a kind, so all are measured; W0 is rebuilt from the ledger."""
    adaptation = run.last_state().adaptation
    before = adaptation.pretrained_weights()
    for kind in KINDS:
        norms, stable = [], []
        for matrix in by_kind(adaptation)[kind]:
            change = adaptation.layers[matrix.layer_name].merged_weight() - before[matrix.layer_name]
            sigma = torch.linalg.svdvals(matrix.of_weight(change))
            norms.append(sigma.norm().item())
            stable.append((sigma.square().sum() / sigma[0] ** 2).item())
        for name, expected in (("norm", norms), ("stable_rank", stable)):
            steps, values = run.curve(f"change_{name}/{kind}")
            assert steps == VALIDATED
            assert values[-1] == pytest.approx(np.mean(expected), rel=1e-3)
        assert run.curve(f"change_effective_rank/{kind}")[1][-1] > np.mean(stable)


def test_figures_at_validations_and_at_the_end(run: Watched) -> None:
    for tag in ("figures/directions_block_1", "figures/length_variance", "figures/switches"):
        images = run.events.Images(tag)
        assert [event.step for event in images] == [*VALIDATED, END]
        pixels = [np.asarray(Image.open(io.BytesIO(event.encoded_image_string))) for event in images]
        assert all(each.shape[2] == 3 and each.min() < 50 and each.max() == 255 for each in pixels)
        assert not np.array_equal(pixels[1], pixels[2])


def test_the_card_says_what_ran_on_what(run: Watched) -> None:
    (card,) = run.events.Tensors("run/text_summary")
    text = card.tensor_proto.string_val[0].decode()
    module = run.last_state()
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert f"{trained:,} of {sum(p.numel() for p in module.parameters()):,} parameters train" in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    assert "SRLoRA: rank 4, target_rank 12" in text
    assert "| attn.proj | 2 | 32 x 32 | 4 | 12 | 512 |" in text
    assert card.step == 0


def test_hyperparameters_with_the_scores(run: Watched) -> None:
    assert run.sessions() == 1
    shown = dict(run.hparams(HPARAMS[1]).session_start_info.hparams)
    values = {name: shown[name].number_value for name in ("method.rank", "method.target_rank", "lr", "batch_size")}
    assert values == {"method.rank": 4, "method.target_rank": 12, "lr": 0.01, "batch_size": 32}
    assert shown["method"].string_value == "SRLoRA"
    scores = {info.name.tag for info in run.hparams(HPARAMS[0]).experiment.metric_infos}
    assert {"val/loss", "val/accuracy", "test/loss", "test/accuracy"} <= scores <= set(run.events.Tags()["scalars"])


def test_time_and_memory(run: Watched) -> None:
    steps, seconds = run.curve("time/step")
    assert steps == LOGGED
    assert all(0 < each < 60 for each in seconds)
    assert all(0.05 < each < 1000 for each in run.curve("memory/peak")[1])


def test_metrics_csv_has_the_same_numbers_but_those_that_differ_from_run_to_run(run: Watched) -> None:
    rows = list(csv.DictReader((run.folder / "metrics.csv").read_text().splitlines()))
    mine = ("scores/", "age/", "srlora/", "change_", "time/", "memory/")
    tags = {tag for tag in run.events.Tags()["scalars"] if tag.startswith(mine)}
    assert {tag for tag in rows[0] if tag.startswith(mine)} == {tag for tag in tags if not tag.startswith(mine[-2:])}
    for tag in ("scores/mlp.fc1", "age/initial", "srlora/directions", "change_norm/attn.proj"):
        points = [(int(row["step"]), float(row[tag])) for row in rows if row[tag]]
        steps, values = run.curve(tag)
        assert [step for step, _ in points] == steps
        assert [value for _, value in points] == pytest.approx(values, rel=1e-6)


def raw_steps(run: Watched, what: str) -> dict[str, list[int]]:
    read = getattr(run.events, what.capitalize())
    return {tag: [event.step for event in read(tag)] for tag in run.events.Tags()[what]}


@pytest.mark.slow
def test_a_broken_run_goes_on_without_a_gap_or_a_second_copy(
    run: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It breaks in step 9, after a file of step 8: a step with a row, a validation and figures."""

    def fail(_: Any) -> None:
        raise ZeroDivisionError

    home = prepared(tmp_path)
    with monkeypatch.context() as patch:
        in_step(patch, 9, fail)
        with pytest.raises(ZeroDivisionError):
            cli(*FIT, home=home)
    resumed = finished(home)
    free = ("time/", "memory/")
    tags = [tag for tag in run.events.Tags()["scalars"] if not tag.startswith(free)]
    assert tags == [tag for tag in resumed.events.Tags()["scalars"] if not tag.startswith(free)]
    assert all(resumed.curve(tag) == run.curve(tag) for tag in tags)
    for what in ("histograms", "images"):
        assert raw_steps(resumed, what) == raw_steps(run, what)
    for tag in ("figures/directions_block_1", "figures/length_variance", "figures/switches"):
        pairs = zip(run.events.Images(tag), resumed.events.Images(tag), strict=True)
        assert all(one.encoded_image_string == other.encoded_image_string for one, other in pairs)
    for tag in run.events.Tags()["histograms"]:
        pairs = zip(run.events.Histograms(tag), resumed.events.Histograms(tag), strict=True)
        assert all(one.histogram_value == other.histogram_value for one, other in pairs)
    assert [card.step for card in resumed.events.Tensors("run/text_summary")] == [0, 7]
    assert resumed.sessions() == 1
    again = finished(home)  # a finished run is only tested, and what its end wrote is there once
    assert raw_steps(again, "images") == raw_steps(run, "images")
    assert all(again.curve(tag) == run.curve(tag) for tag in tags)


def test_other_loggers_get_numbers_and_settings(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer(logger=logger, callbacks=[Monitor()], log_every_n_steps=1, max_steps=6).fit(Toy(), loader(), loader())
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss", "scores/fc1", "age/initial", "change_norm/fc1", "time/step"} <= set(header)
    settings = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
    assert settings["method"]["init_args"]["target_rank"] == 12
    assert settings["max_steps"] == 6
    assert not list(tmp_path.rglob("events*"))


def test_without_matplotlib_a_run_says_so_once_and_logs_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    watching = {"callbacks": [Monitor(figures_at_validation=True)], "logger": TensorBoardLogger(tmp_path, "")}
    run = trainer(tmp_path, max_steps=6, val_check_interval=2, **watching)
    run.fit(Toy(), loader(), loader())
    assert run.global_step == 6
    said = [line for line in capsys.readouterr().err.splitlines() if "matplotlib" in line]
    assert said == ["note: no figures are logged without matplotlib: pip install 'srlora_pl[figures]'"]
    assert EventAccumulator(run.log_dir).Reload().Tags()["images"] == []
