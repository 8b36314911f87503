"""The arguments of classes."""

import inspect
from collections.abc import Iterator
from typing import Any


def arguments_of_class(cls: type) -> list[str]:
    """The names of the arguments of ``cls`` and of the bases that its ``**kwargs`` reach."""
    return [*dict.fromkeys(argument.name for argument in _arguments(cls))]


def defaults_of_class(cls: type) -> dict[str, Any]:
    """The defaults of those of `arguments_of_class` that have one."""
    nearest_last = reversed([*_arguments(cls)])
    return {each.name: each.default for each in nearest_last if each.default is not each.empty}


def _arguments(cls: type) -> Iterator[inspect.Parameter]:
    """Those of ``cls`` first, so that a name that a base has too comes twice."""
    for base in cls.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        yield from (each for each in parameters if each.name != "self" and each.kind is not each.VAR_KEYWORD)
        if all(each.kind is not each.VAR_KEYWORD for each in parameters):
            break
