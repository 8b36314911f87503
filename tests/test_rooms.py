"""The rooms of the package: arrows between them go one way, and no code outside methods/ asks which method it has."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "srlora_pl"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the top floor down; a room imports rooms below its floor only.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("export", "comparison", "planning"),
    ("run",),
    ("tasks", "reporting"),
    ("models", "figures"),
    ("data",),
    ("training",),
    ("lowrank",),
    ("util",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Thin modules at paths that the README or a notebook once showed, and the package itself, whose names load on use.
FORMER = (
    "__init__.py",
    "checkpoints.py",
    "lowrank/export.py",
    "lowrank/precision.py",
    "lowrank/recompose.py",
    "tasks/backbones.py",
)


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in FILES}


def imports(file: Path) -> Iterator[str]:
    """The modules of the package that ``file`` imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_arrows_between_rooms_go_one_way() -> None:
    for module, file in MODULES.items():
        if str(file.relative_to(PACKAGE)) in FORMER:
            continue
        for other in imports(file):
            if other.startswith("srlora_pl.") and room_of(other) != room_of(module):
                assert FLOOR[room_of(module)] < FLOOR[room_of(other)], f"{module} imports {other}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    arrows = {module: {m for m in imports(file) if m in MODULES} for module, file in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join([*way[way.index(module) :], module])}"
        if module not in done:
            for other in sorted(arrows[module]):
                visit(other, (*way, module))
            done.add(module)

    for module in arrows:
        visit(module, ())


def test_the_maths_knows_no_library_of_networks_or_loops() -> None:
    for file in (PACKAGE / "lowrank").rglob("*.py"):
        for module in imports(file):
            assert module.split(".")[0] not in ("lightning", "transformers", "timm"), f"{file} imports {module}"


@pytest.mark.parametrize(
    "pattern",
    [
        r"isinstance\([^)]*\b(SRLoRA|PiSSA|LoRA)\b",
        r"type\([^)]*method\) (is|==|in)",
        r"[\"'](SRLoRA|PiSSA|LoRA)[\"']",
    ],
)
def test_outside_the_methods_nobody_asks_which_one_it_is(pattern: str) -> None:
    for file in FILES:
        if "methods" not in file.parts and file.name != "__init__.py":
            assert not re.search(pattern, file.read_text()), file


def test_the_parameters_of_lora_are_known_where_they_are_made() -> None:
    """And where PEFT's files name them."""
    know = {PACKAGE / "lowrank/linear.py", PACKAGE / "models/peft_folder.py"}
    for file in FILES:
        if file not in know and "methods" not in file.parts:
            assert not re.search(r"lora_[AB]", file.read_text()), file


def test_no_file_is_longer_than_it_should_be() -> None:
    lengths = {file: len(file.read_text().splitlines()) for file in FILES}
    assert {file: length for file, length in lengths.items() if length > 400} == {}
    assert lengths[PACKAGE / "lowrank/adaptation.py"] <= 300
