"""Signals end a run after the current step, with a checkpoint and the command that resumes it."""

import contextlib
import os
import shlex
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

from srlora_pl.training import lightning_internals as internals
from srlora_pl.training.checkpoints import files_of, newest, resumes
from srlora_pl.util.errors import Interrupted
from srlora_pl.util.files import relative
from srlora_pl.util.program import program

_STOPS = (signal.SIGINT, signal.SIGTERM)


class Interrupts(Callback):
    """Handles SIGINT, SIGTERM and the signal that SLURM sends before a job's time is over.

    During training a handler only records the signal. The run ends where an exact resume can start: before the next
    micro-batch, or before or between the batches of a validation, which the resumed run repeats. At other times there
    is nothing to save, and the run ends at once. A second SIGINT or SIGTERM kills. Several processes compare their
    records every ``trainer.log_every_n_steps`` steps.

    Args:
        folder: the run's; None: nothing is saved.
        checkpoint: the file that the run resumes from.
    """

    def __init__(self, folder: Path | None = None, checkpoint: Path | None = None) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        self.received = 0  # the signal that ends the run
        self.requeue = 0  # SLURM's signal, after which the job is queued again
        self._trains = self._has_trained = False
        self._handled: list[int] = []

    @contextlib.contextmanager
    def watch(self, trainer: Trainer) -> Iterator[None]:
        """Handle signals inside the block."""
        environment = internals.cluster_environment(trainer)
        requeues = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
        self._handled = [*_STOPS, environment.requeue_signal] if requeues else [*_STOPS]
        before = {number: signal.getsignal(number) for number in self._handled}
        self._take_over()
        try:
            yield
        finally:
            self._handled = []
            for number, handler in before.items():
                _set(number, handler)

    def _take_over(self) -> None:
        for number in self._handled:
            _set(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        if number not in _STOPS:
            self.requeue = number
            return
        for each in _STOPS:
            _set(each, signal.SIG_DFL)  # the second one kills, whatever the process is doing
        if self.received:
            os.kill(os.getpid(), number)
        self.received = number
        if not self._trains:
            raise self._interrupted("" if self._has_trained or not self.folder else " before the first step")

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.received:
            self._take_over()  # Lightning has replaced our SIGTERM handler by its own

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_sanity_check_start(trainer, pl_module)
        self._trains = True

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.world_size == 1 or trainer.global_step % max(trainer.log_every_n_steps, 1) == 0:
            self._stop_if_asked(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._trains:
            self._stop_if_asked(trainer)

    def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if self._trains and trainer.world_size == 1:
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_asked(trainer)
        self._trains, self._has_trained = False, True

    def _stop_if_asked(self, trainer: Any) -> None:
        if trainer.world_size > 1:
            notes = torch.tensor([self.received, self.requeue], device=trainer.strategy.root_device)
            self.received, self.requeue = trainer.strategy.reduce(notes, reduce_op="max").tolist()
        if not (self.received or self.requeue):
            return
        if not self.folder or (trainer.global_step == 0 and not self.requeue):
            raise self._interrupted(" before the first step" if self.folder else "")
        if self.requeue:
            # Lightning's own handler saves in the middle of a step, where weights, optimizer and counters may disagree.
            older = [*self.folder.glob("hpc_ckpt_*.ckpt")]
            self.checkpoint = internals.requeue(trainer, self.requeue, self.folder)
            for file in older if trainer.is_global_zero else ():
                file.unlink()
        else:
            self.checkpoint = self.folder / "checkpoints/last.ckpt"
            trainer.save_checkpoint(self.checkpoint, weights_only=False)
        raise self._interrupted(f", step {trainer.global_step} is saved", trainer.global_rank)

    def _interrupted(self, what: str, rank: int = 0) -> Interrupted:
        if rank:
            return Interrupted("", 0)  # a launcher kills the first process when another one fails
        number = self.received or self.requeue
        if self.requeue:
            what += " and SLURM asked to requeue the job"
        if self._has_trained and self.folder and (found := newest(filter(resumes, files_of(self.folder)))):
            self.checkpoint = found[0]
        if self.folder and self.checkpoint:
            config, checkpoint = relative(self.folder / "config.yaml"), relative(self.checkpoint)
            arguments = ["fit", "--config", str(config), "--ckpt_path", str(checkpoint)]
            what += f"; go on with: {program()} {shlex.join(arguments)}"
        return Interrupted(f"interrupted by {signal.Signals(number).name}{what}", 128 + number)


def _set(number: int, handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():  # no other may
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
