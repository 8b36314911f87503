"""The user's own prompts and answers: what files hold comes out, and what is wrong in them is said before training."""

import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch

from srlora_pl import InstructionData, UserError
from srlora_pl.data.protocols import Generation, Question
from tests.helpers.errors import mentions
from tests.helpers.instructions import BOS, CHAT, chat, save_tokenizer, with_model, write

ROWS = [{"prompt": f"{'Nina? ' * (i + 1)}", "answer": "blue" if i % 2 else "cheese"} for i in range(10)]


def file_of(path: Path, rows: Any = None) -> Path:
    rows = ROWS if rows is None else rows
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(rows)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".jsonl":
        write(path, rows)
    else:
        frame.to_csv(path, index=False, sep="," if path.suffix == ".csv" else "\t")
    return path


def loaded(
    root: Any, tmp_path: Path, stage: str = "fit", trainer: Any = None, chat: str | None = None, **options: Any
) -> Any:
    tokenizer = save_tokenizer(tmp_path / "tokenizer", chat)
    own = {"batch_size": 2, "max_length": 128, "cache_dir": str(tmp_path / "cache"), **options}
    data = with_model(InstructionData(str(root), **own), tokenizer, **(trainer or {}))
    data.setup(stage)
    return data


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file(suffix: str, tmp_path: Path) -> None:
    data = loaded(file_of(tmp_path / f"own{suffix}"), tmp_path, val_fraction=0.2)
    assert [(s.columns["instruction"], s.answer) for s in data.samples("train")] == [tuple(r.values()) for r in ROWS]
    assert (len(data.train_set), len(data.val_set)) == (8, 2)
    assert sorted(torch.cat([data.train_set.rows, data.val_set.rows]).tolist()) == list(range(10))
    assert (data.num_classes, data.class_names, data.has_test_labels) == (0, [], False)


def test_json_lines_may_end_in_json(tmp_path: Path) -> None:
    write(tmp_path / "a.json", ROWS)
    assert len(InstructionData(str(tmp_path / "a.json")).samples("train")) == 10


def test_a_folder_of_splits_and_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "data"
    for name, rows in (("train.jsonl", ROWS), ("dev.csv", ROWS[:6]), ("test.json", ROWS)):
        file_of(root / name, rows)
    (root / "notes.md").write_text("x")
    options = {"limit": 4, "test_limit": 3, "grader": "exact", "eval_batch_size": 3}
    data = loaded(root, tmp_path, **options)
    assert "left out: 1 files or folders that are no split ('notes.md')" in capsys.readouterr().out
    data.setup("test")
    assert data.train_set.rows.tolist() == data.val_set.rows.tolist() == [0, 1, 2, 3]
    assert [data.question("test", i).prompt.count("Nina?") for i in range(3)] == [1, 4, 7]  # over the whole file
    (batch,) = data.test_dataloader()
    assert batch["index"].tolist() == [2, 1, 0]
    assert [b["index"].tolist() for b in data.val_dataloader()] == [[3, 2, 1], [0]]


def test_a_data_set_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {name: datasets.Dataset.from_list(rows) for name, rows in (("train", ROWS), ("validation", ROWS[:3]))}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(tables))
    data = loaded("someone/questions", tmp_path)
    assert (len(data.train_set), len(data.val_set)) == (10, 3)
    with pytest.raises(UserError, match=mentions("someone/questions", "'response'", "prompt, answer")):
        loaded("someone/questions", tmp_path, answer_column="response")


def test_an_absent_data_set_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=mentions("'someone/questions'", "no network", "data.root")):
        loaded("someone/questions", tmp_path)
    with pytest.raises(UserError, match=mentions("data/train.jsonl", "does not exist")):
        loaded("data/train.jsonl", tmp_path)


# -- what is asked


def test_prompts_are_padded_on_the_left_and_handed_out_longest_first(tmp_path: Path) -> None:
    file_of(tmp_path / "train.jsonl")
    file_of(tmp_path / "test.jsonl", ROWS[:5])
    data = loaded(tmp_path, tmp_path, "test", grader="exact", template="{prompt}\n")
    batches = list(data.test_dataloader())
    assert [i for batch in batches for i in batch["index"].tolist()] == [4, 3, 2, 1, 0]
    for batch in batches:
        assert batch.keys() == {"input_ids", "attention_mask", "index"}
        for ids, mask, index in zip(batch["input_ids"], batch["attention_mask"], batch["index"].tolist(), strict=True):
            assert mask.diff().ge(0).all()
            assert data.tokenizer.decode(ids[mask.bool()]) == f"<s>{ROWS[index]['prompt']}\n"
            assert ids[mask.bool()][0] == BOS
            assert data.question("test", index) == Question(f"{ROWS[index]['prompt']}\n", ROWS[index]["answer"])


def test_the_prompts_of_some_samples(tmp_path: Path) -> None:
    data = loaded(file_of(tmp_path / "a.jsonl"), tmp_path, val_fraction=0.3, template="{prompt}\n")
    batch = data.generation_batch("val", [2, 0])
    assert batch["index"].tolist() == [2, 0]
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], (2, 0), strict=True):
        assert data.tokenizer.decode(ids[mask.bool()][1:]) == data.question("val", row).prompt
    assert data.question("val", 2).reference in ("blue", "cheese")
    assert data.generation_batch("val", range(4))["index"].tolist() == [0, 1, 2]  # there are three


@pytest.mark.parametrize("hidden", [[{"prompt": "Nina?"}], [{"prompt": "Nina?", "answer": ""}]])
def test_a_test_file_without_answers_is_only_predicted(hidden: Any, tmp_path: Path) -> None:
    file_of(tmp_path / "data" / "train.jsonl")
    write(tmp_path / "data" / "test.jsonl", hidden)
    data = loaded(tmp_path / "data", tmp_path, "predict")
    assert not data.has_test_labels
    (batch,) = data.predict_dataloader()
    assert batch["index"].tolist() == [0]
    assert data.question("predict", 0).reference == ""


def test_without_a_grader_a_test_is_the_loss(tmp_path: Path) -> None:
    file_of(tmp_path / "data" / "train.jsonl")
    file_of(tmp_path / "data" / "test.jsonl", ROWS[:4])
    data = loaded(tmp_path / "data", tmp_path, "test")
    assert sum(len(batch["labels"]) for batch in data.test_dataloader()) == 4
    data.setup("predict")
    assert all("labels" not in batch for batch in data.predict_dataloader())
    assert data.generation("test") == Generation(256)


def test_a_file_to_predict_needs_no_file_to_train_on(tmp_path: Path) -> None:
    new = write(tmp_path / "new.jsonl", [{"prompt": "Anna"}, {"prompt": "Nina? Nina?"}])
    data = loaded(tmp_path / "nowhere.jsonl", tmp_path, "predict", predict_root=str(new), stop=["Q:"], max_new_tokens=9)
    (batch,) = data.predict_dataloader()
    assert batch["index"].tolist() == [1, 0]
    assert data.generation("predict") == Generation(9, ("Q:",))


def test_conversations_are_asked_for_their_last_answer(tmp_path: Path) -> None:
    rows = [{"messages": chat("Nina?", "blue", "and?", "12")}, {"messages": chat("Anna?", "cheese")}]
    write(tmp_path / "data" / "train.jsonl", rows)
    write(tmp_path / "data" / "test.jsonl", rows)
    data = loaded(tmp_path / "data", tmp_path, "test", chat=CHAT, template="chat", grader="exact", batch_size=1)
    assert data.question("test", 0).reference == "12"
    assert data.question("test", 0).prompt.endswith("and?<|im_end|>\n<|im_start|>assistant\n")
    open_ended = write(tmp_path / "new.jsonl", [{"messages": chat("Nina?", "blue", "and?")}])
    data = loaded(tmp_path / "data", tmp_path, "predict", chat=CHAT, template="chat", predict_root=str(open_ended))
    assert data.question("predict", 0) == Question(data.question("predict", 0).prompt, "")
    assert data.question("predict", 0).prompt.endswith("and?<|im_end|>\n<|im_start|>assistant\n")


def test_conversations_of_a_test_all_have_an_answer_or_none(tmp_path: Path) -> None:
    options = {"chat": CHAT, "template": "chat", "grader": "exact", "val_fraction": 0}
    write(tmp_path / "data" / "train.jsonl", [{"messages": chat("Nina?", "blue")}] * 2)
    asked = [{"messages": chat("Nina?", "blue", "and?")}, {"messages": chat("Anna?", "")}]
    write(tmp_path / "data" / "test.jsonl", asked)
    data = loaded(tmp_path / "data", tmp_path, "predict", **options)
    assert (data.has_test_labels, [data.question("predict", i).reference for i in (0, 1)]) == (False, ["", ""])
    for row in asked:
        write(tmp_path / "data" / "test.jsonl", [{"messages": chat("Nina?", "blue")}, row])
        with pytest.raises(UserError, match=mentions("'messages'", "assistant", "line 2 of", "test.jsonl")):
            loaded(tmp_path / "data", tmp_path, **options)


def test_only_the_references_of_a_test_must_suit_the_grader(tmp_path: Path) -> None:
    file_of(tmp_path / "data" / "train.jsonl")
    file_of(tmp_path / "data" / "test.jsonl", [{"prompt": "Nina?", "answer": "12, so\n#### 12"}])
    loaded(tmp_path / "data", tmp_path, val_fraction=0.2, grader="gsm8k")
    file_of(tmp_path / "data" / "val.jsonl")
    loaded(tmp_path / "data", tmp_path, grader="gsm8k")
    file_of(tmp_path / "data" / "test.jsonl", [{"prompt": "Nina?", "answer": "b" * 50}])
    with pytest.raises(UserError, match=mentions("line 1 of", "test.jsonl", "gsm8k", f"'{'b' * 36}...:")):
        loaded(tmp_path / "data", tmp_path, grader="gsm8k")


# -- the cache


def test_tokens_are_kept_by_tokenizer_and_template(tmp_path: Path) -> None:
    file, cache = file_of(tmp_path / "a.jsonl"), tmp_path / "cache"

    def kept(**options: Any) -> int:
        loaded(file, tmp_path, val_fraction=0, **options)
        return len(list(cache.glob("*.safetensors")))

    assert kept() == 1
    first = next(cache.glob("*.safetensors"))
    before = first.stat().st_mtime_ns
    assert kept(max_length=32, padding="pack", train_on="all", too_long="cut") == 1
    assert first.stat().st_mtime_ns == before
    assert kept(template="{prompt}") == 2
    assert kept(template="{prompt}?") == 3
    assert kept(template="{prompt}", boundary="merged") == 4
    first.write_bytes(first.read_bytes()[:-10])
    assert len(loaded(file, tmp_path).train_set) == 9
    assert first.stat().st_mtime_ns > before


# -- what is wrong


EMPTY = ("'messages'", "line 2 of", "message 2", "role assistant", "empty")
BAD: list[tuple[Any, dict[str, Any], tuple[Any, ...]]] = [
    ([{"question": "a", "answer": "b"}], {}, ("a.jsonl", "'prompt'", "data.prompt_column", "question, answer")),
    ([{"prompt": "a", "anwser": "b"}], {}, ("a.jsonl", "'answer'", "did you mean 'anwser'", "data.answer_column")),
    ([{"prompt": "a", "answer": "b"}, {"prompt": "c"}], {}, ("'answer'", "empty", "line 2 of", "remove the row")),
    ([{"prompt": "a", "answer": " "}], {}, ("'answer'", "empty", "line 1 of")),
    ([{"prompt": "", "answer": "b"}], {}, ("'prompt'", "empty", "line 1 of")),
    ([{"prompt": "a", "answer": 3}], {}, ("'answer'", "3", "not text", "line 1 of")),
    ([{"prompt": "a", "answer": "b"}], {"template": "{promt}"}, ("'promt'", "did you mean 'prompt'", "data.template")),
    ([{"prompt": "a", "answer": "b"}], {"input_column": "x"}, ("'x'", "data.input_column")),
    ([{"messages": "a"}], {"template": "chat"}, ("'messages'", "'a' is no list", "line 1 of", '"role"')),
    ([{"messages": []}], {"template": "chat"}, ("'messages'", "no list", "line 1 of")),
    ([{"messages": None}], {"template": "chat"}, ("'messages'", "null is no list", "line 1 of")),
    ([{"messages": json.dumps(chat("a", "b"))}], {"template": "chat"}, ('[{"role":', "{... is no list")),
    ([{"messages": ["a"]}], {"template": "chat"}, ("line 1 of", "message 1 is 'a'", "role and content")),
    (
        [{"messages": [{"role": "user"}]}],
        {"template": "chat"},
        ("line 1 of", "message 1 has no 'content' among its keys (role)"),
    ),
    (
        [{"messages": [{"from": "human", "value": "a"}]}],
        {"template": "chat"},
        ("message 1", "'role' among its keys (from, value)"),
    ),
    ([{"messages": chat("a", None)}], {"template": "chat"}, ("line 1 of", "content of message 2 is null, not text")),
    ([{"messages": chat([{"type": "text", "text": "a" * 50}])}], {"template": "chat"}, ("message 1 is [{", "...,")),
    ([{"messages": chat("a", "b", system="")}, {"messages": chat("a", "")}], {"template": "chat"}, EMPTY),
    ([{"messages": chat("a", "b")}, {"messages": chat("a", " \n", "c", "d")}], {"template": "chat"}, EMPTY),
    ([{"messages": chat(" ", "b")}], {"template": "chat"}, ("line 1 of", "message 1", "role user", "empty")),
    ([{"messages": chat("a", "b")[1:]}], {"template": "chat"}, ("line 1 of", "begins with the assistant")),
    ([{"messages": chat("a")}], {"template": "chat"}, ("'messages'", "assistant", "line 1 of")),
    ([{"x": "a"}], {"template": "chat"}, ("'prompt'", "data.prompt_column")),
    ([{"prompt": "a", "answer": "b"}], {"grader": "gsm9k"}, ("data.grader", "'gsm9k'", "did you mean 'gsm8k'")),
    ([{"prompt": "a", "answer": "b"}], {"grader": "options"}, ("options", "words")),
    ([{"prompt": "a", "answer": "b"}], {"stop": ["Q:", ""]}, ("data.stop", "'Q:', ''", "empty")),
    ([{"prompt": "a", "answer": "b"}], {"max_length": 1}, ("data.max_length", 1)),
    ([{"prompt": "a", "answer": "b"}], {"padding": "packs"}, ("data.padding", "did you mean 'pack'")),
    ([{"prompt": "a", "answer": "b"}], {"limit": 0}, ("data.limit", 0)),
]


@pytest.mark.parametrize(("rows", "options", "words"), BAD)
def test_bad_input_is_one_sentence(rows: Any, options: Any, words: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", rows * (1 if len(rows) > 1 else 2))
    with pytest.raises(UserError, match=mentions(*words)) as raised:
        loaded(file, tmp_path, chat=CHAT, **{"val_fraction": 0, "batch_size": 1, **options})
    assert "\n" not in str(raised.value)


def test_what_is_longer_than_the_model_takes(tmp_path: Path) -> None:
    file_of(tmp_path / "data" / "train.jsonl")
    file_of(tmp_path / "data" / "test.jsonl")
    trainer = {"max_tokens": 64}
    with pytest.raises(UserError, match=mentions("data.max_length", 128, 64, "positions")):
        loaded(tmp_path / "data", tmp_path, trainer=trainer)
    options = {"max_length": 64, "grader": "exact"}
    with pytest.raises(UserError, match=mentions("line 2 of", "longest", "'test'", 6, 22, 64, "data.max_new_tokens")):
        loaded(tmp_path / "data", tmp_path, trainer=trainer, max_new_tokens=60, template="{prompt}", **options)


def test_a_prompt_without_a_token(tmp_path: Path) -> None:
    file_of(tmp_path / "train.jsonl")
    new = write(tmp_path / "new.csv", [])
    new.write_text('prompt,x\n"",1\n')
    with pytest.raises(UserError, match=mentions("line 2 of", "new.csv")):
        loaded(tmp_path / "train.jsonl", tmp_path, "predict", predict_root=str(new))


def test_a_file_that_is_no_list_of_objects(tmp_path: Path) -> None:
    for text, words in (("[1]", ("row 1 of", "JSON object")), ("[{]", ("not JSON", "list of objects"))):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=mentions("a.json", *words)):
            loaded(tmp_path / "a.json", tmp_path)
