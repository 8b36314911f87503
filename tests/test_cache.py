"""What is kept between runs is whole or absent, and never in the way."""

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from srlora_pl import cache


def test_a_file_is_kept_with_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.safetensors"
    for value in (1.0, 2.0):
        cache.keep({"x": torch.tensor([value])}, file)
    assert load_file(file)["x"].tolist() == [2.0]
    assert list(file.parent.iterdir()) == [file]


def test_what_cannot_be_written_leaves_the_file_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.safetensors"
    cache.keep({"x": torch.tensor([1.0])}, file)

    def full(tensors: object, path: Path, header: object) -> None:
        path.write_bytes(b"half of it")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(cache, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        cache.keep({"x": torch.tensor([2.0])}, file)
    assert load_file(file)["x"].tolist() == [1.0]
    assert list(tmp_path.iterdir()) == [file]
