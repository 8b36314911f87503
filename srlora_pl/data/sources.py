"""The former home of `srlora_pl.data.images.sources` and `srlora_pl.data.images.folders`."""

from srlora_pl.data.images.folders import picture_files
from srlora_pl.data.images.sources import find_source

__all__ = ["find_source", "picture_files"]
