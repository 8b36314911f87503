"""The former home of `srlora_pl.lowrank.delta`."""

from srlora_pl.lowrank.delta import merged_copy as plain_copy

__all__ = ["plain_copy"]
