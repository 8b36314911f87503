"""Prompts and answers from the user's own files."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from srlora_pl.data import graders
from srlora_pl.data.graders import GRADERS
from srlora_pl.data.instructions.datamodule import InstructionDataModule
from srlora_pl.data.instructions.sources import Source, from_file, from_root
from srlora_pl.data.instructions.templates import Sample
from srlora_pl.data.protocols import Generation
from srlora_pl.data.texts.tables import Table, is_missing
from srlora_pl.util.errors import UserError, listed, require_one_of, shortened


class InstructionData(InstructionDataModule):
    """Prompts and answers from your own JSON-lines, JSON, CSV, TSV or parquet files, or from a data set on the hub.

    A row is a prompt and an answer, or with ``template: chat`` a conversation: a list of messages, each with ``role``
    and ``content``. Batches and the order are as in `InstructionDataModule`.

    Args:
        root: a file to train on; a folder with ``train.jsonl`` (or another ending) and perhaps ``val`` and ``test``
            files; or a name on the hub. A test file without answers is only predicted.
        prompt_column: name of the column with the prompt; a ``template`` of your own names its columns itself.
        answer_column: name of the column with the answer.
        input_column: name of the column with an input to the prompt, which may be empty, for ``alpaca`` and ``chat``.
        messages_column: name of the column with conversations; where ``chat`` finds none, it takes the prompt and the
            answer for one.
        separator: of the fields of a CSV or TSV; by default the comma or the tab.
        predict_root: a file with prompts to answer; None answers those of the test file.
        grader: of the answers to the test file, which then are generated: ``exact``, ``options``, ``gsm8k`` or
            ``math``; without one the test is the loss of the file's own answers.
        options: of the grader ``options``, its words.
        max_new_tokens: the most tokens of a generated answer.
        kwargs: the other arguments of `InstructionDataModule`.

    Raises:
        UserError: a file, column, prompt or answer is missing or wrong; an argument is out of its range.
    """

    def __init__(
        self,
        root: str,
        prompt_column: str = "prompt",
        answer_column: str = "answer",
        input_column: str | None = None,
        messages_column: str = "messages",
        separator: str | None = None,
        *,
        predict_root: str | None = None,
        grader: str | None = None,
        options: Sequence[str] = (),
        max_new_tokens: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(max_new_tokens=max_new_tokens, **kwargs)
        self.root, self.separator, self.predict_root = root, separator, predict_root
        self.prompt_column, self.answer_column, self.input_column = prompt_column, answer_column, input_column
        self.messages_column = messages_column
        self._columns = self.columns_named(answer_column)
        if grader is not None:
            require_one_of("data.grader", grader, GRADERS)
            graders.grader(grader, options=options)
        self._generation = Generation(max_new_tokens, self.stop, grader, tuple(options))

    def generation(self, split: str) -> Generation:
        return self._generation

    @cached_property
    def _sources(self) -> dict[str, Source]:
        """Of the splits."""
        sources, others = from_root(self.root, self.separator)
        if self.predict_root is not None:
            sources["predict"] = from_file(Path(self.predict_root).expanduser(), self.separator)
            others = [path for path in others if path != Path(self.predict_root).expanduser()]
        if others:
            names = listed((repr(path.name) for path in others), most=10)
            self.left_out[f"files or folders that are no split ({names})"] = len(others)
        return sources

    def splits(self, use: str) -> list[str]:
        if use == "test":
            return ["test"] if "test" in self._sources and self._has_answers else []
        if use == "predict" and self.predict_root is None:
            use = "test"
        return [use] if use in self._sources else []

    @cached_property
    def _has_answers(self) -> bool:
        """Whether the test file is labelled, if only in part."""
        table = self._table("test")
        if self.messages_column in table.columns:
            conversations = _conversations(table, self.messages_column, is_asked=True)
            return any(each[-1]["role"] == "assistant" and each[-1]["content"] for each in conversations)
        return not all(is_missing(text) or text == "" for text in table.columns.get(self.answer_column, [None]))

    def _table(self, split: str) -> Table:
        source = self._sources[split]
        named = self._columns or [self.prompt_column]
        columns = dict.fromkeys(named, f"that data.{'template' if self._columns else 'prompt_column'} names")
        if self.input_column and not self._columns:
            columns[self.input_column] = "that data.input_column names"
        columns[self.answer_column] = "that data.answer_column names"
        if self.template == "chat":
            both = {self.messages_column: "that data.messages_column names", **columns}
            table = source(both, list(both))
            if self.messages_column in table.columns:
                return table
        return source(columns, [self.answer_column] if split in ("test", "predict") else [])

    def read(self, split: str) -> list[Sample]:
        table = self._table(split)
        is_asked = split == "predict" or (split == "test" and not self._has_answers)
        if self.template == "chat" and self.messages_column in table.columns:
            return list(self._from_messages(table, split, is_asked))
        answers = [None] * len(table) if is_asked else table.texts(self.answer_column)
        if self._columns:
            fields = {name: table.texts(name, may_be_empty=True) for name in self._columns}
        else:
            fields = {"instruction": table.texts(self.prompt_column)}
            if self.input_column:
                fields["input"] = ["" if is_missing(text) else text for text in table.columns[self.input_column]]
        rows = (dict(zip(fields, row, strict=True)) for row in zip(*fields.values(), strict=True))
        return [
            Sample(columns, answer, answer or "", table.where(row))
            for row, (columns, answer) in enumerate(zip(rows, answers, strict=True))
        ]

    def _from_messages(self, table: Table, split: str, is_asked: bool) -> Iterator[Sample]:
        verb, first = ("ends in", -1) if split == "test" else ("holds", 0)
        for row, messages in enumerate(_conversations(table, self.messages_column, is_asked)):
            if not is_asked and not any(message["role"] == "assistant" for message in messages[first:]):
                raise UserError(
                    f"Column {self.messages_column!r} {verb} no message of the role assistant in {table.where(row)}; "
                    f"add an answer, or remove the row."
                )
            last = messages[-1]
            reference = last["content"] if last["role"] == "assistant" else ""
            yield Sample({"messages": messages}, None, reference, table.where(row))


def _conversations(table: Table, column: str, is_asked: bool) -> Iterator[list[Mapping[str, Any]]]:
    """The messages of each row, as they must be; where ``is_asked``, an answer at their end may be empty."""
    for row, messages in enumerate(table.columns[column]):
        if fault := _fault(messages, is_asked):
            raise UserError(
                f"Column {column!r} holds no usable conversation in {table.where(row)}: {fault}; write a list of "
                f'{{"role": "user", "content": "..."}}, or remove the row.'
            )
        yield messages


def _fault(messages: Any, is_asked: bool) -> str | None:
    """What is wrong with a conversation."""
    if not isinstance(messages, list) or not messages:
        return f"{_shown(messages)} is no list of messages"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            return f"message {number} is {_shown(message)}, without role and content"
        for key in ("role", "content"):
            if key not in message:
                return f"message {number} has no {key!r} among its keys ({listed(message)})"
            if not isinstance(message[key], str):
                return f"the {key} of message {number} is {_shown(message[key])}, not text"
        role, is_last = message["role"], number == len(messages)
        is_needed = role == "user" or (role == "assistant" and not (is_asked and is_last))
        if is_needed and not message["content"].strip():
            return f"message {number}, of the role {role}, is empty"
    return "it begins with the assistant" if messages[0]["role"] == "assistant" else None


def _shown(value: Any) -> str:
    return "null" if value is None else shortened(value)
