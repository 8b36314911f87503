"""Memory of a training step by the kind of the frozen weights, in bf16-mixed.

    python -m benchmarks.bases --network smollm2
    python -m benchmarks.bases --network vit_base

Each variant, a method by the name of its overlay and a value of ``model.weights``, has a process of its own, which
builds the task and takes three steps. ``peak``: the most resident memory, less what it had once all was imported.
``weights``: the bytes of the frozen weights that products read. ``rest``: those of the bits that only a change of a
weight needs, which lie in the host's memory. On a CPU all of it is in ``peak``, and so is the start.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, whose folder holds a kernels.py that transformers would take for a package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.causal import equal_lengths, resident
from benchmarks.report import report
from benchmarks.step_time import method_of
from srlora_pl import CausalLM, ImageClassifier
from srlora_pl.lowrank.linear import AdaptedLinear
from srlora_pl.util.system import device_name

STEPS, RUN = 3, 1562
VARIANTS = ("lora float32", "lora bfloat16", "lora nf4", "srlora float32", "srlora bfloat16")


def task_and_batch(network: str, method: str, weights: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """The task in training mode, and a batch: 4 x 256 tokens, or 8 images."""
    torch.manual_seed(0)
    if network == "smollm2":
        return CausalLM("smollm2", method_of(method), weights=weights), equal_lengths(4, 256)
    task = ImageClassifier("vit_base_patch16_224", 100, method_of(method), {"pretrained": False}, weights=weights)
    return task, {"image": torch.randn(8, 3, 224, 224), "label": torch.arange(8)}


def measure(network: str, variant: str) -> None:
    """Print the bytes of one variant; the process does nothing else."""
    imported = resident("VmRSS")
    task, batch = task_and_batch(network, *variant.split())
    task.adaptation.start()
    task.adaptation.plan(RUN)
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-4)
    for step in range(1, STEPS + 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = task.training_loss(batch)
        loss.backward()
        task.adaptation.before_optimizer(step)
        optimizer.step()
        task.adaptation.after_optimizer(step, optimizer)
        optimizer.zero_grad()
    layers = [layer for layer in task.adaptation.layers.values() if isinstance(layer, AdaptedLinear)]
    rest = sum(layer.rest.nbytes for layer in layers if layer.rest is not None)
    weights = sum(p.nbytes for p in task.net.parameters() if not p.requires_grad)
    print(resident("VmHWM") - imported, weights, rest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=["smollm2", "vit_base"], required=True)
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--one", metavar="VARIANT", help="the process of a variant")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        measure(arguments.network, arguments.one)
        return
    found = {}
    for variant in arguments.variants:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.bases", "--network", arguments.network, "--one"]
        done = subprocess.run([*command, variant], capture_output=True, text=True, cwd=Path(__file__).parents[1])
        if done.returncode:
            raise SystemExit(done.stderr)
        found[variant] = [int(each) for each in done.stdout.split()]
    rows = [[variant, *(f"{size / 2**20:,.0f}" for size in sizes)] for variant, sizes in found.items()]
    result = {"benchmark": "bases", "arguments": vars(arguments), "device": device_name(torch.device("cpu"))}
    report(arguments.network, ["variant", "peak, MiB", "weights", "rest"], rows, {**result, "bytes": found})


if __name__ == "__main__":
    main()
