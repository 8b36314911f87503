"""The user's own files: what they hold comes out, and what is wrong in them is said before training."""

import csv
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from srlora_pl import TextData, UserError
from tests.helpers.errors import mentions
from tests.helpers.texts import save_tokenizer, sentence, with_model, write

LABELS = ["no", "yes", "maybe"]


def rows(count: int = 12) -> list[tuple[str, str, str]]:
    return [(sentence(1 + i % 5, i), sentence(2, i + 7), LABELS[i % 3]) for i in range(count)]


def write_file(path: Path, table: list[tuple[Any, ...]] | None = None, names: str = "text,other,label") -> Path:
    table, heads = table if table is not None else rows(), names.split(",")
    frame = pd.DataFrame({name: [row[i] for row in table] for i, name in enumerate(heads)})
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(heads, row, strict=True))) + "\n" for row in table))
    else:
        frame.to_csv(path, index=False, sep="," if path.suffix == ".csv" else "\t")
    return path


def own(root: Path, **options: Any) -> TextData:
    return TextData(str(root), **{"batch_size": 4, "max_length": 16, **options})


def loaded(root: Path, tmp_path: Path, stage: str = "fit", **options: Any) -> Any:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    data = with_model(own(root, cache_dir=str(tmp_path / "cache"), **options), tokenizer)
    data.setup(stage)
    return data


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("columns", ["text", ["other", "text"]])
def test_every_kind_of_file(suffix: str, columns: Any, tmp_path: Path) -> None:
    data = loaded(write_file(tmp_path / f"reviews{suffix}"), tmp_path, text_column=columns, val_fraction=0.25)
    assert data.class_names == ["maybe", "no", "yes"]
    assert (data.num_classes, data.problem, data.score_names) == (3, "single_label", ["accuracy"])
    assert (len(data.train_set), len(data.val_set)) == (9, 3)
    assert not data.has_test_labels
    texts = data.read("train")
    assert texts.first == [row[1 if isinstance(columns, list) else 0] for row in rows()]
    assert texts.second == ([row[0] for row in rows()] if isinstance(columns, list) else None)
    assert [data.class_names[label] for label in texts.labels] == [row[2] for row in rows()]
    for batch in data.train_dataloader():
        assert torch.equal(batch["label"], texts.labels[data.train_set.rows[batch["index"]]])


def test_a_folder_of_splits(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_file(root / "train.csv")
    write_file(root / "dev.jsonl", rows(5))
    write_file(root / "test.parquet", rows(4))
    data = loaded(root, tmp_path)
    data.setup("test")
    data.setup("predict")
    assert (len(data.train_set), len(data.val_set), len(data.test_set), len(data.predict_set)) == (12, 5, 4, 4)
    assert data.has_test_labels
    assert "label" not in next(iter(data.predict_dataloader()))


@pytest.mark.parametrize("hidden", [("text", [("w1",)] * 3), ("text,label", [("w1", "")] * 3)])
def test_a_test_file_without_labels_is_only_predicted(hidden: Any, tmp_path: Path) -> None:
    write_file(tmp_path / "data" / "train.csv")
    write_file(tmp_path / "data" / "test.csv", hidden[1], hidden[0])
    data = loaded(tmp_path / "data", tmp_path, "predict")
    assert len(data.predict_set) == 3
    assert not data.has_test_labels
    with pytest.raises(UserError, match=mentions("labelled test split", "validate")):
        data.setup("test")


def test_a_file_to_predict(tmp_path: Path) -> None:
    train, new = write_file(tmp_path / "train.csv"), write_file(tmp_path / "new.tsv", [("w5",), ("w6 w7",)], "text")
    data = loaded(train, tmp_path, "predict", predict_root=str(new))
    (batch,) = data.predict_dataloader()
    assert batch["index"].tolist() == [1, 0]
    with pytest.raises(UserError, match=mentions("data.predict_root")):
        loaded(train, tmp_path, "predict")


def test_numbers_are_targets_of_a_regression(tmp_path: Path) -> None:
    file = write_file(tmp_path / "a.csv", [(f"w{i}", i / 2 - 1) for i in range(10)], "text,label")
    data = loaded(file, tmp_path, problem="regression")
    assert (data.num_classes, data.class_names, data.score_names) == (1, [], ["pearson", "spearman"])
    assert data.read("train").labels.tolist() == [i / 2 - 1 for i in range(10)]
    assert data.read("train").labels.dtype == torch.float32
    assert len(data.val_set) == 1


@pytest.mark.parametrize(
    ("name", "options"), [("a.csv", {"label_separator": "|"}), ("a.jsonl", {}), ("a.parquet", {}), ("b.csv", {})]
)
def test_several_classes_a_text(name: str, options: dict[str, str], tmp_path: Path) -> None:
    sets = [["a", "c"], [], ["b"], ["c"]]
    if name.endswith("csv"):
        labels: list[Any] = [options.get("label_separator", ",").join(names) for names in sets]
    else:
        labels = sets
    file = write_file(tmp_path / name, [(f"w{i}", label) for i, label in enumerate(labels)], "text,label")
    data = loaded(file, tmp_path, problem="multi_label", val_fraction=0.25, batch_size=2, **options)
    assert (data.class_names, data.num_classes) == (["a", "b", "c"], 3)
    assert data.read("train").labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert next(iter(data.train_dataloader()))["label"].shape == (2, 3)
    assert len(data.val_set) == 1


@pytest.mark.parametrize(
    ("labels", "classes"),
    [([10, 9, 2], ["2", "9", "10"]), ([1.0, 0.0, 1.0], ["0", "1"]), ([True, False, True], ["False", "True"])],
)
def test_classes_that_are_numbers(labels: list[Any], classes: list[str], tmp_path: Path) -> None:
    file = write_file(tmp_path / "a.parquet", [("w1", label) for label in labels], "text,label")
    assert own(file, batch_size=1).class_names == classes


# -- a ClassLabel of the `datasets` library: numbers in the file, their names in its schema


def write_class_labels(path: Path, names: list[str], labels: list[Any]) -> Path:
    kind: Any = datasets.ClassLabel(names=names)
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.List(kind) if isinstance(labels[0], list) else kind}
    )
    columns = {"text": [f"w{i}" for i in range(len(labels))], "label": labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features).to_parquet(str(path))
    return path


def test_class_labels_are_compared_by_name(tmp_path: Path) -> None:
    write_class_labels(tmp_path / "train.parquet", ["neg", "pos", "mixed"], [0, 1, 1])
    write_class_labels(tmp_path / "val.parquet", ["mixed", "pos", "neg"], [0, 1, 2])
    write_file(tmp_path / "test.csv", [("w1", "pos"), ("w2", "neg")], "text,label")
    data = own(tmp_path)
    assert data.class_names == ["neg", "pos", "mixed"]
    assert data.names_numbers
    read = {split: data.read(split).labels.tolist() for split in ("train", "val", "test")}
    assert read == {"train": [0, 1, 1], "val": [2, 1, 0], "test": [1, 0]}


def test_class_labels_of_several_classes_a_text(tmp_path: Path) -> None:
    data = own(write_class_labels(tmp_path / "a.parquet", ["b", "a"], [[0, 1], [1], []]), problem="multi_label")
    assert data.class_names == ["b", "a"]
    assert data.read("train").labels.tolist() == [[1, 1], [0, 1], [0, 0]]


def test_numbers_of_class_labels_are_numbers_for_a_regression(tmp_path: Path) -> None:
    data = own(write_class_labels(tmp_path / "a.parquet", ["1 star", "2 stars"], [1, 0]), problem="regression")
    assert data.read("train").labels.tolist() == [1, 0]


def test_class_labels_that_are_missing_or_have_no_name(tmp_path: Path) -> None:
    train = write_class_labels(tmp_path / "train.parquet", ["neg", "pos"], [0, 1, -1])
    with pytest.raises(UserError, match=mentions("'label'", "missing", "-1", "row 3", "train.parquet")):
        own(train)
    write_class_labels(train, ["neg", "pos"], [0, 1])
    write_class_labels(tmp_path / "test.parquet", ["neg", "pos"], [-1, -1])
    assert not own(tmp_path).has_test_labels
    write_class_labels(tmp_path / "val.parquet", ["neg", "bad"], [0, 1])
    with pytest.raises(UserError, match=mentions("'bad'", "'label'", "row 2", "val.parquet")):
        own(tmp_path)
    schema = parquet.read_schema(train)
    numbers = {"text": ["w1", "w2"], "label": [0, 2]}
    parquet.write_table(pa.table(numbers).cast(pa.schema(schema)).replace_schema_metadata(schema.metadata), train)
    with pytest.raises(UserError, match=mentions("2", "'label'", "row 2", "train.parquet")):
        own(train)


@pytest.mark.parametrize(
    "description",
    ["{", "[]", '{"info": {"features": {"label": {"names": 3, "_type": "ClassLabel"}}}}', '{"info": {"features": 3}}'],
)
def test_a_description_of_the_columns_that_describes_nothing(description: str, tmp_path: Path) -> None:
    table = pa.table({"text": ["w1", "w2"], "label": [3, 4]}).replace_schema_metadata({"huggingface": description})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert own(tmp_path / "a.parquet").class_names == ["3", "4"]


def test_names_written_over_the_numbers_of_a_class_label(tmp_path: Path) -> None:
    schema = parquet.read_schema(write_class_labels(tmp_path / "a.parquet", ["x", "y"], [0, 1]))
    table = pa.table({"text": ["w1", "w2"], "label": ["ham", "spam"]}).replace_schema_metadata(schema.metadata)
    parquet.write_table(table, tmp_path / "a.parquet")
    assert own(tmp_path / "a.parquet").class_names == ["ham", "spam"]


# -- the files of a folder


@pytest.mark.parametrize(
    "names",
    [
        ("Train.csv", "VAL.CSV", "Test.csv"),
        ("training.csv", "validation.tsv", "testing.jsonl"),
        ("TRAIN.parquet", "Dev.PARQUET", "TESTING.TSV"),
        ("train_set.csv", "eval.csv", "Test Data.csv"),
    ],
)
def test_splits_in_capitals_and_with_ing(names: tuple[str, ...], tmp_path: Path) -> None:
    for count, name in enumerate(names, 5):
        written = write_file(tmp_path / name.lower(), rows(count))
        written.rename(tmp_path / name)
    data = own(tmp_path)
    assert {split: len(table) for split, table in data._tables.items()} == {"train": 5, "val": 6, "test": 7}
    assert data.left_out == {}


def test_what_is_no_split_is_left_out_with_a_word(tmp_path: Path) -> None:
    for name in ("train.csv", "Training.csv", "extra.csv", "new.csv"):
        write_file(tmp_path / name)
    (tmp_path / "val.json").write_text("[]")
    (tmp_path / "test").mkdir()
    (tmp_path / ".hidden.csv").write_text("")
    data = own(tmp_path, predict_root=str(tmp_path / "new.csv"))
    assert list(data._tables) == ["train", "predict"]
    shown = "'Training.csv', 'extra.csv', 'test', 'val.json'"
    assert data.left_out == {f"files or folders that are no split ({shown})": 4}


def test_classes_that_look_alike_are_two_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path / "a.csv", "text,label", "w1,1", "w2,01", "w3,yes", "w4,Yes")
    with caplog.at_level("INFO"):
        assert own(file).class_names == ["01", "1", "Yes", "yes"]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"The classes '01', '1' of '{file}' are kept apart, and so are 1 more such groups")


def test_another_separator(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "text;label", "w1, w2;yes", "w3;no")
    assert own(file, separator=";", batch_size=1).class_names == ["no", "yes"]


# -- errors, each in one sentence and from __init__ or setup

GOOD = "text,label\nw1,yes\nw2,no\nw3,no\n"
BAD: dict[str, tuple[dict[str, str | bytes], dict[str, Any], list[str]]] = {
    "no file": ({"trian.csv": GOOD}, {"root": "train.csv"}, ["train.csv'", "'trian.csv'"]),
    "no train in a folder": ({"all.csv": GOOD}, {}, ["train.csv", "train.tsv", "all.csv"]),
    "two trains": ({"train.csv": GOOD, "train.tsv": GOOD}, {}, ["train.csv", "train.tsv", "both"]),
    "no text column": ({"train.csv": GOOD}, {"text_column": "texts"}, ["no column 'texts'", "'text'"]),
    "no label column": ({"train.csv": GOOD}, {"label_column": "class"}, ["no column 'class'", "data.label_column"]),
    "no label in val": ({"train.csv": GOOD, "val.csv": "text\nw1\n"}, {}, ["val.csv'", "no column 'label'"]),
    "separator": ({"train.csv": GOOD.replace(",", ";")}, {}, ["data.separator", '";"']),
    "empty text": ({"train.csv": GOOD + " ,yes\n"}, {}, ["'text'", "empty", "line 5", "train.csv"]),
    "empty label": ({"train.csv": GOOD + "w4,\n"}, {}, ["'label'", "missing", "line 5"]),
    "NaN label": ({"train.csv": GOOD + "w4,NaN\n"}, {}, ["'label'", "missing", "line 5"]),
    "unknown label": (
        {"train.csv": GOOD, "val.csv": "text,label\nw1,yes\nw2,yess\n"},
        {},
        ["'yess'", "line 3", "val.csv", "2", "'yes'"],
    ),
    "unknown label in test": (
        {"train.csv": GOOD, "test.csv": GOOD + "w1,2\n"},
        {},
        ["'2'", "line 5", "test.csv"],
    ),
    "one class": ({"train.csv": GOOD.replace("yes", "no")}, {}, ["1 class"]),
    "not a number": ({"train.csv": GOOD}, {"problem": "regression"}, ["'yes'", "line 2", "finite number"]),
    "NaN number": (
        {"train.csv": "text,label\nw1,1\nw2,nan\n"},
        {"problem": "regression"},
        ["'label'", "missing", "line 3"],
    ),
    "infinite number": (
        {"train.csv": "text,label\nw1,1\nw2,-inf\n"},
        {"problem": "regression"},
        ["'-inf'", "line 3", "finite number"],
    ),
    "a number beyond 32 bits": (
        {"train.csv": "text,label\nw1,1\nw2,1e39\n"},
        {"problem": "regression"},
        ["'1e39'", "line 3", "finite number"],
    ),
    "a number beyond all bits": (
        {"train.jsonl": '{"text": "w1", "label": 1' + 400 * "0" + "}\n"},
        {"problem": "regression"},
        ["...", "'label'", "line 1", "finite number"],
    ),
    "a list as text": (
        {"train.csv": "text,label\nw1,\"['a', 'b']\"\n"},
        {"problem": "multi_label"},
        ["list", "line 2", "','"],
    ),
    "vectors of 0 and 1": (
        {"train.jsonl": '{"text": "w1", "label": [1, 0]}\n{"text": "w2", "label": [0, 1]}\n'},
        {"problem": "multi_label"},
        ["'label'", "1, 0", "line 1", "train.jsonl"],
    ),
    "two trains in capitals": (
        {"Train.csv": GOOD, "TRAIN.tsv": GOOD},
        {},
        ["TRAIN.tsv", "Train.csv", "both"],
    ),
    "nothing in a set": (
        {"train.jsonl": '{"text": "w1", "label": ["a", null]}\n'},
        {"problem": "multi_label"},
        ["None", "line 1"],
    ),
    "half a character in a label": (
        {"train.jsonl": '{"text": "w1", "label": "x\\ud800"}\n{"text": "w1", "label": "y"}\n'},
        {},
        ["half a character", "line 1"],
    ),
    "two columns of a name": (
        {"train.csv": "text,label,label\nw1,a,b\n"},
        {},
        ["train.csv'", "2 columns 'label'"],
    ),
    "an empty file": ({"train.csv": ""}, {}, ["train.csv'", "no rows"]),
    "a list of labels": (
        {"train.jsonl": '{"text": "w1", "label": ["a"]}\n'},
        {},
        ["line 1", "data.problem", "multi_label"],
    ),
    "missing set": (
        {"train.jsonl": '{"text": "w1", "label": ["a", "b"]}\n{"text": "w1"}\n'},
        {"problem": "multi_label"},
        ["'label'", "missing", "line 2"],
    ),
    "unknown in a set": (
        {"train.csv": 'text,label\nw1,"a,b"\n', "val.csv": "text,label\nw1,c\n"},
        {"problem": "multi_label"},
        ["'c'", "line 2", "val.csv", "2"],
    ),
    "bytes": ({"train.csv": GOOD.encode() + b"\xe4h,no\n"}, {}, ["Line 5", "train.csv", "0xe4"]),
    "problem": ({"train.csv": GOOD}, {"problem": "regresion"}, ["'regresion'", "'regression'"]),
    "three texts": ({"train.csv": GOOD}, {"text_column": ["a", "b", "c"]}, ["one column", "two"]),
    "text is label": ({"train.csv": GOOD}, {"text_column": "label"}, ["other than the label"]),
    "long separator": ({"train.csv": GOOD}, {"separator": "||"}, ["data.separator", "'||'"]),
    "batch": ({"train.csv": GOOD}, {"batch_size": 9, "val_fraction": 0}, ["batch_size", "9", "3"]),
    "nothing to validate": ({"train.csv": GOOD}, {"val_fraction": 0.01}, ["val_fraction", "0.01", "3"]),
}


def test_a_text_of_any_length_is_read_and_cut(tmp_path: Path) -> None:
    file = write(tmp_path / "train.csv", "text,label", "w1 " * 50_000 + ",yes", "w2,no")
    data = loaded(file, tmp_path, batch_size=1, val_fraction=0.0)
    assert int(data.train_set.tokens.lengths[0]) == data.max_length


@pytest.mark.parametrize("end", ["", '"open'])
def test_reading_leaves_the_limit_of_a_field_as_it_was(end: str, tmp_path: Path) -> None:
    before = csv.field_size_limit()
    file = write(tmp_path / "train.csv", "text,label", "w1 " * 50_000 + ",yes", "w2,no", *filter(None, [end]))
    with pytest.raises(UserError, match="line 4") if end else nullcontext():
        own(file, batch_size=1)
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, tmp_path: Path) -> None:
    files, options, words = BAD[case]
    root = tmp_path / "data"
    root.mkdir()
    for name, content in files.items():
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    options = {"val_fraction": 0.34, "batch_size": 1, **options}
    with pytest.raises(UserError, match=mentions(*words)) as caught:
        loaded(root / options.pop("root", "."), tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_validation_without_anything_to_validate_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions("data.val_fraction", "0")):
        loaded(write_file(tmp_path / "train.csv"), tmp_path, "validate", val_fraction=0.0)


def test_fewer_classes_than_the_head(tmp_path: Path) -> None:
    data = with_model(own(write_file(tmp_path / "train.csv")), save_tokenizer(tmp_path / "tokenizer"))
    data.trainer.lightning_module.num_classes = 5
    with pytest.raises(UserError, match=mentions("5", "3", "classes")):
        data.setup("fit")
