"""Gradients of the frozen weights: exact, over all samples, and without a trace."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, LoRAGA, LoRASB, gradients
from srlora_pl.lowrank.linear import Matrix
from srlora_pl.lowrank.starts import gradient
from tests.helpers.errors import mentions
from tests.helpers.toys import assert_same_state, full_rank_losses, toy_batches, toy_net

LOSS = partial(nn.functional.cross_entropy, reduction="none")


class Seen(LoRASB):
    """Keeps the gradients that its start is made from."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.seen: list = []

    def step_of(self, gradient):
        self.seen.append(gradient)
        return super().step_of(gradient)


class Drops(nn.Module):
    """A toy network with dropout and running statistics before its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.norm, self.dropout = toy_net(dtype=torch.float64), nn.BatchNorm1d(5).double(), nn.Dropout(0.5)

    def forward(self, x):
        return self.net(self.dropout(self.norm(x)))


def estimated(net: nn.Module, batches, **settings) -> tuple[Adaptation, dict[Matrix, torch.Tensor]]:
    """The adaptation, and the sum of the gradients by matrix."""
    method = Seen(rank=1, **settings)
    adaptation = Adaptation(net, method)
    adaptation.start(gradients(lambda batch: LOSS(net(batch[0]), batch[1]), batches, lr=0.1))
    return adaptation, {m: each.total for m, each in zip(adaptation.matrices, method.seen, strict=True)}


@pytest.mark.parametrize("sizes", [[8], [3, 5], [1] * 8])
def test_they_are_the_sums_over_all_samples(sizes: list[int]) -> None:
    x, y = toy_batches(1, dtype=torch.float64)[0]
    plain = toy_net(dtype=torch.float64)
    LOSS(plain(x), y).sum().backward()
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    adaptation, found = estimated(toy_net(dtype=torch.float64), batches)
    for matrix, total in found.items():
        expected = matrix.of_weight(plain.get_parameter(f"{matrix.layer_name}.weight").grad)
        torch.testing.assert_close(total, expected, rtol=0, atol=1e-14)
    assert {each.samples for each in adaptation.method.seen} == {8}
    assert {each.lr for each in adaptation.method.seen} == {0.1}


def test_a_checkpointed_block_gives_the_same() -> None:
    batches = toy_batches(2, dtype=torch.float64)
    _, plain = estimated(toy_net(dtype=torch.float64), batches)
    net = toy_net(dtype=torch.float64)
    for block in net.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    _, checkpointed = estimated(net, batches)
    for one, other in zip(plain.values(), checkpointed.values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_a_block_whose_first_pass_has_no_graph_is_refused() -> None:
    net = toy_net(dtype=torch.float64)
    for block in net.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=True)
    with pytest.raises(UserError, match=mentions("blocks.0.qkv", "use_reentrant=False")):
        estimated(net, toy_batches(1, dtype=torch.float64))


def test_a_compiled_block_gives_the_same() -> None:
    batches = toy_batches(2, dtype=torch.float64)
    _, plain = estimated(toy_net(dtype=torch.float64), batches)
    net = toy_net(dtype=torch.float64)
    adaptation = Adaptation(net, method := Seen(rank=1))
    for block in net.blocks:
        block.compile(backend="eager")
    LOSS(net(batches[0][0]), batches[0][1])  # compiled before there are hooks
    adaptation.start(gradients(lambda batch: LOSS(net(batch[0]), batch[1]), batches, lr=0.1))
    for one, other in zip(plain.values(), method.seen, strict=True):
        torch.testing.assert_close(one, other.total, rtol=0, atol=1e-15)


def test_they_leave_everything_as_it_was() -> None:
    net, batches = Drops(), toy_batches(2, dtype=torch.float64)
    net.eval()
    net.net.head.weight.grad = torch.ones_like(net.net.head.weight)
    before = copy.deepcopy(net.state_dict())
    torch.manual_seed(4)
    state = torch.get_rng_state()
    adaptation, _ = estimated(net, batches, target_modules=["fc1"])
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in net.modules())
    for name, value in before.items():
        assert torch.equal(net.state_dict()[name], value), name
    assert float(net.net.head.weight.grad.sum()) == net.net.head.weight.numel()
    assert all(p.grad is None for layer in adaptation.layers.values() for p in layer.adapter_parameters())
    assert not any(layer._forward_hooks for layer in adaptation.layers.values())


def test_they_are_those_of_training_mode_and_depend_on_the_seed_alone() -> None:
    def total(seed: int, drawn: int = 0) -> torch.Tensor:
        net = Drops()
        torch.manual_seed(seed)
        net.eval()
        torch.rand(drawn)
        return next(iter(estimated(net, toy_batches(1, dtype=torch.float64))[1].values()))

    assert torch.equal(total(1), total(1, drawn=5))
    assert not torch.equal(total(1), total(2))  # other elements are dropped


class Deep(Drops):
    """Four blocks with weights of 1,056 numbers in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.net = toy_net(dtype=torch.float64, depth=4)


@pytest.mark.parametrize("kind", [LoRASB, LoRAGA])
@pytest.mark.parametrize(
    ("memory", "passes"),
    [
        (10**6, [[0, 1, 2, 3]]),
        (2 * 8 * 1056, [[0, 1], [2, 3]]),
        (2 * 8 * 1056 - 1, [[0], [1], [2], [3]]),
        (1, [[0], [1], [2], [3]]),
    ],
)
def test_several_passes_give_the_same_to_the_bit(kind, memory, passes, monkeypatch) -> None:
    def started(batches) -> tuple[Adaptation, list]:
        net, seen = Deep(), []
        torch.manual_seed(7)
        adaptation = Adaptation(net, kind(rank=2, alpha=4.0))

        def losses(batch):
            seen.append(batch)
            return full_rank_losses(net.net, (net.dropout(net.norm(batch[0])), batch[1]))

        adaptation.start(gradients(losses, batches, lr=0.1))
        return adaptation, seen

    batches = toy_batches(3, dtype=torch.float64)
    expected, seen = started(batches)
    assert len(seen) == 3
    of, sums, groups = gradient._sums, [], []

    def watched(adaptation, layers, *args):
        groups.append(sorted({int(name.split(".")[2]) for name in layers}))
        found = of(adaptation, layers, *args)
        sums.append(sum(total.nbytes for total in found[0].values()))
        return found

    monkeypatch.setattr(gradient, "_MEMORY", memory)
    monkeypatch.setattr(gradient, "_sums", watched)
    other, seen = started(iter(batches))
    assert groups == passes
    assert len(seen) == 3 * len(passes)
    assert max(sums) <= max(memory, 8 * 1056)
    assert_same_state(other.net, expected.net)


def test_a_second_start_estimates_nothing() -> None:
    net = toy_net(dtype=torch.float64)
    adaptation, _ = estimated(net, toy_batches(1, dtype=torch.float64))
    before = copy.deepcopy(net.state_dict())

    def refuse(adaptation):
        raise AssertionError("the start is over")

    adaptation.start(refuse)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], ["no samples", "batches"]),
        ([(torch.zeros(2, 5).double(), torch.zeros(2).long())], ["gradient", "blocks.1.fc1", "zero"]),
        ([(torch.full((2, 5), torch.nan).double(), torch.zeros(2).long())], ["gradient", "NaN"]),
    ],
    ids=["none", "zero", "nan"],
)
def test_gradients_without_a_direction_are_refused(batches, words) -> None:
    net = toy_net(dtype=torch.float64)
    if words[-1] == "zero":
        net.blocks[1].fc2.weight.data.zero_()  # nothing comes through it
    adaptation = Adaptation(net, LoRASB(rank=2), ["head"])
    with pytest.raises(UserError, match=mentions(*words)):
        adaptation.start(gradients(lambda batch: LOSS(net(batch[0]), batch[1]), batches, lr=0.1))
    assert not adaptation.started


def test_a_start_without_them_is_refused_by_name() -> None:
    adaptation = Adaptation(toy_net(), LoRASB(rank=2))
    with pytest.raises(UserError, match=mentions("LoRASB", "gradient", "start")):
        adaptation.start()
