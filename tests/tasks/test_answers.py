"""Answers on disk, whatever a kill left of them."""

from srlora_pl.tasks.answers import Answers


def row(index: int) -> dict[str, object]:
    return {"split": "test", "index": index, "prompt": f"how {index}"}


def test_a_line_that_a_kill_tore_takes_no_other_with_it(tmp_path):
    file = tmp_path / "predictions.jsonl"
    Answers(file, "model").add([row(0)])
    (part,) = tmp_path.iterdir()
    with part.open("ab") as torn:
        torn.write(b'{"split": "te')
    for index in (1, 2):
        again = Answers(file, "model")
        assert again.earlier("test", index - 1, f"how {index - 1}") == row(index - 1)
        again.add([row(index)])
    assert Answers(file, "model").earlier("test", 1, "how 1") == row(1)
    assert Answers(file, "another").earlier("test", 0, "how 0") is None


def test_answers_that_are_there_are_not_written_again(tmp_path):
    file = tmp_path / "predictions.jsonl"
    Answers(file, "model").add([row(0)])
    (part,) = tmp_path.iterdir()
    before = part.read_bytes()
    again = Answers(file, "model")
    again.add([again.earlier("test", 0, "how 0")])
    assert part.read_bytes() == before
    assert again.of("test") == [row(0)]
