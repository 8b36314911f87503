"""The former home of `srlora_pl.lowrank.methods.switching`."""

from srlora_pl.lowrank.methods.switching import lowest

__all__ = ["lowest"]
