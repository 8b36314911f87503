"""Where things are kept between runs that can always be made again."""

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """``srlora_pl/<kind>`` in the user's cache: below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srlora_pl" / kind
