"""Fine-tuning with SRLoRA and other low-rank adapters in PyTorch Lightning.

Names are loaded on first use, so that ``import srlora_pl.lowrank`` (the maths) loads no Lightning.
"""

from importlib import import_module
from typing import Any

_METHODS = (
    "AdaLoRA",
    "BitFit",
    "Bottleneck",
    "DoRA",
    "DyLoRA",
    "Full",
    "GaLore",
    "HydraLoRA",
    "LinearProbe",
    "LoRA",
    "LoRAGA",
    "LoRAPro",
    "LoRASB",
    "LoRAXS",
    "Peft",
    "PiSSA",
    "PromptTuning",
    "ReLoRA",
    "SRLoRA",
    "TiedLoRA",
    "VeRA",
)
_HOMES = {
    **dict.fromkeys(("Adaptation", "Method", "gradients", *_METHODS), "srlora_pl.lowrank"),
    "SRLoRAMixin": "srlora_pl.training.mixin",
    "ImageClassifier": "srlora_pl.tasks.image",
    "TextClassifier": "srlora_pl.tasks.text",
    "GLUEData": "srlora_pl.data.texts.glue",
    "ImageData": "srlora_pl.data.images.datamodule",
    "TextData": "srlora_pl.data.texts.files",
    "UserError": "srlora_pl.util.errors",
    "export_model": "srlora_pl.export.command",
    "export_peft": "srlora_pl.export.adapters",
}
__all__ = list(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'srlora_pl' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
