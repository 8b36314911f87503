"""Trained models as plain weights, or as a LoRA for PEFT."""
