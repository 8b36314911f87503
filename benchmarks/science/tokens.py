"""Masked tokens: part of a pretrained transformer learns to restore hidden features that it is not shown.

Every token but the first is left out with probability 1/2 and replaced by the mean of its position. The network's last
blocks restore the standardised target of each left-out token; the loss is their mean squared error, so that 1 is what a
prediction of the mean gives. `benchmarks.science.prepare` writes the features to a file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torchmetrics import MeanMetric

from benchmarks.science.networks import Blocks
from srlora_pl.data.base import DataModule, KeyedDataset, split_keys
from srlora_pl.data.loader import Key
from srlora_pl.data.protocols import Batch
from srlora_pl.lowrank import Method
from srlora_pl.tasks.base import Task
from srlora_pl.util.errors import UserError
from srlora_pl.util.randomness import derive, run_seed, uniform
from srlora_pl.util.signatures import arguments_of

_MASKS = int.from_bytes(b"masks")
_SHARE = 0.5  # of the tokens that are left out


class MaskedTokens(Task):
    """The last blocks of a network, its norm and a new linear head, trained to restore what is left out.

    Logs ``loss`` and ``score``, which is 1 - loss, the share of the variance that is explained.

    Args:
        backbone: see `LastBlocks`.
        method: adapts the blocks.
        first_block: from which one on they are there; the features are those before it.
        kwargs: the other arguments of `Task`.
    """

    def __init__(self, backbone: str, method: Method, first_block: int = 4, **kwargs: Any) -> None:
        arguments = arguments_of(locals())
        super().__init__(method, **kwargs)
        self.evaluation = Restoration()
        self.build(Blocks(backbone, first_block), arguments)

    def logits(self, batch: Batch) -> Tensor:
        return self.net(batch["tokens"])

    def training_loss(self, batch: Batch) -> Tensor:
        error, count = self.error(batch)
        return error.sum() / count.sum()

    trial_loss = training_loss

    def error(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The squared errors of each sample's left-out tokens, added up, and how many these are, both (B,)."""
        error = (self.logits(batch) - batch["target"]).square().mean(-1)
        return (error * batch["masked"]).sum(1), batch["masked"].sum(1)

    def samples_in(self, batch: Batch) -> int:
        return len(batch["tokens"])


class Restoration:
    """The loss of a whole split, an `Evaluation`."""

    names = ("loss", "score")

    def __init__(self) -> None:
        self.mean = MeanMetric()

    def reset(self, split: str) -> None:
        self.mean.reset()

    def update(self, task: MaskedTokens, split: str, batch: Batch) -> None:
        error, count = task.error(batch)
        self.mean.update(error.cpu() / count.cpu(), count.cpu())

    def compute(self, split: str) -> dict[str, Tensor]:
        loss = self.mean.compute()
        return {"loss": loss, "score": 1 - loss}

    def remark(self, split: str, class_names: Sequence[str]) -> None:
        return None


class TokenData(DataModule):
    """The features in a file of `benchmarks.science.prepare`.

    Batches have ``tokens``, float (B, T, D), with the mean of its position in place of each left-out token; ``masked``,
    bool (B, T); ``target``, the features, or what the file has for them, minus the mean of their position, in units of
    their dimension's standard deviation, float (B, T, D). Means and deviations are those of every tenth window.

    Args:
        file: see above.
        kwargs: see `DataModule`.
    """

    num_classes, class_names, kind = 0, [], "sequence"  # type: ignore[assignment]

    def __init__(self, file: str, batch_size: int = 32, **kwargs: Any) -> None:
        super().__init__(batch_size=batch_size, **kwargs)
        if not Path(file).is_file():
            raise UserError(f"data.file {file} is no file: write it with python -m benchmarks.science.prepare")
        self.features = load_file(file)
        self.mean = _some(self.features["train"]).mean((0, 1))
        targets = _some(self.targets("train"))
        self.target_mean = targets.mean((0, 1))
        self.deviation = (targets - self.target_mean).square().mean((0, 1, 2)).sqrt()

    def targets(self, split: str) -> Tensor:
        """What is restored, ([views,] n, T, D)."""
        return self.features.get(f"{split}_targets", self.features[split])

    def splits(self, use: str) -> list[str]:
        return [use] if use in self.features else []

    def dataset(self, split: str, rows: Tensor | None, use: str) -> KeyedDataset:
        features, targets = self.features[split], self.targets(split)
        if split == "test":  # of which there is one view
            features, targets = features[None], targets[None]
        return _Windows(self, features, targets, torch.arange(features.shape[1]) if rows is None else rows)


def _some(features: Tensor) -> Tensor:
    """Every tenth window, from which means and deviations are known well and soon."""
    return features[:, ::10].float()


class _Windows(KeyedDataset):
    """Windows (views, n, T, D): in training a random view and mask, elsewhere the first view and fixed masks."""

    def __init__(self, data: TokenData, features: Tensor, targets: Tensor, rows: Tensor) -> None:
        self.data, self.features, self.all_targets, self.rows = data, features, targets, rows

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        index, epochs = split_keys(keys)
        views, _, length, _ = self.features.shape
        seed = 0 if epochs is None else derive(run_seed(), _MASKS)
        drawn = uniform(seed, torch.tensor(keys).view(len(keys), -1), length + 1)
        chosen = (0 if epochs is None else (drawn[:, 0] * views).long()), self.rows[index]
        masked = drawn[:, 1:] < _SHARE
        masked[:, 0] = False
        tokens = torch.where(masked[..., None], self.data.mean, self.features[chosen].float())
        target = (self.all_targets[chosen].float() - self.data.target_mean) / self.data.deviation
        return self.labelled(index, tokens=tokens, masked=masked, target=target)
