"""Greedy generation from left-padded prompts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from srlora_pl.data.graders import cut


@dataclass(frozen=True)
class Completion:
    """A generated text.

    Attributes:
        text: up to the first stop word or the end that the model gave it.
        finished: whether either came before the tokens ran out.
    """

    text: str
    finished: bool


@torch.no_grad()
def generate(
    net: Any, tokenizer: Any, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, stop: Sequence[str]
) -> list[Completion]:
    """The most probable continuations, token by token, of prompts (B, L), padded on the left.

    A text is cut before the first of ``stop``; a row that has one generates no further.
    """
    ends = _ends(net, tokenizer)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=ends[0],
        bos_token_id=tokenizer.bos_token_id,
    )
    words = StoppingCriteriaList([_StopWords(tokenizer, stop, input_ids.shape[1])] if stop else [])
    with _without_own_settings(net):
        tokens = net.generate(
            input_ids, attention_mask=attention_mask, generation_config=settings, stopping_criteria=words
        )
    return [_completion(tokenizer, row, ends, max_new_tokens, stop) for row in tokens[:, input_ids.shape[1] :].tolist()]


def _ends(net: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: what training puts behind an answer, and what the model was pretrained with."""
    own = getattr(net.generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [] if own is None else [own]
    return list(dict.fromkeys([tokenizer.eos_token_id, *own]))


@contextmanager
def _without_own_settings(net: Any) -> Iterator[None]:
    """Inside, the network's own generation settings, such as a temperature, have no say."""
    kept, net.generation_config = net.generation_config, GenerationConfig()
    try:
        yield
    finally:
        net.generation_config = kept


def _completion(
    tokenizer: Any, new: list[int], ends: Sequence[int], max_new_tokens: int, stop: Sequence[str]
) -> Completion:
    length = next((place for place, token in enumerate(new) if token in ends), len(new))
    whole = tokenizer.decode(new[:length], skip_special_tokens=True)
    text = cut(whole, stop)
    return Completion(text, length < len(new) or len(text) < len(whole) or len(new) < max_new_tokens)


class _StopWords(StoppingCriteria):
    """Ends the rows whose new text holds one of the words."""

    def __init__(self, tokenizer: Any, words: Sequence[str], prompt: int) -> None:
        self.tokenizer, self.words, self.prompt = tokenizer, words, prompt
        # A word of n characters lies in the last n tokens, of at least a character each, and perhaps one cut in two.
        self.reach = max(map(len, words)) + 4

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        new = input_ids[:, max(self.prompt, input_ids.shape[1] - self.reach) :].tolist()
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return torch.tensor([any(word in text for word in self.words) for text in texts], device=input_ids.device)
