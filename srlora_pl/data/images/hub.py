"""Images from a data set of the ``datasets`` library."""

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from srlora_pl.data.images.pictures import Pictures, Source, Split
from srlora_pl.data.splits import USUAL, split_of, split_word
from srlora_pl.util.errors import UserError, did_you_mean, listed, one_line
from srlora_pl.util.program import require_extra

_FILES = (".parquet", ".arrow", ".jsonl")
_METADATA = "metadata.csv"  # beside images: a row for each, with its file_name


class Cells(Pictures):
    """The image column of a data set of ``datasets``; ``title`` names its split in errors."""

    def __init__(self, table: Any, column: str, title: str) -> None:
        from datasets import Image as ImageFeature

        self.table = table.select_columns(column).cast_column(column, ImageFeature(decode=False))
        self.column, self.title = column, title

    def __len__(self) -> int:
        return len(self.table)

    def file(self, index: int) -> Path | BytesIO:
        cell = self.table.data.column(self.column)[index].as_py()  # straight from Arrow: half the time
        return BytesIO(cell["bytes"]) if cell["bytes"] else Path(cell["path"])

    def name(self, index: int) -> str:
        return f"{index} of {self.title}"

    def require_all(self) -> None:
        """Refuse a row without an image, neither bytes nor a path."""
        from pyarrow import compute

        cells = self.table.data.column(self.column)
        sizes = [compute.binary_length(compute.struct_field(cells, part)) for part in ("bytes", "path")]
        row = compute.index(compute.equal(compute.add(*(compute.fill_null(size, 0) for size in sizes)), 0), True)
        if row.as_py() >= 0:
            raise UserError(f"The image {self.name(row.as_py())} is missing; fill or remove the row.")


class Hub(Source):
    """A data set of ``datasets``: a local folder of its files, or a name on the hub.

    The label column holds a ``ClassLabel``, whole numbers or names; -1, an empty name or nothing means unlabelled.
    The classes are those of the training split. The labels of the other splits are compared with them by name,
    whichever numbers stand for the names there.
    """

    def __init__(self, root: str, image_column: str, label_column: str) -> None:
        self.root, self.image_column, self.label_column = root, image_column, label_column
        self.left_out: Counter[str] = Counter()
        tables = _load(root, label_column, self.left_out)
        self.splits: dict[str, tuple[str, Any]] = _choose(tables, self.left_out)
        if "train" not in self.splits:
            raise UserError(f"The data set {root!r} has no split 'train', only {listed(tables)}; rename one of them.")
        train = self.splits["train"][1]
        self._check_columns(train)
        names = getattr(train.features[label_column], "names", None)
        values = names or sorted(set(self._labels("train")))
        self.class_names = [str(value) for value in values]
        self._has_numbers = not all(isinstance(value, str) for value in values)
        self._classes = _classes(values, are_positions=bool(names))

    def _check_columns(self, table: Any, labels: bool = True) -> None:
        from datasets import Image as ImageFeature

        kinds = table.features
        for key, column in (("image_column", self.image_column), ("label_column", self.label_column))[: 1 + labels]:
            if column not in kinds:
                raise UserError(
                    f"data.{key} is {column!r}{did_you_mean(column, kinds)}, but the columns of {self.root!r} are "
                    f"{listed(kinds)}."
                )
        if not isinstance(kinds[self.image_column], ImageFeature):
            images = [name for name, kind in kinds.items() if isinstance(kind, ImageFeature)]
            raise UserError(
                f"data.image_column {self.image_column!r} of {self.root!r} holds no images; its columns of images "
                f"are: {listed(images) or 'none'}."
            )
        kind = kinds.get(self.label_column)
        if labels and not re.match(r"u?int|(large_)?string|bool", getattr(kind, "dtype", "")):
            raise UserError(
                f"data.label_column {self.label_column!r} of {self.root!r} holds {kind}, not classes; name a column "
                f"of whole numbers or names."
            )

    def has_labels(self, split: str) -> bool:
        if split not in self.splits or self.label_column not in self.splits[split][1].features:
            return False
        return not all(map(_is_missing, self.splits[split][1][self.label_column][:]))

    def load(self, split: str) -> Split:
        name, table = self.splits[split]
        labelled = split != "test" or self.has_labels(split)
        self._check_columns(table, labelled)
        if not len(table):
            raise UserError(f"The split {name!r} of {self.root!r} is empty; put rows in it, or remove it.")
        cells = Cells(table, self.image_column, self._title(split))
        cells.require_all()
        left_out = self.left_out if split == "train" else Counter[str]()
        return Split(cells, self._positions(split) if labelled else None, left_out=left_out)

    def _title(self, split: str) -> str:
        return f"the split {self.splits[split][0]!r} of {self.root!r}"

    def _bad_label(self, split: str, row: int, problem: str) -> UserError:
        place = f"column {self.label_column!r} of row {row} of {self._title(split)}"
        return UserError(f"The label in {place} {problem}; correct it or remove the row.")

    def _labels(self, split: str) -> list[Any]:
        """The label of every row: a number, or the name that it has in this split."""
        table = self.splits[split][1]
        values, names = table[self.label_column][:], getattr(table.features[self.label_column], "names", None)
        for row, value in enumerate(values):
            if _is_missing(value):
                raise self._bad_label(split, row, f"is missing ({value!r})")
        named = dict(enumerate(names or ()))
        if split != "train" and self._has_numbers and not any(name in self._classes for name in named.values()):
            named = {}
        return [named.get(value, value) for value in values]

    def _positions(self, split: str) -> Tensor:
        """Positions among the classes, int64 (n,)."""
        labels = self._labels(split)
        for row, label in enumerate(labels):
            if label not in self._classes:
                names = listed(map(repr, self.class_names), most=10)
                near = did_you_mean(label, self.class_names) if isinstance(label, str) else ""
                problem = f"is {label!r}{near}, none of the {len(self.class_names)} training classes ({names})"
                raise self._bad_label(split, row, problem)
        return tensor([self._classes[label] for label in labels])


def _is_missing(label: Any) -> bool:
    return label is None or label == -1 or (isinstance(label, str) and not label.strip())


def _classes(values: list[Any], are_positions: bool) -> dict[Any, int]:
    """The class of every label that a split may hold: its name, its number in the training split, or both."""
    classes = {str(value): position for position, value in enumerate(values)}
    numbers = {int(name): position for name, position in classes.items() if re.fullmatch("0|[1-9][0-9]{0,17}", name)}
    if are_positions:  # a number stands for the name there, unless it might be one of the names
        positions = {position: position for position in classes.values()}
        numbers = positions if not numbers or numbers == positions else {}
    return classes | dict(zip(values, classes.values(), strict=True)) | numbers


# -- the files of a data set


def is_table(root: Path, label_column: str) -> bool:
    """Whether a folder holds files of a data set and no folders of images.

    A ``metadata.csv`` is one if it tells file and label; beside class folders others are left out.

    Raises:
        UserError: it has no column of labels, and there are no class folders either.
    """
    found = list(_tables_in(root))
    headers = {path: _header(path) for path in found if path.name == _METADATA}
    if len(headers) < len(found) or any({"file_name", label_column} <= header.keys() for header in headers.values()):
        return True
    for path, header in headers.items():
        if "file_name" in header and len([each for each in root.iterdir() if each.is_dir()]) < 2:
            near = did_you_mean(label_column, header)
            raise UserError(
                f"data.label_column is {label_column!r}{near}, but the columns of '{path}' are {listed(header)}; name "
                "that of the labels."
            )
    return False


def _header(path: Path) -> dict[str, None]:
    """The columns of a CSV, in order."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        return dict.fromkeys(next(csv.reader(file), []))


def _tables_in(root: Path) -> Iterator[Path]:
    names = (*(f"*{kind}" for kind in _FILES), _METADATA)
    found = chain.from_iterable(root.glob(f"{where}{name}") for where in ("", "*/") for name in names)
    return (path for path in found if path.is_file() and "/." not in f"/{path.relative_to(root).as_posix()}")


def _load(root: str, label_column: str, left_out: Counter[str]) -> dict[str, Any]:
    """The tables of a data set, by the names of their splits."""
    require_extra("hub", "datasets", f"data.root '{root}'")
    from datasets import load_dataset, load_from_disk  # takes a second, and only these sources need it

    folder = Path(root)
    try:
        if not folder.is_dir():
            return dict(load_dataset(root))
        if (folder / "state.json").exists():  # as `save_to_disk` writes a single table
            return {"train": load_from_disk(root)}
        if not (folder / "dataset_dict.json").exists():
            return _load_files(folder, label_column, left_out)
        return dict(load_from_disk(root))
    except UserError:
        raise
    except Exception as error:  # whatever its many readers raise
        raise UserError(
            f"data.root '{root}' is neither a folder of images here nor a data set that could be loaded "
            f"({one_line(error)}); give the folder of a whole data set, or of images."
        ) from None


def _load_files(root: Path, label_column: str, left_out: Counter[str]) -> dict[str, Any]:
    from datasets import load_dataset, load_dataset_builder

    # The whole path, as the names of some folders, such as parquet, mean readers to the library.
    where = {"path": str(root.absolute()), "data_files": _files_in_capitals(root) or _files_behind_links(root)}
    builder = load_dataset_builder(**where)
    files = {str(split): list(map(str, found)) for split, found in (builder.config.data_files or {}).items()}
    used = {Path(file).resolve() for found in files.values() for file in found}
    for path in _tables_in(root):
        if path.resolve() not in used and path.name != _METADATA:
            left_out[f"file {str(path.relative_to(root))!r}"] = 1
    # Of several files the library takes the first one's class names for the numbers of all.
    kinds = {file: _label_kind(file, label_column) for found in files.values() for file in found}
    if len(set(kinds.values())) < 2:
        tables = dict(load_dataset(**where))
        pictures = sum(path.suffix.lower() in IMG_EXTENSIONS for path in used)
        if (without := pictures - sum(map(len, tables.values()))) > 0:
            left_out["images without a row of metadata"] = without
        return tables
    for split, found in files.items():
        first, kind = found[0], kinds[found[0]]
        other = next((file for file in found if kinds[file] != kind and "ClassLabel" in f"{kind}{kinds[file]}"), None)
        if other:
            raise UserError(
                f"Column {label_column!r} holds {kind} in '{first}' but {kinds[other]} in '{other}', both of the split "
                f"{split!r}; write them alike."
            )
    return {
        split: load_dataset(where["path"], data_files={"train": found}, split="train") for split, found in files.items()
    }


def _files_in_capitals(root: Path) -> dict[str, list[str]] | None:
    """The files of every split if the names have capitals, which the library does not know; otherwise None."""
    named: dict[str, list[str]] = defaultdict(list)
    has_capitals = False
    for path in sorted(root.iterdir()):
        if (word := split_word(path.stem)) and (path.is_dir() or path.suffix in _FILES):
            kind = next((kind for kind in _FILES[:2] if any(path.rglob(f"*{kind}"))), "")
            named[str(split_of(word))].append(f"{path.name}/**/*{kind}" if path.is_dir() else path.name)
            has_capitals |= word != word.lower()
    return dict(named) if has_capitals else None


def _files_behind_links(root: Path) -> dict[str, list[str]] | None:
    """The files of every split if one lies behind a link to a folder, which the library does not follow."""
    folders = {split: path for path in root.iterdir() if path.is_dir() and (split := split_of(path.name))}
    if not any(path.is_symlink() for path in folders.values()):
        return None
    return {split: [f"{path.resolve()}/**"] for split, path in folders.items()}


def _label_kind(file: str, column: str) -> str | None:
    """The type of a file's labels; None for kinds of files without a schema."""
    from datasets import Features
    from pyarrow import ArrowInvalid, ipc, memory_map, parquet

    if file.endswith(".parquet"):
        schema = parquet.read_schema(file)
    elif file.endswith(".arrow"):
        with memory_map(file) as source:
            try:
                schema = ipc.open_stream(source).schema
            except ArrowInvalid:
                schema = ipc.open_file(source).schema
    else:
        return None
    return str(Features.from_arrow_schema(schema).get(column))


def _choose(tables: dict[str, Any], left_out: Counter[str]) -> dict[str, tuple[str, Any]]:
    """The name and the table that are taken for each of our splits."""
    chosen = {}
    for name in sorted(tables, key=lambda name: USUAL.index(name) if name in USUAL else len(USUAL)):
        split = split_of(name)
        if split and split not in chosen:
            chosen[split] = (name, tables[name])
        else:
            left_out[f"rows of the split {name!r}"] = len(tables[name])
    return chosen
