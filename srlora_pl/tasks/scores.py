"""Scores over whole splits; those of text tasks equal scikit-learn's and SciPy's.

torchmetrics gives other values on one-class or constant input, and its streaming Pearson works in float32.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MultilabelExactMatch, MultilabelF1Score
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from srlora_pl.util.errors import require, require_one_of
from srlora_pl.util.precision import float64_device


def _exactly(formula: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """``formula`` of ``values`` in float64, on their device; rounded to float32 where that has nothing wider."""
    device = values[0].device
    able = float64_device(device)
    result = formula(*(each.to(able).double() for each in values))
    return result if able == device else result.float().to(device)


class ScoreOfAll(Metric):
    """A ``formula`` of all values of a split, float64 (n,) each, so that it does not matter how the batches were cut.

    `update` takes the values by their ``names``, float (B,), and keeps them until the end: ranks need them all.
    """

    full_state_update = False

    def __init__(self, formula: Callable[..., Tensor], *names: str) -> None:
        super().__init__(dist_sync_fn=_gather)
        self.formula, self.names = formula, names
        for name in names:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, **values: Tensor) -> None:
        for name in self.names:
            getattr(self, name).append(values[name])

    def compute(self) -> Tensor:
        return _exactly(self.formula, *(dim_zero_cat(getattr(self, name)) for name in self.names))


def _gather(values: Tensor, group: Any = None) -> list[Tensor]:
    """The ``values`` of each rank; in float64, so that one without any sends the same type as the others."""
    return gather_all_tensors(values.double(), group)


class ConfusionScore(Metric):
    """A ``formula`` of the confusion matrix, which is counted in integers.

    ``formula`` takes the counts as float64 (classes, classes), rows by label, columns by prediction. `update` takes
    ``preds``, logits (B, classes), and ``target``, int64 (B,).
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, formula: Callable[[Tensor], Tensor], num_classes: int) -> None:
        super().__init__()
        self.formula, self.num_classes = formula, num_classes
        self.add_state("counts", torch.zeros(num_classes**2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        # bincount would wait for the device in every batch
        cell = target * self.num_classes + preds.argmax(-1)
        self.counts = self.counts.scatter_add(0, cell, torch.ones_like(cell))

    def compute(self) -> Tensor:
        return _exactly(self.formula, self.counts.view(self.num_classes, self.num_classes))


class OneClass(Metric):
    """The class that all predictions are, and how many they are, int64 (2,).

    -1 for the class where predictions differ, or labels do not either. `update` takes ``preds``, logits (B, classes),
    and ``target``, int64 (B,); numbers and several labels a sample are passed over.
    """

    full_state_update = False
    low: Tensor
    high: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Of predictions and of labels: all there is to know, for any number of classes.
        self.add_state("low", torch.full((2,), torch.iinfo(torch.int64).max), dist_reduce_fx="min")
        self.add_state("high", torch.full((2,), -1), dist_reduce_fx="max")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        if preds.ndim == 2 and target.ndim == 1:
            both = torch.stack([preds.argmax(-1), target])
            self.low, self.high = torch.minimum(self.low, both.amin(1)), torch.maximum(self.high, both.amax(1))
            self.count = self.count + both.shape[1]

    def compute(self) -> Tensor:
        predictions, labels = (self.low == self.high).unbind()
        return torch.stack([torch.where(predictions & ~labels, self.low[0], -1), self.count])


def accuracy(counts: Tensor) -> Tensor:
    """The share of right predictions."""
    return counts.trace() / counts.sum()


def f1(counts: Tensor) -> Tensor:
    """Of two classes the F1 of the second, as GLUE has it; of more the mean over those that occur.

    0 where a class has no true positive, also where it is in neither labels nor predictions.
    """
    occurrences = counts.sum(0) + counts.sum(1)
    each = 2 * counts.diagonal() / occurrences.clamp(min=1)
    return each[1] if len(each) == 2 else each[occurrences > 0].mean()


def matthews(counts: Tensor) -> Tensor:
    """Matthews' correlation of any number of classes (Gorodkin 2004).

    0, no better than chance, where labels or predictions are all of one class and the formula is 0 / 0.
    """
    truth, said, n = counts.sum(1), counts.sum(0), counts.sum()
    spread = (n**2 - truth @ truth) * (n**2 - said @ said)
    covariance = counts.trace() * n - truth @ said
    return covariance / spread.sqrt() if spread > 0 else torch.zeros_like(spread)


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation; NaN where either side is constant: it is undefined there, and 0 would be a claim."""
    if (x == x[0]).all() or (y == y[0]).all():
        return x.new_tensor(torch.nan)
    x, y = x - x.mean(), y - y.mean()
    return ((x / x.norm()) @ (y / y.norm())).clamp(-1, 1)


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's correlation, Pearson's of the ranks; NaN where either side is constant."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(x: Tensor) -> Tensor:
    """Ranks from 1, ties share their mean."""
    _, place, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[place].double()


_CLASSES: dict[str, Callable[[int], Metric]] = {
    formula.__name__: partial(ConfusionScore, formula) for formula in (accuracy, f1, matthews)
}
# validate_args would look at the values, and so wait for the device, in every batch.
_LABELS: dict[str, Callable[[int], Metric]] = {
    "f1": partial(MultilabelF1Score, average="micro", validate_args=False),
    "accuracy": partial(MultilabelExactMatch, validate_args=False),
}
_NUMBERS: dict[str, Callable[[int], Metric]] = {
    formula.__name__: lambda _, formula=formula: ScoreOfAll(formula, "preds", "target")  # type: ignore[misc]
    for formula in (pearson, spearman)
}
SCORES = {"single_label": _CLASSES, "multi_label": _LABELS, "regression": _NUMBERS}
DEFAULTS = {"single_label": ("accuracy",), "multi_label": ("f1", "accuracy"), "regression": ("pearson", "spearman")}


def metrics(problem: str, names: Sequence[str], num_classes: int) -> dict[str, Metric]:
    """New metrics by name for a ``problem``: ``single_label``, ``multi_label`` or ``regression``.

    Those of multi-label take 0 or 1, (B, classes), on both sides: ``f1`` over all pairs of sample and class,
    ``accuracy`` the share of samples whose labels are all right.

    Raises:
        UserError: there is no name, or one that the problem does not have.
    """
    known = SCORES[problem]
    require("model.score_names", names, f"one or more of {', '.join(known)}, the main one first", bool(names))
    for name in names:
        require_one_of(f"model.score_names of a {problem} problem", name, known)
    return {name: known[name](num_classes) for name in names}
