"""What two processes with split weights compute: ``python -m tests.helpers.fsdp2_program FOLDER``.

As `tests.helpers.ddp_program`; `tests.training.test_fsdp2` compares what is found with one process.
"""

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from srlora_pl import DoRA, Full, ImageClassifier, LoRA, LoRAGA, LoRASB, Method, ReLoRA, SRLoRA
from srlora_pl.lowrank.shards import is_split, whole
from srlora_pl.training.checkpoints import AtomicCheckpointIO
from tests.helpers import ddp_program
from tests.helpers.ddp_program import SHAPE, FewDigits

METHODS: dict[str, Method] = {
    "srlora": SRLoRA(rank=2, alpha=4.0, target_rank=6),
    "relora": ReLoRA(rank=2, alpha=4.0, restarts=3),
    "lora": LoRA(rank=2, alpha=4.0),
    "dora": DoRA(rank=2, alpha=4.0),
    "lora_sb": LoRASB(rank=2, gradient_samples=12),
    "lora_ga": LoRAGA(rank=2, gradient_samples=12),
    "full": Full(),
}
STEPS = 8  # of which three switch


class Scores(Callback):
    """Those of each validation."""

    def __init__(self) -> None:
        self.scores: list[dict[str, float]] = []

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        self.scores.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Files(Callback):
    """A checkpoint after every validation, some of which fall between the micro-batches of a step."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        if not trainer.sanity_checking:
            position = trainer.fit_loop.epoch_loop.batch_progress.total.processed
            trainer.save_checkpoint(Path(str(trainer.default_root_dir), f"{self.prefix}{position}.ckpt"))


def classifier(home: Path, method: str, **options: Any) -> ImageClassifier:
    torch.manual_seed(0)
    settings = {"optimizer": "adamw", "lr": 0.01, "backbone_kwargs": SHAPE, **options}
    return ImageClassifier(backbone=str(home / "vit"), num_classes=10, method=METHODS[method], **settings)


def trainer(home: Path, processes: int, *callbacks: Callback, **options: Any) -> L.Trainer:
    defaults = {
        "max_steps": STEPS,
        "precision": "64-true",
        "strategy": "fsdp2" if processes > 1 else "auto",
        "plugins": [AtomicCheckpointIO()],
    }
    return ddp_program.trainer(home, processes, *callbacks, **{**defaults, **options})


def result(module: Any) -> dict[str, Any]:
    """What there is after a run, whole; all processes must call this."""
    adaptation, controller = module.adaptation, module.adaptation.controller
    return {
        "effective": {name: layer.merged_weight() for name, layer in adaptation.layers.items()},
        "state": {name: whole(value).clone() for name, value in module.state_dict().items()},
        "directions": getattr(controller, "active", {}),
        "events": controller.progress().done,
        "held": {n: (p.to_local() if is_split(p) else p).numel() for n, p in module.named_parameters()},
    }


def fitted(home: Path, processes: int, method: str, *callbacks: Callback, **options: Any) -> dict[str, Any]:
    """A run of ``method``, from the file ``ckpt_path`` if there is one."""
    L.seed_everything(3, verbose=False)
    scores, file = Scores(), options.pop("ckpt_path", None)
    of_model = {name: options.pop(name) for name in ("optimizer", "lr", "checkpoints") if name in options}
    module = classifier(home, method, **of_model)
    run = trainer(home, processes, scores, *callbacks, **options)
    run.fit(module, FewDigits(processes), ckpt_path=file)
    return result(module) | {"scores": scores.scores}


ACCUMULATED = {"accumulate_grad_batches": 2, "max_steps": 5, "gradient_clip_val": 0.5}


def both(home: Path) -> None:
    rank = int(os.environ.get("LOCAL_RANK", 0))
    found: dict[str, Any] = {name: fitted(home, 2, name) for name in METHODS}
    for name in ("srlora", "full"):
        found[f"{name} 32"] = fitted(home, 2, name, optimizer="sgd", lr=0.1, precision="32-true")
        found[f"{name} accumulated"] = fitted(home, 2, name, Files(name), **ACCUMULATED)
        found[f"{name} resumed"] = {
            position: fitted(home, 2, name, ckpt_path=home / f"{name}{position}.ckpt", **ACCUMULATED)
            for position in (5, 10)
        }
    found["bf16"] = fitted(home, 2, "srlora", precision="bf16-mixed")
    torch.save(found, home / f"rank{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    both(Path(sys.argv[1]))
