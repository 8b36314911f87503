"""Prefix tuning (Li and Liang 2021, arXiv 2101.00190) of causal language models, with PEFT's own prefixes."""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from srlora_pl.lowrank.linear import Adapter
from srlora_pl.lowrank.method import Method, generator_for
from srlora_pl.lowrank.methods.peft_tuner import library
from srlora_pl.lowrank.methods.virtual_tokens import arguments, cache_name, decoder, make_room
from srlora_pl.util.errors import UserError, require_one_of
from srlora_pl.util.precision import trained_dtype

_NAME = "prefix_encoder"


class Prefix(Adapter):
    """Keys and values of tokens that stand before every text, in every layer's attention.

    Args:
        encoder: PEFT's ``PrefixEncoder``.
        count: of the tokens.
        heads: of keys and values, in a layer.
        size: of a key.
    """

    def __init__(self, encoder: nn.Module, count: int, heads: int, size: int) -> None:
        super().__init__()
        self.default, self.count, self.heads, self.size = encoder, count, heads, size

    @property
    def adapter_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(name for name, _ in self.named_parameters())

    def adapter_parameters(self) -> list[nn.Parameter]:
        return [*self.parameters()]

    def keys_and_values(self, rows: int, dtype: torch.dtype) -> Tensor:
        """(layers, 2, rows, heads, tokens, size)."""
        indices = torch.arange(self.count, device=self.adapter_parameters()[0].device)
        apart = self.default(indices).to(dtype).view(self.count, -1, 2, self.heads, self.size)
        return apart.permute(1, 2, 3, 0, 4).unsqueeze(2).expand(-1, -1, rows, -1, -1, -1)


def _fill_cache(net: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook before a decoder's forward: the prefix in the cache, unless it is there already, and a longer mask.

    A function with a name, which finds the prefix in the network, so that copies of the network have their own.
    """
    prefix: Prefix = getattr(net, _NAME)
    if prefix.disabled:
        return args, kwargs
    if net.training and getattr(net, "is_gradient_checkpointing", False):
        raise UserError(
            "PrefixTuning keeps its vectors in the cache, which activation checkpointing does without: set "
            "model.activation_checkpointing to false, or take PromptTuning"
        )
    given = arguments(net, args, kwargs)
    if make_room("PrefixTuning", net, given, prefix.count, places=False):
        inputs = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        name = cache_name(net)
        if given.get(name) is None:
            given[name] = library("PrefixTuning").peft_model.DynamicCache(config=net.config)
        for layer, (keys, values) in enumerate(prefix.keys_and_values(len(inputs), _computed_in(net))):
            given[name].update(keys, values, layer)
    return (), given


def _computed_in(net: Any) -> torch.dtype:
    """The type of the network's keys and values."""
    weight = net.get_input_embeddings().weight
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class PrefixTuning(Method):
    """Trained keys and values before every text, in all layers of a causal language model; its own weights stay.

    They take up positions: texts must be shorter by as many tokens where the network limits them. Activation
    checkpointing and packed samples do without the cache that holds them, so both are refused.

    Args:
        tokens: how many keys and values for each head.
        init: ``random``, normally distributed; or ``zero``.
        projection: width of a network of two layers that makes them from vectors as wide as all heads together, as in
            the paper; None: they train themselves.

    Raises:
        UserError: PEFT is not installed; or a value is out of range; or, when it is put into one, the network is no
            causal language model.
    """

    additive = False

    def __init__(
        self, tokens: int = 20, *, init: Literal["random", "zero"] = "random", projection: int | None = None
    ) -> None:
        super().__init__(1)
        self.tokens, self.init, self.projection = tokens, init, projection
        for name, value in (("tokens", tokens), ("projection", 1 if projection is None else projection)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"method.{name} is {value}, it must be a whole number of at least 1")
        require_one_of("method.init", init, ("random", "zero"))
        library(type(self).__name__)
        self.added_tokens = tokens

    def inject(self, net: nn.Module, taken: Sequence[str]) -> dict[str, Adapter]:
        base: Any = decoder(net)
        if base is None or cache_name(base) not in inspect.signature(base.forward).parameters:
            raise UserError(
                f"PrefixTuning puts keys and values into the cache of a causal language model of transformers, and "
                f"{type(net).__name__} is none: take another method"
            )
        if any(isinstance(module, Prefix) for module in net.modules()):
            raise UserError("the network has a prefix already, adapt a new one")
        sizes = base.config.get_text_config()
        heads = getattr(sizes, "num_key_value_heads", None) or sizes.num_attention_heads
        size = getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads
        peft = library(type(self).__name__)
        config = peft.PrefixTuningConfig(
            num_virtual_tokens=self.tokens,
            num_layers=sizes.num_hidden_layers,
            token_dim=heads * size,
            init_weights=None if self.init == "random" else self.init,
            prefix_projection=self.projection is not None,
            encoder_hidden_size=self.projection,
        )
        weight = base.get_input_embeddings().weight
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_for("prefix").initial_seed())
            encoder = peft.PrefixEncoder(config).to(weight.device, trained_dtype(weight.dtype))
        base.add_module(_NAME, Prefix(encoder, self.tokens, heads, size))
        base.register_forward_pre_hook(_fill_cache, with_kwargs=True)
        return {name: module for name, module in net.named_modules() if isinstance(module, Prefix)}
