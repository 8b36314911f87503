"""Seconds until training can start: our singular directions, cold and from the cache, and PEFT's PiSSA.

python -m benchmarks.start_time --model vit_base_patch16_224 --target-rank 128
"""

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a file, whose folder holds a kernels.py that transformers would take for a package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import timm
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from benchmarks.report import report
from srlora_pl.lowrank import Adaptation, SRLoRA
from srlora_pl.lowrank.starts.spectrum import spectra
from srlora_pl.util.system import device_name


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm ViT")
    parser.add_argument("--target-rank", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--without-peft", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    net = timm.create_model(arguments.model).to(device)

    def adapted(net: nn.Module) -> Adaptation:
        return Adaptation(net, SRLoRA(rank=8, target_rank=arguments.target_rank), ["head"])

    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "cached"):
            adaptation = adapted(copy.deepcopy(net))
            result[name] = seconds(lambda ours=adaptation: ours.start(spectra(cache=Path(cache))))  # type: ignore[misc]
    found = adaptation.controller.spectra.values()
    kept = sum(part.nbytes for each in found for part in (each.U, each.sigma, each.Vh))
    if not arguments.without_peft:
        config = LoraConfig(
            r=8, lora_alpha=8, init_lora_weights="pissa", target_modules=r"blocks\.\d+\..*(qkv|proj|fc1|fc2)"
        )
        result["peft"] = seconds(lambda: inject_adapter_in_model(config, copy.deepcopy(net)))
    rows = [[name, value] for name, value in result.items()]
    title = (
        f"{arguments.model}, target_rank {arguments.target_rank}, {kept / 2**20:.0f} MiB kept, {device_name(device)}"
    )
    ratios = {f"{name}_vs_peft": result[name] / result["peft"] for name in ("cold", "cached") if "peft" in result}
    report(
        title,
        ["start", "seconds"],
        rows,
        {
            "benchmark": "start_time",
            "arguments": vars(arguments),
            "device": device_name(device),
            "ratios": ratios,
            "seconds": result,
            "memory": {"kept": kept},
        },
    )


if __name__ == "__main__":
    main()
