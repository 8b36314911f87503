"""When merging pays: seconds of an adapted layer's forward and backward pass, merged against two branches.

    python -m benchmarks.kernels --precision 32

For each shape and number of token rows both formulations run interleaved; a ratio is the median over rounds of
merged / two branches, so below 1 merging pays. `srlora_pl.lowrank.kernels.merging_pays` holds the rule.
"""

import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, whose folder holds a kernels.py that transformers would take for a package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.report import report
from srlora_pl.lowrank import kernels
from srlora_pl.util.system import device_name

SHAPES = [(768, 768), (3072, 768), (768, 3072), (384, 384), (1536, 384)]
ROWS = [32, 64, 128, 256, 384, 512, 1024, 2048]


def seconds(merge: bool, operands: dict[str, Any], upstream: torch.Tensor, autocast: Any) -> float:
    if upstream.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    x, weight, bias, A, B = (operands[name] for name in ("x", "weight", "bias", "A", "B"))
    with autocast():
        y = (kernels.merge_on_the_fly if merge else kernels.two_branches)(x, weight, bias, A, B, 1.0, None)
    torch.autograd.grad(y, [operands["x"], operands["A"], operands["B"]], upstream)
    if upstream.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def ratio(out: int, in_: int, rows: int, arguments: argparse.Namespace) -> float:
    device = torch.device(arguments.device)
    dtype = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}[arguments.precision]

    def autocast() -> Any:
        return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

    operands = {
        "x": torch.randn(rows, in_, device=device, requires_grad=True),
        "weight": torch.randn(out, in_, device=device),
        "bias": torch.randn(out, device=device),
        "A": torch.randn(arguments.rank, in_, device=device, requires_grad=True),
        "B": torch.randn(out, arguments.rank, device=device, requires_grad=True),
    }
    upstream = torch.randn(rows, out, device=device, dtype=dtype)
    found = []
    for i in range(-2, arguments.rounds):
        first, second = (seconds(merge, operands, upstream, autocast) for merge in (i % 2 == 0, i % 2 != 0))
        found += [first / second if i % 2 == 0 else second / first] if i >= 0 else []
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["32", "bf16", "16"], default="32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    found = {f"{out}x{in_}": {n: ratio(out, in_, n, arguments) for n in ROWS} for out, in_ in SHAPES}
    halves, device = arguments.precision != "32", torch.device(arguments.device)
    rows = [
        [
            shape,
            *(
                f"{value:.2f}{'*' * kernels.merging_pays(n, *map(int, shape.split('x')), halves, device)}"
                for n, value in each.items()
            ),
        ]
        for shape, each in found.items()
    ]
    name = device_name(device)
    title = f"merged / two branches by token rows (* the rule merges), precision {arguments.precision}, {name}"
    report(
        title,
        ["out x in", *map(str, ROWS)],
        rows,
        {
            "benchmark": "kernels",
            "arguments": vars(arguments),
            "device": name,
            "ratios": found,
        },
    )


if __name__ == "__main__":
    main()
