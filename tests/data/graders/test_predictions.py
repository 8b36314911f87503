"""``srlora grade``: answers graded again from their file."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli import cli, complaint


def line(split: str, index: int, text: str, reference: str, grader: str | None, **other: Any) -> dict[str, Any]:
    known = {"split": split, "index": index, "prompt": "?", "reference": reference, "text": text, "grader": grader}
    return {**known, "finished": True, "correct": None, "answer": None, "options": [], **other}


LINES = [
    line("gsm8k", 0, "The answer is: 7", "#### 7", "gsm8k"),
    line("gsm8k", 1, "The answer is: 8", "#### 7", "gsm8k", finished=False),
    line("gsm8k", 2, "I do not know", "#### 7", "gsm8k"),
    line("gsm8k", 3, "The answer is: 7", "#### 7", "gsm8k"),
    line("math", 0, "The answer is: 1+x", r"\boxed{x+1}", "math"),
    line("boolq", 0, "the correct answer is\u2028true", "true", "options", options=["true", "false"]),
    {
        "split": "boolq",
        "index": 1,
        "prompt": "?",
        "reference": "true",
        "correct": True,
        "answer": "true",
        "grader": "likelihood",
        "scores": {"true": -0.5, "false": -1.0},
    },
]


def file_of(home: Path, lines: list[dict[str, Any]]) -> str:
    text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in lines)
    (home / "predictions.jsonl").write_text(text, encoding="utf-8")
    return "predictions.jsonl"


def table(home: Path, *options: object) -> dict[str, list[str]]:
    code, out, err = cli("grade", *options, home=home)
    assert (code, err) == (0, "")
    header, _, *rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in out.splitlines()]
    assert header == ["split", "accuracy", "samples", "correct", "unfinished", "unreadable"]
    return {row[0]: row[1:] for row in rows}


def test_each_split_is_counted_and_the_mean_is_plain(tmp_path: Path) -> None:
    assert table(tmp_path, file_of(tmp_path, LINES)) == {
        "gsm8k": ["50.00", "4", "2", "1", "1"],
        "math": ["0.00", "1", "0", "0", "0"],
        "boolq": ["100.00", "2", "2", "0", "0"],
        "mean": ["50.00", "", "", "", ""],
    }


def test_one_split_has_no_mean_and_the_last_of_several_lines_counts(tmp_path: Path) -> None:
    again = line("gsm8k", 1, "The answer is: 7", "#### 7", "gsm8k")
    assert table(tmp_path, file_of(tmp_path, [*LINES[:4], again])) == {"gsm8k": ["75.00", "4", "3", "0", "1"]}


def test_another_grader_may_be_named(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    file = file_of(tmp_path, LINES)
    assert table(tmp_path, file, "--math_grader", "math_verify")["math"][0] == "100.00"
    exact = table(tmp_path, file, "--grader", "exact")
    assert [exact[split][0] for split in ("gsm8k", "math", "boolq")] == ["0.00", "0.00", "50.00"]
    assert (
        table(tmp_path, file_of(tmp_path, [line("own", 0, "a", "a", None)]), "--grader", "exact")["own"][0] == "100.00"
    )


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"", (), "holds no predictions"),
        (b"\n", (), "holds no predictions"),
        (b"sample,label\n0,cat\n", (), "line 1 has no split"),
        (b"[1]\n", (), "line 1 has no split"),
        (b"\xff\xfe", (), "cannot be read as text"),
        ([*LINES[:1], {"split": "gsm8k", "index": 1}], (), "line 2 has no text"),
        ([{"split": "boolq", "index": 1, "scores": {"a": 1}}], (), "line 1 has no correct"),
        ([line("own", 4, "a", "a", None)], (), "sample 4 of own was predicted without a grader"),
        ([line("own", 4, "a", "a", "gms8k")], (), "did you mean 'gsm8k'?"),
        (LINES, ("--grader", "gsm8k"), "no whole number in the reference"),
        (LINES, ("--math_grader", "sympy"), "--math_grader"),
        (LINES, ("--model.lr", "1"), "unrecognized arguments"),
    ],
)
def test_other_files_and_options_are_refused(tmp_path: Path, content: Any, options: Any, words: str) -> None:
    if isinstance(content, bytes):
        (tmp_path / "predictions.jsonl").write_bytes(content)
    else:
        file_of(tmp_path, content)
    code, out, err = cli("grade", "predictions.jsonl", *options, home=tmp_path)
    assert (code, out) == (2, "")
    assert words in complaint(err)


def test_a_torn_line_is_refused(tmp_path: Path) -> None:
    file = tmp_path / file_of(tmp_path, LINES)
    file.write_text(file.read_text()[:-20])
    assert "line 7 has no split" in complaint(cli("grade", file, home=tmp_path)[2])


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    file_of(tmp_path, LINES)
    code, _, err = cli("grade", "prediction.jsonl", home=tmp_path)
    assert (code, complaint(err)) == (
        2,
        "error: predictions 'prediction.jsonl' does not exist (did you mean 'predictions.jsonl'?)",
    )
    code, _, err = cli("grade", ".", home=tmp_path)
    assert code == 2
    assert "cannot be read as text" in complaint(err)
