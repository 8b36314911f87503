"""The base of the DataModules of text, GLUE and the user's own files: tokens, padding, batches by length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from srlora_pl.data.base import DataModule, KeyedDataset, split_keys
from srlora_pl.data.loader import Key
from srlora_pl.data.protocols import Batch, ModelForData, model_of
from srlora_pl.data.texts.labels import Problem
from srlora_pl.data.texts.tokens import Tokens, load_tokenizer, tokenize
from srlora_pl.util.cache import cache_folder
from srlora_pl.util.errors import UserError, require
from srlora_pl.util.randomness import derive, run_seed

_BUCKETS = int.from_bytes(b"buckets")
# Batches are padded to a multiple of this many tokens: few distinct shapes, and whole tiles for matrix units.
ROUND = 8


@dataclass
class Texts:
    """A split as read: n texts, or n pairs of texts, and their labels (n, ...), None where there are none."""

    first: Sequence[str]
    second: Sequence[str] | None = None
    labels: Tensor | None = field(default=None, kw_only=True)


class OfTokens(DataModule):
    """Base of the DataModules whose samples are tokens of the model's own tokenizer.

    The model names it (``backbone_name``, loaded with its ``tokenizer_options`` if any).

    Args:
        cache_dir: a folder for the tokens; by default ``srlora_pl/tokens`` in the user's cache.
        kwargs: the arguments of `DataModule`.
    """

    def __init__(self, *, cache_dir: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cache = cache_folder("tokens") if cache_dir is None else Path(cache_dir).expanduser()
        self._tokenizer: tuple[str, dict[str, Any], Any] = ("", {}, None)  # its name, its options and itself
        self._read: dict[str, Any] = {}  # the tokens of the splits

    def _load_tokenizer(self) -> Any:
        """The tokenizer of the current model; tokens of another model's tokenizer are dropped."""
        name, options = self._model.backbone_name, dict(self._model.tokenizer_options)
        if name is None:
            raise UserError(
                f"{type(self).__name__} needs a model with backbone_name, whose tokenizer it takes; set "
                f"self.backbone_name in the model's __init__."
            )
        if (name, options) != self._tokenizer[:2]:
            self._tokenizer = (name, options, load_tokenizer(name, options))
            self._read.clear()
        return self._tokenizer[-1]

    @property
    def _model(self) -> ModelForData:
        return model_of(self.trainer)

    @property
    def padding_token(self) -> int | None:
        """The number of the padding token: the tokenizer's, else the network's, else the token for the end of a text.

        Tokens that the network does not know are passed over.
        """
        tokenizer, known = self._load_tokenizer(), self._model.vocab_size
        tokens = (tokenizer.pad_token_id, self._model.padding_token, tokenizer.eos_token_id)
        return next((token for token in tokens if token is not None and 0 <= token < (known or math.inf)), None)

    def _require_known(self, split: str, ids: Tensor, known: int | None, name: str = "token") -> None:
        """Refuse a token without an embedding, which would end the run with an error of the device in some batch."""
        if known is not None and len(ids) and (largest := int(ids.max())) >= known:
            raise UserError(
                f"The tokenizer of model.backbone {self._tokenizer[0]!r} makes {name} {largest} of '{split}', but the "
                f"network knows {known} of them, counted from 0; put the tokenizer of this network there."
            )


class TextDataModule(OfTokens):
    """Base of the DataModules of text: tokenised once, batched by length, in an exact order.

    Batches are dicts of ``input_ids``, ``attention_mask`` and, where the tokenizer makes them, ``token_type_ids``,
    int64 (b, L); ``label``, int64 (b,), or float32 (b,) for numbers and (b, classes) for several classes at once,
    absent where there is none; ``index``, int64 (b,), the position in the split.

    The tokenizer is the model's (see `OfTokens`). A training batch holds texts of similar length and is padded to its
    longest, rounded up to a multiple of 8; the order of the batches is random. A subclass gives `splits` and `read`,
    and sets the four attributes below in ``__init__``.

    Args:
        max_length: the most tokens of a text or pair of texts; the rest is cut.
        pad_to_max_length: pad every batch to ``max_length``, and draw training batches without regard to length; done
            anyway for a network that sees its padding, such as FNet.
        kwargs: the arguments of `DataModule`, and ``cache_dir``, a folder for the tokens; by default
            ``srlora_pl/tokens`` in the user's cache.
    """

    kind = "text"
    num_classes: int  # 1 for regression
    class_names: list[str]  # none for regression
    problem: Problem
    score_names: list[str]  # for the task to report, the main one first

    def __init__(self, *, max_length: int = 128, pad_to_max_length: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require("data.max_length", max_length, "1 or more", max_length >= 1)
        self.max_length, self.pad_to_max_length = max_length, pad_to_max_length

    def read(self, split: str) -> Texts:
        """The texts and labels of a split."""
        raise NotImplementedError

    # -- loading

    def prepare_data(self) -> None:
        """Download what is missing and tokenise it, in one process; the others find it in the cache."""
        for split in self.needed(str(self.trainer.state.fn.value)):  # type: ignore[union-attr]
            self._tokens(split)

    def load(self, stage: str) -> None:
        """Tokenise the splits of ``stage``."""
        longest = self._model.max_tokens
        if longest is not None:
            most = f"at most {longest}, the tokens that this model has positions for"
            require("data.max_length", self.max_length, most, self.max_length <= longest)
        if self._pads_to_max_length and not self.pad_to_max_length:
            rank_zero_info(
                f"The network of model.backbone {self._model.backbone_name!r} sees the padding of a text, so all are "
                f"padded to data.max_length {self.max_length}, as with data.pad_to_max_length."
            )
        for split in self.needed(stage):
            tokens = self._tokens(split)[0]
            self._require_known(split, tokens.input_ids, self._model.vocab_size)
            if tokens.token_type_ids is not None:
                self._require_known(split, tokens.token_type_ids, self._model.token_types, "token type")
        super().load(stage)

    def dataset(self, split: str, rows: Tensor | None, use: str) -> "TokenSet":
        tokens, labels = self._tokens(split)
        left = self._model.pads_left
        return TokenSet(
            tokens=tokens,
            labels=None if use == "predict" else labels,
            rows=torch.arange(len(tokens)) if rows is None else rows,
            by_length=use != "train",
            max_length=self.max_length,
            pad_to_max_length=self._pads_to_max_length,
            pad=self.padding_token or 0,
            pad_left=self._load_tokenizer().padding_side == "left" if left is None else left,
        )

    def _tokens(self, split: str) -> tuple[Tokens, Tensor | None]:
        """Tokens and labels of a split, read once, with a note on how many texts were cut."""
        tokenizer = self._load_tokenizer()
        if split not in self._read:
            texts = self.read(split)
            tokens = tokenize(tokenizer, texts.first, texts.second, self.max_length, self.cache)
            self._read[split] = (tokens, texts.labels)
            if tokens.truncated:
                rank_zero_info(
                    f"{tokens.truncated} of the {len(tokens)} samples in '{split}' are longer than data.max_length "
                    f"{self.max_length} tokens and were cut."
                )
        return self._read[split]

    # -- padding

    @property
    def _pads_to_max_length(self) -> bool:
        return self.pad_to_max_length or self._model.sees_padding

    # -- order

    def train_order(self, epoch: int) -> Tensor:
        """A permutation whose batches hold texts of similar length, in random order: f(run seed, epoch)."""
        order = super().train_order(epoch)
        if self._pads_to_max_length:
            return order
        assert isinstance(self.train_set, TokenSet)
        # The devices of a step cut their batches from one piece, so that none waits for another's longer texts.
        size = self.batch_size * (self.trainer.world_size if self.trainer else 1)
        generator = torch.Generator().manual_seed(derive(run_seed(), _BUCKETS, epoch))
        return in_buckets(order, self.train_set.padded_lengths, size, generator)

    def _fingerprint(self) -> dict[str, int | float | str]:
        lengths = {"data.max_length": self.max_length, "data.pad_to_max_length": self._pads_to_max_length}
        return {**super()._fingerprint(), **lengths}


def in_buckets(order: Tensor, lengths: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """``order`` rearranged so that each ``size`` in a row have similar ``lengths``.

    Samples of equal length keep their order, so a random order gives random batches. The pieces come in random order,
    but for the short one, which is cut from a random place and comes last.
    """
    order = order[lengths[order].argsort(stable=True)]
    whole, rest = divmod(len(order), size)
    cut = int(torch.randint(whole + 1, (), generator=generator)) * size
    short, pieces = order[cut : cut + rest], torch.cat([order[:cut], order[cut + rest :]]).view(whole, size)
    return torch.cat([pieces[torch.randperm(whole, generator=generator)].flatten(), short])


@dataclass(eq=False, kw_only=True)
class TokenSet(KeyedDataset):
    """Tokenised texts, padded by the batch.

    ``rows``: the samples of ``tokens`` in the set, int64 (n,); ``by_length``: hand them out longest first (so that a
    batch too large for the memory fails at once), each with its position among ``rows`` as ``index``.
    """

    tokens: Tokens
    labels: Tensor | None
    rows: Tensor
    by_length: bool
    max_length: int
    pad_to_max_length: bool
    pad: int
    pad_left: bool

    def __post_init__(self) -> None:
        lengths = self.tokens.lengths[self.rows]
        rounded = (-(-lengths // ROUND) * ROUND).clamp(max=self.max_length)
        self.padded_lengths = torch.full_like(rounded, self.max_length) if self.pad_to_max_length else rounded
        longest_first = lengths.argsort(descending=True, stable=True)
        self.turns = longest_first if self.by_length else torch.arange(len(self.rows))

    def extremes(self) -> tuple[int, int]:
        """The longest and the shortest text, so that one of them is padded."""
        order = self.tokens.lengths[self.rows].argsort()
        return int(order[0]), int(order[-1])

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        index = self.turns[split_keys(keys)[0]]
        length = int(self.padded_lengths[index].max())
        return self.labelled(index, **self.tokens.padded(self.rows[index], length, self.pad, self.pad_left))
