"""Faults at a chosen step of a run."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from srlora_pl import ImageClassifier


def in_step(monkeypatch: pytest.MonkeyPatch, step: int, fault: Callable[[ImageClassifier], None]) -> None:
    """Let ``fault`` happen once, before the forward pass of a ``step`` counted from 1."""
    done: list[int] = []

    def training_loss(
        self: ImageClassifier, batch: dict[str, Tensor], original: Any = ImageClassifier.training_loss
    ) -> Any:
        if self.global_step == step - 1 and not done:
            done.append(step)
            fault(self)
        return original(self, batch)

    monkeypatch.setattr(ImageClassifier, "training_loss", training_loss)
