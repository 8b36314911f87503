"""What prompts and prefixes share: places that no text has, before the texts of a network of transformers."""

import inspect
from typing import Any

import torch
from torch import nn

from srlora_pl.util.errors import UserError


def arguments(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of a call of the forward pass of ``net``, by name."""
    given = inspect.signature(net.forward).bind(*args, **kwargs).arguments
    return {**given, **given.pop("kwargs", {})}


def decoder(net: Any) -> nn.Module | None:
    """The part of a causal language model that makes its hidden states; None: ``net`` is no such model."""
    generates = getattr(net, "can_generate", None)
    if generates is None or not generates() or net.config.is_encoder_decoder:
        return None
    return net.base_model


def cache_name(net: nn.Module) -> str:
    """What the forward pass of ``net`` calls the keys and values of earlier tokens: transformers has renamed them."""
    return "cache" if "cache" in inspect.signature(net.forward).parameters else "past_key_values"


def make_room(method: str, net: nn.Module, given: dict[str, Any], count: int, places: bool) -> bool:
    """Change the arguments ``given`` to a decoder so that ``count`` tokens stand before each text, in the cache or not.

    The mask becomes longer, and the positions of the text begin at ``count``, also behind padding on the left.

    Args:
        method: its name, for errors.
        places: whether this call computes them, unless it did before, so that they need positions too.

    Returns:
        Whether they are still to come: the cache holds nothing.

    Raises:
        UserError: samples are packed.
    """
    mask, positions, cache = (given.get(name) for name in ("attention_mask", "position_ids", cache_name(net)))
    if positions is not None and mask is None and cache is None:
        raise UserError(
            f"{method} puts its vectors before the first sample of a row, so packed samples would go without: set "
            "data.padding to buckets"
        )
    to_come = cache is None or not cache.get_seq_length()
    if mask is not None:
        given["attention_mask"] = torch.cat([mask.new_ones(len(mask), count), mask], 1)
    if positions is not None:
        ours = torch.arange(count if places and to_come else 0, device=positions.device).expand(len(positions), -1)
        given["position_ids"] = torch.cat([ours, positions + count], 1)
    given.pop("cache_position", None)  # which the network finds by itself
    return to_come


def without_first(output: Any, count: int) -> Any:
    """The output of a decoder without the first ``count`` places of its hidden states."""
    if isinstance(output, tuple):
        return output[0][:, count:], *output[1:]
    output.last_hidden_state = output.last_hidden_state[:, count:]
    if output.get("hidden_states") is not None:
        output.hidden_states = tuple(each[:, count:] for each in output.hidden_states)
    return output
