"""From a sample's columns to the text that a model is trained on and asked with."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, Protocol

from srlora_pl.util.errors import UserError, did_you_mean, listed, one_line

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)

# A part of a text, and whether it is trained.
Piece = tuple[str, bool]


@dataclass(frozen=True)
class Sample:
    """A row of a file.

    Attributes:
        columns: what a template takes from it: ``instruction`` and ``input``; ``messages``, each with ``role`` and
            ``content``; or the columns that the user's own text names.
        answer: None for a prompt alone, or where it is part of the messages.
        reference: what an answer to it is compared with.
        where: the place of the row, for errors.
    """

    columns: Mapping[str, Any]
    answer: str | None = None
    reference: str = ""
    where: str = field(default="", compare=False)


class Template(Protocol):
    """A way to write samples.

    Attributes:
        key: tells it from every other template.
        adds_start: whether the tokenizer's own token for the start of a text comes first.
    """

    @property
    def key(self) -> str: ...

    @property
    def adds_start(self) -> bool: ...

    def pieces(self, sample: Sample) -> list[Piece]:
        """The text to train on; the token for the end of a text follows."""

    def prompt(self, sample: Sample) -> str:
        """The text that is continued to answer the sample."""


@dataclass(frozen=True)
class Text:
    """A text with columns in braces, which the answer follows.

    ``asks``: the text for generation, where it is another one; ``with_input`` and ``asks_with_input``: the two for
    samples whose column ``input`` is not empty.
    """

    text: str
    asks: str | None = None
    with_input: str | None = None
    asks_with_input: str | None = None
    adds_start = True

    @property
    def key(self) -> str:
        return json.dumps([self.text, self.with_input])

    def pieces(self, sample: Sample) -> list[Piece]:
        return [(self._fill(self.text, self.with_input, sample), False), (sample.answer or "", True)]

    def prompt(self, sample: Sample) -> str:
        return self._fill(self.asks or self.text, self.asks_with_input or self.with_input, sample)

    def _fill(self, text: str, with_input: str | None, sample: Sample) -> str:
        has_input = with_input is not None and sample.columns.get("input")
        return (with_input if has_input else text).format_map(sample.columns)  # type: ignore[union-attr]


ALPACA = Text(_ALPACA, with_input=_WITH_INPUT)


@dataclass(frozen=True)
class Chat:
    """The tokenizer's own chat template, which writes a conversation turn by turn.

    All turns of the assistant are trained, up to the token for the end of a text if the template ends a turn with it.
    What follows the last of them is left out.
    """

    tokenizer: Any
    adds_start = False  # the template writes it

    @property
    def key(self) -> str:
        return str(self.tokenizer.get_chat_template())

    def pieces(self, sample: Sample) -> list[Piece]:
        messages, pieces, done = self._messages(sample), [], ""
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:turn], True, sample)
            whole = self._render(messages[: turn + 1], False, sample)
            if not (prompt.startswith(done) and whole.startswith(prompt) and len(whole) > len(prompt)):
                raise UserError(
                    f"The chat template of the tokenizer writes the turns before message {turn + 1} of {sample.where} "
                    f"in another way once it follows, so that answers cannot be told from prompts; use another "
                    f"template, or rows with one answer."
                )
            end = _end_of_turn(whole, len(prompt), self.tokenizer.eos_token)
            pieces += [(prompt[len(done) :], False), (whole[len(prompt) : end], True)]
            done = whole[:end]
        return pieces

    def prompt(self, sample: Sample) -> str:
        messages = self._messages(sample)
        return self._render(messages[:-1] if messages[-1]["role"] == "assistant" else messages, True, sample)

    def _messages(self, sample: Sample) -> Sequence[Mapping[str, str]]:
        if "messages" in sample.columns:
            return sample.columns["messages"]
        parts = (sample.columns["instruction"], sample.columns.get("input"))
        prompt = {"role": "user", "content": "\n\n".join(filter(None, parts))}
        return [prompt] if sample.answer is None else [prompt, {"role": "assistant", "content": sample.answer}]

    def _render(self, messages: Sequence[Mapping[str, str]], asks: bool, sample: Sample) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=asks
            )
        except Exception as error:  # the template's own, of any type, such as for roles that do not alternate
            raise UserError(
                f"The chat template of the tokenizer refuses {sample.where} ({one_line(error)}); correct the row or "
                f"take another data.template."
            ) from error


def _end_of_turn(text: str, start: int, end_token: str) -> int:
    """Where the trained part that begins at ``start`` ends: behind ``end_token`` if only blanks follow it."""
    place = text.rfind(end_token, start)
    end = place + len(end_token)
    return end if place >= 0 and not text[end:].strip() else len(text)


def chat(tokenizer: Any, name: str) -> Chat:
    """The chat template of ``tokenizer``, that of the backbone ``name``.

    Raises:
        UserError: it has none.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"data.template is 'chat', but the tokenizer of model.backbone {name!r} has no chat template, as base "
            f"models have none; set data.template to alpaca or to a text of your own."
        )
    return Chat(tokenizer)


def fields_of(text: str) -> list[str]:
    """The columns that a text of the user's own names in braces.

    Raises:
        UserError: there are none, or the braces hold something else.
    """
    try:
        parts = [part for part in Formatter().parse(text) if part[1] is not None]
    except ValueError as error:
        raise UserError(
            f"data.template cannot be read ({error}); write a column as {{column}}, and a brace of the text twice."
        ) from None
    for _, name, form, conversion in parts:
        if form or conversion or not name or name.isdigit() or set(name) & set(".["):
            raise UserError(
                f"data.template holds {{{name}{f'!{conversion}' if conversion else ''}{f':{form}' if form else ''}}}, "
                f"which names no column; write a column as {{column}}, and a brace of the text twice."
            )
    return list(dict.fromkeys(str(part[1]) for part in parts))


def own_text(text: str, known: Sequence[str], answer: str) -> list[str]:
    """The columns of a template of the user's own.

    ``known``: the names of templates; ``answer``: the column of the answers.

    Raises:
        UserError: ``text`` is no such template.
    """
    columns = fields_of(text)
    if not columns:
        raise UserError(
            f"data.template is {text!r}{did_you_mean(text, known)}: it must be one of {listed(known)}, or a text with "
            f"columns in braces, such as '{{question}}\\n'."
        )
    if answer in columns:
        raise UserError(
            f"data.template holds the column {answer!r} of the answers; leave it out, as the answer follows the text."
        )
    return columns
