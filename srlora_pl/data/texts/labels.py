"""Labels as written in a file, as the tensors that a loss takes."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from typing import Any, Literal
from unicodedata import normalize

import torch
from torch import Tensor

from srlora_pl.data.texts.tables import Table, is_missing
from srlora_pl.util.errors import UserError, did_you_mean, listed, shortened

Problem = Literal["single_label", "multi_label", "regression"]


# -- names of classes


def class_text(value: Any) -> str:
    """A class as people write it: ``2`` also where a table holds the number 2.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def class_names(values: Iterable[Any]) -> list[str]:
    """The distinct classes among ``values``, each as it is written: ``1`` and ``01`` are two.

    Their order depends on the names alone: by number if all are whole numbers in plain digits, otherwise by alphabet.
    """
    names = sorted({class_text(value) for value in values})
    if all(re.fullmatch(r"-?[0-9]{1,4000}", name) for name in names):
        names.sort(key=int)
    return names


def look_alikes(names: Iterable[str]) -> list[list[str]]:
    """Groups of ``names`` that differ only in how a number or a letter is written, such as ``1`` and ``01``."""
    groups: dict[Decimal | str, list[str]] = defaultdict(list)
    for name in names:
        groups[_plain(name)].append(name)
    return [group for group in groups.values() if len(group) > 1]


def _plain(name: str) -> Decimal | str:
    with suppress(InvalidOperation):
        if (number := Decimal(name)).is_finite():
            return number
    return normalize("NFKC", name).casefold()


def name_numbers(table: Table, column: str) -> None:
    """Replace the numbers of a ``ClassLabel`` by their names, and -1 (no label) by None.

    The numbers mean nothing by themselves: two files may list the same names in another order.
    """
    names = table.class_labels.get(column)
    if names is None:
        return

    def name(value: Any, row: int) -> str | None:
        if is_missing(value) or value == -1:
            return None
        if value not in range(len(names)):
            raise _bad(table, column, row, f"is {value!r}, but the file names the numbers 0 to {len(names) - 1}")
        return names[int(value)]

    table.columns[column] = [
        [name(part, row) for part in value] if isinstance(value, list) else name(value, row)
        for row, value in enumerate(table.columns[column])
    ]


# -- labels as tensors


def encode_classes(table: Table, column: str, classes: Sequence[str]) -> Tensor:
    """Positions among ``classes``, int64 (n,)."""
    known = {name: index for index, name in enumerate(classes)}
    labels = map(class_text, present(table, column))
    return torch.tensor([_position(table, column, row, label, known) for row, label in enumerate(labels)])


def encode_sets(table: Table, column: str, classes: Sequence[str], separator: str) -> Tensor:
    """A row of zeros and ones for every sample, float32 (n, classes)."""
    known = {name: index for index, name in enumerate(classes)}
    labels = torch.zeros(len(table), len(classes))
    for row, names in enumerate(label_sets(table, column, separator)):
        for name in names:
            labels[row, _position(table, column, row, name, known)] = 1
    return labels


def _position(table: Table, column: str, row: int, label: str, known: Mapping[str, int]) -> int:
    if label not in known:
        near, classes = did_you_mean(label, known), listed(known, most=10)
        raise _bad(table, column, row, f"is {shortened(label)}{near}, none of the {len(known)} classes ({classes})")
    return known[label]


def encode_numbers(table: Table, column: str) -> Tensor:
    """Finite numbers, float32 (n,)."""
    return torch.tensor([_number(table, column, row, value) for row, value in enumerate(present(table, column))])


def _number(table: Table, column: str, row: int, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise _bad(table, column, row, f"is {shortened(value)}, not a finite number of 32 bits")
    return number


# -- labels that are missing or no labels


def present(table: Table, column: str) -> list[Any]:
    """The labels as written, one in every row."""
    values = table.columns[column]
    for row, value in enumerate(values):
        if _is_empty(value):
            raise _missing(table, column, row)
        if isinstance(value, list):
            if len(value) > 1 and all(_is_share(str(part)) for part in value):
                raise _vector(table, column, row, value)
            mend = "set data.problem to multi_label, or write one label"
            raise _bad(table, column, row, f"is the list {shortened(value)}", mend)
        _require_name(table, column, row, value)
    return values


def label_sets(table: Table, column: str, separator: str) -> list[list[str]]:
    """The classes of each sample, from a list or from a text with ``separator``; an empty one has none."""
    sets = []
    for row, value in enumerate(table.columns[column]):
        if is_missing(value):
            raise _missing(table, column, row)
        if isinstance(value, str) and value.strip().startswith("[") and value.strip().endswith("]"):
            mend = f"write its classes with {separator!r} between, or a JSON-lines file with lists"
            raise _bad(table, column, row, f"is {shortened(value)}, a list written as text", mend)
        parts = value if isinstance(value, list) else value.split(separator) if isinstance(value, str) else [value]
        for part in parts:
            _require_name(table, column, row, part)
        sets.append([name for name in map(class_text, parts) if name])
    return sets


def refuse_vectors(table: Table, column: str, sets: Sequence[Sequence[str]]) -> None:
    """Refuse labels with a number for every class, such as [1, 0, 0]: they would be taken for classes 0 and 1.

    Sets of classes that are honestly named 0 and 1 name none of them twice, and are not all of one size; where every
    sample has both there is nothing to learn. Probabilities and -1 are numbers of this kind too.
    """
    rows = [[number for name in names for number in re.findall(r"[^\s,;|()]+", name)] for names in sets]
    if all(map(_is_share, {number for row in rows for number in row})):
        twice = (place for place, row in enumerate(rows) if len(set(row)) < len(row))
        alike = len(rows[0]) > 1 and len({len(row) for row in rows}) == 1
        found = next(twice, 0 if alike else None)
        if found is not None:
            raise _vector(table, column, found, rows[found])


def is_labelled(table: Table, column: str) -> bool:
    """Whether the column is there and holds any label; hidden ones are left empty or -1."""
    return not all(_is_empty(value) or class_text(value) == "-1" for value in table.columns.get(column, ()))


def _is_empty(value: Any) -> bool:
    return is_missing(value) or class_text(value).lower() in ("", "nan")


def _is_share(text: str) -> bool:
    """Whether it is a number from -1 to 1, or true or false."""
    try:
        return abs(float({"true": "1", "false": "0"}.get(text.lower(), text))) <= 1
    except ValueError:
        return False


def _require_name(table: Table, column: str, row: int, value: Any) -> None:
    if is_missing(value) or isinstance(value, list | dict | bytes):
        raise _bad(table, column, row, f"holds {shortened(value)}, which names no class")


def _missing(table: Table, column: str, row: int) -> UserError:
    return _bad(table, column, row, "is missing (empty, NaN, or -1 of a ClassLabel)", "fill or remove the row")


def _vector(table: Table, column: str, row: int, numbers: Sequence[Any]) -> UserError:
    shown = listed(numbers, most=10)
    mend = "write the names of the classes that the sample has"
    return _bad(table, column, row, f"is {shown}, a number for every class", mend)


def _bad(table: Table, column: str, row: int, problem: str, mend: str = "correct it or remove the row") -> UserError:
    return UserError(f"The label in column {column!r} of {table.where(row)} {problem}; {mend}.")
