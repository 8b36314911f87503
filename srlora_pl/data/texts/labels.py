"""Labels as written in a file, as the tensors that a loss takes."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Literal
from unicodedata import normalize

import torch
from torch import Tensor

from srlora_pl.data.texts.tables import Table, is_missing
from srlora_pl.util.errors import UserError, did_you_mean, listed

Problem = Literal["single_label", "multi_label", "regression"]


def class_text(value: Any) -> str:
    """A class as people write it: ``2`` also where a table holds the number 2.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def class_names(values: Iterable[Any]) -> list[str]:
    """The distinct classes among ``values``, each as it is written: ``1`` and ``01`` are two.

    Their order depends on nothing but the names: if all are whole numbers in plain digits it is that of the numbers,
    otherwise the alphabet's.
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
    try:
        number = Decimal(name)
    except InvalidOperation:
        number = Decimal("NaN")
    return number if number.is_finite() else normalize("NFKC", name).casefold()


def name_numbers(table: Table, column: str) -> None:
    """Put the names of a ``ClassLabel`` of the `datasets` library in place of its numbers, None for -1 (no label).

    Its numbers mean nothing by themselves: two files may hold the same names in another order.
    """
    names = table.class_labels.get(column)
    if names is None:
        return

    def name(value: Any, row: int) -> str | None:
        if is_missing(value) or value == -1:
            return None
        if value not in range(len(names)):
            raise UserError(
                f"The label {value!r} in column {column!r} of {table.where(row)} is none of the numbers from 0 to "
                f"{len(names) - 1} that the file has names for; write the file again."
            )
        return names[int(value)]

    table.columns[column] = [
        [name(part, row) for part in value] if isinstance(value, list) else name(value, row)
        for row, value in enumerate(table.columns[column])
    ]


def encode_classes(table: Table, column: str, classes: Sequence[str]) -> Tensor:
    """Positions among ``classes``, int64 (n,)."""
    known = {name: index for index, name in enumerate(classes)}
    labels = [class_text(value) for value in present(table, column)]
    return torch.tensor([_look_up(known, label, table.where, column, row) for row, label in enumerate(labels)])


def encode_sets(table: Table, column: str, classes: Sequence[str], separator: str) -> Tensor:
    """One row of zeros and ones for every sample, float32 (n, classes)."""
    known = {name: index for index, name in enumerate(classes)}
    labels = torch.zeros(len(table), len(classes))
    for row, names in enumerate(label_sets(table, column, separator)):
        for name in names:
            labels[row, _look_up(known, name, table.where, column, row)] = 1
    return labels


def label_sets(table: Table, column: str, separator: str) -> list[list[str]]:
    """The classes of each sample, from a list or from a text with ``separator``; an empty one has none."""
    sets = []
    for row, value in enumerate(table.columns[column]):
        if is_missing(value):
            raise _no_label(table.where(row), column)
        text = class_text(value)
        if not isinstance(value, list) and text.startswith("[") and text.endswith("]"):
            raise UserError(
                f"The label in column {column!r} is {text!r}, a list written as text, in {table.where(row)}; write its "
                f"classes with {separator!r} between, or a JSON-lines file with lists."
            )
        parts = value if isinstance(value, list) else [value] if _names_nothing(value) else text.split(separator)
        for part in parts:
            if is_missing(part) or _names_nothing(part):
                raise _no_class(part, table.where(row), column)
            table.require_characters("label", part, column, row)
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
            raise _vector(rows[found], table.where(found), column)


def _is_share(text: str) -> bool:
    """Whether it is a number from -1 to 1, or true or false."""
    try:
        return abs(float({"true": "1", "false": "0"}.get(text.lower(), text))) <= 1
    except ValueError:
        return False


def encode_numbers(table: Table, column: str) -> Tensor:
    """Finite numbers, float32 (n,)."""
    return torch.tensor([_number(value, table.where, column, row) for row, value in enumerate(present(table, column))])


def is_labelled(table: Table, column: str) -> bool:
    """Whether the column is there and holds any label; hidden ones are left empty or -1."""
    return not all(_is_empty(value) or class_text(value) == "-1" for value in table.columns.get(column, ()))


def present(table: Table, column: str) -> list[Any]:
    """The labels as written, one in every row."""
    values = table.columns[column]
    for row, value in enumerate(values):
        if _is_empty(value):
            raise _no_label(table.where(row), column)
        if isinstance(value, list):
            if len(value) > 1 and all(_is_share(str(part)) for part in value):
                raise _vector(value, table.where(row), column)
            raise UserError(
                f"The label in column {column!r} is a list in {table.where(row)}; set data.problem to multi_label, or "
                f"write one label."
            )
        if _names_nothing(value):
            raise _no_class(value, table.where(row), column)
        table.require_characters("label", value, column, row)
    return values


def _is_empty(value: Any) -> bool:
    return is_missing(value) or class_text(value).lower() in ("", "nan")


def _names_nothing(value: Any) -> bool:
    return isinstance(value, list | dict | bytes)


def _no_label(where: str, column: str) -> UserError:
    return UserError(
        f"The label in column {column!r} is missing (empty, NaN, or -1 of a ClassLabel) in {where}; fill or remove the "
        f"row."
    )


def _no_class(value: Any, where: str, column: str) -> UserError:
    return UserError(
        f"The label in column {column!r} holds {value!r}, which names no class, in {where}; correct it or remove the "
        f"row."
    )


def _vector(numbers: Sequence[Any], where: str, column: str) -> UserError:
    return UserError(
        f"The label in column {column!r} is {listed(numbers, most=10)} in {where}, a number for every class and "
        f"not the names of classes; write the names of those that the sample has."
    )


def _look_up(known: dict[str, int], label: str, where: Callable[[int], str], column: str, row: int) -> int:
    if label not in known:
        raise UserError(
            f"The label {label!r} in column {column!r} of {where(row)} is none of the {len(known)} classes "
            f"({listed(known, most=10)}){did_you_mean(label, known)}; correct it or remove the row."
        )
    return known[label]


def _number(value: Any, where: Callable[[int], str], column: str, row: int) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= torch.finfo(torch.float32).max:
        shown = f"{str(value)[:37]}..." if len(str(value)) > 40 else repr(value)
        raise UserError(
            f"The label {shown} in column {column!r} of {where(row)} is not a finite number (of 32 bits); correct it, "
            f"or remove the row."
        )
    return number
