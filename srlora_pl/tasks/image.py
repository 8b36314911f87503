"""Image classification on any timm model."""

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from srlora_pl.lowrank import Method
from srlora_pl.models.timm_models import build_backbone, data_config, find_head, head_names
from srlora_pl.tasks.base import Batch, Task, require
from srlora_pl.util.errors import UserError


class ImageClassifier(Task):
    """A timm network with a new head, adapted by ``method``: head and adapters train, the rest is frozen.

    Takes batches with ``image``, float (B, 3, H, W), normalised; ``label``, int64 (B,); ``index``, int64 (B,),
    the sample's position in its split. Logs ``train/loss`` and, for ``val`` and ``test``, ``loss``,
    ``accuracy``, ``score`` (the accuracy again) and with more than five classes ``top5``.

    Args:
        backbone: a shipped backbone (``vit_tiny_in64``), a timm or hub name, or a local folder in timm's layout. A head
            of ``num_classes`` that its weights bring along is taken, as `srlora_pl.models.heads.settle` says.
        num_classes: taken from the data when the command line builds the model.
        method: ``srlora_pl.LoRA``, ``PiSSA`` or ``SRLoRA``, or its ``{class_path, init_args}``.
        backbone_kwargs: for timm's constructor, such as ``drop_path_rate``; ``pretrained: false`` starts from
            random weights.
        backbone_checkpoint: a local weights file (safetensors or torch) instead of the name's own weights.
        adapter: a folder that the PEFT library saved a LoRA in, as a start: ``LoRA`` goes on with its pairs, for the
            other methods it becomes part of the pretrained weights; its head is taken as the backbone's is.
        optimizer: ``sgd``, ``adamw``, or the path of a torch optimizer class.
        lr: the largest learning rate.
        head_lr: the head's own largest learning rate; by default ``lr``.
        momentum: of ``sgd``.
        weight_decay: on matrices; biases and norms are never decayed.
        schedule: what follows the warm-up: ``cosine`` or ``linear`` down to 0 at the last step, or ``constant``.
        warmup_steps: optimizer steps over which the learning rate rises linearly from 0.
        label_smoothing: in the training loss only, from 0 up to 1.
        mixup: alpha of mixup (Zhang et al. 2018); 0 is off. With cutmix too, each batch takes one at random.
        cutmix: alpha of cutmix (Yun et al. 2019); 0 is off.
        compile: run each repeated block through ``torch.compile``.
        matmul_precision: of fp32 products during a run, see ``torch.set_float32_matmul_precision``: ``high`` is TF32
            on NVIDIA's GPUs from Ampere on. Starts and switches are always computed in full fp32.
        checkpoints: ``compact`` files hold what changed since the pretrained weights; ``full`` ones the whole network.

    Raises:
        UserError: a value out of range, an unknown name, weights that do not fit or cannot be had.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        method: Method,
        backbone_kwargs: dict[str, Any] | None = None,
        backbone_checkpoint: str | None = None,
        adapter: str | None = None,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        head_lr: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        warmup_steps: int = 0,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        compile: bool = False,
        matmul_precision: Literal["highest", "high", "medium"] = "highest",
        checkpoints: Literal["compact", "full"] = "compact",
    ) -> None:
        arguments = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__(optimizer, lr, head_lr, momentum, weight_decay, schedule, warmup_steps)
        require("num_classes", num_classes, "at least 2", num_classes >= 2)
        require("label_smoothing", label_smoothing, "from 0 up to, but not, 1", 0 <= label_smoothing < 1)
        require("mixup", mixup, "0 or positive", mixup >= 0)
        require("cutmix", cutmix, "0 or positive", cutmix >= 0)
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.mix = _mix(mixup, cutmix, num_classes)
        place = (backbone, num_classes, backbone_kwargs, backbone_checkpoint)
        net, self.found_head = find_head(*place)
        make = partial(build_backbone, *place)
        self.data_config = data_config(net, backbone_kwargs)
        self.build(net, method, head_names(net), self._scores, "accuracy", arguments, make)
        if compile:
            self.compile_blocks()

    def _scores(self) -> dict[str, Metric]:
        def top(k: int) -> Metric:
            # validate_args would look at the values, and so wait for the device, in every batch
            return MulticlassAccuracy(self.num_classes, top_k=k, average="micro", validate_args=False)

        return {"accuracy": top(1)} | ({"top5": top(5)} if self.num_classes > 5 else {})

    def setup(self, stage: str) -> None:
        classes = getattr(getattr(self.trainer, "datamodule", None), "num_classes", self.num_classes)
        if stage != "predict" and classes > self.num_classes:
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


def _mix(mixup: float, cutmix: float, num_classes: int) -> v2.Transform | None:
    """What mixes the images of a batch and makes their labels (B, classes) probabilities; None for nothing."""
    mixes: list[v2.Transform] = []
    if mixup:
        mixes.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
    if cutmix:
        mixes.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
    return v2.RandomChoice(mixes) if len(mixes) > 1 else mixes[0] if mixes else None
