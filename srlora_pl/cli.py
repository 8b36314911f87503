"""The command line: ``python cli.py fit --config configs/quickstart.yaml``, installed as ``srlora``.

It holds what answers at once: help, subcommands, reading the config files, and turning an error that the user can mend
into one sentence. torch and Lightning are imported when a run starts.
"""

import argparse
import contextlib
import errno
import os
import sys
import traceback
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import srlora_pl
from srlora_pl.run import config, early
from srlora_pl.util.errors import START_AGAIN, WORKER_DIED, Interrupted, UserError, causes, did_you_mean, is_utf8
from srlora_pl.util.files import require_there
from srlora_pl.util.program import program, require_extra

RUNS = {
    "fit": "train, then test the best checkpoint where the test data have labels",
    "validate": "score a checkpoint on the validation split",
    "test": "score a checkpoint on the test data",
    "predict": "write the model's prediction for every sample of data.predict_root, or of the test data",
}
_EXAMPLES = """\
options of fit, validate, test and predict (--help of each lists all):
  --config FILE      settings, a file or the name of a config (see {program} configs); several are laid over each other
  --ckpt_path FILE   fit: go on from it; the others: its weights; last: the furthest of the config's newest run
  --KEY VALUE        any setting, such as --model.lr 0.01 --model.method.rank 4 --data.batch_size 32

examples:
  {program} fit --config quickstart
  {program} fit --config quickstart --config methods/lora --seed_everything 1
  {program} test --config runs/quickstart-srlora/version_0/config.yaml --ckpt_path last"""
# Loggers with errors of their own: by package the name, and another way.
_SERVICES = {
    "mlflow": ("MLflow", "or give trainer.logger.tracking_uri another place"),
    "wandb": ("W&B", "or log offline with --trainer.logger.offline true"),
}
# Of an OSError these mean the disk and not a bug: full, over quota, broken, read-only.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def main(argv: list[str] | None = None) -> int:
    """Run the command line on ``argv`` (by default the process's own arguments) and return the exit code.

    0: done. 2: something in the input is wrong, said in one sentence on stderr. 130, 143: interrupted by SIGINT, by
    SIGTERM. Errors of the program itself keep their traceback.
    """
    arguments = sys.argv[1:] if argv is None else argv
    with contextlib.suppress(AttributeError):  # no name that a run prints may end it
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        return _dispatch(arguments)
    except Interrupted as stop:
        return _say(stop.message, stop.code) if stop.message else 0
    except SystemExit as stop:  # --help and --print_config
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except Exception as error:
        if (sentence := _for_the_user(error)) is None:
            raise
        return _say(f"error: {' '.join(sentence.split())}", 2)


class _Parser(argparse.ArgumentParser):
    """Refuses options in a sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.rpartition(' ')[2]}: {message}, see {self.prog} --help")


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser of all, and that of each subcommand."""
    raw = argparse.RawDescriptionHelpFormatter
    whole = _Parser(
        program(),
        description="Fine-tuning with low-rank adapters.",
        epilog=_EXAMPLES.format(program=program()),
        formatter_class=raw,
    )
    whole.add_argument("--version", action="version", version=f"srlora_pl {srlora_pl.__version__}")
    commands = whole.add_subparsers(metavar="SUBCOMMAND", title="subcommands", parser_class=_Parser)

    def command(name: str, text: str, epilog: str = "", add_help: bool = True) -> _Parser:
        about = f"{text[0].upper()}{text[1:]}."
        return commands.add_parser(
            name, help=text, description=about, epilog=epilog, allow_abbrev=False, add_help=add_help
        )

    for name, text in RUNS.items():
        command(name, text, add_help=False).add_argument("-c", "--config", action="append", default=[])

    every = "--KEY VALUE: any setting, as of fit"
    text = "what a run needs, from its config alone: parameters, memory by part, work; and how to make it fit"
    add = command("plan", text, every).add_argument
    add("-c", "--config", action="append", default=[], help="as of fit; several are laid over each other")
    add("--memory", type=float, metavar="GB", help="of a device, by default that of this machine's GPU, or its own")
    add("--devices", type=int, default=1, help="that share the frozen weights (trainer.strategy fsdp2), by default 1")

    add = command("export", "write a checkpoint's model as plain weights, a LoRA for PEFT, or a program").add_argument
    last = "last: the furthest of the newest run of --config, without it of the run below runs/ last written to"
    add("--ckpt_path", required=True, help=f"the checkpoint of a run; {last}")
    formats = "weights in timm's or transformers' layout, a LoRA, or a program of ONNX or torch.export for a server"
    add("--format", required=True, metavar="merged|peft|onnx|pt2", help=formats)
    add("--output", required=True, help="the folder to write, new or empty")
    add("--force", action="store_true", help="write into a folder that holds files; those of other names stay")
    add(
        "--rank",
        type=int,
        help="compress the LoRA to this rank and print the error; of DyLoRA, its own model of this rank",
    )
    about = "names the model's class and its pretrained weights, several are laid over each other; by default the run's"
    add("-c", "--config", action="append", default=[], help=about)
    add("--model_card", action="store_true", help="add README.md, a model card of what the run's summary.json tells")
    add("--push_to_hub", metavar="USER/NAME", help="upload the folder, with a model card, to a repository of the hub")
    add("--private", action="store_true", help="make that repository a private one, if it is new")

    every = "--KEY VALUE: any setting but the seed and the method, for all runs, such as --data.root glue/"
    compare = command("compare", "train several methods with several seeds, and tell whether they differ", every)
    task, add = compare.add_mutually_exclusive_group(required=True).add_argument, compare.add_argument
    task("-c", "--config", action="append", default=[], help="the task; several files are laid on top of each other")
    task("--table", choices=("3", "4"), help="the tasks and methods of the paper's table")
    add("--output", required=True, help="the folder of runs and results; runs in it are gone on with, not repeated")
    add("--methods", metavar="M,M,...", help="names in configs/methods/, or overlays; by default lora,pissa,srlora")
    add("--seeds", type=int, default=5, help="runs of each method, by default 5, from the config's seed on")
    grid = "values of a setting to choose from, by validation of the first seed; M.KEY=... are those of the method M"
    add("--grid", action="extend", nargs="+", default=[], metavar="KEY=VALUE,VALUE,...", help=grid)
    add("--dry-run", action="store_true", help="list the runs, estimate the time, and stop")

    add = command("grade", "grade the answers in a run's predictions.jsonl again, without the model").add_argument
    add("predictions", metavar="FILE", help="a predictions.jsonl")
    add("--grader", metavar="NAME", help="gsm8k, math, options or exact; by default the one that the file names")
    about = "how math compares: normalised strings, or the package math-verify; by default hendrycks"
    add("--math_grader", choices=("hendrycks", "math_verify"), default="hendrycks", help=about)

    add = command("configs", "list the configs that come with this package, or copy them").add_argument
    add("--to", metavar="DIR", help="copy them into this folder, over no file that is there")

    written = "Each figure is written as PNG and SVG, and the data behind it as CSV."
    text = "draw a run's training loss, and which singular directions were active when"
    add = command("figures", text, written).add_argument
    add("--run", required=True, action="append", help="a run's folder; the losses of several are drawn into one figure")
    add(
        "--layer", type=int, metavar="N", help="the layer whose directions are drawn, from 0; by default the middle one"
    )
    add("--output", help="where to write, by default figures/ in the run's folder")
    return whole, commands.choices


def _dispatch(arguments: list[str]) -> int:
    whole, parsers = _parsers()
    if not arguments:
        whole.print_help()
        return 2
    if arguments[0] in ("-h", "--help", "--version"):
        whole.parse_args(arguments)
    command, *options = arguments
    if command not in parsers:
        near = did_you_mean(command, parsers)
        raise UserError(f"unknown subcommand {command!r}{near}: it is one of {', '.join(parsers)}")
    given, settings = parsers[command].parse_known_args(options)
    if command in RUNS or command == "plan":
        _require_utf8(settings)
        files = [config.find(name) for name in given.config]
        contents = [config.read(file) for file in files]
        early.check(files, contents, settings)
        if command == "plan":
            from srlora_pl.planning.command import plan

            print("\n".join(plan(given, files, contents, settings)))
            return 0

        from srlora_pl.run.run import Run

        Run(command, files, contents, settings).start()
        return 0
    if command == "compare":
        require_extra("figures", "scipy", "compare")
        early.check_comparison(given.config, given.methods)

        from srlora_pl.comparison.command import compare

        return compare(given, settings)
    if settings:
        parsers[command].error(f"unrecognized arguments: {' '.join(settings)}")
    if command == "configs":
        print("\n".join(config.copy_to(Path(given.to)) if given.to else config.overview()))
    elif command == "grade":
        require_there("predictions", Path(given.predictions))

        from srlora_pl.data.graders.predictions import report

        print(report(Path(given.predictions), given.grader, given.math_grader))
    elif command == "export":
        if given.ckpt_path != "last":
            require_there("--ckpt_path", Path(given.ckpt_path))

        from srlora_pl.export.command import export

        print("\n".join(export(given)))
    else:
        require_extra("figures", "matplotlib", "figures")
        for folder in given.run:
            require_there("--run", Path(folder))

        from srlora_pl.figures.runs import draw_runs

        print("\n".join(draw_runs(given.run, given.output, given.layer)))
    return 0


def _require_utf8(options: list[str]) -> None:
    """Refuse a name that neither settings nor torch's files can have; the predictions may have any."""
    for before, option in pairwise(("", *options)):
        if "--output" not in (before, option.partition("=")[0]) and not is_utf8(option):
            raise UserError(f"{option!r} on the command line is not UTF-8: rename the file or folder")


def _for_the_user(error: BaseException) -> str | None:
    """The sentence for a user who caused ``error``, or None for a bug.

    jsonargparse wraps the errors of classes, so the causes are looked at too. Lightning refuses settings with
    MisconfigurationException, ValueError and RuntimeError alike; the last two from anywhere else are bugs.
    """
    if isinstance(error, UserError):
        return str(error)
    if disk := next((each for each in causes(error) if isinstance(each, OSError) and each.errno in _DISK), None):
        name = os.fsdecode(disk.filename) if disk.filename else "a file"
        return f"{name} could not be written ({disk.strerror}): see to the disk, {START_AGAIN}"
    for each in causes(error):
        if service := _SERVICES.get(type(each).__module__.partition(".")[0]):
            return f"{service[0]} refuses: {str(each).strip(' .')}; {service[1]}"
    if isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error):  # raised at any line, by a signal
        return WORKER_DIED
    raised_in = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)][-1:]
    refused = type(error) in (ValueError, RuntimeError) and any(name.startswith("lightning.") for name in raised_in)
    if refused or type(error).__name__ == "MisconfigurationException":
        return f"Lightning refuses these settings: {error}"
    return _for_the_user(error.__cause__) if error.__cause__ else None


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code
