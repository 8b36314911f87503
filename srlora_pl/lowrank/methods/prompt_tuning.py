"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691) of encoders, with PEFT's own prompts."""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from srlora_pl.lowrank.linear import Adapter
from srlora_pl.lowrank.method import Method, generator_for
from srlora_pl.lowrank.methods.peft_tuner import library
from srlora_pl.util.errors import UserError, require_one_of
from srlora_pl.util.precision import trained_dtype

_NAME = "prompt_encoder"


class Prompt(Adapter):
    """Vectors (tokens, hidden) that stand before every text, in place of embeddings of words.

    Args:
        embedding: PEFT's ``PromptEmbedding``.
    """

    adapter_names = ("default.embedding.weight",)

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.default = embedding

    def adapter_parameters(self) -> list[nn.Parameter]:
        return [self.get_parameter(name) for name in self.adapter_names]

    def before(self, embedded: Tensor) -> Tensor:
        """(B, L, hidden) -> (B, tokens + L, hidden)."""
        indices = torch.arange(self.adapter_parameters()[0].shape[0], device=embedded.device)
        vectors = self.default(indices).to(embedded.dtype)
        return torch.cat([vectors.expand(len(embedded), -1, -1), embedded], 1)


def _with_prompt(net: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook before the network's forward: embeddings of prompt and words in place of the words, longer masks.

    A function with a name, which finds the prompt in the network, so that copies of the network have their own.
    """
    prompt: Prompt = getattr(net, _NAME)
    if prompt.disabled:
        return args, kwargs
    given = inspect.signature(net.forward).bind(*args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    tokens = given.pop("input_ids", None)
    embedded = given.get("inputs_embeds")
    if embedded is None:
        embedded = net.get_input_embeddings()(tokens)
    given["inputs_embeds"] = prompt.before(embedded)
    longer = given["inputs_embeds"].shape[1] - embedded.shape[1]
    mask, kinds = given.get("attention_mask"), given.get("token_type_ids")
    mask = embedded.new_ones(embedded.shape[:2], dtype=torch.long) if mask is None else mask
    given["attention_mask"] = torch.cat([mask.new_ones(len(mask), longer), mask], 1)
    if kinds is not None:
        given["token_type_ids"] = torch.cat([kinds.new_zeros(len(kinds), longer), kinds], 1)
    return (), given


class PromptTuning(Method):
    """Trained vectors before every text of an encoder; its own weights stay.

    As in PEFT they stand before the first token, so that a head which reads the first position reads theirs. They take
    up positions: texts may be shorter by as many tokens where the network has learned its positions.

    Args:
        tokens: how many vectors.
        init: ``vocabulary``, embeddings of words drawn at random; or ``random``, normally distributed.

    Raises:
        UserError: PEFT is not installed; or a value is out of range.
    """

    additive = False

    def __init__(self, tokens: int = 20, *, init: Literal["vocabulary", "random"] = "vocabulary") -> None:
        super().__init__(1)
        self.tokens, self.init = tokens, init
        if not isinstance(tokens, int) or tokens < 1:
            raise UserError(f"method.tokens is {tokens}, it must be a whole number of at least 1")
        require_one_of("method.init", init, ("vocabulary", "random"))
        library(type(self).__name__)
        self.added_tokens = tokens

    def inject(self, net: nn.Module, taken: Sequence[str]) -> dict[str, Adapter]:
        words = _word_embeddings(net)
        if hasattr(net, _NAME):
            raise UserError("the network has a prompt already, adapt a new one")
        peft = library(type(self).__name__)
        config = peft.PromptTuningConfig(
            num_virtual_tokens=self.tokens,
            token_dim=words.embedding_dim,
            num_transformer_submodules=1,
            prompt_tuning_init="SAMPLE_VOCAB" if self.init == "vocabulary" else "RANDOM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_for("prompt").initial_seed())
            prompt = Prompt(
                peft.PromptEmbedding(config, words).to(words.weight.device, trained_dtype(words.weight.dtype))
            )
        net.add_module(_NAME, prompt)
        net.register_forward_pre_hook(_with_prompt, with_kwargs=True)
        return {_NAME: prompt}


def _word_embeddings(net: Any) -> nn.Embedding:
    """Those of an encoder.

    Raises:
        UserError: there are none, or they are a decoder's, or the network cannot be given embeddings of its input.
    """
    find = getattr(net, "get_input_embeddings", None)
    try:
        words = find() if find else None
    except NotImplementedError:
        words = None
    name = type(net).__name__
    if not isinstance(words, nn.Embedding) or "inputs_embeds" not in inspect.signature(net.forward).parameters:
        raise UserError(
            f"PromptTuning puts vectors before the embeddings of words, and {name} takes none: use a text encoder of "
            "transformers, or another method"
        )
    # The older decoders say so only by looking for the last token of a text.
    finds_end = "pad_token_id" in inspect.unwrap(type(net).forward).__code__.co_names
    both = getattr(getattr(net, "config", None), "is_encoder_decoder", False)
    if finds_end or both or any(getattr(module, "is_causal", False) for module in net.modules()):
        raise UserError(f"PromptTuning serves encoders, and {name} is a decoder: use an encoder, or another method")
    return words
