"""The arguments of classes."""

import inspect


def arguments_of_class(cls: type) -> list[str]:
    """The names of the arguments of ``cls`` and of the bases that its ``**kwargs`` reach."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        names |= {each.name: None for each in parameters if each.name != "self" and each.kind is not each.VAR_KEYWORD}
        if all(each.kind is not each.VAR_KEYWORD for each in parameters):
            break
    return [*names]
