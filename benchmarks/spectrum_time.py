"""Processor seconds for the leading singular triplets of one matrix: subspace iteration, and eigh of the Gram matrix.

python -m benchmarks.spectrum_time --shape 4096x14336 --count 32 128

On random matrices, whose flat spectra are the slowest, and on ones whose singular values fall like 1 / sqrt(i).
"""

import argparse
import sys
import time
from pathlib import Path

if not __package__:  # run as a file, whose folder holds a kernels.py that transformers would take for a package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from benchmarks.report import report
from srlora_pl.lowrank.method import generator_for
from srlora_pl.lowrank.starts import subspace
from srlora_pl.lowrank.starts.spectrum import _gram_svd
from srlora_pl.util.system import device_name


def matrix(out: int, in_: int, falling: bool) -> Tensor:
    """(out, in), float64."""
    W = torch.randn(out, in_, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if not falling:
        return W
    # A Gaussian's spectrum is nearly flat, so that this one's is nearly that of the factors.
    factors = torch.arange(1, min(out, in_) + 1, dtype=torch.float64).rsqrt()
    return W * factors if in_ < out else factors[:, None] * W


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["1536x576", "3072x3072", "4096x14336"])
    parser.add_argument("--count", nargs="+", type=int, default=[32, 128])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for shape in arguments.shape:
        out, in_ = map(int, shape.split("x"))
        for falling in (False, True):
            W = matrix(out, in_, falling)
            begin = time.process_time()
            sigma = _gram_svd(W, max(arguments.count))[1]
            exact = time.process_time() - begin
            for count in arguments.count:
                begin = time.process_time()
                found = subspace.leading(W, count, generator_for(shape, 0))
                ours = time.process_time() - begin
                error = float((found[1] / sigma[:count] - 1).abs().max()) if found else float("nan")
                rows.append([f"{shape} {'falling' if falling else 'flat'}", count, exact, ours, ours / exact, error])
                print(rows[-1], flush=True)
    report(
        f"One matrix, one core, float64, {device_name(torch.device('cpu'))}",
        ["matrix", "triplets", "eigh", "subspace", "ratio", "largest relative difference of a singular value"],
        rows,
        {"benchmark": "spectrum_time", "arguments": vars(arguments), "rows": rows},
    )


if __name__ == "__main__":
    main()
