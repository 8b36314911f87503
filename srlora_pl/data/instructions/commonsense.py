"""Commonsense170K and its eight test sets (Hu et al. 2023, arXiv:2304.01933)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from srlora_pl.data.base import KeyedDataset
from srlora_pl.data.instructions.datamodule import InstructionDataModule
from srlora_pl.data.instructions.metamath import STOP
from srlora_pl.data.instructions.sets import Options
from srlora_pl.data.instructions.sources import from_file
from srlora_pl.data.instructions.templates import ALPACA, Sample, Text
from srlora_pl.data.instructions.tokens import Encoded
from srlora_pl.data.protocols import Generation
from srlora_pl.util.errors import UserError, listed, require_one_of
from srlora_pl.util.randomness import derive

# Their folders in LLM-Adapters, and the answers that a question may have.
SETS = {
    "boolq": ("boolq", ("true", "false")),
    "piqa": ("piqa", ("solution1", "solution2")),
    "siqa": ("social_i_qa", ("answer1", "answer2", "answer3")),
    "hellaswag": ("hellaswag", ("ending1", "ending2", "ending3", "ending4")),
    "winogrande": ("winogrande", ("option1", "option2")),
    "arc_easy": ("ARC-Easy", ("answer1", "answer2", "answer3", "answer4", "answer5")),
    "arc_challenge": ("ARC-Challenge", ("answer1", "answer2", "answer3", "answer4", "answer5")),
    "obqa": ("openbookqa", ("answer1", "answer2", "answer3", "answer4")),
}
ANSWER = "the correct answer is"
_FILE = "commonsense_170k.json"
_MIX = int.from_bytes(b"mix")

# As LoRA-SB's code has it: 12 blanks before every line but the first, and after the last; in training alone.
_HEAD, _BLANKS = ALPACA.text.partition("\n\n")[0], " " * 12
_LORA_SB = Text(
    f"{_HEAD}\n\n{_BLANKS}### Instruction:\n{_BLANKS}{{instruction}}\n\n{_BLANKS}### Response:\n{_BLANKS}",
    asks=f"{_HEAD}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n",
)


class CommonsenseData(InstructionDataModule):
    """Commonsense170K to train on; its test sets are asked, and the answers graded.

    The test splits are ``boolq``, ``piqa``, ``siqa``, ``hellaswag``, ``winogrande``, ``arc_easy``, ``arc_challenge``
    and ``obqa``.

    Args:
        root: a folder in the layout of LLM-Adapters: ``commonsense_170k.json``, or ``boolq/train.json`` and the like,
            which are mixed; and ``boolq/test.json`` and the like. Or ``commonsense_170k.json`` itself.
        test_root: a folder with the test sets; by default ``root``, or the folder that it lies in.
        sets: some of the eight; by default those that are there. ``commonsense_170k.json`` always is trained on whole.
        template: ``lora_sb``, which trains on indented lines and asks without (Ponkshe et al. 2024, arXiv:2411.19557);
            or one of `InstructionDataModule`, whose own text may name ``{instruction}``.
        commonsense_by: ``generation`` of an answer, in which the first option is looked for; or ``likelihood``, which
            takes the option with the largest after ``the correct answer is``.
        max_length: the most tokens of a sample.
        max_new_tokens: the most tokens of an answer.
        stop: words before which an answer ends.
        kwargs: the other arguments of `InstructionDataModule`.

    Raises:
        UserError: files are missing or are not those; an argument is out of its range.
    """

    templates: ClassVar[Mapping[str, Text]] = {"lora_sb": _LORA_SB, "alpaca": ALPACA}

    def __init__(
        self,
        root: str,
        test_root: str | None = None,
        sets: Sequence[str] | None = None,
        template: str = "lora_sb",
        commonsense_by: Literal["generation", "likelihood"] = "generation",
        *,
        max_length: int = 256,
        max_new_tokens: int = 32,
        stop: Sequence[str] = STOP,
        **kwargs: Any,
    ) -> None:
        super().__init__(template=template, max_length=max_length, max_new_tokens=max_new_tokens, stop=stop, **kwargs)
        self.columns_named("output", ["instruction", "input"])
        require_one_of("data.commonsense_by", commonsense_by, ("generation", "likelihood"))
        for name in sets or ():
            require_one_of("data.sets", name, SETS)
        self.commonsense_by, self.root, self.sets = commonsense_by, Path(root).expanduser(), list(sets or SETS)
        folder = self.root.parent if self.root.suffix else self.root
        self.test_folder = folder if test_root is None else Path(test_root).expanduser()
        self.test_sets = [name for name in self.sets if self._file(self.test_folder, name, "test").is_file()]
        for name in sets or ():
            if name not in self.test_sets:
                raise UserError(
                    f"There is no '{self._file(self.test_folder, name, 'test')}'; put it there, or leave {name!r} out "
                    f"of data.sets."
                )
        self.split_names = {"val": ("val",), "test": [f"test_{name}" for name in self.test_sets]}

    @staticmethod
    def _file(folder: Path, name: str, split: str) -> Path:
        return folder / SETS[name][0] / f"{split}.json"

    def splits(self, use: str) -> list[str]:
        return {"train": ["train"], "val": []}.get(use, self.test_sets)

    def generation(self, split: str) -> Generation:
        name = split.removeprefix("test_")
        words = (
            SETS[name][1]
            if name in SETS
            else tuple(dict.fromkeys(word for each in self.sets for word in SETS[each][1]))
        )
        assert self.max_new_tokens is not None
        return Generation(self.max_new_tokens, self.stop, "options", words)

    def read(self, split: str) -> list[Sample]:
        if split != "train":
            return _samples(self._file(self.test_folder, split, "test"))
        whole = self.root if self.root.suffix else self.root / _FILE
        if whole.is_file() or self.root.suffix:
            return _samples(whole)
        files = [file for name in self.sets if (file := self._file(self.root, name, "train")).is_file()]
        if not files:
            names = listed(str(self._file(Path(), name, "train")) for name in self.sets)
            raise UserError(
                f"data.root '{self.root}' has no {_FILE} and none of {names}; put the files of LLM-Adapters there."
            )
        samples = [sample for file in files for sample in _samples(file)]
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(derive(self.seed, _MIX)))
        return [samples[row] for row in order]

    # -- by likelihood

    def tokens_of(self, split: str, use: str) -> Any:
        if use != "test" or self.commonsense_by == "generation":
            return super().tokens_of(split, use)
        if (key := f"options of {split}") not in self._read:
            self._read[key] = self._options(split)
        return self._read[key]

    def dataset(self, split: str, rows: Tensor | None, use: str) -> KeyedDataset:
        tokens = self.tokens_of(split, use)
        if not isinstance(tokens, tuple) or len(tokens) != 3:
            return super().dataset(split, rows, use)
        questions = (self.eval_batch_size or self.batch_size) // len(SETS[split][1])
        return Options(*tokens, self.padding_token or 0, max(1, questions))

    def _options(self, split: str) -> tuple[Encoded, Tensor, Tensor]:
        """The tokens of all questions' options, the number of each, and how many each question has."""
        words, writer = SETS[split][1], self.writer
        pieces, numbers, counts, places = [], [], [], []
        for sample in self.samples(split):
            listed_there = re.findall(r"Answer format: (\S+)", sample.columns["instruction"])[-1:]
            own = [n for n, word in enumerate(words) if not listed_there or word in listed_there[0].split("/")]
            prompt = f"{writer.prompt(sample)}{ANSWER}"
            pieces += [[(prompt, False), (f" {words[n]}", True)] for n in own]
            numbers += own
            places += [sample.where] * len(own)
            counts.append(len(own))
        encoded = self.encoder.encode(pieces, writer.adds_start, adds_end=False)
        self.require_room(split, encoded.ids, encoded.lengths.tolist(), places, 0)
        return encoded, torch.tensor(numbers), torch.tensor(counts)


def _samples(file: Path) -> list[Sample]:
    columns = dict.fromkeys(("instruction", "output", "answer"), "of LLM-Adapters")
    table = from_file(file)({**columns, "input": "of LLM-Adapters"}, ["input"])
    inputs = table.columns.get("input") or [""] * len(table)
    rows = zip(*map(table.texts, columns), inputs, strict=True)
    return [
        Sample({"instruction": instruction, "input": more or ""}, output, answer, table.where(row))
        for row, (instruction, output, answer, more) in enumerate(rows)
    ]
