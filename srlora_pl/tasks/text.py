"""Classification and regression of texts on any transformers encoder."""

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torchmetrics import Metric

from srlora_pl.lowrank import Method
from srlora_pl.models import encoders
from srlora_pl.models.deberta import use_fast_attention
from srlora_pl.tasks import scores
from srlora_pl.tasks.base import Batch, Task, require
from srlora_pl.util import yaml_text
from srlora_pl.util.errors import UserError, did_you_mean


class TextClassifier(Task):
    """A transformers encoder with a new head, adapted by ``method``: head, pooler and adapters train.

    Takes batches with ``input_ids`` and ``attention_mask``, int64 (B, L), with ``token_type_ids`` where the tokenizer
    makes them; ``label``, int64 (B,), for regression float (B,), for several labels a text float (B, classes) of 0
    and 1; ``index``, int64 (B,), the sample's position in its split. Logs ``train/loss`` and, for ``val`` and
    ``test``, ``loss``, every score of ``score_names``, and the first of these again as ``score``; a second data
    loader's are ``val_mm/*`` and ``test_mm/*``.

    Args:
        backbone: a hub name, a local folder in transformers' layout, or ``minilm`` where that extra is installed. A
            head of ``num_classes`` that its weights bring along is taken, as `srlora_pl.models.heads.settle` says.
        num_classes: taken from the data when the command line builds the model; 1 for regression.
        method: ``srlora_pl.LoRA``, ``PiSSA`` or ``SRLoRA``, or its ``{class_path, init_args}``.
        backbone_kwargs: override the encoder's configuration, such as ``hidden_dropout_prob``, or say where the hub's
            files are found, such as ``revision``; ``pretrained: false`` starts from random weights.
        backbone_checkpoint: a local weights file (safetensors or torch) instead of the name's own weights.
        adapter: a folder that the PEFT library saved a LoRA in, as a start: ``LoRA`` goes on with its pairs, for the
            other methods it becomes part of the pretrained weights; its head is taken as the backbone's is.
        train_pooler: whether the pooler between encoder and head trains; DeBERTa's is always new.
        problem: ``single_label``, ``multi_label`` or ``regression``; by default what the data say, else regression
            for one class and ``single_label`` for more.
        score_names: of ``accuracy``, ``f1``, ``matthews`` (single label), ``f1``, ``accuracy`` (multi-label) or
            ``pearson``, ``spearman`` (regression), the main one first; by default what the data say.
        class_weights: one per class, in their order or as ``{name: weight}``. A sample's loss is multiplied by its
            class's; of several labels, the loss of those that are set. In ``val/loss`` and ``test/loss`` too.
        optimizer: ``sgd``, ``adamw``, or the path of a torch optimizer class.
        lr: the largest learning rate.
        head_lr: the head's and the pooler's own largest learning rate; by default ``lr``.
        momentum: of ``sgd``.
        weight_decay: on matrices; biases and norms are never decayed.
        schedule: what follows the warm-up: ``cosine`` or ``linear`` down to 0 at the last step, or ``constant``.
        warmup_steps: optimizer steps over which the learning rate rises linearly from 0.
        label_smoothing: in the training loss of a single-label problem only, from 0 up to 1.
        compile: run each repeated block through ``torch.compile``.
        matmul_precision: of fp32 products during a run, see ``torch.set_float32_matmul_precision``: ``high`` is TF32
            on NVIDIA's GPUs from Ampere on. Starts and switches are always computed in full fp32.
        checkpoints: ``compact`` files hold what changed since the pretrained weights; ``full`` ones the whole network.
        fast_attention: DeBERTa's attention without its repeated work, equal to rounding.

    Raises:
        UserError: a value out of range, an unknown name, weights that do not fit or cannot be had.
    """

    problem: str

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        method: Method,
        backbone_kwargs: dict[str, Any] | None = None,
        backbone_checkpoint: str | None = None,
        adapter: str | None = None,
        train_pooler: bool = True,
        problem: Literal["single_label", "multi_label", "regression"] | None = None,
        score_names: list[str] | None = None,
        class_weights: list[float] | dict[str, float] | None = None,
        optimizer: str = "adamw",
        lr: float = 1e-4,
        head_lr: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        schedule: Literal["cosine", "linear", "constant"] = "linear",
        warmup_steps: int = 0,
        label_smoothing: float = 0.0,
        compile: bool = False,
        matmul_precision: Literal["highest", "high", "medium"] = "highest",
        checkpoints: Literal["compact", "full"] = "compact",
        fast_attention: bool = False,
    ) -> None:
        arguments = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__(optimizer, lr, head_lr, momentum, weight_decay, schedule, warmup_steps)
        require("num_classes", num_classes, "at least 1", num_classes >= 1)
        require("label_smoothing", label_smoothing, "from 0 up to, but not, 1", 0 <= label_smoothing < 1)
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.register_buffer("class_weights", _weights(class_weights, num_classes), persistent=False)
        self.backbone_name = encoders.resolve(backbone)
        self.tokenizer_options = encoders.hub_options(backbone_kwargs)
        place = (backbone, num_classes, backbone_kwargs, backbone_checkpoint)
        net, self.found_head = encoders.find_head(*place)
        make = partial(encoders.build_encoder, *place)
        self._settle(problem or ("single_label" if num_classes > 1 else "regression"), score_names)
        heads, new = encoders.head_names(net, train_pooler), encoders.head_names(net)
        self.build(net, method, heads, self._metrics, self.score_names[0], arguments, make, new)
        if fast_attention:
            use_fast_attention(net, backbone)
        if compile:
            self.compile_blocks()

    @property
    def max_tokens(self) -> int | None:
        """How long a text the network has positions for; None where it needs none."""
        return encoders.max_tokens(self.net)

    @property
    def vocab_size(self) -> int | None:
        """How many tokens the network has embeddings for; None where it computes them."""
        return encoders.vocab_size(self.net)

    @property
    def token_types(self) -> int | None:
        """How many kinds of tokens the network tells apart; None where it does not."""
        return encoders.token_types(self.net)

    @property
    def padding_token(self) -> int | None:
        """The token that the network itself calls padding, if it has one."""
        return encoders.padding_token(self.net)

    @property
    def pads_left(self) -> bool:
        """Whether texts must be padded on the left."""
        return encoders.pads_left(self.net)

    @property
    def sees_padding(self) -> bool:
        """Whether an output depends on how far the text is padded, in spite of the attention mask."""
        return encoders.sees_padding(self.net)

    def _settle(self, problem: str, score_names: Sequence[str] | None) -> None:
        """Take a problem and its scores, the defaults for None, if they go with the other arguments."""
        if problem not in scores.SCORES:
            raise UserError(f"model.problem is {problem!r}: give one of {', '.join(scores.SCORES)}.")
        if problem == "regression":
            require("num_classes", self.num_classes, "1 for regression", self.num_classes == 1)
            require("class_weights", self.class_weights, "left out for regression", self.class_weights is None)
        if problem == "single_label":
            require("num_classes", self.num_classes, "at least 2", self.num_classes >= 2)
        else:
            require("label_smoothing", self.label_smoothing, f"0 for {problem}", self.label_smoothing == 0)
        self.problem, self.score_names = problem, list(score_names or scores.DEFAULTS[problem])
        self._metrics()  # refuses unknown names

    def _metrics(self) -> dict[str, Metric]:
        return scores.metrics(self.problem, self.score_names, self.num_classes)

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(by_name := self.hparams["class_weights"], dict):
            # A checkpoint makes the same model again without the names.
            self.hparams["class_weights"] = in_order = _in_order(by_name, getattr(data, "class_names", ()))
            self.class_weights = torch.tensor(in_order, device=self.device)
        asked, given = self.hparams["problem"], getattr(data, "problem", None)
        if asked and given and asked != given:
            raise UserError(f"model.problem is {asked!r}, but the data are {given!r}: leave model.problem out.")
        names = self.hparams["score_names"] or (getattr(data, "score_names", None) if given else None)
        self._settle(given or self.problem, names)
        self.score_with(self._metrics, self.score_names[0])
        if data is not None and hasattr(data, "padding_token") and encoders.finds_end_by_padding(self.net):
            self._pad_with(data.padding_token)
        # A checkpoint makes the same model again without the data.
        self.hparams["problem"], self.hparams["score_names"] = self.problem, self.score_names
        super().setup(stage)

    def _pad_with(self, token: int | None) -> None:
        """Let the network know which token the data are padded with, behind the last one that it reads."""
        if token is None:
            raise UserError(
                f"model.backbone {self.hparams['backbone']!r} has no padding token, and its tokenizer has neither one "
                'nor an end of text: add "pad_token" to tokenizer_config.json.'
            )
        if token != self.padding_token:
            rank_zero_info(f"The network takes token {token} for padding, as the data do: it had {self.padding_token}.")
            encoders.set_padding_token(self.net.config, token)  # type: ignore[arg-type]
            self.hparams["backbone_kwargs"] = {**(self.hparams["backbone_kwargs"] or {}), "pad_token_id": token}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Logits (B, classes), or (B,) of regression, of tokens (B, L)."""
        # Never labels=: the network's own loss breaks the graph and waits for the device in every step.
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        logits = self.net(input_ids=input_ids, attention_mask=attention_mask, **types).logits
        return logits.squeeze(-1) if self.problem == "regression" else logits

    def logits(self, batch: Batch) -> Tensor:
        return self(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))

    def losses(self, logits: Tensor, label: Tensor) -> Tensor:
        return self._losses(logits, label)

    def training_loss(self, batch: Batch) -> Tensor:
        return self._losses(self.logits(batch), batch["label"], self.label_smoothing).mean()

    def _losses(self, logits: Tensor, label: Tensor, smoothing: float = 0.0) -> Tensor:
        """Losses (B,): cross entropy, binary cross entropy averaged over the classes, or squared error."""
        weights: Any = self.class_weights
        if self.problem == "regression":
            return F.mse_loss(logits.to(label), label, reduction="none")
        if self.problem == "multi_label":
            each = F.binary_cross_entropy_with_logits(logits.to(label), label, pos_weight=weights, reduction="none")
            return each.mean(-1)
        return F.cross_entropy(logits, label, weights, label_smoothing=smoothing, reduction="none")

    def scored(self, logits: Tensor) -> Tensor:
        # Of numbers in [0, 1] torchmetrics would think that they are probabilities already.
        return (logits > 0).long() if self.problem == "multi_label" else logits

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Batch:
        """``index`` (B,) and: the most probable ``label`` (B,) and its ``probability`` (B,); for several labels
        the ``probabilities`` (B, classes); for regression the ``value`` (B,)."""
        logits = self.logits(batch).float()
        if self.problem == "regression":
            return {"index": batch["index"], "value": logits}
        if self.problem == "multi_label":
            return {"index": batch["index"], "probabilities": logits.sigmoid()}
        probability, label = logits.softmax(-1).max(-1)
        return {"index": batch["index"], "label": label, "probability": probability}


def _weights(values: Sequence[float] | dict[str, float] | None, num_classes: int) -> Tensor | None:
    """One weight per class, float (classes,); those by name in the order given, until the data say the right one."""
    if values is None:
        return None
    if not isinstance(values, dict):
        require("class_weights", values, f"{num_classes} numbers, one per class", len(values) == num_classes)
    weights = torch.tensor([*values.values()] if isinstance(values, dict) else values, dtype=torch.float32)
    require("class_weights", values, "positive and finite", bool((weights > 0).all() and weights.isfinite().all()))
    return weights


def _in_order(by_name: dict[Any, float], names: Sequence[str]) -> list[float]:
    """The weights in the order of ``names``; YAML reads a name such as ``no`` or ``1`` as something else than text."""
    read = {}
    for name in names:
        with contextlib.suppress(yaml.YAMLError, ValueError):
            read[repr(yaml_text.load(f"- {name}"))] = name
    given = {key if isinstance(key, str) else read.get(repr([key]), str(key)): by_name[key] for key in by_name}
    for name in given:
        if name not in names:
            raise UserError(
                f"model.class_weights has the class {name!r}{did_you_mean(name, names)}, but those of the data are "
                f"{', '.join(names) or 'not named'}."
            )
    for name in names:
        if name not in given:
            raise UserError(f"model.class_weights has no weight for the class {name!r}: give it one, such as 1.")
    return [given[name] for name in names]
