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


def waits_for_ever(call: ast.Call) -> bool:
    """Whether a call waits for a process, a lock or a queue without a bound."""
    name = ast.unparse(call.func)
    method = name.rpartition(".")[2]
    bounded = any(keyword.arg == "timeout" for keyword in call.keywords)
    if name.startswith("subprocess.") and method in ("run", "call", "check_call", "check_output"):
        return not bounded and not any(keyword.arg is None for keyword in call.keywords)
    if method in ("FileLock", "urlopen"):
        return not bounded
    return method in ("wait", "communicate", "join", "get", "result", "acquire") and not call.args and not bounded


def test_no_wait_is_without_a_bound() -> None:
    """Loops that sleep are `tests.helpers.waiting.wait_until`."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        for call in calls:
            assert not waits_for_ever(call), f"{path}:{call.lineno} waits without a timeout"
            sleeps = ast.unparse(call.func) == "time.sleep"
            assert not sleeps or path.name == "waiting.py", f"{path}:{call.lineno} sleeps"
