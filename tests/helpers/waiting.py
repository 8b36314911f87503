"""Waits that end: for a process, and for something that a process does."""

import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

# A machine may be busy: what these waits are for takes seconds on an idle one.
PATIENCE = 300.0


def wait_until(happened: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
    """Ask ``happened`` until it says so; ``what`` is awaited, as in "the first checkpoint"."""
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:g} s in vain for {what}")
        time.sleep(0.02)


def run(command: list[Any], *, seconds: float = PATIENCE, **options: Any) -> subprocess.CompletedProcess:
    """`subprocess.run`, of which both outputs are kept as text."""
    command = [str(word) for word in command]
    try:
        return subprocess.run(command, **{"capture_output": True, "text": True, "timeout": seconds, **options})
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"{' '.join(command)} did not end within {seconds:g} s and had said: {error.stdout} {error.stderr}")


def words_of(process: subprocess.Popen, seconds: float = PATIENCE) -> str:
    """All that ``process`` says until it ends."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        said = process.communicate(timeout=seconds)[0]
        pytest.fail(f"{process.args} did not end within {seconds:g} s and had said: {said}")
