"""The runs whose checkpoints version 0.1 wrote: such a file is scored here, or resumed to the end of its run."""

import contextlib
import io
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from torch import Tensor

from srlora_pl import ImageClassifier, ImageData, TextClassifier, TextData
from srlora_pl.cli import main
from tests.helpers.paths import ROOT

FOLDER = ROOT / "tests/nets/checkpoints"
EXPECTED = FOLDER / "expected.json"
STEPS = 12  # of a run; what was saved at its end goes on to LONGER
LONGER = 15
MID = {"mid": "mid-step=7"}  # the checkpoints of a run
INSIDE = MID | {"switch": "step=6"}
EVERY = INSIDE | {"last": "last"}
# SRLoRA plans 4 switches, after steps 3, 6, 9 and (left out) 12. Validation after every 5 micro-batches, of which an
# optimizer step takes 2, saves one file in the middle of step 8.
SHARED = {"rank": 2, "alpha": 4, "target_modules": ["query", "value", "fc1"]}
SRLORA = {"class_path": "srlora_pl.SRLoRA", "init_args": SHARED | {"target_rank": 6}}
PISSA = {"class_path": "srlora_pl.PiSSA", "init_args": SHARED}
LORA = {"class_path": "srlora_pl.LoRA", "init_args": SHARED}
RUNS: dict[str, tuple[dict[str, Any], str, dict[str, str]]] = {
    "image-srlora-compact": (SRLORA, "compact", EVERY),
    "image-srlora-full": (SRLORA, "full", EVERY),
    "image-lora-compact": (LORA, "compact", MID),
    "text-srlora-compact": (SRLORA, "compact", EVERY),
    "text-srlora-full": (SRLORA, "full", INSIDE),
    "text-pissa-compact": (PISSA, "compact", MID),
}
FILES = [f"{run}-{moment}" for run, (_, _, moments) in RUNS.items() for moment in moments]
TASKS: dict[str, Any] = {"image": ImageClassifier, "text": TextClassifier}
DATA: dict[str, tuple[Any, dict[str, Any]]] = {
    # Images of the network's own size, uncropped: no machine rounds their pixels otherwise.
    "image": (ImageData, {"name": "digits", "crop_scale": [1.0, 1.0]}),
    "text": (TextData, {"root": "texts", "text_column": "text", "max_length": 16}),
}
BATCHES = 4  # of validation and of test
CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"


def settings(run: str) -> dict[str, Any]:
    """The config of ``run``, for the folder that `prepare` makes."""
    method, checkpoints, _ = RUNS[run]
    kind = run.split("-")[0]
    data, options = DATA[kind]
    often = {"save_top_k": -1, "save_on_train_epoch_end": False}
    return {
        "seed_everything": 3,
        "model": {
            "class_path": f"srlora_pl.{TASKS[kind].__name__}",
            "init_args": {
                "backbone": kind,
                "method": method,
                "optimizer": "adamw",
                "lr": 0.01,
                "weight_decay": 0.1,
                "warmup_steps": 2,
                "checkpoints": checkpoints,
            },
        },
        "data": {"class_path": f"srlora_pl.{data.__name__}", "init_args": {"batch_size": 8, **options}},
        "trainer": {
            "accelerator": "cpu",
            "precision": "64-true",
            "accumulate_grad_batches": 2,
            "max_steps": STEPS,
            "val_check_interval": 5,
            "check_val_every_n_epoch": None,
            "limit_val_batches": BATCHES,
            "limit_test_batches": BATCHES,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": CHECKPOINT, "init_args": {"filename": "mid-{step}", **often}},
                {"class_path": CHECKPOINT, "init_args": {"filename": "{step}", "every_n_train_steps": 1, **often}},
            ],
        },
    }


def prepare(home: Path) -> Path:
    """Put pretrained networks, texts and configs into ``home``, in which the runs are at home."""
    for name in ("image", "text", "texts"):
        shutil.copytree(FOLDER / name, home / name, dirs_exist_ok=True)
    for run in RUNS:
        (home / f"{run}.yaml").write_text(yaml.safe_dump(settings(run)))
    return home


def fit(run: str, home: Path, *options: object) -> Path:
    """``run`` through the command line; returns the folder of its checkpoints."""
    shutil.rmtree(home / "runs", ignore_errors=True)
    said = io.StringIO()
    arguments = map(str, ("fit", "--config", f"{run}.yaml", *options))
    with contextlib.chdir(home), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(list(arguments))
    assert code == 0, said.getvalue()
    (folder,) = home.glob("runs/*/version_0/checkpoints")
    return folder


def resume(file: str, home: Path) -> dict[str, Tensor]:
    """The weights of the whole network at the end of the run that goes on from ``file``."""
    run, _, moment = file.rpartition("-")
    steps = LONGER if moment == "last" else STEPS
    options = ("--ckpt_path", FOLDER / f"{file}.ckpt", "--trainer.max_steps", steps, "--model.checkpoints", "full")
    content = torch.load(fit(run, home, *options) / "last.ckpt", weights_only=True)
    assert content["global_step"] == steps
    return content["state_dict"]


def score(file: Path, home: Path) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Test scores of a checkpoint, and its weights with the pairs merged into them."""
    kind = file.name.split("-")[0]
    data, options = DATA[kind]
    trainer = L.Trainer(
        accelerator="cpu",
        precision="64-true",
        limit_test_batches=BATCHES,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with contextlib.chdir(home), warnings.catch_warnings(action="ignore"):
        module = TASKS[kind](**torch.load(file, weights_only=True)["hyper_parameters"])
        (scores,) = trainer.test(
            module, datamodule=data(batch_size=8, **options), ckpt_path=str(file), weights_only=True, verbose=False
        )
    module.adaptation.merge()
    return dict(scores), {name: value.clone() for name, value in module.state_dict().items()}
