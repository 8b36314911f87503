"""A network and images of a few kilobytes, in the form that the image task meets them."""

from typing import Any

import torch
from torch import Tensor

SMALL_VIT: dict[str, Any] = {
    "pretrained": False,
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
}
CLASSES = 7


def samples(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return [{"image": images[i], "label": labels[i], "index": torch.tensor(i)} for i in range(count)]
