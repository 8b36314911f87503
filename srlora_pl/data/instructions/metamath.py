"""MetaMathQA to train on (Yu et al. 2023, arXiv:2309.12284), GSM8K and MATH to test."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from srlora_pl.data.graders import grader
from srlora_pl.data.instructions.datamodule import InstructionDataModule
from srlora_pl.data.instructions.sources import Source, from_file, from_hub, is_on_hub
from srlora_pl.data.instructions.templates import ALPACA, Sample, Text
from srlora_pl.data.protocols import Generation
from srlora_pl.util.errors import UserError, listed, require_one_of

STOP = ("Instruction:", "Instruction", "Response:", "Response")  # of LoRA-SB's evaluation

_TRAIN = ("MetaMathQA-395K.json", "train.jsonl", "train.json", "train.parquet")
_GSM8K_TRAIN = "gsm8k/train.jsonl"
# Columns of the question and of the answer, the most tokens of an answer, and on the hub the data set and its parts.
_TESTS: dict[str, tuple[str, str, int, str, Sequence[str]]] = {
    "gsm8k": ("question", "answer", 256, "openai/gsm8k", ["main"]),
    "math": (
        "problem",
        "solution",
        512,
        "EleutherAI/hendrycks_math",
        [
            "algebra",
            "counting_and_probability",
            "geometry",
            "intermediate_algebra",
            "number_theory",
            "prealgebra",
            "precalculus",
        ],
    ),
}

_LORA_SB = Text(ALPACA.text, asks=f"{ALPACA.text} Let's think step by step.")


class MetaMathData(InstructionDataModule):
    """MetaMathQA to train on; the test splits ``gsm8k`` and ``math`` are asked, and their answers graded.

    Args:
        root: ``meta-math/MetaMathQA`` on the hub, or a folder with ``MetaMathQA-395K.json`` or ``train.jsonl`` (columns
            ``query`` and ``response``), ``gsm8k/test.jsonl`` and ``math/test.jsonl``. What has only GSM8K to train on,
            a folder with ``gsm8k/train.jsonl`` or ``openai/gsm8k``, is rewritten to MetaMathQA's form.
        test_root: a folder with the test files; by default ``root``, and the hub if that is there.
        test_sets: some of ``gsm8k`` and ``math``; by default those that are there.
        template: ``lora_sb``, which ends prompts to answer in ``Let's think step by step.`` (Ponkshe et al. 2024,
            arXiv:2411.19557); or one of `InstructionDataModule`, whose own text may name ``{query}``.
        math_grader: ``hendrycks``, or ``math_verify``.
        limit: the most samples to train on: the first ones.
        max_new_tokens: of an answer; by default 256 for ``gsm8k`` and 512 for ``math``.
        stop: words before which an answer ends.
        kwargs: the other arguments of `InstructionDataModule`.

    Raises:
        UserError: files are missing or are not those; an argument is out of its range.
    """

    templates: ClassVar[Mapping[str, Text]] = {"lora_sb": _LORA_SB, "alpaca": ALPACA}

    def __init__(
        self,
        root: str = "meta-math/MetaMathQA",
        test_root: str | None = None,
        test_sets: Sequence[str] | None = None,
        template: str = "lora_sb",
        math_grader: str = "hendrycks",
        *,
        limit: int | None = 50_000,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = STOP,
        **kwargs: Any,
    ) -> None:
        super().__init__(template=template, limit=limit, max_new_tokens=max_new_tokens, stop=stop, **kwargs)
        self.columns_named("response", ["query"])
        grader("math", math_grader=math_grader)
        for name in test_sets or ():
            require_one_of("data.test_sets", name, _TESTS)
        self.root, self.math_grader = root, math_grader
        self.folder = None if is_on_hub(root) else Path(root).expanduser()
        self.test_folder = self.folder if test_root is None else Path(test_root).expanduser()
        self.test_sets = list(_TESTS) if test_sets is None else list(test_sets)
        if self.test_folder is not None:
            there = [name for name in self.test_sets if self._test_file(name).is_file()]
            if test_sets is not None and there != self.test_sets:
                missing = next(name for name in self.test_sets if name not in there)
                raise UserError(
                    f"There is no '{self._test_file(missing)}'; put it there, or leave it out of test_sets."
                )
            self.test_sets = there
        self.split_names = {"val": ("val",), "test": [f"test_{name}" for name in self.test_sets]}

    def _test_file(self, name: str) -> Path:
        assert self.test_folder is not None
        return self.test_folder / name / "test.jsonl"

    def splits(self, use: str) -> list[str]:
        return {"train": ["train"], "val": []}.get(use, self.test_sets)

    def generation(self, split: str) -> Generation:
        name = split.removeprefix("test_")
        most = _TESTS[name][2] if name in _TESTS else _TESTS["gsm8k"][2]
        grader = "gsm8k" if name == "gsm8k" else "math"  # which takes validation's references, numbers or not
        return Generation(self.max_new_tokens or most, self.stop, grader, math_grader=self.math_grader)

    def read(self, split: str) -> list[Sample]:
        if split == "train":
            return self._read_train()
        question, answer, _, hub, parts = _TESTS[split]
        if self.test_folder is not None:
            sources: list[Source] = [from_file(self._test_file(split))]
        else:
            sources = [from_hub(hub, "test", part) for part in parts]
        return [
            sample for source in sources for sample in _samples(source, question, answer, f"of {split.upper()}", True)
        ]

    def _read_train(self) -> list[Sample]:
        part = "train" if self.limit is None else f"train[:{self.limit}]"
        if self.root == _TESTS["gsm8k"][3]:
            return _rewritten(from_hub(self.root, part, "main"))
        if self.folder is None:
            return _samples(from_hub(self.root, part), "query", "response", "of MetaMathQA")
        found = next((file for name in _TRAIN if (file := self.folder / name).is_file()), None)
        if found is not None:
            return _samples(from_file(found), "query", "response", "of MetaMathQA")
        if not (self.folder / _GSM8K_TRAIN).is_file():
            raise UserError(f"data.root '{self.root}' has none of {listed([*_TRAIN, _GSM8K_TRAIN])}; put one there.")
        return _rewritten(from_file(self.folder / _GSM8K_TRAIN))


def as_metamath(answer: str) -> str:
    """An answer of GSM8K in the form of MetaMathQA's: without marks ``<<1+1=2>>``, and with its end said once more."""
    answer = re.sub(r"<<.*?>>", "", answer)
    return f"{answer}\nThe answer is: {answer.rpartition('#### ')[2].strip()}"


def _rewritten(source: Source) -> list[Sample]:
    rows = _samples(source, "question", "answer", "of GSM8K")
    return [_sample(row.columns["query"], as_metamath(row.answer or ""), row.where) for row in rows]


def _samples(source: Source, question: str, answer: str, whose: str, is_asked: bool = False) -> list[Sample]:
    table = source(dict.fromkeys((question, answer), whose), ())
    rows = zip(table.texts(question), table.texts(answer), strict=True)
    return [_sample(q, a, table.where(row), is_asked) for row, (q, a) in enumerate(rows)]


def _sample(question: str, answer: str, where: str, is_asked: bool = False) -> Sample:
    """``is_asked``: the answer is a reference as it is; else what the grader ``math`` compares with stands in it."""
    reference = answer if is_asked else answer.rpartition("The answer is: ")[2].strip()
    return Sample({"instruction": question, "query": question}, answer, reference, where)
