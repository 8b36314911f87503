"""A small tokenizer of pieces of words, rows of prompts and answers, and their data with a stand-in for a trainer."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from srlora_pl.data.instructions.datamodule import InstructionDataModule
from tests.helpers.data import attach
from tests.helpers.paths import ROOT

# Its words are split as Llama 3's are, so that ": " or ":" and the letters behind it may be one token.
FOLDER = ROOT / "tests/data/instructions"
BOS, EOS, TURN, END_OF_TURN = range(4)
CHAT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
Conversation = list[dict[str, str]]


def save_tokenizer(folder: Path, chat_template: str | None = None, **options: Any) -> str:
    """The tokenizer in a folder; with a chat template a turn ends with the end of a text."""
    options = {"bos_token": "<s>", "eos_token": "</s>" if chat_template is None else "<|im_end|>", **options}
    core = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **options)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return str(folder)


def with_model(data: InstructionDataModule, tokenizer: str, processed: int = 0, **more: Any) -> Any:
    """``data`` with a stand-in for a trainer whose model has this tokenizer; ``max_tokens``: that it takes."""
    model = SimpleNamespace(backbone_name=tokenizer, max_tokens=more.pop("max_tokens", None))
    attach(data, processed, **{"accumulate_grad_batches": 1, **more})
    data.trainer.lightning_module = model  # type: ignore[union-attr, misc]
    return data


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def rows_of_lengths(count: int = 41, longest: int = 40) -> list[dict[str, str]]:
    """Prompts and answers of 1 to ``longest`` letters, each a token of its own, in no order."""
    return [{"prompt": "z" * (1 + 7 * i % longest), "answer": "k" * (1 + 11 * i % longest)} for i in range(count)]


def chat(*contents: str, system: str | None = None) -> Conversation:
    """User and assistant by turns."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def trained(batch: dict[str, Tensor]) -> list[list[int]]:
    """The trained tokens of each row."""
    return [row[row >= 0].tolist() for row in batch["labels"]]


def unpadded(batch: dict[str, Tensor], lengths: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each row up to its length; checks that the rest is not trained."""
    found = []
    for ids, labels, length in zip(batch["input_ids"], batch["labels"], lengths, strict=True):
        assert bool((labels[length:] == -100).all())
        assert torch.equal(labels[labels >= 0], ids[labels >= 0])
        found.append((ids[:length].tolist(), labels[:length].tolist()))
    return found
