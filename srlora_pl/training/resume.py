"""A stopped and resumed run equals the uninterrupted one, bit for bit; and every run ends with a validation.

One number, how many micro-batches were processed, decides everything: the data module starts its order there, and
every training micro-batch is seeded from it. Nothing depends on how often a global random stream was drawn from.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, distributed

from srlora_pl.util.errors import UserError
from srlora_pl.util.randomness import reseed, run_seed

if TYPE_CHECKING:
    _Module = L.LightningModule
else:
    _Module = object
_KEY = "exact_resume"


class ExactResume(_Module):
    """Seeds every training micro-batch by its position, and puts Lightning's counters right when it resumes.

    The last step is followed by a validation, whatever ends the run and wherever the next one would fall.

    Files are written inside a step, at its end, and before or in the validation that follows it. Lightning would take
    such a validation, and the end of an epoch, for done; here the file says what is due, and the resumed run begins
    with it.
    """

    _half_done: dict[str, Tensor] | None = None  # gradients of an accumulation that the checkpoint fell into
    _to_take_up: dict[str, Any] | None = None  # what the checkpoint says of its position
    _has_scores = False  # of the validation at this position
    _max_steps: int | None = None  # while another number is feigned
    _not_asked: Sequence[Any] = ()  # the EarlyStopping callbacks that a validation does not count for

    def on_fit_start(self) -> None:
        super().on_fit_start()
        loop: Any = self.trainer.fit_loop.epoch_loop
        loop._should_check_val_fx = partial(_should_validate, self.trainer.fit_loop)  # in place of the class's own
        if self._to_take_up and loop.max_steps != -1:
            # Lightning would not start a run that has no step left, only a validation or the end of an epoch.
            self._max_steps, loop.max_steps = loop.max_steps, loop.max_steps + 1

    def on_train_start(self) -> None:
        if self._max_steps is not None:
            self.trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None
        super().on_train_start()
        if self._half_done is not None:
            for name, parameter in self.named_parameters():
                if name in self._half_done:
                    parameter.grad = self._half_done[name].to(parameter, copy=True)
            self._half_done = None
        if self._to_take_up:
            self._take_up(**self._to_take_up)
            self._to_take_up = None

    def _take_up(self, owes_validation: bool, scores: dict[str, Tensor], should_stop: bool) -> None:
        """Do what is left of the step and the epoch that the checkpoint was written in, besides training."""
        trainer: Any = self.trainer
        fit_loop, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        step_is_over = not _accumulating(trainer)
        trainer.should_stop = should_stop
        trainer._logger_connector._callback_metrics.update(scores)  # what callbacks choose by when the epoch ends
        if owes_validation:
            self._validate(trainer.global_step - step_is_over)
        loop._batches_that_stepped = trainer.global_step
        if loop.batch_progress.is_last_batch or fit_loop.done:
            fit_loop.on_advance_end()  # the end of the epoch, which Lightning would leave out
            loop.batch_progress.reset_on_run()
            fit_loop.reset_restart_stage()
        if loop.restarting and loop._should_check_val_fx(fit_loop._data_fetcher) and not fit_loop.done:
            loop._batches_that_stepped -= step_is_over  # Lightning is about to skip this validation, and counts

    def _validate(self, step: int) -> None:
        """Validate outside the place that Lightning has for it; ``step`` is the one that loggers see."""
        trainer: Any = self.trainer
        loop = trainer.fit_loop.epoch_loop
        loop._batches_that_stepped = step
        trainer.validating = True
        loop.val_loop.run()
        trainer.training = True

    def on_train_end(self) -> None:
        trainer: Any = self.trainer
        if _validates(trainer) and not self._has_scores:  # a callback has stopped the run after its last epoch
            epochs = trainer.fit_loop.epoch_progress.current
            epochs.completed -= 1
            self._validate(trainer.global_step - 1)
            epochs.completed += 1
        super().on_train_end()

    def on_fit_end(self) -> None:
        super().on_fit_end()
        vars(self.trainer.fit_loop.epoch_loop).pop("_should_check_val_fx", None)  # the next fit may be another module's

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        reseed(run_seed(), _processed(self.trainer), self.global_rank)
        self._has_scores = False
        return super().on_train_batch_start(batch, batch_idx)

    def on_validation_start(self) -> None:
        super().on_validation_start()
        trainer: Any = self.trainer
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not _has_come(trainer.fit_loop):
            # A longer run has no validation here, and its early stopping must not depend on where this one ended.
            self._not_asked = [c for c in trainer.early_stopping_callbacks if not c._check_on_train_epoch_end]
            for callback in self._not_asked:
                callback._check_on_train_epoch_end = True

    def on_validation_end(self) -> None:
        super().on_validation_end()
        for callback in self._not_asked:
            callback._check_on_train_epoch_end = False
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
        trainer = self.trainer
        gradients = {}
        if trainer.state.fn == "fit" and _accumulating(trainer):
            gradients = {n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None}
        if trainer.world_size > 1:  # until the accumulation is over each process has gradients of its own
            gradients = {name: _of_all_processes(gradient) for name, gradient in gradients.items()}
        checkpoint[_KEY] = {
            "processed": _processed(trainer),
            "processes": trainer.world_size,
            "batches_per_epoch": trainer.num_training_batches,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "seed": run_seed(),
            "gradients": gradients,
            "has_scores": self._has_scores,
            "owes_validation": trainer.state.fn == "fit" and self._validation_is_due(),
            "should_stop": trainer.should_stop,
            "scores": dict(trainer._logger_connector._callback_metrics),
        }

    def _validation_is_due(self) -> bool:
        """Whether a validation of this very position has not been done, or not to its end."""
        trainer: Any = self.trainer
        if trainer.validating:
            return not self._has_scores
        progress = trainer.fit_loop.epoch_loop.batch_progress.total
        in_batch_end = progress.completed < progress.processed
        return in_batch_end and trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        resumes = self._trainer is not None and self.trainer.state.fn == "fit"
        state = checkpoint.get(_KEY) if resumes else None
        if state is not None:
            self._require_same(state)  # before weights are compared that another seed may have made
        super().on_load_checkpoint(checkpoint)
        if state is None:
            return
        self._half_done, self._has_scores = state["gradients"] or None, state.get("has_scores", False)
        if self._half_done and self.trainer.world_size > 1:
            self._half_done = {name: each[self.global_rank] for name, each in self._half_done.items()}
        trainer: Any = self.trainer
        # Without the callback, or with more patience, a run that it has stopped goes on.
        counted = checkpoint.get("callbacks", {})
        stopping = [each for each in trainer.callbacks if isinstance(each, EarlyStopping) and each.state_key in counted]
        stops = state["should_stop"] and any(
            _still_stops(each, counted[each.state_key], state["scores"].get(each.monitor)) for each in stopping
        )
        self._to_take_up = {**{k: state[k] for k in ("owes_validation", "scores")}, "should_stop": stops}
        if state["batches_per_epoch"] == float("inf"):
            return
        loops, per_epoch = checkpoint["loops"]["fit_loop"], int(state["batches_per_epoch"])
        epoch, batch = divmod(state["processed"], per_epoch)
        ended = loops["epoch_progress"]["total"]["processed"]
        epoch_is_over = ended * per_epoch >= state["processed"]
        if epoch_is_over and (stops or checkpoint["global_step"] >= trainer.max_steps != -1):  # nothing is left
            self._to_take_up, trainer.should_stop = None, stops
            epoch, batch = ended, 0
        elif batch == 0 and not epoch_is_over:
            epoch, batch = epoch - 1, per_epoch
        _set_position(loops, state["processed"], epoch, batch, per_epoch)

    def _require_same(self, state: dict[str, Any]) -> None:
        for value, saved, place in (
            (run_seed(), state["seed"], "seed_everything"),
            (self.trainer.accumulate_grad_batches, state["accumulate_grad_batches"], "trainer.accumulate_grad_batches"),
            (self.trainer.world_size, state["processes"], "the number of processes (trainer.devices x num_nodes)"),
        ):
            if value != saved:
                raise UserError(f"{place} is {value} and the checkpoint was made with {saved}, resume with {saved}")


def _should_validate(fit_loop: Any, data_fetcher: Any) -> bool:
    """Whether a validation follows the micro-batch just done."""
    trainer = fit_loop.trainer
    return _has_come(fit_loop) or (_validates(trainer) and _is_over(trainer))


def _has_come(fit_loop: Any) -> bool:
    """Lightning's answer to that, by the interval or because the run was asked to stop."""
    loop = fit_loop.epoch_loop
    return type(loop)._should_check_val_fx(loop, fit_loop._data_fetcher)


def _validates(trainer: Any) -> bool:
    """Whether this is a run with validation; Lightning's tuners and rehearsals have a logger that logs nothing."""
    return trainer.enable_validation and not isinstance(trainer.logger, DummyLogger)


def _is_over(trainer: Any) -> bool:
    """Whether the micro-batch just done is the run's last; Lightning's loops say so only once its epoch is closed."""
    fit_loop, step = trainer.fit_loop, trainer.global_step
    epochs = fit_loop.epoch_progress.current.processed + fit_loop.epoch_loop._num_ready_batches_reached()
    return (
        step >= fit_loop.max_steps != -1
        or epochs >= fit_loop.max_epochs != -1
        or (trainer.should_stop and epochs >= (fit_loop.min_epochs or 0) and step >= (fit_loop.min_steps or 0))
    )


def _still_stops(callback: EarlyStopping, counted: dict[str, Any], score: Tensor | None) -> bool:
    """Whether ``callback``, as it is set in this run, stops one that has ``counted`` so far and has this last score."""
    if counted["wait_count"] >= callback.patience or score is None:
        return counted["wait_count"] >= callback.patience
    good, bad = callback.stopping_threshold, callback.divergence_threshold
    reached = good is not None and bool(callback.monitor_op(score, good))
    diverged = bad is not None and bool(callback.monitor_op(-score, -bad))
    return reached or diverged or (callback.check_finite and not bool(torch.isfinite(score)))


def _processed(trainer: Any) -> int:
    """Training micro-batches that this run has done."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed


def _accumulating(trainer: Any) -> bool:
    """Whether the last micro-batch left its gradients to the next; Lightning's own answer is about the one begun."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.processed
    return batches % trainer.accumulate_grad_batches != 0 and batches != trainer.num_training_batches


def _of_all_processes(tensor: Tensor) -> Tensor:
    """``tensor`` of each process, (processes, ...)."""
    parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, tensor)
    return torch.stack(parts)


def _set_position(loops: dict[str, Any], processed: int, epoch: int, batch: int, batches_per_epoch: int) -> None:
    """Make a saved fit loop say that ``processed`` micro-batches, ``batch`` of them in ``epoch``, and no more are over.

    Lightning saves inside a step, before its own counters say that the step is over, and would repeat that batch; or
    after they began to count the next.
    """
    begun = epoch + (batch > 0)
    for counters in (loops["epoch_progress"]["total"], loops["epoch_progress"]["current"]):
        counters |= {"ready": begun, "started": begun, "processed": epoch, "completed": epoch}
    progress, validation = loops["epoch_loop.batch_progress"], loops["epoch_loop.val_loop.batch_progress"]
    for counters, count in (
        (progress["total"], processed),
        (progress["current"], batch),
        (validation["total"], 0),  # a validation is repeated from its start
        (validation["current"], 0),
    ):
        counters |= dict.fromkeys(("ready", "started", "processed", "completed"), count)
    progress["is_last_batch"] = batch == batches_per_epoch
