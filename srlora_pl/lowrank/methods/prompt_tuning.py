"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691), with PEFT's own prompts."""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from srlora_pl.lowrank.linear import Adapter
from srlora_pl.lowrank.method import Method, generator_for
from srlora_pl.lowrank.methods.peft_tuner import library
from srlora_pl.lowrank.methods.virtual_tokens import arguments, decoder, make_room, without_first
from srlora_pl.util.errors import UserError, require_one_of
from srlora_pl.util.precision import trained_dtype

_NAME = "prompt_encoder"


class Prompt(Adapter):
    """Vectors (tokens, hidden) that stand before every text, in place of embeddings of words.

    Args:
        embedding: PEFT's ``PromptEmbedding``.
    """

    adapter_names = ("default.embedding.weight",)
    in_this_call = False  # of a decoder

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.default = embedding

    def adapter_parameters(self) -> list[nn.Parameter]:
        return [self.get_parameter(name) for name in self.adapter_names]

    @property
    def count(self) -> int:
        """Of the vectors."""
        return self.adapter_parameters()[0].shape[0]

    def before(self, embedded: Tensor) -> Tensor:
        """(B, L, hidden) -> (B, tokens + L, hidden)."""
        indices = torch.arange(self.count, device=embedded.device)
        vectors = self.default(indices).to(embedded.dtype)
        return torch.cat([vectors.expand(len(embedded), -1, -1), embedded], 1)


def _with_prompt(net: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook before the network's forward: embeddings of prompt and words in place of the words, longer masks.

    A function with a name, which finds the prompt in the network, so that copies of the network have their own.
    """
    prompt: Prompt = getattr(net, _NAME)
    if prompt.disabled:
        return args, kwargs
    given = arguments(net, args, kwargs)
    embedded = _embed(net, given)
    given["inputs_embeds"] = prompt.before(embedded)
    longer = prompt.count
    mask, kinds = given.get("attention_mask"), given.get("token_type_ids")
    mask = embedded.new_ones(embedded.shape[:2], dtype=torch.long) if mask is None else mask
    given["attention_mask"] = torch.cat([mask.new_ones(len(mask), longer), mask], 1)
    if kinds is not None:
        given["token_type_ids"] = torch.cat([kinds.new_zeros(len(kinds), longer), kinds], 1)
    return (), given


def _embed(net: Any, given: dict[str, Any]) -> Tensor:
    """The embeddings (B, L, hidden) of a call's input, whose tokens are taken out of ``given``."""
    tokens, embedded = given.pop("input_ids", None), given.get("inputs_embeds")
    return net.get_input_embeddings()(tokens) if embedded is None else embedded


def _before_text(net: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`_with_prompt` of a decoder, whose cache holds the prompt from the first call of a generation on."""
    prompt: Prompt = getattr(net, _NAME)
    prompt.in_this_call = False
    if prompt.disabled:
        return args, kwargs
    given = arguments(net, args, kwargs)
    prompt.in_this_call = make_room("PromptTuning", net, given, prompt.count, places=True)
    if prompt.in_this_call:
        given["inputs_embeds"] = prompt.before(_embed(net, given))
    return (), given


def _only_text(net: Any, args: Any, output: Any) -> Any:
    """A hook after it: the hidden states of the text alone, one for each of its tokens."""
    prompt: Prompt = getattr(net, _NAME)
    return without_first(output, prompt.count) if prompt.in_this_call else output


class PromptTuning(Method):
    """Trained vectors before every text of an encoder or of a causal language model; its own weights stay.

    As in PEFT they stand before the first token, so that a head which reads the first position reads theirs. They take
    up positions: texts may be shorter by as many tokens where the network has learned its positions. A causal language
    model's hidden states and logits are those of the text alone.

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
        base = decoder(net)
        words = _word_embeddings(net, base)
        if any(isinstance(module, Prompt) for module in net.modules()):
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
        if base is None:
            net.add_module(_NAME, prompt)
            net.register_forward_pre_hook(_with_prompt, with_kwargs=True)
        else:
            base.add_module(_NAME, prompt)
            base.register_forward_pre_hook(_before_text, with_kwargs=True)
            base.register_forward_hook(_only_text)
        return {next(name for name, module in net.named_modules() if module is prompt): prompt}


def _word_embeddings(net: Any, base: nn.Module | None) -> nn.Embedding:
    """Those of an encoder, or of a causal language model, whose decoder is ``base``.

    Raises:
        UserError: there are none, or the network is another kind of decoder, or cannot be given embeddings.
    """
    find = getattr(net, "get_input_embeddings", None)
    try:
        words = find() if find else None
    except NotImplementedError:
        words = None
    name, called = type(net).__name__, net if base is None else base
    if not isinstance(words, nn.Embedding) or "inputs_embeds" not in inspect.signature(called.forward).parameters:
        raise UserError(
            f"PromptTuning puts vectors before the embeddings of words, and {name} takes none: use a text encoder or a "
            "causal language model of transformers, or another method"
        )
    if base is not None:
        return words
    # The older decoders say so only by looking for the last token of a text.
    finds_end = "pad_token_id" in inspect.unwrap(type(net).forward).__code__.co_names
    both = getattr(getattr(net, "config", None), "is_encoder_decoder", False)
    if finds_end or both or any(getattr(module, "is_causal", False) for module in net.modules()):
        raise UserError(
            f"PromptTuning serves encoders and causal language models, and {name} is another kind of decoder: use one "
            "of those, or another method"
        )
    return words
