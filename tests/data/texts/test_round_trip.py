"""Whatever a table holds comes out of its file as it was written, or is refused in one sentence that names the file."""

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from srlora_pl import TextData, UserError

FILES = ["a.csv", "a.tsv", "quoted.tsv", "a.jsonl", "a.parquet"]
LETTER = st.sampled_from(list("ab\"',;|\t\n\r\\ \u2028\x85\ufeff0")) | st.characters(codec="utf-8")
TEXT = st.text(LETTER, max_size=8)
NAME = st.sampled_from(["a", "A", "é", "no", "null", "nan", "", "-1", "0", "00", "1", "1.0", "1_1", "11", "1e3"]) | TEXT
LABELS: dict[str, st.SearchStrategy[Any]] = {
    "texts": NAME,
    "integers": st.integers(-3, 3) | st.integers(-(2**63), 2**63 - 1),
    "floats": st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.0, 10.0, 1e300]) | st.floats(),
    "booleans": st.booleans(),
    "missing": st.sampled_from(["a", "b", None]),
}
SETS = {"texts": st.lists(NAME, max_size=3), "integers": st.lists(st.integers(-1, 12), max_size=3)}
THOROUGH = settings(max_examples=40, deadline=None, derandomize=True)


def write(path: Path, rows: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """As pandas and people write tables; the rows in the file, for what a kind of file cannot hold."""
    if path.name == "a.tsv":
        # A tab or line break between quotes could also be one between texts that begin and end with a quote.
        rows = [(re.sub(r"[\t\r\n]", " ", text), _without_breaks(label)) for text, label in rows]
    texts, labels = map(list, zip(*rows, strict=True))
    if path.suffix == ".parquet":
        parquet.write_table(pa.table({"text": texts, "label": labels}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    else:
        file = io.StringIO()
        quoting = csv.QUOTE_ALL if path.name == "quoted.tsv" else csv.QUOTE_MINIMAL
        table = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t", quoting=quoting)
        table.writerow(["text", "label"])
        rows = [(text, ",".join(map(str, label)) if isinstance(label, list) else label) for text, label in rows]
        table.writerows(rows)
        path.write_bytes(file.getvalue().encode())
    return rows


def _without_breaks(label: Any) -> Any:
    if isinstance(label, list):
        return [_without_breaks(part) for part in label]
    return re.sub(r"[\t\r\n]", " ", label) if isinstance(label, str) else label


def read(path: Path, **options: Any) -> tuple[list[str], list[str], Any] | None:
    """Classes, texts and labels; None where they are refused, in one line and with the file's name."""
    refusal = ""
    try:
        data = TextData(str(path), val_fraction=0.0, **options)
        texts = data.read("train")
    except UserError as error:
        refusal = str(error)
    if refusal:
        assert len(refusal.splitlines()) == 1
        assert str(path) in refusal
        return None
    assert texts.labels is not None
    return data.class_names, list(texts.first), texts.labels


def name_of(label: Any, path: Path) -> str:
    """A class as the file shows it to people."""
    if isinstance(label, float) and label.is_integer() and path.suffix in (".jsonl", ".parquet"):
        label = int(label)
    return str(label).strip()


def is_missing(label: Any) -> bool:
    return label is None or str(label).strip().lower() in ("", "nan")


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("file", FILES)
def test_one_class_a_text(file: str, labels: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("table") / file

    @THOROUGH
    @given(st.lists(st.tuples(TEXT, LABELS[labels]), min_size=1, max_size=6))
    def check(rows: list[tuple[str, Any]]) -> None:
        rows = write(path, rows)
        names = [name_of(label, path) for _, label in rows]
        found = read(path)
        unusable = any(is_missing(label) or not text.strip() for text, label in rows) or len(set(names)) < 2
        assert (found is None) == unusable
        if found:
            classes, texts, numbers = found
            assert texts == [text for text, _ in rows]
            assert [classes[number] for number in numbers] == names
            assert sorted(classes) == sorted(set(names))

    check()


@pytest.mark.parametrize("labels", SETS)
@pytest.mark.parametrize("file", FILES)
def test_several_classes_a_text(file: str, labels: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("table") / file

    @THOROUGH
    @given(st.lists(st.tuples(TEXT, SETS[labels]), min_size=1, max_size=6))
    def check(rows: list[tuple[str, Any]]) -> None:
        rows = write(path, rows)
        lists = [label.split(",") if isinstance(label, str) else label for _, label in rows]
        sets = [{name_of(part, path) for part in each} - {""} for each in lists]
        found = read(path, problem="multi_label")
        if found:
            classes, texts, rows_of_bits = found
            assert texts == [text for text, _ in rows]
            assert [{classes[i] for i in bits.nonzero()[:, 0].tolist()} for bits in rows_of_bits] == sets
            assert sorted(classes) == sorted(set().union(*sets))
        else:
            is_list = any(isinstance(label, str) and re.fullmatch(r"\[.*\]", label.strip(), re.S) for _, label in rows)
            names = set().union(*sets)
            assert any(not text.strip() for text, _ in rows) or len(names) < 2 or is_list or all(map(_is_bit, names))

    check()


def _is_bit(name: str) -> bool:
    """Whether it may be a number of a vector such as [1, 0, 0], which is refused."""
    return all(re.fullmatch(r"[-+]?[01](\.0)?|00", part) for part in re.split(r"[\s,;|()]+", name) if part)


@pytest.mark.parametrize("file", FILES)
def test_numbers(file: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("table") / file

    @THOROUGH
    @given(st.lists(st.tuples(TEXT, st.floats(width=32)), min_size=1, max_size=6))
    def check(rows: list[tuple[str, float]]) -> None:
        rows = write(path, rows)
        found = read(path, problem="regression")
        assert (found is None) == any(not math.isfinite(number) or not text.strip() for text, number in rows)
        if found:
            assert found[0] == []
            assert found[1] == [text for text, _ in rows]
            assert found[2].tolist() == [number for _, number in rows]

    check()
