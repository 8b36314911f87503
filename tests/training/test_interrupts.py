"""Processes that train together stop together."""

import signal
from types import SimpleNamespace

import pytest
import torch

from srlora_pl.training.interrupts import Interrupts
from srlora_pl.util.errors import Interrupted


class Together:
    """Some ranks of one run: each takes the largest of what all had at the same call."""

    def __init__(self, folder, ranks: int = 2) -> None:
        self.saved, self.calls = [], 0
        self.ranks = [Interrupts(folder) for _ in range(ranks)]

    def trainer(self, rank: int, step: int) -> SimpleNamespace:
        def reduce(notes: torch.Tensor, reduce_op: str) -> torch.Tensor:
            self.calls += 1
            assert reduce_op == "max"
            everyones = [torch.tensor([each.received, each.requeue]) for each in self.ranks]
            return torch.stack(everyones).max(0).values

        strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=reduce)
        return SimpleNamespace(
            world_size=len(self.ranks),
            global_rank=rank,
            global_step=step,
            log_every_n_steps=5,
            strategy=strategy,
            save_checkpoint=lambda path, weights_only: self.saved.append((rank, step, path.name)),
        )

    def step(self, step: int) -> list[Interrupted]:
        """What ends each rank before step ``step`` + 1."""
        ends = []
        for rank, each in enumerate(self.ranks):
            try:
                each.on_train_batch_start(self.trainer(rank, step))
            except Interrupted as end:
                ends.append(end)
        return ends


def test_all_stop_at_the_step_at_which_they_ask_each_other(tmp_path) -> None:
    run = Together(tmp_path)
    for each in run.ranks:
        each._trains = True
    assert run.step(5) == []
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        run.ranks[1]._receive(signal.SIGTERM, None)
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert [run.step(step) for step in (6, 7, 8, 9)] == [[]] * 4
    first, second = run.step(10)
    assert run.calls == 4  # twice each: a collective call waits for the device
    assert run.saved == [(0, 10, "last.ckpt"), (1, 10, "last.ckpt")]
    assert (first.code, first.message.partition(",")[0]) == (143, "interrupted by SIGTERM")
    # a launcher that sees one process fail kills all others, the first in the middle of its last words
    assert (second.code, second.message) == (0, "")


def test_one_process_asks_nobody_and_stops_at_once(tmp_path) -> None:
    run = Together(tmp_path, ranks=1)
    run.ranks[0].received = signal.SIGINT
    assert [end.code for end in run.step(6)] == [130]
    assert run.calls == 0


@pytest.mark.parametrize("hook", ["on_validation_batch_start", "on_validation_start"])
def test_the_sanity_check_is_no_place_to_save(hook, tmp_path) -> None:
    callback = Interrupts(tmp_path)
    callback.received = signal.SIGINT
    getattr(callback, hook)(None, None)
