"""The base of the tasks: a network that a method adapts, its optimizer and schedule, its loss and its scores."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from srlora_pl.data.protocols import Batch, DataForTask, data_of
from srlora_pl.lowrank import Method, gradients
from srlora_pl.lowrank.method import Sources
from srlora_pl.lowrank.methods import from_spec
from srlora_pl.lowrank.target_settings import is_below
from srlora_pl.lowrank.targets import repeated_blocks
from srlora_pl.models.family import ModelFamily
from srlora_pl.models.heads import FoundHead, settle
from srlora_pl.models.peft_folder import PeftFolder
from srlora_pl.models.weights import DTYPES, NF4, prepared
from srlora_pl.tasks.evaluation import Evaluation
from srlora_pl.tasks.guards import (
    FiniteLoss,
    on_device,
    require_autocast,
    require_finite_weights,
    require_known_scores,
    require_that_a_batch_passes,
)
from srlora_pl.tasks.identity import require_same_classes, require_same_model
from srlora_pl.tasks.optim import SCHEDULES, build_optimizer, optimizer_class, require_length, schedule_factor
from srlora_pl.training import lightning_internals as internals
from srlora_pl.training.checkpoints import class_names, keep_settings, keep_to_own_folders, settings_of
from srlora_pl.training.mixin import SRLoRAMixin
from srlora_pl.training.resume import ExactResume
from srlora_pl.util.errors import UserError, require, require_one_of
from srlora_pl.util.precision import restorer
from srlora_pl.util.signatures import arguments_of
from srlora_pl.util.yaml_text import plain


class Task(ExactResume, SRLoRAMixin, L.LightningModule):
    """A network that a method adapts, trained with an optimizer by name on batches that are dicts.

    A subclass's ``__init__`` passes the arguments below on, sets `evaluation`, and calls `build`. It gives `logits`,
    `losses` and, where training differs, `training_loss`.

    Args:
        method: the class of a method, such as ``srlora_pl.SRLoRA``, or its ``{class_path, init_args}``.
        backbone_checkpoint: a local weights file (safetensors or torch) instead of the name's own weights.
        weights: the type of frozen weights: of a causal language model's all, else of its linear layers' matrices. In
            ``bfloat16`` a method that moves them does so exactly, and keeps the bits that they gain on the CPU.
            ``nf4`` puts the linears inside the repeated blocks into four bits, for methods that leave them as they are.
        adapter: a folder that the PEFT library saved a LoRA in, as a start: ``LoRA`` goes on with its pairs, for the
            other methods it becomes part of the pretrained weights; its head is taken as the backbone's is.
        optimizer: ``sgd``, ``adamw``, or the path of a torch optimizer class; a method with an optimizer of its own
            (LoRA-Pro, GaLore) has it in the first two forms.
        lr: the largest learning rate.
        head_lr: the largest learning rate of the head (and the pooler); by default ``lr``.
        momentum: of ``sgd``.
        weight_decay: on matrices; biases and norms are never decayed.
        schedule: the learning rate after the warm-up: ``cosine`` or ``linear`` down to 0 at the last step, or
            ``constant``.
        warmup_steps: optimizer steps over which the learning rate rises linearly from 0.
        compile: run each repeated block through ``torch.compile``.
        matmul_precision: of fp32 products during a run, see ``torch.set_float32_matmul_precision``: ``high`` is TF32
            on NVIDIA's GPUs from Ampere on. Starts and switches are always computed in full fp32.
        checkpoints: ``compact`` files hold the changes since the pretrained weights; ``full`` ones the whole network.

    Attributes:
        family: builds, saves and loads the network.
        evaluation: scores validation and test.
        beside_nf4: the type of all else beside weights in four bits.
        generates: whether it answers in texts, which it writes to the file ``answers`` itself.
        trained_classes: the names of the outputs, from the data of a fit or from a checkpoint; empty where neither
            tells them.
        found_head: the head that came with the pretrained weights, as long as its outputs may mean other classes than
            the data's.
    """

    family: ModelFamily
    evaluation: Evaluation
    beside_nf4 = "float32"
    generates = False
    trained_classes: Sequence[str] = ()
    found_head: FoundHead | None = None

    def __init__(
        self,
        method: Method,
        *,
        backbone_checkpoint: str | None = None,
        weights: Literal["float32", "bfloat16", "nf4"] = "float32",
        adapter: str | None = None,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        head_lr: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        warmup_steps: int = 0,
        compile: bool = False,
        matmul_precision: Literal["highest", "high", "medium"] = "highest",
        checkpoints: Literal["compact", "full"] = "compact",
    ) -> None:
        shared = arguments_of(locals())
        super().__init__()
        optimizer_class(optimizer)
        require_one_of("model.weights", weights, (*DTYPES, NF4))
        require_one_of("model.schedule", schedule, SCHEDULES)
        require("model.lr", lr, "positive", 0 < lr < math.inf)
        require("model.head_lr", head_lr, "positive", head_lr is None or 0 < head_lr < math.inf)
        require("model.momentum", momentum, "from 0 up to, but not, 1", 0 <= momentum < 1)
        require("model.weight_decay", weight_decay, "0 or positive", 0 <= weight_decay < math.inf)
        require("model.warmup_steps", warmup_steps, "0 or positive", warmup_steps >= 0)
        require_one_of("model.matmul_precision", matmul_precision, ("highest", "high", "medium"))
        require_one_of("model.checkpoints", checkpoints, ("compact", "full"))
        self.optimizer, self.momentum, self.weight_decay = optimizer, momentum, weight_decay
        self.lr, self.head_lr, self.schedule, self.warmup_steps = lr, head_lr, schedule, warmup_steps
        self.whole_checkpoints = checkpoints == "full"
        dtype = self.beside_nf4 if weights == NF4 else weights
        self.storage: dict[str, Any] = {"checkpoint": backbone_checkpoint, "weights": dtype}  # of the family
        self._method = method if isinstance(method, Method) else from_spec(method)
        # Plain containers, because checkpoints are read with weights_only=True.
        self.save_hyperparameters(plain({**shared, "method": self._method.spec()}))
        self._loss = FiniteLoss()
        self._splits: list[str] = []  # of the present or last evaluation, by data loader
        self._scored: set[str] = set()  # those of which this process has scored a batch
        self._has_remarked = False
        self._began_with: dict[str, dict[str, Any]] = {}  # settings of the callbacks

    # For and by subclasses

    def build(self, family: ModelFamily, arguments: Mapping[str, Any]) -> None:
        """Build the network, adapt it, and keep the constructor's arguments for checkpoints.

        Args:
            family: of the network.
            arguments: those of the subclass's ``__init__``, as `arguments_of` gives them.
        """
        self.save_hyperparameters(plain({**arguments, "method": self._method.spec()}))
        self.family, method = family, self._method
        net, self.found_head = family.build()
        heads = self.trained_heads(net)
        folder = self.hparams["adapter"]
        self.adapter = PeftFolder.read(folder) if folder else None
        prepare = partial(prepared, self.adapter, method, heads, self.hparams["weights"])
        self.net = prepare(net)
        # Random weights cannot be had again, so their checkpoints are whole.
        pretrained = None if family.random else partial(_pretrained_state, family, prepare)
        self.adapt(self.net, method, heads, pretrained, family.heads(net))
        if self.adapter is not None:
            self.adapter.load_into(self.adaptation)
            self.found_head = self.adapter.head(self.net, heads, self.hparams.get("num_classes", 0)) or self.found_head
        if self.hparams["compile"]:
            self.compile_blocks()

    def trained_heads(self, net: nn.Module) -> tuple[str, ...]:
        """Dotted names in ``net`` of the modules that train besides the adapters."""
        return self.family.heads(net)

    def compile_blocks(self) -> None:
        """Compile each repeated block that holds adapters: one graph serves all, and start-up stays short.

        Every repeated block where the method puts none in.
        """
        blocks, adapters = repeated_blocks(self.net), self.adaptation.layers
        for block in [b for b in blocks if any(is_below(name, [b]) for name in adapters)] or blocks:
            self.net.get_submodule(block).compile()

    def logits(self, batch: Batch) -> Tensor:
        """The network's output for ``batch``."""
        raise NotImplementedError

    def losses(self, logits: Tensor, label: Tensor) -> Tensor:
        """The loss of each sample (B,), as reported for validation and test."""
        raise NotImplementedError

    def scored(self, logits: Tensor) -> Tensor:
        """The ``preds`` of the metrics."""
        return logits

    def training_loss(self, batch: Batch) -> Tensor:
        """The mean loss that training minimises."""
        return self.losses(self.logits(batch), batch["label"]).mean()

    def samples_in(self, batch: Batch) -> int:
        """How many samples ``batch`` has."""
        return len(batch["label"])

    def trial_loss(self, batch: Batch) -> Tensor:
        """The loss of a first batch, to see whether the network takes it."""
        return self.losses(self.logits(batch), batch["label"]).mean()

    def card(self) -> dict[str, Any]:
        """What an exported network's configuration says of the task."""
        return {}

    def take_data_settings(self, class_path: str, arguments: Mapping[str, Any]) -> None:
        """Put what `card` needs of the run's settings of its data into place."""

    def gradients(self) -> Sources:
        datamodule, sampled_batches = self.trainer.datamodule, self._data.sampled_batches  # type: ignore[attr-defined]
        method = self.adaptation.method
        if sampled_batches is None:
            raise UserError(
                f"{type(method).__name__} starts from gradients, but {type(datamodule).__name__} has no "
                "sampled_batches(samples): derive it from a DataModule of this package, or take another method."
            )
        # Of the first step that moves weights: with a warm-up the rate of step 0 is 0.
        first = schedule_factor(self.schedule, min(self.warmup_steps, 1), math.inf, self.warmup_steps)

        def losses(batch: Batch) -> Tensor:
            loss = self.call_as_step("training_loss", on_device(self, datamodule, batch))
            return loss.expand(self.samples_in(batch))

        return gradients(losses, sampled_batches(method.gradient_samples), first * self.lr, self._progress)

    # A run

    @property
    def _data(self) -> DataForTask:
        return data_of(internals.trainer_of(self))

    def configure_callbacks(self) -> list[Callback]:
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [] if any(isinstance(each, _RestorePrecision) for each in callbacks) else [_RestorePrecision()]

    def setup(self, stage: str) -> None:
        self._restore_precision = restorer()
        torch.set_float32_matmul_precision(self.hparams["matmul_precision"])
        require_autocast(self)
        if stage == "fit":
            self._began_with = settings_of(self.trainer.callbacks)  # type: ignore[attr-defined]
        else:
            require_same_classes(self.trained_classes, self._data)
        super().setup(stage)

    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        self._restore_precision()

    def _settle_head(self) -> None:
        """Make a pretrained head mean the data's classes, before its first use, unless a checkpoint was loaded."""
        head, self.found_head = self.found_head, None
        if head is not None:
            rank_zero_info(settle(self.net, head, self._data.class_names))

    # Training

    def configure_optimizers(self) -> OptimizerLRScheduler:
        total = self.trainer.estimated_stepping_batches
        require_length(self.schedule, 0 if self._is_rehearsal else self.warmup_steps, total)
        groups = self.adaptation.param_groups(self.lr, self.weight_decay, self.head_lr, self.parameters())
        scaled = self.trainer.precision == "16-mixed"
        optimizer = self._method.optimizer(self.adaptation, groups, self.optimizer, self.momentum)
        optimizer = optimizer or build_optimizer(self.optimizer, groups, self.lr, self.momentum, scaled)

        # A closure: LambdaLR stores callable objects in checkpoints, and a resumed run may have another length.
        def factor(step: int) -> float:
            return self._method.rate_factor(
                step, total, lambda step: schedule_factor(self.schedule, step, total, self.warmup_steps)
            )

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def on_fit_start(self) -> None:
        trainer: Any = self.trainer
        data = self._data
        self.trained_classes = list(data.class_names)
        self._has_remarked, self._splits = False, []
        is_own = type(self).__module__.startswith("srlora_pl.")  # what else a user's own code does is not known here
        if is_own and all(type(each).__module__.startswith(("lightning.", "srlora_pl.")) for each in trainer.callbacks):
            splits = data.split_names.get("val", ("val",))
            scores = [f"{split}/{name}" for split in splits for name in self.evaluation.names]
            known = ["train/loss", "srlora/switches", *scores]
            require_known_scores(trainer.callbacks, known, trainer.enable_validation and data.has_validation)
        self._settle_head()
        if is_own and data.trial_batch is not None:
            require_that_a_batch_passes(self, trainer.datamodule)
        super().on_fit_start()

    def on_train_start(self) -> None:
        super().on_train_start()
        self._loss = FiniteLoss(self.global_step, self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.training_loss(batch)
        self._loss.add(loss)
        self.log("train/loss", loss, batch_size=self.samples_in(batch))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self.global_step - self._loss.step >= every:
            self._loss.require(self.trainer)
        super().on_train_batch_end(outputs, batch, batch_idx)

    def on_train_end(self) -> None:
        self._loss.require(self.trainer)
        super().on_train_end()
        self._remark()

    @property
    def _is_rehearsal(self) -> bool:
        return bool(self.trainer.fast_dev_run)  # type: ignore[attr-defined]

    # Evaluation

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._begin("val", len(self.trainer.num_val_batches))

    def on_test_epoch_start(self) -> None:
        self._begin("test", len(self.trainer.num_test_batches))

    def on_predict_start(self) -> None:
        self._settle_head()

    def _begin(self, stage: str, loaders: int) -> None:
        self._settle_head()
        names = self._data.split_names.get(stage, (stage,))
        self._splits = [*names[:loaders], *(f"{stage}_{number}" for number in range(len(names) + 1, loaders + 1))]
        self._scored.clear()
        for split in self._splits:
            self.evaluation.reset(split)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if "spare" not in batch:  # which another process scores
            self.evaluation.update(self, self._splits[dataloader_idx], batch)
            self._scored.add(self._splits[dataloader_idx])
        elif self.is_sharded:  # and for which it needs this one's part of the weights
            self.training_loss(batch)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        self._report()
        if self.trainer.state.fn == "validate":
            self._remark()
        super().on_validation_epoch_end()

    def on_test_epoch_end(self) -> None:
        self._report()
        self._remark()

    def _report(self) -> None:
        for split in self._splits:
            # A process may have had nothing to score, but all must come along to add up.
            if self.trainer.strategy.reduce_boolean_decision(split in self._scored, all=False):
                values = {f"{split}/{name}": value for name, value in self.evaluation.compute(split).items()}
                # All processes have the same values already, and their largest is the same to the bit.
                self.log_dict(values, sync_dist=True, reduce_fx="max")

    def _remark(self) -> None:
        """Tell once a run what the scores at its end mean."""
        for split in self._splits:
            remark = self.evaluation.remark(split, self._data.class_names)
            if remark and not self._is_rehearsal and not self._has_remarked:
                self._has_remarked = True
                rank_zero_info(remark)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._loss.require(self.trainer)
        require_finite_weights(self)
        states = checkpoint.get("callbacks", {})
        checkpoint["callback_settings"] = {key: self._began_with[key] for key in states if key in self._began_with}
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        resumes = internals.trainer_of(self) is not None and self.trainer.state.fn == "fit"
        if resumes:
            callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
            keep_settings(checkpoint, callbacks, checkpoint.get("callback_settings", {}))
            keep_to_own_folders(checkpoint, self.trainer.checkpoint_callbacks)  # type: ignore[attr-defined]
        require_same_model(checkpoint.get("hyper_parameters", {}), self.hparams, resumes)
        self.trained_classes = class_names(checkpoint) or []
        require_same_classes(self.trained_classes, self._data)
        self.found_head = None
        super().on_load_checkpoint(checkpoint)


class _RestorePrecision(Callback):
    """Gives the process its matmul precision back after a run that raised, whose ``teardown`` Lightning leaves out."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if restore := vars(pl_module).get("_restore_precision"):  # else it raised before the precision was set
            restore()


def _pretrained_state(family: ModelFamily, prepare: Callable[[nn.Module], nn.Module]) -> Mapping[str, Tensor]:
    """The state that training begins from, loaded again; a function with a name, so that a module can be pickled."""
    return prepare(family.build()[0]).state_dict()
