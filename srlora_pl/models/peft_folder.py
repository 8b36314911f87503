"""Folders of the PEFT library, written for it and read as a start, without the library itself.

``adapter_model.safetensors`` holds ``base_model.model.<layer>.lora_A.weight`` (r, in), ``.lora_B.weight`` (out, r) and
modules that were trained whole; ``adapter_config.json`` says what they mean.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from srlora_pl.lowrank import Adaptation, Method
from srlora_pl.lowrank.delta import Factors
from srlora_pl.lowrank.target_settings import is_below, name_matches
from srlora_pl.models.heads import FoundHead, output_layers
from srlora_pl.util.errors import UserError, did_you_mean, one_line

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_CLASS_NAMES = "class_names"  # in the header of the weights
# Settings that leave the values of a plain LoRA as they are. Any other one that is on changes their meaning.
_WITHOUT_EFFECT = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}
# The starts that leave the base as it was; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def write(
    folder: Path,
    factors: Mapping[str, Factors],
    modules: Mapping[str, Mapping[str, Tensor]],
    base: tuple[str, str | None],
    task_type: str | None,
    class_names: Sequence[str] = (),
) -> int:
    """Write a PEFT folder whose LoRA is ``factors``, a DoRA where these have magnitudes; return its weights' bytes.

    Every alpha equals its rank, so that the scaling is 1.

    Args:
        folder: exists.
        factors: by dotted name of the layer.
        modules: the states of modules that replace the base's own, by dotted name.
        base: what the base is loaded from, and its revision.
        task_type: ``SEQ_CLS`` or None.
        class_names: of the head's outputs; beside the weights, because PEFT warns of settings that it does not know.

    Raises:
        UserError: there are no ``factors``.
    """
    if not factors:
        raise UserError("no pair acts yet, so there is no LoRA to write: export a later checkpoint, or --format merged")
    tensors = {f"{_PREFIX}{name}.{key}": value for name, state in modules.items() for key, value in state.items()}
    for name, pair in factors.items():
        tensors |= {f"{_PREFIX}{name}.lora_A.weight": pair.A, f"{_PREFIX}{name}.lora_B.weight": pair.B}
        if pair.magnitudes is not None:
            tensors[f"{_PREFIX}{name}.lora_magnitude_vector"] = pair.magnitudes
    rank = Counter(pair.rank for pair in factors.values()).most_common(1)[0][0]
    others = {re.escape(name): pair.rank for name, pair in factors.items() if pair.rank != rank}
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base[0],
        "revision": base[1],
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(factors),
        "modules_to_save": list(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": any(pair.magnitudes is not None for pair in factors.values()),
        "init_lora_weights": True,
    }
    about = {"format": "pt"} | ({_CLASS_NAMES: json.dumps(list(class_names))} if class_names else {})
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS, about)
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return sum(value.nbytes for value in tensors.values())


@dataclass(frozen=True)
class Pairs:
    """One layer's LoRA: ``scaling * B @ A`` with B (out, r) and A (r, in)."""

    B: Tensor
    A: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.B.shape[1]


@dataclass(frozen=True)
class PeftFolder:
    """A plain LoRA that the PEFT library saved.

    Attributes:
        path: the folder.
        config: the content of its ``adapter_config.json``.
        pairs: by dotted name of the layer.
        others: tensors of modules that were trained whole, by dotted name.
        class_names: of the head's outputs; empty if unknown.
    """

    path: Path
    config: dict[str, Any]
    pairs: dict[str, Pairs]
    others: dict[str, Tensor]
    class_names: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: str) -> "PeftFolder":
        """Read a folder, of which nothing can run code; one that is damaged or no plain LoRA is refused."""
        path = Path(folder).expanduser()
        config = _read_config(path)
        tensors, class_names = _read_weights(path)
        pairs = {}
        for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
            name = key.removesuffix(".lora_A.weight")
            A, B = tensors.pop(key), tensors.pop(f"{name}.lora_B.weight", None)
            pairs[name] = _pairs(path, config, name, A, B)
        if strange := [key for key in tensors if "lora_" in key]:
            raise UserError(f"model.adapter {path} holds {strange[0]!r}, which is no plain LoRA: it cannot be used")
        if not pairs:
            raise UserError(f"model.adapter {path} holds no LoRA weights (lora_A.weight and lora_B.weight)")
        return cls(path, config, pairs, tensors, class_names)

    def prepare(self, net: nn.Module, method: Method, heads: Sequence[str]) -> nn.Module:
        """Turn a freshly built ``net`` into the pretrained network of a run that starts from this folder, in place.

        Modules that were trained whole are loaded; one of ``heads`` keeps its new weights if those of the folder have
        another shape. The pairs are merged into the weights, unless ``method`` continues a LoRA, see `load_into`. A
        folder that does not fit the network is refused.
        """
        own = net.state_dict()
        for key, value in self.others.items():
            if key in own and own[key].shape == value.shape:
                own[key].copy_(value)
            elif not is_below(key, heads):
                raise self._misfit(key, own)
        linears = {name: module.weight.data for name, module in net.named_modules() if type(module) is nn.Linear}
        for name, pair in self.pairs.items():
            weight = linears.get(name)
            if weight is None or weight.shape != (len(pair.B), pair.A.shape[1]):
                raise self._misfit(name, linears)
            if not method.continues_lora:
                weight.copy_(weight.double() + pair.scaling * pair.B.double() @ pair.A.double())
        return net

    def head(self, net: nn.Module, heads: Sequence[str], outputs: int) -> FoundHead | None:
        """The head of ``outputs`` outputs that `prepare` loaded into ``net``, if the folder holds one."""
        shapes = {key: value.shape for key, value in self.others.items()}
        found = output_layers(net, heads, outputs)
        layers = tuple(n for n in found if net.get_submodule(n).weight.shape == shapes.get(f"{n}.weight"))
        return FoundHead(f"model.adapter {self.path}", layers, self.class_names) if layers else None

    def _misfit(self, name: str, known: Mapping[str, Tensor]) -> UserError:
        how = f"is no weight or linear there{did_you_mean(name, known)}"
        if name in known:
            how = f"is {tuple(known[name].shape)} there"
        return UserError(
            f"model.adapter {self.path} does not fit model.backbone: it holds {name}, which {how}; give the "
            "backbone that the adapter was trained on"
        )

    def load_into(self, adaptation: Adaptation) -> None:
        """Load the pairs into a method that continues a LoRA with the same layers, ranks and scalings, if it does."""
        if not adaptation.method.continues_lora:
            return
        layers = {matrix.layer_name: matrix.layer for matrix in adaptation.matrices}
        for name in [*self.pairs, *layers]:
            pair, layer = self.pairs.get(name), layers.get(name)
            if (
                not (pair and layer)
                or len(layer.adapted) < layer.parts
                or pair.rank != layer.rank
                or not math.isclose(pair.scaling, layer.scaling)
            ):
                raise self._disagreement(name)
        for matrix in adaptation.matrices:
            pair, layer = self.pairs[matrix.layer_name], matrix.layer
            # A fused linear has one A for all of its matrices in PEFT, and one for each here.
            matrix.A.copy_(pair.A)
            matrix.B.copy_(pair.B.chunk(layer.parts)[layer.adapted[matrix.index]])

    def merged_into(self, adaptation: Adaptation) -> dict[str, tuple[Tensor, Tensor]]:
        """B (out, r), scaled, and A (r, in) of the layers whose pairs `prepare` merged into the weights."""
        if adaptation.method.continues_lora:
            return {}
        return {name: (pair.scaling * pair.B, pair.A) for name, pair in self.pairs.items()}

    def modules_beside(self, heads: Sequence[str]) -> list[str]:
        """Dotted names of the modules that were trained whole, without ``heads``."""
        names = dict.fromkeys(key.rpartition(".")[0] for key in self.others)
        return [name for name in names if not is_below(name, heads)]

    def _disagreement(self, name: str) -> UserError:
        keys = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "use_rslora", "target_modules": "target_modules"}
        keys |= {key: key for key in ("rank_pattern", "alpha_pattern") if self.config.get(key)}
        wanted = ", ".join(f"{ours} {self.config.get(theirs)}" for theirs, ours in keys.items())
        return UserError(
            f"model.adapter {self.path} and model.method differ at {name}: set model.method.{wanted}, or take PiSSA or "
            "SRLoRA, which merge the adapter into the pretrained weights"
        )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / CONFIG).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = f"holds no {CONFIG} that can be read as JSON ({one_line(error)})"
        raise UserError(f"model.adapter {path} {why}: give a folder as the PEFT library saved it") from error
    if not isinstance(config, dict):
        raise UserError(f"{path / CONFIG} holds no settings: give the folder as PEFT saved it")
    if config.get("peft_type") != "LORA":
        raise UserError(f"model.adapter {path} is of type {config.get('peft_type')}, only LORA can be a start")
    if config.get("init_lora_weights") not in _STARTS:
        raise UserError(
            f"model.adapter {path} started with init_lora_weights {config['init_lora_weights']!r}, which changed the "
            "base: convert it to a plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    for key, value in config.items():
        if value and key not in _WITHOUT_EFFECT and (key, value) != ("bias", "none"):
            raise UserError(f"model.adapter {path} has {key} {value!r}, only a plain LoRA can be a start")
    if not (_is_number(config.get("r")) and _is_number(config.get("lora_alpha"))):
        raise UserError(f"{path / CONFIG} gives no r and lora_alpha: give the folder as PEFT saved it")
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _read_weights(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors by name, and the names of the classes."""
    file = path / WEIGHTS
    if not file.is_file():
        why = f"only {PICKLE}, a pickle that could run code" if (path / PICKLE).is_file() else f"no {WEIGHTS}"
        raise UserError(f"model.adapter {path} holds {why}: save it again with safe_serialization=True")
    try:
        tensors = {key: value.float() for key, value in load_file(file).items()}  # often saved in half precision
        with safe_open(file, "pt") as opened:
            class_names = _names((opened.metadata() or {}).get(_CLASS_NAMES))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read, it is damaged or no safetensors file: copy it again") from error
    for key, value in tensors.items():
        if not key.startswith(_PREFIX):
            raise UserError(f"{file} holds {key!r}, which the PEFT library does not write: give the folder as it was")
        if not value.isfinite().all():
            raise UserError(f"{file} holds NaN or infinity in {key!r}: give a sound adapter")
    return {key.removeprefix(_PREFIX): value for key, value in tensors.items()}, class_names


def _names(text: str | None) -> tuple[str, ...]:
    try:
        names = json.loads(text or "[]")
    except (ValueError, RecursionError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _pairs(path: Path, config: dict[str, Any], name: str, A: Tensor, B: Tensor | None) -> Pairs:
    rank = _of_layer(path, config, "r", "rank_pattern", name)
    alpha = _of_layer(path, config, "lora_alpha", "alpha_pattern", name)
    if B is None or A.ndim != 2 or B.ndim != 2 or not len(A) == B.shape[1] == rank:
        shapes = " and ".join("none" if side is None else str(tuple(side.shape)) for side in (A, B))
        raise UserError(
            f"model.adapter {path} holds lora_A and lora_B of shapes {shapes} for {name}, where {CONFIG} says rank "
            f"{rank}: give a LoRA of linear layers as PEFT saved it"
        )
    return Pairs(B, A, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _of_layer(path: Path, config: dict[str, Any], key: str, patterns: str, name: str) -> float:
    """A setting of one layer: that of the first pattern that matches, as in PEFT, or the general one."""
    try:
        found = (value for pattern, value in (config.get(patterns) or {}).items() if name_matches(pattern, name))
        value = next(found, config[key])
    except (re.error, AttributeError) as error:
        raise UserError(f"{path / CONFIG} has a broken {patterns}: give the folder as PEFT saved it") from error
    if not _is_number(value):
        raise UserError(f"{path / CONFIG} has {value!r} in {patterns}, where numbers belong: give it as PEFT saved it")
    return value
