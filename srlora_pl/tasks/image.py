"""Image classification on any timm model."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from srlora_pl.lowrank import Method
from srlora_pl.models.timm_family import Timm
from srlora_pl.models.timm_models import data_config
from srlora_pl.tasks.base import Batch, Task
from srlora_pl.tasks.evaluation import LogitScores
from srlora_pl.util.errors import UserError, require
from srlora_pl.util.signatures import arguments_of


class ImageClassifier(Task):
    """A timm network with a new head, adapted by ``method``: head and adapters train, the rest is frozen.

    Takes batches with ``image``, float (B, 3, H, W), normalised; ``label``, int64 (B,); ``index``, int64 (B,),
    the sample's position in its split. Logs ``train/loss`` and, for ``val`` and ``test``, ``loss``,
    ``accuracy``, ``score`` (the accuracy again) and with more than five classes ``top5``.

    Args:
        backbone: a shipped backbone (``vit_tiny_in64``), a timm or hub name, or a local folder in timm's layout. A head
            of ``num_classes`` that its weights bring along is taken, as `srlora_pl.models.heads.settle` says.
        num_classes: taken from the data when the command line builds the model.
        method: the class of a method, such as ``srlora_pl.SRLoRA``, or its ``{class_path, init_args}``.
        backbone_kwargs: for timm's constructor, such as ``drop_path_rate``; ``pretrained: false`` starts from
            random weights.
        label_smoothing: in the training loss only, from 0 up to 1.
        mixup: alpha of mixup (Zhang et al. 2018); 0 is off. With cutmix too, each batch takes one at random.
        cutmix: alpha of cutmix (Yun et al. 2019); 0 is off.
        kwargs: the other arguments of `Task`.

    Raises:
        UserError: a value out of range, an unknown name, weights that do not fit or cannot be had.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        method: Method,
        backbone_kwargs: dict[str, Any] | None = None,
        *,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        **kwargs: Any,
    ) -> None:
        arguments = arguments_of(locals())
        super().__init__(method, **kwargs)
        require("model.num_classes", num_classes, "at least 2", num_classes >= 2)
        require("model.label_smoothing", label_smoothing, "from 0 up to, but not, 1", 0 <= label_smoothing < 1)
        require("model.mixup", mixup, "0 or positive", mixup >= 0)
        require("model.cutmix", cutmix, "0 or positive", cutmix >= 0)
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.mix = _mix(mixup, cutmix, num_classes)
        self.evaluation = LogitScores(_scores(num_classes), "accuracy")
        self.build(Timm(backbone, num_classes, backbone_kwargs, **self.storage), arguments)
        self.data_config = data_config(self.net, backbone_kwargs)

    def setup(self, stage: str) -> None:
        classes = self._data.num_classes
        if stage != "predict" and classes is not None and classes > self.num_classes:
            raise UserError(f"The data have {classes} classes but model.num_classes is {self.num_classes}: raise it.")
        super().setup(stage)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, classes) of normalised images (B, 3, H, W)."""
        return self.net(image)

    def logits(self, batch: Batch) -> Tensor:
        return self(batch["image"])

    def losses(self, logits: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(logits, label, reduction="none")

    def training_loss(self, batch: Batch) -> Tensor:
        image, label = batch["image"], batch["label"]
        if self.mix is not None:
            # Draws from torch's global stream, which is seeded anew from (seed, position) at every micro-batch.
            image, label = self.mix(image, label)
        return F.cross_entropy(self(image), label, label_smoothing=self.label_smoothing)

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """``index``, the most probable ``label`` and its ``probability``, each (B,)."""
        probability, label = torch.softmax(self.logits(batch).float(), dim=-1).max(dim=-1)
        return {"index": batch["index"], "label": label, "probability": probability}

    def card(self) -> dict[str, Any]:
        return {"data_config": self.data_config}

    def take_data_settings(self, class_path: str, arguments: Mapping[str, Any]) -> None:
        if class_path.endswith("ImageData"):
            pct = arguments.get("test_crop_pct", 1.0)
            self.data_config |= {"crop_mode": arguments.get("crop_mode", "squash")}
            self.data_config |= {} if pct is None else {"crop_pct": pct}


def _scores(num_classes: int) -> dict[str, Metric]:
    def top(k: int) -> Metric:
        # validate_args would look at the values, and so wait for the device, in every batch
        return MulticlassAccuracy(num_classes, top_k=k, average="micro", validate_args=False)

    return {"accuracy": top(1)} | ({"top5": top(5)} if num_classes > 5 else {})


def _mix(mixup: float, cutmix: float, num_classes: int) -> v2.Transform | None:
    """Mixes the images of a batch and makes their labels probabilities (B, classes); None where both are off."""
    kinds = {v2.MixUp: mixup, v2.CutMix: cutmix}
    mixes = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds.items() if alpha]
    return v2.RandomChoice(mixes) if len(mixes) > 1 else mixes[0] if mixes else None
