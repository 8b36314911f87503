"""The layers of PEFT's tuners, as this package keeps account of them."""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from srlora_pl.lowrank.linear import Adapter
from srlora_pl.util.errors import UserError, one_line
from srlora_pl.util.precision import trained_dtype


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
            before = [(parameter, parameter.detach().clone()) for parameter in base.parameters()]
            try:
                _merge(self.module)
                self._unmerged = before
            finally:
                for parameter, value in before:
                    parameter.data = parameter.data.to(value.dtype)

    def unmerge(self) -> None:
        if self.merged:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is inexact, which is mended below
                self.module.unmerge()
            for parameter, value in self._unmerged:
                parameter.data = value.to(parameter.device)
            self._unmerged = []

    def merged_module(self) -> nn.Module:
        copied = copy.deepcopy(self.module)
        if not self.merged:
            _merge(copied)
        return copied.get_base_layer()


@torch.no_grad()
def _merge(module: Any) -> None:
    """Merge ``module``; the sum, and the weight with it, is in the precision of what trained."""
    base = module.get_base_layer()
    base.to(trained_dtype(base.weight.dtype))
    try:
        module.merge(safe_merge=True)
    except (NotImplementedError, ValueError, TypeError, AttributeError) as error:
        kind = type(module).__module__.rpartition(".tuners.")[2].partition(".")[0]
        why = f" ({one_line(error)})" if str(error) else ""
        raise UserError(f"PEFT's {kind} cannot be merged into a weight{why}, so there are no merged ones") from error
