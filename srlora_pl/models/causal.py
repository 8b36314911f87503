"""Causal language models of transformers: hidden states, the head behind them, and what they can read."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from srlora_pl.models.pretrained import load
from srlora_pl.models.token_loss import Head
from srlora_pl.models.weights import DTYPES
from srlora_pl.util.errors import UserError


def build(
    name: str, kwargs: dict[str, Any] | None = None, checkpoint: str | None = None, weights: str = "float32"
) -> PreTrainedModel:
    """A causal language model in training mode, see `srlora_pl.models.pretrained.load`; all its weights are there.

    Args:
        name: a hub repository, a local folder in transformers' layout, or ``smollm2``.
        kwargs: override the configuration, such as ``attn_implementation``, or say where the hub's files are found.
        checkpoint: a weights file, instead of the name's own weights.
        weights: one of `srlora_pl.models.weights.DTYPES`, of all weights.
    """
    net, _ = load(AutoModelForCausalLM, name, kwargs, checkpoint, lambda net: (), DTYPES[weights])
    if net.get_output_embeddings() is None:
        raise UserError(f"model.backbone {name!r} has no head that predicts tokens: choose a causal language model.")
    return cast(net, weights)


def cast(net: Any, weights: str) -> Any:
    """``net`` with its parameters, in place, in that dtype; buffers, such as frequencies of positions, stay exact."""
    for parameter in net.parameters():
        parameter.data = parameter.data.to(DTYPES[weights])
    net.config.dtype = DTYPES[weights]
    return net


def hidden_states(
    net: Any, input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
) -> Tensor:
    """The last hidden states (B, L, hidden) of tokens (B, L), right-padded or packed.

    An attention mask is not needed: causal attention never looks at the padding behind a token, and without one PyTorch
    takes its fast kernels. Positions that begin anew at each sample keep packed samples apart, as transformers makes
    the mask block-diagonal for them where neither a mask nor a cache is given.

    Args:
        position_ids: (B, L), of packed samples.
        attention_mask: (B, L), for texts padded on the left.
    """
    given: dict[str, Tensor] = {}
    if attention_mask is not None:
        given = {"attention_mask": attention_mask, "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0)}
    elif position_ids is not None:
        given = {"position_ids": position_ids}
    return net.base_model(input_ids=input_ids, use_cache=False, **given).last_hidden_state


def head(net: Any) -> Head:
    """What makes logits of the hidden states of ``net``."""
    layer, config = net.get_output_embeddings(), net.config.get_text_config()
    # Granite divides by logits_scaling, Cohere multiplies by logit_scale.
    scale = float(getattr(config, "logit_scale", None) or 1) / float(getattr(config, "logits_scaling", None) or 1)
    return Head(layer.weight, getattr(layer, "bias", None), scale, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def require_known_head(net: Any, name: str, input_ids: Tensor) -> None:
    """Refuse a network whose logits of tokens (1, L) are not those of `hidden_states` and `head`."""
    expected = net(input_ids=input_ids, use_cache=False).logits
    hidden = hidden_states(net, input_ids)
    found = head(net).cast(hidden.dtype).logits(hidden[0])[None].to(expected.dtype)
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise UserError(
            f"model.backbone {name!r} ({type(net).__name__}) computes its logits in a way that is not known here: "
            "choose another one."
        )


def max_tokens(net: Any, added: int = 0) -> int | None:
    """The longest text that ``net`` has positions for; None where it names none.

    Args:
        added: tokens beside those of a text, which take positions too.
    """
    config = net.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return None if most is None else most - added
