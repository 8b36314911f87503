"""Seconds of a switch over seconds of a training step, and the share of a run that switches take.

python -m benchmarks.switch_time --model vit_base_patch16_224 --batch 8
"""

import argparse
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path

if not __package__:  # run as a file, whose folder holds a kernels.py that transformers would take for a package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.report import report
from benchmarks.step_time import STEPS, Variant, image_batches, network, random_texts
from srlora_pl.util.system import device_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm ViT, vit_tiny or deberta-v3-base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    net, kind = network(arguments.model)
    batches = (
        image_batches(net, arguments.batch) if kind == "image" else random_texts(arguments.batch, arguments.length)
    )
    variant = Variant("srlora", net, kind, device, "adamw")
    batch = {name: value.to(device) for name, value in next(batches)[0].items()}
    switches: list[float] = []
    for _ in range(arguments.rounds):
        variant.timed_step(batch, nullcontext)
        variant.time_events()
        switches.append(variant.event_seconds)
    step, switch = statistics.median(variant.seconds[1:]), statistics.median(switches)
    share = switch / step * variant.events / STEPS[kind]
    report(
        f"{arguments.model}, batch {arguments.batch}, {device_name(device)}",
        ["step", "switch", "switch / step", "share of a run"],
        [[step, switch, switch / step, f"{share:.2%}"]],
        {
            "benchmark": "switch_time",
            "arguments": vars(arguments),
            "device": device_name(device),
            "ratios": {"switch_vs_step": switch / step, "share_of_run": share},
            "seconds": {"step": step, "switch": switch},
        },
    )


if __name__ == "__main__":
    main()
