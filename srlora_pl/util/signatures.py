"""The arguments of classes."""

import inspect
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any


def class_at(class_path: str) -> Any:
    """The class that ``module.Name`` means, or ``Name`` alone among this package's.

    Raises:
        ImportError: there is no such module.
        AttributeError: the module has no such name.
    """
    module, _, name = class_path.rpartition(".")
    return getattr(import_module(module or "srlora_pl"), name)


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


def arguments_of(names: Mapping[str, Any]) -> dict[str, Any]:
    """A constructor's own arguments by name, from its ``locals()`` at its beginning."""
    return {key: value for key, value in names.items() if key not in ("self", "__class__", "kwargs")}
