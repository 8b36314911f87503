"""The arguments of classes as their source says: importing torch, Lightning and timm takes seconds."""

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import srlora_pl


def arguments(class_path: str) -> list[str] | None:
    """As `signatures.arguments_of_class`; None where the source alone does not say."""
    names, says_all = _arguments(class_path)
    return names if says_all else None


def _arguments(class_path: str) -> tuple[list[str], bool | None]:
    """The arguments of a class and of its bases, and whether these are all: None if ``**kwargs`` go on from there."""
    module, _, name = class_path.rpartition(".")
    module, name = _home(module or "srlora_pl", name)
    node = _class(module, name)
    if node is None:
        return [], False
    init = next((each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"), None)
    names = [each.arg for each in (*init.args.args[1:], *init.args.kwonlyargs)] if init else []
    if init and not init.args.kwarg:
        return names, True
    if not init and node.decorator_list:  # such as a dataclass
        return [], False
    for base in node.bases:
        above, says_all = _arguments(_dotted(module, base))
        names = [*dict.fromkeys([*names, *above])]
        if says_all is not None:
            return names, says_all
    return names, None


def _home(module: str, name: str) -> tuple[str, str]:
    """Where the class ``name`` is defined that ``module`` imports, as far as that can be followed."""
    if module == "srlora_pl":
        module = srlora_pl.HOMES.get(name, module)
    while _class(module, name) is None and (found := _imported(module).get(name)):
        module, _, name = found.rpartition(".")
    return module, name


def _dotted(module: str, base: ast.expr) -> str:
    """The path of a base class that ``module`` writes as ``Name`` or ``alias.Name``."""
    first, _, rest = ast.unparse(base).partition(".")
    return f"{_imported(module).get(first, f'{module}.{first}')}{rest and f'.{rest}'}"


def _class(module: str, name: str) -> ast.ClassDef | None:
    nodes = _tree(module).body
    return next((each for each in nodes if isinstance(each, ast.ClassDef) and each.name == name), None)


@cache
def _imported(module: str) -> dict[str, str]:
    """What the names that ``module`` imports stand for."""
    found: dict[str, str] = {}
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ImportFrom) and not node.level:
            for each in node.names:
                every = _imported(str(node.module)) if each.name == "*" else {}
                found |= every or {each.asname or each.name: f"{node.module}.{each.name}"}
        elif isinstance(node, ast.Import):
            found |= {each.asname: each.name for each in node.names if each.asname}
    return found


@cache
def _tree(module: str) -> ast.Module:
    """The source of a module, empty if there is none."""
    first, *below = module.split(".")
    spec = find_spec(first) if first.isidentifier() else None  # of a top module alone this imports nothing
    for home in (spec.submodule_search_locations or ()) if spec else ():
        for file in (Path(home, *below, "__init__.py"), Path(home, *below).with_suffix(".py")):
            if file.is_file():
                return ast.parse(file.read_bytes())
    return ast.Module([], [])
