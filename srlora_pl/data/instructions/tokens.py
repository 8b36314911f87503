"""Texts as tokens, each trained or not, cached on disk."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from safetensors.torch import load_file
from torch import Tensor

from srlora_pl.data.instructions.templates import Piece, Sample, Template
from srlora_pl.util.cache import keep
from srlora_pl.util.errors import UserError

Boundary = Literal["exact", "merged"]

_FORMAT = "1"  # of the files in the cache; a change makes all of them stale
_CHUNK = 2_000  # samples that are tokenised together: the tokenizer's own objects are many times larger than ours
_PROBE = "a"


@dataclass(frozen=True)
class Encoded:
    """The tokens of n samples, one after the other, and which of them are trained.

    ``ids``: int32 (total,); ``trained``: bool (total,); sample i is ``offsets[i]:offsets[i + 1]``, int64 (n + 1,).
    """

    ids: Tensor
    trained: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sample, int64 (n,)."""
        return self.offsets.diff()

    def trained_in(self, lengths: Tensor) -> Tensor:
        """How many of the first ``lengths`` tokens of each sample are trained, int64 (n,)."""
        before = torch.cat([torch.zeros(1, dtype=torch.int64), self.trained.cumsum(0)])
        return before[self.offsets[:-1] + lengths] - before[self.offsets[:-1]]


class Encoder:
    """Makes tokens of texts in pieces.

    With ``boundary`` ``exact`` a text's tokens are those of the whole text if they begin with the prompt's; otherwise
    the prompt's and then those of the answer alone, so that an answer begins in training where generation begins.
    ``merged`` always takes the whole text's, and trains none of the first n, where n is the number of the prompt's: a
    token on the boundary, and with it the answer's first letters, is not trained.

    Raises:
        UserError: the tokenizer has no token for the end of a text.
    """

    def __init__(self, tokenizer: Any, name: str, boundary: Boundary = "exact") -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"The tokenizer of model.backbone {name!r} has no eos_token, so a model could not learn to stop; name "
                f"one in its tokenizer_config.json."
            )
        self.tokenizer, self.boundary, self.end = tokenizer, boundary, tokenizer.eos_token_id
        plain, whole = self.plain([_PROBE])[0], tokenizer(_PROBE)["input_ids"]
        self.start: list[int] = whole[: next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)]
        self._adds_blank = tokenizer.convert_ids_to_tokens(plain[0]) != _PROBE

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, and no special ones besides those that it holds."""
        # Set explicitly, because under its default the library warns in every worker that is forked later.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        options = {"add_special_tokens": False, "truncation": False, "padding": False, "return_attention_mask": False}
        return self.tokenizer(list(texts), **options)["input_ids"] if texts else []

    def prompts(self, texts: Sequence[str], adds_start: bool) -> list[list[int]]:
        """The tokens of texts that are continued."""
        start = self.start if adds_start else []
        return [start + ids for ids in self.plain(texts)]

    def encode(self, samples: Sequence[Sequence[Piece]], adds_start: bool, adds_end: bool = True) -> Encoded:
        """The tokens of texts in pieces, with the end of the text as a trained one. The first token is never trained,
        as nothing predicts it."""
        ids, trained = [], []
        for first in range(0, len(samples), _CHUNK):
            for tokens, flags in self._encode(samples[first : first + _CHUNK]):
                if adds_start:
                    tokens, flags = self.start + tokens, [False] * len(self.start) + flags
                if adds_end and tokens[-1:] != [self.end]:
                    tokens, flags = [*tokens, self.end], [*flags, True]
                flags[0] = False
                ids.append(torch.tensor(tokens, dtype=torch.int32))
                trained.append(torch.tensor(flags))
        lengths = torch.tensor([0, *map(len, ids)])
        return Encoded(torch.cat(ids), torch.cat(trained), lengths.cumsum(0))

    def _encode(self, samples: Sequence[Sequence[Piece]]) -> list[tuple[list[int], list[bool]]]:
        texts = [""] * len(samples)
        done: list[tuple[list[int], list[bool]]] = [([], []) for _ in samples]
        for turn in range(max(map(len, samples))):
            rows = [row for row, pieces in enumerate(samples) if turn < len(pieces)]
            for row in rows:
                texts[row] += samples[row][turn][0]
            for row, whole in zip(rows, self.plain([texts[row] for row in rows]), strict=True):
                (piece, is_trained), (before, flags) = samples[row][turn], done[row]
                if self.boundary == "exact" and whole[: len(before)] != before:
                    whole = before + self._alone(piece)
                done[row] = (whole, (flags + [is_trained] * len(whole))[: len(whole)])
        return done

    def _alone(self, piece: str) -> list[int]:
        """The tokens of a piece as one that follows others, without the blank that a tokenizer may put first."""
        line, after_line = self.plain(["\n", f"\n{piece}"])
        if self._adds_blank and after_line[: len(line)] == line:
            return after_line[len(line) :]
        return self.plain([piece])[0]


def encode_samples(encoder: Encoder, template: Template, samples: Sequence[Sample], cache: Path) -> Encoded:
    """The tokens of samples to train on; cached in the folder ``cache`` under a name that depends on all of it."""
    file = cache / f"{_key(encoder, template, samples)}.safetensors"
    encoded = _load(file, len(samples))
    if encoded is None:
        encoded = encoder.encode(list(map(template.pieces, samples)), template.adds_start)
        try:
            keep(asdict(encoded), file)
        except OSError as error:
            rank_zero_warn(f"The tokens could not be kept in '{cache}' ({error.strerror}); set data.cache_dir.")
    return encoded


def _key(encoder: Encoder, template: Template, samples: Sequence[Sample]) -> str:
    """A digest of everything that the tokens depend on."""
    backend = encoder.tokenizer.backend_tokenizer
    backend.no_truncation()  # settings of the last call, which the next call replaces
    backend.no_padding()
    about = [_FORMAT, encoder.boundary, encoder.start, encoder.end, template.adds_start, template.key, len(samples)]
    rows = (json.dumps([sample.columns, sample.answer], sort_keys=True, default=str) for sample in samples)
    digest = hashlib.sha256()
    for text in chain([json.dumps(about), backend.to_str()], rows):
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()[:40]


def _load(file: Path, samples: int) -> Encoded | None:
    """The tokens in ``file``; None if it is missing, cut short or holds something else."""
    try:
        encoded = Encoded(**load_file(file))
    except Exception:  # safetensors and the file system share no base class; in any case the texts are tokenised again
        return None
    total = len(encoded.ids)
    sound = len(encoded) == samples and int(encoded.offsets[-1]) == total == len(encoded.trained)
    return encoded if sound else None
