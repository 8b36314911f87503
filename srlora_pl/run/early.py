"""What is refused at once, before torch, Lightning and the networks are imported, which takes seconds."""

from collections.abc import Sequence
from pathlib import Path

import srlora_pl
from srlora_pl.run import config, settings, source
from srlora_pl.run.explain import NO_CONFIG, unknown
from srlora_pl.util.errors import UserError
from srlora_pl.util.files import require_there
from srlora_pl.util.program import require_extra

_TOP = ("model", "data", "trainer", "seed_everything", "ckpt_path", "name", "output", "config", "print_config", "help")
_TRAINER = "srlora_pl.run.trainer.Trainer"
# Of any class, beside its arguments.
_FORM = ("class_path", "init_args", "dict_kwargs", "help")
# Options that make sense without a config.
_WITHOUT_CONFIG = ("-h", "--help", "--print_config", "--model", "--data")
_PLACES = ("ckpt_path", "data.predict_root", "model.backbone_checkpoint")


def check(files: Sequence[str], contents: Sequence[config.Node], options: list[str]) -> None:
    """Refuse a run without a config, classes without their extra, unknown settings, and files that are not there.

    Nothing is said of what only an import can tell, such as the arguments of a class whose source is not at hand.

    Args:
        files: names of the config files, in order.
        contents: their settings, as `config.read` returns them.
        options: the rest of the command line.
    """
    if not (files or any(word.startswith(_WITHOUT_CONFIG) for word in options)):
        raise UserError(NO_CONFIG)
    typed, rest = settings.split_options(options) if any(map(config.model_class, contents)) else ({}, options)
    given, foreign = config.combine([*contents, typed])
    if config.beside_class_path(given):
        return
    classes = config.classes(given)
    for path in classes.values():
        srlora_pl.require_extra_of(path)
    _refuse_unknown(given, {"trainer": _TRAINER} | classes, foreign, files, rest)
    if settings.value("model.weights", given, rest) == "nf4":
        require_extra("nf4", "bitsandbytes", "model.weights nf4")
    for key in _PLACES:
        if (place := settings.value(key, given, rest)) and not (key == "ckpt_path" and place == "last"):
            require_there(key if "." in key else f"--{key}", Path(place))


def check_comparison(files: Sequence[str], methods: str | None) -> None:
    """Refuse config files and overlays of methods that are not there."""
    config.combine([config.read(file) for file in files])
    if methods:
        config.overlays(methods.split(","))


def _refuse_unknown(
    given: config.Node, classes: dict[str, str], foreign: set[str], files: Sequence[str], options: Sequence[str]
) -> None:
    typed = [word[2:].partition("=")[0].rstrip("+").replace("init_args.", "") for word in options if word[:2] == "--"]
    named_anew = {key.removesuffix(".class_path") for key in typed}  # such as --data or --model.class_path
    arguments = {part: source.arguments(path) for part, path in classes.items() if part not in named_anew}
    known = [*_TOP, *(f"{part}.{name}" for part, names in arguments.items() for name in names or ())]
    for key in (*config.keys(given), *typed):
        first, *rest = key.split(".")
        part = "model.method" if (first, rest[:1]) == ("model", ["method"]) and rest[1:] else first
        name = key.removeprefix(f"{part}.").partition(".")[0]
        takes = _TOP if name == key else (*_FORM, *foreign, *(arguments.get(part) or [name]))
        if first not in _TOP or name not in takes:
            owner = [classes[part]] if part in classes and part != "trainer" else []
            raise UserError(unknown(key, owner, known, files, options))
