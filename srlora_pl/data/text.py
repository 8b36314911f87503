"""Texts for classification and regression: what GLUE and the user's own files share, and the user's own files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from srlora_pl.data.base import Batch, DataModule, Key, KeyedDataset, split_keys, stratified_split
from srlora_pl.data.labels import (
    Problem,
    class_names,
    encode_classes,
    encode_numbers,
    encode_sets,
    label_sets,
    present,
)
from srlora_pl.data.tables import SUFFIXES, Table, read_table
from srlora_pl.data.tokens import Tokens, cache_folder, load_tokenizer, tokenize
from srlora_pl.errors import UserError, did_you_mean
from srlora_pl.randomness import derive, run_seed

_BUCKETS = int.from_bytes(b"buckets")
# Batches are padded to a multiple of this many tokens: few distinct shapes, and whole tiles for matrix units.
_ROUND = 8


@dataclass
class Texts:
    """A split as read: n texts, or n pairs of texts, and their labels (n, ...), None where there are none."""

    first: Sequence[str]
    second: Sequence[str] | None
    labels: Tensor | None


class TextDataModule(DataModule):
    """Base of the DataModules of text: tokenised once, batched by length, the order exact.

    Batches are dicts of ``input_ids``, ``attention_mask`` and, where the tokenizer makes them, ``token_type_ids``,
    int64 (b, L); ``label``, int64 (b,), or float32 (b,) for numbers and (b, classes) for several classes at once,
    absent where there is none; ``index``, int64 (b,), the position in the split.

    The tokenizer is that of the model (its ``backbone_name``). A training batch holds texts of similar length and is
    padded to its longest, rounded up to a multiple of 8; the order of the batches is random. A subclass gives
    `splits` and `read`, and sets the four attributes below in ``__init__``.

    Args:
        batch_size: samples in a batch, per device.
        val_fraction: share of the training data held out for validation, in [0, 1).
        seed: of that split only.
        num_workers: processes that make batches; 0 makes them in the main process.
        max_length: tokens that are kept of a text or pair of texts.
        pad_to_max_length: pad every batch to ``max_length``, and draw training batches without regard to length.
        cache_dir: a folder for the tokens; by default ``srlora_pl/tokens`` in the user's cache.
    """

    num_classes: int  # 1 for regression
    class_names: list[str]  # none for regression
    problem: Problem
    score_names: list[str]  # what the task reports, the main one first

    def __init__(
        self,
        batch_size: int,
        val_fraction: float,
        seed: int,
        num_workers: int,
        max_length: int,
        pad_to_max_length: bool,
        cache_dir: str | None,
    ) -> None:
        super().__init__(batch_size, val_fraction, seed, num_workers)
        if max_length < 1:
            raise UserError(f"data.max_length is {max_length}, but it must be 1 or more.")
        self.max_length, self.pad_to_max_length = max_length, pad_to_max_length
        self.cache = cache_folder() if cache_dir is None else Path(cache_dir).expanduser()
        self._tokenizer: Any = None
        self._read: dict[str, tuple[Tokens, Tensor | None]] = {}
        self._said: set[str] = set()  # splits whose cut texts were counted aloud

    def splits(self, use: str) -> list[str]:
        """Names of the splits for ``train``, ``val``, ``test`` or ``predict``; several are scored apart.

        None for ``val`` means that it is held out of the training split.
        """
        raise NotImplementedError

    def read(self, split: str) -> Texts:
        """The texts and labels of a split."""
        raise NotImplementedError

    @property
    def has_test_labels(self) -> bool:
        """Whether there is a test split to score on."""
        return bool(self.splits("test"))

    def sample_name(self, index: int) -> str:
        """What to call a predicted text: its position in the split."""
        return str(index)

    # -- loading

    def prepare_data(self) -> None:
        """Download what is missing and tokenise it, in one process; the others find it in the cache."""
        for split in self._needed(str(self.trainer.state.fn.value)):  # type: ignore[union-attr]
            self._tokens(split)

    def _needed(self, stage: str) -> list[str]:
        if stage == "fit":
            return self.splits("train") + self.splits("val")
        if stage == "validate":
            return self.splits("val") or self.splits("train")
        return self.splits(stage)

    def load(self, stage: str) -> None:
        """Tokenise the splits of ``stage`` and say what was cut."""
        if stage in ("fit", "validate"):
            self._load_train_and_val(stage)
        elif stage == "test":
            if not self.has_test_labels:
                raise UserError("The data has no labelled test split; add one, or run validate instead.")
            self.test_set = self._sets("test")
        elif stage == "predict":
            if not self.splits("predict"):
                raise UserError("The data has no test split to predict; set data.predict_root to a file of texts.")
            self.predict_set = self._sets("predict")
        for split in self._needed(stage):
            self._say_truncated(split)

    def _load_train_and_val(self, stage: str) -> None:
        names = self.splits("val")
        self.val_set = self._sets("val") if names else None
        if names and stage == "validate":
            return
        tokens, labels = self._tokens(self.splits("train")[0])
        assert labels is not None
        kept = torch.arange(len(tokens))
        if not names and self.val_fraction > 0:
            strata = labels if self.problem == "single_label" else torch.zeros(len(tokens), dtype=torch.int64)
            kept, held = stratified_split(strata, self.val_fraction, self.seed)
            if not len(held):
                raise UserError(
                    f"data.val_fraction {self.val_fraction} of {len(tokens)} training texts is not one text; "
                    f"use a larger fraction."
                )
            self.val_set = self._set(tokens, labels, held, by_length=True)
        self.train_set = self._set(tokens, labels, kept, by_length=False)

    def _sets(self, use: str) -> KeyedDataset | list[KeyedDataset]:
        sets: list[KeyedDataset] = []
        for split in self.splits(use):
            tokens, labels = self._tokens(split)
            rows = torch.arange(len(tokens))
            sets.append(self._set(tokens, None if use == "predict" else labels, rows, by_length=True))
        return sets if len(sets) > 1 else sets[0]

    def _set(self, tokens: Tokens, labels: Tensor | None, rows: Tensor, by_length: bool) -> "TokenSet":
        tokenizer = self._load_tokenizer()
        pad = (tokenizer.pad_token_id or 0, tokenizer.padding_side == "left")
        return TokenSet(tokens, labels, rows, by_length, self.max_length, self.pad_to_max_length, *pad)

    def _tokens(self, split: str) -> tuple[Tokens, Tensor | None]:
        """Tokens and labels of a split, read once."""
        if split not in self._read:
            texts = self.read(split)
            tokens = tokenize(self._load_tokenizer(), texts.first, texts.second, self.max_length, self.cache)
            self._read[split] = (tokens, texts.labels)
        return self._read[split]

    def _load_tokenizer(self) -> Any:
        if self._tokenizer is None:
            name = getattr(self.trainer and self.trainer.lightning_module, "backbone_name", None)
            if name is None:
                raise UserError(
                    f"{type(self).__name__} needs a model with backbone_name, whose tokenizer it takes; set "
                    f"self.backbone_name in the model's __init__."
                )
            self._tokenizer = load_tokenizer(name)
        return self._tokenizer

    def _say_truncated(self, split: str) -> None:
        tokens = self._tokens(split)[0]
        if tokens.truncated and split not in self._said:
            self._said.add(split)
            rank_zero_warn(
                f"{tokens.truncated} of the {len(tokens)} samples in '{split}' are longer than data.max_length "
                f"{self.max_length} tokens and were cut."
            )

    # -- order

    def train_order(self, epoch: int) -> Tensor:
        """A permutation whose batches hold texts of similar length, in random order: f(run seed, epoch)."""
        order = super().train_order(epoch)
        if self.pad_to_max_length:
            return order
        assert isinstance(self.train_set, TokenSet)
        # The devices of one step cut their batches from one piece, so that none waits for another's longer texts.
        size = self.batch_size * (self.trainer.world_size if self.trainer else 1)
        generator = torch.Generator().manual_seed(derive(run_seed(), _BUCKETS, epoch))
        return in_buckets(order, self.train_set.padded_lengths, size, generator)

    def _fingerprint(self) -> dict[str, int | float]:
        lengths = {"data.max_length": self.max_length, "data.pad_to_max_length": self.pad_to_max_length}
        return {**super()._fingerprint(), **lengths}


def in_buckets(order: Tensor, lengths: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """``order`` rearranged so that each ``size`` in a row have similar ``lengths``.

    Samples of equal length keep their order among themselves, so a random order gives random batches. The pieces
    come in random order, but for the short one, cut from a random place, which is last.
    """
    order = order[lengths[order].argsort(stable=True)]
    whole, rest = divmod(len(order), size)
    cut = int(torch.randint(whole + 1, (), generator=generator)) * size
    short, pieces = order[cut : cut + rest], torch.cat([order[:cut], order[cut + rest :]]).view(whole, size)
    return torch.cat([pieces[torch.randperm(whole, generator=generator)].flatten(), short])


class TokenSet(KeyedDataset):
    """Tokenised texts, padded by the batch.

    ``rows``: which samples of ``tokens``, int64 (n,); ``by_length``: hand them out longest first (so that a batch
    too large for the memory shows at once), each with its own position among ``rows`` as ``index``.
    """

    def __init__(
        self,
        tokens: Tokens,
        labels: Tensor | None,
        rows: Tensor,
        by_length: bool,
        max_length: int,
        pad_to_max_length: bool,
        pad: int,
        pad_left: bool,
    ) -> None:
        self.tokens, self.labels, self.rows = tokens, labels, rows
        self.max_length, self.pad_to_max_length = max_length, pad_to_max_length
        self.pad, self.pad_left = pad, pad_left
        lengths = tokens.lengths[rows]
        self.padded_lengths = (-(-lengths // _ROUND) * _ROUND).clamp(max=max_length)
        in_turn = torch.arange(len(rows))
        self.turns = lengths.argsort(descending=True, stable=True) if by_length else in_turn

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        index = self.turns[split_keys(keys)[0]]
        rows = self.rows[index]
        length = self.max_length if self.pad_to_max_length else int(self.padded_lengths[index].max())
        batch: Batch = {**self.tokens.padded(rows, length, self.pad, self.pad_left), "index": index}
        if self.labels is not None:
            batch["label"] = self.labels[rows]
        return batch


# -- the user's own files

_VAL_NAMES = ("val", "valid", "validation", "dev")
_SCORES = {"single_label": ["accuracy"], "multi_label": ["f1"], "regression": ["pearson", "spearman"]}


class TextData(TextDataModule):
    """Texts and labels from your own CSV, TSV, JSON-lines or parquet files.

    A label is one class, several classes or a number, as ``problem`` says; the classes are those of the training
    file. Batches and the order are as in `TextDataModule`.

    Args:
        root: a file to train on; or a folder with ``train.csv`` (or ``.tsv``, ``.jsonl``, ``.parquet``) and, if
            there are such, ``val`` and ``test`` files. A test file without the label column is only predicted.
        text_column: name of the column with the text, or a list of two names for pairs of texts.
        label_column: name of the column with the label.
        problem: ``single_label`` for one class a sample, ``multi_label`` for any number of classes, ``regression``
            for numbers.
        separator: of the fields of a CSV or TSV; by default the comma or the tab.
        label_separator: of the classes of a sample where ``multi_label`` files hold them as text and not as a list.
        batch_size: samples in a batch, per device.
        val_fraction: share of the training data held out for validation where there is no ``val`` file, in [0, 1).
        seed: of that split only.
        num_workers: processes that make batches; 0 makes them in the main process.
        max_length: tokens that are kept of a text or pair of texts.
        pad_to_max_length: pad every batch to ``max_length``, and draw training batches without regard to length.
        predict_root: a file to predict, labels not needed; None predicts the test file.
        cache_dir: a folder for the tokens; by default ``srlora_pl/tokens`` in the user's cache.

    Raises:
        UserError: a file, column, text or label that is missing or wrong; an argument out of its range.
    """

    def __init__(
        self,
        root: str,
        text_column: str | list[str] = "text",
        label_column: str = "label",
        problem: Problem = "single_label",
        separator: str | None = None,
        label_separator: str = ",",
        batch_size: int = 16,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        max_length: int = 128,
        pad_to_max_length: bool = False,
        predict_root: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(batch_size, val_fraction, seed, num_workers, max_length, pad_to_max_length, cache_dir)
        self.text_columns = [text_column] if isinstance(text_column, str) else list(text_column)
        if len(set(self.text_columns) - {label_column}) != len(self.text_columns) or len(self.text_columns) not in (
            1,
            2,
        ):
            raise UserError(
                f"data.text_column is {text_column!r}; name one column, or a list of two, other than the label's."
            )
        for key, value in (("separator", separator), ("label_separator", label_separator)):
            if value is not None and len(value) != 1:
                raise UserError(f"data.{key} is {value!r}, but it must be one character.")
        if problem not in _SCORES:
            near = did_you_mean(problem, _SCORES)
            raise UserError(f"data.problem is {problem!r}{near}; it is one of {', '.join(_SCORES)}.")
        self.label_column, self.problem, self.score_names = label_column, problem, _SCORES[problem]
        self.separator, self.label_separator = separator, label_separator
        files = find_files(Path(root).expanduser())
        if predict_root is not None:
            files["predict"] = Path(predict_root).expanduser()
        self._tables = {split: self._table(split, file) for split, file in files.items()}
        self.class_names = self._classes()
        self.num_classes = len(self.class_names) or 1
        self._labels = {split: self._encode(table) for split, table in self._tables.items() if split != "predict"}

    def _table(self, split: str, file: Path) -> Table:
        columns = dict.fromkeys(self.text_columns, "data.text_column") | {self.label_column: "data.label_column"}
        optional = (self.label_column,) if split in ("test", "predict") else ()
        return read_table(file, columns, optional, self.separator)

    def _classes(self) -> list[str]:
        train = self._tables["train"]
        if self.problem == "regression":
            return []
        if self.problem == "multi_label":
            sets = label_sets(train, self.label_column, self.label_separator)
            classes = class_names(name for names in sets for name in names)
        else:
            classes = class_names(present(train, self.label_column))
        if len(classes) < 2:
            raise UserError(
                f"data.label_column {self.label_column!r} of {train.path} holds only {len(classes)} class; a "
                f"classifier needs two or more."
            )
        return classes

    def _encode(self, table: Table) -> Tensor | None:
        if self.label_column not in table.columns:
            return None
        if self.problem == "regression":
            return encode_numbers(table, self.label_column)
        if self.problem == "multi_label":
            return encode_sets(table, self.label_column, self.class_names, self.label_separator)
        return encode_classes(table, self.label_column, self.class_names)

    def splits(self, use: str) -> list[str]:
        if use == "test":
            return ["test"] if self._labels.get("test") is not None else []
        if use == "predict" and "predict" not in self._tables:
            use = "test"
        return [use] if use in self._tables else []

    def read(self, split: str) -> Texts:
        table = self._tables[split]
        columns = [table.texts(column) for column in self.text_columns]
        return Texts(columns[0], columns[1] if len(columns) > 1 else None, self._labels.get(split))


def find_files(root: Path) -> dict[str, Path]:
    """The files of the splits ``train``, ``val`` and ``test`` that ``root``, a file or a folder, stands for."""
    if not root.is_dir():
        return {"train": root}
    files = {}
    for split, names in {"train": ("train",), "val": _VAL_NAMES, "test": ("test",)}.items():
        found = [path for name in names for suffix in SUFFIXES if (path := root / f"{name}{suffix}").is_file()]
        if len(found) > 1:
            raise UserError(f"data.root '{root}' has both {found[0].name} and {found[1].name}; keep one of them.")
        if found:
            files[split] = found[0]
    if "train" not in files:
        there = ", ".join(sorted(path.name for path in root.iterdir())[:10]) or "nothing"
        raise UserError(
            f"data.root '{root}' has no train{' or train'.join(SUFFIXES)}, only {there}; name a file, or add one."
        )
    return files
