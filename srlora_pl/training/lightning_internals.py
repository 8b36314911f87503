"""Every name of Lightning that its documentation does not promise; no other file of this package uses one.

When a release of Lightning moves a name, tests/test_lightning_internals.py says which.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.fabric.utilities.logger import _convert_params, _flatten_dict
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI

# --- the trainer and what it is made of ------------------------------------------------------------------------------


def trainer_of(module: LightningModule) -> Trainer | None:
    """The trainer that runs ``module``; `LightningModule.trainer` raises where there is none."""
    return module._trainer  # type: ignore[return-value]


def module_loads_training_data(trainer: Any) -> bool:
    """Whether the training data come from the module's own ``train_dataloader``."""
    return trainer.fit_loop._data_source.is_module()


def trains_copy(strategy: Strategy) -> bool:
    """Whether ``strategy`` trains a copy of the module, in processes that it starts from this one."""
    return isinstance(strategy.launcher, _MultiProcessingLauncher)


def step_of_strategy(module: LightningModule, name: str, *args: Any) -> Any:
    """``module.name(*args)`` in the forward pass of what the strategy wraps ``module`` in, as Lightning's own steps."""
    strategy: Any = module.trainer.strategy
    return strategy._forward_redirection(strategy.model, module, name, *args)


def inverse_loss_scale(trainer: Any, optimizer: Optimizer) -> Tensor | None:
    """1 / loss scale where the gradients still carry it: fused optimizers unscale inside their own step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return None
    return scaler._get_scale_async().reciprocal()  # get_scale() would wait for the device


def cluster_environment(trainer: Any) -> Any:
    """Where the processes run, such as a ``SLURMEnvironment``."""
    return trainer._accelerator_connector.cluster_environment


def requeue(trainer: Any, signal: int, folder: Path) -> Path:
    """Save a file to ``folder`` and have SLURM queue the job again, as Lightning does when it receives ``signal``."""
    file = Path(trainer._checkpoint_connector.hpc_save_path(folder))
    trainer._signal_connector._slurm_sigusr_handler_fn(signal, None)
    return file


def child_processes(trainer: Any) -> Sequence[Popen]:
    """The processes of the same run that this one has started."""
    return getattr(trainer.strategy.launcher, "procs", [])


def checkpoint_io(strategy: Any) -> CheckpointIO | None:
    """How ``strategy`` was told to write checkpoints, if it was; also of a strategy's name, which says nothing."""
    return getattr(strategy, "_checkpoint_io", None)


def seed_again(cli: "LightningCLI") -> None:
    """Set all global random streams as at the beginning of the run."""
    cli._set_seed()


def is_local_file(path: str | Path) -> bool:
    """Whether ``path`` is on a disk, not an address such as ``s3://...``."""
    return _is_local_file_protocol(path)


# --- counters --------------------------------------------------------------------------------------------------------


def batches_in_epoch(trainer: Any) -> Any:
    """Micro-batches of the current epoch: ``ready``, ``started``, ``processed``, ``completed``."""
    return trainer.fit_loop.epoch_loop.batch_progress.current


def batches_in_run(trainer: Any) -> Any:
    """Micro-batches of the whole run, counted like `batches_in_epoch`."""
    return trainer.fit_loop.epoch_loop.batch_progress.total


def in_train_batch_end(trainer: Any) -> bool:
    """Whether the hooks ``on_train_batch_end`` are running."""
    batches = batches_in_run(trainer)
    return batches.completed < batches.processed


def accumulates(trainer: Any) -> bool:
    """Whether the last micro-batch left its gradients to the next one."""
    # Not `fit_loop._should_accumulate()`, which in `on_train_batch_start` speaks of the batch that begins.
    batches = batches_in_epoch(trainer).processed
    return batches % trainer.accumulate_grad_batches != 0 and batches != trainer.num_training_batches


def epoch_is_over(trainer: Any) -> bool:
    """Whether the last micro-batch is its epoch's last."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def epochs(trainer: Any) -> Any:
    """Epochs of this run: ``ready``, ``started``, ``processed``, ``completed``."""
    return trainer.fit_loop.epoch_progress.current


def logged_step(trainer: Any) -> int:
    """The step under which loggers record now, one less than the optimizer's inside a step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def set_logged_step(trainer: Any, step: int) -> None:
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def set_max_steps(trainer: Any, steps: int) -> None:
    trainer.fit_loop.epoch_loop.max_steps = steps


# --- metrics and logging ---------------------------------------------------------------------------------------------


def logs_this_step(trainer: Any) -> bool:
    """In ``on_train_batch_end``: whether Lightning logs a row for the optimizer step that this micro-batch ends."""
    return metrics_are_fresh(trainer) and not trainer.fit_loop._should_accumulate()


def metrics_are_fresh(trainer: Any) -> bool:
    """Whether this micro-batch falls on ``trainer.log_every_n_steps``."""
    return trainer._logger_connector.should_update_logs


def metrics_to_log(trainer: Any) -> Mapping[str, Tensor]:
    """The metrics of the row that Lightning logs after the hooks ``on_train_batch_end``."""
    return trainer._logger_connector.metrics["log"]


def callback_metrics(trainer: Any) -> dict[str, Tensor]:
    """The dict behind ``trainer.callback_metrics``, which the property would first bring up to date."""
    return trainer._logger_connector._callback_metrics


def flat_settings(params: Any) -> dict[str, Any]:
    """Hyperparameters by the names under which loggers without nested ones have them, such as ``method/rank``."""
    return _flatten_dict(_convert_params(params))


def reopen(logger: TensorBoardLogger) -> None:
    """Make ``logger`` begin a new file when it next logs."""
    logger._experiment = None


def is_open(logger: TensorBoardLogger) -> bool:
    """Whether ``logger`` has begun a file."""
    return logger._experiment is not None


def run_id(logger: Logger) -> str | None:
    """The run's id at W&B or MLflow, once it is known; asking MLflow's logger itself would begin a run."""
    if isinstance(logger, WandbLogger):
        return logger.version
    return logger._run_id if isinstance(logger, MLFlowLogger) else None


def set_run_id(logger: Logger, run_id: str) -> None:
    """Make ``logger``, which has not begun, go on with a run of W&B or MLflow."""
    if isinstance(logger, WandbLogger):
        logger._id = logger._wandb_init["id"] = run_id
    elif isinstance(logger, MLFlowLogger):
        logger._run_id = run_id


class ResumableRichBar(RichProgressBar):
    """Starts a resumed epoch's bar where the checkpoint was written, and leaves an unknown last epoch out."""

    def _initialize_train_progress_bar_id(self) -> None:
        super()._initialize_train_progress_bar_id()
        # Processed by an earlier process, so it says nothing about this one's speed.
        self.train_progress_bar.completed = batches_in_epoch(self.trainer).completed

    def _get_train_description(self, current_epoch: int) -> str:
        return super()._get_train_description(current_epoch).replace("/-2", "")  # max_epochs -1, less 1


# --- validation and the loops ----------------------------------------------------------------------------------------


def validation_is_due(trainer: Any) -> bool:
    """Whether a validation follows the last micro-batch, as `decide_validation` has it."""
    loop = trainer.fit_loop.epoch_loop
    return loop._should_check_val_fx(trainer.fit_loop._data_fetcher)


def lightning_validates(trainer: Any) -> bool:
    """Whether a validation follows the last micro-batch by Lightning's own rules."""
    loop = trainer.fit_loop.epoch_loop
    return type(loop)._should_check_val_fx(loop, trainer.fit_loop._data_fetcher)


def decide_validation(trainer: Any, decide: Callable[[Any], bool] | None) -> None:
    """Let ``decide(trainer)`` say after each micro-batch whether to validate; None: Lightning's own rules again."""
    attributes = vars(trainer.fit_loop.epoch_loop)
    attributes.pop("_should_check_val_fx", None)
    if decide is not None:
        attributes["_should_check_val_fx"] = partial(_ignore_fetcher, decide, trainer)


def _ignore_fetcher(decide: Callable[[Any], bool], trainer: Any, data_fetcher: Any) -> bool:
    return decide(trainer)


def validate(trainer: Any, step: int) -> None:
    """Run a validation that loggers record under ``step``."""
    set_logged_step(trainer, step)
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


def restarts_past_validation(trainer: Any) -> bool:
    """Whether Lightning is about to skip the validation that the checkpoint fell on, and to count a step for it."""
    return trainer.fit_loop.epoch_loop.restarting and validation_is_due(trainer) and not trainer.fit_loop.done


def end_epoch_if_over(trainer: Any) -> None:
    """Run the end of the epoch where the checkpoint fell on the last micro-batch; Lightning leaves it out."""
    fit_loop, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    if loop.batch_progress.is_last_batch or fit_loop.done:
        fit_loop.on_advance_end()
        loop.batch_progress.reset_on_run()
        fit_loop.reset_restart_stage()


def is_last_batch(trainer: Any) -> bool:
    """Whether the last micro-batch is the last of its epoch or of the run."""
    return trainer.fit_loop.epoch_loop._is_training_done


# --- checkpoints -----------------------------------------------------------------------------------------------------


def epochs_in(checkpoint: Mapping[str, Any]) -> int:
    """How many epochs were over when ``checkpoint`` was written."""
    return checkpoint["loops"]["fit_loop"]["epoch_progress"]["total"]["processed"]


def set_position(checkpoint: Mapping[str, Any], processed: int, epoch: int, batch: int, batches_per_epoch: int) -> None:
    """Make ``checkpoint`` say that ``processed`` micro-batches, ``batch`` of them in ``epoch``, and no more are over.

    Lightning saves inside a step, before its own counters say that the step is over, and would repeat that batch; or
    after they began to count the next.
    """
    loops = checkpoint["loops"]["fit_loop"]
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


def stops_at_validation(callback: EarlyStopping) -> bool:
    """Whether ``callback`` looks at its score after validations, not at the end of epochs."""
    return not callback._check_on_train_epoch_end


def set_stops_at_validation(callback: EarlyStopping, at_validation: bool) -> None:
    callback._check_on_train_epoch_end = not at_validation


def save_for_now(callback: ModelCheckpoint, trainer: Trainer) -> None:
    """Save the file of ``callback``, which renews it if it is due again at this step."""
    if not callback._should_skip_saving_checkpoint(trainer):
        callback._save_topk_checkpoint(trainer, callback._monitor_candidates(trainer))
        callback._last_global_step_saved = 0
