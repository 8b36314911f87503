"""The base of the package's DataModules: an order that any run can resume exactly, and checks.

The position of a run is one number, the training micro-batches it has processed. The order of an epoch is a function of
(run seed, epoch), and a sample's augmentation of (run seed, epoch, index), so a resumed run only has to start its
sampler at ``divmod(processed, batches per epoch)``.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.utils.data import Dataset

from srlora_pl.data.loader import (
    EpochBatches,
    Key,
    Loader,
    Loaders,
    Share,
    loader,
    raise_user_error,
    rank_and_world,
)
from srlora_pl.data.protocols import Batch, model_of
from srlora_pl.data.splits import hold_out
from srlora_pl.training import lightning_internals as internals
from srlora_pl.util.errors import UserError, listed, require
from srlora_pl.util.randomness import derive, run_seed

# Streams of the seed; large numbers, so that no step or epoch is mistaken for one.
_ORDER = int.from_bytes(b"order")
_SAMPLE = int.from_bytes(b"sample")

_SHOWN = 10  # classes, and kinds of files or rows left out, that a run's first line names


class KeyedDataset(Dataset):
    """A data set that answers for a whole batch of keys at once.

    Attributes:
        labels: of all samples of the source, (n, ...), None where there are none.
        rows: which of these samples the data set holds, int64 (m,).
        batch_size: of an evaluation, if not the DataModule's.
        unit: what a key stands for.
    """

    labels: Tensor | None = None
    rows: Tensor
    batch_size: int | None = None
    unit = "sample"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        raise NotImplementedError

    def labelled(self, index: Tensor, **content: Any) -> Batch:
        """The batch of the samples at ``index`` among `rows`, with their labels if there are any."""
        batch: Batch = {**content, "index": index}
        if self.labels is not None:
            batch["label"] = self.labels[self.rows[index]]
        return batch

    @property
    def singles(self) -> "KeyedDataset":
        """The single samples, where this set joins several into one."""
        return self

    def extremes(self) -> tuple[int, int]:
        """The easiest and the hardest sample for a network, such as the shortest and the longest, if that is known."""
        return 0, len(self) - 1


# The data to score or predict: one set, several that are scored apart, or none.
Sets = KeyedDataset | list[KeyedDataset] | None


class DataModule(L.LightningDataModule):
    """Base of the package's DataModules: a held-out split, exact order, resume, and checks of its arguments.

    Its members for tasks and reports are those of `srlora_pl.data.protocols.DataForTask`. A subclass sets `num_classes`
    and `class_names` in ``__init__``, gives `splits` and `dataset` (or fills `train_set`, `val_set`, `test_set` and
    `predict_set` in `load`), counts in `left_out` the files or rows it leaves out, and may order an epoch itself in
    `train_order`. On several devices an evaluation batch with the key ``spare`` must not be scored (see `Share`).

    Args:
        batch_size: samples in a batch, per device.
        val_fraction: share of the training data held out for validation, in [0, 1).
        seed: of that split only; order and augmentation follow ``seed_everything``.
        num_workers: processes that load data; 0 loads in the main process.

    Attributes:
        kind: of a sample, such as ``image``.
        left_out: how many files or rows are in no split, by what they are, such as ``{"hidden": 2}``.
    """

    num_classes: int
    class_names: list[str]
    kind = "sample"
    names_numbers = False
    split_names: Mapping[str, Sequence[str]] = {"val": ("val",), "test": ("test",)}

    def __init__(self, batch_size: int = 16, val_fraction: float = 0.1, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__()
        require("data.batch_size", batch_size, "at least 1", batch_size >= 1)
        require("data.val_fraction", val_fraction, "at least 0 and less than 1", 0 <= val_fraction < 1)
        require("data.num_workers", num_workers, "0 or more", num_workers >= 0)
        self.batch_size, self.val_fraction = batch_size, val_fraction
        self.seed, self.num_workers = seed, num_workers
        self.train_set: KeyedDataset | None = None
        self.val_set: Sets = None
        self.test_set: Sets = None
        self.predict_set: Sets = None
        self.left_out: dict[str, int] = {}
        self._resumed: int | None = None
        self._is_described = False

    def splits(self, use: str) -> list[str]:
        """Names of the splits for ``train``, ``val``, ``test`` or ``predict``; several are scored apart.

        Without a name for ``val``, validation samples are held out of the training split.
        """
        return []

    def dataset(self, split: str, rows: Tensor | None, use: str) -> KeyedDataset:
        """The samples ``rows``, int64 (m,), or all of a split; without labels where ``use`` is ``predict``."""
        raise NotImplementedError

    def needed(self, stage: str) -> list[str]:
        """The splits of ``stage``; a fit ends with a test, whose errors shall come before training."""
        if stage == "fit":
            return [*dict.fromkeys(self.splits("train") + self.splits("val") + self.splits("test"))]
        if stage == "validate":
            return self.splits("val") or self.splits("train")
        return self.splits(stage)

    def load(self, stage: str) -> None:
        """Fill the data sets that ``stage`` (fit, validate, test or predict) needs."""
        if stage in ("fit", "validate"):
            self._load_train_and_val(stage)
        elif stage == "test":
            if not self.has_test_labels:
                raise UserError("The data has no labelled test split; add one, or run validate instead.")
            self.test_set = self._sets("test")
        elif stage == "predict":
            if not self.splits("predict"):
                raise UserError(f"The data has no test split to predict; set data.predict_root to {self.kind}s.")
            self.predict_set = self._sets("predict")

    def _load_train_and_val(self, stage: str) -> None:
        names = self.splits("val")
        self.val_set = self._sets("val") if names else None
        if names and stage == "validate":
            return
        (train,) = self.splits("train")
        self.train_set = self.dataset(train, None, "train")
        if not names and self.val_fraction > 0:
            samples = self.train_set.singles
            classes = samples.labels
            if classes is None or classes.dtype != torch.int64:
                classes = torch.zeros(len(samples), dtype=torch.int64)
            kept, held = hold_out(classes, self.val_fraction, self.seed, self.kind)
            self.train_set, self.val_set = self.dataset(train, kept, "train"), self.dataset(train, held, "val")

    def _sets(self, use: str) -> KeyedDataset | list[KeyedDataset]:
        sets = [self.dataset(split, None, use) for split in self.splits(use)]
        return sets if len(sets) > 1 else sets[0]

    def setup(self, stage: str) -> None:
        """Load the data of ``stage``; errors that the user can mend come from here, before any step."""
        stage = str(getattr(stage, "value", stage))  # Lightning's is an enumeration, and would be shown as one
        if stage == "fit":
            self._resumed = None  # of an earlier fit; a checkpoint to resume from is loaded after this hook
        head = model_of(self.trainer).num_classes
        if head is not None and head != self.num_classes:
            raise UserError(
                f"The model's head has {head} classes, but the data has {self.num_classes}; "
                f"set model.num_classes to {self.num_classes} or leave it out."
            )
        self.load(stage)
        devices = rank_and_world(self)[1]
        if stage == "fit" and devices * self.batch_size > len(self._train()):
            raise UserError(
                f"data.batch_size is {self.batch_size}{f' on {devices} devices' * (devices > 1)}, but the training "
                f"split has only {len(self._train())} {self._train().unit}s; use a smaller batch."
            )
        if stage == "fit" and not self.batches_per_epoch:
            raise UserError(
                f"trainer.limit_train_batches {self.trainer.limit_train_batches} leaves no batch of "  # type: ignore[union-attr]
                f"{len(EpochBatches(self))} to train on; raise it."
            )
        if stage == "predict" and self.trainer and self.trainer.limit_predict_batches == 0:
            raise UserError("trainer.limit_predict_batches 0 leaves no batch to predict; raise it.")
        if stage == "validate" and self.val_set is None:
            raise UserError("There is no validation split; set data.val_fraction above 0.")
        if not self._is_described:  # a fit ends with a test of the same data
            self._is_described = True
            untested = "; nothing is tested, as there is no labelled test split" * (not self.has_test_labels)
            rank_zero_only(print)(self.description() + (untested if stage == "fit" else ""))

    def description(self) -> str:
        """One line on the loaded data: samples, the classes in the order of the outputs, and files or rows left out.

        The classes are counted in the first of the splits that are loaded.
        """
        splits = {
            "to train on": self.train_set,
            "to validate": self.val_set,
            "to test": self.test_set,
            "to predict": self.predict_set,
        }
        sets = {use: as_list(each) for use, each in splits.items() if each is not None}
        parts = [", ".join(f"{sum(len(s.singles) for s in each):,} {use}" for use, each in sets.items()) or "none"]
        first = next((each[0] for each in sets.values()), None)  # a DataModule of the user's own may load nothing
        labels = None if first is None or first.labels is None else first.labels[first.rows]
        if self.class_names:
            parts.append(f"{self.num_classes} classes: {_with_counts(self.class_names, labels)}")
        elif labels is not None and len(labels):
            parts.append(f"labels from {labels.min().item():g} to {labels.max().item():g}")
        if self.left_out:
            most = Counter(self.left_out).most_common()
            shown = [f"{count:,} {kind}" for kind, count in most[:_SHOWN]]
            if others := sum(count for _, count in most[_SHOWN:]):
                shown.append(f"{others:,} others")
            parts.append(f"left out: {listed(shown)}")
        return f"data: {'; '.join(parts)}"

    def _train(self) -> KeyedDataset:
        if self.train_set is None:
            raise RuntimeError("setup('fit') has not run yet")
        return self.train_set

    def trial_batch(self) -> Batch:
        """A batch of two training samples (one if there is no other); moves no loader and no random state.

        Raises:
            UserError: one of them cannot be read.
        """
        keys: list[Key] = [(index, 0) for index in sorted(set(self._train().extremes()))]
        return raise_user_error(self._train().__getitems__(keys))

    def sampled_batches(self, samples: float) -> Iterator[Batch]:
        """This process's share of random training samples, in batches; moves no loader and no random state.

        Args:
            samples: how many; below 1 a share of all, of at least 2 samples; at least one a process.
        """
        singles = self._train().singles
        rank, world = rank_and_world(self)
        count = max(2, round(samples * len(singles))) if samples < 1 else int(samples)
        count = min(max(count, world), len(singles))
        generator = torch.Generator().manual_seed(derive(run_seed(), _SAMPLE))
        own = torch.randperm(len(singles), generator=generator)[:count][rank::world]
        batches = own.split(self.batch_size) if world == 1 else own.tensor_split(-(-count // (world * self.batch_size)))
        for batch in batches:
            keys: list[Key] = [(index, 0) for index in batch.tolist()]
            yield raise_user_error(singles.__getitems__(keys))

    # -- loaders

    def train_dataloader(self) -> Loader:
        """Batches in the order of this run, from where it stands."""
        return loader(self._train(), self.num_workers, batch_sampler=EpochBatches(self))

    def val_dataloader(self) -> Loaders:
        """The held-out split; no loader at all when nothing is held out."""
        return self._evaluation(self.val_set)

    def test_dataloader(self) -> Loaders:
        return self._evaluation(self.test_set)

    def predict_dataloader(self) -> Loaders:
        return self._evaluation(self.predict_set)

    def _evaluation(self, sets: Sets) -> Loaders:
        """One loader, one for each of several data sets, or none."""
        loaders = []
        for each in as_list(sets):
            size = each.batch_size or self.batch_size
            share = Share(each, size, *rank_and_world(self))
            loaders.append(loader(each, self.num_workers, sampler=share, batch_size=size))
        return loaders[0] if isinstance(sets, KeyedDataset) else loaders

    # -- order and position

    def train_order(self, epoch: int) -> Tensor:
        """The order of an epoch: a permutation of the training split, int64 (n,), f(run seed, epoch)."""
        generator = torch.Generator().manual_seed(derive(run_seed(), _ORDER, epoch))
        return torch.randperm(len(self._train()), generator=generator)

    def step_tokens(self, order: Tensor, epoch: int) -> list[int] | None:
        """The trained tokens of the optimizer step that each batch of an epoch belongs to, on all devices together.

        ``order``: of the epoch, filled up for all devices, int64 (n,). None where samples have no tokens to count.
        """
        return None

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation split, once the data of a fit are loaded."""
        return self.val_set is not None

    @property
    def has_test_labels(self) -> bool:
        """Whether there is a test split to score on."""
        return bool(self.splits("test"))

    def sample_name(self, index: int) -> str:
        """The name of a predicted sample: its position in the split."""
        return str(index)

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of one epoch on one device, with ``trainer.limit_train_batches`` as Lightning counts it."""
        batches = len(EpochBatches(self))
        limit = self.trainer.limit_train_batches if self.trainer else 1.0
        return min(batches, limit) if isinstance(limit, int) else int(batches * limit)

    @property
    def processed(self) -> int:
        """Training micro-batches that this run has processed."""
        if self.trainer is None:
            return 0
        return internals.batches_in_run(self.trainer).processed

    def start_position(self) -> tuple[int, int]:
        """(epoch, batch) at which an iterator that is made now has to start.

        Lightning may make the first iterator of a resumed run before it restores its own counter (as soon as
        ``configure_optimizers`` asks for the number of steps), so that iterator takes the checkpoint's count.
        """
        processed, self._resumed = self._resumed if self._resumed is not None else self.processed, None
        return divmod(processed, self.batches_per_epoch)

    # -- checkpoint

    def _fingerprint(self) -> dict[str, int | float | str]:
        """Everything that the order depends on, besides the count."""
        return {
            "seed_everything": run_seed(),
            "data.batch_size": self.batch_size,
            "data.val_fraction": self.val_fraction,
            "data.seed": self.seed,
            "training samples": len(self._train()),
            "number of processes": rank_and_world(self)[1],
            "batches per epoch": self.batches_per_epoch,
        }

    def state_dict(self) -> dict[str, Any]:
        """The count of processed micro-batches, everything that the order depends on, and the names of the classes."""
        if self.train_set is None:
            return {}
        return {"processed": self.processed, **self._fingerprint(), "class_names": list(self.class_names)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the position of a checkpoint.

        Raises:
            UserError: the run's data order differs from the checkpoint's, so that the position means nothing.
        """
        if self.trainer and self.trainer.state.fn != TrainerFn.FITTING:
            return
        ours, spread = self._fingerprint(), ("data.batch_size", "number of processes")  # whose product decides
        if math.prod(state_dict.get(name, 0) for name in spread) == math.prod(int(ours[name]) for name in spread):
            ours = {name: value for name, value in ours.items() if name not in spread}
        for name, here in ours.items():
            there = state_dict.get(name)
            if there != here and state_dict["processed"]:  # else nothing began yet; so a tuner tries batch sizes
                raise UserError(
                    f"The checkpoint was written with {name} = {there}, this run has {here}, so it cannot "
                    f"go on where that one stopped; give it the same value, or start anew without --ckpt_path."
                )
        self._resumed = state_dict["processed"]


def as_list(sets: Sets) -> list[KeyedDataset]:
    return sets if isinstance(sets, list) else [] if sets is None else [sets]


def _with_counts(names: Sequence[str], labels: Tensor | None) -> str:
    """The first classes, each with its count in ``labels``: int64 (n,), or of several a sample (n, classes)."""
    shown = [name if name.isprintable() else repr(name) for name in names[:_SHOWN]]
    if labels is not None:
        counts = labels.sum(0) if labels.ndim > 1 else torch.bincount(labels, minlength=len(names))
        shown = [f"{name} ({int(count):,})" for name, count in zip(shown, counts, strict=False)]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(shown) + more


def split_keys(keys: Sequence[Key]) -> tuple[Tensor, Tensor | None]:
    """Indices, int64 (b,), and epochs, int64 (b,), or None for keys without epochs."""
    table = torch.tensor(keys, dtype=torch.int64)
    return (table, None) if table.ndim == 1 else (table[:, 0], table[:, 1])
