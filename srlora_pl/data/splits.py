"""Splits of a data set: their names, and one that is held out of the training data."""

import re

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from srlora_pl.util.errors import UserError
from srlora_pl.util.randomness import derive

_SPLIT = int.from_bytes(b"split")  # a stream of the seed, kept apart from its other uses
_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
USUAL = ("train", "val", "valid", "validation", "dev", "test")  # of several names for one split these come first


def split_of(name: str) -> str | None:
    """``train``, ``val`` or ``test`` for the name of a split, in any letters (``Training``, ``val_set``), or None."""
    word = re.sub(r"[\s_.-]*(set|split|data|images)?$", "", name.strip().casefold())
    return next((split for split, names in _SPLITS.items() if word in names), None)


def split_word(name: str) -> str | None:
    """The first part of ``name`` that is the name of a split, such as ``train`` in ``seg_train``, or None."""
    return next(filter(split_of, re.split(r"[\W\d_]+", name)), None)


def hold_out(strata: Tensor, fraction: float, seed: int, kind: str) -> tuple[Tensor, Tensor]:
    """`stratified_split` for ``data.val_fraction``, with a note on the classes of which no sample is held out.

    ``kind``: of a sample, such as ``image`` or ``text``.

    Raises:
        UserError: ``fraction`` is above 0, but nothing can be held out.
    """
    kept, held = stratified_split(strata, fraction, seed)
    counts = strata.bincount()
    if fraction > 0 and len(strata) == 1:
        raise UserError(
            f"There is one training {kind} only, so that data.val_fraction {fraction} holds none out; train on more, "
            f"or set it to 0 and use a validation split of your own."
        )
    if fraction > 0 and not len(held):
        why = f"is not one {kind}" if counts.max() > 1 else f"holds none out, as no class has two {kind}s"
        raise UserError(
            f"data.val_fraction {fraction} of {len(strata)} training {kind}s {why}; use a larger fraction, or 0 and a "
            f"validation split of your own."
        )
    unseen = (counts > 0) & (strata[held].bincount(minlength=len(counts)) == 0)
    if len(held) and unseen.any():
        rank_zero_info(
            f"{int(unseen.sum())} of the {len(counts)} classes have too few training {kind}s for data.val_fraction "
            f"{fraction} to hold one out: validation does not see them."
        )
    return kept, held


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Cut a data set in two, every class in the same proportion (to one sample), at random by ``seed``.

    ``labels``: int64 (n,). Returns the rows that stay and the rows held out, both ascending, int64.
    The held-out part has round(fraction * n) rows; no class loses its last sample.
    """
    generator = torch.Generator().manual_seed(derive(seed, _SPLIT))
    counts = torch.bincount(labels)
    # Whole samples per class first; what is left goes to the largest remainders, ties to the lower class.
    share = counts.double() * fraction
    held = share.floor().long()
    short = round(fraction * len(labels)) - int(held.sum())
    held[(held - share).argsort(stable=True)[:short]] += 1
    held = held.clamp(max=(counts - 1).clamp(min=0))

    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    taken = place < held[labels[by_class]]
    return by_class[~taken].sort().values, by_class[taken].sort().values
