"""Weights that are split by rows over the processes of a run: FSDP2's ``DTensor``, which is slow to import."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def is_split(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """``tensor``, gathered if it is split: then all processes must call this, in the same order."""
    if not is_split(tensor) or tensor.dtype != torch.int16:
        return tensor.full_tensor() if is_split(tensor) else tensor
    from torch.distributed.tensor import DTensor  # NCCL sends no int16

    own, layout = tensor.to_local().view(torch.float16), (tensor.device_mesh, tensor.placements)
    sent = DTensor.from_local(own, *layout, shape=tensor.shape, stride=tensor.stride())
    return sent.full_tensor().view(torch.int16)


def own_part(tensor: Any) -> Tensor:
    """The part of ``tensor`` in this process: all of it, where it is not split."""
    return tensor.to_local() if is_split(tensor) else tensor


def placed(value: Tensor, like: Any) -> Tensor:
    """A copy of a whole ``value`` on the device of ``like``, and split as that is; nothing is sent."""
    value = value.to(like.device, copy=True)
    if not is_split(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def own_rows(tensor: Any) -> Iterator[Tensor]:
    """A tensor of the whole shape that holds this process's rows of ``tensor``, which take its values afterwards.

    The other rows are 0. So a sum over whole matrices gives each row the bits that it has where nothing is split. A
    tensor that is not split is given as it is.
    """
    if not is_split(tensor):
        yield tensor
        return
    own, mesh = tensor.to_local(), tensor.device_mesh
    size = -(-len(tensor) // mesh.size())  # of torch's chunks; the last ones may be smaller, or empty
    rows = torch.zeros(tensor.shape, dtype=tensor.dtype, device=own.device)
    mine = rows[mesh.get_local_rank() * size :][: len(own)]
    mine.copy_(own)
    yield rows
    own.copy_(mine)
