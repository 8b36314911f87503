"""Any tuner of the PEFT library that can be placed into a network, as a method beside the others."""

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from srlora_pl.lowrank.linear import Adapter
from srlora_pl.lowrank.method import Method, generator_for
from srlora_pl.lowrank.target_settings import ALL_LINEAR
from srlora_pl.lowrank.targets import select
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


class TunerLayer(Adapter):
    """The book-keeping of one layer of PEFT's, which stands in the network itself and is no part of this module."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self._held = [module]
        self._unmerged: list[tuple[nn.Parameter, Tensor]] = []

    @property
    def module(self) -> Any:
        return self._held[0]

    @property
    def adapter_names(self) -> tuple[str, ...]:  # type: ignore[override]
        kinds = (*self.module.adapter_layer_names, *self.module.other_param_names)
        return tuple(name for name, _ in self.module.named_parameters() if name.partition(".")[0] in kinds)

    def adapter_parameters(self) -> list[nn.Parameter]:
        return [self.module.get_parameter(name) for name in self.adapter_names]

    @property
    def disabled(self) -> bool:  # type: ignore[override]
        return self.module.disable_adapters

    @disabled.setter
    def disabled(self, value: bool) -> None:
        trained = [(parameter, parameter.requires_grad) for parameter in self.module.parameters()]
        self.module.enable_adapters(not value)  # which freezes or frees them too
        for parameter, trains in trained:
            parameter.requires_grad_(trains)

    @property
    def merged(self) -> bool:  # type: ignore[override]
        return bool(self._unmerged)

    def merge(self) -> None:
        if not self.merged:
            base = self.module.get_base_layer()
            before = [(parameter, parameter.detach().clone()) for parameter in base.parameters()]
            _merge(self.module)
            self._unmerged = before

    def unmerge(self) -> None:
        if self.merged:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is inexact, which is mended below
                self.module.unmerge()
            for parameter, value in self._unmerged:
                parameter.data = value
            self._unmerged = []

    def merged_module(self) -> nn.Module:
        copied = copy.deepcopy(self.module)
        if not self.merged:
            _merge(copied)
        return copied.get_base_layer()


@torch.no_grad()
def _merge(module: Any) -> None:
    try:
        module.merge(safe_merge=True)
    except (NotImplementedError, ValueError, TypeError, AttributeError) as error:
        kind = type(module).__module__.rpartition(".tuners.")[2].partition(".")[0]
        why = f" ({one_line(error)})" if str(error) else ""
        raise UserError(f"PEFT's {kind} cannot be merged into a weight{why}, so there are no merged ones") from error


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
            why = "is a prompt and no part of a layer: take srlora_pl.PromptTuning"
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
        if any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in net.modules()):
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
        return self._found(net, peft.tuners.tuners_utils.BaseTunerLayer, before)

    def _names(self, net: nn.Module, taken: Sequence[str]) -> list[str]:
        targets = select(net, self, taken)
        for target in targets:
            if target.fused and len(target.parts) < 3:
                raise UserError(
                    f"target_modules names a part of {target.name}, which PEFT can only adapt as a whole: name "
                    f"{target.name.rpartition('.')[2]!r}"
                )
        return [target.name for target in targets]

    @staticmethod
    def _found(net: nn.Module, kind: type, before: list[tuple[nn.Parameter, int, int]]) -> dict[str, Adapter]:
        """The layers that are in ``net`` now, in the precision of the weights beside them."""
        layers = {name: TunerLayer(module) for name, module in net.named_modules() if isinstance(module, kind)}
        for layer in layers.values():
            dtype = layer.module.get_base_layer().weight.dtype
            for parameter in layer.adapter_parameters():
                if parameter.is_floating_point() and dtype == torch.float64:
                    parameter.data = parameter.data.to(dtype)
        ours = {id(parameter) for layer in layers.values() for parameter in layer.adapter_parameters()}
        for name, parameter in net.named_parameters():
            if id(parameter) not in ours and (parameter.requires_grad or all(parameter is not p for p, *_ in before)):
                raise UserError(f"method.config trains {name}, which is beside PEFT's layers: leave that setting out")
        return dict(layers)


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
