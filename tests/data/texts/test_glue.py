"""Every task of GLUE comes out of its own columns, from files and from the hub alike."""

from math import ceil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from srlora_pl import GLUEData, UserError
from srlora_pl.data.texts.glue import TASKS
from srlora_pl.data.texts.tokens import load_tokenizer
from tests.helpers.errors import mentions
from tests.helpers.paths import SHARED
from tests.helpers.texts import GLUE_HEADS, save_tokenizer, with_model, write

# (a row of train or dev, its texts, its label), a row of test, for every task's own columns.
ROWS: dict[str, Any] = {
    "cola": ('s1\t1\t*\tw1 "w2', ['w1 "w2'], 1, "0\tw3"),
    "sst2": ("w1 w2 \t0", ["w1 w2 "], 0, "0\tw3"),
    "mrpc": ('1\t7\t8\t" w1\tw2', ['" w1', "w2"], 1, "0\t7\t8\tw3\tw4"),
    "stsb": ("0\tnews\tw1\tw2\t3.800", ["w1", "w2"], 3.8, "0\tnews\tw3\tw4"),
    "qnli": ("0\tw1\tw2\tnot_entailment", ["w1", "w2"], 1, "0\tw3\tw4"),
    "rte": ("0\tw1\tw2\tentailment", ["w1", "w2"], 0, "0\tw3\tw4"),
    "mnli": ("0\tfiction\t(w9)\tw1\tw2\tneutral\tcontradiction", ["w1", "w2"], 2, "0\tfiction\t(w9)\tw3\tw4"),
    "qqp": ("3\t4\t5\tw1\tw2\t1", ["w1", "w2"], 1, "0\tw3\tw4"),
    "wnli": ("0\tw1\tw2\t1", ["w1", "w2"], 1, "0\tw3\tw4"),
}


def write_task(root: Path, task: str) -> str:
    layout = TASKS[task]
    folder, (row, _, _, hidden) = root / layout.folder, ROWS[task]
    head, test_head = GLUE_HEADS[layout.folder]
    for split in ("train", *layout.dev):
        write(folder / f"{split}.tsv", *filter(None, [head]), row, row, bom=True)
    for split in layout.test:
        write(folder / f"{split}.tsv", test_head, hidden, bom=True)
    return str(root)


def append(file: Path, lines: str) -> None:
    file.write_text(file.read_text("utf-8-sig") + lines)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_from_its_files(task: str, tmp_path: Path) -> None:
    data = GLUEData(task, write_task(tmp_path, task))
    layout, (_, texts, label, hidden) = TASKS[task], ROWS[task]
    for split in ("train", *layout.dev):
        read = data.read(split)
        assert [read.first[0], *(read.second or [])[:1]] == texts
        assert read.labels is not None
        assert read.labels.tolist() == pytest.approx([label] * 2)
        assert read.labels.dtype == (torch.float32 if task == "stsb" else torch.int64)
    for split in layout.test:
        read = data.read(split)
        assert [read.first[0], *(read.second or [])[:1]] == hidden.split("\t")[-len(texts) :]
        assert read.labels is None


@pytest.mark.parametrize("name", ["CoLA", "SST-2", "sst_2", "STS-B", "MNLI", "qqp"])
def test_names_are_taken_as_people_write_them(name: str, tmp_path: Path) -> None:
    assert GLUEData(name).task is TASKS[name.lower().replace("-", "").replace("_", "")]


@pytest.mark.parametrize(
    ("task", "classes", "problem", "scores"),
    [
        ("cola", ["unacceptable", "acceptable"], "single_label", ["matthews"]),
        ("mrpc", ["not_equivalent", "equivalent"], "single_label", ["f1", "accuracy"]),
        ("stsb", [], "regression", ["pearson", "spearman"]),
        ("mnli", ["entailment", "neutral", "contradiction"], "single_label", ["accuracy"]),
    ],
)
def test_what_is_known_without_any_file(task: str, classes: list[str], problem: str, scores: list[str]) -> None:
    data = GLUEData(task)
    assert (data.class_names, data.problem, data.score_names) == (classes, problem, scores)
    assert data.num_classes == (len(classes) or 1)


def test_mnli_has_two_of_each(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")

    def data(**options: Any) -> Any:
        cache = str(tmp_path / "cache")
        options = {"batch_size": 2, "max_length": 32, **options}
        return with_model(GLUEData("mnli", write_task(tmp_path, "mnli"), cache_dir=cache, **options), tokenizer)

    both = data()
    for stage in ("fit", "test", "predict"):
        both.setup(stage)
    for loaders in (both.val_dataloader(), both.test_dataloader(), both.predict_dataloader()):
        matched, mismatched = loaders
        assert matched.dataset is not mismatched.dataset
    held = data(val_fraction=0.5)
    held.setup("test")
    assert held.splits("val") == []
    assert len(held.test_dataloader()) == 2


def test_qqps_broken_lines_are_left_out(tmp_path: Path) -> None:
    root = write_task(tmp_path, "qqp")
    append(tmp_path / "QQP" / "train.tsv", "9\t1\t2\tw1 cut\n8\t4\t5\t\tw2\t0\n")
    data = GLUEData("qqp", root)
    read = data.read("train")
    assert read.first == ["w1", "w1", ""]
    assert read.labels is not None
    assert read.labels.tolist() == [1, 1, 0]
    data.read("dev")
    assert data.left_out == {"lines of QQP/train.tsv with too few or too many fields": 1}


def test_quotes_are_letters_though_a_file_could_be_quoted(tmp_path: Path) -> None:
    root = write_task(tmp_path, "sst2")
    append(tmp_path / "SST-2" / "train.tsv", '"w1 ""w2"""\t0\n')
    assert GLUEData("sst2", root).read("train").first[-1] == '"w1 ""w2"""'


def test_a_broken_line_of_a_hidden_test_is_refused(tmp_path: Path) -> None:
    """Left out it would move all that follow to wrong places of the submission."""
    root = write_task(tmp_path, "qqp")
    append(tmp_path / "QQP" / "test.tsv", "1\tw1 cut\n")
    with pytest.raises(UserError, match=mentions("Line 3", "test.tsv", "2", "3 fields")):
        GLUEData("qqp", root).read("test")


def test_the_subset_of_qnli(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_task(tmp_path, "qnli")
    (tmp_path / "QNLI" / "train.tsv").rename(tmp_path / "QNLI" / "train_subset.tsv")
    with caplog.at_level("INFO"):
        assert len(GLUEData("qnli", root).read("train").first) == 2
    assert "takes the part of it in 'train_subset.tsv'" in caplog.text


# -- the hub


def test_the_hubs_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(root: str, name: str, split: str) -> datasets.Dataset:
        asked.append((root, name, split))
        label = {"stsb": [3.5], "mnli": [-1] if "test" in split else [2]}[name]
        return datasets.Dataset.from_dict({"premise": ["w1"], "hypothesis": ["w2"], "label": label, "idx": [0]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = GLUEData("mnli")
    read = data.read("dev_mismatched")
    assert (read.first, read.second) == (["w1"], ["w2"])
    assert read.labels is not None
    assert read.labels.tolist() == [2]
    assert data.read("test_matched").labels is None
    similar = GLUEData("stsb").read("dev").labels
    assert similar is not None
    assert (similar.dtype, similar.tolist()) == (torch.float32, [3.5])
    assert asked == [
        ("nyu-mll/glue", "mnli", "validation_mismatched"),
        ("nyu-mll/glue", "mnli", "test_matched"),
        ("nyu-mll/glue", "stsb", "validation"),
    ]


def hub_labels(monkeypatch: pytest.MonkeyPatch, names: list[str] | None, labels: list[int]) -> Any:
    """The labels of MNLI's dev set as the hub gives them, by numbers that ``names`` explain."""
    kind = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"premise": datasets.Value("string"), "hypothesis": datasets.Value("string")})
    columns = {"premise": ["w1"] * len(labels), "hypothesis": ["w2"] * len(labels), "label": labels}
    table = datasets.Dataset.from_dict(columns, datasets.Features({**features, "label": kind}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    return GLUEData("mnli").read("dev_matched").labels


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["entailment", "neutral", "contradiction"], [0, 1, 2]),
        (["contradiction", "entailment", "neutral"], [2, 0, 1]),
        (None, [0, 1, 2]),
    ],
)
def test_the_hubs_labels_are_compared_by_name(
    names: list[str] | None, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hub_labels(monkeypatch, names, [0, 1, 2]).tolist() == expected


def test_labels_of_the_hub_that_are_hidden_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=mentions("'label'", "missing", "-1", "line 2", "nyu-mll/glue/mnli/dev_matched")
    ):
        hub_labels(monkeypatch, None, [0, -1])
    with pytest.raises(UserError, match=mentions("'contradicts'", "3", "'contradiction'")):
        hub_labels(monkeypatch, ["entailment", "neutral", "contradicts"], [2])


def test_no_network_and_nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub\n(LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = with_model(GLUEData("cola"), save_tokenizer(tmp_path))
    with pytest.raises(UserError, match=mentions("CoLA/train.tsv", "CoLA/dev.tsv", "CoLA/test.tsv")) as caught:
        data.setup("fit")
    assert "\n" not in str(caught.value)


# -- errors


def test_an_unknown_task() -> None:
    with pytest.raises(UserError, match=mentions("data.task", "'SST-3'", "'sst2'")):
        GLUEData("SST-3")


def test_folders_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions("data.root", "glu'", "RTE/train.tsv")):
        GLUEData("rte", str(tmp_path / "glu"))
    with pytest.raises(UserError, match=mentions("RTE", "RTE/train.tsv", "RTE/dev.tsv", "RTE/test.tsv")):
        GLUEData("rte", str(tmp_path))


@pytest.mark.parametrize(
    ("split", "content", "words"),
    [
        ("train", None, ["RTE/train.tsv'", "does not exist"]),
        ("train", b"index\tsentence1\tlabel\n0\ta\tentailment\n", ["'sentence2'", "'sentence1'"]),
        (
            "train",
            b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentail\n",
            ["'entail'", "line 2", "2"],
        ),
        ("dev", b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\t\n", ["'label'", "missing", "line 2"]),
        ("dev", b"index\tsentence1\tsentence2\tlabel\n0\ta\t \tentailment\n", ["'sentence2'", "empty", "line 2"]),
        ("dev", b"index\tsentence1\tsentence2\tlabel\n0\ta\xff\tb\tentailment\n", ["Line 2", "dev.tsv", "0xff"]),
        ("dev", b"index\tsentence1\tsentence2\tlabel\n0\ta\tentailment\n", ["Line 2", "dev.tsv", "3", "4 fields"]),
    ],
)
def test_bad_files(split: str, content: bytes | None, words: list[str], tmp_path: Path) -> None:
    data = GLUEData("rte", write_task(tmp_path, "rte"))
    file = tmp_path / "RTE" / f"{split}.tsv"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=mentions(*words)) as caught:
        data.read(split)
    assert "\n" not in str(caught.value)


def test_a_score_that_is_no_number(tmp_path: Path) -> None:
    root = write_task(tmp_path, "stsb")
    append(tmp_path / "STS-B" / "dev.tsv", "2\tnews\tw1\tw2\tinf\n")
    with pytest.raises(UserError, match=mentions("'inf'", "'score'", "line 4", "finite")):
        GLUEData("stsb", root).read("dev")


# -- the real files

needs_files = pytest.mark.skipif(not (SHARED / "data" / "glue").is_dir(), reason="needs ../shared")
# rows of train and dev as GLUE publishes them, the paper's epochs and batch size, and its N_all
PAPER = {
    "sst2": (67_349, 872, 20, 16, 84_200),
    "mrpc": (3_668, 408, 20, 32, 2_300),
    "cola": (8_551, 1_043, 20, 16, 10_700),
    "qnli": (104_743, 5_463, 10, 32, 32_740),
    "rte": (2_490, 277, 50, 16, 7_800),
    "stsb": (5_749, 1_500, 20, 8, 14_380),
}
HIDDEN = {"sst2": 1_821, "mrpc": 1_725, "cola": 1_063, "qnli": 5_463, "rte": 3_000, "stsb": 1_379}


@pytest.mark.parametrize("task", PAPER)
def test_steps_of_the_papers_runs(task: str) -> None:
    rows, _, epochs, batch_size, steps = PAPER[task]
    assert epochs * ceil(rows / batch_size) == steps


@pytest.mark.real
@needs_files
@pytest.mark.parametrize("task", PAPER)
def test_the_real_files(task: str, tmp_path: Path) -> None:
    rows, dev, epochs, batch_size, steps = PAPER[task]
    data = GLUEData(task, str(SHARED / "data" / "glue"), batch_size, cache_dir=str(tmp_path))
    # Words of this tokenizer are not theirs, but here only their number counts.
    with_model(data, save_tokenizer(tmp_path / "tokenizer", model_max_length=128))
    data.setup("fit")
    assert data.train_set is not None
    if task == "qnli":
        assert len(data.train_set) == 8_999  # of 104,743
    else:
        assert len(data.train_set) == rows
        assert epochs * data.batches_per_epoch == steps
    assert len(data.read("dev").first) == dev
    assert len(data.read("test").first) == HIDDEN[task]
    order = data.train_order(3)
    assert torch.equal(order.sort().values, torch.arange(len(data.train_set)))


@pytest.mark.real
@needs_files
def test_deberta_cuts_ten_percent_of_rte(tmp_path: Path) -> None:
    tokenizer = str(SHARED / "models" / "deberta_v3_tokenizer")
    data = with_model(GLUEData("rte", str(SHARED / "data" / "glue"), cache_dir=str(tmp_path)), tokenizer)
    data.setup("fit")
    tokens, texts = data.train_set.tokens, data.read("train")
    full = [len(ids) for ids in load_tokenizer(tokenizer)(texts.first, texts.second)["input_ids"]]
    assert tokens.lengths.tolist() == [min(length, 128) for length in full]
    assert tokens.truncated == sum(length > 128 for length in full) == 261
