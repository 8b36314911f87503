"""What the pages read from the package: tables of settings, and docstrings, which write formulas as plain text."""

import re
from importlib import import_module
from typing import Any, ClassVar

from docstring_parser import DocstringStyle, parse
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from srlora_pl.lowrank.target_settings import TargetSettings
from srlora_pl.util.signatures import arguments_of_class, defaults_of_class


def meanings(cls: type) -> dict[str, str]:
    """What the docstrings of ``cls`` and its bases say of each argument; the nearest class rules."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        for each in parse(vars(base).get("__doc__") or "", DocstringStyle.GOOGLE).params:
            text = " ".join((each.description or "").split())
            for name in each.arg_name.split(", "):
                if not re.match(r"see `\w+`", text):
                    found.setdefault(name, text)
    return found


class Settings(SphinxDirective):
    """The settings of a class as a table: names, defaults, and what its docstring says.

    With ``shared``, what all methods share is left to the page that this option names.
    """

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {"shared": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].rpartition(".")
        cls = getattr(import_module(module), name)
        texts, defaults, common = meanings(cls), defaults_of_class(cls), meanings(TargetSettings)
        rows, shared = [], []
        for argument in arguments_of_class(cls):
            if argument not in texts:
                raise self.error(f"no docstring says what {name}.{argument} is")
            default = f"`{defaults[argument]!r}`" if argument in defaults else ""
            alike = texts[argument] == common.get(argument) and argument not in ("rank", "alpha")
            if "shared" in self.options and alike:
                shared.append(f"`{argument}`")
            else:
                meaning = texts[argument].replace("|", r"\|")
                rows.append(f"| `{argument}` | {default} | {meaning} |")
        text = (
            "\n".join(["| setting | default | |", "|---|---|---|", *rows]) if rows else "It has no settings of its own."
        )
        if shared:
            page = f"[shared settings]({self.options['shared']})"
            text += f"\n\nOf the {page} it takes {', '.join(shared)}."
        return self.parse_text_to_nodes(text)


def plain_formulas(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape what reStructuredText would take for markup, as in ``||A||_F``, outside of code."""
    for i, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        escaped = (part if part.startswith("`") else re.sub(r"([|*]|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts)
        lines[i] = "".join(escaped)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("settings", Settings)
    app.connect("autodoc-process-docstring", plain_formulas)
    return {"parallel_read_safe": True}
