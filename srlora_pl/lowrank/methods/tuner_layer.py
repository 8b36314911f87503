"""The layers of PEFT's tuners, as this package keeps account of them."""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from srlora_pl.lowrank.linear import Adapter
from srlora_pl.lowrank.nf4 import plain
from srlora_pl.util.errors import UserError, one_line
from srlora_pl.util.precision import trained_dtype


class TunerLayer(Adapter):
    """The book-keeping of one layer of PEFT's, which stands in the network itself and is no part of this module."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self._held = [module]
        self._unmerged: dict[str, nn.Parameter] = {}

    @property
    def module(self) -> Any:
        return self._held[0]

    @property
    def adapter_names(self) -> tuple[str, ...]:  # type: ignore[override]
        kinds = (*self.module.adapter_layer_names, *self.module.other_param_names)
        return tuple(name for name, _ in self.module.named_parameters() if name.partition(".")[0] in kinds)

    def adapter_parameters(self) -> list[nn.Parameter]:
        return [self.module.get_parameter(name) for name in self.adapter_names]

    @torch.no_grad()
    def match_precision(self) -> None:
        """Turn the parameters into doubles where the weight beside them is one."""
        if self.module.get_base_layer().weight.dtype == torch.float64:
            for parameter in self.adapter_parameters():
                parameter.data = parameter.data.double()

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
            before = dict(base.named_parameters())
            try:
                _merge(self.module)
                for name, parameter in before.items():
                    base.register_parameter(name, _frozen(getattr(base, name), parameter.dtype))
                self._unmerged = before
            except UserError:
                self._put_back(before)
                raise

    def unmerge(self) -> None:
        if self.merged:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is inexact, which is mended below
                self.module.unmerge()
            self._put_back(self._unmerged)
            self._unmerged = {}

    def _put_back(self, parameters: dict[str, nn.Parameter]) -> None:
        base = self.module.get_base_layer()
        for name, parameter in parameters.items():
            device = getattr(base, name).device
            base.register_parameter(name, parameter if parameter.device == device else _frozen(parameter.to(device)))

    def merged_module(self) -> nn.Module:
        copied = copy.deepcopy(self.module)
        if not self.merged:
            _merge(copied)
        return copied.get_base_layer()


def _frozen(tensor: Tensor, dtype: torch.dtype | None = None) -> nn.Parameter:
    return nn.Parameter(plain(tensor.detach(), dtype), requires_grad=False)


@torch.no_grad()
def _merge(module: Any) -> None:
    """Merge ``module`` into new parameters of its base, in the precision of what trained."""
    base = module.get_base_layer()
    for name, parameter in list(base.named_parameters()):
        base.register_parameter(name, _frozen(parameter.clone(), trained_dtype(base.weight.dtype)))
    try:
        module.merge(safe_merge=True)
    except (NotImplementedError, ValueError, TypeError, AttributeError) as error:
        kind = type(module).__module__.rpartition(".tuners.")[2].partition(".")[0]
        why = f" ({one_line(error)})" if str(error) else ""
        raise UserError(f"PEFT's {kind} cannot be merged into a weight{why}, so there are no merged ones") from error
