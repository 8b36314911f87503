"""Seconds of an epoch through the command line, against the same task with PEFT's LoRA under the Hugging Face Trainer.

    python -m benchmarks.epoch --task cola --data ../shared/data/glue --steps 60
    python -m benchmarks.epoch --task cifar100 --data ../shared/data/cifar100 --steps 60

CoLA with MiniLM: ours in length buckets, and padded to 128; theirs padded to the longest of each batch, and to 128.
CIFAR-100 with the shipped small ViT at 64 px: ours augments batches of images; theirs image by image with torchvision
(the same crop, size and flip). Same rank, optimizer, batch, precision and data; no validation. Loading and start are
left out: the clock runs from the second optimizer step to the last, and an epoch is extrapolated from the steps done.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, whose folder holds a kernels.py that transformers would take for a package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import timm
import torch
import yaml
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from torchvision.transforms import v2
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from benchmarks.clock import CLOCK, TheirClock
from benchmarks.report import report
from srlora_pl import GLUEData
from srlora_pl.cli import main as srlora
from srlora_pl.models.pretrained import resolve
from srlora_pl.models.timm_models import ASSETS
from srlora_pl.util.system import device_name

BATCH = {"cola": 32, "cifar100": 64}
SAMPLES = {"cola": 8551, "cifar100": 50_000}


def timed(work: Callable[[], object]) -> float:
    CLOCK.times.clear()
    work()
    return CLOCK.seconds_per_step


def ours(task: str, data: str, steps: int, method: str, home: Path, *options: str) -> None:
    config = {"cola": "configs/minilm_cola_srlora.yaml", "cifar100": "configs/vit_tiny_cifar100_srlora.yaml"}[task]
    extra = home / "clock.yaml"
    extra.write_text(yaml.safe_dump({"trainer": {"callbacks": [{"class_path": "benchmarks.clock.LightningClock"}]}}))
    # Few steps must not hold the switches of a whole run: one switch, as in 1 of some 100 steps.
    srlora_only, lora_only = ["--model.method.target_rank", "16"], ["--config", f"configs/methods/{method}.yaml"]
    overlay = srlora_only if method == "srlora" else lora_only
    columns = ["--data.image_column", "img", "--data.label_column", "fine_label", "--data.name", "null"]
    code = srlora([
        "fit", "--config", config, *overlay, "--config", str(extra),
        "--data.root", data, *(columns if task == "cifar100" else []),
        "--data.val_fraction", "0", "--model.warmup_steps", "1",
        "--trainer.max_epochs", "-1", "--trainer.max_steps", str(steps),
        "--trainer.limit_val_batches", "0", "--trainer.limit_test_batches", "0",
        "--trainer.enable_checkpointing", "false", "--trainer.enable_progress_bar", "false",
        "--trainer.enable_model_summary", "false", "--trainer.default_root_dir", str(home),
        *options,
    ])  # fmt: skip
    if code:
        sys.exit(code)


def theirs(model: nn.Module, dataset: Any, collate: Any, task: str, steps: int, home: Path) -> None:
    arguments = TrainingArguments(
        str(home / "trainer"),
        per_device_train_batch_size=BATCH[task],
        max_steps=steps,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        warmup_steps=1,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    Trainer(model, arguments, train_dataset=dataset, data_collator=collate, callbacks=[TheirClock()]).train()


def their_text(data: str, steps: int, pad: str, home: Path) -> None:
    source = resolve("minilm")
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = GLUEData("cola", data).read("train")
    assert texts.labels is not None
    kept = tokenizer(list(texts.first), truncation=True, max_length=128, padding=pad == "128" and "max_length")
    rows = [
        {**{key: kept[key][i] for key in kept}, "labels": int(label)} for i, label in enumerate(texts.labels.tolist())
    ]
    net = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
    linears = r".*layer\.\d+\..*(query|key|value|dense)"
    config = LoraConfig(r=8, lora_alpha=8, target_modules=linears, task_type="SEQ_CLS", modules_to_save=["pooler"])
    theirs(get_peft_model(net, config), rows, DataCollatorWithPadding(tokenizer), "cola", steps, home)


class Classifier(nn.Module):
    """A timm network as the Hugging Face Trainer wants a model."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.net(image)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def their_images(data: str, steps: int, home: Path) -> None:
    net = timm.create_model(f"local-dir:{ASSETS / 'vit_tiny_in64'}", pretrained=True, num_classes=100)
    config = LoraConfig(
        r=8, lora_alpha=8, target_modules=r".*blocks\.\d+\..*(qkv|proj|fc1|fc2)", modules_to_save=["head"]
    )
    settings = timm.data.resolve_model_data_config(net)
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(settings["input_size"][1:], (0.08, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(settings["mean"], settings["std"]),
        ]
    )

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = torch.stack([transform(row["img"].convert("RGB")) for row in rows])
        return {"image": images, "labels": torch.tensor([row["fine_label"] for row in rows])}

    dataset = load_dataset(data, split="train")
    theirs(get_peft_model(Classifier(net), config), dataset, collate, "cifar100", steps, home)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(BATCH), default="cola")
    parser.add_argument("--data", required=True, help="GLUE's folder, or CIFAR-100 as datasets.load_dataset takes it")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    task, data, steps = arguments.task, arguments.data, arguments.steps
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for method in ("srlora", "lora"):
            seconds[method] = timed(lambda method=method: ours(task, data, steps, method, home))  # type: ignore[misc]
        if task == "cola":
            padded = ("--data.pad_to_max_length", "true")
            seconds["srlora, padded to 128"] = timed(lambda: ours(task, data, steps, "srlora", home, *padded))
            seconds["PEFT, padded to the longest"] = timed(lambda: their_text(data, steps, "longest", home))
            seconds["PEFT, padded to 128"] = timed(lambda: their_text(data, steps, "128", home))
        else:
            seconds["PEFT"] = timed(lambda: their_images(data, steps, home))
    per_epoch = -(-SAMPLES[task] // BATCH[task])
    rows = [[name, value, value * per_epoch, seconds["srlora"] / value] for name, value in seconds.items()]
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    ratios = {f"srlora_vs_{name}": seconds["srlora"] / value for name, value in seconds.items() if name != "srlora"}
    report(
        f"{task}, batch {BATCH[task]}, {device}",
        ["", "s a step", "s an epoch", "srlora / this"],
        rows,
        {
            "benchmark": "epoch",
            "arguments": vars(arguments),
            "device": device,
            "ratios": ratios,
            "seconds": seconds,
        },
    )


if __name__ == "__main__":
    main()
