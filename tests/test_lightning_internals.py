"""What Lightning does not promise: each name is where `srlora_pl.training.lightning_internals` expects it, and there
alone is it used."""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

import srlora_pl
from srlora_pl.training import lightning_internals as internals

PACKAGE = Path(srlora_pl.__file__).parent
FILE = PACKAGE / "training/lightning_internals.py"
COUNTS = ("ready", "started", "processed", "completed")
LOOP = "trainer.fit_loop.epoch_loop"
NAMES = [
    "module._trainer",
    "trainer.fit_loop._data_source.is_module",
    "trainer.fit_loop._data_fetcher",
    "trainer.fit_loop._should_accumulate",
    "trainer.fit_loop.done",
    "trainer.fit_loop.on_advance_end",
    "trainer.fit_loop.reset_restart_stage",
    *(f"trainer.fit_loop.epoch_progress.current.{count}" for count in COUNTS),
    *(f"{LOOP}.batch_progress.{span}.{count}" for span in ("current", "total") for count in COUNTS),
    f"{LOOP}.batch_progress.is_last_batch",
    f"{LOOP}.batch_progress.reset_on_run",
    f"{LOOP}._batches_that_stepped",
    f"{LOOP}._is_training_done",
    f"{LOOP}._num_ready_batches_reached",
    f"{LOOP}._should_check_val_fx",
    f"{LOOP}.max_steps",
    f"{LOOP}.restarting",
    f"{LOOP}.val_loop.run",
    "trainer._accelerator_connector.cluster_environment",
    "trainer._checkpoint_connector.hpc_save_path",
    "trainer._signal_connector._slurm_sigusr_handler_fn",
    "trainer._logger_connector._callback_metrics",
    "trainer._logger_connector.metrics",
    "trainer._logger_connector.should_update_logs",
    "trainer.strategy._checkpoint_io",
    "trainer.strategy._forward_redirection",
    "scaler._get_scale_async",
    "optimizer._step_supports_amp_scaling",
    "cli._set_seed",
    "launcher.procs",
    "stopping._check_on_train_epoch_end",
    "saving._should_skip_saving_checkpoint",
    "saving._save_topk_checkpoint",
    "saving._monitor_candidates",
    "saving._last_global_step_saved",
    "logger._experiment",
    "wandb._id",
    "wandb._wandb_init",
    "mlflow._run_id",
    "bar._initialize_train_progress_bar_id",
    "bar._get_train_description",
    "bar.train_progress_bar",
    *(f"checkpoint.epoch_progress.{span}.{count}" for span in ("current", "total") for count in COUNTS),
    *(
        f"checkpoint.epoch_loop.{loop}batch_progress.{span}.{count}"
        for loop in ("", "val_loop.")
        for span in ("current", "total")
        for count in COUNTS
    ),
    "checkpoint.epoch_loop.batch_progress.is_last_batch",
]
LOOPS = {"fit_loop", "epoch_loop", "val_loop", "batch_progress", "epoch_progress"}


class Watch(Callback):
    """In a fit of three epochs: names that are missing, and what the functions say at hooks."""

    def __init__(self, logger: TensorBoardLogger) -> None:
        self.logger = logger
        self.missing: dict[str, str] = {}
        self.said: list[tuple[Any, ...]] = []
        self.validated: list[tuple[int, int]] = []
        self.metrics: dict[str, float] = {}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        roots = {
            "trainer": trainer,
            "module": module,
            "optimizer": torch.optim.AdamW(module.parameters(), fused=True),
            "scaler": torch.amp.GradScaler("cpu"),
            "cli": LightningCLI,
            "launcher": _SubprocessScriptLauncher(None, 1, 1),
            "stopping": EarlyStopping("loss"),
            "saving": ModelCheckpoint(),
            "logger": self.logger,
            "wandb": WandbLogger(),
            "mlflow": MLFlowLogger(tracking_uri="http://localhost"),
            "bar": RichProgressBar,
        }
        for name in NAMES:
            root, *parts = name.split(".")
            if root == "checkpoint":
                continue
            found = roots[root]
            for part in parts:
                if not hasattr(found, part):
                    self.missing[name] = f"Lightning moved {name}: {type(found).__name__} has no {part}"
                    break
                found = getattr(found, part)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.say(trainer)
        if internals.in_train_batch_end(trainer) and internals.logs_this_step(trainer):
            self.metrics = dict(internals.metrics_to_log(trainer))

    def say(self, trainer: Any) -> None:
        epoch, run = internals.batches_in_epoch(trainer), internals.batches_in_run(trainer)
        self.said.append((
            epoch.processed,
            run.processed,
            internals.epochs(trainer).processed,
            internals.logged_step(trainer),
            internals.accumulates(trainer),
            internals.epoch_is_over(trainer),
            internals.is_last_batch(trainer),
            internals.metrics_are_fresh(trainer),
            internals.logs_this_step(trainer),
            internals.lightning_validates(trainer),
            internals.validation_is_due(trainer),
        ))  # fmt: skip

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.validated.append((internals.batches_in_run(trainer).processed, internals.logged_step(trainer)))


class Logs(BoringModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train/batch", float(batch_idx))
        return super().training_step(batch, batch_idx)

    def on_train_start(self) -> None:
        internals.decide_validation(self.trainer, lambda trainer: internals.batches_in_run(trainer).processed == 4)
        internals.callback_metrics(self.trainer)["kept"] = 1.0


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Watch, Any]:
    """Three micro-batches an epoch, two an optimizer step: steps end after micro-batches 2, 3 | 5, 6 | 8."""
    folder = tmp_path_factory.mktemp("fit")
    watch = Watch(TensorBoardLogger(folder))
    trainer = L.Trainer(
        accelerator="cpu",
        accumulate_grad_batches=2,
        callbacks=[watch, ModelCheckpoint(folder, every_n_train_steps=1, filename="file")],
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_train_batches=3,
        limit_val_batches=1,
        log_every_n_steps=2,
        logger=watch.logger,
        max_steps=5,
        num_sanity_val_steps=0,
    )
    trainer.fit(Logs())
    return watch, trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("checkpoint.")])
def test_lightning_has(name: str, fit: tuple[Watch, Any]) -> None:
    assert name not in fit[0].missing, fit[0].missing[name]


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("checkpoint.")])
def test_a_checkpoint_has(name: str, fit: tuple[Watch, Any]) -> None:
    loops = torch.load(fit[1].checkpoint_callback.best_model_path, weights_only=True)["loops"]["fit_loop"]
    found: Any = loops
    for key in keys_in_checkpoint(name):
        assert key in found, f"Lightning moved {name}: there is no key {key!r} among {sorted(found)}"
        found = found[key]


def keys_in_checkpoint(name: str) -> Iterator[str]:
    """The keys in a checkpoint: ``epoch_loop.val_loop.batch_progress`` is one."""
    head, progress, rest = name.removeprefix("checkpoint.").partition("_progress")
    yield head + progress
    yield from rest.strip(".").split(".")


def test_each_name_is_tested() -> None:
    """A name that is added to the file must be added to `NAMES`."""
    tree = ast.parse(FILE.read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    private = {name for name in used if name in LOOPS or (name.startswith("_") and name.isidentifier())}
    tested = {part for name in NAMES for part in name.split(".")}
    assert private - tested == set()


def test_the_functions_tell_where_a_run_is(fit: tuple[Watch, Any]) -> None:
    watch, trainer = fit
    #   in epoch, in run, epochs, step, accumulates, epoch over, last, fresh, logs, lightning validates, we validate
    assert watch.said == [
        (1, 1, 0, 0, True, False, False, False, False, False, False),
        (2, 2, 0, 0, False, False, False, False, False, False, False),
        (3, 3, 0, 1, False, True, True, True, True, True, False),
        (1, 4, 1, 2, True, False, False, False, False, False, True),
        (2, 5, 1, 2, False, False, False, False, False, False, False),
        (3, 6, 1, 3, False, True, True, True, True, True, False),
        (1, 7, 2, 4, True, False, False, False, False, False, False),
        (2, 8, 2, 4, False, False, True, False, False, False, False),
    ]
    assert watch.validated == [(4, 2)]
    assert watch.metrics == {"train/batch": 2.0}
    assert trainer.callback_metrics["kept"] == 1.0


def test_the_position_in_a_checkpoint_is_set(fit: tuple[Watch, Any]) -> None:
    checkpoint = torch.load(fit[1].checkpoint_callback.best_model_path, weights_only=True)
    assert internals.epochs_in(checkpoint) == 2
    internals.set_position(checkpoint, processed=5, epoch=1, batch=2, batches_per_epoch=3)
    loops = checkpoint["loops"]["fit_loop"]
    assert loops["epoch_progress"]["total"] == {"ready": 2, "started": 2, "processed": 1, "completed": 1}
    assert set(loops["epoch_loop.batch_progress"]["current"].values()) == {2}
    assert set(loops["epoch_loop.batch_progress"]["total"].values()) == {5}
    assert loops["epoch_loop.batch_progress"]["is_last_batch"] is False


# --- and no other file -----------------------------------------------------------------------------------------------


def defined(folder: Path) -> set[str]:
    """Private names that the code in ``folder`` defines: functions, classes, attributes of self, variables."""
    found = set()
    for node in (each for file in folder.rglob("*.py") for each in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") else set()
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def test_no_other_file_uses_what_is_lightnings_own() -> None:
    lightnings = (defined(Path(L.__file__).parent) - defined(PACKAGE)) | LOOPS
    used = []
    for file in (each for each in PACKAGE.rglob("*.py") if each != FILE):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Attribute) and "lowrank" not in file.parts:  # which imports no lightning
                names = [node.attr]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
                names = [each.value for each in node.args if isinstance(each, ast.Constant)]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning"):
                names = [each.name for each in node.names if each.name.startswith("_")]
                lightnings |= set(names)
            used += [f"{file.relative_to(PACKAGE)}:{node.lineno} {name}" for name in names if name in lightnings]
    assert used == []


def test_no_other_file_overrides_what_is_lightnings_own() -> None:
    overridden = []
    for info in pkgutil.walk_packages(srlora_pl.__path__, "srlora_pl."):
        for cls in vars(importlib.import_module(info.name)).values():
            if not inspect.isclass(cls) or cls.__module__ != info.name or info.name == internals.__name__:
                continue
            for base in (each for each in cls.__mro__ if each.__module__.startswith("lightning.")):
                overridden += [
                    f"{cls.__name__}.{name} of {base.__name__}"
                    for name in set(vars(cls)) & set(vars(base))
                    if name.startswith("_") and not name.startswith("__") and name != "_abc_impl"
                ]
    assert overridden == []
