"""Export of trained models, to the folders of timm, transformers and PEFT."""

from srlora_pl.export.adapters import export_peft
from srlora_pl.export.command import export_model
from srlora_pl.export.report import Report

__all__ = ["Report", "export_model", "export_peft"]
