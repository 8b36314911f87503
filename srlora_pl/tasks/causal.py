"""Supervised fine-tuning of causal language models on instructions and answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from srlora_pl.data.protocols import Batch, DataForTask, Generation
from srlora_pl.lowrank import Method
from srlora_pl.lowrank.shards import own_part
from srlora_pl.models import causal, pretrained
from srlora_pl.models.causal_family import Causal
from srlora_pl.models.generation import Completion, generate
from srlora_pl.models.token_loss import summed_loss, token_losses
from srlora_pl.tasks.answers import Answers, Row, digest
from srlora_pl.tasks.base import Task
from srlora_pl.tasks.guards import on_device
from srlora_pl.tasks.token_scores import TextScores
from srlora_pl.util.cache import fingerprint
from srlora_pl.util.errors import UserError, require
from srlora_pl.util.signatures import arguments_of


class CausalLM(Task):
    """A causal language model of transformers, adapted by ``method``: adapters train, all else is frozen.

    Takes batches with ``input_ids`` and ``labels``, int64 (B, L), padded on the right: a label stands at the place of
    its own token, and is -100 where nothing is learned. Texts padded on the left need an ``attention_mask`` (B, L).
    Packed samples have ``position_ids`` (B, L) that begin anew with each. Training minimises the mean loss over all
    answer tokens of an optimizer step, whatever its micro-batches and devices: ``step_tokens``, int64 (), of a batch is
    their number; without it a micro-batch counts as a whole.

    Logs ``train/loss`` and, for ``val``, ``loss``, ``perplexity``, ``token_accuracy`` and ``score`` (the accuracy
    again). Tests that generate log ``accuracy``, ``score``, and the shares that are ``unfinished`` (no end within the
    tokens allowed) and ``unreadable`` (no answer found).

    Args:
        backbone: a hub name, a local folder in transformers' layout, or ``smollm2`` where its packages are installed.
        method: the class of a method, such as ``srlora_pl.SRLoRA``, or its ``{class_path, init_args}``.
        backbone_kwargs: override the configuration, such as ``attn_implementation``, or say where the hub's files are
            found, such as ``revision``; ``pretrained: false`` starts from random weights.
        activation_checkpointing: compute the activations of each block again in the backward pass, instead of keeping
            them: a third more work, far less memory.
        loss_chunk: how many rows of logits are in memory at a time.
        samples: how many prompts of the validation split are answered in the log at each validation.
        lr: the largest learning rate.
        schedule: the learning rate after the warm-up: ``cosine`` or ``linear`` down to 0 at the last step, or
            ``constant``.
        kwargs: the other arguments of `Task`.

    Attributes:
        answers: the file of JSON lines that generated answers are written to, each as it comes; None for none.

    Raises:
        UserError: a value out of range, an unknown name, weights that do not fit or cannot be had.
    """

    family: Causal
    evaluation: TextScores
    answers: Path | None = None
    beside_nf4 = "bfloat16"
    generates = True

    def __init__(
        self,
        backbone: str,
        method: Method,
        backbone_kwargs: dict[str, Any] | None = None,
        *,
        activation_checkpointing: bool = False,
        loss_chunk: int = 256,
        samples: int = 4,
        lr: float = 1e-4,
        schedule: Literal["cosine", "linear", "constant"] = "linear",
        **kwargs: Any,
    ) -> None:
        arguments = arguments_of(locals())
        super().__init__(method, lr=lr, schedule=schedule, **kwargs)
        require("model.loss_chunk", loss_chunk, "1 or more", loss_chunk >= 1)
        require("model.samples", samples, "0 or more", samples >= 0)
        self.loss_chunk, self.samples = loss_chunk, samples
        self.backbone_name = pretrained.resolve(backbone)
        self.tokenizer_options = pretrained.hub_options(backbone_kwargs)
        self.evaluation = TextScores()
        self.build(Causal(backbone, backbone_kwargs, **self.storage), arguments)
        if activation_checkpointing:
            # The reentrant kind trains nothing behind a frozen embedding.
            net: Any = self.net
            # Its name before transformers 5.24.
            enable = getattr(net, "activation_checkpointing_enable", None) or net.gradient_checkpointing_enable
            enable({"use_reentrant": False})

    # For the data, see srlora_pl.data.protocols.ModelForData.
    max_tokens = property(lambda self: causal.max_tokens(self.net, self.adaptation.method.added_tokens))
    vocab_size = property(lambda self: pretrained.vocab_size(self.net))
    padding_token = property(lambda self: pretrained.padding_token(self.net))

    @property
    def data(self) -> DataForTask:
        """The run's data."""
        return self._data

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, L, vocabulary) of tokens (B, L)."""
        net: Any = self.net
        return net(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    def _predicting(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The hidden states (n, hidden) that predict an answer token, that token (n,), and its row in the batch (n,).

        A batch may bring ``predicts``, the places of the n tokens before answer tokens in (B x L), int64: finding them
        here makes the host wait for the device.
        """
        if "labels" not in batch:
            raise UserError("a batch has no labels (B, L), which say what to learn: -100 where nothing is learned")
        labels = batch["labels"]
        following = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        places = batch["predicts"] if "predicts" in batch else (following != -100).nonzero()[:, 0]
        given = batch.get("position_ids"), batch.get("attention_mask")
        hidden = causal.hidden_states(self.net, batch["input_ids"], *given)
        return hidden.flatten(0, 1)[places], following[places], places // labels.shape[1]

    # Training

    def samples_in(self, batch: Batch) -> int:
        return len(batch["input_ids"])

    def training_loss(self, batch: Batch) -> Tensor:
        total, tokens = self._total(batch)
        return total / tokens

    def _total(self, batch: Batch) -> tuple[Tensor, int]:
        """The summed loss of the answer tokens of ``batch``, and their number; of none, 0 and 1."""
        hidden, target, _ = self._predicting(batch)
        return summed_loss(hidden, target, causal.head(self.net), self.loss_chunk), max(1, len(target))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        total, tokens = self._total(batch)
        self._loss.add(total)
        self.log("train/loss", total.detach() / tokens, batch_size=self.samples_in(batch))
        if "step_tokens" not in batch:
            return total / tokens
        # Lightning divides by the number of micro-batches, also in a short last window, and DDP by that of devices.
        parts = self.trainer.accumulate_grad_batches * self.trainer.world_size
        return total * (parts / batch["step_tokens"].clamp(min=1))

    def trial_loss(self, batch: Batch) -> Tensor:
        causal.require_known_head(self.net, self.hparams["backbone"], batch["input_ids"][:1, :8])
        return self.training_loss(batch)

    # Evaluation

    def token_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of each answer token (n,), and whether it is the most probable one, bool (n,)."""
        hidden, target, _ = self._predicting(batch)
        return token_losses(hidden, target, causal.head(self.net), self.loss_chunk)

    def log_likelihoods(self, batch: Batch) -> Tensor:
        """log p of the answer tokens of each row, summed, (B,)."""
        hidden, target, row = self._predicting(batch)
        losses, _ = token_losses(hidden, target, causal.head(self.net), self.loss_chunk)
        return -losses.new_zeros(len(batch["labels"])).index_add(0, row, losses)

    def complete(self, batch: Batch, settings: Generation) -> list[Completion]:
        """The answers to the prompts of ``batch``.

        Raises:
            UserError: the weights are split over processes, which would have to wait for each other at every token.
        """
        if self.is_sharded:
            raise UserError(
                "trainer.strategy fsdp2 generates no answers: let `srlora test` or `srlora predict` do it from the "
                "checkpoint, on one device or with ddp"
            )
        ids, mask = batch["input_ids"], batch["attention_mask"]
        return generate(self.net, self._data.tokenizer, ids, mask, settings.max_new_tokens, settings.stop)

    def sample_answers(self) -> list[Row]:
        """Answers to the first ``samples`` prompts of the validation split, graded if it has a grader."""
        data = self._data
        if not self.samples or self.is_sharded:
            return []
        if data.generation_batch is None or data.generation is None or data.question is None:
            return []
        split = data.split_names.get("val", ("val",))[0]
        settings, question = data.generation(split), data.question
        batch = on_device(self, self.trainer.datamodule, data.generation_batch(split, range(self.samples)))  # type: ignore[attr-defined]
        answers = zip(batch["index"].tolist(), self.complete(batch, settings), strict=True)
        return [
            {"index": index, **self.evaluation.graded(settings, split, question(split, index), each)}
            for index, each in answers
        ]

    def on_test_start(self) -> None:
        self._begin_answers(self._data.split_names.get("test", ("test",)))

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self._write_answers(self._splits)
        if len(self._splits) > 1 and self.evaluation.main:
            mean = torch.stack([*self.evaluation.main.values()]).mean()
            self.log("test/score", mean, sync_dist=True, reduce_fx="max")  # the same in all processes

    def on_test_end(self) -> None:
        self.adaptation.unmerge()

    def on_predict_start(self) -> None:
        super().on_predict_start()
        self._begin_answers(["predict"])

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Of each prompt its ``index``, the ``prompt``, the ``text`` and whether it is ``finished``."""
        return [] if "spare" in batch else self.evaluation.generate(self, "predict", batch)

    def on_predict_epoch_end(self) -> None:
        self._write_answers(["predict"], ("index", "prompt", "text", "finished"))

    def on_predict_end(self) -> None:
        self.adaptation.unmerge()

    def _begin_answers(self, splits: Sequence[str]) -> None:
        trained = {name: own_part(p) for name, p in self.net.named_parameters() if p.requires_grad}
        data = self._data
        asked = [repr(data.generation(split)) for split in splits] if data.generation else []
        model = digest(fingerprint(trained), self.hparams["backbone"], str(self.trainer.precision), asked)
        # Processes that start at once may each have found another folder free.
        self.evaluation.begin(Answers(self.trainer.strategy.broadcast(self.answers), model))
        try:
            self.adaptation.merge()  # which spares generation the products of the adapters
        except UserError:  # they are no part of a weight, and stay beside it
            self.adaptation.unmerge()

    def _write_answers(self, splits: Sequence[str], names: Sequence[str] = ()) -> None:
        """Write the answers to ``splits``; of each what is called ``names``, or everything."""
        rows = [row for split in splits for row in self.evaluation.answers.of(split)]
        self.evaluation.answers.write([{name: row[name] for name in names or row} for row in rows])
