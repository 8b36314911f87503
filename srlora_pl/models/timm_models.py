"""Image backbones: from a name, a folder or a weights file to a timm network with a new head."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
from timm.data import resolve_model_data_config
from timm.layers import to_2tuple
from timm.models import load_state_dict
from torch import Tensor, nn

from srlora_pl.models.heads import FoundHead, output_layers
from srlora_pl.util.errors import UserError, did_you_mean, listed, one_line

ASSETS = Path(__file__).parents[1] / "assets"
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
SECRET = "log in with `hf auth login` or set HF_TOKEN, it would stand in config.yaml and in every checkpoint"
# Arguments of timm.create_model that have no place in model.backbone_kwargs, and what to do instead.
_NOT_OURS = {
    "num_classes": "leave it out, the data decide the classes",
    "revision": "write it into the name, model.backbone owner/name@revision",
    "checkpoint_path": "set model.backbone_checkpoint to the file",
    "features_only": "leave it out, a network without a head cannot classify",
    "out_indices": "leave it out, a network without a head cannot classify",
    "token": SECRET,
}


def build_backbone(
    name: str, num_classes: int, kwargs: dict[str, Any] | None = None, checkpoint: str | None = None
) -> nn.Module:
    """An image network in float32, in training mode, with a head of ``num_classes`` outputs.

    Args:
        name: a shipped backbone (``vit_tiny_in64``), a timm name, a hub repository (``owner/name``), or a local folder
            in timm's layout (``config.json`` and ``model.safetensors``).
        num_classes: outputs. A head of as many that comes with the weights is taken.
        kwargs: for the network's constructor; ``pretrained: false`` gives random weights.
        checkpoint: a weights file, instead of the name's own weights, which are downloaded where needed.
    """
    return find_head(name, num_classes, kwargs, checkpoint)[0]


def find_head(
    name: str, num_classes: int, kwargs: dict[str, Any] | None = None, checkpoint: str | None = None
) -> tuple[nn.Module, FoundHead | None]:
    """`build_backbone`'s network, and its head if that is not new."""
    options = dict(kwargs or {})
    refuse_options(options, _NOT_OURS)
    pretrained = options.pop("pretrained", True)
    folder = _local_folder(name)
    file = str(weights_file(folder, WEIGHTS_FILES)) if folder and pretrained and checkpoint is None else checkpoint
    download = pretrained and file is None
    net: Any = _create(name, timm_name(name), download, num_classes, options)
    if not head_names(net):
        raise UserError(f"model.backbone {name!r} has no classification head: choose another one.")
    channels = getattr(net, "in_chans", net.pretrained_cfg["input_size"][0])
    if channels != 3:
        raise UserError(
            f"model.backbone {name!r} takes pictures of {channels} channel(s), but they come in 3 channels, grey "
            "ones too: leave model.backbone_kwargs.in_chans out, or choose a backbone of 3 channels."
        )
    if file is None:
        found = download and net.pretrained_cfg["num_classes"] == num_classes
    else:
        found = load_weights(net, file, name)
    net.float().train()
    layers = output_layers(net, head_names(net), num_classes)
    if not (found and layers):
        return net, None
    if checkpoint is not None:
        return net, FoundHead(f"the file {checkpoint}", layers)
    names = net.pretrained_cfg.get("label_names") or ()
    names = [names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else names
    return net, FoundHead(f"model.backbone {name!r}", layers, tuple(names))


def refuse_options(options: Mapping[str, Any], mends: Mapping[str, str]) -> None:
    """Refuse keys of ``model.backbone_kwargs`` that are in ``mends``, which says what to do instead."""
    for key in options:
        if key in mends:
            raise UserError(f"model.backbone_kwargs has {key!r}, which is not taken there: {mends[key]}.")


def head_names(net: nn.Module) -> tuple[str, ...]:
    """Dotted names of the classification head's modules (some models have two)."""
    classifier = net.get_classifier()  # type: ignore[operator]
    heads = classifier if isinstance(classifier, tuple) else (classifier,)
    return tuple(n for n, m in net.named_modules() if any(m is h for h in heads) and list(m.parameters()))


def data_config(net: nn.Module, kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
    """How images are prepared for ``net``: ``mean``, ``std``, ``input_size`` (C, H, W), ``interpolation``.

    From timm's own record, except for ``img_size`` in ``kwargs``.
    """
    size = (kwargs or {}).get("img_size")
    return resolve_model_data_config(net, {} if size is None else {"input_size": (3, *to_2tuple(size))})


def load_weights(net: nn.Module, file: str, name: str) -> bool:
    """Load a safetensors or torch file, of which no code is ever run, into ``net``; returns whether it held the head.

    All but the head must fit. Without a head of the same size in the file the new one stays.
    """
    state = read_weights(file)
    heads = tuple(f"{head}." for head in head_names(net))
    own = net.state_dict()
    misfit = _misfit(state, own, heads)
    if misfit:  # perhaps only in a form that timm converts: other key names, positions of another image size
        convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
        try:
            state = convert(state, net) if convert else state
        except Exception:
            convert = None
        if convert is None or _misfit(state, own, heads):
            raise UserError(
                f"The weights file {file} does not fit model.backbone {name!r}: {misfit}; give the file of this "
                "model, or change model.backbone and model.backbone_kwargs to what the file holds."
            )
    fitting = {k: v for k, v in state.items() if not k.startswith(heads) or _same_shape(k, v, own)}
    return not any(key.startswith(heads) for key in net.load_state_dict(fitting, strict=False).missing_keys)


def _local_folder(name: str) -> Path | None:
    """The folder that ``name`` stands for: a shipped backbone's, or the user's own."""
    shipped = ASSETS / name
    return shipped if (shipped / "config.json").is_file() else own_folder(name)


def own_folder(name: str) -> Path | None:
    """The user's folder with a ``config.json`` that ``name`` stands for; None for the name of a model."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.is_dir():
        raise UserError(f"model.backbone is the folder {name!r}, which holds no config.json: put the model's there.")
    if name.startswith(("/", ".", "~")):
        raise UserError(f"model.backbone is the folder {name!r}, which does not exist: correct the path.")
    return None


def weights_file(folder: Path, names: Sequence[str]) -> Path:
    """The first of ``names`` that ``folder`` holds."""
    for file in names:
        if (folder / file).is_file():
            return folder / file
    raise UserError(
        f"model.backbone is the folder {folder}, which holds no {' or '.join(names)}: put one there, or set "
        "model.backbone_checkpoint."
    )


def timm_name(name: str) -> str:
    """``name`` as ``timm.create_model`` takes it; an unknown one is refused with the nearest known one."""
    if folder := _local_folder(name):
        return f"local-dir:{folder.resolve()}"
    if ":" in name:
        return name
    if "/" in name:
        return f"hf-hub:{name}"
    tagged = "." in name
    if timm.is_model(name.partition(".")[0]) and (not tagged or name in timm.list_models(pretrained=True)):
        return name
    shipped = [card.parent.name for card in ASSETS.glob("*/card.json")]
    known = [*shipped, *timm.list_models(pretrained=tagged)]
    raise UserError(
        f"model.backbone {name!r} is no timm model, local folder or shipped backbone"
        f"{did_you_mean(name, known)}: timm.list_models() names all."
    )


def _create(name: str, source: str, download: bool, num_classes: int, options: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(source, pretrained=download, num_classes=num_classes, **options)
    except Exception as error:  # timm, the hub client and the network raise what they like
        reason = one_line(error)
        if download and not isinstance(error, TypeError):
            raise UserError(
                f"The pretrained weights of model.backbone {name!r} could not be loaded ({reason}): without a "
                "network, put the model's weights file on this machine and set model.backbone_checkpoint to its "
                "path, or set model.backbone_kwargs.pretrained to false for random weights."
            ) from error
        raise UserError(
            f"model.backbone {name!r} cannot be built with model.backbone_kwargs {options} ({reason}): correct them."
        ) from error


def read_weights(file: str) -> dict[str, Tensor]:
    """The tensors by name of a local safetensors or torch file; no code in it is ever run."""
    if not Path(file).is_file():
        raise UserError(f"The weights file {file!r} does not exist: correct model.backbone_checkpoint.")
    try:
        state = load_state_dict(file, weights_only=True)
        readable = bool(state) and all(isinstance(value, Tensor) for value in state.values())
        reason = "it holds no tensors by name"
    except Exception as error:  # safetensors, zip and pickle errors share no base class
        readable, reason = False, one_line(error)
        if isinstance(error.__cause__, UnpicklingError):  # its message advises to let the file run code
            reason = "it holds something else than tensors"
    if not readable:
        raise UserError(
            f"The weights file {file} cannot be read ({reason}): it must be a whole safetensors file, or a torch "
            "file that holds nothing but weights."
        )
    return state


def _same_shape(key: str, value: Tensor, own: dict[str, Tensor]) -> bool:
    return key in own and own[key].shape == value.shape


def _misfit(state: dict[str, Tensor], own: dict[str, Tensor], heads: tuple[str, ...]) -> str:
    """The differences of ``state`` and the network's ``own`` state outside the head, in words; empty if none."""
    body, target = ({k: v for k, v in s.items() if not k.startswith(heads)} for s in (state, own))
    shapes = [
        f"{k!r} is {tuple(v.shape)} instead of {tuple(target[k].shape)}"
        for k, v in body.items()
        if k in target and not _same_shape(k, v, target)
    ]
    parts = {
        "it lacks": [repr(k) for k in target if k not in body],
        "it also holds": [repr(k) for k in body if k not in target],
        "there": shapes,
    }
    return " and ".join(f"{label} {listed(items, most=2)}" for label, items in parts.items() if items)
