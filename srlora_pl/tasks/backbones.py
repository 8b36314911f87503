"""The former home of `srlora_pl.models.timm_models`."""

from srlora_pl.models.timm_models import build_backbone

__all__ = ["build_backbone"]
