"""How a task scores a split: the protocol, and scores of logits."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from srlora_pl.data.protocols import Batch
from srlora_pl.tasks.scores import OneClass, ScoreOfAll

_ONE_CLASS = "one_class"  # among the metrics, but no score


class Evaluation(Protocol):
    """Scores of whole splits. A split is reset, updated with each of its batches and computed, in every process."""

    @property
    def names(self) -> Sequence[str]:
        """The names of the scores, without the split; ``loss`` and ``score`` (the main one again) are among them."""

    def reset(self, split: str) -> None:
        """Begin to score ``split``."""

    def update(self, task: Any, split: str, batch: Batch) -> None:
        """Add a batch of ``split``, with the outputs and losses that ``task`` computes of it."""

    def compute(self, split: str) -> dict[str, Tensor]:
        """The scores by name, the same in every process; each process has called `reset`, one at least `update`."""

    def remark(self, split: str, class_names: Sequence[str]) -> str | None:
        """What a user should know of the scores computed last, if anything."""


class LogitScores(nn.Module):
    """Metrics of logits and labels, and the mean loss.

    Each metric takes from ``preds`` (the task's `scored` logits), ``target`` and ``value`` (the losses) what its own
    ``update`` names.

    Args:
        scores: the metrics by name.
        main: the name of the one that is also logged as ``score``.
    """

    def __init__(self, scores: dict[str, Metric], main: str) -> None:
        super().__init__()
        self.main = main
        # Groups would be found by equal values in the first batch, which may be a coincidence.
        mean, one_class = ScoreOfAll(torch.mean, "value"), OneClass()
        self._fresh = MetricCollection({"loss": mean, **scores, _ONE_CLASS: one_class}, compute_groups=False)
        self._splits: dict[str, MetricCollection] = {}
        self._one_class: dict[str, Tensor] = {}

    @property
    def names(self) -> list[str]:
        return [*(str(name) for name in self._fresh if name != _ONE_CLASS), "score"]

    def reset(self, split: str) -> None:
        self._splits[split] = self._fresh.clone()
        self._one_class.pop(split, None)

    def update(self, task: Any, split: str, batch: Batch) -> None:
        logits, label = task.logits(batch), batch["label"]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self._splits[split].update(preds=task.scored(logits), target=label, value=task.losses(logits, label))

    def compute(self, split: str) -> dict[str, Tensor]:
        values = self._splits.pop(split).compute()
        self._one_class[split] = values.pop(_ONE_CLASS)
        return {**values, "score": values[self.main]}

    def remark(self, split: str, class_names: Sequence[str]) -> str | None:
        """Says that every sample got the same class."""
        place, count = self._one_class.get(split, torch.tensor([-1, 0])).tolist()
        if place < 0:
            return None
        name = str(class_names[place]) if class_names else str(place)
        return (
            f"All {count} predictions on {split} are class {name!r}: the model does not tell the classes apart yet; "
            "train longer, or try another model.lr."
        )
