"""One small class a method: what a config names under ``model.method``."""

from torch.serialization import add_safe_globals

from srlora_pl.lowrank.methods.base import Method
from srlora_pl.lowrank.methods.lora import LoRA
from srlora_pl.lowrank.methods.pissa import PiSSA
from srlora_pl.lowrank.methods.srlora import SRLoRA

# A module's hyperparameters may hold its method, and checkpoints are read without running what they name.
add_safe_globals([LoRA, PiSSA, SRLoRA])

__all__ = ["LoRA", "Method", "PiSSA", "SRLoRA"]
