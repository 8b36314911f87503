"""A tiny folder of pictures."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def image_tree(tmp_path: Path) -> Callable[..., Path]:
    """Write PNGs, ``count`` to a class: ``image_tree({"train/cat": (20, 24)}, count=3)``, sizes as (width, height)."""

    def _write(folders: dict[str, tuple[int, int]], count: int = 6, root: Path = tmp_path / "pictures") -> Path:
        rng = np.random.default_rng(0)
        for folder, (width, height) in folders.items():
            (root / folder).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / f"{index}.png")
        return root

    return _write
