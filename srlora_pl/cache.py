"""Where things are kept between runs that can always be made again."""

import errno
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def cache_folder(kind: str) -> Path:
    """``srlora_pl/<kind>`` in the user's cache: below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srlora_pl" / kind


def keep(tensors: Mapping[str, Tensor], file: Path, header: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all: several processes may do so at once, and any may be killed.

    Raises:
        OSError: the folder takes no file, or not this one.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        try:
            save_file(dict(tensors), Path(folder, file.name), header)
        except SafetensorError as error:  # a full disk, for one
            raise OSError(errno.EIO, str(error)) from error
        os.replace(Path(folder, file.name), file)
