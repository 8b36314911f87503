"""The history of a frozen weight: it holds all that training did, and no more numbers than the weight."""

import pytest
import torch
from torch import nn

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, LoRA, PiSSA
from srlora_pl.lowrank.ledger import Ledger, Update
from tests.helpers.toys import optimizer_of, srlora, toy_batches, toy_net


@pytest.mark.parametrize("method", [PiSSA(rank=4, alpha=8.0), srlora(), LoRA(rank=4, alpha=8.0)])
def test_the_change_of_a_weight_is_all_that_training_did(method):
    """W_eff - W0 = s * (what training did to every pair that was ever active), the sum kept here in fp64."""
    steps = 40
    net = toy_net(dtype=torch.float64)
    adaptation = Adaptation(net, method)
    W0 = {name: layer.weight.clone() for name, layer in adaptation.layers.items()}
    adaptation.start()
    adaptation.plan(steps)
    optimizer = optimizer_of(net)
    trained = {name: torch.zeros_like(w) for name, w in W0.items()}
    for step, batch in enumerate(toy_batches(steps, dtype=torch.float64)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch[0]), batch[1]).backward()
        adaptation.before_optimizer(step + 1)
        before = {name: layer.merged_weight() - layer.weight for name, layer in adaptation.layers.items()}
        optimizer.step()
        for name, layer in adaptation.layers.items():
            trained[name] += layer.merged_weight() - layer.weight - before[name]
        adaptation.after_optimizer(step + 1, optimizer)
    for name, layer in adaptation.layers.items():
        assert trained[name].abs().max() > 1e-2
        torch.testing.assert_close(layer.merged_weight() - W0[name], trained[name], rtol=0, atol=1e-13)
    for matrix, ledger in adaptation.ledgers.items():
        B, A = ledger.stacked()
        change = matrix.weight - matrix.of_weight(W0[matrix.layer_name])
        torch.testing.assert_close(B @ A, change, rtol=0, atol=1e-13)
        assert bool(change.any()) == bool(ledger.updates) == (not isinstance(method, LoRA))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(count=3, shape=(6, 4)):
    """A ledger of ``count`` updates of two pairs each, and W0 and W of its matrix."""
    ledger, W0 = Ledger(shape), normal(*shape)
    W = W0.clone()
    for i in range(count):
        update = Update(normal(shape[0], 2, seed=2 * i + 1), normal(2, shape[1], seed=2 * i + 2), 0.5 - i)
        update.add_to(W)
        ledger.enter(update, may_forget=False)
    return ledger, W0, W


def test_the_ledger_leads_from_the_pretrained_weight_to_the_present_one_and_back():
    ledger, W0, W = filled()
    expected = W0 + sum(each.alpha * each.B @ each.A for each in ledger.updates)
    torch.testing.assert_close(W, expected)
    assert (W - W0).norm() > 1
    assert torch.equal(ledger.replay(W0, W0.device), W)
    B, A = ledger.stacked()
    assert B.shape == (6, ledger.rank) == (6, 6)
    torch.testing.assert_close(B @ A, W - W0)
    undone = W.clone()
    ledger.undo(undone)
    torch.testing.assert_close(undone, W0, rtol=0, atol=1e-14)


def test_an_empty_ledger_changes_nothing():
    ledger, W0 = Ledger((6, 4)), normal(6, 4)
    assert torch.equal(ledger.replay(W0, W0.device), W0)
    B, A = ledger.stacked()
    assert torch.equal(B @ A, torch.zeros(6, 4, dtype=torch.float64))


def test_a_ledger_keeps_copies_and_replays_a_copy():
    ledger, W0, W = filled()
    B, A = normal(6, 1, seed=8), normal(1, 4, seed=9)
    ledger.enter(Update(B, A, 1.0), may_forget=False)
    expected = W.addmm(B, A)
    kept = W0.clone()
    B.zero_()
    A.zero_()
    assert torch.equal(ledger.replay(W0, W0.device), expected)
    assert torch.equal(W0, kept)


def test_a_replay_is_in_the_precision_of_the_updates():
    """As a run in double precision whose pretrained weights are stored in single precision."""
    ledger, W0, _ = filled()
    assert torch.equal(ledger.replay(W0.float(), W0.device), ledger.replay(W0.float().double(), W0.device))


@pytest.mark.parametrize("with_updates", [True, False])
def test_the_state_of_a_ledger(with_updates):
    ledger, W0, W = filled()
    other = Ledger(ledger.shape)
    other.load_state_dict(ledger.state_dict(with_updates))
    assert other.rank == ledger.rank == 6
    if with_updates:
        assert torch.equal(other.replay(W0, W0.device), W)
        assert [each.alpha for each in other.updates] == [0.5, -0.5, -1.5]
    else:
        assert other.updates is None


@pytest.mark.parametrize(("out", "in_", "rank"), [(40, 24, 2), (24, 40, 3), (4, 4, 1)])
def test_a_ledger_is_kept_while_it_has_no_more_numbers_than_the_weight(out, in_, rank):
    """Of two pairs of 4 x 4 it has just as many."""
    kept, ledger, fits = Ledger((out, in_)), Ledger((out, in_)), []
    for _ in range(min(out, in_) // rank):
        for each in (kept, ledger):
            each.enter(Update(torch.ones(out, rank), torch.ones(rank, in_), 1.0), may_forget=each is ledger)
        fits.append(sum(update.B.numel() + update.A.numel() for update in kept.updates) <= out * in_)
        assert kept.is_larger_than_weight == ledger.is_larger_than_weight == (not fits[-1])
        assert (ledger.updates is None) == (not fits[-1])
        assert ledger.rank == kept.rank == len(fits) * rank  # counted on
    assert fits[0]
    assert not fits[-1]


@pytest.mark.parametrize("name", ["blocks.0.qkv[k]", "blocks.1.fc2"])
def test_a_change_of_a_weight_is_entered(name):
    adaptation = Adaptation(toy_net(), LoRA(rank=2))
    (matrix,) = (each for each in adaptation.matrices if each.name == name)
    before, others = matrix.weight.clone(), {m.name: m.weight.clone() for m in adaptation.matrices if m is not matrix}
    B, A = normal(matrix.shape[0], 1).float(), normal(1, matrix.shape[1]).float()
    adaptation.add(matrix, B, A, -0.5)
    torch.testing.assert_close(matrix.weight, before - 0.5 * B @ A)
    assert all(torch.equal(m.weight, others[m.name]) for m in adaptation.matrices if m is not matrix)
    (update,) = adaptation.ledgers[matrix].updates
    assert torch.equal(update.B, B)
    assert torch.equal(update.A, A)
    assert update.alpha == -0.5
    W0 = toy_net().get_parameter(f"{matrix.layer_name}.weight")
    torch.testing.assert_close(adaptation.pretrained_weights()[matrix.layer_name], W0)
    assert sum(ledger.rank for ledger in adaptation.ledgers.values()) == 1


def test_no_weight_changes_while_the_adapters_are_merged_into_it():
    adaptation = Adaptation(toy_net(), LoRA(rank=2))
    adaptation.merge()
    matrix = adaptation.matrices[0]
    with pytest.raises(UserError, match=r"call unmerge\(\) before a change of its weight"):
        adaptation.add(matrix, torch.ones(12, 1), torch.ones(1, 12), 1.0)
    assert adaptation.ledgers[matrix].rank == 0
