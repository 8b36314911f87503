"""One loop for any method, in one process and in two."""

import copy
import os
from functools import partial
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from srlora_pl.lowrank import Adaptation, Method, gradients
from srlora_pl.lowrank.method import Sources
from tests.helpers.methods import made, trainer_of
from tests.helpers.toys import full_rank_losses, toy_batches, toy_net, train


def batches(count: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    return toy_batches(count, dtype=dtype)


def loss_of(net, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def sources_of(net, method: Method, share: slice = slice(None), dtype: torch.dtype = torch.float64) -> Sources | None:
    """Gradients of four batches, of which this process takes a share, for a method that starts from them."""
    if method.starts_from != "gradient":
        return None
    losses = partial(full_rank_losses, net)
    return gradients(losses, [(x[share], y[share]) for x, y in batches(4, dtype)], lr=0.01)


def _train(kind: type, steps: int, rank: int, share: slice, wrap, once) -> dict[str, Tensor]:
    """The state of the network after training, and what was recorded at switches."""
    torch.manual_seed(3)
    net = toy_net(dtype=torch.float64)
    method = made(kind, rank=rank, alpha=8.0)
    adaptation = Adaptation(net, method, ["head"])
    if once is not None:
        adaptation.run_on_rank_zero = once
    adaptation.start(sources_of(net, method, share))
    adaptation.plan(steps)
    wrapped = wrap(net)
    optimizer = trainer_of(adaptation, torch.optim.SGD, lr=0.05, momentum=0.9)
    train(wrapped, adaptation, optimizer, [(x[share], y[share]) for x, y in batches(steps, torch.float64)])
    records = {
        f"{name} at switch {record.step}": values
        for record in adaptation.controller.switch_records()
        for name, values in record.pairs._asdict().items()
    }
    return copy.deepcopy(net.state_dict()) | records


def trained_in_one_process(kind: type, steps: int, rank: int) -> dict[str, Tensor]:
    return _train(kind, steps, rank, slice(None), lambda net: net, None)


def parallel(process: int, kinds: list[type], steps: int, rank: int, folder: str) -> None:
    """One of two processes; writes what `_train` returns of each kind into ``folder``."""
    torch.set_num_threads(1)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", rank=process, world_size=2, store=store)

    def once(compute):
        found = [compute() if process == 0 else None]
        torch.distributed.broadcast_object_list(found)
        return found[0]

    for kind in kinds:
        share = slice(process * 4, process * 4 + 4)
        state = _train(kind, steps, rank, share, DistributedDataParallel, once)
        torch.save(state, Path(folder, f"{kind.__name__}-{process}.pt"))
    torch.distributed.destroy_process_group()
