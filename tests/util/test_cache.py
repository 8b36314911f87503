"""What is kept between runs is whole or absent, and never in the way."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from srlora_pl.util import cache


def test_a_file_is_kept_with_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.safetensors"
    file.parent.mkdir()
    (file.parent / ".0123.unfinished").write_bytes(b"of a process that was killed")
    for value in (1.0, 2.0):
        cache.keep({"x": torch.tensor([value])}, file, {"made by": "a test"})
    assert load_file(file)["x"].tolist() == [2.0]
    assert list(file.parent.iterdir()) == [file]


def test_what_cannot_be_written_leaves_the_file_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.safetensors"
    cache.keep({"x": torch.tensor([1.0])}, file)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        cache.keep({"x": torch.tensor([2.0])}, file)
    assert load_file(file)["x"].tolist() == [1.0]
    assert list(tmp_path.iterdir()) == [file]
