import csv
import errno
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from srlora_pl import GLUEData, UserError
from srlora_pl.data.texts.glue import TASKS
from srlora_pl.reporting import GLUEWriter, PredictionWriter
from tests.helpers.errors import mentions


def write(writer: PredictionWriter, data: Any, *loaders: list[dict[str, torch.Tensor]]) -> None:
    """Hand the predictions of each loader's batches to ``writer``."""
    data.predict_set = [range(sum(len(batch["index"]) for batch in batches)) for batches in loaders]
    writer.on_predict_start(None, None)  # type: ignore[arg-type]
    for loader, batches in enumerate(loaders):
        for i, batch in enumerate(batches):
            writer.write_on_batch_end(None, None, batch, None, None, i, loader)  # type: ignore[arg-type]
    writer.on_predict_end(SimpleNamespace(datamodule=data), None)  # type: ignore[arg-type]


class Named:
    class_names = ("ham", "spam", "eggs")

    def sample_name(self, index: int) -> str:
        return f"text {index}"


def rows(tmp_path, *batches: dict[str, torch.Tensor]) -> list[dict[str, str]]:
    writer = PredictionWriter(tmp_path / "deep" / "out.csv")
    write(writer, Named(), list(batches))
    assert writer.rows == sum(len(batch["index"]) for batch in batches)
    assert writer.files == [tmp_path / "deep" / "out.csv"]
    with writer.path.open() as file:
        return list(csv.DictReader(file))


def test_classes_in_the_order_of_the_data(tmp_path):
    first = {"index": torch.tensor([2, 0]), "label": torch.tensor([1, 2]), "probability": torch.tensor([0.5, 0.75])}
    last = {"index": torch.tensor([1]), "label": torch.tensor([0]), "probability": torch.tensor([1.0])}
    assert rows(tmp_path, first, last) == [
        {"sample": "text 0", "label": "eggs", "probability": "0.750000"},
        {"sample": "text 1", "label": "ham", "probability": "1.000000"},
        {"sample": "text 2", "label": "spam", "probability": "0.500000"},
    ]


def test_a_second_prediction_holds_nothing_of_the_first_and_one_that_fails_leaves_it(tmp_path, monkeypatch):
    writer, value = PredictionWriter(tmp_path / "out.csv"), torch.arange(3.0)
    write(writer, Named(), [{"index": torch.arange(3), "value": value}])
    write(writer, Named(), [{"index": torch.arange(2), "value": value[:2]}])
    before = writer.path.read_text()
    assert before.splitlines() == ["sample,value", "text 0,0.000000", "text 1,1.000000"]
    assert (writer.rows, writer.files) == (2, [writer.path])

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=mentions("out.csv", "No space left on device")):
        write(writer, Named(), [{"index": torch.arange(3), "value": value + 1}])
    assert writer.path.read_text() == before


def test_numbers(tmp_path):
    batch = {"index": torch.tensor([1, 0]), "value": torch.tensor([-2.5, 7.0])}
    assert rows(tmp_path, batch) == [
        {"sample": "text 0", "value": "7.000000"},
        {"sample": "text 1", "value": "-2.500000"},
    ]


def test_several_labels_a_sample(tmp_path):
    batch = {"index": torch.arange(2), "probabilities": torch.tensor([[0.75, 0.25, 0.875], [0.125, 0.5, 0.25]])}
    first, second = rows(tmp_path, batch)
    assert first == {
        "sample": "text 0",
        "label": "ham|eggs",
        "probability_ham": "0.750000",
        "probability_spam": "0.250000",
        "probability_eggs": "0.875000",
    }
    assert second["label"] == ""


def test_any_name_of_a_file_is_one_field(tmp_path):
    """Of a name that is not UTF-8 each byte is written as Python writes it."""
    names = ["caf\udce9.png", "a\nb", "a\rb", "a\r\nb", "a,b", 'a"b', "\x07", " ", "\U0001f600", "", "\ud800"]
    data = SimpleNamespace(class_names=["x\ny", "z"], sample_name=names.__getitem__)
    writer, count = PredictionWriter(tmp_path / "out.csv"), len(names)
    labels = torch.arange(count) % 2
    write(writer, data, [{"index": torch.arange(count), "label": labels, "probability": torch.ones(count)}])
    with writer.path.open(newline="") as file:
        seen = list(csv.DictReader(file))
    assert [row["sample"] for row in seen] == ["caf\\udce9.png", *names[1:-1], "\\ud800"]
    assert [row["label"] for row in seen] == (["x\ny", "z"] * count)[:count]
    assert b"\r\n" not in writer.path.read_bytes().replace(b'"a\r\nb"', b"")


LABEL_WORDS = {
    "cola": ["0", "1"],
    "sst2": ["0", "1"],
    "mrpc": ["0", "1"],
    "qqp": ["0", "1"],
    "wnli": ["0", "1"],
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
}
FILES = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "qqp": "QQP", "wnli": "WNLI", "qnli": "QNLI", "rte": "RTE"}


def predictions(*labels: int) -> dict[str, torch.Tensor]:
    order = torch.arange(len(labels)).flip(0)
    return {"index": order, "label": torch.tensor(labels)[order], "probability": torch.ones(len(labels))}


@pytest.mark.parametrize("task", LABEL_WORDS)
def test_glues_files_and_label_words(tmp_path, task):
    writer = GLUEWriter(tmp_path / "submission")
    write(writer, GLUEData(task), [predictions(0, 1, 1)])
    zero, one = LABEL_WORDS[task]
    (file,) = (tmp_path / "submission").iterdir()
    assert writer.files == [file]
    assert file.name == f"{FILES[task]}.tsv"
    assert file.read_bytes().decode() == f"index\tprediction\n0\t{zero}\n1\t{one}\n2\t{one}\n"


def test_mnli_has_two_files(tmp_path):
    write(GLUEWriter(tmp_path), GLUEData("mnli"), [predictions(0, 1), predictions()], [predictions(2)])
    assert (tmp_path / "MNLI-m.tsv").read_text() == "index\tprediction\n0\tentailment\n1\tneutral\n"
    assert (tmp_path / "MNLI-mm.tsv").read_text() == "index\tprediction\n0\tcontradiction\n"


def test_similarity_is_clipped(tmp_path):
    batch = {"index": torch.arange(4), "value": torch.tensor([-0.2, 5.3, 2.34567, 5.0])}
    write(GLUEWriter(tmp_path), GLUEData("stsb"), [batch])
    assert (tmp_path / "STS-B.tsv").read_text() == "index\tprediction\n0\t0.000\n1\t5.000\n2\t2.346\n3\t5.000\n"


def test_every_task_of_glue_is_covered():
    assert set(TASKS) == {*LABEL_WORDS, "mnli", "stsb"}
