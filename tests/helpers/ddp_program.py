"""What two processes on one machine compute: ``python -m tests.helpers.ddp_program FOLDER``.

Lightning starts the second process by running this command once more. Each process leaves what it found in
``FOLDER/rank<N>.pt``; `tests.training.test_ddp` compares the two, and both with one
process that has batches twice as large.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import timm
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor

from srlora_pl import (
    CausalLM,
    ImageClassifier,
    ImageData,
    InstructionData,
    SRLoRA,
    TextClassifier,
    TextData,
    UserError,
)
from srlora_pl.cli import main
from srlora_pl.data.images.sources import Digits
from srlora_pl.data.texts import tokens
from srlora_pl.lowrank.importance import all_finite
from srlora_pl.lowrank.starts.spectrum import Spectrum
from srlora_pl.run.run import Run
from tests.helpers.causal import save_llama
from tests.helpers.encoders import BERT, folder
from tests.helpers.instructions import write
from tests.helpers.texts import WORDS, save_tokenizer, sentence

SHAPE = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
STEPS = 14  # of which three switch
BATCH = 8  # of all processes together
HELD_OUT = 17  # a multiple of BATCH and 1: the second process has no sample for the last batch


def prepare(home: Path) -> None:
    """Weights, a tokenizer, texts and pictures that all processes find."""
    torch.manual_seed(1)
    timm.models.save_for_hf(timm.create_model("vit_tiny_patch16_224", **SHAPE), home / "vit", safe_serialization=True)
    folder(home / "bert", BERT | {"vocab_size": len(WORDS), "max_position_embeddings": 64})
    save_tokenizer(home / "bert", model_max_length=64)
    for name, count in {"train": 50, "val": 1, "test": HELD_OUT}.items():
        rows = (f"{sentence(1 + 7 * i % 40, i)},{i % 5 / 2}\n" for i in range(count))
        (home / "texts").mkdir(exist_ok=True)
        (home / "texts" / f"{name}.csv").write_text("text,label\n" + "".join(rows))
    save_llama(home / "llama")
    for name, count in {"train": 50, "val": 1, "test": HELD_OUT}.items():
        rows = [{"prompt": "how " * (1 + i % 5), "answer": "yes " * (1 + 7 * i % 13)} for i in range(count)]
        write(home / "questions" / f"{name}.jsonl", rows)
    (home / "pictures").mkdir()
    for i, picture in enumerate(Digits().load("test").images[:5]):
        Image.fromarray(picture.squeeze(0).numpy()).save(home / "pictures" / f"{i}.png")


# -- what both processes do, or one


def trainer(home: Path, processes: int, *callbacks: Callback, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": processes,
        "strategy": "ddp" if processes > 1 else "auto",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_steps": STEPS,
        "val_check_interval": 5,
        "check_val_every_n_epoch": None,
        "use_distributed_sampler": False,
        "default_root_dir": home,
    }
    return L.Trainer(**{**defaults, **options}, callbacks=list(callbacks))


class FewDigits(ImageData):
    """60 images to train on, 7 batches and a half an epoch, and 17 to score."""

    def __init__(self, processes: int) -> None:
        super().__init__(name="digits", batch_size=BATCH // processes)

    def load(self, stage: str) -> None:
        super().load(stage)
        for name, size in (("train_set", 60), ("val_set", HELD_OUT)):
            full: Any = getattr(self, name)
            full.rows = full.rows[:size]


class Watch(Callback):
    """What is seen in each step, and what the processes tell each other."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.shared: list[int] = []  # since the step before, how many results of one process were given to all
        self.scores: list[dict[str, float]] = []
        self.masks: list[Tensor] = []

    def setup(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        once = module.adaptation.run_on_rank_zero
        self.calls = 0

        def counted(compute: Callable[[], Any]) -> Any:
            self.calls += 1
            return once(compute)

        module.adaptation.run_on_rank_zero = counted
        layer = next(iter(module.adaptation.layers.values()))
        layer.dropout.register_forward_hook(lambda _, x, y: self.masks.append(y == 0))

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch["index"].tolist())
        self.shared.append(self.calls)
        self.calls = 0

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        self.scores.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def result(module: Any, watch: Watch) -> dict[str, Any]:
    adaptation, controller = module.adaptation, module.adaptation.controller
    return {
        "effective": {name: layer.merged_weight() for name, layer in adaptation.layers.items()},
        "directions": controller.active,
        "intervals": controller.intervals,
        "state": dict(module.state_dict()),
        "smoothed": controller.importance.smoothed,
        "uncertainty": controller.importance.uncertainty,
        "switches": controller.switches_done,
        "seen": watch.seen,
        "shared": watch.shared,
        "scores": watch.scores,
        "masks": watch.masks[:2],
    }


def classifier(home: Path, seed: int = 0, **options: Any) -> ImageClassifier:
    torch.manual_seed(seed)
    method = SRLoRA(rank=2, alpha=4.0, target_rank=6, dropout=options.pop("dropout", 0.0))
    settings = {"optimizer": "adamw", "lr": 0.01, "backbone_kwargs": SHAPE, **options}
    return ImageClassifier(backbone=str(home / "vit"), num_classes=10, method=method, **settings)


def images(home: Path, processes: int, precision: str) -> dict[str, Any]:
    """A run without anything that the processes draw each for itself."""
    L.seed_everything(3, verbose=False)
    watch, module = Watch(), classifier(home)
    trainer(home, processes, watch, precision=precision).fit(module, FewDigits(processes))
    return result(module, watch)


def texts(home: Path, processes: int) -> dict[str, Any]:
    """The same with texts of many lengths, numbers as labels, and one single text to validate on."""
    L.seed_everything(3, verbose=False)
    torch.manual_seed(0)
    still = {"pretrained": False, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    module = TextClassifier(
        str(home / "bert"), 1, SRLoRA(rank=2, alpha=2.0, target_rank=6), backbone_kwargs=still, lr=0.01
    )
    data = TextData(
        str(home / "texts"),
        problem="regression",
        batch_size=BATCH // processes,
        max_length=64,
        cache_dir=str(home / "tokens"),
    )
    watch = Watch()
    run = trainer(home, processes, watch, precision="64-true")
    run.fit(module, data)
    found = result(module, watch)
    (scores,) = run.test(module, data, verbose=False)
    return found | {"test": scores}


def answers(home: Path, processes: int) -> dict[str, Any]:
    """Answers of many lengths, in micro-batches, and 17 questions to generate answers to."""
    L.seed_everything(3, verbose=False)
    module = CausalLM(str(home / "llama"), SRLoRA(rank=2, alpha=2.0, target_rank=6), lr=0.01, samples=0)
    data = InstructionData(
        str(home / "questions"),
        template="{prompt}",
        batch_size=BATCH // processes // 2,
        max_length=64,
        grader="exact",
        max_new_tokens=4,
        cache_dir=str(home / "tokens"),
    )
    watch = Watch()
    run = trainer(home, processes, watch, precision="64-true", accumulate_grad_batches=2)
    run.fit(module, data)
    found = result(module, watch)
    module.answers = home / f"answers{processes}.jsonl"
    (scores,) = run.test(module, data, verbose=False)
    return found | {"test": scores}


# -- what only two processes do


class SaveAfterValidation(Callback):
    """Files from positions that no file of Lightning's own comes from: between the micro-batches of a step."""

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        if not trainer.sanity_checking:
            position = trainer.fit_loop.epoch_loop.batch_progress.total.processed
            trainer.save_checkpoint(Path(str(trainer.default_root_dir), f"{position}.ckpt"))


def with_dropout(home: Path, rank: int, ckpt_path: Path | None = None) -> dict[str, Any]:
    """Each process draws its own masks and mixtures; the second even starts from other weights and another head."""
    L.seed_everything(3, verbose=False)
    watch, module = Watch(), classifier(home, seed=rank, dropout=0.3, mixup=0.3)
    if ckpt_path is None and rank:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter += "lora_" not in name
    options = {"accumulate_grad_batches": 2, "max_steps": 7}
    trainer(home, 2, watch, SaveAfterValidation(), **options).fit(module, FewDigits(2), ckpt_path=ckpt_path)
    return result(module, watch)


class Poison(Callback):
    """One process has a NaN in the first of the two micro-batches of a step, which it keeps to itself at first."""

    def __init__(self, rank: int) -> None:
        self.rank, self.finite = rank, []

    def on_after_backward(self, trainer: L.Trainer, module: Any) -> None:
        if self.rank == 1 and trainer.fit_loop.epoch_loop.batch_progress.total.processed == 4:
            next(iter(module.adaptation.layers.values())).lora_B.grad[-1] = torch.nan  # v: of q attention makes 0

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        self.finite.append(bool(all_finite(gradients)))


def with_nan(home: Path, rank: int) -> dict[str, Any]:
    L.seed_everything(3, verbose=False)
    poison, module = Poison(rank), classifier(home)
    options = {"accumulate_grad_batches": 2, "max_steps": 4, "limit_val_batches": 0}
    message = refusal(lambda: trainer(home, 2, poison, **options).fit(module, FewDigits(2)))
    averages = module.adaptation.controller.importance
    return {"finite": poison.finite, "smoothed": averages.smoothed, "message": message}


def with_zero_weight(home: Path) -> str:
    module = classifier(home)
    next(iter(module.adaptation.layers.values())).weight.data.zero_()
    return refusal(lambda: trainer(home, 2).fit(module, FewDigits(2)))


def refusal(run: Callable[[], None]) -> str:
    try:
        run()
    except UserError as error:
        return str(error)
    return ""


def command(home: Path) -> dict[str, Any]:
    """What a user types; the first thing here, so that Lightning starts the second process in the midst of it."""
    common = ["--config", "configs/quickstart.yaml", "--trainer.devices=2", "--trainer.strategy=ddp"]
    common += [f"--trainer.default_root_dir={home / 'runs'}", "--data.batch_size=4"]
    fit = ["--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1"]
    fit += ["--trainer.limit_val_batches=2", "--trainer.limit_test_batches=2", "--model.method.target_rank=16"]
    last = home / "runs/quickstart-srlora/version_0/checkpoints/last.ckpt"
    predict = [f"--ckpt_path={last}", f"--data.predict_root={home / 'pictures'}", "--model.method.target_rank=16"]
    folders, start = [], Run.start
    Run.start = lambda run: folders.append(run.folder and run.folder.name) or start(run)  # type: ignore[method-assign, func-returns-value]
    codes = [main(["fit", *common, *fit, "--model.warmup_steps=0"]), main(["predict", *common, *predict])]
    return {"codes": codes, "folder": folders[0]}


def both(home: Path) -> None:
    rank = int(os.environ.get("LOCAL_RANK", 0))
    found: dict[str, Any] = {"command": command(home)}
    spectra, of = [], Spectrum.of
    Spectrum.of = lambda *args: spectra.append(args) or of(*args)  # type: ignore[method-assign, assignment]
    found["images"] = images(home, 2, "64-true")
    found["spectra"] = len(spectra)
    found["images32"] = images(home, 2, "32-true")
    read, tokenise = [], tokens._tokenize
    tokens._tokenize = lambda *args: read.append(len(args[1])) or tokenise(*args)  # type: ignore[assignment, func-returns-value]
    found["texts"] = texts(home, 2)
    found["tokenised"] = read
    found["answers"] = answers(home, 2)
    found["dropout"] = with_dropout(home, rank)
    found["resumed"] = {p: with_dropout(home, rank, home / f"{p}.ckpt") for p in (5, 10)}
    found["nan"] = with_nan(home, rank)
    found["zero"] = with_zero_weight(home)
    torch.save(found, home / f"rank{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    both(Path(sys.argv[1]))
