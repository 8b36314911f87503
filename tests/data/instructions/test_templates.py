"""What is trained is what is asked later: texts, tokens and labels of every template."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from srlora_pl import CommonsenseData, InstructionData, MetaMathData, UserError
from srlora_pl.data.instructions.templates import ALPACA, Sample
from srlora_pl.data.instructions.tokens import Encoder
from srlora_pl.data.texts.tokens import load_tokenizer
from tests.helpers.errors import mentions
from tests.helpers.instructions import (
    BOS,
    CHAT,
    END_OF_TURN,
    EOS,
    FOLDER,
    chat,
    save_tokenizer,
    unpadded,
    with_model,
    write,
)

EXPECTED = json.loads((FOLDER / "expected.json").read_text())
ROWS = [json.loads(line) for line in (FOLDER / "rows.jsonl").read_text().splitlines()]
OWN = {"prompt_column": "instruction", "answer_column": "output", "val_fraction": 0, "max_length": 256}
T1 = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)
E2 = T1 + "\n"


def data_of(name: str, tmp_path: Path) -> Any:
    template, _, boundary = name.partition(" ")
    options: dict[str, Any] = {"boundary": boundary or "exact", "cache_dir": str(tmp_path / "cache"), "batch_size": 1}
    if template == "lora_sb":
        rows = [{**row, "answer": ""} for row in ROWS]
        (tmp_path / "commonsense_170k.json").write_text(json.dumps([{**row, "answer": "true"} for row in rows]))
        return CommonsenseData(str(tmp_path), val_fraction=0, **options)
    options["template"] = "Q: {instruction}\nA: " if template == "own" else template
    return InstructionData(str(FOLDER / "rows.jsonl"), **OWN, **options)


@pytest.mark.parametrize("name", EXPECTED)
def test_tokens_and_labels_of_ten_rows(name: str, tmp_path: Path) -> None:
    """Expected are those of a few lines with the tokenizers library alone."""
    tokenizer = save_tokenizer(tmp_path / "tokenizer", CHAT if name == "chat" else None)
    data = with_model(data_of(name, tmp_path), tokenizer)
    data.setup("fit")
    expected = EXPECTED[name]
    assert len(data.train_set) == len(ROWS) == 10
    batch = data.train_set.__getitems__(range(10))
    found = unpadded(batch, [len(row["input_ids"]) for row in expected])
    assert found == [(row["input_ids"], row["labels"]) for row in expected]
    assert batch["input_ids"].shape[1] % 8 == 0


def test_an_answer_begins_in_training_where_it_begins_in_generation(tmp_path: Path) -> None:
    """With the boundary exact; one that is merged trains less than the answer."""
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    short = {}
    for boundary in ("exact", "merged"):
        data = with_model(data_of(f"own {boundary}", tmp_path), tokenizer)
        data.setup("fit")
        rows, batch = data.samples("train"), data.train_set.__getitems__(range(10))
        asked = data.encoder.prompts([data.writer.prompt(sample) for sample in rows], True)
        trained = [
            data.tokenizer.decode(ids[labels >= 0])
            for ids, labels in zip(*map(batch.get, ("input_ids", "labels")), strict=True)
        ]
        answers = [f"{sample.answer}</s>" for sample in rows]
        short[boundary] = [answer for answer, text in zip(answers, trained, strict=True) if answer != text]
        for ids, prompt in zip(batch["input_ids"].tolist(), asked, strict=True):
            assert boundary == "merged" or ids[: len(prompt)] == prompt
    assert short["exact"] == []
    assert len(short["merged"]) == 8


def metaspace(tmp_path: Path) -> Any:
    """A tokenizer that puts a blank before each text, as those of SentencePiece do; ":a" is one token."""
    pieces = ["<unk>", "</s>", "▁", *"abc:\n", ":a", "▁a"]
    core = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [(":", "a"), ("▁", "a")], unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    return load_tokenizer(str(tmp_path))


def test_an_answer_alone_has_no_blank_before_it(tmp_path: Path) -> None:
    tokenizer = metaspace(tmp_path)
    encoder = Encoder(tokenizer, "x")
    assert tokenizer.convert_ids_to_tokens(encoder.plain(["ab"])[0]) == ["▁a", "b"]
    encoded = encoder.encode([[("b:", False), ("ab", True)], [("b", False), ("a", True)]], adds_start=True)
    tokens = tokenizer.convert_ids_to_tokens(encoded.ids)
    assert tokens == ["▁", "b", ":", "a", "b", "</s>", "▁", "b", "a", "</s>"]
    assert encoded.trained.tolist() == [False] * 3 + [True] * 3 + [False] * 2 + [True] * 2
    merged = Encoder(tokenizer, "x", "merged").encode([[("b:", False), ("ab", True)]], adds_start=True)
    assert tokenizer.convert_ids_to_tokens(merged.ids) == ["▁", "b", ":a", "b", "</s>"]
    assert merged.trained.tolist() == [False] * 3 + [True] * 2


def test_the_texts_of_both_papers_grounds(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"query": "1+1?", "response": "2"}])
    (tmp_path / "commonsense_170k.json").write_text("[]")
    math, common = MetaMathData(str(tmp_path)), CommonsenseData(str(tmp_path))
    sample = Sample({"instruction": "q"}, "a")
    assert math.writer.pieces(sample) == [(T1.format("q"), False), ("a", True)]
    assert math.writer.prompt(sample) == T1.format("q") + " Let's think step by step."
    blanks = " " * 12
    assert common.writer.pieces(sample)[0][0] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"{blanks}### Instruction:\n{blanks}q\n\n{blanks}### Response:\n{blanks}"
    )
    assert common.writer.prompt(sample) == E2.format("q")
    assert ALPACA.prompt(sample) == ALPACA.pieces(sample)[0][0] == T1.format("q")
    with_input = ALPACA.prompt(Sample({"instruction": "q", "input": "x"}))
    assert "paired with an input" in with_input
    assert with_input.endswith("### Instruction:\nq\n\n### Input:\nx\n\n### Response:")


# -- conversations


def conversation(tmp_path: Path, messages: Any, template: str = CHAT, **options: Any) -> Any:
    tokenizer = save_tokenizer(tmp_path / "tokenizer", template, **options)
    file = write(tmp_path / "train.jsonl", [{"messages": messages}])
    own = InstructionData(str(file), template="chat", val_fraction=0, batch_size=1, cache_dir=str(tmp_path / "cache"))
    data = with_model(own, tokenizer)
    data.setup("fit")
    return data


def marked(data: Any) -> str:
    return "\n".join(line.removeprefix("    ") for line in data._shown().split("\n"))


def test_every_turn_of_the_assistant_is_trained_to_its_end(tmp_path: Path) -> None:
    data = conversation(tmp_path, chat("Nina?", "blue", "and Anna?", "cheese\n12", system="Say"))
    assert marked(data) == (
        "<|im_start|>system\nSay<|im_end|>\n<|im_start|>user\nNina?<|im_end|>\n<|im_start|>assistant\n>>>blue<|im_end|>"
        "<<<\n<|im_start|>user\nand Anna?<|im_end|>\n<|im_start|>assistant\n>>>cheese\n12<|im_end|><<<"
    )
    batch = data.train_set.__getitems__([(0, 0)])
    assert BOS not in batch["input_ids"]  # the template has its own start
    assert (batch["labels"] == END_OF_TURN).sum() == 2
    assert data.writer.prompt(data.samples("train")[0]).endswith("and Anna?<|im_end|>\n<|im_start|>assistant\n")


def test_what_follows_the_last_answer_is_left_out(tmp_path: Path) -> None:
    data = conversation(tmp_path, chat("Nina?", "blue", "and?"))
    assert marked(data).endswith("<|im_start|>assistant\n>>>blue<|im_end|><<<")


def test_a_template_that_ends_no_turn_with_the_end_of_a_text(tmp_path: Path) -> None:
    data = conversation(tmp_path, chat("Nina?", "blue", "and?", "12"), eos_token="</s>")
    assert marked(data).count(">>>blue<|im_end|>\n<<<<|im_start|>user") == 1
    assert marked(data).endswith(">>>12<|im_end|>\n</s><<<")


def test_a_prompt_and_an_answer_are_a_conversation(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer", CHAT)
    file = write(
        tmp_path / "a.jsonl", [{"prompt": "Nina?", "answer": "blue", "more": "12"}, {"prompt": "b", "answer": "c"}]
    )
    data = with_model(InstructionData(str(file), input_column="more", template="chat", val_fraction=0), tokenizer)
    assert data.writer.prompt(data.samples("train")[0]).endswith("user\nNina?\n\n12<|im_end|>\n<|im_start|>assistant\n")
    assert data.samples("train")[1].columns["input"] == ""


def test_a_template_that_writes_earlier_turns_in_another_way_is_refused(tmp_path: Path) -> None:
    forgets = CHAT.replace("{% for message in messages %}", "{% for message in messages[-3:] %}")
    assert "blue" in marked(conversation(tmp_path, chat("Nina?", "blue"), forgets))
    with pytest.raises(UserError, match=mentions("chat template", "message 4", "line 1", "train.jsonl")):
        conversation(tmp_path, chat("Nina?", "blue", "and?", "12 " * 40), forgets)


def test_a_row_that_the_template_refuses(tmp_path: Path) -> None:
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=mentions("chat template", "line 1", "roles must alternate", "data.template")):
        conversation(tmp_path, chat("Nina?", "blue"), strict)


# -- what is refused


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("alpacca", ("data.template", "'alpacca'", "did you mean 'alpaca'", "chat")),
        ("Q: {question}\nA: {answer}", ("data.template", "'answer'", "leave it out")),
        ("Q: {question", ("data.template", "{column}", "twice")),
        ("{0} {question}", ("data.template", "{0}", "{column}")),
        ("{question!r}", ("data.template", "{question!r}")),
        ("{question.x}", ("data.template", "{question.x}")),
    ],
)
def test_a_template_that_is_none(template: str, words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions(*words)):
        InstructionData(str(tmp_path), template=template)


def test_columns_of_a_template_may_have_any_name_and_braces_are_written_twice(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"#1 Question": "Nina?", "answer": "blue"}])
    data = InstructionData(str(file), template="{{{#1 Question}}}\n")
    assert data.writer.prompt(data.samples("train")[0]) == "{Nina?}\n"
    with pytest.raises(UserError, match=mentions("data.template", "'question'", "query")):
        MetaMathData(str(tmp_path), template="{question}")


def test_tokenizers_without_an_end_or_a_chat_template(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "Nina?", "answer": "blue"}] * 2)
    endless = save_tokenizer(tmp_path / "endless", eos_token=None)
    with pytest.raises(UserError, match=mentions("endless", "eos_token", "tokenizer_config.json")):
        with_model(InstructionData(str(file), batch_size=1), endless).setup("fit")
    silent = save_tokenizer(tmp_path / "silent")
    with pytest.raises(UserError, match=mentions("silent", "no chat template", "alpaca")):
        with_model(InstructionData(str(file), batch_size=1, template="chat"), silent).setup("fit")


def test_the_token_for_the_end_is_not_written_twice(tmp_path: Path) -> None:
    encoder = Encoder(load_tokenizer(save_tokenizer(tmp_path)), "x")
    encoded = encoder.encode([[("Nina?", False), ("blue</s>", True)]], adds_start=True)
    assert (encoded.ids == EOS).sum() == 1
    assert encoded.trained[-1]
