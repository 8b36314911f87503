"""The former home of `srlora_pl.util.precision`."""

from srlora_pl.util.precision import full_precision

__all__ = ["full_precision"]
