"""The one door between Lightning and the maths: hooks and checkpoint of any module that adapts a network."""

import inspect
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from rich.progress import track
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.serialization import add_safe_globals, safe_globals

from srlora_pl.lowrank import Adaptation, Method
from srlora_pl.lowrank.checks import require_something_to_train, require_trained, require_unmerged
from srlora_pl.lowrank.groups import require_suitable
from srlora_pl.lowrank.linear import Matrix
from srlora_pl.lowrank.method import Sources
from srlora_pl.lowrank.methods import imported
from srlora_pl.lowrank.optimizer_state import gradients_of, parameters_of
from srlora_pl.training import lightning_internals as internals
from srlora_pl.training.sharding import FSDP2Strategy, require_splittable
from srlora_pl.util.cache import cache_folder
from srlora_pl.util.errors import UserError

if TYPE_CHECKING:
    _Module = L.LightningModule
else:
    _Module = object

_PRECISIONS = ("32-true", "64-true", "16-mixed", "bf16-mixed")
_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")
_CHECKPOINT_KEY = "srlora"
_CURRENT = "current_model_state"  # where Lightning's WeightAveraging puts the weights that it averages
_WEIGHTS = ("state_dict", _CURRENT)


class SRLoRAMixin(_Module):
    """Makes a ``LightningModule`` train low-rank pairs: ``class MyModel(SRLoRAMixin, L.LightningModule)``.

    Call ``self.adapt(self.net, method)`` in ``__init__``; nothing else is needed. A hook of your own that this class
    has too must call ``super()``; a class whose hook does not is refused when it is defined.

    Attributes:
        adaptation: the pairs and their history, an `srlora_pl.lowrank.Adaptation`.
        whole_checkpoints: whether checkpoints hold the whole network also where `adapt` was told how its pretrained
            state can be had again; by default they then hold only what changed.
    """

    adaptation: Adaptation
    whole_checkpoints = False
    _averages_are_in = False  # WeightAveraging has changed averages and trained weights about, for a validation

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(SRLoRAMixin)]
        if L.LightningModule in before:
            raise TypeError(f"{cls.__name__} must name SRLoRAMixin before LightningModule among its bases")
        for owner in before:
            for hook in _HOOKS & set(vars(owner)):
                code = getattr(inspect.unwrap(vars(owner)[hook]), "__code__", None)
                if code is not None and hook not in code.co_names:
                    raise TypeError(
                        f"{owner.__name__}.{hook} switches the adaptation off: it must call super().{hook}(...)"
                    )

    def adapt(
        self,
        net: nn.Module,
        method: Method,
        trainable: Sequence[str] = (),
        pretrained: Callable[[], Mapping[str, Tensor]] | None = None,
        new: Sequence[str] = (),
    ) -> None:
        """Put ``method``'s adapters into ``net``, in place, and freeze all else in it.

        Args:
            net: a part of this module, with its pretrained weights loaded.
            method: such as ``SRLoRA(rank=8)``.
            trainable: dotted names in ``net`` that train too, such as ``head``.
            pretrained: reloads the pretrained state dict of ``net``, from a file or a hub's cache. This module, made
                again, must come with these weights too. Checkpoints then leave them out.
            new: dotted names in ``net`` that the pretrained state dict does not hold, if these are more than
                ``trainable``.

        Raises:
            UserError: see `srlora_pl.lowrank.Adaptation`.
        """
        if "adaptation" in vars(self):
            raise UserError(
                f"{type(self).__name__} calls adapt() twice, it can adapt one network: put both into one nn.Module"
            )
        add_safe_globals([type(method)])  # a checkpoint's hyperparameters may hold it, and are read before any hook
        self.adaptation = Adaptation(net, method, trainable, pretrained, new)
        self.adaptation.run_on_rank_zero = self._in_the_first_process

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        """As Lightning's; hyperparameters may hold a method."""
        with safe_globals(imported()):  # type: ignore[arg-type]
            return super().load_from_checkpoint(*args, **kwargs)

    def _in_the_first_process(self, compute: Callable[[], Any]) -> Any:
        """Call ``compute`` in the first process of the run; return its result, or raise its refusal, in all of them."""
        if internals.trainer_of(self) is None or self.trainer.world_size == 1:
            return compute()
        result: tuple[Any, UserError | None] = (None, None)
        if self.trainer.is_global_zero:
            try:
                found = compute()
                # A tensor on a GPU would arrive in all processes on that same one.
                result = found.cpu() if isinstance(found, Tensor) else found, None
            except UserError as error:  # the others would wait for ever
                result = None, error
        result = self.trainer.strategy.broadcast(result)
        if result[1] is not None:
            raise result[1]
        return result[0]

    # --- before training -----------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._require_adapted()
        device = self.trainer.strategy.root_device
        if device.type == "mps" and self.trainer.precision == "64-true":
            raise UserError(
                "trainer.precision is '64-true', but Apple's GPUs have no float64: set it to 32-true, or "
                "trainer.accelerator to cpu"
            )
        # 64-true turns parameters into doubles only after this hook; start and load should already be exact to 1e-16
        self.trainer.precision_plugin.convert_module(self)
        if stage != "fit":
            return
        require_something_to_train(self.adaptation.method, self.parameters())
        self._averages_are_in = False  # a validation that was cut off may have left it otherwise
        self._refuse_what_cannot_be_right()
        if not internals.module_loads_training_data(self.trainer):  # whose own setup may not be over
            self._require_room()
        if self.adaptation.method.starts_from == "gradient":
            if not self.adaptation.started:
                self.adaptation.weights.identify()
        else:
            self._start(self.adaptation.method.sources(self._progress, cache_folder("spectra")))

    def _start(self, sources: Sources | None) -> None:
        begin = time.perf_counter()
        self.adaptation.start(sources, self.trainer.strategy.root_device)
        if sources is not None:
            seconds = time.perf_counter() - begin
            rank_zero_info(f"Start of {len(self.adaptation.matrices)} matrices: ready after {seconds:.1f} s.")
        for callback in self._averaging():  # which were set up before the start changed the weights
            callback.setup(self.trainer, self, "fit")

    @property
    def is_sharded(self) -> bool:
        """Whether frozen weights are split over the processes of the run."""
        return internals.trainer_of(self) is not None and isinstance(self.trainer.strategy, FSDP2Strategy)

    def call_as_step(self, name: str, *args: Any) -> Any:
        """``self.name(*args)`` outside of the steps of a run, where it is not sure that weights are whole."""
        return internals.step_of_strategy(self, name, *args) if self.is_sharded else getattr(self, name)(*args)

    def gradients(self) -> Sources:
        """The source of a method that starts from gradients; for a class of one's own to override.

        Returns:
            What `srlora_pl.gradients` makes of losses and batches.
        """
        raise UserError(
            f"{type(self.adaptation.method).__name__} starts from gradients, which {type(self).__name__} does not "
            "give: define its gradients() with srlora_pl.gradients(losses, batches, lr)"
        )

    def _require_adapted(self) -> None:
        if "adaptation" not in vars(self):
            raise UserError(f"{type(self).__name__} adapts no network, call self.adapt(net, method) in its __init__")

    def _progress(self, matrices: list[Matrix]) -> Iterable[Matrix]:
        shown = self.trainer.is_global_zero and self.trainer.progress_bar_callback is not None
        return track(matrices, "singular values", transient=True, disable=not shown)

    def _refuse_what_cannot_be_right(self) -> None:
        trainer: Any = self.trainer
        precision, strategy = trainer.precision_plugin.precision, type(trainer.strategy).__name__
        if not self.automatic_optimization:
            raise UserError(
                "manual optimization hides the optimizer steps that the adaptation counts, use automatic_optimization"
            )
        if precision not in _PRECISIONS:
            raise UserError(
                f"trainer.precision is {precision!r}, where the frozen weights would be rounded, use one of "
                f"{', '.join(_PRECISIONS)}"
            )
        if trainer.accumulate_grad_batches < 1:
            raise UserError(
                f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}, it must be 1 or more"
            )
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):
            raise UserError(
                "the callback GradientAccumulationScheduler makes the run another length than Lightning expects and "
                "switches are planned for: remove it and set trainer.accumulate_grad_batches"
            )
        for name in ("val_check_interval", "check_val_every_n_epoch"):
            if getattr(trainer, name, None) == 0:  # without the first where the interval is a time
                raise UserError(
                    f"trainer.{name} is 0, it must be above 0; to leave validation out set "
                    "trainer.limit_val_batches to 0"
                )
        clip = trainer.gradient_clip_val
        if clip is not None and not clip >= 0:
            raise UserError(f"trainer.gradient_clip_val is {clip}, it must be 0 or more, or null for no clipping")
        refuse_copies(trainer.strategy)
        if strategy in _STRATEGIES:
            raise UserError(
                f"trainer.strategy {strategy} shards the weights that a start or a switch changes, use ddp or fsdp2"
            )
        if self.is_sharded:
            require_splittable(trainer, self.adaptation)
        averaging = [c for c in trainer.callbacks if isinstance(c, WeightAveraging | StochasticWeightAveraging)]
        if averaging and not self.adaptation.method.averages:
            raise UserError(
                f"the callback {type(averaging[0]).__name__} would average parameters of "
                f"{type(self.adaptation.method).__name__}, which mean other directions later in a run: remove it, or "
                "take another method, such as LoRA"
            )

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._require_room()
        # Later than others: a checkpoint is loaded by now, after which there is nothing to estimate, and the network
        # is on its device.
        if self.adaptation.method.starts_from == "gradient":
            self._start(None if self.adaptation.started else self.gradients())

    def _require_room(self) -> None:
        # A resumed run was checked when it began, and its length may only be asked for once its state is restored.
        trainer: Any = self.trainer
        if self.adaptation.controller.needs_length and trainer.ckpt_path is None:
            steps = self._all_steps()
            if steps > 1 and not trainer.fast_dev_run:
                self.adaptation.controller.require_room(steps)

    def _all_steps(self) -> int:
        """N_all, the optimizer steps of the run that the trainer is set to."""
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps) or steps < 0:
            raise UserError("the length of the run is not known, so switches cannot be planned: set trainer.max_steps")
        return int(steps)

    def on_train_start(self) -> None:
        super().on_train_start()
        step, optimizer = self.trainer.global_step, self.trainer.optimizers[0]
        require_trained(self.adaptation.layers, optimizer)
        require_suitable(self.adaptation.method, self.adaptation.layers, optimizer)
        if self.adaptation.controller.needs_length:
            # Only a resumed run that has become too short is refused here: all others have passed on_fit_start.
            strict = step > 0 and not self.trainer.fast_dev_run  # type: ignore[attr-defined]
            if remark := self.adaptation.plan(self._all_steps(), step, strict):
                rank_zero_info(remark)
        # A file that was written at the step of a switch, before the switch, is made up for here.
        self.adaptation.after_optimizer(step, optimizer)

    # --- in every step -------------------------------------------------------------------------------------------

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        trainer: Any = self.trainer
        step = trainer.global_step + 1
        inverse_scale = internals.inverse_loss_scale(trainer, optimizer)
        self.adaptation.before_optimizer(step, gradients_of(optimizer), inverse_scale)
        if trainer.log_every_n_steps and step % trainer.log_every_n_steps == 0:
            # Said before it is done, so that a file written at the end of this step has the step's whole row.
            self.log_dict({f"srlora/{name}": value for name, value in self.adaptation.controller.metrics(step).items()})

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        trainer: Any = self.trainer
        self.adaptation.after_optimizer(trainer.global_step, trainer.optimizers[0])

    def on_train_end(self) -> None:
        super().on_train_end()
        try:
            self.adaptation.require_gradients()
        except UserError as error:  # of a run so short that it may be chance, and it is over
            rank_zero_warn(str(error))
        self.adaptation.restorable_parameters(self._trained())  # all that trained now may be frozen at a checkpoint
        controller = self.adaptation.controller
        if (progress := controller.progress()).missing:
            rank_zero_info(
                f"Training stopped at step {self.trainer.global_step}: {progress.missing} of {progress.planned} "
                f"{controller.events} were not reached."
            )

    # --- checkpoint ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        require_unmerged(self.adaptation.layers.values(), before="saving a checkpoint")
        restorable = self.adaptation.restorable_parameters(self._trained())
        left_out = set() if self.whole_checkpoints else {id(parameter) for parameter in restorable}
        checkpoint[_CHECKPOINT_KEY] = self.adaptation.state_dict(compact=bool(left_out))
        self._save_averages(checkpoint)
        names = [name for name, value in self.state_dict(keep_vars=True).items() if id(value) in left_out]
        for weights in (checkpoint[key] for key in _WEIGHTS if key in checkpoint):
            for name in names:
                weights.pop(name, None)

    def _save_averages(self, checkpoint: dict[str, Any]) -> None:
        """See to it that the weights in a file are the averages that validation scores, whenever it is written."""
        for callback in self._averaging():
            if "callbacks" not in checkpoint:  # weights alone, of which Lightning asks no callback
                callback.on_save_checkpoint(self.trainer, self, checkpoint)
                del checkpoint[_CURRENT], checkpoint["averaging_state"]
            elif self._averages_are_in and _CURRENT in checkpoint:
                checkpoint["state_dict"], checkpoint[_CURRENT] = checkpoint[_CURRENT], checkpoint["state_dict"]

    def _averaging(self) -> list[WeightAveraging]:
        callbacks: list[Any] = [] if internals.trainer_of(self) is None else self.trainer.callbacks  # type: ignore[attr-defined]
        return [each for each in callbacks if isinstance(each, WeightAveraging)]

    def _trained(self) -> list[Tensor]:
        optimizers: Sequence[Optimizer] = [] if internals.trainer_of(self) is None else self.trainer.optimizers
        return [parameter for optimizer in optimizers for parameter in parameters_of(optimizer)]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._require_adapted()
        if _CHECKPOINT_KEY not in checkpoint:
            raise UserError("the checkpoint holds no adaptation, it was written by another program or module")
        device = None if internals.trainer_of(self) is None else self.trainer.strategy.root_device
        self.adaptation.load_state_dict(checkpoint[_CHECKPOINT_KEY], device)
        self.adaptation.reach(checkpoint.get("global_step", 0))  # files are written before the end of their step
        if checkpoint[_CHECKPOINT_KEY]["compact"]:
            # What the file leaves out is in place by now; this keeps the strict load that follows.
            for key in (key for key in _WEIGHTS if key in checkpoint):
                checkpoint[key] = {**self.state_dict(), **checkpoint[key]}
        self._load_averages(checkpoint)

    def _load_averages(self, checkpoint: dict[str, Any]) -> None:
        """Take the trained weights to go on, the averages for everything else."""
        if internals.trainer_of(self) is None:
            return
        if self.trainer.state.fn != "fit":  # the callback of a fit that is over has averages, and weights, of its own
            checkpoint[_CURRENT] = checkpoint["state_dict"]
            for callback in self._averaging() if "callbacks" not in checkpoint else ():  # Lightning will not ask it
                callback.on_load_checkpoint(self.trainer, self, checkpoint)
        elif _CURRENT in checkpoint and not self._averaging():
            checkpoint["state_dict"] = checkpoint[_CURRENT]


def refuse_copies(strategy: Strategy) -> None:
    """Refuse to train a copy of the model: its weights would come back, but not what became of the pairs."""
    if internals.trains_copy(strategy):
        raise UserError(
            "trainer.strategy ddp_spawn, ddp_fork and ddp_notebook train a copy of the model, whose history is lost "
            "when its process ends: use ddp, in a script"
        )


_HOOKS = {name for name in vars(SRLoRAMixin) if name.startswith("on_") or name == "setup"}
