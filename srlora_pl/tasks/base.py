"""What every task shares: optimizer and schedule, the watch over the loss, scores over whole splits."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric, MetricCollection

from srlora_pl.data.base import DataModule
from srlora_pl.lowrank import Method
from srlora_pl.lowrank.importance import all_finite
from srlora_pl.lowrank.methods import from_spec
from srlora_pl.models.heads import FoundHead, settle
from srlora_pl.models.peft_folder import PeftFolder
from srlora_pl.tasks.guards import require_that_a_batch_passes
from srlora_pl.tasks.optim import SCHEDULES, build_optimizer, optimizer_class, param_groups, schedule_factor
from srlora_pl.tasks.scores import Mean, OneClass
from srlora_pl.training import lightning_internals as internals
from srlora_pl.training.checkpoints import class_names, keep_settings, keep_to_own_folders, settings_of
from srlora_pl.training.mixin import SRLoRAMixin
from srlora_pl.training.resume import ExactResume
from srlora_pl.util.errors import UserError, did_you_mean
from srlora_pl.util.precision import MatmulPrecision
from srlora_pl.util.yaml_text import plain

Batch = dict[str, Tensor]
# By data loader; MNLI has two development sets, matched and mismatched.
SPLITS = {"val": ("val", "val_mm"), "test": ("test", "test_mm")}
# What a checkpoint holds: only what changed since the pretrained weights, or the whole network.
CHECKPOINTS = ("compact", "full")
_ONE_CLASS = "one_class"  # among a split's metrics; no score
MATMUL_PRECISIONS = ("highest", "high", "medium")
# What a checkpoint and the run that only uses its weights must agree in, and what even one that goes on may change
# (the mixin compares the method, and the weights themselves come from the checkpoint).
IDENTITY = ("num_classes", "backbone", "backbone_kwargs", "problem", "train_pooler")
# Of model.backbone_kwargs: where the weights lie, and which token the tokenizer pads with.
PLACES = ("pretrained", "cache_dir", "local_files_only", "proxies", "pad_token_id")
FREE = {"method", "backbone_checkpoint", "checkpoints", "compile", "matmul_precision"}


class Task(ExactResume, SRLoRAMixin, L.LightningModule):
    """A network that a method adapts, trained with an optimizer by name on batches that are dicts.

    A subclass gives `logits`, `losses` and, where training differs, `training_loss`; its ``__init__`` sets
    `found_head`, if the pretrained weights bring the head along, and calls `build`. ``optimizer``: ``sgd`` (with
    ``momentum``), ``adamw``, or the path of a torch optimizer class. ``lr``: the largest learning rate; ``head_lr``:
    the head's own. ``warmup_steps`` optimizer steps rise linearly from 0, then the rate follows ``schedule`` to 0 at
    the run's last step, or stays.

    Attributes:
        trained_classes: the names of the outputs, from the data of a fit or from a checkpoint; empty where neither
            tells them.
        found_head: the head that came with the pretrained weights, as long as its outputs may mean other classes than
            the data's.
    """

    trained_classes: Sequence[str] = ()
    found_head: FoundHead | None = None

    def __init__(
        self,
        optimizer: str,
        lr: float,
        head_lr: float | None,
        momentum: float,
        weight_decay: float,
        schedule: str,
        warmup_steps: int,
    ) -> None:
        super().__init__()
        optimizer_class(optimizer)
        if schedule not in SCHEDULES:
            near = did_you_mean(schedule, SCHEDULES)
            raise UserError(f"model.schedule is {schedule!r}{near}: give one of {', '.join(SCHEDULES)}.")
        require("lr", lr, "positive", 0 < lr < math.inf)
        require("head_lr", head_lr, "positive", head_lr is None or 0 < head_lr < math.inf)
        require("momentum", momentum, "from 0 up to, but not, 1", 0 <= momentum < 1)
        require("weight_decay", weight_decay, "0 or positive", 0 <= weight_decay < math.inf)
        require("warmup_steps", warmup_steps, "0 or positive", warmup_steps >= 0)
        self.optimizer, self.momentum, self.weight_decay = optimizer, momentum, weight_decay
        self.lr, self.head_lr, self.schedule, self.warmup_steps = lr, head_lr, schedule, warmup_steps
        self._non_finite = torch.zeros((), dtype=torch.bool)
        self._checked_step = 0
        self._one_class: dict[str, Tensor] = {}  # by split, at its last scores
        self._has_hinted = False
        self._began_with: dict[str, dict[str, Any]] = {}  # settings of the callbacks

    # What a subclass says about itself

    def build(
        self,
        net: nn.Module,
        method: Method | dict[str, Any],
        heads: tuple[str, ...],
        scores: Callable[[], dict[str, Metric]],
        main_score: str,
        arguments: dict[str, Any],
        make: Callable[[], nn.Module],
        new: tuple[str, ...] = (),
    ) -> None:
        """Adapt ``net`` and remember how it was made.

        ``heads``: dotted names in ``net`` of what trains besides the adapters. ``scores``: makes the metrics of
        one split; ``main_score`` names the one that is also logged as ``score``. ``arguments``: the subclass's
        constructor arguments, kept in every checkpoint, as plain containers because checkpoints are read with
        ``weights_only=True``. ``make``: makes ``net`` once more. ``new``: what is new in it,
        if that is more than ``heads``.
        """
        require("checkpoints", arguments["checkpoints"], "compact or full", arguments["checkpoints"] in CHECKPOINTS)
        precision = arguments["matmul_precision"]
        require("matmul_precision", precision, "highest, high or medium", precision in MATMUL_PRECISIONS)
        self.whole_checkpoints = arguments["checkpoints"] == "full"
        method = as_method(method)
        self.save_hyperparameters(plain({**arguments, "method": method.spec()}))
        self.adapter = PeftFolder.read(arguments["adapter"]) if arguments.get("adapter") else None
        prepare = partial(_with_adapter, self.adapter, method, heads)
        self.net = prepare(net)
        self.heads = tuple(f"net.{head}." for head in heads)
        # Random weights come from nowhere again, so their checkpoints are whole.
        random = not (arguments["backbone_checkpoint"] or (arguments["backbone_kwargs"] or {}).get("pretrained", True))
        self.adapt(self.net, method, heads, None if random else partial(_pretrained_state, make, prepare), new)
        if self.adapter is not None:
            self.adapter.load_into(self.adaptation)
            self.found_head = self.adapter.head(self.net, heads, arguments["num_classes"]) or self.found_head
        self.score_with(scores, main_score)

    def score_with(self, scores: Callable[[], dict[str, Metric]], main_score: str) -> None:
        """Score every split anew with what ``scores`` makes."""
        self.main_score = main_score
        splits = [split for stage in SPLITS.values() for split in stage]
        self.scores = nn.ModuleDict({split: _collect(scores()) for split in splits})

    def compile_blocks(self) -> None:
        """Compile each repeated block that holds adapters: one graph serves all, and start-up stays short."""
        blocks = {found[1] for name in self.adaptation.layers if (found := re.match(r"((?:.*\.)?\d+)\.", name))}
        for block in sorted(blocks):
            self.net.get_submodule(block).compile()

    def logits(self, batch: Batch) -> Tensor:
        """The network's output for ``batch``."""
        raise NotImplementedError

    def losses(self, logits: Tensor, label: Tensor) -> Tensor:
        """The loss of each sample (B,), as reported for validation and test."""
        raise NotImplementedError

    def scored(self, logits: Tensor) -> Tensor:
        """What the metrics take as ``preds``."""
        return logits

    def training_loss(self, batch: Batch) -> Tensor:
        """The mean loss that training minimises."""
        return self.losses(self.logits(batch), batch["label"]).mean()

    # A run

    def setup(self, stage: str) -> None:
        self._precision_before = MatmulPrecision.now()
        torch.set_float32_matmul_precision(self.hparams["matmul_precision"])
        if stage == "fit":
            self._began_with = settings_of(self.trainer.callbacks)  # type: ignore[attr-defined]
        else:
            self._require_same_classes(self.trained_classes)
        super().setup(stage)

    def _settle_head(self) -> None:
        """Once, where no checkpoint was loaded and before the head is used, which is that of the data from then on."""
        head, self.found_head = self.found_head, None
        if head is not None:
            rank_zero_info(settle(self.net, head, self._classes_of_the_data()))

    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        self._precision_before.restore()

    # Training

    def configure_optimizers(self) -> OptimizerLRScheduler:
        total = self.trainer.estimated_stepping_batches
        if self.schedule != "constant" and not math.isfinite(total):
            raise UserError(
                f"model.schedule {self.schedule!r} ends with the run, whose length is not known: set trainer.max_steps."
            )
        if self.warmup_steps > total and not self._is_rehearsal:
            raise UserError(
                f"model.warmup_steps is {self.warmup_steps} but the run has {total} optimizer steps: lower it, or "
                "raise trainer.max_steps or trainer.max_epochs."
            )
        groups = param_groups(
            self.named_parameters(), lambda name: name.startswith(self.heads), self.lr, self.head_lr, self.weight_decay
        )
        scaled = self.trainer.precision == "16-mixed"
        optimizer = build_optimizer(self.optimizer, groups, self.lr, self.momentum, scaled)

        # A closure: LambdaLR stores callable objects in checkpoints, and a resumed run may have another length.
        def factor(step: int) -> float:
            return schedule_factor(self.schedule, step, total, self.warmup_steps)

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def on_fit_start(self) -> None:
        self.trained_classes = self._classes_of_the_data()
        self._refuse_unknown_scores()
        self._settle_head()
        self._has_hinted, self._one_class = False, {}
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, DataModule) and type(self).__module__.startswith("srlora_pl."):
            require_that_a_batch_passes(self, data)  # of a user's own task it is not known what else it does
        super().on_fit_start()

    def _refuse_unknown_scores(self) -> None:
        """Lightning looks for a callback's score when it first needs it, which may be hours into the run."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if not all(type(each).__module__.startswith(("lightning.", "srlora_pl.")) for each in [self, *callbacks]):
            return  # what a user's own code logs is not known here
        names = [*(name for name in self._scores_of("val") if name != _ONE_CLASS), "score"]
        known = ["train/loss", "srlora/switches", *(f"{split}/{name}" for split in SPLITS["val"] for name in names)]
        for callback in callbacks:
            score = getattr(callback, "monitor", None)
            if score is not None and score not in known:
                raise UserError(
                    f"The callback {type(callback).__name__} monitors {score!r}{did_you_mean(score, known)}, but this "
                    f"run scores {', '.join(known)}."
                )
            if isinstance(callback, EarlyStopping) and str(score).startswith("val") and not self._validates:
                raise UserError(
                    f"The callback {type(callback).__name__} monitors {score!r}, but this run has no validation: set "
                    "data.val_fraction above 0, or monitor train/loss."
                )

    @property
    def _validates(self) -> bool:
        trainer: Any = self.trainer
        return trainer.enable_validation and getattr(trainer.datamodule, "val_set", True) is not None

    def on_train_start(self) -> None:
        super().on_train_start()
        self._non_finite = torch.zeros((), dtype=torch.bool, device=self.device)
        self._checked_step = self.global_step

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.training_loss(batch)
        self._non_finite = self._non_finite | ~torch.isfinite(loss.detach())
        self.log("train/loss", loss, batch_size=len(batch["label"]))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self.global_step - self._checked_step >= every:
            self._refuse_non_finite_loss()
        super().on_train_batch_end(outputs, batch, batch_idx)

    def on_train_end(self) -> None:
        self._refuse_non_finite_loss()
        super().on_train_end()
        self._hint_at_one_class("val")

    def _refuse_non_finite_loss(self) -> None:
        """Raise if any loss since the last look was NaN or infinite; the only place that waits for the device."""
        first, last = self._checked_step + 1, max(self.global_step, self._checked_step + 1)
        self._checked_step = self.global_step
        bad = self.trainer.strategy.reduce_boolean_decision(bool(self._non_finite), all=False)
        if bad and not self._is_tuning:
            raise UserError(
                f"The training loss became NaN or infinite in steps {first} to {last}: start anew with a lower "
                "model.lr or more model.warmup_steps, or go on from the last checkpoint, if there is one it is good, "
                "with another trainer.precision (bf16-mixed, 32-true) or trainer.gradient_clip_val."
            )

    def _refuse_non_finite_weights(self) -> None:
        """The loss of a step may be finite, and its gradients not."""
        finite = bool(all_finite([p for p in self.parameters() if p.requires_grad]))
        if not self.trainer.strategy.reduce_boolean_decision(finite) and not self._is_tuning:
            raise UserError(
                f"The weights became NaN or infinite before step {self.global_step + 1}, though the loss was finite: "
                "start anew with a lower model.lr, or go on from the last checkpoint, if there is one it is good, with "
                "trainer.precision 32-true or 64-true."
            )

    @property
    def _is_tuning(self) -> bool:
        """Whether Lightning's learning-rate or batch-size finder is at work: it may diverge on purpose."""
        return isinstance(self.trainer.logger, DummyLogger) and not self._is_rehearsal

    @property
    def _is_rehearsal(self) -> bool:
        return bool(self.trainer.fast_dev_run)  # type: ignore[attr-defined]

    # Evaluation

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._score(SPLITS["val"][dataloader_idx], batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._score(SPLITS["test"][dataloader_idx], batch)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._settle_head()
        self._reset("val")

    def on_test_epoch_start(self) -> None:
        self._settle_head()
        self._reset("test")

    def on_predict_start(self) -> None:
        self._settle_head()

    def on_validation_epoch_end(self) -> None:
        self._report("val")
        if self.trainer.state.fn == "validate":
            self._hint_at_one_class("val")
        super().on_validation_epoch_end()

    def on_test_epoch_end(self) -> None:
        self._report("test")
        self._hint_at_one_class("test")

    def _score(self, split: str, batch: Batch) -> None:
        if "spare" in batch:  # another device scores it
            return
        logits, label = self.logits(batch), batch["label"]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # Each metric takes from these what its own update() names.
        self._scores_of(split).update(preds=self.scored(logits), target=label, value=self.losses(logits, label))

    def _reset(self, stage: str) -> None:
        for split in SPLITS[stage]:
            self._scores_of(split).reset()

    def _report(self, stage: str) -> None:
        for split in SPLITS[stage]:
            scores = self._scores_of(split)
            # A device may have had nothing to score, but all must come along to add up.
            if self.trainer.strategy.reduce_boolean_decision(scores["loss"].update_called, all=False):
                values = scores.compute()
                self._one_class[split] = values.pop(_ONE_CLASS)
                values["score"] = values[self.main_score]
                # All devices have the same values already, and their largest is the same to the bit.
                named = {f"{split}/{name}": value for name, value in values.items()}
                self.log_dict(named, sync_dist=True, reduce_fx="max")

    def _hint_at_one_class(self, stage: str) -> None:
        """Say once a run that its end is a model which gives every sample the same class."""
        for split in SPLITS[stage]:
            place, count = self._one_class.get(split, torch.tensor([-1, 0])).tolist()
            if place >= 0 and not self._is_rehearsal and not self._has_hinted:
                self._has_hinted = True
                names = getattr(self.trainer.datamodule, "class_names", None) or range(place + 1)  # type: ignore[attr-defined]
                rank_zero_info(
                    f"All {count} predictions on {split} are class {str(names[place])!r}: the model does not tell the "
                    "classes apart yet; train longer, or try another model.lr."
                )

    def _scores_of(self, split: str) -> MetricCollection:
        return cast(MetricCollection, self.scores[split])

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._refuse_non_finite_loss()
        self._refuse_non_finite_weights()
        states = checkpoint.get("callbacks", {})
        checkpoint["callback_settings"] = {key: self._began_with[key] for key in states if key in self._began_with}
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("hyper_parameters", {})
        # To go on, all must agree: the optimizer's state would bring the old values back without a word.
        resumes = internals.trainer_of(self) is not None and self.trainer.state.fn == "fit"
        if resumes:
            callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
            keep_settings(checkpoint, callbacks, checkpoint.get("callback_settings", {}))
            keep_to_own_folders(checkpoint, self.trainer.checkpoint_callbacks)  # type: ignore[attr-defined]
        for key in sorted(set(saved) - FREE) if resumes else IDENTITY:
            if key in saved and _identity(saved[key]) != _identity(self.hparams.get(key)):
                mend = "give it data of as many classes" if key == "num_classes" else f"set model.{key} to the former"
                raise UserError(
                    f"The checkpoint was written with model.{key} {saved[key]!r}, but this run has "
                    f"{self.hparams.get(key)!r}: {mend}, or start anew without --ckpt_path."
                )
        self.trained_classes = class_names(checkpoint) or []
        self._require_same_classes(self.trained_classes)
        self.found_head = None
        super().on_load_checkpoint(checkpoint)

    def _require_same_classes(self, trained: Sequence[str]) -> None:
        """An output means a class by its place alone; so data of other classes would be scored against wrong ones."""
        given = self._classes_of_the_data()
        data = None if internals.trainer_of(self) is None else self.trainer.datamodule  # type: ignore[attr-defined]
        if getattr(data, "names_numbers", False) and list(trained) == [*map(str, range(len(given)))]:
            return  # of an older checkpoint
        if len(trained) != len(given):
            return  # regression, data that name no classes; or another number of classes, refused as such
        for place, (theirs, ours) in enumerate(zip(trained, given, strict=True)):
            if theirs != ours:
                raise UserError(
                    f"The model was trained on other classes: number {place} is {theirs!r} there and {ours!r} in "
                    "this data; name the classes of the data as they were, or start anew without --ckpt_path."
                )

    def _classes_of_the_data(self) -> list[str]:
        data = None if internals.trainer_of(self) is None else self.trainer.datamodule  # type: ignore[attr-defined]
        return list(getattr(data, "class_names", None) or [])


def _with_adapter(adapter: PeftFolder | None, method: Method, heads: Sequence[str], net: nn.Module) -> nn.Module:
    return net if adapter is None else adapter.prepare(net, method, heads)


def _pretrained_state(make: Callable[[], nn.Module], prepare: Callable[[nn.Module], nn.Module]) -> Mapping[str, Tensor]:
    """What training begins from, once more; a function with a name, so that a module can be pickled."""
    return prepare(make()).state_dict()


def _collect(scores: dict[str, Metric]) -> MetricCollection:
    # Groups would be found by equal values in the first batch, which may be a coincidence.
    return MetricCollection({"loss": Mean(), **scores, _ONE_CLASS: OneClass()}, compute_groups=False)


def require(key: str, value: Any, what: str, holds: bool) -> None:
    """Refuse a number that a user gave as ``model.<key>`` unless it ``holds``."""
    if not holds:
        raise UserError(f"model.{key} is {value}: it must be {what}.")


def as_method(method: Method | dict[str, Any]) -> Method:
    """A method object as it is; or made from ``{class_path, init_args}``, as a checkpoint keeps it.

    A checkpoint may come from anyone, so its ``class_path`` only picks among the methods that are imported.
    """
    return method if isinstance(method, Method) else from_spec(method)


def _identity(value: Any) -> Any:
    """What must agree: a path's last part (folders move) and the arguments that shape the network."""
    if isinstance(value, str):
        return Path(value).name
    if isinstance(value, dict):
        return {k: v for k, v in value.items() if k not in PLACES}
    return value or {}
