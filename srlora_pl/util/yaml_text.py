"""YAML as config files and the command line are read and written."""

import re
from typing import Any

import yaml


class Text(str):
    """Text that stood in quotes.

    Where any value may stand, as in ``backbone_kwargs``, the parser reads text as YAML once more, but not this.
    """


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-4`` as text; everybody who writes it means the number. No setting is a date."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:timestamp"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `_Loader` would take for something else."""


_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+")
for each in (_Loader, _Dumper):
    each.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))  # type: ignore[attr-defined]


def _read_text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    return Text(node.value) if node.style else node.value


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # In other quotes YAML folds what it holds for a line break, and cannot hold what is no UTF-8.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Loader.add_constructor("tag:yaml.org,2002:str", _read_text)
_Dumper.add_representer(str, _write_text)
# What an argument's default may be besides: an enumeration's text, a number of a type derived from one.
_Dumper.add_multi_representer(str, lambda dumper, text: _write_text(dumper, str.__str__(text)))
_Dumper.add_multi_representer(int, lambda dumper, number: dumper.represent_int(int(number)))
_Dumper.add_multi_representer(float, lambda dumper, number: dumper.represent_float(float(number)))


def load(text: str) -> Any:
    """What the YAML ``text`` says; an empty one says {}."""
    content = value(text)
    return {} if content is None else content


def value(text: str) -> Any:
    """What the YAML ``text`` says, as in every file and on the command line."""
    return yaml.load(text, _Loader)


def plain(node: Any) -> Any:
    """``node`` with each `Text` in its lists and mappings as a common string."""
    if isinstance(node, dict):
        return {plain(key): plain(each) for key, each in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(map(plain, node))
    return str(node) if isinstance(node, Text) else node


def write(settings: dict[str, Any]) -> str:
    """The YAML text of ``settings``."""
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
