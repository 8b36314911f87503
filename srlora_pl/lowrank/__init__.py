"""The maths of low-rank adaptation: tensors in, tensors out; nothing here imports Lightning, timm or transformers.

`Adaptation` is the entry point: it puts a method's adapters into a network and carries them through training.
"""

from srlora_pl.lowrank import methods
from srlora_pl.lowrank.adaptation import Adaptation
from srlora_pl.lowrank.linear import AdaptedLinear, Adapter, LowRankLinear
from srlora_pl.lowrank.method import Controller, Method
from srlora_pl.lowrank.methods import *  # noqa: F403
from srlora_pl.lowrank.schedule import Schedule
from srlora_pl.lowrank.starts.gradient import gradients
from srlora_pl.lowrank.starts.spectrum import Spectrum

__all__ = [
    "Adaptation",
    "AdaptedLinear",
    "Adapter",
    "Controller",
    "LowRankLinear",
    "Method",
    "Schedule",
    "Spectrum",
    "gradients",
]
__all__ += methods.__all__
