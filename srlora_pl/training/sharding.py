"""Frozen weights over several devices: PyTorch's FSDP2 as a strategy of Lightning, ``--trainer.strategy fsdp2``."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed import all_reduce
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from srlora_pl.lowrank import Adaptation
from srlora_pl.lowrank.nf4 import NF4
from srlora_pl.lowrank.optimizer_state import parameters_of
from srlora_pl.lowrank.shards import is_split, placed, whole
from srlora_pl.lowrank.targets import repeated_blocks
from srlora_pl.util.errors import UserError


class FSDP2Strategy(ModelParallelStrategy):
    """Splits the frozen weights over all processes, by rows; adapters and all else that trains stay whole in each.

    A block's weights are gathered for as long as the block computes. The gradients of whole parameters are averaged
    once a step, after the last backward pass. Where a method trains the network's own weights, these are split too, and
    with them their gradients and the optimizer's state.

    Weights are whole on the CPU, in every process, while a run starts or loads a checkpoint; then they are split block
    by block. A checkpoint is one file, as without this strategy.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **kwargs)
        self._sharded: _Sharded | None = None

    # The checkpoint is loaded into whole weights, and by the loops of all other strategies.
    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True

    @property
    def _module(self) -> Any:
        return self.lightning_module

    def setup_environment(self) -> None:
        self._data_parallel_size = self.world_size
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        super(ModelParallelStrategy, self).setup(trainer)  # whose own wants configure_model()

    def model_to_device(self) -> None:
        """Split the module, once, and move the rest of it to the device."""
        module = self._module
        if self._sharded is None or self._sharded.module is not module:
            if any(map(is_split, module.parameters())):
                raise UserError("this module was split by another Trainer: go on with that one, or make it anew")
            self._sharded = _Sharded(module)
            shard(self._sharded, module.adaptation, self.device_mesh["data_parallel"])
        module.to(self.root_device)
        self.model = self._sharded

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        def averaged() -> Any:
            result = closure()
            average([parameter for parameter in parameters_of(optimizer) if not isinstance(parameter, DTensor)])
            return result

        return super().optimizer_step(optimizer, averaged, model, **kwargs)

    # --- checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self._module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return super(ModelParallelStrategy, self).optimizer_state(optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Gather what is left in ``checkpoint`` of split tensors, one at a time, to the first process, and write it."""

        def gathered(shards: DTensor) -> Tensor | None:
            tensor = whole(shards)
            return tensor.cpu() if self.is_global_zero else None

        checkpoint = tree_map_only(DTensor, gathered, checkpoint)
        super(ModelParallelStrategy, self).save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return super(ModelParallelStrategy, self).load_checkpoint(checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        own = self._module.state_dict()
        state = {
            name: placed(value, own[name]) if name in own and not is_split(value) else value
            for name, value in checkpoint["state_dict"].items()
        }
        self._module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(split_state(optimizer, state))


class _Sharded(nn.Module):
    """The root of all shards: inside its forward pass the parameters outside of blocks are whole.

    Args:
        module: stays the class that it is; Lightning redirects ``forward`` to its steps.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def require_splittable(trainer: Any, adaptation: Adaptation) -> None:
    """Refuse what needs whole weights in a run of `FSDP2Strategy`."""
    method = adaptation.method
    if any(isinstance(parameter, NF4) for parameter in adaptation.net.parameters()):
        raise UserError(
            "model.weights is nf4, but trainer.strategy fsdp2 splits no weights in four bits: use ddp, or bfloat16"
        )
    if trainer.precision_plugin.precision == "16-mixed":
        raise UserError(
            "trainer.precision 16-mixed scales each process's gradients, which trainer.strategy fsdp2 does not: use "
            "bf16-mixed"
        )
    if method.trains_weights and method.own_optimizer is not None:
        raise UserError(
            f"the optimizer of {type(method).__name__} needs the whole gradient of each weight, which trainer.strategy "
            "fsdp2 splits: use ddp"
        )
    if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):
        raise UserError(
            "the callback WeightAveraging keeps a whole copy of the network in each process, where trainer.strategy "
            "fsdp2 is to keep a part: leave it out, or use ddp"
        )


def shard(root: nn.Module, adaptation: Adaptation, mesh: Any) -> None:
    """Split the parameters of ``root``, and first those of each repeated block, over the processes of ``mesh``."""
    adapters = [each for layer in adaptation.layers.values() for each in layer.adapter_parameters()]
    stays = {each for each in root.parameters() if each.requires_grad and not adaptation.method.trains_weights}
    options: Any = {"mesh": mesh, "reshard_after_forward": True, "ignored_params": stays | set(adapters)}
    for block in repeated_blocks(adaptation.net):
        fully_shard(adaptation.net.get_submodule(block), **options)
    fully_shard(root, **options)
    for layer in adaptation.weights.layers.values():
        if layer.rest is not None:
            layer.rest = placed(layer.rest, like=layer.weight)


def average(parameters: list[Tensor]) -> None:
    """Replace the gradient of each of ``parameters`` by its mean over all processes, in one call a dtype.

    A parameter that has a gradient in no process keeps none.
    """
    for dtype in sorted({parameter.dtype for parameter in parameters}, key=str):
        alike = [parameter for parameter in parameters if parameter.dtype == dtype]
        there = torch.tensor([each.grad is not None for each in alike], dtype=dtype).to(alike[0].device)
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in alike]
        flat = torch.cat([there, *(gradient.flatten() for gradient in gradients)])
        all_reduce(flat)
        there, values = flat[: len(alike)], flat[len(alike) :] / torch.distributed.get_world_size()
        missing = [each.grad is None for each in alike]
        found = there.tolist() if any(missing) else [1.0] * len(alike)  # only then the host waits for the device
        for parameter, part, count in zip(alike, values.split([each.numel() for each in alike]), found, strict=True):
            if count:
                parameter.grad = part.view_as(parameter)


def split_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """``state`` of an optimizer of whole parameters, with the part of this process of each that is split."""
    states, parameters = dict(state["state"]), parameters_of(optimizer)
    for number, parameter in enumerate(parameters):
        if isinstance(parameter, DTensor) and number in states:
            states[number] = {
                name: placed(value, parameter) if isinstance(value, Tensor) and value.dim() else value
                for name, value in states[number].items()
            }
    return {**state, "state": states}


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Frozen weights split over all processes by FSDP2")
