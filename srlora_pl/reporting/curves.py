"""Loggers and a callback that continue the curves of a resumed run: no row twice, none missing."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from srlora_pl.reporting.csv_log import ResumableCSVLogger, Row
from srlora_pl.training import lightning_internals as internals

_KEY = "curves"
_NO_BRACKETS = str.maketrans("[", ".", "]")


class ResumableTensorBoardLogger(TensorBoardLogger):
    """Lightning's TensorBoardLogger, with a ``purge_step`` that is known only once the checkpoint is loaded.

    Args:
        save_dir: see Lightning's; without one the command line takes the run's folder.
    """

    def __init__(self, save_dir: str | Path = "", default_hp_metric: bool = False, **kwargs: Any) -> None:
        super().__init__(save_dir, default_hp_metric=default_hp_metric, **kwargs)
        self._arguments = kwargs

    def placed(self, folder: Path) -> "ResumableTensorBoardLogger":
        """The same one in ``folder`` itself."""
        return ResumableTensorBoardLogger(folder.parent, **{**self._arguments, "name": "", "version": folder.name})

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Begins a file in a second of its own: readers order files by name, which starts with the second."""
        if not internals.is_open(self):
            while any(Path(self.log_dir).glob(f"events.out.tfevents.{int(time.time())}.*")):
                time.sleep(0.05)
        return super().experiment

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Lets later metrics, such as a test's, go into a file of `experiment`; a closed writer begins one."""
        super().finalize(status)
        internals.reopen(self)

    @rank_zero_only
    def cut(self, step: int) -> None:
        """Make readers drop ``step`` and all later steps of earlier files."""
        restart = Event(step=step, session_log=SessionLog(status=SessionLog.START))
        self.experiment.file_writer.add_event(restart)


class ResumableMLFlowLogger(MLFlowLogger):
    """Lightning's MLFlowLogger, for a run that may go on with other settings: MLflow takes one value of each only."""

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log those of ``params`` that the run does not have yet."""
        known = self.experiment.get_run(self.run_id).data.params
        settings = internals.flat_settings(params)
        super().log_hyperparams({name: value for name, value in settings.items() if name not in known})

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log ``metrics``, a matrix ``attn.qkv[q]`` as ``attn.qkv.q``: MLflow has no brackets in names."""
        super().log_metrics({name.translate(_NO_BRACKETS): value for name, value in metrics.items()}, step)


class ResumableCurves(Callback):
    """Removes the rows that were logged after the checkpoint was written, in the loggers of this module.

    A step's rows are logged one after another (learning rate, training, validation), and checkpoints are written
    between them. So a checkpoint carries the rows of its step; curves are cut before that step, and these rows are
    logged again.
    """

    _saved: tuple[int, list[Row]] = 0, []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for logger in trainer.loggers:
            logger.save()  # rows must be on the disk before the checkpoint that follows them
        step = internals.logged_step(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, ResumableCSVLogger):
                rows = [row for row in logger.latest if row["step"] == step]
                checkpoint[_KEY] = {"step": step, "rows": rows + self._row_to_come(trainer)}

    @staticmethod
    def _row_to_come(trainer: Any) -> list[Row]:
        """In ``on_train_batch_end``: the training row that Lightning logs once that hook is over."""
        if not (trainer.training and internals.in_train_batch_end(trainer) and internals.logs_this_step(trainer)):
            return []
        row = convert_tensors_to_scalars(internals.metrics_to_log(trainer))
        return [{**row, "epoch": trainer.current_epoch}] if row else []

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(_KEY, {"step": checkpoint["global_step"], "rows": []})
        self._saved = saved["step"], saved["rows"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first hook after everything that may refuse the checkpoint."""
        step, rows = self._saved
        for logger in trainer.loggers:
            if isinstance(logger, ResumableCSVLogger | ResumableTensorBoardLogger):
                logger.cut(step)
                for row in rows:
                    logger.log_metrics({name: value for name, value in row.items() if name != "step"}, step)
