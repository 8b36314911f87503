"""The former home of `srlora_pl.training.checkpoints`."""

from srlora_pl.training.checkpoints import read

__all__ = ["read"]
