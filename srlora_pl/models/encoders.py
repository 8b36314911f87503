"""Text encoders: from a name, a folder or a weights file to a transformers network with a new head."""

import inspect
from typing import Any

from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from srlora_pl.models.heads import FoundHead, output_layers
from srlora_pl.models.pretrained import embedding, load

# Here padding has an effect in spite of the mask: on the tokens beside it, on sums in the attention, or on the output.
_SEE_PADDING = ("convbert", "mobilebert", "nystromformer", "t5gemma", "t5gemma2", "yoso")


def find_head(
    name: str, num_classes: int, kwargs: dict[str, Any] | None = None, checkpoint: str | None = None
) -> tuple[PreTrainedModel, FoundHead | None]:
    """An encoder in float32, in training mode, with a head of ``num_classes`` outputs; and that head if it is not new.

    Args:
        name: a hub repository, a local folder in transformers' layout, or a packaged encoder (``minilm``).
        num_classes: outputs. A head of as many that comes with the weights is taken.
        kwargs: override the configuration, or say where the hub's files are found (`HUB_OPTIONS`);
            ``pretrained: false`` gives random weights.
        checkpoint: a weights file, instead of the name's own weights, which are downloaded where needed.
    """
    net, new = load(AutoModelForSequenceClassification, name, kwargs, checkpoint, head_names, num_labels=num_classes)
    layers = _output_layer(net)
    if not layers or any(key.startswith(tuple(f"{layer}." for layer in layers)) for key in new):
        return net, None
    if checkpoint is not None:
        return net, FoundHead(f"the file {checkpoint}", layers)
    names: dict[Any, str] = dict(net.config.id2label or {})
    return net, FoundHead(f"model.backbone {name!r}", layers, tuple(names[number] for number in sorted(names)))


def head_names(net: PreTrainedModel, train_pooler: bool = True) -> tuple[str, ...]:
    """Dotted names of the modules behind the encoder; the pooler, wherever it stands, only if it trains."""
    after = [name for name, child in net.named_children() if child is not net.base_model]
    modules = dict(net.named_modules())
    poolers = [name for name in ("pooler", f"{net.base_model_prefix}.pooler") if name in modules]
    names = [name for name in after if name not in poolers] + (poolers if train_pooler else [])
    return tuple(name for name in names if list(net.get_submodule(name).parameters()))


def _output_layer(net: PreTrainedModel) -> tuple[str, ...]:
    return output_layers(net, head_names(net, train_pooler=False), net.config.num_labels or 0)[-1:]


def max_tokens(net: nn.Module, added: int = 0) -> int | None:
    """The number of learned absolute positions of ``net``; None where it has none, as DeBERTa-v3.

    Args:
        added: tokens beside those of a text, which take positions too.
    """
    positions = embedding(net, "position_embeddings")
    if positions is None:
        return None
    # RoBERTa's positions begin behind that of padding.
    return positions.num_embeddings - (0 if positions.padding_idx is None else positions.padding_idx + 1) - added


def finds_end_by_padding(net: nn.Module) -> bool:
    """Whether ``net`` looks for the padding token in its input, as decoders do to find the last token.

    RoBERTa's family does not: it has learned its positions behind a padding token of its own.
    """
    positions = embedding(net, "position_embeddings")
    if positions is not None and positions.padding_idx is not None:
        return False
    kinds = [vars(kind) for each in (net, getattr(net, "base_model", net)) for kind in type(each).__mro__]
    forwards = (inspect.unwrap(kind["forward"]) for kind in kinds if "forward" in kind)
    return any("pad_token_id" in forward.__code__.co_names for forward in forwards)


def pads_left(net: Any) -> bool:
    """Whether ``net`` reads the last position, as XLNet, so that texts are padded on the left."""
    return getattr(net.config, "summary_type", None) == "last"


def sees_padding(net: Any) -> bool:
    """Whether an output of ``net`` depends on how far the text is padded."""
    masked = "attention_mask" in inspect.signature(net.forward).parameters
    return not masked or net.config.model_type in _SEE_PADDING


def token_types(net: nn.Module) -> int | None:
    """The number of token types of ``net``, as first and second text; None where it has none."""
    kinds = embedding(net, "token_type_embeddings")
    return None if kinds is None else kinds.num_embeddings
