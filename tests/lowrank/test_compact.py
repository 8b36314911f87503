"""A compact state leaves out what did not change, and gives the same weights to the bit."""

import copy

import pytest
import torch
from torch import nn

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, LoRA, PiSSA, Spectrum, SRLoRA
from tests.helpers.toys import assert_same_state, optimizer_of, toy_batches, toy_net, train

STEPS = 40
# Of matrices of 64 x 64 to 96 x 64, 10 directions are fewer numbers than the weight, and 60 are more.
METHODS = {
    "lora": LoRA(rank=4, alpha=8.0),
    "pissa": PiSSA(rank=4, alpha=10.0),
    "ledger": SRLoRA(rank=4, alpha=10.0, target_rank=12),
    "dense": SRLoRA(rank=8, alpha=10.0, target_rank=60),
}


def big_net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    return toy_net(seed, dtype, dim=64, hidden=96)


def adapted(method, dtype=torch.float32, seed: int = 0) -> tuple[nn.Module, Adaptation]:
    net = big_net(seed, dtype)
    return net, Adaptation(net, method, trainable=["head"], pretrained=lambda: big_net(seed, dtype).state_dict())


def trained(method, dtype=torch.float32, steps: int = STEPS, **options):
    net, adaptation = adapted(method, dtype)
    adaptation.start()
    adaptation.plan(STEPS)
    optimizer = optimizer_of(net)
    train(net, adaptation, optimizer, toy_batches(steps, dtype=dtype))
    return net, adaptation, optimizer


def saved(net, adaptation) -> tuple[dict, dict]:
    left_out = {id(p) for p in adaptation.restorable_parameters()}
    kept = {name: p for name, p in net.state_dict(keep_vars=True).items() if id(p) not in left_out}
    return copy.deepcopy({name: p.detach() for name, p in kept.items()}), copy.deepcopy(adaptation.state_dict(True))


def load(net, adaptation, file) -> None:
    adaptation.load_state_dict(file[1])
    assert net.load_state_dict(file[0], strict=False).unexpected_keys == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_the_weights_come_back_to_the_bit(method, dtype):
    net, adaptation, _ = trained(METHODS[method], dtype)
    file = saved(net, adaptation)
    assert set(file[0]) == {n for n, p in net.named_parameters() if p.requires_grad}
    for matrix in adaptation.matrices:
        state = file[1]["matrices"][matrix.name]
        assert (state["weight"] is not None) == (method == "dense")
        assert bool(state["updates"]) == (method in ("pissa", "ledger"))
        assert (adaptation.ledgers[matrix].updates is None) == (method == "dense")

    fresh, theirs = adapted(METHODS[method], dtype)
    load(fresh, theirs, file)
    assert_same_state(fresh, net)
    started, theirs = adapted(METHODS[method], dtype)
    theirs.start()  # as a trainer does before it loads
    load(started, theirs, file)
    assert_same_state(started, net)


@pytest.mark.parametrize("method", METHODS)
def test_an_earlier_state_comes_back_in_a_model_that_trained_on(method):
    net, adaptation, optimizer = trained(METHODS[method], steps=23)
    earlier, expected = saved(net, adaptation), copy.deepcopy(net)
    train(net, adaptation, optimizer, toy_batches(17, seed=2), first_step=23)
    assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), expected.parameters(), strict=True))
    load(net, adaptation, earlier)
    assert_same_state(net, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_loop_resumed_from_a_compact_state_equals_the_uninterrupted_one(method):
    whole, expected, _ = trained(METHODS[method])
    net, adaptation, optimizer = trained(METHODS[method], steps=23)
    file = saved(net, adaptation)
    second, theirs = adapted(METHODS[method])
    theirs.start()
    load(second, theirs, file)
    again = torch.optim.AdamW([p for p in second.parameters() if p.requires_grad], lr=0.01)
    again.load_state_dict(optimizer.state_dict())
    train(second, theirs, again, toy_batches(STEPS)[23:], first_step=23)
    assert_same_state(second, whole)
    # and the second file equals the uninterrupted run's
    for name, state in saved(second, theirs)[1]["matrices"].items():
        for key, value in saved(whole, expected)[1]["matrices"][name].items():
            torch.testing.assert_close(state[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_the_pretrained_weights_are_exact(method):
    net, adaptation, _ = trained(METHODS[method])
    pristine, x = big_net(), toy_batches(1)[0][0]
    pristine.head = net.head
    with adaptation.disabled():
        assert torch.equal(net(x), pristine(x))


@pytest.mark.parametrize("order", ["start, load", "load, start"])
def test_the_directions_of_the_file_are_those_that_were_taken_out(order, monkeypatch):
    """On another machine equal singular values may come with other vectors; what was subtracted is in the file."""
    net, adaptation, _ = trained(METHODS["ledger"])
    file = saved(net, adaptation)
    other, theirs = adapted(METHODS["ledger"])
    of = Spectrum.of

    def other_vectors(*args) -> Spectrum:
        spectrum = of(*args)
        spectrum.U[:, :2] = spectrum.U[:, :2].flip(1)
        return spectrum

    monkeypatch.setattr(Spectrum, "of", other_vectors)
    if order == "start, load":
        theirs.start()
        load(other, theirs, file)
    else:
        load(other, theirs, file)
        theirs.start()
    assert_same_state(other, net)
    for mine, own in zip(theirs.ledgers.values(), adaptation.ledgers.values(), strict=True):
        for each, expected in zip(mine.updates, own.updates, strict=True):
            assert torch.equal(each.B, expected.B)
            assert torch.equal(each.A, expected.A)


def test_what_somebody_else_trains_is_kept():
    net, adaptation, _ = trained(METHODS["ledger"], steps=5)
    net.embed.bias.requires_grad_(True)
    assert "embed.bias" in saved(net, adaptation)[0]
    net.embed.bias.requires_grad_(False)
    with torch.no_grad():
        net.blocks[0].fc1.bias += 1
    left_out = adaptation.restorable_parameters(trained=[net.blocks[0].fc1.bias])
    assert not any(p is net.blocks[0].fc1.bias or p is net.embed.bias for p in left_out)
    file = saved(net, adaptation)
    assert {"embed.bias", "blocks.0.fc1.bias"} <= set(file[0])
    fresh, theirs = adapted(METHODS["ledger"])
    load(fresh, theirs, file)
    assert_same_state(fresh, net)
    assert {"embed.bias", "blocks.0.fc1.bias"} <= set(saved(fresh, theirs)[0])


@pytest.mark.parametrize("method", METHODS)
def test_weights_loaded_after_the_adaptation_make_the_state_whole(method):
    net, adaptation = adapted(METHODS[method])
    changed = {name: value + 0.01 for name, value in net.state_dict().items() if "lora" not in name}
    net.load_state_dict(changed, strict=False)
    adaptation.start()
    assert adaptation.weights.reload is None
    assert adaptation.restorable_parameters() == []
    assert set(saved(net, adaptation)[0]) == set(net.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_another_base_is_refused(method):
    file = saved(*trained(METHODS[method], steps=5)[:2])
    _, other = adapted(METHODS[method], seed=5)
    with pytest.raises(UserError, match="other pretrained weights"):
        other.load_state_dict(file[1])


def test_a_base_that_differs_beside_the_adapted_layers_is_refused():
    file = saved(*trained(METHODS["lora"], steps=5)[:2])
    net, other = adapted(METHODS["lora"])
    with torch.no_grad():
        net.embed.weight[0, 0] += 1e-3
    with pytest.raises(UserError, match="other pretrained weights"):
        other.load_state_dict(file[1])


def test_a_source_that_changed_in_the_meantime_is_refused():
    _, adaptation, _ = trained(METHODS["ledger"])
    state = adaptation.state_dict(compact=True)
    adaptation.weights.reload = lambda: big_net(seed=5).state_dict()
    with pytest.raises(UserError, match="other pretrained weights"):
        adaptation.load_state_dict(state)
