"""Names of version 0.1, which go with the next version."""

import warnings
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from srlora_pl.lowrank.loop import Steps


class FormerNames:
    """The former names of the hooks of `Adaptation`."""

    def observe(self: Steps, gradients: Sequence[Tensor] | None = None, inverse_scale: Tensor | None = None) -> None:
        """The former name of `before_optimizer`."""
        warnings.warn("observe() is now before_optimizer(step)", DeprecationWarning, stacklevel=2)
        self.before_optimizer(self.step + 1, gradients, inverse_scale)

    def switch_if_due(self: Steps, step: int, optimizer: Optimizer | None = None) -> bool:
        """The former name of `after_optimizer`."""
        warnings.warn("switch_if_due() is now after_optimizer()", DeprecationWarning, stacklevel=2)
        return self.after_optimizer(step, optimizer)
