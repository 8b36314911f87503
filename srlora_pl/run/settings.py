"""Settings between the config files and jsonargparse, which reads and writes them too, by rules of its own."""

import argparse
import re
from datetime import timedelta

import yaml
from jsonargparse import ArgumentParser, Namespace, set_dumper, set_loader
from jsonargparse.typing import register_type, timedelta_deserializer

from srlora_pl.run import config
from srlora_pl.util import yaml_text
from srlora_pl.util.errors import UserError


def share_yaml() -> None:
    """Let the parser read and write YAML as the files are read: what one quotes, the other must not retype."""
    set_loader("yaml", yaml_text.value, (yaml.YAMLError,))
    set_dumper("yaml", yaml_text.write)
    register_type(yaml_text.Text, fail_already_registered=False)
    register_type(timedelta, _duration, timedelta_deserializer, fail_already_registered=False)


def _duration(value: timedelta) -> str:
    """Its text; a mapping, ``trainer.max_time: {minutes: 5}``, stays one, which the parser would write as text too."""
    if not isinstance(value, timedelta):
        raise ValueError(f"{value!r} is no timedelta")
    return str(value)


def as_options(settings: config.Node, overlay: config.Node | None) -> list[str]:
    """The files' settings as two ``--config`` options: of the first method the second keeps what it also takes."""
    nodes = [settings] if settings else []
    if overlay:
        nodes.append({"model": {"init_args": {"method": overlay}}})
    return [option for node in nodes for option in ("--config", yaml_text.write(node))]


def split_revision(options: list[str]) -> tuple[list[config.Node], list[str]]:
    """A commit of ``backbone_kwargs`` as settings, and the other options: the parser reads 25921e05 as a number."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--model.backbone_kwargs.revision", "--model.init_args.backbone_kwargs.revision", dest="commit")
    try:
        known, rest = parser.parse_known_args(options)
    except argparse.ArgumentError:  # without a value, which the parser of all settings says better
        return [], options
    arguments = {"backbone_kwargs": {"revision": yaml_text.Text(known.commit)}}
    return ([{"model": {"init_args": arguments}}], rest) if known.commit else ([], options)


def forget_quotes(settings: Namespace) -> None:
    """Make each `yaml_text.Text` a common string where its setting has a type, so that nothing reads it again."""
    for key, value in vars(settings).items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Namespace):
                forget_quotes(each)
        if not isinstance(value, dict):
            setattr(settings, key, yaml_text.plain(value))


def writable(parser: ArgumentParser, settings: Namespace) -> tuple[config.Node, list[str]]:
    """What can stand in a config file, and the keys of what cannot.

    Raises:
        UserError: a class has an argument for which the parser gives no text at all.
    """
    try:
        text = parser.dump(settings, skip_none=False)
    except ValueError as error:
        what = re.search(r"cannot represent an object', (.*)\)", str(error))
        owners = re.findall(r"Namespace\(class_path='([^']+)'", str(error))
        raise UserError(
            f"{owners[0] if owners else 'a class of the settings'} has {what[1] if what else 'an argument'}, which no "
            "config.yaml can say: give it another value, or leave the class out"
        ) from error
    return config.without_unwritable(yaml_text.load(text))
