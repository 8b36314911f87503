"""A stopped and resumed run equals the uninterrupted one, bit for bit.

One number, how many micro-batches were processed, decides everything: the data module starts its order there, and
every training micro-batch is seeded from it. Nothing depends on how often a global random stream was drawn from.
"""

from typing import TYPE_CHECKING, Any

import lightning as L
from torch import Tensor

from srlora_pl.errors import UserError
from srlora_pl.randomness import reseed, run_seed

if TYPE_CHECKING:
    _Module = L.LightningModule
else:
    _Module = object
_KEY = "exact_resume"


class ExactResume(_Module):
    """Seeds every training micro-batch by its position, and puts Lightning's counters right when it resumes.

    Lightning saves inside a step, before its own counters say that the step is over, and would repeat that batch.
    """

    _half_done: dict[str, Tensor] | None = None  # gradients of an accumulation that the checkpoint fell into

    def on_train_start(self) -> None:
        super().on_train_start()
        if self._half_done is not None:
            for name, parameter in self.named_parameters():
                if name in self._half_done:
                    parameter.grad = self._half_done[name].to(parameter, copy=True)
            self._half_done = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        reseed(run_seed(), _processed(self.trainer), self.global_rank)
        # the step that loggers see; Lightning's own count is off by one after some resumes
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step
        return super().on_train_batch_start(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        trainer = self.trainer
        gradients = {}
        if trainer.state.fn == "fit" and trainer.fit_loop._should_accumulate():
            gradients = {n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None}
        checkpoint[_KEY] = {
            "processed": _processed(trainer),
            "batches_per_epoch": trainer.num_training_batches,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "seed": run_seed(),
            "gradients": gradients,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get(_KEY)
        if state is None or self._trainer is None or self.trainer.state.fn != "fit":
            return
        for value, saved, place in (
            (run_seed(), state["seed"], "seed_everything"),
            (self.trainer.accumulate_grad_batches, state["accumulate_grad_batches"], "trainer.accumulate_grad_batches"),
        ):
            if value != saved:
                raise UserError(f"{place} is {value} and the checkpoint was made with {saved}, resume with {saved}")
        self._half_done = state["gradients"] or None
        if state["processed"] and state["batches_per_epoch"] != float("inf"):
            _set_position(checkpoint["loops"]["fit_loop"], state["processed"], int(state["batches_per_epoch"]))


def _processed(trainer: Any) -> int:
    """Training micro-batches that this run has done."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed


def _set_position(loops: dict[str, Any], processed: int, batches_per_epoch: int) -> None:
    """Make a saved fit loop say that exactly ``processed`` micro-batches, and nothing of the next, are over."""
    epoch, batch = divmod(processed, batches_per_epoch)
    begun = epoch + (batch > 0)
    for counters in (loops["epoch_progress"]["total"], loops["epoch_progress"]["current"]):
        counters |= {"ready": begun, "started": begun, "processed": epoch, "completed": epoch}
    progress = loops["epoch_loop.batch_progress"]
    progress["total"] |= dict.fromkeys(("ready", "started", "processed", "completed"), processed)
    progress["current"] |= dict.fromkeys(("ready", "started", "processed", "completed"), batch)
    progress["is_last_batch"] = False
