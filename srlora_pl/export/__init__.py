"""Trained models as plain weights, or as a LoRA for PEFT."""

from srlora_pl.export.command import export_model

__all__ = ["export_model"]
