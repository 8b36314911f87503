"""One clock that both trainers tell of their steps; a module of its own, so that a config can name its callback."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback
from transformers import TrainerCallback


class Clock:
    """Seconds from the end of the first step to the end of the last."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def tick(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    @property
    def seconds_per_step(self) -> float:
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


CLOCK = Clock()


class LightningClock(Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        CLOCK.tick()


class TheirClock(TrainerCallback):
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        CLOCK.tick()
