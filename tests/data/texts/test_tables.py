"""Rows and columns come out of files as they were written; what is wrong is said with its place."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from srlora_pl.data.texts.tables import Table, read_table
from srlora_pl.util.errors import UserError
from tests.helpers.errors import mentions

WHY = {"text": "that data.text_column names", "label": "that data.label_column names"}
TEXTS = ['He said "no", twice', "two\nlines", "tabs\tare fine", "naïve ☃\u2028 one row"]


def read(path: Path, content: bytes | str | None = None, **options: object) -> Table:
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(path, WHY, **options)  # type: ignore[arg-type]


def write_parquet(path: Path) -> None:
    parquet.write_table(pa.table({"id": [1, 2, 3, 4], "text": TEXTS, "label": [0, 1, 0, 1]}), path)


def write_json(path: Path) -> None:
    path.write_text("\n\n".join(json.dumps({"label": i % 2, "text": text}) for i, text in enumerate(TEXTS)))


def write_csv(path: Path) -> None:
    rows = "".join(f'{i},"{text.replace(chr(34), chr(34) * 2)}",{i % 2}\r\n' for i, text in enumerate(TEXTS))
    path.write_bytes(b"\xef\xbb\xbf" + f"id,text,label\r\n{rows}".encode())


@pytest.mark.parametrize(
    ("name", "write", "places"),
    [
        ("a.parquet", write_parquet, ["row 1", "row 2", "row 3", "row 4"]),
        ("a.jsonl", write_json, ["line 1", "line 3", "line 5", "line 7"]),
        ("a.CSV", write_csv, ["line 2", "line 3", "line 5", "line 6"]),
    ],
)
def test_every_kind_of_file(name: str, write: Callable[[Path], None], places: list[str], tmp_path: Path) -> None:
    write(tmp_path / name)
    table = read(tmp_path / name)
    assert table.texts("text") == TEXTS
    assert [int(label) for label in table.columns["label"]] == [0, 1, 0, 1]
    assert list(table.columns) == ["text", "label"]
    assert [table.where(row) for row in range(4)] == [f"{place} of {tmp_path / name}" for place in places]


def test_a_quote_in_a_tsv_is_a_letter(tmp_path: Path) -> None:
    table = read(tmp_path / "a.tsv", 'text\tlabel\r\n" open\t0\r\n"both"\t1\n\nlast \x85 one\t0')
    assert table.columns["text"] == ['" open', '"both"', "last \x85 one"]
    assert list(table.lines) == [2, 3, 5]


@pytest.mark.parametrize(
    ("texts", "quoting"),
    [
        (['He said "hi" to me', "plain"], csv.QUOTE_MINIMAL),
        (['"all of it"', '5" tall', '"'], csv.QUOTE_MINIMAL),
        (["two\nlines", "plain", "two\ttabs\t"], csv.QUOTE_MINIMAL),
        (['He said "hi" to me', "a tab\tand\na line", "plain"], csv.QUOTE_MINIMAL),
        (["plain", "a tab\tand\na line"], csv.QUOTE_ALL),
        (["plain", "w1"], csv.QUOTE_NONNUMERIC),
    ],
)
@pytest.mark.parametrize("name", ["a.tsv", "a.TSV"])
def test_a_tsv_that_pandas_quoted(name: str, texts: list[str], quoting: int, tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": texts, "label": range(len(texts))})
    frame.to_csv(tmp_path / name, sep="\t", index=False, quoting=quoting)  # type: ignore[call-overload]
    table = read(tmp_path / name)
    assert table.columns == {"text": texts, "label": [str(i) for i in range(len(texts))]}


@pytest.mark.parametrize(
    ("texts", "is_said"),
    [
        (['5" tall', '6" tall'], False),
        (['"Hello," she said.', "w1"], False),
        (['"both"', "w1"], True),  # pandas would have left it bare, or written the quotes of the text twice
        (['"He said ""hi"""', '5" tall'], True),
        (['"I came.', "I saw.", 'I conquered."'], True),
    ],
)
def test_quotes_that_are_letters_of_a_tsv(
    texts: list[str], is_said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        table = read(tmp_path / "a.tsv", "text\tlabel\n" + "".join(f"{text}\tx\n" for text in texts))
    assert table.columns == {"text": texts, "label": ["x"] * len(texts)}
    assert ("a.tsv' stand in quotes, which are read as part of them" in caplog.text) == is_said


def test_quotes_are_letters_where_that_is_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        table = read(tmp_path / "a.tsv", 'text\tlabel\n"He said ""hi"""\tx\n', may_be_quoted=False)
    assert table.columns["text"] == ['"He said ""hi"""']
    assert not caplog.records


def test_another_separator(tmp_path: Path) -> None:
    table = read(tmp_path / "a.csv", 'label;text\n0;"a; b"\n1;c, d\n', separator=";")
    assert table.columns == {"text": ["a; b", "c, d"], "label": ["0", "1"]}


def test_an_optional_column_and_a_header_of_our_own(tmp_path: Path) -> None:
    assert list(read(tmp_path / "a.csv", "text\na\n", optional=["label"]).columns) == ["text"]
    assert read(tmp_path / "a.tsv", "a\t1\nb\t0\n", header=["text", "label"]).columns["text"] == ["a", "b"]


def test_broken_rows_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    table = read(tmp_path / "a.tsv", "text\tlabel\na\t1\nbroken\nb\t0\n", skip_broken=True)
    assert table.columns["text"] == ["a", "b"]
    assert list(table.lines) == [2, 4]
    assert table.broken == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tain.csv", None, ["tain.csv'", "'train.csv'"]),
        ("notes.txt", "text,label\n", [".csv", ".tsv", ".jsonl", ".json", ".parquet"]),
        (
            "a.csv",
            "text,lable\na,1\n",
            ["'label'", "'lable'", "data.label_column", "text, lable"],
        ),
        ("a.csv", '"te\nxt",label\na,1\n', ["'text'", "te xt, label"]),
        ("a.csv", "text;label\na;1\n", ['","', '";"', "data.separator"]),
        ("a.csv", '"id";"text"\na,b;1\n', ['";"']),
        ("a.csv", "text\tlabel\na\t1\n", ['"\\t"']),
        ("a.tsv", "text,label\na,1\n", ['"\\t"', '","']),
        ("a.csv", "text,label\na,1\n\na, b,1\n", ["Line 4", "a.csv", "3", "2 fields", "quotes"]),
        ("a.tsv", "text\tlabel\nalone\n", ["Line 2", "a.tsv", "1", "2 fields"]),
        ("a.csv", 'text,label\na,1\n"open,1\nb,1\n', ["line 3", "a.csv"]),
        ("a.csv", b"text,label\na,1\ncaf\xe9,1\n", ["Line 3", "a.csv", "0xe9", "UTF-8"]),
        ("a.csv", b"\xef\xbb\xbftext,label\na,1\ncaf\xe9,1\n", ["Line 3", "0xe9"]),
        ("a.csv", "text,label\n", ["no rows"]),
        ("a.csv", "", ["a.csv'", "no rows"]),
        ("a.jsonl", "", ["no rows"]),
        ("a.jsonl", '{"text": "a", "label": 0}\n{"text": \n', ["Line 2", "a.jsonl", "JSON"]),
        ("a.jsonl", '["a", 0]\n', ["Line 1", "a.jsonl", "JSON"]),
        ("a.jsonl", '{"txt": "a", "label": 0}\n', ["'text'", "'txt'"]),
        ("a.parquet", "text,label\n", ["a.parquet", "parquet file"]),
    ],
)
def test_errors_name_the_file_and_the_place(
    name: str, content: bytes | str | None, words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "train.csv").write_text("text,label\n")
    with pytest.raises(UserError, match=mentions(*words)) as caught:
        read(tmp_path / name, content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": " ", "label": 0}', ["'text'", "empty", "line 2"]),
        ('{"label": 0}', ["'text'", "empty", "line 2"]),
        ('{"text": NaN, "label": 0}', ["'text'", "empty", "line 2"]),
        ('{"text": 3, "label": 0}', ["'text'", "3", "line 2"]),
        ('{"text": "\\ud83d", "label": 0}', ["line 2", "half a character"]),
    ],
)
def test_a_text_must_be_text(line: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions(*words)):
        read(tmp_path / "a.jsonl", '{"text": "good", "label": 0}\n' + line).texts("text")


def test_half_a_character_of_another_column_is_nobodys_business(tmp_path: Path) -> None:
    line = '{"text": "\\ud83d\\ude00", "label": 0, "other": "\\ud83d"}'
    assert read(tmp_path / "a.jsonl", line).texts("text") == ["\U0001f600"]


def test_what_is_no_text_is_shown_in_short(tmp_path: Path) -> None:
    table = read(tmp_path / "a.jsonl", json.dumps({"text": ["long"] * 1000, "label": 0}))
    with pytest.raises(UserError, match=mentions("'text'", "['long', 'long'", "not text", "line 1 of")) as raised:
        table.texts("text")
    assert len(str(raised.value)) < 150 + len(str(tmp_path))
