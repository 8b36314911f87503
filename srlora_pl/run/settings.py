"""Settings on their way into jsonargparse, from files and the command line, and back into a run's ``config.yaml``.

jsonargparse reads text as YAML again wherever any value may stand, at each of its stages: ``revision: "25921e05"``
would end as a number. It leaves other types than ``str`` alone, so that text in quotes is a `yaml_text.Text` until the
objects are made.
"""

import argparse
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, set_dumper, set_loader
from jsonargparse.typing import register_type, timedelta_deserializer

from srlora_pl.run import config
from srlora_pl.util import yaml_text


def share_yaml() -> None:
    """Let jsonargparse read and write YAML as config files are read and written."""
    set_loader("yaml", yaml_text.value, (yaml.YAMLError,))
    set_dumper("yaml", yaml_text.write)
    register_type(yaml_text.Text, fail_already_registered=False)
    register_type(timedelta, _duration, timedelta_deserializer, fail_already_registered=False)


def _duration(value: timedelta) -> str:
    """Its text; a mapping, ``trainer.max_time: {minutes: 5}``, stays one, which jsonargparse would write as text."""
    if not isinstance(value, timedelta):
        raise ValueError(f"{value!r} is no timedelta")
    return str(value)


def parse(parser: ArgumentParser, settings: config.Node, options: list[str]) -> Namespace:
    """The config files' ``settings`` and, over them, the command line; an ``ArgumentError`` names a wrong one."""
    parsed = parser.parse_args(options, namespace=_as_namespace(settings, top=True))
    _without_marks(parsed)
    return parsed


def _as_namespace(node: config.Node, top: bool = False) -> Namespace:
    """The settings of objects as jsonargparse holds them; other mappings are values."""
    namespace = Namespace()
    for key, value in node.items():
        holds = isinstance(value, dict) and (top or key == "init_args" or "class_path" in value)
        setattr(namespace, key, _as_namespace(value) if holds else value)
    return namespace


def _without_marks(settings: Namespace) -> None:
    """Make each `yaml_text.Text` a common string, but in free mappings, which are read again."""
    for key, value in vars(settings).items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Namespace):
                _without_marks(each)
        if not isinstance(value, dict):
            setattr(settings, key, yaml_text.plain(value))


def split_options(options: list[str]) -> tuple[config.Node, list[str]]:
    """The method, a commit and a template on the command line as a config file's content, and the other options.

    The method follows the rule of overlays, see `config.combine`; jsonargparse reads a commit such as 25921e05 as a
    number, and a template such as ``Q: {question}`` as a mapping. In a template ``\\n`` is a line break, as shells
    hand it on.
    """
    method = {f"--model.{form}method{end}": "method" for form in ("", "init_args.") for end in ("", ".class_path")}
    revision = {f"--model.{form}backbone_kwargs.revision": "revision" for form in ("", "init_args.")}
    template = {f"--data.{form}template": "template" for form in ("", "init_args.")}
    given, rest = _taken(options, method | revision | template)
    arguments: config.Node = {}
    if "method" in given:
        value = yaml_text.value(given["method"])
        arguments["method"] = value if isinstance(value, dict) else {"class_path": given["method"]}
    if "revision" in given:
        arguments["backbone_kwargs"] = {"revision": yaml_text.Text(given["revision"])}
    content: config.Node = {"model": {"init_args": arguments}} if arguments else {}
    if "template" in given:
        content["data"] = {"init_args": {"template": yaml_text.Text(given["template"].replace("\\n", "\n"))}}
    return content, rest


def drop_arguments(names: Iterable[str], options: list[str]) -> tuple[list[str], list[str]]:
    """Which of the method's arguments ``names`` the options give, and the options without them."""
    forms = ("--model.method.", "--model.init_args.method.")
    ways = [f"{form}{below}" for form in forms for below in ("", "init_args.")]
    given, rest = _taken(options, {f"{way}{name}": name for name in names for way in ways})
    return sorted(given), rest


def value(key: str, given: config.Node, options: list[str]) -> str | None:
    """The text of the setting ``key`` on the command line, or else in the config files' settings ``given``."""
    forms = (f"--{key}", f"--{key.replace('.', '.init_args.', 1)}")
    taken, _ = _taken(options, dict.fromkeys(forms, "value"))
    node: Any = given
    for word in key.split("."):
        node = node.get("init_args") or node if isinstance(node, dict) else {}
        node = node.get(word) if isinstance(node, dict) else None
    found = taken.get("value", node)
    return found if isinstance(found, str) and found not in ("", "null") else None


def _taken(options: list[str], names: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """The values of the options that ``names`` has, by their second names, and all other options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option, name in names.items():
        parser.add_argument(option, dest=name, default=argparse.SUPPRESS)
    try:
        known, rest = parser.parse_known_args(options)
    except argparse.ArgumentError:  # without a value, which jsonargparse says of all options
        return {}, options
    return vars(known), rest


def writable(parser: ArgumentParser, settings: Namespace) -> tuple[config.Node, list[str]]:
    """The settings that a config file can hold, and the keys of the others."""
    return _without_unwritable(yaml_text.load(parser.dump(settings, skip_none=False)))


def _without_unwritable(node: Any, key: str = "") -> tuple[Any, list[str]]:
    """``node`` without what jsonargparse has no text for, and the dotted keys of that."""
    left_out: list[str] = []
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    kept = {}
    for name, value in pairs:
        place = f"{key} {config.class_name(value)}" if isinstance(node, list) else f"{key}.{name}".lstrip(".")
        place = key if name == "init_args" else place
        if isinstance(value, str) and value.startswith("Unable to serialize instance"):
            left_out.append(place)
        else:
            kept[name], below = _without_unwritable(value, place)
            left_out += below
    return (kept if isinstance(node, dict) else [*kept.values()] if isinstance(node, list) else node), left_out
