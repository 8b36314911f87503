"""The command line: ``python cli.py fit --config configs/quickstart.yaml``, also installed as ``srlora``.

Only what answers at once lives here: help, subcommands, reading the config files, and turning an error that the
user can mend into one sentence. torch and Lightning are imported when a run is really asked for.
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

from srlora_pl.run import config
from srlora_pl.util.errors import START_AGAIN, WORKER_DIED, Interrupted, UserError, causes, did_you_mean, is_utf8

COMMANDS = {
    "fit": "train, then test the best checkpoint where the test data have labels",
    "validate": "score a checkpoint on the validation split",
    "test": "score a checkpoint on the test data",
    "predict": "write what the model says of every sample of data.predict_root, or of the test data",
    "export": "write a checkpoint's model as plain weights, or as a LoRA for PEFT, that load without this package",
    "compare": "train several methods with several seeds, and tell whether they differ",
    "figures": "draw a run's training loss, and which singular directions were active when",
}
EXPORT_HELP = """usage: python cli.py export --ckpt_path FILE --format merged|peft --output FOLDER
                            [--rank R] [--force] [--config FILE]

options:
  --ckpt_path FILE     the checkpoint of a run
  --format merged      plain weights in timm's or transformers' own layout (with the tokenizer)
  --format peft        a LoRA on the pretrained weights, which PeftModel.from_pretrained loads; exact, or
  --rank R             compressed to rank R, and the error is printed
  --output FOLDER      where to write: a new or empty folder, or with
  --force              one that holds files; those of other names stay
  --config FILE        names the model's class and the places of its pretrained weights; by default the run's own"""

COMPARE_HELP = """usage: python cli.py compare --config FILE --output FOLDER [--methods M,M,...] [--seeds N]
                             [--grid KEY=VALUE,VALUE,... ...] [--dry-run] [--KEY VALUE ...]
       python cli.py compare --table 3|4 --output FOLDER [...]

options:
  -c, --config FILE    the task; several files are laid on top of each other
  --table 3|4          the tasks and methods of the paper's table instead
  --output FOLDER      where runs and results go; finished runs in it are not repeated, others go on
  --methods M,M,...    files of configs/methods/ by name, or paths of overlays; by default lora,pissa,srlora
  --seeds N            runs of each method, by default 5, with the seeds from the config's own on
  --grid KEY=V,V,...   settings to choose among for each method, by validation of the first seed; may be repeated
  --dry-run            list the runs, estimate the time, and stop
  --KEY VALUE          any setting but the seed and the method, for all runs, such as --data.root glue/"""

FIGURES_HELP = """usage: python cli.py figures --run FOLDER [--run FOLDER ...] [--layer N] [--output FOLDER]

options:
  --run FOLDER         a run's own folder, such as runs/quickstart-srlora/version_0; the training losses of several
                       are drawn into one figure
  --layer N            the layer whose directions are drawn, counted from 0; by default the middle one
  --output FOLDER      where to write, files of the same names are replaced; by default figures/ in the run's folder

Each figure is written as PNG and SVG, and the data behind it as CSV."""

HELP = f"""usage: python cli.py SUBCOMMAND --config configs/NAME.yaml [--config configs/methods/METHOD.yaml]
                     [--ckpt_path FILE] [--KEY VALUE ...]

subcommands:
{chr(10).join(f"  {name:<10}{text}" for name, text in COMMANDS.items())}

options of every subcommand (but export, compare and figures, see their --help):
  -c, --config FILE    settings; several files are laid on top of each other
  --ckpt_path FILE     fit: go on from here; validate, test, predict: the weights to use;
                       last: the furthest readable file of the config's newest run
  --name NAME          fit: the run's folder is runs/NAME-METHOD, by default named after the config
  --output PLACE       predict: where the predictions go, by default the checkpoint's run
  --KEY VALUE          any setting, such as --model.lr 0.01 --model.method.rank 4 --data.batch_size 32
  --print_config       print all settings, and stop
  --help               every setting of the trainer, and how to list a class's own

examples:
  python cli.py fit --config configs/quickstart.yaml
  python cli.py fit --config configs/quickstart.yaml --config configs/methods/lora.yaml --seed_everything 1
  python cli.py test --config runs/quickstart-srlora/version_0/config.yaml \\
                     --ckpt_path runs/quickstart-srlora/version_0/checkpoints/last.ckpt"""

# Of an OSError these mean the disk and not a bug: full, over quota, broken, read-only.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def main(argv: list[str] | None = None) -> int:
    """Run the command line on ``argv`` (by default the process's own arguments) and return the exit code.

    0: done. 2: something in the input is wrong, said in one sentence on stderr. 130, 143: interrupted by SIGINT, by
    SIGTERM. Errors of the program itself keep their traceback.
    """
    arguments = sys.argv[1:] if argv is None else argv
    with contextlib.suppress(AttributeError):  # whatever names a run is to tell must not end it
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


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0 if arguments else 2
    command, *options = arguments
    if command not in COMMANDS:
        near = did_you_mean(command, COMMANDS)
        raise UserError(f"unknown subcommand {command!r}{near}: it is one of {', '.join(COMMANDS)}")
    if command == "export":
        return _export(options)
    if command == "compare":
        return _compare(options)
    if command == "figures":
        return _figures(options)
    files, options = _split_configs(options)
    _require_utf8(options)
    contents = [config.read(file) for file in files]

    from srlora_pl.run.run import Run

    Run(command, files, contents, options).start()
    return 0


def _require_utf8(options: list[str]) -> None:
    """Refuse a name that neither settings nor torch's files can have; that of the predictions is free."""
    for before, option in pairwise(("", *options)):
        if "--output" not in (before, option.partition("=")[0]) and not is_utf8(option):
            raise UserError(f"{option!r} on the command line is not UTF-8: rename the file or folder")


class _Options(argparse.ArgumentParser):
    """Those of a subcommand that starts no run."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=command, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}, see python cli.py {self.prog} --help")


def _export(options: list[str]) -> int:
    if {"-h", "--help"} & set(options):
        print(EXPORT_HELP)
        return 0
    parser = _Options("export")
    for name in ("--ckpt_path", "--format", "--output"):
        parser.add_argument(name, required=True)
    parser.add_argument("-c", "--config")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--force", action="store_true")
    given = parser.parse_args(options)
    if given.config:
        config.read(given.config)

    from srlora_pl.export.command import export_checkpoint

    report = export_checkpoint(given.ckpt_path, given.format, given.output, given.rank, given.force, given.config)
    print("\n".join(report.lines()))
    return 0


def _compare(options: list[str]) -> int:
    if {"-h", "--help"} & set(options):
        print(COMPARE_HELP)
        return 0
    parser = _Options("compare")
    parser.add_argument("-c", "--config", action="append", default=[])
    parser.add_argument("--output", required=True)
    parser.add_argument("--grid", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods")
    parser.add_argument("--table")
    parser.add_argument("--dry-run", action="store_true")
    given, settings = parser.parse_known_args(options)
    for file in given.config:
        config.read(file)

    from srlora_pl.comparison.command import compare

    return compare(given, settings)


def _figures(options: list[str]) -> int:
    if {"-h", "--help"} & set(options):
        print(FIGURES_HELP)
        return 0
    parser = _Options("figures")
    parser.add_argument("--run", required=True, action="append")
    parser.add_argument("--layer", type=int)
    parser.add_argument("--output")
    given = parser.parse_args(options)

    from srlora_pl.figures.runs import draw_runs

    print("\n".join(draw_runs(given.run, given.output, given.layer)))
    return 0


def _split_configs(options: list[str]) -> tuple[list[str], list[str]]:
    """The values of ``--config``, and everything else as it was."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    try:
        known, rest = parser.parse_known_args(options)
    except argparse.ArgumentError as error:
        raise UserError("--config needs the name of a file") from error
    return known.config, rest


def _for_the_user(error: BaseException) -> str | None:
    """What to tell the user who caused ``error``, or None for a bug.

    jsonargparse wraps what a class raises, so the causes are looked at too. Lightning refuses settings with
    MisconfigurationException, ValueError and RuntimeError alike; the last two from anywhere else are bugs.
    """
    if isinstance(error, UserError):
        return str(error)
    if disk := next((each for each in causes(error) if isinstance(each, OSError) and each.errno in _DISK), None):
        name = os.fsdecode(disk.filename) if disk.filename else "a file"
        return f"{name} could not be written ({disk.strerror}): see to the disk, {START_AGAIN}"
    if isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error):  # raised at any line, by a signal
        return WORKER_DIED
    misconfigured = type(error).__name__ == "MisconfigurationException"
    if misconfigured or (type(error) in (ValueError, RuntimeError) and _comes_from_lightning(error)):
        return f"Lightning refuses these settings: {error}"
    return _for_the_user(error.__cause__) if error.__cause__ else None


def _comes_from_lightning(error: BaseException) -> bool:
    lightning = sys.modules.get("lightning")
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or lightning is None or lightning.__file__ is None:
        return False
    return Path(frames[-1].filename).is_relative_to(Path(lightning.__file__).parent)


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code
