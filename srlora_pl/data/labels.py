"""The former home of `srlora_pl.data.texts.labels`."""

from srlora_pl.data.texts.labels import class_names

__all__ = ["class_names"]
