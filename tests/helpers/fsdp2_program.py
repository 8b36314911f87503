"""What two processes with split weights compute: ``python -m tests.helpers.fsdp2_program FOLDER few``.

As `tests.helpers.ddp_program`; `tests.training.test_fsdp2` compares what is found with one process.
"""

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy

from srlora_pl import (
    AdaLoRA,
    BitFit,
    Bottleneck,
    CausalLM,
    DoRA,
    DyLoRA,
    Full,
    GaLore,
    HydraLoRA,
    ImageClassifier,
    InstructionData,
    LinearProbe,
    LoRA,
    LoRAGA,
    LoRAPro,
    LoRASB,
    LoRAXS,
    Method,
    PiSSA,
    ReLoRA,
    SRLoRA,
    TiedLoRA,
    VeRA,
)
from srlora_pl.lowrank import AdaptedLinear
from srlora_pl.lowrank.shards import is_split, whole
from srlora_pl.training.checkpoints import AtomicCheckpointIO
from tests.helpers import ddp_program
from tests.helpers.ddp_program import SHAPE, FewDigits
from tests.helpers.methods import made

METHODS: dict[str, Method] = {
    "srlora": SRLoRA(rank=2, alpha=4.0, target_rank=6),
    "relora": ReLoRA(rank=2, alpha=4.0, restarts=3),
    "lora": LoRA(rank=2, alpha=4.0),
    "dora": DoRA(rank=2, alpha=4.0),
    "lora_sb": LoRASB(rank=2, gradient_samples=12),
    "lora_ga": LoRAGA(rank=2, gradient_samples=12),
    "full": Full(),
    "galore": GaLore(rank=2),
    "bottleneck": Bottleneck(target_modules=["attn.proj", "mlp.fc2"]),
    # Whose updates become larger than the matrices.
    "dense": SRLoRA(rank=4, alpha=4.0, target_rank=10),
}
NAMED = [name for name in METHODS if name not in ("galore", "dense")]
OTHERS = [AdaLoRA, BitFit, DyLoRA, HydraLoRA, LinearProbe, LoRAPro, LoRAXS, PiSSA, TiedLoRA, VeRA]
METHODS |= {kind.__name__: made(kind, rank=2, alpha=4.0) for kind in OTHERS}
TRAINED = [*NAMED, *(kind.__name__ for kind in OTHERS)]
SINGLE = ["srlora", "relora", "lora", "dora", "lora_sb", "full"]  # tried in float32 too
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
    has_weights = adaptation.method.additive or adaptation.method.rescales
    linears = {name: layer for name, layer in adaptation.layers.items() if isinstance(layer, AdaptedLinear)}
    return {
        "effective": {name: layer.merged_weight() for name, layer in linears.items() if has_weights},
        "state": {name: whole(value).clone() for name, value in module.state_dict().items()},
        "directions": getattr(controller, "active", {}),
        "records": [dict(record.pairs._asdict()) for record in controller.switch_records()],
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


ACCUMULATED = {"accumulate_grad_batches": 2, "max_steps": 7, "gradient_clip_val": 0.5}


def answers(home: Path, processes: int, weights: str, ckpt_path: Path | None = None) -> dict[str, Any]:
    """A Llama whose head is its embedding, in micro-batches of unequal length, with checkpointed activations."""
    L.seed_everything(3, verbose=False)
    options = {"lr": 0.01, "samples": 2, "weights": weights, "activation_checkpointing": True}
    module = CausalLM(str(home / "llama"), METHODS["srlora"], {"tie_word_embeddings": True}, **options)
    data = InstructionData(
        str(home / "questions"),
        template="{prompt}",
        batch_size=ddp_program.BATCH // processes // 2,
        max_length=64,
        grader="exact",
        max_new_tokens=4,
        cache_dir=str(home / "tokens"),
    )
    precision = "64-true" if weights == "float32" else "32-true"
    scores, name = Scores(), f"answers-{weights}-"
    callbacks = [scores] if ckpt_path else [scores, Files(name)]
    run = trainer(home, processes, *callbacks, precision=precision, accumulate_grad_batches=2)
    run.fit(module, data, ckpt_path=ckpt_path)
    found = result(module) | {"scores": scores.scores}
    if processes > 1:
        found["refused"] = ddp_program.refusal(lambda: run.test(module, data, verbose=False))
    return found


def evaluated(home: Path, processes: int) -> dict[str, Any]:
    """The scores of the last weights, and of a file that is loaded into weights that are split already."""
    L.seed_everything(3, verbose=False)
    module, data = classifier(home, "srlora"), FewDigits(processes)
    run = trainer(home, processes, Files(f"evaluated{processes}-"))
    run.fit(module, data)
    (last,) = run.validate(module, data, verbose=False)
    (loaded,) = run.validate(module, data, ckpt_path=home / f"evaluated{processes}-5.ckpt", verbose=False)
    return {"last": last, "loaded": loaded, "effective": result(module)["effective"]}


def refusals(home: Path) -> dict[str, str]:
    """What a run with split weights says to that which it cannot do."""
    module = classifier(home, "lora")
    runs: dict[str, Any] = {
        "averages": (module, trainer(home, 2, WeightAveraging())),
        "scaled": (module, trainer(home, 2, precision=None, plugins=[_scaled()])),
        "galore": (classifier(home, "galore"), trainer(home, 2)),
        "plain": (module, trainer(home, 2, strategy=ModelParallelStrategy(2, 1), precision="32-true")),
    }
    return {
        name: ddp_program.refusal(lambda module=module, run=run: run.fit(module, FewDigits(2)))
        for name, (module, run) in runs.items()
    }


def _scaled() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


def few(home: Path) -> dict[str, Any]:
    """What is looked at in every run of the tests."""
    found: dict[str, Any] = {name: fitted(home, 2, name) for name in ("srlora", "full")}
    found["accumulated"] = fitted(home, 2, "srlora", Files("split"), **ACCUMULATED)
    found["resumed"] = {"split5": fitted(home, 2, "srlora", ckpt_path=home / "split5.ckpt", **ACCUMULATED)}
    return found


def everything(home: Path) -> dict[str, Any]:
    found: dict[str, Any] = {name: fitted(home, 2, name) for name in TRAINED}
    fitted(home, 2, "srlora", Files("ddp"), strategy="ddp", **ACCUMULATED)
    found["dense accumulated"] = fitted(home, 2, "dense", Files("dense"), **ACCUMULATED)
    for name in SINGLE:
        found[f"{name} 32"] = fitted(home, 2, name, optimizer="sgd", lr=0.1, precision="32-true")
    for name in ("srlora", "full"):
        found[f"{name} accumulated"] = fitted(home, 2, name, Files(name), **ACCUMULATED)
    # This run's own files, and those of one process and of ddp.
    for file in ("srlora5", "srlora10", "full5", "full10", "dense10", "one5", "ddp5"):
        method = file.rstrip("0123456789") if file not in ("one5", "ddp5") else "srlora"
        found[file] = fitted(home, 2, method, ckpt_path=home / f"{file}.ckpt", **ACCUMULATED)
    found["whole"] = fitted(home, 2, "srlora", Files("whole"), checkpoints="full", **ACCUMULATED)
    found["whole5"] = fitted(home, 2, "srlora", ckpt_path=home / "whole5.ckpt", checkpoints="full", **ACCUMULATED)
    found["bf16"] = fitted(home, 2, "srlora", precision="bf16-mixed")
    for weights in ("float32", "bfloat16"):
        found[weights] = answers(home, 2, weights)
        found[f"{weights} resumed"] = answers(home, 2, weights, home / f"answers-{weights}-5.ckpt")
    found["evaluated"] = evaluated(home, 2)
    found["refused"] = refusals(home)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, what = Path(sys.argv[1]), {"few": few, "everything": everything}[sys.argv[2]]
    found = what(folder)
    torch.save(found, folder / f"rank{os.environ.get('LOCAL_RANK', 0)}.pt")
