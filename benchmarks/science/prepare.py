"""Write the hidden features that `benchmarks.science.tokens` restores, from data and a pretrained network.

    python -m benchmarks.science.prepare cifar100 --data data/cifar100 --output runs/science/cifar100.safetensors
    python -m benchmarks.science.prepare mnist --data data/mnist --output runs/science/mnist.safetensors
    python -m benchmarks.science.prepare pixels --data data/cifar100 --output runs/science/pixels.safetensors
    python -m benchmarks.science.prepare text --data data/glue --output runs/science/text.safetensors

Images: 16,000 of the training split and their mirror images (not of MNIST), and 2,000 of the test split, at 64 px
through the first four of six blocks of the shipped small ViT. Pixels: the same images of CIFAR-100 at 32 px, as the
patches that the small ViT begins with; the pixels of each are what is restored. Text: windows of 16 tokens of the
sentences of QNLI, cut from one long text, through the first four of six blocks of MiniLM; those of the test come from
its dev split.
"""

import argparse
import csv
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from benchmarks.science.networks import image_tokens
from srlora_pl import ImageData
from srlora_pl.data.images.transforms import ImageTransform
from srlora_pl.models.pretrained import resolve
from srlora_pl.models.timm_models import build_backbone, data_config

BLOCKS, TRAIN, TEST, WINDOW = 4, 16_000, 2_000, 16


def in_parts(compute: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    return torch.cat([compute(part).half() for part in inputs.split(250)])


def pictures(name: str, root: str, net: Any, size: int) -> tuple[Tensor, Tensor]:
    """The first images of the training and the test split without augmentation, (n, 3, size, size) each."""
    columns = {"image_column": "img", "label_column": "fine_label"} if name == "cifar100" else {}
    data = ImageData(None if columns else name, root, **columns)
    settings = data_config(net) | {"input_size": (3, size, size)}
    data.transform = ImageTransform.for_model(settings, **data.options)

    def of(split: str, count: int) -> Tensor:
        found = data.dataset(split, torch.arange(count), "val")
        batches = (found.__getitems__(keys.tolist()) for keys in torch.arange(count).split(500))
        return torch.cat([data.on_after_batch_transfer(batch, 0)["image"] for batch in batches])

    return of("train", TRAIN), of("test", TEST)


def images(name: str, root: str) -> dict[str, Tensor]:
    """Features before the last two blocks: ``train`` (views, n, 17, D) and ``test`` (n, 17, D)."""
    net = build_backbone("vit_tiny_in64", 2).eval()
    train, test = pictures(name, root, net, 64)
    views = [train, train.flip(-1)] if name == "cifar100" else [train]  # a mirrored digit is none
    features = partial(in_parts, lambda part: image_tokens(net, part, BLOCKS))
    return {"train": torch.stack([features(view) for view in views]), "test": features(test)}


@torch.no_grad()
def pixels(root: str) -> dict[str, Tensor]:
    """Embedded patches, ``train`` (2, n, 17, D) and ``test`` (n, 17, D), and their pixels as ``SPLIT_targets``."""
    net: Any = build_backbone("vit_tiny_in64", 2, {"img_size": 32}).eval()
    train, test = pictures("cifar100", root, net, 32)

    def patches(image: Tensor) -> Tensor:
        """The pixels of each patch, behind zeros for the class token, (B, 17, 3 * 8 * 8)."""
        return nn.functional.pad(nn.functional.unfold(image, 8, stride=8).transpose(1, 2), (0, 0, 1, 0))

    found: dict[str, Tensor] = {}
    for key, compute in (("", lambda image: net._pos_embed(net.patch_embed(image))), ("_targets", patches)):
        found[f"train{key}"] = torch.stack([in_parts(compute, view) for view in (train, train.flip(-1))])
        found[f"test{key}"] = in_parts(compute, test)
    return found


@torch.no_grad()
def text(root: str) -> dict[str, Tensor]:
    """Features before the last two layers of MiniLM: ``train`` (1, n, 16, D) and ``test`` (n, 16, D)."""
    folder = resolve("minilm")
    tokenizer, net = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    net.encoder.layer = net.encoder.layer[:BLOCKS]

    def features(file: str, count: int) -> Tensor:
        with Path(root, "QNLI", file).open(encoding="utf-8", newline="") as lines:
            sentences = [row["sentence"] for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)]
        tokens = tokenizer(sentences, add_special_tokens=False, verbose=False)["input_ids"]
        ids = torch.tensor([token for sentence in dict.fromkeys(map(tuple, tokens)) for token in sentence])
        windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)[:count]
        return in_parts(lambda part: net(part).last_hidden_state, windows)

    return {"train": features("train_subset.tsv", TRAIN)[None], "test": features("dev.tsv", TEST)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("cifar100", "mnist", "pixels", "text"))
    parser.add_argument("--data", required=True, help="the folder of the data set")
    parser.add_argument("--output", required=True, type=Path, help="the file to write")
    given = parser.parse_args()
    own = {"text": text, "pixels": pixels}
    features = own[given.task](given.data) if given.task in own else images(given.task, given.data)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: each.contiguous() for name, each in features.items()}, given.output)
    print({name: tuple(each.shape) for name, each in features.items()})


if __name__ == "__main__":
    main()
