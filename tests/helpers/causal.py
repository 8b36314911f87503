"""A causal language model small enough for a unit test."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.helpers.instructions import save_tokenizer


def tiny_llama(seed: int = 0, **kwargs) -> LlamaForCausalLM:
    """A random Llama of two blocks in float32, in training mode; `kwargs` go to its `LlamaConfig`."""
    settings = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**settings | kwargs)).train()


def save_llama(folder: Path) -> str:
    """That network and a tokenizer of its size, in a folder."""
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(folder))
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tiny_llama(vocab_size=len(tokenizer), **ends).save_pretrained(folder)
    return str(folder)


class Largest(TorchDispatchMode):
    """Records the most numbers that an operation has put out."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor):
                self.numel = max(self.numel, each.numel())
        return out
