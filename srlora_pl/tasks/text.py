"""Classification and regression of texts on any transformers encoder."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from srlora_pl.data.protocols import UNSAID
from srlora_pl.lowrank import Method
from srlora_pl.models import encoders, pretrained
from srlora_pl.models.deberta import use_fast_attention
from srlora_pl.models.encoder_family import Transformers
from srlora_pl.tasks import scores
from srlora_pl.tasks.base import Batch, Task
from srlora_pl.tasks.evaluation import LogitScores
from srlora_pl.util import yaml_text
from srlora_pl.util.errors import UserError, did_you_mean, require, require_one_of
from srlora_pl.util.signatures import arguments_of


class TextClassifier(Task):
    """A transformers encoder with a new head, adapted by ``method``: head, pooler and adapters train.

    Takes batches with ``input_ids`` and ``attention_mask``, int64 (B, L), with ``token_type_ids`` where the tokenizer
    makes them; ``label``, int64 (B,), for regression float (B,), for several labels a text float (B, classes) of 0
    and 1; ``index``, int64 (B,), the sample's position in its split. Logs ``train/loss`` and, for ``val`` and
    ``test``, ``loss``, every score of ``score_names``, and the first of these again as ``score``; those of a second
    data loader under the name that the data give it, as ``val_mm`` of MNLI, or as ``val_2`` and ``test_2``.

    Args:
        backbone: a hub name, a local folder in transformers' layout, or ``minilm`` where that extra is installed. A
            head of ``num_classes`` that its weights bring along is taken, as `srlora_pl.models.heads.settle` says.
        num_classes: taken from the data when the command line builds the model; 1 for regression.
        method: the class of a method, such as ``srlora_pl.SRLoRA``, or its ``{class_path, init_args}``.
        backbone_kwargs: override the encoder's configuration, such as ``hidden_dropout_prob``, or say where the hub's
            files are found, such as ``revision``; ``pretrained: false`` starts from random weights.
        train_pooler: whether the pooler between encoder and head trains; DeBERTa's is always new.
        problem: ``single_label``, ``multi_label`` or ``regression``; by default what the data say, else regression
            for one class and ``single_label`` for more.
        score_names: of ``accuracy``, ``f1``, ``matthews`` (single label), ``f1``, ``accuracy`` (multi-label) or
            ``pearson``, ``spearman`` (regression), the main one first; by default what the data say.
        class_weights: one per class, in their order or as ``{name: weight}``. A sample's loss is multiplied by its
            class's; of several labels, the loss of those that are set. In ``val/loss`` and ``test/loss`` too.
        lr: the largest learning rate.
        schedule: the learning rate after the warm-up: ``cosine`` or ``linear`` down to 0 at the last step, or
            ``constant``.
        label_smoothing: in the training loss of a single-label problem only, from 0 up to 1.
        fast_attention: DeBERTa's attention without its repeated work, equal to rounding.
        kwargs: the other arguments of `Task`.

    Raises:
        UserError: a value out of range, an unknown name, weights that do not fit or cannot be had.
    """

    problem: str
    family: Transformers

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        method: Method,
        backbone_kwargs: dict[str, Any] | None = None,
        *,
        train_pooler: bool = True,
        problem: Literal["single_label", "multi_label", "regression"] | None = None,
        score_names: list[str] | None = None,
        class_weights: list[float] | dict[str, float] | None = None,
        lr: float = 1e-4,
        schedule: Literal["cosine", "linear", "constant"] = "linear",
        label_smoothing: float = 0.0,
        fast_attention: bool = False,
        **kwargs: Any,
    ) -> None:
        arguments = arguments_of(locals())
        super().__init__(method, lr=lr, schedule=schedule, **kwargs)
        require("model.num_classes", num_classes, "at least 1", num_classes >= 1)
        require("model.label_smoothing", label_smoothing, "from 0 up to, but not, 1", 0 <= label_smoothing < 1)
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.register_buffer("class_weights", _weights(class_weights, num_classes), persistent=False)
        self.backbone_name = pretrained.resolve(backbone)
        self.tokenizer_options = pretrained.hub_options(backbone_kwargs)
        self._settle(problem or ("single_label" if num_classes > 1 else "regression"), score_names)
        self.build(Transformers(backbone, num_classes, backbone_kwargs, **self.storage), arguments)
        if fast_attention:
            use_fast_attention(self.net, backbone)  # type: ignore[arg-type]

    def trained_heads(self, net: Any) -> tuple[str, ...]:
        return encoders.head_names(net, self.hparams["train_pooler"])

    # For the data, see srlora_pl.data.protocols.ModelForData.
    max_tokens = property(lambda self: encoders.max_tokens(self.net, self.adaptation.method.added_tokens))
    vocab_size = property(lambda self: pretrained.vocab_size(self.net))
    token_types = property(lambda self: encoders.token_types(self.net))
    padding_token = property(lambda self: pretrained.padding_token(self.net))
    pads_left = property(lambda self: encoders.pads_left(self.net))
    sees_padding = property(lambda self: encoders.sees_padding(self.net))

    def _settle(self, problem: str, score_names: Sequence[str] | None) -> None:
        """Set the problem and its scores (None: the defaults), if they fit the other arguments."""
        require_one_of("model.problem", problem, scores.SCORES)
        if problem == "regression":
            require("model.num_classes", self.num_classes, "1 for regression", self.num_classes == 1)
            require("model.class_weights", self.class_weights, "left out for regression", self.class_weights is None)
        if problem == "single_label":
            require("model.num_classes", self.num_classes, "at least 2", self.num_classes >= 2)
        else:
            require("model.label_smoothing", self.label_smoothing, f"0 for {problem}", self.label_smoothing == 0)
        self.problem, self.score_names = problem, list(score_names or scores.DEFAULTS[problem])
        metrics = scores.metrics(self.problem, self.score_names, self.num_classes)
        self.evaluation = LogitScores(metrics, self.score_names[0])

    def setup(self, stage: str) -> None:
        data = self._data
        if isinstance(by_name := self.hparams["class_weights"], dict):
            # So that a checkpoint makes the same model without the names.
            self.hparams["class_weights"] = in_order = _in_order(by_name, data.class_names)
            self.class_weights = torch.tensor(in_order, device=self.device)
        asked, given = self.hparams["problem"], data.problem
        if asked and given and asked != given:
            raise UserError(f"model.problem is {asked!r}, but the data are {given!r}: leave model.problem out.")
        names = self.hparams["score_names"] or (data.score_names if given else None)
        self._settle(given or self.problem, names)
        if data.padding_token is not UNSAID and encoders.finds_end_by_padding(self.net):
            self._pad_with(data.padding_token)
        # So that a checkpoint makes the same model without the data.
        self.hparams["problem"], self.hparams["score_names"] = self.problem, self.score_names
        super().setup(stage)

    def _pad_with(self, token: int | None) -> None:
        """Make ``token``, the data's padding, that of a network which finds the end of a text by it."""
        if token is None:
            raise UserError(
                f"model.backbone {self.hparams['backbone']!r} has no padding token, and its tokenizer has neither one "
                'nor an end of text: add "pad_token" to tokenizer_config.json.'
            )
        if token != self.padding_token:
            rank_zero_info(f"The network takes token {token} for padding, as the data do: it had {self.padding_token}.")
            pretrained.set_padding_token(self.net.config, token)  # type: ignore[arg-type]
            kwargs = {**(self.hparams["backbone_kwargs"] or {}), "pad_token_id": token}
            self.hparams["backbone_kwargs"], self.family = kwargs, replace(self.family, kwargs=kwargs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Logits (B, classes), or (B,) of regression, of tokens (B, L)."""
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        batch |= {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        logits = self.family.logits(self.net, batch)
        return logits.squeeze(-1) if self.problem == "regression" else logits

    def logits(self, batch: Batch) -> Tensor:
        return self(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))

    def training_loss(self, batch: Batch) -> Tensor:
        return self.losses(self.logits(batch), batch["label"], self.label_smoothing).mean()

    def losses(self, logits: Tensor, label: Tensor, smoothing: float = 0.0) -> Tensor:
        """Losses (B,): cross entropy, binary cross entropy averaged over the classes, or squared error."""
        weights: Any = self.class_weights
        if self.problem == "regression":
            return F.mse_loss(logits.to(label), label, reduction="none")
        if self.problem == "multi_label":
            each = F.binary_cross_entropy_with_logits(logits.to(label), label, pos_weight=weights, reduction="none")
            return each.mean(-1)
        return F.cross_entropy(logits, label, weights, label_smoothing=smoothing, reduction="none")

    def scored(self, logits: Tensor) -> Tensor:
        # torchmetrics would take numbers in [0, 1] for probabilities.
        return (logits > 0).long() if self.problem == "multi_label" else logits

    def card(self) -> dict[str, Any]:
        return {"problem_type": self.problem + "_classification" * (self.problem != "regression")}

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
    """One weight per class, float (classes,); weights by name keep their order until the data name the classes."""
    if values is None:
        return None
    if not isinstance(values, dict):
        require("model.class_weights", values, f"{num_classes} numbers, one per class", len(values) == num_classes)
    weights = torch.tensor([*values.values()] if isinstance(values, dict) else values, dtype=torch.float32)
    require(
        "model.class_weights", values, "positive and finite", bool((weights > 0).all() and weights.isfinite().all())
    )
    return weights


def _in_order(by_name: dict[Any, float], names: Sequence[str]) -> list[float]:
    """The weights in the order of ``names``, of which YAML reads some, such as ``no`` or ``1``, as something else."""
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
