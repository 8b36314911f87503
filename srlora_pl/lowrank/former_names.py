"""Names of version 0.1, which go with the next version."""

import warnings
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer


class FormerNames:
    """The former names of the hooks of `Adaptation`."""

    @property
    def step(self) -> int: ...  # type: ignore[empty-body]

    def before_optimizer(
        self, step: int, gradients: Sequence[Tensor] | None = None, inverse_scale: Tensor | None = None
    ) -> None: ...

    def after_optimizer(self, step: int, optimizer: Optimizer | None = None) -> bool: ...  # type: ignore[empty-body]

    def observe(self, gradients: Sequence[Tensor] | None = None, inverse_scale: Tensor | None = None) -> None:
        """The former name of `before_optimizer`."""
        warnings.warn("observe() is now before_optimizer(step)", DeprecationWarning, stacklevel=2)
        self.before_optimizer(self.step + 1, gradients, inverse_scale)

    def switch_if_due(self, step: int, optimizer: Optimizer | None = None) -> bool:
        """The former name of `after_optimizer`."""
        warnings.warn("switch_if_due() is now after_optimizer()", DeprecationWarning, stacklevel=2)
        return self.after_optimizer(step, optimizer)
