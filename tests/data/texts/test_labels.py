"""Classes come out as they were written, in an order that depends on nothing but their names."""

from pathlib import Path
from typing import Any

import pytest

from srlora_pl.data.texts.labels import class_names, label_sets, look_alikes, present, refuse_vectors
from srlora_pl.data.texts.tables import Table
from srlora_pl.util.errors import UserError
from tests.helpers.errors import mentions


def column(*labels: Any) -> Table:
    return Table(Path("a.jsonl"), {"label": list(labels)}, range(1, len(labels) + 1))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([10, 9, -1, 9], ["-1", "9", "10"]),
        ([2.0, "2", 0.5], ["0.5", "2"]),
        (["b", "a", " b "], ["a", "b"]),
        ([2**63, 2**63 - 1], ["9223372036854775807", "9223372036854775808"]),
        # int() reads these alike, and a set has them in another order in every process.
        (["1", "01", "001", "0001", "2"], ["0001", "001", "01", "1", "2"]),
        (["0", "-0", "00"], ["-0", "0", "00"]),
        (["2", "1_1", "11"], ["11", "1_1", "2"]),
        (["2", "+1", "1"], ["+1", "1", "2"]),
        (["٣", "3", "10"], ["10", "3", "٣"]),
        (["9" * 5000, "10"], ["10", "9" * 5000]),
    ],
)
def test_classes_and_their_order(labels: list[Any], classes: list[str]) -> None:
    assert class_names(labels) == class_names(reversed(labels)) == classes


def test_names_that_look_alike() -> None:
    names = ["1", "01", "1.0", "2", "no", "No", "e\u0301", "\u00e9", "nan", "9" * 400, "9" * 401]
    assert look_alikes(names) == [["1", "01", "1.0"], ["no", "No"], ["e\u0301", "\u00e9"]]


@pytest.mark.parametrize(
    "vectors",
    [
        [[1, 0, 0], [0, 1, 0], [0, 1, 1]],
        [[1.0, 0.0], [0.0, 1.0]],
        [[True, False], [True, True]],
        [["1", "0", "0"], ["0", "0", "0"]],
        [[0.9, 0.1], [0.3, 0.7]],
        [[1, -1, -1], [-1, -1, 1]],
        ["1,0,0", "0,1,1"],
        ["1 0 0", "0 1 1"],
        ["(1, 0, 0)", "(0, 1, 1)"],
        ["True,False", "False,True"],
        [[0, 1], [0, 0]],
        [[1, 0, 0], []],
    ],
)
def test_vectors_are_no_classes(vectors: list[Any]) -> None:
    table = column(*vectors)
    with pytest.raises(UserError, match=mentions("'label'", "a.jsonl", "number")):
        refuse_vectors(table, "label", label_sets(table, "label", ","))


@pytest.mark.parametrize(
    "sets",
    [
        [[0], [1], [0, 1], []],
        [[0], [1]],
        [[3, 10], [10, 4]],
        [[3, 3], [10, 10]],
        [["a", "b"], ["b", "a"]],
        ["0", "1", "0,1"],
        [[0, 1], [0, 1, 2], [1]],
    ],
)
def test_classes_named_by_numbers_are_classes(sets: list[Any]) -> None:
    table = column(*sets)
    refuse_vectors(table, "label", label_sets(table, "label", ","))


def test_one_class_written_as_a_vector_is_not_sent_on_to_multi_label() -> None:
    with pytest.raises(UserError, match=mentions("'label'", "0, 1, 0", "line 1", "a.jsonl")):
        present(column([0, 1, 0], [1, 0, 0]), "label")


@pytest.mark.parametrize("value", [{"a": 1}, b"a"])
def test_what_names_no_class(value: Any) -> None:
    for labels in (lambda: present(column("a", value), "label"), lambda: label_sets(column("a", value), "label", ",")):
        with pytest.raises(UserError, match=mentions("'label'", "line 2", "a.jsonl", "class")):
            labels()
