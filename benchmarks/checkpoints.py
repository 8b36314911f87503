"""Size of checkpoints and time to write them, compact against whole.

    python -m benchmarks.checkpoints --model vit_base_patch16_224 --target-ranks 16 512

The backbone has random weights, written to a folder first so that a compact checkpoint may leave them out. A run of as
few steps as its switches need trains it with AdamW on batches of one sample; the file is that of its last step.
"""

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, whose folder holds a kernels.py that transformers would take for a package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import lightning as L
import timm
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, DebertaV2Config

from benchmarks.models import DEBERTA_V3_BASE
from benchmarks.report import report
from srlora_pl import ImageClassifier, SRLoRA, TextClassifier
from srlora_pl.tasks.base import Task
from srlora_pl.training.checkpoints import AtomicCheckpointIO
from srlora_pl.util.system import device_name


def backbone(model: str, folder: Path) -> None:
    if model == "deberta-v3-base":
        AutoModelForSequenceClassification.from_config(DebertaV2Config(**DEBERTA_V3_BASE)).save_pretrained(folder)
    else:
        timm.models.save_for_hf(timm.create_model(model), folder, safe_serialization=True)


def task(model: str, folder: Path, method: SRLoRA) -> tuple[Task, dict[str, torch.Tensor]]:
    label = torch.zeros(1, dtype=torch.int64)
    if model == "deberta-v3-base":
        ids = torch.randint(1000, 2000, (1, 8))
        return TextClassifier(str(folder), 2, method), {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "label": label,
        }
    module = ImageClassifier(str(folder), 100, method)
    return module, {"image": torch.randn(1, *module.data_config["input_size"]), "label": label}


def measure(model: str, folder: Path, target_rank: int, accelerator: str) -> dict[str, Any]:
    torch.manual_seed(0)
    method = SRLoRA(rank=8, target_rank=target_rank)
    module, batch = task(model, folder, method)
    switches = (target_rank - 8) // 4
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        max_steps=max(switches, 2),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
    )
    trainer.fit(module, DataLoader([batch] * max(switches, 2), batch_size=None))
    result: dict[str, Any] = {"switches": module.adaptation.controller.progress().done}
    for kind in ("compact", "full"):
        module.whole_checkpoints = kind == "full"
        file = folder / f"{kind}.ckpt"
        begin = time.perf_counter()
        trainer.save_checkpoint(file)
        result[kind] = {"MiB": file.stat().st_size / 2**20, "seconds": time.perf_counter() - begin}
        file.unlink()
    result["trained MiB"] = sum(p.numel() for p in module.parameters() if p.requires_grad) * 4 / 2**20
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm model, or deberta-v3-base")
    parser.add_argument("--target-ranks", type=int, nargs="+", default=[16, 512])
    parser.add_argument("--accelerator", default="auto")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as home:
        backbone(arguments.model, Path(home))
        results = {
            rank: measure(arguments.model, Path(home), rank, arguments.accelerator) for rank in arguments.target_ranks
        }
    rows = [
        [rank, r["switches"], *(r[kind][what] for kind in ("compact", "full") for what in ("MiB", "seconds"))]
        for rank, r in results.items()
    ]
    header = ["target_rank", "switches", "compact MiB", "s", "full MiB", "s"]
    device = device_name(
        torch.device("cpu" if arguments.accelerator == "cpu" else "cuda" if torch.cuda.is_available() else "cpu")
    )
    report(
        f"checkpoints of {arguments.model}, AdamW, {device}",
        header,
        rows,
        {"benchmark": "checkpoints", "results": results},
    )


if __name__ == "__main__":
    main()
