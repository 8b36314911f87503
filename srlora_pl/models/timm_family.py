"""Image networks of timm as a `family.ModelFamily`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from torch import Tensor, nn

from srlora_pl.data.protocols import Batch
from srlora_pl.models import timm_models
from srlora_pl.models.family import Classifier, about_of, write_about
from srlora_pl.models.heads import FoundHead
from srlora_pl.models.weights import store
from srlora_pl.util.errors import UserError


class Timm(Classifier):
    """An image network of timm."""

    task_type: ClassVar[str | None] = None

    @property
    def base(self) -> tuple[str, str | None]:
        source = timm_models.timm_name(self.name)
        if not source.startswith("hf-hub:"):
            return source.removeprefix("local-dir:"), None
        name, _, revision = source.removeprefix("hf-hub:").partition("@")
        return name, revision or None

    @property
    def recipe(self) -> str:
        source = timm_models.timm_name(self.name)
        return self.recipe_of(
            f"timm.create_model({source!r}, pretrained={self.checkpoint is None}, num_classes={self.num_classes}"
        )

    def build(self) -> tuple[nn.Module, FoundHead | None]:
        net, head = timm_models.find_head(self.name, self.num_classes, self.kwargs, self.checkpoint)
        return store(net, self.weights, self.heads(net)), head

    def heads(self, net: nn.Module) -> tuple[str, ...]:
        return timm_models.head_names(net)

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        return net(batch["image"])

    def example_inputs(self, net: nn.Module) -> list[Batch]:
        size = timm_models.data_config(net, self.kwargs)["input_size"]
        return [{"image": torch.randn(2, *size, generator=torch.Generator().manual_seed(0))}]

    def save(self, net: nn.Module, folder: Path, class_names: Sequence[str], card: dict[str, Any]) -> list[str]:
        labels = {"label_names": list(class_names)} if class_names else {}
        try:
            timm.models.save_for_hf(net, str(folder), labels, safe_serialization=True, **card)
        except ValueError as error:
            raise UserError(f"timm cannot describe this model in a config.json ({error})") from error
        about = about_of(folder)
        # transformers gives these to timm beside the number of classes, which must not be there twice.
        about["model_args"].pop("num_classes", None)
        write_about(folder, about)
        return []

    def load(self, folder: Path) -> nn.Module:
        return timm.create_model(f"local-dir:{folder}", pretrained=True)

    def served(self, net: nn.Module) -> nn.Module:
        return _Served(net)

    def served_inputs(self, net: nn.Module, samples: int, length: int, seed: int) -> dict[str, Tensor]:
        size = timm_models.data_config(net, self.kwargs)["input_size"]
        return {"pixel_values": torch.randn(samples, *size, generator=torch.Generator().manual_seed(seed))}

    def hub_name(self, net: Any) -> str | None:
        return None if Path(self.base[0]).is_dir() else net.pretrained_cfg.get("hf_hub_id") or None


class _Served(nn.Module):
    """With the name of the input that transformers has."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.net(pixel_values)
