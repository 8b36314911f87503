"""Where things are kept between runs that can always be made again."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from srlora_pl.util.files import replacing


def cache_folder(kind: str) -> Path:
    """``srlora_pl/<kind>`` in the user's cache: below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srlora_pl" / kind


def keep(tensors: Mapping[str, Tensor], file: Path, header: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all: several processes may do so at once, and any may be killed.

    Raises:
        OSError: the folder takes no file, or not this one.
    """
    with replacing(file) as new:
        new.write(save(dict(tensors), header))
