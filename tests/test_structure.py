"""The tests' own structure: shared code lies in conftest.py files and in tests/helpers."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.paths import ROOT


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, and every name of them as if it were a module; relative ones with their dots."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_no_test_module_and_no_conftest_is_imported() -> None:
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert len(files) > 50
    for path in files:
        for name in imported(path):
            parts = name.split(".")
            assert parts[0] not in ("", "conftest"), f"{path} imports {name}: write the whole name"
            if parts[0] == "tests":
                assert parts[1] == "helpers", f"{path} imports {name}: move shared code to tests/helpers"
