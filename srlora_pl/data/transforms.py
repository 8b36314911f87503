"""The former home of `srlora_pl.data.images.transforms`."""

from srlora_pl.data.images.transforms import ImageTransform

__all__ = ["ImageTransform"]
