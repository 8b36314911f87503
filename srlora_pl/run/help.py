"""What ``fit --help`` says of the settings of a model, its method and its data, from their classes' docstrings."""

from collections.abc import Iterator, Mapping
from textwrap import fill

from docstring_parser import parse

from srlora_pl.util.signatures import arguments_of_class, class_at, defaults_of_class

SHOWN = {
    "model": "srlora_pl.ImageClassifier",
    "model.method": "srlora_pl.SRLoRA",
    "data": "srlora_pl.ImageData",
}  # without a config


def own_settings(classes: Mapping[str, str]) -> Iterator[str]:
    """The settings of ``classes``, by the part of the run that each is: option, default and what it does."""
    for part, path in classes.items():
        cls = class_at(path)
        about: dict[str, str] = {}
        for base in reversed(cls.__mro__):
            texts = {each.arg_name: each.description or "" for each in parse(base.__doc__ or "").params}
            about |= {argument: text for argument, text in texts.items() if not text.startswith("see ")}
        defaults = defaults_of_class(cls)
        yield f"\n{part} is {path}:"
        for argument in arguments_of_class(cls):
            default = f" (default: {defaults[argument]!r})" if argument in defaults else ""
            yield f"  --{part}.{argument}{default}"
            if text := " ".join(about.get(argument, "").replace("``", "").split()):
                yield fill(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
