"""The last blocks of a pretrained transformer as a network of hidden features, and the features before them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModel

from srlora_pl.models.pretrained import resolve
from srlora_pl.models.timm_models import build_backbone


class LastBlocks(nn.Module):
    """Blocks, a norm and a new linear head: features (B, T, D) to features (B, T, D)."""

    def __init__(self, blocks: nn.ModuleList, norm: nn.Module, width: int) -> None:
        super().__init__()
        self.blocks, self.norm, self.head = blocks, norm, nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens))


@dataclass(frozen=True)
class Blocks:
    """`LastBlocks` as a `ModelFamily`, as far as training asks for one.

    Attributes:
        name: ``minilm``, or a vision transformer that `srlora_pl.ImageClassifier` takes.
        first: the number of the first block that is taken, from 0.
    """

    name: str
    first: int
    random = False
    weights = "float32"

    def build(self) -> tuple[LastBlocks, None]:
        if self.name == "minilm":
            blocks = AutoModel.from_pretrained(resolve(self.name)).encoder.layer[self.first :]
            return LastBlocks(
                blocks, nn.Identity(), blocks[0].output.dense.out_features
            ).train(), None  # norms are in it
        net = build_backbone(self.name, 2)
        return LastBlocks(nn.ModuleList(net.blocks[self.first :]), net.norm, net.embed_dim).train(), None

    def heads(self, net: nn.Module) -> tuple[str, ...]:
        return ("head",)


@torch.no_grad()
def image_tokens(net: nn.Module, image: Tensor, blocks: int) -> Tensor:
    """Features of images (B, 3, 64, 64) before block ``blocks`` of a vision transformer, (B, 17, D).

    The grid of 8 x 8 tokens is averaged to 4 x 4 before the last of the blocks that they pass.
    """
    tokens = net.blocks[: blocks - 1](net._pos_embed(net.patch_embed(image)))
    first, grid = tokens[:, :1], tokens[:, 1:]
    side = round(grid.shape[1] ** 0.5)
    grid = nn.functional.avg_pool2d(grid.transpose(1, 2).unflatten(2, (side, side)), 2).flatten(2).transpose(1, 2)
    return net.blocks[blocks - 1](torch.cat([first, grid], 1))
