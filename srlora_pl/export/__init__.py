"""Export of trained models, to the folders of timm, transformers and PEFT."""

from srlora_pl.export.command import Report, export_model

__all__ = ["Report", "export_model"]
