"""One run of the command line: LightningCLI with this package's defaults, folders and closing words."""

import argparse
import contextlib
import shlex
import time
from collections.abc import Sequence
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, get_args

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from srlora_pl.data.base import DataModule
from srlora_pl.data.texts.glue import GLUEData
from srlora_pl.reporting import MatrixTable, ResumableCurves, Summary
from srlora_pl.reporting.progress import closing_line
from srlora_pl.reporting.samples import SampleAnswers
from srlora_pl.run import config, defaults, finders, folders, loggers, settings
from srlora_pl.run.explain import explain, missing_package, written_at
from srlora_pl.run.help import SHOWN, own_settings
from srlora_pl.run.messages import close, note, quieten
from srlora_pl.run.processes import ending_together
from srlora_pl.run.trainer import Trainer
from srlora_pl.tasks.base import Task
from srlora_pl.training import checkpoints
from srlora_pl.training import lightning_internals as internals
from srlora_pl.training.interrupts import Interrupts
from srlora_pl.training.mixin import refuse_copies
from srlora_pl.util import system, yaml_text
from srlora_pl.util.errors import Interrupted, UserError, causes
from srlora_pl.util.files import alone_in, relative
from srlora_pl.util.program import program
from srlora_pl.util.signatures import class_at

TRAINER_DEFAULTS = {
    "default_root_dir": folders.ROOT,
    # The DataModules deal their order out to the devices themselves, so that a resumed run finds its place.
    "use_distributed_sampler": False,
}


class Run(LightningCLI):
    """A subcommand on parsed settings; a setting or a checkpoint that is wrong is refused here.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        files: names of the config files, in order.
        contents: their settings, as `config.read` returns them.
        options: the rest of the command line; it rules over the files.
    """

    def __init__(self, command: str, files: Sequence[str], contents: Sequence[config.Node], options: list[str]) -> None:
        self.command, self.files, self.options = command, files, options
        self.words = shlex.join([*files, *options])  # tells this run from others of a job of SLURM
        typed, rest = settings.split_options(options) if any(map(config.model_class, contents)) else ({}, options)
        self.given, foreign = config.combine([*contents, typed])
        self.dropped, rest = settings.drop_arguments(foreign, rest)
        self.given, rest = loggers.resumable(self.given, rest)
        self.folder: Path | None = None
        self.is_new = False
        quieten()
        settings.share_yaml()
        super().__init__(
            Task,
            DataModule,
            trainer_class=Trainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            save_config_callback=None,
            auto_configure_optimizers=False,
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False, "prog": f"{program()} {command}"},
            args=rest,
            # Without subcommands of its own LightningCLI leaves the checkpoint's hyperparameters alone; with
            # them they would overrule the command line.
            run=False,
        )

    # -- settings

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        model = config.model_class(self.given)
        if not model or "num_classes" in (config.arguments_of(model) or ["num_classes"]):
            parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")
        parser.add_argument("--ckpt_path", type=str | None, help="The checkpoint to go on from, or to use.")
        parser.add_argument("--name", type=str, help="Of the run; by default that of the config file.")
        if self.command == "predict":
            parser.add_argument("--output", type=str | None, help="The CSV, or GLUE's folder; by default the run's.")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        if {"-h", "--help"} & set(self.options):
            parser.print_help()
            print(*own_settings(SHOWN | config.classes(self.given)), sep="\n")
            raise SystemExit(0)
        if key := config.beside_class_path(self.given):
            place = written_at(key, self.files, self.options)
            raise UserError(f"{place} stands beside class_path, it belongs below init_args")
        try:
            self.config = settings.parse(parser, self.given, args)  # type: ignore[arg-type]
        except argparse.ArgumentError as error:
            known = [*(action.dest for action in parser._actions), *config.keys(self.given)]
            raise UserError(explain(str(error), known, self.files, self.options)) from error
        self._check_arguments()
        # Neither belongs to the settings that a run keeps: a second use of its config.yaml starts anew.
        self.ckpt_path = self.config.pop("ckpt_path")
        self.output = self.config.pop("output", None)
        self.config.name = self.config.name or (Path(self.files[0]).stem if self.files else "run")
        if Path(self.config.name).name != self.config.name:
            raise UserError(
                f"--name {self.config.name!r} must be a plain name without folders, trainer.default_root_dir is the "
                "place for them"
            )
        if self.dropped:
            method = self.config.model.init_args.method.class_path
            note(f"{method} takes no {', '.join(self.dropped)}: dropped")
        self._choose_checkpoint()
        if self.ckpt_path:
            self._read_checkpoint(Path(self.ckpt_path))
            if self.output:
                defaults.require_not_read(Path(self.output), self.config.data.init_args)
        elif self.command == "predict":
            raise UserError("predict needs --ckpt_path, the checkpoint of a finished run")
        elif self.command != "fit":
            note(f"without --ckpt_path, {self.command} scores the untrained model")

    def _check_arguments(self) -> None:
        """Refuse values that jsonargparse lets pass, such as an empty one, ``lr:``, where there is a default."""
        if (count := self.config.model.init_args.get("num_classes")) is not None:
            raise UserError(f"model.num_classes {count} is not for you to set, it comes from the data: leave it out")
        for part in ("model", "data"):
            homes = reversed(class_at(self.config[part].class_path).__mro__)
            parameters = {key: each for home in homes for key, each in signature(home.__init__).parameters.items()}
            for key, value in vars(self.config[part].init_args).items():
                known = parameters.get(key)
                if value is not None or not known or known.default in (None, Parameter.empty):
                    continue
                if type(None) not in get_args(known.annotation):
                    place = written_at(f"{part}.{key}", self.files, self.options)
                    raise UserError(f"{place} is null: give it a value, or leave it out for {known.default!r}")

    # -- the run's folder and checkpoint

    @property
    def root(self) -> Path:
        """Where the config's runs are."""
        method = self.config.model.init_args.method.class_path
        return folders.root_of(self.config.trainer.default_root_dir, self.config.name, method)

    def _choose_checkpoint(self) -> None:
        """Fill in a ``ckpt_path`` that was left to this program: ``last``, and that of a job that SLURM restarts."""
        if self.command == "fit" and not self.config.trainer.fast_dev_run:
            self.folder = folders.requeued(self.root, self.words)
        if not self.folder and self.ckpt_path != "last":
            return
        asked = "the requeued job" if self.folder else "--ckpt_path last"
        places = [self.folder] if self.folder else folders.own_or_all(next(iter(self.files), None), self.root)
        found = folders.furthest_checkpoint(places, checkpoints.resumes if self.command == "fit" else None)
        if found:
            self.ckpt_path = str(found[0])
            note(f"{asked} takes {relative(found[0])}, step {found[1]}")
        elif self.ckpt_path != "last":  # requeued before its first checkpoint
            note(f"{asked} starts from {self.ckpt_path or 'the beginning'} again")
        elif self.command == "fit":
            self.ckpt_path = None
            note(f"{asked} finds no checkpoint in {relative(self.folder or self.root)}, the run begins anew")
        else:
            raise UserError(f"--ckpt_path last finds no checkpoint in {self.root}, run fit first or give a file")

    def _read_checkpoint(self, path: Path) -> None:
        content = checkpoints.read(path)
        if self.command == "fit" and "optimizer_states" not in content:
            raise UserError(
                f"--ckpt_path {path} holds weights alone (save_weights_only), so that no run can go on from it: give "
                "another file, such as last.ckpt"
            )
        data = self.config.data.init_args
        trained = config.data_setting(folders.folder_of(path), "template")
        if self.command != "fit" and trained not in (None, data.get("template")):
            note(f"data.template is {data.get('template')!r}, but the run was trained with {trained!r}")
        # To predict the user's own samples the data of the training are not needed.
        if self.command == "predict" and data.get("predict_root") and "class_names" in data:
            data.class_names = data.class_names or checkpoints.class_names(content)

    def _choose_folder(self) -> None:
        """The folder of the run that ``ckpt_path`` belongs to, or a new one."""
        folder = self.folder or (folders.folder_of(Path(self.ckpt_path)) if self.ckpt_path else None)
        self.is_new = folder is None
        if folder:
            self._take_name_of(folder)
        self.folder = folder or folders.new_version(self.root)
        if self.is_new and self.ckpt_path:
            place = relative(self.folder)
            note(f"{relative(self.ckpt_path)} lies in no run's folder, the run in {place} goes on from it")
        folders.remember_job(self.folder, self.words)

    def _take_name_of(self, folder: Path) -> None:
        """A run keeps its name, so that its ``config.yaml`` leads to its own folder."""
        method = self.root.name.removeprefix(self.config.name)
        name = folder.parent.name.removesuffix(method)
        if folder.parent.name.endswith(method) and name not in ("", self.config.name):
            note(f"the run in {relative(folder)} keeps its name, {name}")
            self.config.name = name

    def _settings_text(self, folder: Path) -> str:
        """The text of the run's ``config.yaml``; notes what it cannot hold, and what has changed in it."""
        content, left_out = settings.writable(self.parser, self.config)
        if left_out:
            note(f"config.yaml has no way to say {', '.join(left_out)}, and leaves it out")
        text = yaml_text.write(content)
        # A run may go on with more epochs or in another precision, but not unnoticed.
        with contextlib.suppress(UserError):  # there is none, or it is broken
            if changed := config.changes(config.read(str(folder / "config.yaml")), yaml_text.load(text)):
                note(f"other settings than the run had so far: {', '.join(changed)}")
        return text

    def _discard_folder(self) -> None:
        """A run that never took a step leaves nothing behind."""
        if self.folder and self.is_new:
            folders.discard(self.folder)

    # -- the objects

    def before_instantiate_classes(self) -> None:
        # A task takes only a class that is imported: a class that a checkpoint names must not run, one that the
        # config names may.
        module = str(self.config.model.init_args.get("optimizer")).rpartition(".")[0]
        with contextlib.suppress(ImportError, ValueError):
            import_module(module)

    def instantiate_classes(self) -> None:
        try:
            self._use_finders()
            super().instantiate_classes()
        except Exception as error:
            said = any(isinstance(each, UserError) for each in causes(error))
            if not said and (missing := missing_package(str(error))):
                raise UserError(missing) from error
            raise

    def _use_finders(self) -> None:
        """Let the user's finders search before the run, or take what they found when it began."""
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
            part = self.config[finder.part].init_args
            part[finder.key] = found or part[finder.key]
            note(f"{finder.name}: the run has {finder.part}.{finder.key} {part[finder.key]}")

    def _search(self, finder: finders.Finder) -> Any:
        before = self.config.clone()
        self.config.trainer.callbacks, self.config.trainer.logger = None, False
        self.config_init = self.parser.instantiate_classes(self.config)
        make_trainer = super().instantiate_trainer
        found = finder.search(make_trainer, self.config_init.model, self.config_init.data)
        # The run itself begins as if the value had been given: from the seed, and with new objects.
        self.config = before
        del self.config_dump
        internals.seed_again(self)
        return found

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        given = self.config_init.trainer
        users = defaults.as_list(given.callbacks)
        if self.command == "fit":
            defaults.refuse_unfit(users)
        if self.command == "fit" and not given.fast_dev_run:
            self._choose_folder()
            # Beside its name this tells Lightning where SLURM's checkpoints are.
            kwargs |= {"default_root_dir": self.folder, "plugins": defaults.plugins(given)}
        kwargs["logger"] = self.command != "predict" and loggers.of_run(given.logger, self.folder)
        own = self._own_callbacks()
        kwargs["callbacks"] = defaults.with_defaults(own, users, given, self.folder, self.command == "fit")
        if defaults.has(kwargs["callbacks"], MatrixTable):
            kwargs["enable_model_summary"] = False  # it says the same, layer by layer
        try:
            trainer = super().instantiate_trainer(**kwargs)
            refuse_copies(trainer.strategy)
        except Exception:
            self._discard_folder()
            raise
        if trainer.strategy.root_device.type == "cpu":
            system.keep_freed_memory()
        if str(given.precision) in ("16", "16-mixed") and trainer.precision == "bf16-mixed":
            note("16-mixed needs a GPU, on this CPU the run uses bf16-mixed")
        return trainer

    def _own_callbacks(self) -> list[Any]:
        """The callbacks that are no choice of the user; interrupts come before anything of the next step."""
        saves = self.folder if self.config_init.trainer.enable_checkpointing is not False else None
        self.interrupts = Interrupts(saves, Path(self.ckpt_path) if self.ckpt_path else None)
        if self.model.generates and not self.config_init.trainer.fast_dev_run:
            self.model.answers = self._answers_file()
        elif self.command == "predict":
            is_glue = isinstance(self.datamodule, GLUEData)
            self.writer = defaults.prediction_writer(Path(self.ckpt_path), self.output, is_glue)
            return [self.interrupts, self.writer]
        if self.folder is None:
            return [self.interrupts]
        self.summary = Summary(self.folder)
        writes = defaults.WriteSettings(self.folder / "config.yaml", self._settings_text(self.folder))
        samples = [SampleAnswers(self.folder / "samples.jsonl")] if self.model.generates else []
        return [self.interrupts, ResumableCurves(), writes, loggers.RememberIds(self.folder), self.summary, *samples]

    def _answers_file(self) -> Path:
        """Where the texts go that a model generates: to the run's folder, unless ``--output`` says otherwise."""
        if self.command == "predict":
            return defaults.prediction_file(Path(self.ckpt_path), self.output, "completions.jsonl")
        home = Path(self.ckpt_path) if self.ckpt_path else None
        folder = self.folder or (home and (folders.folder_of(home) or home.parent)) or self.root / "untrained"
        return folder / "predictions.jsonl"

    # -- subcommands

    def start(self) -> None:
        """Run the subcommand."""
        with self.interrupts.watch(self.trainer), ending_together(self.trainer):
            if self.command == "fit":
                self.fit()
            elif self.command == "predict":
                self.predict()
            else:
                close(self._evaluate(self.command, self.ckpt_path), [f"weights: {self.ckpt_path or 'untrained'}"])

    def fit(self) -> None:
        if self.folder is None or rank_zero_only.rank:  # type: ignore[attr-defined]
            self._fit()
            return
        with alone_in(self.folder):
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
        best = self._best()
        scores = self._scores("val")
        if self.datamodule.has_test_labels and self.model.generates and self.model.is_sharded:
            note("fsdp2 generates no answers: run `srlora test` with the checkpoint, on one device or with ddp")
        elif self.datamodule.has_test_labels:
            scores = self._evaluate("test", best.get("checkpoint"))
        if self.folder and self.trainer.is_global_zero:
            self.summary.write(self.trainer, self.model, scores, best)
        which = "no checkpoint was chosen by validation, the scores are those of the last weights"
        if best:
            which = f"best checkpoint: {best['checkpoint']} ({best['monitor']} {best['value']:.4f})"
        where = f"run written to {relative(self.folder)}" if self.folder else "fast_dev_run: nothing written"
        close(scores, [took, which, where])

    def _best(self) -> dict[str, Any]:
        """The checkpoint that validation chose, and how; empty if none was."""
        choosing: list[Any] = [each for each in self.trainer.checkpoint_callbacks if getattr(each, "monitor", None)]
        if not (choosing and choosing[0].best_model_path):
            return {}
        chosen = choosing[0]
        value, file = float(chosen.best_model_score), str(relative(chosen.best_model_path))
        return {"monitor": chosen.monitor, "mode": chosen.mode, "value": value, "checkpoint": file}

    def _evaluate(self, command: str, checkpoint: str | None) -> dict[str, float]:
        evaluate = getattr(self.trainer, command)
        evaluate(self.model, datamodule=self.datamodule, ckpt_path=checkpoint, weights_only=True, verbose=False)
        return self._scores("test" if command == "test" else "val")

    def _scores(self, stage: str) -> dict[str, float]:
        splits = (f"{stage}/", f"{stage}_")
        return {k: float(v) for k, v in self.trainer.callback_metrics.items() if k.startswith(splits)}

    def predict(self) -> None:
        self.trainer.predict(
            self.model,
            datamodule=self.datamodule,
            ckpt_path=self.ckpt_path,
            weights_only=True,
            return_predictions=False,
        )
        if self.model.generates:
            count, files = self.model.answers.read_bytes().count(b"\n"), str(relative(self.model.answers))
        else:
            count, files = self.writer.rows, " and ".join(str(relative(file)) for file in self.writer.files)
        whole = sum(map(len, defaults.as_list(self.datamodule.predict_set)))
        part = f" of {whole}" if count < whole else ""
        close({}, [f"{count}{part} predictions written to {files}"])
