"""Training speed with length buckets against padding to the maximum length.

    python -m benchmarks.padding --root ../shared/data/glue --tasks cola qnli --steps 12

Both ways train the same model on batches of the same size, interleaved batch by batch in one process. A token counts
where it is text, so padding only costs time.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, whose folder holds a kernels.py that transformers would take for a package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.report import report
from benchmarks.texts import glue_batches
from srlora_pl import SRLoRA, TextClassifier
from srlora_pl.util.system import device_name


def step(module: TextClassifier, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> float:
    device = module.device
    batch = {name: value.to(device) for name, value in batch.items()}
    begin = time.perf_counter()
    module.training_loss(batch).backward()
    module.adaptation.before_optimizer(1)
    optimizer.step()
    optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(task: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, float]:
    torch.manual_seed(0)
    method = SRLoRA(rank=8, target_rank=32)
    module = TextClassifier(arguments.backbone, 2, method).to(device)
    module.adaptation.start()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)
    ways = {
        way: glue_batches(task, arguments.root, module.backbone_name, arguments.batch, arguments.steps, way == "padded")
        for way in ("buckets", "padded")
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for way in ways:
        step(module, optimizer, ways[way][0])
    for i in range(arguments.steps):
        for way in ways:
            seconds[way].append(step(module, optimizer, ways[way][i]))
    tokens = {way: sum(int(b["attention_mask"].sum()) for b in ways[way]) for way in ways}
    speed = {way: tokens[way] / sum(seconds[way]) for way in ways}
    filled = tokens["padded"] / sum(b["attention_mask"].numel() for b in ways["padded"])
    return {
        **speed,
        "ratio": speed["buckets"] / speed["padded"],
        "filled": filled,
        "lengths": len({b["input_ids"].shape[1] for b in ways["buckets"]}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="nyu-mll/glue")
    parser.add_argument("--tasks", nargs="+", default=["cola", "qnli"])
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    results = {task: measure(task, arguments, device) for task in arguments.tasks}
    rows = [
        [task, r["buckets"], r["padded"], r["ratio"], f"{r['filled']:.0%}", r["lengths"]] for task, r in results.items()
    ]
    header = ["task", "tokens/s buckets", "tokens/s padded to 128", "ratio", "text in padded", "lengths seen"]
    report(
        f"{arguments.backbone}, batch {arguments.batch}, {device_name(device)}",
        header,
        rows,
        {
            "benchmark": "padding",
            "device": device_name(device),
            "ratios": {task: r["ratio"] for task, r in results.items()},
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
