"""The tokenizer of a backbone, and the tokens of texts, which are cached on disk."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from safetensors.torch import load_file
from torch import Tensor

from srlora_pl.util.cache import keep
from srlora_pl.util.errors import UserError, one_line

_FORMAT = "1"  # of the files in the cache; a change makes all of them stale
_CHUNK = 10_000  # texts that are tokenised together: the tokenizer's own objects are many times larger than ours


@dataclass(frozen=True)
class Tokens:
    """The tokens of n samples, one after the other.

    ``input_ids``: int32 (total,); ``token_type_ids``: uint8 (total,) where the tokenizer makes them; sample i is
    ``offsets[i]:offsets[i + 1]``, int64 (n + 1,). ``truncated``: how many samples were too long.
    """

    input_ids: Tensor
    offsets: Tensor
    token_type_ids: Tensor | None
    truncated: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sample, int64 (n,)."""
        return self.offsets.diff()

    def padded(self, rows: Tensor, length: int, pad: int, left: bool) -> dict[str, Tensor]:
        """Samples ``rows``, int64 (b,), as ``input_ids``, ``attention_mask`` (and ``token_type_ids``), int64
        (b, length), padded with ``pad`` on the right, or on the ``left``."""
        own = self.lengths[rows, None]
        place = torch.arange(length) - (length - own if left else 0)
        mask = (place >= 0) & (place < own)
        place = (self.offsets[rows, None] + place).clamp(0, len(self.input_ids) - 1)
        batch = {"input_ids": torch.where(mask, self.input_ids[place].long(), pad), "attention_mask": mask.long()}
        if self.token_type_ids is not None:
            batch["token_type_ids"] = torch.where(mask, self.token_type_ids[place].long(), 0)
        return batch


def load_tokenizer(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """The fast tokenizer of a hub name or a local folder; the hub is asked for missing files.

    ``options``: of transformers, such as ``revision``.

    Raises:
        UserError: there is no tokenizer, only a slow one, or one without a vocabulary.
    """
    from transformers import AutoTokenizer  # takes seconds, and images need none

    try:
        options = {**(options or {}), "trust_remote_code": False}
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **{**options, "local_files_only": True})
        except OSError:
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # of any type, from transformers, the hub client or the network
        raise UserError(
            f"The tokenizer of model.backbone {name!r} could not be loaded ({one_line(error)}); without a network, "
            f"put the model's files, tokenizer.json among them, into a folder and set model.backbone to it."
        ) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"model.backbone {name!r} has no fast tokenizer (only {type(tokenizer).__name__}); add a tokenizer.json, "
            f"or choose another backbone."
        )
    # Without the vocabulary's files transformers makes a tokenizer that knows no words.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        files = " or ".join(sorted(set(tokenizer.vocab_files_names.values())))
        raise UserError(f"model.backbone {name!r} has a tokenizer without words; put its {files} there.")
    return tokenizer


def tokenize(
    tokenizer: Any, first: Sequence[str], second: Sequence[str] | None, max_length: int, cache: Path
) -> Tokens:
    """Tokens of n texts, or of n pairs of texts; of a pair the longer text is cut to fit ``max_length``.

    Cached in the folder ``cache`` under a name that depends on all of the texts, the tokenizer and ``max_length``.

    Raises:
        UserError: ``max_length`` is more than the tokenizer's model takes, or leaves no room for text.
    """
    special = tokenizer.num_special_tokens_to_add(pair=second is not None)
    least = special + (1 if second is None else 2)
    if not least <= max_length <= tokenizer.model_max_length:
        raise UserError(
            f"data.max_length is {max_length}, but this model's tokenizer needs at least {least} and takes at most "
            f"{tokenizer.model_max_length} tokens."
        )
    file = cache / f"{_key(tokenizer, first, second, max_length)}.safetensors"
    tokens = _load(file, len(first))
    if tokens is None:
        tokens = _tokenize(tokenizer, first, second, max_length)
        _save(tokens, file)
    return tokens


def _tokenize(tokenizer: Any, first: Sequence[str], second: Sequence[str] | None, max_length: int) -> Tokens:
    # Set explicitly, because under its default the library warns in every worker that is forked later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    ids: list[Tensor] = []
    types: list[Tensor] = []
    lengths: list[int] = []
    truncated = 0
    for start in range(0, len(first), _CHUNK):
        part = slice(start, start + _CHUNK)
        encoded = tokenizer(
            list(first[part]),
            None if second is None else list(second[part]),
            truncation="longest_first",
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
        )
        ids.append(_flat(encoded["input_ids"], torch.int32))
        if "token_type_ids" in encoded:
            types.append(_flat(encoded["token_type_ids"], torch.uint8))
        lengths += map(len, encoded["input_ids"])
        truncated += sum(bool(encoding.overflowing) for encoding in encoded.encodings)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return Tokens(torch.cat(ids), offsets, torch.cat(types) if types else None, truncated)


def _flat(lists: Iterable[list[int]], dtype: torch.dtype) -> Tensor:
    return torch.tensor([number for numbers in lists for number in numbers], dtype=dtype)


def _key(tokenizer: Any, first: Sequence[str], second: Sequence[str] | None, max_length: int) -> str:
    """A digest of everything that the tokens depend on."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # settings of the last call, which the next call replaces
    backend.no_padding()
    digest = hashlib.sha256(f"{_FORMAT} {max_length} {tokenizer.truncation_side}".encode())
    digest.update(f" {tokenizer.model_input_names} {len(first)} {second is not None}\n".encode())
    digest.update(backend.to_str().encode())
    for texts in (first, second or ()):
        for text in texts:
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return digest.hexdigest()[:40]


def _load(file: Path, samples: int) -> Tokens | None:
    """The tokens in ``file``; None if it is missing, cut short or holds something else."""
    try:
        parts = load_file(file)
        tokens = Tokens(parts["input_ids"], parts["offsets"], parts.get("token_type_ids"), int(parts["truncated"]))
    except Exception:  # safetensors and the file system share no base class; in any case the texts are tokenised again
        return None
    types = tokens.token_type_ids
    total = len(tokens.input_ids)
    sound = len(tokens) == samples and int(tokens.offsets[-1]) == total and (types is None or len(types) == total)
    return tokens if sound else None


def _save(tokens: Tokens, file: Path) -> None:
    parts = {"input_ids": tokens.input_ids, "offsets": tokens.offsets, "truncated": torch.tensor(tokens.truncated)}
    if tokens.token_type_ids is not None:
        parts["token_type_ids"] = tokens.token_type_ids
    try:
        keep(parts, file)
    except OSError as error:
        rank_zero_warn(f"The tokens could not be kept in '{file.parent}' ({error.strerror}); set data.cache_dir.")
