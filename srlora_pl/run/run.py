"""One run of the command line: LightningCLI with this package's defaults, folders and closing words."""

import argparse
import contextlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table

from srlora_pl.data.base import DataModule
from srlora_pl.data.texts.glue import GLUEData
from srlora_pl.reporting import (
    ContinuedCSVLogger,
    ContinuedCurves,
    ContinuedTensorBoardLogger,
    GLUEWriter,
    Interrupts,
    MatrixTable,
    Monitor,
    PredictionWriter,
    Progress,
    Summary,
)
from srlora_pl.reporting.progress import closing_line
from srlora_pl.run import config, finders
from srlora_pl.run.defaults import KeepSettings, Last, best, chooses_best, keeps_last, refuse_unfit
from srlora_pl.run.settings import as_options, forget_quotes, share_yaml, split_revision, writable
from srlora_pl.tasks.base import Task
from srlora_pl.training import checkpoints
from srlora_pl.training.mixin import refuse_copies
from srlora_pl.util import system, yaml_text
from srlora_pl.util.errors import Interrupted, UserError, causes
from srlora_pl.util.files import alone_in, relative

ROOT = "runs"
_FOLDER = "SRLORA_RUN_FOLDER"  # where the first process writes, for those that it starts
_LET_THE_FIRST_SPEAK = 3  # seconds, after which it will have ended this process if it has met the same error
_JOB = "slurm_job"  # in a run's folder: what SLURM started it as
TRAINER_DEFAULTS = {
    "default_root_dir": ROOT,
    # The DataModules deal their order out to the devices themselves, so that a resumed run finds its place.
    "use_distributed_sampler": False,
}

# Warnings that tell the user of a config nothing: each is either answered here or by design.
NOISE = (
    ".*does not have many workers which may be a bottleneck",
    ".*fp16 is not supported on CPU",  # said below in one line
    ".*Checkpoint directory .* exists and is not empty",  # a resumed run goes on in its own folder
    ".*The dirpath has changed from",  # of test and predict, which save nothing; or the run's folder was moved
    ".*The number of training batches .* is smaller than the logging interval",
    ".*callbacks used to create the checkpoint need to be provided",  # test and predict choose no checkpoint
    ".*treespec, LeafSpec.* is deprecated",
    ".*Total length of `list` across ranks is zero",  # no validation split
    ".*could not find the monitored key",  # the same; the closing words say so
    r"\s*Unable to serialize instance",  # said below
    r"\s*Dump of a value that does not round-trip: a Text",  # text in quotes, which is written as text
    ".*using the WeightAveraging callback, but loading a checkpoint outside",  # for its averages, as one expects
)


class Run(LightningCLI):
    """A subcommand on parsed settings.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        files: names of the config files, in order.
        contents: what they hold, as `config.read` returns it.
        options: the rest of the command line; it rules over the files.

    Raises:
        UserError: a setting is unknown or has a wrong value, or the checkpoint cannot be read.
    """

    def __init__(self, command: str, files: Sequence[str], contents: Sequence[config.Node], options: list[str]) -> None:
        self.command, self.files, self.options = command, files, options
        commit, options = split_revision(options)
        self.given, self.overlay = config.combine([*contents, *commit])
        self.folder: Path | None = None
        self.is_new = False
        _quieten()
        share_yaml()
        super().__init__(
            Task,
            DataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            save_config_callback=None,
            auto_configure_optimizers=False,
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False, "prog": f"python cli.py {command}"},
            args=[*as_options(self.given, self.overlay), *options],
            # Without subcommands of its own LightningCLI leaves the checkpoint's hyperparameters alone; with
            # them they would overrule the command line.
            run=False,
        )

    # -- settings

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")
        parser.add_argument("--ckpt_path", type=str | None, help="The checkpoint to go on from, or to use.")
        parser.add_argument("--name", type=str, help="Of the run; by default that of the config file.")
        if self.command == "predict":
            parser.add_argument("--output", type=str | None, help="The CSV, or GLUE's folder; by default the run's.")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        try:
            self.config = parser.parse_args(args)  # type: ignore[arg-type]
        except argparse.ArgumentError as error:
            known = [*(action.dest for action in parser._actions), *config.keys(self.given)]
            raise UserError(config.explain(str(error), known, self.files, self.options)) from error
        forget_quotes(self.config)
        self._refuse_num_classes()
        self._refuse_null()
        # Neither belongs to the settings that a run keeps: a second use of its config.yaml starts anew.
        self.ckpt_path = self.config.pop("ckpt_path")
        self.output = self.config.pop("output", None)
        self.config.name = self.config.name or (Path(self.files[0]).stem if self.files else "run")
        if Path(self.config.name).name != self.config.name:
            raise UserError(
                f"--name {self.config.name!r} must be a plain name without folders, trainer.default_root_dir is the "
                "place for them"
            )
        self._say_what_was_dropped()
        self._choose_checkpoint()
        if self.ckpt_path:
            content = checkpoints.read(Path(self.ckpt_path))
            if self.command == "fit" and "optimizer_states" not in content:
                raise UserError(
                    f"--ckpt_path {self.ckpt_path} holds weights alone (save_weights_only), so that no run can go on "
                    "from it: give another file, such as last.ckpt"
                )
            self._take_classes_of(content)
        elif self.command == "predict":
            raise UserError("predict needs --ckpt_path, the checkpoint of a finished run")
        elif self.command != "fit":
            _note(f"without --ckpt_path, {self.command} scores the untrained model")

    def _refuse_num_classes(self) -> None:
        count = self.config.model.init_args.get("num_classes")
        if count is not None:
            raise UserError(f"model.num_classes {count} is not for you to set, it comes from the data: leave it out")

    def _refuse_null(self) -> None:
        """The parser takes an empty value, ``lr:``, for every argument of a class that has a default."""
        for part in ("model", "data"):
            module, _, name = self.config[part].class_path.rpartition(".")
            homes = reversed(getattr(import_module(module), name).__mro__)
            parameters = {key: each for home in homes for key, each in signature(home.__init__).parameters.items()}
            for key, value in vars(self.config[part].init_args).items():
                known = parameters.get(key)
                if value is not None or not known or known.default in (None, Parameter.empty):
                    continue
                if NoneType not in get_args(known.annotation):
                    place = config.written_at(f"{part}.{key}", self.files, self.options)
                    raise UserError(f"{place} is null: give it a value, or leave it out for {known.default!r}")

    def _take_classes_of(self, checkpoint: dict[str, Any]) -> None:
        """To predict the user's own samples the data of the training are not needed."""
        data = self.config.data.init_args
        if self.command == "predict" and data.get("predict_root") and "class_names" in data:
            data.class_names = data.class_names or checkpoints.class_names(checkpoint)

    def _say_what_was_dropped(self) -> None:
        """An overlay or ``--model.method`` changes the class; arguments that it does not take fall away."""
        method = self.config.model.init_args.get("method")
        if method is None:
            return
        dropped = config.method_arguments(self.given, self.overlay) - set(vars(method.init_args))
        if dropped:
            _note(f"{method.class_path} takes no {', '.join(sorted(dropped))}: dropped")

    # -- the run's folder and checkpoint

    @property
    def root(self) -> Path:
        """Where the config's runs are."""
        method = self.config.model.init_args.method.class_path.rsplit(".", 1)[-1].lower()
        return Path(self.config.trainer.default_root_dir or ROOT, f"{self.config.name}-{method}")

    def _choose_checkpoint(self) -> None:
        """Fill in a ``ckpt_path`` that was left to this program: ``last``, and that of a job that SLURM restarts."""
        fits = self.command == "fit" and not self.config.trainer.fast_dev_run
        if fits and os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
            same = (folder.resolve() for folder in _versions(self.root) if _read(folder / _JOB) == self._job)
            self.folder = next(same, None)
        if not self.folder and self.ckpt_path != "last":
            return
        asked = "the requeued job" if self.folder else "--ckpt_path last"
        folders = [self.folder] if self.folder else self._run_folders()
        goes_on = checkpoints.resumes if self.command == "fit" else None
        each = (checkpoints.newest(filter(goes_on, checkpoints.files_of(folder)), _pass_over) for folder in folders)
        found = next(filter(None, each), None)
        if found:
            self.ckpt_path = str(found[0])
            _note(f"{asked} takes {relative(found[0])}, step {found[1]}")
        elif self.ckpt_path != "last":  # requeued before its first checkpoint
            _note(f"{asked} starts from {self.ckpt_path or 'the beginning'} again")
        elif self.command == "fit":
            self.ckpt_path = None
            _note(f"{asked} finds no checkpoint in {relative(self.folder or self.root)}, the run begins anew")
        else:
            raise UserError(f"--ckpt_path last finds no checkpoint in {self.root}, run fit first or give a file")

    def _run_folders(self) -> list[Path]:
        """The folders of the config's runs, the newest first; for the ``config.yaml`` of a run its own."""
        own = Path(self.files[0]).resolve() if self.files else Path()
        if own.name == "config.yaml" and own.parent.parent == self.root.resolve():
            return [own.parent]
        return [folder.resolve() for folder in _versions(self.root)]

    @property
    def _job(self) -> str:
        """What tells a run that SLURM starts again from all others: its job, its place in it, and its command."""
        place = ".".join(os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        return f"{place} {shlex.join([*self.files, *self.options])}"

    def _choose_folder(self) -> tuple[Path, bool]:
        """The folder of the run that ``ckpt_path`` belongs to, or a new one; and whether it is new."""
        folder = self.folder or (_folder_of(Path(self.ckpt_path)) if self.ckpt_path else None)
        is_new = folder is None
        if folder:
            self._take_name_of(folder)
            self._say_what_changed_since(folder)
        folder = folder or _new_version(self.root)
        if is_new and self.ckpt_path:
            _note(f"{relative(self.ckpt_path)} lies in no run's folder, the run in {relative(folder)} goes on from it")
        if "SLURM_JOB_ID" in os.environ:
            self._write(folder / _JOB, self._job)
        return folder, is_new

    def _take_name_of(self, folder: Path) -> None:
        """A run keeps its name, so that its ``config.yaml`` leads to its own folder."""
        method = self.root.name.removeprefix(self.config.name)
        name = folder.parent.name.removesuffix(method)
        if folder.parent.name.endswith(method) and name not in ("", self.config.name):
            _note(f"the run in {relative(folder)} keeps its name, {name}")
            self.config.name = name

    @property
    def _settings_text(self) -> str:
        """What a run's ``config.yaml`` says."""
        return yaml_text.write(writable(self.parser, self.config)[0])

    def _say_what_changed_since(self, folder: Path) -> None:
        """A run may go on with more epochs or in another precision, but not unnoticed."""
        with contextlib.suppress(UserError):  # the file is gone or broken; this run writes it anew
            kept = config.read(str(folder / "config.yaml"))
            if changed := config.changes(kept, yaml_text.load(self._settings_text)):
                _note(f"other settings than the run had so far: {', '.join(changed)}")

    @rank_zero_only
    def _write(self, path: Path, text: str) -> None:
        path.write_text(text)

    def before_instantiate_classes(self) -> None:
        if left_out := writable(self.parser, self.config)[1]:
            _note(f"config.yaml has no way to say {', '.join(left_out)}, and leaves it out")
        # A task takes only a class that is imported: what a checkpoint names must not run, what a config names may.
        module = str(self.config.model.init_args.get("optimizer")).rpartition(".")[0]
        with contextlib.suppress(ImportError, ValueError):
            import_module(module)

    # -- the objects

    def instantiate_classes(self) -> None:
        try:
            self._use_finders()
            super().instantiate_classes()
        except Exception as error:
            said = any(isinstance(each, UserError) for each in causes(error))
            if not said and (missing := config.missing_package(str(error))):
                raise UserError(missing) from error
            raise

    def _use_finders(self) -> None:
        """Let the user's finders search, or take what they found when the run began; they have no part in it then."""
        if self.command != "fit":
            return
        given, self.config.trainer.callbacks = finders.split(self.config.trainer.callbacks)
        for finder in map(finders.Finder, given):
            if finder.key not in self.config[finder.part].init_args:
                raise UserError(f"{finder.name} is to find {finder.part}.{finder.key}, which is no setting: name one")
            if self.config.trainer.fast_dev_run:
                found = None
            elif self.ckpt_path:
                found = finder.found_before(checkpoints.read(Path(self.ckpt_path)))
            else:
                found = self._search(finder)
            settings = self.config[finder.part].init_args
            settings[finder.key] = found or settings[finder.key]
            _note(f"{finder.name}: the run has {finder.part}.{finder.key} {settings[finder.key]}")

    def _search(self, finder: finders.Finder) -> Any:
        before = self.config.clone()
        self.config.trainer.callbacks, self.config.trainer.logger = None, False
        self.config_init = self.parser.instantiate_classes(self.config)
        make_trainer = super().instantiate_trainer
        found = finder.search(make_trainer, self.config_init.model, self.config_init.data)
        # The run itself begins as if the value had been given: from the seed, and with new objects.
        self.config = before
        del self.config_dump
        self._set_seed()
        return found

    # -- the trainer

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self.config_init.trainer
        callbacks = _as_list(settings.callbacks)
        loggers: Any = settings.logger
        if self.command == "fit":
            refuse_unfit(callbacks)
        if self.command == "fit" and not settings.fast_dev_run:
            self.folder, self.is_new = self._choose_folder()
            # Beside its name this tells Lightning where SLURM's checkpoints are.
            kwargs |= {"default_root_dir": self.folder, "plugins": _plugins(settings)}
        if loggers in (None, True):
            loggers = _loggers(self.folder) if self.folder else False
        callbacks = self._with_defaults(settings, callbacks, bool(loggers))
        if _has(callbacks, MatrixTable):
            kwargs["enable_model_summary"] = False  # it says the same, layer by layer
        try:
            trainer = super().instantiate_trainer(logger=loggers, callbacks=callbacks, **kwargs)
            refuse_copies(trainer.strategy)
        except Exception:
            self._discard_folder()
            raise
        if trainer.strategy.root_device.type == "cpu":
            system.keep_freed_memory()
        if str(settings.precision) in ("16", "16-mixed") and trainer.precision == "bf16-mixed":
            _note("16-mixed needs a GPU, on this CPU the run uses bf16-mixed")
        return trainer

    def _with_defaults(self, settings: Any, users: Sequence[Callback], logs: bool) -> list[Callback]:
        """The user's callbacks, and what they do not already do; interrupts come before anything of the next step."""
        saves = self.folder if settings.enable_checkpointing is not False else None
        self.interrupts = Interrupts(saves, Path(self.ckpt_path) if self.ckpt_path else None)
        callbacks: list[Callback] = [self.interrupts]
        if self.folder:
            self.summary = Summary(self.folder)
            keeps = KeepSettings(self.folder / "config.yaml", self._settings_text)
            callbacks += [ContinuedCurves(), keeps, self.summary]
        if saves and not chooses_best(users):
            callbacks.append(best(saves))
        if self.folder and logs and not _has(users, LearningRateMonitor):
            callbacks.append(LearningRateMonitor("step"))
        if self.folder and logs and not _has(users, Monitor):
            callbacks.append(Monitor())
        if self.command == "fit" and settings.enable_model_summary is not False and not _has(users, ModelSummary):
            callbacks.append(MatrixTable())
        if settings.enable_progress_bar is not False and not _has(users, ProgressBar):
            callbacks.append(Progress())
        if self.command == "predict":
            self.writer = self._prediction_writer()
            callbacks.append(self.writer)
        callbacks += users
        if saves and not keeps_last(users):  # after the others, so that it knows what they have saved
            place = max((i for i, each in enumerate(callbacks, 1) if isinstance(each, ModelCheckpoint)), default=0)
            callbacks.insert(place, Last(saves))
        return callbacks

    def _prediction_writer(self) -> PredictionWriter:
        checkpoint = Path(self.ckpt_path)
        folder = _folder_of(checkpoint) or checkpoint.parent
        if not isinstance(self.datamodule, GLUEData):
            file = Path(self.output or folder / "predictions.csv")
            if file.is_dir():
                raise UserError(f"--output {file} is a folder, name a file in it, such as {file / 'predictions.csv'}")
            _require_writable(file.parent)
            return PredictionWriter(file)
        if self.output and Path(self.output).suffix:
            raise UserError(f"--output {self.output} must be a folder, as GLUE gives its files their names")
        _require_writable(folder := Path(self.output or folder))
        return GLUEWriter(folder)

    @rank_zero_only
    def _discard_folder(self) -> None:
        """A run that never took a step leaves nothing behind."""
        if self.folder and self.is_new and not checkpoints.files_of(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)
            if not any(self.folder.parent.iterdir()):
                self.folder.parent.rmdir()

    # -- subcommands

    def start(self) -> None:
        """Run the subcommand."""
        with self.interrupts.watch(self.trainer), self._ending_together():
            getattr(self, self.command)()

    @contextlib.contextmanager
    def _ending_together(self) -> Iterator[None]:
        """An error of one process ends all of them, and what the user can mend is said once."""
        try:
            yield
        except Exception as error:
            if rank_zero_only.rank and isinstance(error, UserError):  # type: ignore[attr-defined]
                time.sleep(_LET_THE_FIRST_SPEAK)
            children = getattr(self.trainer.strategy.launcher, "procs", [])
            if not isinstance(error, UserError) and any(_has_refused(child) for child in children):
                raise SystemExit(2) from error
            for child in children:
                child.kill()
            raise

    def fit(self) -> None:
        if self.folder is None or rank_zero_only.rank:  # type: ignore[attr-defined]
            self._fit()
            return
        with alone_in(self.folder) as alone:
            if not alone:
                raise UserError(
                    f"another run is at work in {relative(self.folder)}: wait for its end, or begin a new run without "
                    "--ckpt_path"
                )
            self._fit()

    def _fit(self) -> None:
        begin = time.monotonic()
        try:
            self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.ckpt_path, weights_only=True)
        except (Exception, Interrupted):
            if not self.trainer.global_step:
                self._discard_folder()
            raise
        seconds = (self.summary.seconds, self.summary.earlier) if self.folder else (time.monotonic() - begin,)
        took = closing_line(self.trainer, self.model.adaptation, *seconds)
        choosing = [each for each in self.trainer.checkpoint_callbacks if getattr(each, "monitor", None)]
        best = getattr(choosing[0], "best_model_path", "") if choosing else ""
        scores = self._scores("val")
        if self.datamodule.has_test_labels:
            scores = self._evaluate("test", best or None)
        if best:
            chosen: Any = choosing[0]
            which = f"best checkpoint: {relative(best)} ({chosen.monitor} {float(chosen.best_model_score):.4f})"
            found = {"monitor": chosen.monitor, "mode": chosen.mode, "value": float(chosen.best_model_score)}
            found["checkpoint"] = str(relative(best))
        else:
            found = {}
            which = "no checkpoint was chosen by validation, the scores are those of the last weights"
        if self.folder and self.trainer.is_global_zero:
            self.summary.write(self.trainer, self.model, scores, found)
        where = f"run written to {relative(self.folder)}" if self.folder else "fast_dev_run: nothing written"
        self._close(scores, [took, which, where])

    def validate(self) -> None:
        self._close(self._evaluate("validate", self.ckpt_path), [f"weights: {self.ckpt_path or 'untrained'}"])

    def test(self) -> None:
        self._close(self._evaluate("test", self.ckpt_path), [f"weights: {self.ckpt_path or 'untrained'}"])

    def _evaluate(self, command: str, checkpoint: str | None) -> dict[str, float]:
        evaluate = getattr(self.trainer, command)
        evaluate(self.model, datamodule=self.datamodule, ckpt_path=checkpoint, weights_only=True, verbose=False)
        return self._scores("test" if command == "test" else "val")

    def predict(self) -> None:
        self.trainer.predict(
            self.model,
            datamodule=self.datamodule,
            ckpt_path=self.ckpt_path,
            weights_only=True,
            return_predictions=False,
        )
        files = " and ".join(str(relative(file)) for file in self.writer.files)
        count, whole = self.writer.rows, sum(map(len, _as_list(self.datamodule.predict_set)))
        part = f" of {whole}" if count < whole else ""
        self._close({}, [f"{count}{part} predictions written to {files}"])

    # -- closing words

    def _scores(self, stage: str) -> dict[str, float]:
        splits = (f"{stage}/", f"{stage}_")
        return {k: float(v) for k, v in self.trainer.callback_metrics.items() if k.startswith(splits)}

    @rank_zero_only
    def _close(self, scores: dict[str, float], lines: Sequence[str]) -> None:
        console = Console(highlight=False, soft_wrap=True)
        if scores:
            table = Table("score", "value")
            for name, value in scores.items():
                table.add_row(name, f"{value:.4f}")
            console.print(table)
        for line in lines:
            console.print(line, markup=False)


def _has_refused(child: subprocess.Popen) -> bool:
    """Whether a process that was started ends by itself, after it has told the user why."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return child.wait(2 * _LET_THE_FIRST_SPEAK) == 2
    return False


def _require_writable(folder: Path) -> None:
    """Refuse a place for predictions before an hour of predicting, without making it yet."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"predictions cannot be written into {folder}, name another place with --output")


def _folder_of(checkpoint: Path) -> Path | None:
    """The folder of the run that wrote ``checkpoint``, or None for a file that lies elsewhere."""
    folders = checkpoints.run_folders(checkpoint)
    return next((folder for folder in folders if checkpoint.resolve() in checkpoints.files_of(folder)), None)


def _versions(root: Path) -> list[Path]:
    """The run folders ``version_N`` below ``root``, the newest first."""
    folders = (path for path in root.glob("version_*") if path.name[8:].isdigit())
    return sorted(folders, key=lambda path: int(path.name[8:]), reverse=True)


def _new_version(root: Path) -> Path:
    """The next free ``version_N`` below ``root``, taken at once, so that runs started together do not share one."""
    number = next((int(path.name[8:]) for path in _versions(root)), -1) + 1
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        # Only the first rank writes; those that it starts itself learn where, as the folder exists by then.
        return Path(os.environ.get(_FOLDER) or root / f"version_{number}")
    while True:
        folder = root / f"version_{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(
                f"trainer.default_root_dir: {folder} cannot be made ({error.strerror}), give a folder for the runs"
            ) from error
        else:
            os.environ[_FOLDER] = str(folder.resolve())
            return folder.resolve()


def _loggers(folder: Path) -> list[Logger]:
    home = (folder.parent, "", folder.name)
    return [ContinuedTensorBoardLogger(*home, default_hp_metric=False), ContinuedCSVLogger(*home)]


def _plugins(settings: Any) -> list[Any]:
    """The user's plugins, and our way of writing a checkpoint unless theirs say another."""
    plugins = _as_list(settings.plugins)
    theirs = [*plugins, getattr(settings.strategy, "_checkpoint_io", None)]
    return plugins if _has(theirs, CheckpointIO) else [*plugins, checkpoints.AtomicCheckpointIO()]


def _has(objects: Sequence[Any], kind: type) -> bool:
    return any(isinstance(each, kind) for each in objects)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _read(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def _pass_over(file: Path) -> None:
    _note(f"{relative(file)} cannot be read and is passed over")


@rank_zero_only
def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _quieten() -> None:
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        warnings.simplefilter("ignore")  # the first rank warns of the same
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()
