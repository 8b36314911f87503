"""A stopped and resumed run equals the uninterrupted one, bit for bit; and every run ends with a validation.

One number decides everything: the count of micro-batches that were processed. The data module starts its order there,
and every training micro-batch is seeded from it, so nothing depends on how often a global random stream was drawn from.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from srlora_pl.lowrank.shards import is_split, placed
from srlora_pl.training import lightning_internals as internals
from srlora_pl.util.errors import UserError
from srlora_pl.util.randomness import reseed, run_seed

if TYPE_CHECKING:
    _Module = L.LightningModule
else:
    _Module = object
_KEY = "exact_resume"


class ExactResume(_Module):
    """Seeds every training micro-batch by its position, and corrects Lightning's counters when it resumes.

    The last step is followed by a validation, whatever ends the run and wherever the next one would fall.

    Checkpoints are written inside a step, at its end, and before or in the validation that follows it. Lightning takes
    such a validation, and the end of an epoch, for done. Here the file says what is due, and the resumed run begins
    with it.
    """

    _half_done: dict[str, Tensor] | None = None  # gradients of an accumulation that the checkpoint fell into
    _to_take_up: dict[str, Any] | None = None  # the arguments of `_take_up`
    _has_scores = False  # of the validation at this position
    _max_steps: int | None = None  # the run's own, while the loop is set to another number
    _not_asked: Sequence[EarlyStopping] = ()  # callbacks that the current validation does not count for

    def on_fit_start(self) -> None:
        super().on_fit_start()
        trainer: Any = self.trainer
        internals.decide_validation(trainer, _should_validate)
        if self._to_take_up and trainer.max_steps != -1:
            # Lightning does not start a run that has no step left, only a validation or the end of an epoch.
            self._max_steps = trainer.max_steps
            internals.set_max_steps(trainer, trainer.max_steps + 1)

    def on_train_start(self) -> None:
        if self._max_steps is not None:
            internals.set_max_steps(self.trainer, self._max_steps)
            self._max_steps = None
        super().on_train_start()
        if self._half_done is not None:
            for name, parameter in self.named_parameters():
                if name in self._half_done:
                    parameter.grad = placed(self._own(self._half_done[name], parameter), like=parameter)
            self._half_done = None
        if self._to_take_up:
            self._take_up(**self._to_take_up)
            self._to_take_up = None

    def _own(self, gradient: Tensor, parameter: Tensor) -> Tensor:
        """What this process goes on with of a saved ``gradient``, (...) or (processes, ...)."""
        if gradient.dim() == parameter.dim():
            return gradient
        same = len(gradient) == self.trainer.world_size and not is_split(parameter)
        return gradient[self.global_rank] if same else gradient.mean(0)

    def _take_up(self, owes_validation: bool, scores: dict[str, Tensor], should_stop: bool) -> None:
        """Do what is left of the step and the epoch that the checkpoint was written in, besides training."""
        trainer: Any = self.trainer
        step_is_over = not internals.accumulates(trainer)
        trainer.should_stop = should_stop
        internals.callback_metrics(trainer).update(scores)  # by which callbacks choose when the epoch ends
        if owes_validation:
            internals.validate(trainer, trainer.global_step - step_is_over)
        internals.set_logged_step(trainer, trainer.global_step)
        internals.end_epoch_if_over(trainer)
        if internals.restarts_past_validation(trainer):  # and counts a step for it
            internals.set_logged_step(trainer, trainer.global_step - step_is_over)

    def on_train_end(self) -> None:
        trainer: Any = self.trainer
        if _has_validation(trainer) and not self._has_scores:  # a callback has stopped the run after its last epoch
            epochs = internals.epochs(trainer)
            epochs.completed -= 1
            internals.validate(trainer, trainer.global_step - 1)
            epochs.completed += 1
        super().on_train_end()

    def on_fit_end(self) -> None:
        super().on_fit_end()
        internals.decide_validation(self.trainer, None)  # the next fit may be another module's

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        reseed(run_seed(), internals.batches_in_run(self.trainer).processed, self.global_rank)
        self._has_scores = False
        return super().on_train_batch_start(batch, batch_idx)

    def on_validation_start(self) -> None:
        super().on_validation_start()
        trainer: Any = self.trainer
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not internals.lightning_validates(trainer):
            # A longer run has no validation here, and its early stopping must not depend on where this one ended.
            self._not_asked = [c for c in trainer.early_stopping_callbacks if internals.stops_at_validation(c)]
            for callback in self._not_asked:
                internals.set_stops_at_validation(callback, False)

    def on_validation_end(self) -> None:
        super().on_validation_end()
        for callback in self._not_asked:
            internals.set_stops_at_validation(callback, True)
        self._not_asked = []

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._averages_are_in = True

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self._averages_are_in = False
        self._has_scores = not self.trainer.sanity_checking

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        trainer: Any = self.trainer
        gradients: Any = {}
        if trainer.state.fn == "fit" and internals.accumulates(trainer):
            gradients = {n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None}
        if trainer.world_size > 1:  # until the accumulation is over each process has gradients of its own
            gradients = {n: g if is_split(g) else self.all_gather(g) for n, g in gradients.items()}  # (processes, ...)
        checkpoint[_KEY] = {
            "processed": internals.batches_in_run(trainer).processed,
            "processes": trainer.world_size,
            "samples_per_batch": self._samples_per_batch,
            "batches_per_epoch": trainer.num_training_batches,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "seed": run_seed(),
            "gradients": gradients,
            "has_scores": self._has_scores,
            "owes_validation": trainer.state.fn == "fit" and self._owes_validation(),
            "should_stop": trainer.should_stop,
            "scores": dict(internals.callback_metrics(trainer)),
        }

    def _owes_validation(self) -> bool:
        """Whether the validation at this very position has not been done, or not to its end."""
        trainer: Any = self.trainer
        if trainer.validating:
            return not self._has_scores
        return internals.in_train_batch_end(trainer) and internals.validation_is_due(trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trainer: Any = internals.trainer_of(self)
        resumes = trainer is not None and trainer.state.fn == "fit"
        state = checkpoint.get(_KEY) if resumes else None
        if state is not None:
            self._require_same(state)  # before weights are compared that another seed may have made
        super().on_load_checkpoint(checkpoint)
        if state is None:
            return
        self._half_done, self._has_scores = state["gradients"] or None, state.get("has_scores", False)
        # Without the callback, or with more patience, a run that it has stopped goes on.
        counted = checkpoint.get("callbacks", {})
        stopping = [each for each in trainer.callbacks if isinstance(each, EarlyStopping) and each.state_key in counted]
        stops = state["should_stop"] and any(
            _still_stops(each, counted[each.state_key], state["scores"].get(each.monitor)) for each in stopping
        )
        self._to_take_up = {**{k: state[k] for k in ("owes_validation", "scores")}, "should_stop": stops}
        if state["batches_per_epoch"] == float("inf"):
            return
        per_epoch = int(state["batches_per_epoch"])
        epoch, batch = divmod(state["processed"], per_epoch)
        ended = internals.epochs_in(checkpoint)
        epoch_is_over = ended * per_epoch >= state["processed"]
        if epoch_is_over and (stops or checkpoint["global_step"] >= trainer.max_steps != -1):  # nothing is left
            self._to_take_up, trainer.should_stop = None, stops
            epoch, batch = ended, 0
        elif batch == 0 and not epoch_is_over:
            epoch, batch = epoch - 1, per_epoch
        internals.set_position(checkpoint, state["processed"], epoch, batch, per_epoch)

    @property
    def _samples_per_batch(self) -> int | None:
        """Of all processes together; None where the data do not say."""
        batch_size = getattr(self.trainer.datamodule, "batch_size", None)  # type: ignore[attr-defined]
        return None if batch_size is None else batch_size * self.trainer.world_size

    def _require_same(self, state: dict[str, Any]) -> None:
        here, there = self.trainer.world_size, state["processes"]
        if here != there and self._samples_per_batch == state.get("samples_per_batch", 0):
            rank_zero_info(
                f"The checkpoint was written by {there} processes, and this run has {here}: it sees the same samples "
                "in each step, and is equal to rounding but for dropout and all else that a process draws for itself."
            )
            there = here
        for value, saved, place in (
            (run_seed(), state["seed"], "seed_everything"),
            (self.trainer.accumulate_grad_batches, state["accumulate_grad_batches"], "trainer.accumulate_grad_batches"),
            (here, there, "the number of processes (trainer.devices x num_nodes)"),
        ):
            if value != saved:
                raise UserError(f"{place} is {value} and the checkpoint was made with {saved}, resume with {saved}")


def _should_validate(trainer: Any) -> bool:
    """Whether a validation follows the last micro-batch."""
    return internals.lightning_validates(trainer) or (_has_validation(trainer) and _is_over(trainer))


def _has_validation(trainer: Any) -> bool:
    """Whether the run validates at all; the trials of Lightning's tuners, whose logger is a dummy, do not."""
    return trainer.enable_validation and not isinstance(trainer.logger, DummyLogger)


def _is_over(trainer: Any) -> bool:
    """Whether the last micro-batch is the run's last; Lightning's loops say so only once the epoch is closed."""
    step, epochs = trainer.global_step, internals.epochs(trainer).processed + internals.epoch_is_over(trainer)
    return (
        step >= trainer.max_steps != -1
        or epochs >= trainer.max_epochs != -1
        or (trainer.should_stop and epochs >= (trainer.min_epochs or 0) and step >= (trainer.min_steps or 0))
    )


def _still_stops(callback: EarlyStopping, counted: dict[str, Any], score: Tensor | None) -> bool:
    """Whether ``callback``, as it is set in this run, stops one that has ``counted`` so far and has this last score."""
    if counted["wait_count"] >= callback.patience or score is None:
        return counted["wait_count"] >= callback.patience
    good, bad = callback.stopping_threshold, callback.divergence_threshold
    reached = good is not None and bool(callback.monitor_op(score, good))
    diverged = bad is not None and bool(callback.monitor_op(-score, -bad))
    return reached or diverged or (callback.check_finite and not bool(torch.isfinite(score)))
