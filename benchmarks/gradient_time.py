"""Seconds of LoRA-SB's start: its estimate of the gradients over plain backward passes, and its decomposition.

    python -m benchmarks.gradient_time --model vit_base_patch16_224 --batch 8 --passes 8

After every batch of the estimate, full fine-tuning and LoRA compute the loss of the same batch and its gradients
(forward and backward, no optimizer), each on a copy of the network. A ratio is the median over the batches of the
estimate's seconds over theirs; the first batch warms up and does not count.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run as a file, whose folder holds a kernels.py that transformers would take for a package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.report import report
from benchmarks.step_time import Batch, Variant, image_batches, method_of, network, timed
from srlora_pl.lowrank import Adaptation
from srlora_pl.lowrank.linear import Matrix
from srlora_pl.lowrank.starts.gradient import gradients
from srlora_pl.util.system import device_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm ViT or vit_tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--passes", type=int, default=8, help="batches that count")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    net, kind = network(arguments.model)
    batch = {name: value.to(device) for name, value in next(image_batches(net, arguments.batch))[0].items()}
    plain = [Variant(name, net, kind, device, "adamw") for name in ("full", "lora")]
    net = net.to(device)
    adaptation = Adaptation(net, method_of("lora_sb"), ["head"])
    seconds: dict[str, list[float]] = defaultdict(list)

    def losses(batch: Batch) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(net(batch["image"]), batch["label"], reduction="none")

    def batches() -> Iterator[Batch]:
        """The estimate runs while this waits at its yield."""
        for _ in range(1 + arguments.passes):
            with timed(seconds["estimate"], device):
                yield batch
            for variant in plain:
                with timed(seconds[variant.name], device):
                    variant.losses(batch).mean().backward()
                variant.optimizer.zero_grad()

    def decomposition(matrices: list[Matrix]) -> Iterator[Matrix]:
        with timed(seconds["decomposition"], device):
            yield from matrices

    adaptation.start(gradients(losses, batches(), lr=1e-3, progress=decomposition))
    passes = {name: seconds[name][1:] for name in ("estimate", "full", "lora")}
    ratios = {
        f"estimate_vs_{name}": statistics.median(
            own / other for own, other in zip(passes["estimate"], passes[name], strict=True)
        )
        for name in ("full", "lora")
    }
    medians = {name: statistics.median(each) for name, each in passes.items()}
    (decomposed,) = seconds["decomposition"]
    report(
        f"{arguments.model}, {arguments.passes} batches of {arguments.batch}, {device_name(device)}",
        ["", "seconds", "estimate / this"],
        [
            *([f"a pass, {name}", each, ratios.get(f"estimate_vs_{name}", 1.0)] for name, each in medians.items()),
            [f"decomposition of {len(adaptation.matrices)} matrices", decomposed, ""],
        ],
        {
            "benchmark": "gradient_time",
            "arguments": vars(arguments),
            "device": device_name(device),
            "ratios": ratios,
            "seconds": {**medians, "decomposition": decomposed},
        },
    )


if __name__ == "__main__":
    main()
