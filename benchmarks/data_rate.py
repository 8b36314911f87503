"""Seconds of a training batch's data, from stored images to the model's input, over seconds of the model's step.

    python -m benchmarks.data_rate --model vit_base_patch16_224 --batch 8
    python -m benchmarks.data_rate --root my_images/

By default the data are the shipped digits: images in memory, cropped, resized and normalised in batches on the model's
device. With ``--root`` a folder of image files: decoded, cropped and resized one by one, here in this process, which a
worker would do beside the model. The step is that of ``benchmarks/step_time.py``.
"""

import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if not __package__:  # run as a file, whose folder holds a kernels.py that transformers would take for a package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import timm
import torch

from benchmarks.report import report
from benchmarks.step_time import Variant, network
from srlora_pl import ImageData
from srlora_pl.util.system import device_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm ViT or vit_tiny")
    parser.add_argument("--root", help="a folder with a folder of images per class")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    net, kind = network(arguments.model)
    settings = timm.data.resolve_model_data_config(net)
    settings["input_size"] = (3, *net.patch_embed.img_size)  # type: ignore[union-attr,misc]
    source = {"root": arguments.root} if arguments.root else {"name": "digits"}
    data = ImageData(batch_size=arguments.batch, **source)
    trainer: Any = SimpleNamespace(lightning_module=SimpleNamespace(data_config=settings, num_classes=data.num_classes))
    data.trainer = trainer
    data.load("fit")
    data.trainer = None
    assert data.train_set is not None
    variant = Variant("srlora", net, kind, device, "sgd")
    order = torch.randperm(len(data.train_set), generator=torch.Generator().manual_seed(0))
    seconds: list[float] = []
    for round_, rows in zip(range(-1, arguments.rounds), order.split(arguments.batch), strict=False):
        begin = time.perf_counter()
        batch = data.train_set.__getitems__([(int(row), 0) for row in rows])
        batch = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
        batch = data.on_after_batch_transfer(batch, 0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if round_ >= 0:
            seconds.append(time.perf_counter() - begin)
            variant.timed_step(batch, nullcontext)
        else:
            variant.step(batch, nullcontext)
    data_s, step_s = statistics.median(seconds), statistics.median(variant.seconds)
    report(
        f"{arguments.model}, batch {arguments.batch}, {arguments.root or 'digits'}, {device_name(device)}",
        ["", "s a batch", "images / s"],
        [["data", data_s, arguments.batch / data_s], ["model's step", step_s, arguments.batch / step_s]],
        {
            "benchmark": "data_rate",
            "arguments": vars(arguments),
            "device": device_name(device),
            "ratios": {"data_vs_step": data_s / step_s},
            "seconds": {"data": data_s, "step": step_s},
        },
    )


if __name__ == "__main__":
    main()
