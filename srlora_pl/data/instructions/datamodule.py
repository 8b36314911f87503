"""The base of the DataModules of prompts and answers: tokens, buckets and packs, and what is asked of a model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from srlora_pl.data.base import KeyedDataset, as_list
from srlora_pl.data.graders import grader
from srlora_pl.data.instructions import sets
from srlora_pl.data.instructions.sets import Answers, Packs, Prompts
from srlora_pl.data.instructions.templates import ALPACA, Sample, Template, Text, chat, own_text
from srlora_pl.data.instructions.tokens import Boundary, Encoded, Encoder, encode_samples
from srlora_pl.data.loader import rank_and_world
from srlora_pl.data.protocols import Batch, Generation, Question
from srlora_pl.data.texts.datamodule import OfTokens, in_buckets
from srlora_pl.util.errors import UserError, did_you_mean, listed, require, require_one_of
from srlora_pl.util.randomness import derive, run_seed

_BUCKETS = int.from_bytes(b"buckets")
_SHOWN = 2_000  # characters of the sample that a run begins with


class InstructionDataModule(OfTokens):
    """Base of the DataModules of prompts and answers, tokenised once, in an exact order.

    Batches to train on and to validate are those of `sets.Answers` or `sets.Packs`, test splits whose answers are
    generated and all to predict are those of `sets.Prompts`. A subclass gives `splits`, `read` and `generation`.

    Args:
        template: ``alpaca``, with the prompt as its instruction; ``chat``, the tokenizer's own chat template; or a text
            with columns in braces, which the answer follows at once, such as ``"Question: {question}\\nAnswer: "``.
        max_length: the most tokens of a sample; a row of as many with ``padding`` ``pack``.
        too_long: ``drop`` samples that are longer, ``cut`` them on the right, or take the first for an ``error``.
        train_on: ``answer``, or ``all`` for the prompt as well.
        boundary: between prompt and answer: ``exact``, so that an answer begins in training where it begins in
            generation; or ``merged``, as other code has it: a token on the boundary is not trained.
        padding: ``buckets`` of samples of similar length, each padded to its batch's longest; or ``pack`` several
            samples into rows of ``max_length``, of which then ``batch_size`` are a batch.
        limit: the most samples of the training split, and of a validation split of its own: the first ones.
        test_limit: the most questions of each test split, spread evenly over it.
        eval_batch_size: samples in a batch that is validated, tested or predicted; by default ``batch_size``.
        max_new_tokens: the most tokens of a generated answer.
        stop: words before which a generated answer ends.
        kwargs: the arguments of `OfTokens`.
    """

    num_classes = 0
    templates: ClassVar[Mapping[str, Text]] = {"alpaca": ALPACA}  # besides ``chat``

    def __init__(
        self,
        *,
        template: str = "alpaca",
        max_length: int = 512,
        too_long: Literal["drop", "cut", "error"] = "drop",
        train_on: Literal["answer", "all"] = "answer",
        boundary: Boundary = "exact",
        padding: Literal["buckets", "pack"] = "buckets",
        limit: int | None = None,
        test_limit: int | None = None,
        eval_batch_size: int | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.class_names: list[str] = []
        require("data.max_length", max_length, "2 or more", max_length >= 2)
        require_one_of("data.too_long", too_long, ("drop", "cut", "error"))
        require_one_of("data.train_on", train_on, ("answer", "all"))
        require_one_of("data.boundary", boundary, ("exact", "merged"))
        require_one_of("data.padding", padding, ("buckets", "pack"))
        for key, value in {
            "limit": limit,
            "test_limit": test_limit,
            "eval_batch_size": eval_batch_size,
            "max_new_tokens": max_new_tokens,
        }.items():
            require(f"data.{key}", value, "1 or more", value is None or value >= 1)
        self.template, self.max_length, self.too_long, self.train_on = template, max_length, too_long, train_on
        self.boundary, self.padding = boundary, padding
        self.limit, self.test_limit, self.eval_batch_size = limit, test_limit, eval_batch_size
        self.max_new_tokens, self.stop = max_new_tokens, tuple([stop] if isinstance(stop, str) else stop)
        require("data.stop", list(self.stop), "words, none of them empty", all(self.stop))
        self._samples: dict[str, list[Sample]] = {}

    # -- for and by subclasses

    def columns_named(self, answer: str, known: Sequence[str] | None = None) -> list[str]:
        """The columns that a template of the user's own names; none for one that has a name.

        ``answer``: the column of the answers; ``known``: the columns there are, where that is known.

        Raises:
            UserError: it is no template, or names other columns.
        """
        names = [*self.templates, "chat"]
        columns = [] if self.template in names else own_text(self.template, names, answer)
        for column in columns:
            if known is not None and column not in known:
                raise UserError(
                    f"data.template names the column {column!r}{did_you_mean(column, known)}, but the columns of these "
                    f"data are {listed(known)}."
                )
        return columns

    def read(self, split: str) -> Sequence[Sample]:
        """The samples of ``train``, ``val`` or another split; those to ask about need no answer."""
        raise NotImplementedError

    def generation(self, split: str) -> Generation:
        """How answers to a split are generated, by its name in `split_names`."""
        raise NotImplementedError

    def samples(self, split: str) -> list[Sample]:
        """The samples of a split, read once, those beyond its limit left out."""
        if split not in self._samples:
            samples = self.read(split)
            self._samples[split] = [samples[row] for row in self._within_limit(split, len(samples))]
        return self._samples[split]

    def _within_limit(self, split: str, count: int) -> Sequence[int]:
        if split in ("train", "val"):
            return range(min(count, self.limit or count))
        if split not in self.splits("test") or not self.test_limit or self.test_limit >= count:
            return range(count)
        return [row * count // self.test_limit for row in range(self.test_limit)]

    # -- loading

    def prepare_data(self) -> None:
        """Download what is missing and tokenise it, in one process; the others find it in the cache."""
        self._prepare(str(self.trainer.state.fn.value))  # type: ignore[union-attr]

    def load(self, stage: str) -> None:
        longest = self._model.max_tokens
        if longest is not None:
            most = f"at most {longest}, the tokens that this model has positions for"
            require("data.max_length", self.max_length, most, self.max_length <= longest)
        self._prepare(stage)
        super().load(stage)

    def _prepare(self, stage: str) -> None:
        """Read and tokenise; a fit ends with a test, whose errors shall come before training."""
        uses = {"fit": ("train", "val", "test"), "validate": ("val",) if self.splits("val") else ("train",)}
        for use in uses.get(stage, (stage,)):
            for split in self.splits(use):
                self.tokens_of(split, use)
                if use == "test":
                    self._require_references(split, self.generation(self._name(split, use)))

    def _require_references(self, split: str, how: Generation) -> None:
        """Refuse a reference that the grader cannot compare with, which it would say only behind the answer."""
        if how.grader is not None:
            judge = grader(how.grader, options=how.options, math_grader=how.math_grader)
            for sample in self.samples(split):
                try:
                    judge.grade("", sample.reference)
                except UserError as error:
                    raise UserError(f"{sample.where}: {error}") from None

    def tokens_of(self, split: str, use: str) -> Any:
        """The tokens of a split as its data set needs them, read once."""
        return self._prompts(split, use) if self._is_asked(split, use) else self._encoded(split)

    def _is_asked(self, split: str, use: str) -> bool:
        """Whether answers to a split are generated, and not scored as they are."""
        return use == "predict" or (use == "test" and self.generation(self._name(split, use)).grader is not None)

    def _name(self, split: str, use: str) -> str:
        """The name of a split for tasks."""
        return dict(zip(self.splits(use), self.split_names.get(use, (use,)), strict=False)).get(split, use)

    def dataset(self, split: str, rows: Tensor | None, use: str) -> KeyedDataset:
        pad, size = self.padding_token or 0, self.eval_batch_size
        if self._is_asked(split, use):
            return Prompts(self.tokens_of(split, use), pad, size)
        encoded, kept = self.tokens_of(split, use)
        kept = kept if rows is None else kept[rows]
        answers = Answers(encoded, kept, self.max_length, pad, by_length=use != "train", batch_size=size)
        if use != "train" or self.padding != "pack":
            return answers
        return Packs(answers, fixed=bool(getattr(self.trainer, "overfit_batches", 0)))

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._load_tokenizer()

    @property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self._tokenizer[0], self.boundary)

    @property
    def writer(self) -> Template:
        """The template that writes samples."""
        if self.template == "chat":
            return chat(self.tokenizer, self._tokenizer[0])
        return self.templates.get(self.template) or Text(self.template)

    def _encoded(self, split: str) -> tuple[Encoded, Tensor]:
        """The tokens of a split to train on or to score, and which samples are kept, int64 (m,); read once."""
        self._load_tokenizer()  # first, as it drops what another tokenizer has made
        if split not in self._read:
            encoded = encode_samples(self.encoder, self.writer, self.samples(split), self.cache)
            self._require_known(split, encoded.ids, self._model.vocab_size)
            if self.train_on == "all":
                trained = torch.ones_like(encoded.trained)
                trained[encoded.offsets[:-1]] = False  # nothing predicts a first token
                encoded = replace(encoded, trained=trained)
            self._read[split] = (encoded, self._kept(split, encoded))
        return self._read[split]

    def _kept(self, split: str, encoded: Encoded) -> Tensor:
        """The samples that fit, or that have a trained token left where they are cut."""
        lengths, place = encoded.lengths, f"of the {len(encoded):,} samples in '{split}'"
        too_long = lengths > self.max_length
        count, longest = int(too_long.sum()), int(lengths.max())
        if count and self.too_long == "error":
            where = self.samples(split)[int(too_long.nonzero()[0])].where
            raise UserError(
                f"{count:,} {place} are longer than data.max_length {self.max_length}, the first is {where}; the "
                f"longest has {longest} tokens: raise data.max_length, or set data.too_long to drop or cut."
            )
        without_answer = encoded.trained_in(lengths.clamp(max=self.max_length)) == 0
        left_out = without_answer if self.too_long == "cut" else too_long | without_answer
        if left_out.all():
            raise UserError(
                f"No sample in '{split}' has a token to train on within data.max_length {self.max_length}; raise it, "
                f"the longest sample has {longest} tokens."
            )
        if count:
            done = "were dropped" if self.too_long == "drop" else "were cut"
            lost = int((too_long & without_answer).sum()) if self.too_long == "cut" else 0
            more = f", {lost:,} of them dropped, as nothing of their answers was left" if lost else ""
            rank_zero_info(
                f"{count:,} {place} ({count / len(encoded):.1%}) are longer than data.max_length {self.max_length} "
                f"tokens and {done}{more}; the longest has {longest}."
            )
        return (~left_out).nonzero().flatten()

    def _prompts(self, split: str, use: str) -> list[list[int]]:
        """The tokens of the prompts of a split."""
        self._load_tokenizer()
        if (key := f"prompts of {split}") not in self._read:
            prompts = self._prompt_tokens(self.samples(split))
            ids = torch.tensor([i for prompt in prompts for i in prompt])
            places = [sample.where for sample in self.samples(split)]
            more = self.generation(self._name(split, use)).max_new_tokens
            self.require_room(split, ids, list(map(len, prompts)), places, more)
            self._read[key] = prompts
        return self._read[key]

    def require_room(self, split: str, ids: Tensor, lengths: list[int], places: list[str], more: int) -> None:
        """Refuse tokens that the network does not know, and texts that with ``more`` tokens are too long for it."""
        self._require_known(split, ids, self._model.vocab_size)
        most = self._model.max_tokens
        for length, place in zip(lengths, places, strict=True):
            if most is not None and length + more > most:
                raise UserError(
                    f"The prompt of {place} has {length} tokens, and with {more} of an answer more than the {most} "
                    f"that this model has positions for; the longest prompt of '{split}' has {max(lengths)}: shorten "
                    f"such prompts, or lower data.max_new_tokens."
                )

    def _prompt_tokens(self, samples: Sequence[Sample]) -> list[list[int]]:
        writer = self.writer
        prompts = self.encoder.prompts(list(map(writer.prompt, samples)), writer.adds_start)
        if empty := next((sample for sample, ids in zip(samples, prompts, strict=True) if not ids), None):
            raise UserError(f"The prompt of {empty.where} has no token to begin from; write one, or another template.")
        return prompts

    # -- for tasks

    def _loaded(self, name: str) -> tuple[list[Sample], Tensor]:
        """The samples that a split is taken from, and those in it, int64 (n,); by its name in `split_names`."""
        for use, loaded in {"val": self.val_set, "test": self.test_set, "predict": self.predict_set}.items():
            splits = self.splits(use) or self.splits("train")  # of which validation samples are held out
            names = self.split_names.get(use, (use,))
            for each, split, data in zip(names, splits, as_list(loaded), strict=False):
                if each == name:
                    return self.samples(split), data.rows
        raise ValueError(f"no split {name!r} is loaded")

    def question(self, split: str, index: int) -> Question:
        """The sample at ``index`` of a split that is loaded, by its name in `split_names` or ``predict``."""
        samples, there = self._loaded(split)
        sample = samples[int(there[index])]
        return Question(self.writer.prompt(sample), sample.reference)

    def generation_batch(self, split: str, rows: Sequence[int]) -> Batch:
        """The prompts of those of the samples ``rows`` that there are, as one batch to generate from, in this order."""
        samples, there = self._loaded(split)
        rows = [row for row in rows if row < len(there)]
        batch = Prompts(self._prompt_tokens([samples[int(there[row])] for row in rows]), self.padding_token or 0)
        batch.turns = torch.arange(len(rows))
        return {**batch.__getitems__(range(len(rows))), "index": torch.tensor(rows)}

    # -- order

    def train_order(self, epoch: int) -> Tensor:
        """A permutation whose steps hold samples of similar length, in random order, or one of packed rows:
        f(run seed, epoch).

        A step has the same samples however it is divided into batches and devices.
        """
        order = super().train_order(epoch)
        if isinstance(self.train_set, Packs):
            return order
        assert isinstance(self.train_set, Answers)
        lengths = sets.rounded(self.train_set.lengths, self.max_length)  # so that there are many of each
        generator = torch.Generator().manual_seed(derive(run_seed(), _BUCKETS, epoch))
        return in_buckets(order, lengths, self._per_batch * self._accumulate, generator)

    def step_tokens(self, order: Tensor, epoch: int) -> list[int]:
        train = self._train()
        assert isinstance(train, (Answers, Packs))
        tokens = train.tokens(epoch) if isinstance(train, Packs) else train.trained_tokens
        return sets.tokens_of_steps(tokens[order], self._per_batch, self.batches_per_epoch, self._accumulate)

    @property
    def _per_batch(self) -> int:
        """Samples in a batch, on all devices together."""
        return self.batch_size * rank_and_world(self)[1]

    @property
    def _accumulate(self) -> int:
        """Batches in a step."""
        return self.trainer.accumulate_grad_batches if self.trainer else 1

    def _fingerprint(self) -> dict[str, int | float | str]:
        singles = self._train().singles
        assert isinstance(singles, Answers)
        return {
            **super()._fingerprint(),
            "data.max_length": self.max_length,
            "data.padding": self.padding,
            "tokens to train on": int(singles.trained_tokens.sum()),
        }

    # -- a run's first lines

    def description(self) -> str:
        """A sample with its trained part marked, and what a step holds, before the line of `DataModule`."""
        line = super().description()
        if self.train_set is None:
            return line
        train = self.train_set.singles
        assert isinstance(train, Answers)
        tokens, trained = int(train.lengths.sum()), int(train.trained_tokens.sum())
        share = min(1, self._per_batch * self._accumulate / len(self.train_set))
        shares = (
            f"data: {trained / tokens:.1%} of {tokens:,} tokens are trained; a step has about "
            f"{round(trained * share):,} trained of {round(tokens * share):,} tokens"
        )
        if isinstance(self.train_set, Packs):
            full = tokens / len(self.train_set) / self.max_length
            shares += f"; the samples fill {len(self.train_set):,} rows to {full:.1%}"
        return (
            f"data: a sample to train on, with >>> and <<< around its trained part:\n{self._shown()}\n{shares}\n{line}"
        )

    def _shown(self) -> str:
        train = self._train().singles
        assert isinstance(train, Answers)
        first = int(train.encoded.offsets[train.rows[0]])
        ids = train.encoded.ids[first : first + int(train.lengths[0])]
        trained = train.encoded.trained[first : first + len(ids)]
        decode: Callable[..., str] = partial(self.tokenizer.decode, clean_up_tokenization_spaces=False)
        runs = torch.cat([torch.tensor([0]), trained.long().diff().nonzero().flatten() + 1, torch.tensor([len(ids)])])
        parts = [
            f">>>{decode(ids[i:j])}<<<" if trained[i] else decode(ids[i:j])
            for i, j in zip(runs[:-1].tolist(), runs[1:].tolist(), strict=True)
        ]
        text = "".join(parts)
        if len(text) > _SHOWN:
            text = f"{text[: _SHOWN // 2]} [...] {text[-_SHOWN // 2 :]}"
        return "\n".join(f"    {line}" for line in text.split("\n"))
