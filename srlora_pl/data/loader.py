"""Data loaders whose order any run can resume exactly, and whose errors arrive as they were raised."""

import signal
from collections.abc import Iterator, Mapping, Sized
from itertools import count, islice
from multiprocessing.connection import wait
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from srlora_pl.data.protocols import Batch
from srlora_pl.util.errors import WORKER_DIED, UserError

# A key is what a sampler asks a data set for: in training (index, epoch) or (index, epoch, tokens of the step), the
# index alone elsewhere.
Key = tuple[int, ...] | int


class EpochBatches:
    """The batch sampler of training: the rest of an epoch from where the run stands, as (index, epoch) keys.

    Where the data counts tokens, the key of a sample has those of its whole optimizer step as well.

    A batch of W devices is cut from one order, so that W devices see together what one would see with a batch W
    times as large. An order that does not divide by W is filled up from its own start.

    Args:
        data: a DataModule of this package.
    """

    def __init__(self, data: Any) -> None:
        self.data = data
        self.position = (0, 0)

    def take_position(self) -> None:
        """Read where the run stands; not in ``__iter__``, which a loader with workers calls twice."""
        self.position = self.data.start_position()

    def __len__(self) -> int:
        world = rank_and_world(self.data)[1]
        return -(-len(self.data._train()) // (world * self.data.batch_size))

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, start = self.position
        # overfit_batches promises the same batches in every epoch.
        shuffle = 0 if getattr(self.data.trainer, "overfit_batches", 0) else epoch
        rank, world = rank_and_world(self.data)
        order = self.data.train_order(shuffle)
        order = torch.cat([order, order[: -len(order) % world]])
        batches = order[rank::world].split(self.data.batch_size)[: self.data.batches_per_epoch]
        tokens = self.data.step_tokens(order, epoch)
        more = [() for _ in batches] if tokens is None else [(count,) for count in tokens]
        numbered = zip(batches, more, strict=True)
        return ([(index, epoch, *step) for index in batch.tolist()] for batch, step in islice(numbered, start, None))


class Share(DistributedSampler):
    """The samples of a data set that one of W devices scores: every W-th in order, so that each is scored once.

    Lightning makes no such sampler, and leaves this one alone. A device without a sample for the last batch takes a
    spare one, which must not count: the devices wait for each other, so they need equally many batches.
    """

    def __init__(self, dataset: Sized, batch_size: int, rank: int, world: int) -> None:
        super().__init__(dataset, world, rank, shuffle=False)  # type: ignore[arg-type]
        own = range(rank, len(dataset), world)
        self.batches_that_count = -(-len(own) // batch_size)
        spare = -(-len(dataset) // (world * batch_size)) - self.batches_that_count  # 0 or 1
        self.indices = [*own, *[0] * spare]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def mark(self, number: int, batch: Batch) -> Batch:
        """Batch ``number`` of this device, with ``spare`` in it if it is one."""
        return batch if number < self.batches_that_count else {**batch, "spare": True}


class Loader(DataLoader):
    """A DataLoader that counts as resumable for Lightning, and raises its workers' user errors as they were."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if isinstance(self.batch_sampler, EpochBatches):
            self.batch_sampler.take_position()
        batches = map(raise_user_error, _watch_workers(super().__iter__()))
        return map(self.sampler.mark, count(), batches) if isinstance(self.sampler, Share) else batches

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position is the DataModule's."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        pass


Loaders = Loader | list[Loader]


def loader(dataset: Dataset, num_workers: int, **batching: Any) -> Loader:
    """A `Loader` of a data set that answers for whole batches; ``batching``: its sampler and sizes."""
    return Loader(
        dataset,
        collate_fn=_as_is,
        num_workers=num_workers,
        worker_init_fn=_outlive_a_signal,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        # Without a generator of its own a new iterator draws from the global stream, and a resumed run
        # makes one iterator more than an uninterrupted one.
        generator=torch.Generator(),
        **batching,
    )


def _watch_workers(batches: Any) -> Iterator[Any]:
    """The batches of a DataLoader's iterator; the death of a worker, which torch reports in many ways, is one error."""
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            # The pipe of a dying process closes a little before the process is gone.
            workers = getattr(batches, "_workers", ())
            if workers and wait([worker.sentinel for worker in workers], timeout=1):
                raise UserError(WORKER_DIED) from error
            raise
        yield batch


def user_error_as_batch(error: UserError) -> Batch:
    """The batch that a data set returns instead of one that it cannot read.

    An exception raised in a worker reaches the user with the worker's traceback pasted into its message; sent as
    a batch it keeps its one sentence.
    """
    return {"user_error": str(error)}


def raise_user_error(batch: Batch) -> Batch:
    if "user_error" in batch:
        raise UserError(batch["user_error"])
    return batch


def _as_is(batch: Any) -> Any:
    return batch


def _outlive_a_signal(worker: int) -> None:
    """A signal to a whole process group is for the main process, which needs its workers to end in good order.

    The second one kills, as the main process ends workers that do not end by themselves.
    """
    names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")  # not all of them on Windows
    for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
        signal.signal(number, lambda number, _: signal.signal(number, signal.SIG_DFL))


def rank_and_world(data: Any) -> tuple[int, int]:
    """The place of this process among those that train with the DataModule ``data``."""
    return (data.trainer.global_rank, data.trainer.world_size) if data.trainer else (0, 1)
