"""Fine-tuning with SRLoRA and other low-rank adapters in PyTorch Lightning.

Names are loaded on first use, so that ``import srlora_pl.lowrank`` (the maths) loads no Lightning.
"""

from importlib import import_module
from typing import Any

from srlora_pl.util.program import require_extra

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
    "PrefixTuning",
    "PromptTuning",
    "ReLoRA",
    "SRLoRA",
    "TiedLoRA",
    "VeRA",
)
HOMES = {
    **dict.fromkeys(("Adaptation", "Method", "gradients", *_METHODS), "srlora_pl.lowrank"),
    "SRLoRAMixin": "srlora_pl.training.mixin",
    "ImageClassifier": "srlora_pl.tasks.image",
    "TextClassifier": "srlora_pl.tasks.text",
    "CausalLM": "srlora_pl.tasks.causal",
    "CommonsenseData": "srlora_pl.data.instructions.commonsense",
    "GLUEData": "srlora_pl.data.texts.glue",
    "ImageData": "srlora_pl.data.images.datamodule",
    "InstructionData": "srlora_pl.data.instructions.files",
    "MetaMathData": "srlora_pl.data.instructions.metamath",
    "TextData": "srlora_pl.data.texts.files",
    "UserError": "srlora_pl.util.errors",
    "export_model": "srlora_pl.export.command",
    "export_peft": "srlora_pl.export.adapters",
}
# What needs more than a plain install: the extra and a package that it brings.
_EXTRAS = {
    **dict.fromkeys(("TextClassifier", "TextData", "GLUEData"), ("text", "transformers")),
    **dict.fromkeys(("CausalLM", "InstructionData", "MetaMathData", "CommonsenseData"), ("text", "transformers")),
    **dict.fromkeys(("Peft", "PrefixTuning", "PromptTuning"), ("peft", "peft")),
}
__all__ = list(HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'srlora_pl' has no attribute {name!r}")
    require_extra_of(name)
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__


def require_extra_of(class_path: str) -> None:
    """Refuse a public class, ``srlora_pl.TextData`` or ``TextData``, that needs a package which is not installed."""
    name = class_path.removeprefix("srlora_pl.")
    if name in _EXTRAS:
        require_extra(*_EXTRAS[name], f"srlora_pl.{name}")
