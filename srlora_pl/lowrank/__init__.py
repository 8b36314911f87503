"""The maths of low-rank adaptation: tensors in, tensors out; nothing here imports Lightning, timm or transformers.

`Adaptation` is the entry point: it puts a method's pairs into a network, and knows when and how to switch.
"""

from srlora_pl.lowrank.adaptation import Adaptation
from srlora_pl.lowrank.linear import LowRankLinear
from srlora_pl.lowrank.methods import LoRA, Method, PiSSA, SRLoRA
from srlora_pl.lowrank.schedule import Schedule
from srlora_pl.lowrank.starts.spectrum import Spectrum

__all__ = ["Adaptation", "LoRA", "LowRankLinear", "Method", "PiSSA", "SRLoRA", "Schedule", "Spectrum"]
