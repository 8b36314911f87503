"""A step of training on shapes alone: no float holds a value, yet every tensor is counted as long as it lives.

Numbers that control flow reads, such as token ids and masks, are computed; whatever comes into touch with a weight is a
`FakeTensor`, which has a shape, a dtype and a device only. So a network of any size passes in seconds, through its own
code and that of its method, and what it keeps for the backward pass is what it would keep.
"""

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
# Of these torch's own table has the form that is not in place, or that of another device.
_SAME_WORK = {
    _aten.addmm_: _aten.addmm,
    _aten.baddbmm_: _aten.baddbmm,
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _aten._scaled_dot_product_flash_attention_backward,
}
_WORK = {**flop_registry, **{ours: flop_registry[theirs] for ours, theirs in _SAME_WORK.items()}}
_SMALL = 2**24  # elements up to which what depends on no weight is computed


class Shapes(TorchDispatchMode):
    """Inside, tensors that depend on a weight are shapes; all are counted.

    Attributes:
        live: bytes of the tensors that there are now.
        peak: the most so far; may be set back to ``live``.
        flops: floating-point operations so far, by operator: of products, convolutions and attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.flops: Counter[Any] = Counter()
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._counted = weakref.WeakSet[Any]()
        self._stand_ins = weakref.WeakKeyDictionary[Any, Tensor]()

    def __enter__(self) -> "Shapes":
        self._fakes.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._fakes.__exit__(*error)

    def take(self, module: nn.Module) -> None:
        """Make the parameters and buffers of ``module``, which are on the meta device, shapes on the CPU."""
        parameters: dict[Tensor, nn.Parameter] = {}
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and parameter not in parameters:
                    parameters[parameter] = nn.Parameter(self._stand_in(parameter), parameter.requires_grad)
                part._parameters[name] = None if parameter is None else parameters[parameter]
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else self._stand_in(buffer)

    def _stand_in(self, tensor: Tensor) -> Tensor:
        """A shape on the CPU for a tensor on the meta device; others are returned as they are."""
        if isinstance(tensor, FakeTensor) or tensor.device.type != "meta":
            return tensor
        storage = tensor.untyped_storage()
        if storage not in self._stand_ins:
            self._stand_ins[storage] = torch.empty_like(tensor.detach(), device="cpu")
        return self._stand_ins[storage]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, self._stand_in, (args, kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if any(isinstance(each, FakeTensor) for each in tensors) or not (tensors or _is_small(func(*args, **kwargs))):
            result = func(*args, **kwargs)
        else:
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._count(each)
        if (work := _WORK.get(func._overloadpacket)) is not None:
            self.flops[func._overloadpacket] += work(*args, **kwargs, out_val=result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._counted:
            self._counted.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, size: int) -> None:
        self.live -= size


def _is_small(result: Any) -> bool:
    return sum(each.numel() for each in tree_leaves(result) if isinstance(each, Tensor)) <= _SMALL
