"""Any tuner of the PEFT library that can be placed into a network, as a method beside the others."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from enum import Enum
from typing import Any

import torch
from torch import nn

from srlora_pl.lowrank.linear import Adapter
from srlora_pl.lowrank.method import Method, generator_for
from srlora_pl.lowrank.methods.tuner_layer import TunerLayer
from srlora_pl.lowrank.target_settings import ALL_LINEAR, is_below
from srlora_pl.lowrank.targets import select_whole
from srlora_pl.util.errors import UserError, one_line, require_one_of

# Tuners that a layer in a network is not enough for, beside those that the library itself refuses.
_REFUSED = {
    "ADALORA": "needs a call of its own in every step: take srlora_pl.AdaLoRA",
    "ADAPTION_PROMPT": "puts prompts into decoders: take another one",
    "OSF": "changes the pretrained weights: take another one",
    "POLY": "needs the number of a task with every input: take another one",
    "SHADOW": "runs a network of its own beside this one: take another one",
    "TRAINABLE_TOKENS": "trains rows of an embedding: name the embedding in trainable instead",
    "XLORA": "routes whole adapters that were trained before: take another one",
}
_NO_SETTINGS = ("inference_mode", "peft_version")


class Peft(Method):
    """A tuner of the PEFT library, such as IA3, OFT, HRA, LoHa, LoKr or its own LoRA, on the layers chosen here.

    Its random start depends on torch's seed, whose own stream stays where it is. An exported network is merged; the
    tuner's parameters have PEFT's names in a checkpoint.

    Args:
        config: a ``peft`` configuration, or a mapping with its ``peft_type`` and what differs from its defaults. Where
            it names ``target_modules``, these are PEFT's to find; otherwise the arguments below choose.
        target_modules: see `Method`.
        exclude_modules: see `Method`.
        layers: see `Method`.

    Raises:
        UserError: PEFT is not installed; or the configuration is wrong, or of a tuner that needs more than layers of
            its own in a network.
    """

    additive = False

    def __init__(
        self,
        config: dict[str, Any] | Any,
        *,
        target_modules: str | list[str] = ALL_LINEAR,
        exclude_modules: str | list[str] | None = None,
        layers: str | int | list[int] | None = None,
    ) -> None:
        super().__init__(1, target_modules=target_modules, exclude_modules=exclude_modules, layers=layers)
        self.config = _plain(config)
        self._configuration()

    def _configuration(self) -> Any:
        """PEFT's own object, anew."""
        peft = library(type(self).__name__)
        settings = copy.deepcopy(self.config)
        name = str(settings.pop("peft_type")).upper()
        known = {kind.value: config for kind, config in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        require_one_of("method.config.peft_type", name, sorted(known))
        tuner = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING.get(name)
        why = _REFUSED.get(name, "")
        if issubclass(known[name], peft.config.PromptLearningConfig):
            why = "is a prompt and no part of a layer: take srlora_pl.PromptTuning or PrefixTuning"
        elif getattr(tuner, "uses_shared_state", False):
            why = "keeps a state that its layers share: take another one"
        if why:
            raise UserError(f"method.config.peft_type is {name}, which {why}")
        if settings.get("modules_to_save"):
            raise UserError("method.config.modules_to_save is not for you to set, heads train anyway: leave it out")
        try:
            return known[name](**settings)
        except (TypeError, ValueError) as error:
            raise UserError(f"method.config is no {known[name].__name__} ({one_line(error)}): correct it") from error

    def inject(self, net: nn.Module, taken: Sequence[str]) -> dict[str, Adapter]:
        peft, config = library(type(self).__name__), self._configuration()
        kind = peft.tuners.tuners_utils.BaseTunerLayer
        if any(isinstance(module, kind) for module in net.modules()):
            raise UserError("the network has adapters already, adapt a new one")
        if getattr(config, "target_modules", "") is None:
            config.target_modules = "|".join(map(re.escape, self._names(net, taken)))
        before = [(parameter, parameter.data_ptr(), parameter._version) for parameter in net.parameters()]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_for("peft").initial_seed())
            try:
                peft.inject_adapter_in_model(config, net)
            except (TypeError, ValueError, NotImplementedError, RuntimeError, AttributeError, KeyError) as error:
                name = type(config).__name__
                raise UserError(f"PEFT cannot place {name} in this network ({one_line(error)}): see to it") from error
        if any((p.data_ptr(), p._version) != (place, version) for p, place, version in before):
            raise UserError(
                f"method.config starts {type(config).__name__} with other pretrained weights, which nothing could tell "
                "later: take another start"
            )
        layers = {n: TunerLayer(m) for n, m in net.named_modules() if isinstance(m, kind)}
        _require_only(layers, net, taken, {id(parameter) for parameter, *_ in before})
        for layer in layers.values():
            layer.match_precision()
        return dict(layers)

    def _names(self, net: nn.Module, taken: Sequence[str]) -> list[str]:
        return [each.name for each in select_whole(net, self, taken, "PEFT can only adapt it as a whole")]


def _require_only(layers: Mapping[str, Adapter], net: nn.Module, taken: Sequence[str], before: set[int]) -> None:
    """Refuse a tuner in a part that trains whole, and one that trains or made anything beside ``layers``."""
    for name in layers:
        if is_below(name, taken):
            raise UserError(f"method.config.target_modules takes {name}, which trains whole: leave it out")
    ours = {id(parameter) for layer in layers.values() for parameter in layer.adapter_parameters()}
    for name, parameter in net.named_parameters():
        if id(parameter) not in ours and (parameter.requires_grad or id(parameter) not in before):
            raise UserError(f"method.config trains {name}, which is beside PEFT's layers: leave that setting out")


def library(method: str) -> Any:
    """The ``peft`` package, which is imported by the methods that need it alone."""
    try:
        import peft
    except ImportError as error:
        raise UserError(f"{method} needs the PEFT library: pip install peft") from error
    return peft


def _plain(config: Any) -> dict[str, Any]:
    """``peft_type`` and what differs from its defaults, in plain containers."""
    if isinstance(config, Mapping):
        if "peft_type" not in config:
            raise UserError("method.config names no peft_type: give one, such as IA3")
        return {str(key): _simple(key, value) for key, value in config.items() if key not in _NO_SETTINGS}
    if not hasattr(config, "peft_type"):
        raise UserError(f"method.config is {config!r}: give a mapping with peft_type, or a configuration of PEFT")
    given: dict[str, Any] = {"peft_type": _simple("peft_type", config.peft_type)}
    for each in fields(config):
        default = each.default if each.default_factory is MISSING else each.default_factory()
        value = getattr(config, each.name)
        if each.init and each.name not in (*given, *_NO_SETTINGS) and value != default:
            given[each.name] = _simple(each.name, value)
    return given


def _simple(key: Any, value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(name): _simple(key, each) for name, each in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_simple(key, each) for each in value]
    if isinstance(value, str):
        return str(value)  # a config's may be of a class of its own
    if value is None or isinstance(value, int | float):
        return value
    raise UserError(f"method.config.{key} is a {type(value).__name__}, which no checkpoint could keep: leave it out")
