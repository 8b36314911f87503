"""Labels as written in a file, as the tensors that a loss takes."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from srlora_pl.data.tables import Table, is_missing
from srlora_pl.errors import UserError, did_you_mean

Problem = Literal["single_label", "multi_label", "regression"]


def class_text(value: Any) -> str:
    """A class as people write it: ``2`` also where a table holds the number 2.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def class_names(values: Iterable[Any]) -> list[str]:
    """The distinct classes among ``values``, whole numbers in their order, others in the alphabet's."""
    names = {class_text(value) for value in values}
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)


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
        parts = value if isinstance(value, list) else text.split(separator)
        for part in parts:
            if is_missing(part) or isinstance(part, list | dict):
                raise UserError(
                    f"The label in column {column!r} holds {part!r}, which names no class, in {table.where(row)}; "
                    "correct it or remove the row."
                )
            table.require_characters("label", part, column, row)
        sets.append([name for name in map(class_text, parts) if name])
    return sets


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
            raise UserError(
                f"The label in column {column!r} is a list in {table.where(row)}; set data.problem to multi_label, or "
                f"write one label."
            )
        table.require_characters("label", value, column, row)
    return values


def _is_empty(value: Any) -> bool:
    return is_missing(value) or class_text(value).lower() in ("", "nan")


def _no_label(where: str, column: str) -> UserError:
    return UserError(f"The label in column {column!r} is missing (empty or NaN) in {where}; fill or remove the row.")


def _look_up(known: dict[str, int], label: str, where: Callable[[int], str], column: str, row: int) -> int:
    if label not in known:
        names = ", ".join(list(known)[:10]) + (", ..." if len(known) > 10 else "")
        raise UserError(
            f"The label {label!r} in column {column!r} of {where(row)} is none of the {len(known)} classes "
            f"({names}){did_you_mean(label, known)}; correct it or remove the row."
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
