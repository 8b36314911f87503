"""One small class a method: what a config names under ``model.method``."""

from srlora_pl.lowrank.methods.base import Method
from srlora_pl.lowrank.methods.lora import LoRA
from srlora_pl.lowrank.methods.pissa import PiSSA
from srlora_pl.lowrank.methods.srlora import SRLoRA

__all__ = ["LoRA", "Method", "PiSSA", "SRLoRA"]
