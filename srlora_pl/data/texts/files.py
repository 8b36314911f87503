"""Texts and labels from the user's own files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from srlora_pl.data.splits import USUAL, split_of
from srlora_pl.data.texts.datamodule import TextDataModule, Texts
from srlora_pl.data.texts.labels import (
    Problem,
    class_names,
    encode_classes,
    encode_numbers,
    encode_sets,
    is_labelled,
    label_sets,
    look_alikes,
    name_numbers,
    present,
    refuse_vectors,
)
from srlora_pl.data.texts.tables import SUFFIXES, Table, read_table
from srlora_pl.util.errors import UserError, listed, require, require_one_of

_SCORES = {"single_label": ["accuracy"], "multi_label": ["f1", "accuracy"], "regression": ["pearson", "spearman"]}


class TextData(TextDataModule):
    """Texts and labels from your own CSV, TSV, JSON-lines or parquet files.

    A label is one class, several classes or a number, as ``problem`` says. The classes are those of the training file,
    or all that its ``ClassLabel`` names if the `datasets` library wrote it. Batches and the order are as in
    `TextDataModule`.

    Args:
        root: a file to train on; or a folder with ``train.csv`` (or ``.tsv``, ``.jsonl``, ``.parquet``) and perhaps
            ``val`` and ``test`` files. A test file without labels is only predicted.
        text_column: name of the column with the text, or a list of two names for pairs of texts.
        label_column: name of the column with the label.
        problem: ``single_label`` for one class a sample, ``multi_label`` for any number of classes, ``regression``
            for numbers.
        separator: of the fields of a CSV or TSV; by default the comma or the tab.
        label_separator: between the classes of a sample, if a ``multi_label`` file holds them as text, not as a list.
        predict_root: a file to predict, labels not needed; None predicts the test file.
        class_names: of a trained model, in the order of its outputs (none for numbers), to predict ``predict_root``
            without the files at ``root``; ``python cli.py predict`` takes them from the checkpoint.
        kwargs: the arguments of `TextDataModule`.

    Raises:
        UserError: a file, column, text or label is missing or wrong; an argument is out of its range.
    """

    def __init__(
        self,
        root: str,
        text_column: str | list[str] = "text",
        label_column: str = "label",
        problem: Problem = "single_label",
        separator: str | None = None,
        label_separator: str = ",",
        *,
        predict_root: str | None = None,
        class_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.text_columns = [text_column] if isinstance(text_column, str) else list(text_column)
        distinct = len(set(self.text_columns) - {label_column})
        if distinct != len(self.text_columns) or distinct not in (1, 2):
            raise UserError(
                f"data.text_column is {text_column!r}; name one column, or a list of two, other than the label's."
            )
        for key, value in {"separator": separator, "label_separator": label_separator}.items():
            require(f"data.{key}", value, "one character", value is None or len(value) == 1)
        require_one_of("data.problem", problem, _SCORES)
        self.label_column, self.problem, self.score_names = label_column, problem, _SCORES[problem]
        self.separator, self.label_separator = separator, label_separator
        files, others = find_files(Path(root).expanduser()) if class_names is None else ({}, [])
        if predict_root is not None:
            files["predict"] = Path(predict_root).expanduser()
        if names := [path.name for path in others if path != files.get("predict")]:
            self.left_out[f"files or folders that are no split ({listed(map(repr, names), most=10)})"] = len(names)
        self._tables = {split: self._table(split, file) for split, file in files.items()}
        self.class_names = self._classes() if class_names is None else list(class_names)
        if (problem == "regression") == bool(self.class_names):
            trained = f"{len(self.class_names)} classes" if self.class_names else "numbers"
            raise UserError(
                f"data.problem is {problem!r}, but the model was trained on {trained}; set it as in training."
            )
        self.num_classes = len(self.class_names) or 1
        self._labels = {
            split: self._encode(table)
            for split, table in self._tables.items()
            if split in ("train", "val") or (split == "test" and is_labelled(table, label_column))
        }

    def _table(self, split: str, file: Path) -> Table:
        columns = dict.fromkeys(self.text_columns, "that data.text_column names")
        columns[self.label_column] = "that data.label_column names"
        optional = (self.label_column,) if split in ("test", "predict") else ()
        table = read_table(file, columns, optional, self.separator)
        if self.problem != "regression" and split != "predict":
            name_numbers(table, self.label_column)
        return table

    def _classes(self) -> list[str]:
        train = self._tables["train"]
        if self.problem == "regression":
            return []
        if self.problem == "multi_label":
            sets = label_sets(train, self.label_column, self.label_separator)
            refuse_vectors(train, self.label_column, sets)
            classes = class_names(name for names in sets for name in names)
        else:
            classes = class_names(present(train, self.label_column))
        if len(classes) < 2:
            raise UserError(
                f"data.label_column {self.label_column!r} of {train.path} holds only {len(classes)} class; a "
                f"classifier needs two or more."
            )
        if groups := look_alikes(classes):
            more = f", and so are {len(groups) - 1} more such groups" if len(groups) > 1 else ""
            rank_zero_info(
                f"The classes {listed(map(repr, groups[0]))} of '{train.path}' are kept apart{more}; write them alike "
                f"where they are one class."
            )
        names = train.class_labels.get(self.label_column)
        self.names_numbers = names is not None  # older checkpoints call the classes of a ClassLabel by number
        return classes if names is None else names

    def _encode(self, table: Table) -> Tensor:
        if self.problem == "regression":
            return encode_numbers(table, self.label_column)
        if self.problem == "multi_label":
            return encode_sets(table, self.label_column, self.class_names, self.label_separator)
        return encode_classes(table, self.label_column, self.class_names)

    def splits(self, use: str) -> list[str]:
        if use == "train" and use not in self._tables:
            raise UserError("data.class_names stands for the files of a trained model: leave it out to read them.")
        if use == "test":
            return ["test"] if "test" in self._labels else []
        if use == "predict" and "predict" not in self._tables:
            use = "test"
        return [use] if use in self._tables else []

    def read(self, split: str) -> Texts:
        table = self._tables[split]
        return Texts(*map(table.texts, self.text_columns), labels=self._labels.get(split))


def find_files(root: Path, suffixes: Sequence[str] = SUFFIXES) -> tuple[dict[str, Path], list[Path]]:
    """The files of ``train``, ``val`` and ``test`` under ``root`` (a file is ``train``), and all else in the folder."""
    if not root.is_dir():
        return {"train": root}, []
    there = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    tables = [path for path in there if path.suffix.lower() in suffixes and path.is_file()]
    files = {}
    for split in ("train", "val", "test"):
        alike = [path for path in tables if split_of(path.stem) == split]
        found = [path for path in alike if path.stem in USUAL and path.suffix in suffixes] or alike
        if len(found) > 1:
            raise UserError(f"data.root '{root}' has both {found[0].name} and {found[1].name}; keep one of them.")
        if found:
            files[split] = found[0]
    if "train" not in files:
        shown = listed((path.name for path in there), most=10) or "no files"
        raise UserError(
            f"data.root '{root}' has no train{' or train'.join(suffixes)}, only {shown}; name a file, or add one."
        )
    return files, [path for path in there if path not in files.values()]
