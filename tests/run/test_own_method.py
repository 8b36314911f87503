"""A method that is made in a test goes all the way of a run without any change elsewhere."""

import csv
import json
import os
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from srlora_pl.training import checkpoints
from tests.helpers.cli import SMALL_RUN, cli
from tests.helpers.errors import mentions
from tests.helpers.models import vit_folder
from tests.helpers.paths import ROOT
from tests.helpers.waiting import run as started

TASK = SMALL_RUN.replace("vit_tiny_patch16_224", "backbone").replace(
    "{pretrained: false, img_size: 16, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, class_token: true}", "{}"
)
OVERLAY = "model: {{init_args: {{method: {{class_path: tests.helpers.methods.{}, init_args: {{rank: 2}}}}}}}}\n"


@pytest.fixture(scope="module", params=["Core", "Bottlenecks"])
def run(request, tmp_path_factory) -> tuple[Path, str]:
    """The folder that a fit with the method was started in, and the method's name."""
    home, name = tmp_path_factory.mktemp("own"), request.param
    vit_folder(home / "backbone")
    (home / "small.yaml").write_text(TASK)
    (home / "own.yaml").write_text(OVERLAY.format(name))
    code, _, err = cli("fit", "--config", "small.yaml", "--config", "own.yaml", home=home)
    assert code == 0, err
    return home, name


def folder(run: tuple[Path, str]) -> Path:
    return run[0] / f"runs/small-{run[1].lower()}/version_0"


def test_the_run_reports_itself(run) -> None:
    summary = json.loads((folder(run) / "summary.json").read_text())
    assert summary["steps"] == 12
    assert summary["switches"] == 0
    # r^2 of each of 6 matrices in 2 blocks; or r (in + out) of a bottleneck in each block. Head: 10 classes.
    adapters = {"Core": 2 * 6 * 4, "Bottlenecks": 2 * 2 * (32 + 32)}[run[1]]
    assert (summary["parameters"]["adapters"], summary["parameters"]["trained"]) == (adapters, adapters + 33 * 10)
    with (folder(run) / "metrics.csv").open() as file:
        losses = [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == 6
    events = EventAccumulator(str(folder(run))).Reload()
    assert {"train/loss", "val/accuracy"} <= set(events.Tags()["scalars"])


def test_it_resumes(run) -> None:
    file = folder(run) / "checkpoints/last.ckpt"
    settings = ["--config", "small.yaml", "--config", "own.yaml", "--trainer.max_steps", 14]
    code, _, err = cli("fit", *settings, "--ckpt_path", file, home=run[0])
    assert code == 0, err
    assert checkpoints.read(file)["global_step"] == 14


def test_it_exports_what_it_can(run) -> None:
    which = ("--config", folder(run) / "config.yaml", "--ckpt_path", "last")
    code, _, err = cli("export", *which, "--format", "merged", "--output", "merged", home=run[0])
    if run[1] == "Bottlenecks":
        assert code == 2
        assert re.search(mentions("Bottleneck", "merged"), err)
        assert not (run[0] / "merged").exists()
        return
    assert code == 0, err
    net = timm.create_model(f"local-dir:{run[0] / 'merged'}", pretrained=True)
    assert torch.isfinite(net(torch.zeros(1, 3, 16, 16))).all()
    code, _, err = cli("export", *which, "--format", "peft", "--output", "peft", home=run[0])
    assert code == 0, err
    assert len(load_file(run[0] / "peft/adapter_model.safetensors")) > 12


def test_a_process_that_has_not_imported_it_exports_it_where_the_config_is_trusted(run) -> None:
    name = f"tests.helpers.methods.{run[1]}"
    command = [sys.executable, "-m", "srlora_pl", "export", "--ckpt_path", folder(run) / "checkpoints/last.ckpt"]
    command += ["--format", "merged", "--output", "in_a_process"]
    options = {"cwd": run[0], "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    said = started(command, **options)
    assert said.returncode == 2
    assert re.search(mentions(repr(name), "from elsewhere", "--config"), said.stderr)
    said = started([*command, "--config", folder(run) / "config.yaml"], **options)
    assert said.returncode == (0 if run[1] == "Core" else 2), said.stderr
    assert "names no method" not in said.stderr


def test_it_is_drawn(run) -> None:
    code, _, err = cli("figures", "--run", folder(run), "--output", "figures", home=run[0])
    assert code == 0, err
    assert (run[0] / "figures/training_loss.png").stat().st_size > 1000


@pytest.mark.slow
def test_they_are_compared(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # each run of a comparison is a process of its own
    vit_folder(tmp_path / "backbone")
    (tmp_path / "small.yaml").write_text(TASK)
    for name in ("Core", "Bottlenecks"):
        (tmp_path / f"{name}.yaml").write_text(OVERLAY.format(name))
    methods = ["--methods", "Core.yaml,Bottlenecks.yaml", "--seeds", 2]
    code, _, err = cli("compare", "--config", "small.yaml", *methods, "--output", "compared", home=tmp_path)
    assert code == 0, err
    with (tmp_path / "compared/results.csv").open() as file:
        assert {row["method"] for row in csv.DictReader(file)} == {"Core", "Bottlenecks"}
