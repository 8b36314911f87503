"""The state of an adaptation: a plain loop that is saved, made again and resumed by calls in any order; refusals."""

import warnings
from copy import deepcopy

import pytest
import torch
from torch.utils._pytree import tree_flatten

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, LoRA
from tests.helpers.errors import mentions
from tests.helpers.toys import METHODS, begun, finished, optimizer_of, srlora, toy_batches, toy_net, train

OPTIMIZERS = {"adamw": (torch.optim.AdamW, {}), "sgd": (torch.optim.SGD, {"momentum": 0.9})}


def resumed(method, order, optimizer, state, compact=False):
    """A loop made again from ``state``, by calls in this ``order``; and what they warned of."""
    net = toy_net()
    adaptation = Adaptation(net, method, pretrained=lambda: toy_net().state_dict())
    state = deepcopy(state)  # an optimizer trains on in the very tensors that it is given
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for call in order.split(", "):
            match call.split():
                case ["start"]:
                    adaptation.start()
                case ["plan", last_step]:
                    adaptation.plan(int(last_step))
                case ["adaptation"]:
                    adaptation.load_state_dict(state["adaptation"])
                case ["net"]:
                    net.load_state_dict(state["net"], strict=not compact)
    kind, options = OPTIMIZERS[optimizer]
    optimizer = kind([p for p in net.parameters() if p.requires_grad], lr=0.01, **options)
    optimizer.load_state_dict(state["optimizer"])
    return (net, adaptation, optimizer), [str(each.message) for each in warned]


def half_done(method, optimizer, compact=False, steps=40, stop=13):
    """An uninterrupted loop, and the state of one after ``stop`` steps."""
    loops = []
    for end in (steps, stop):
        net = toy_net()
        adaptation = Adaptation(net, method, pretrained=lambda: toy_net().state_dict())
        adaptation.start()
        adaptation.plan(steps)
        kind, options = OPTIMIZERS[optimizer]
        loop = net, adaptation, kind([p for p in net.parameters() if p.requires_grad], lr=0.01, **options)
        train(*loop, toy_batches(steps)[:end])
        loops.append(loop)
    net, adaptation, optimizer = loops[1]
    left_out = {id(p) for p in adaptation.restorable_parameters()} if compact else set()
    kept = {name: p.detach() for name, p in net.state_dict(keep_vars=True).items() if id(p) not in left_out}
    return loops[0], {
        "net": kept,
        "adaptation": adaptation.state_dict(compact),
        "optimizer": optimizer.state_dict(),
    }


@pytest.mark.parametrize("compact", [False, True], ids=["full", "compact"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_loop_keeps_the_plan_whatever_the_order_of_its_calls(method, optimizer, compact):
    whole, state = half_done(METHODS[method], optimizer, compact)
    for order in (
        "start, adaptation, net, plan 40",
        "start, adaptation, net",
        "start, plan 40, adaptation, net",
        "plan 40, adaptation, start, net",
        "adaptation, net, start, plan 40",
        "adaptation, plan 40, net, start",
        "start, net, adaptation, plan 40",
    ):
        loop, said = resumed(METHODS[method], order, optimizer, state, compact)
        train(*loop, toy_batches(40)[13:], first_step=13)
        for (name, value), other in zip(whole[0].state_dict().items(), loop[0].state_dict().values(), strict=True):
            assert torch.equal(value, other), (order, name)
        done = {each[1].controller.progress().done for each in (loop, whole)}
        assert done == {3 if method == "srlora" else 0}
        assert said == []


@pytest.mark.parametrize("order", ["start, adaptation, net, plan 34", "start, plan 34, adaptation, net"])
def test_a_resumed_loop_of_another_length_plans_the_rest_and_says_so(order):
    """After 13 of 40 steps one of 4 switches is done; the others fall after 20, 27 and, not done, 34."""
    _, state = half_done(METHODS["srlora"], "adamw")
    loop, said = resumed(METHODS["srlora"], order, "adamw", state)
    assert [message for message in said if "ends at step 34: 2 switches" in message and "from 13 on" in message] == said
    assert len(said) == 1
    train(*loop, toy_batches(21), first_step=13)
    for intervals in loop[1].controller.histories().values():
        assert intervals[:, 0].unique().tolist() == [0, 10, 20, 27]


def test_a_resumed_loop_that_would_end_before_it_goes_on_is_refused():
    _, state = half_done(METHODS["srlora"], "adamw")
    with pytest.raises(UserError, match=mentions("12", "13")):
        resumed(METHODS["srlora"], "start, adaptation, net, plan 12", "adamw", state)


@pytest.mark.parametrize("order", ["adaptation, net", "adaptation, net, plan 40", "plan 40, adaptation, net"])
def test_a_resumed_loop_that_lacks_the_directions_to_come_is_refused_at_its_first_step(order):
    whole, state = half_done(METHODS["srlora"], "adamw")
    loop, _ = resumed(METHODS["srlora"], order, "adamw", state)
    with pytest.raises(UserError, match=mentions("start()")):
        train(*loop, toy_batches(1), first_step=13)
    loop[1].start()
    train(*loop, toy_batches(40)[13:], first_step=13)
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), loop[0].parameters(), strict=True))


@pytest.mark.parametrize("where", ["it came from", "it was loaded"])
def test_a_state_is_of_its_moment(where):
    """Whatever training does afterwards, in the adaptation that it came from and where it was loaded."""
    net, adaptation, optimizer = begun(srlora(), 40)
    train(net, adaptation, optimizer, toy_batches(12))
    state = adaptation.state_dict()
    copy = deepcopy(state)
    if where == "it was loaded":
        weights, net = net.state_dict(), toy_net()
        adaptation = Adaptation(net, srlora())
        adaptation.start()
        adaptation.load_state_dict(state)
        net.load_state_dict(weights)
    done = adaptation.controller.progress().done
    optimizer = optimizer_of(net)
    train(net, adaptation, optimizer, toy_batches(28), first_step=12)
    assert adaptation.controller.progress().done > done
    flat, expected = (tree_flatten(each)[0] for each in (state, copy))
    assert len(flat) == len(expected)
    for a, b in zip(flat, expected, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_state_of_other_layers_is_refused():
    _, adaptation, _ = finished(srlora(), steps=5)
    with pytest.raises(UserError, match="the checkpoint adapts other layers than this model has"):
        Adaptation(toy_net(depth=3), srlora()).load_state_dict(adaptation.state_dict())


@pytest.mark.parametrize("stop", [7, 20, 21])
def test_a_loop_that_is_stopped_and_resumed_equals_the_uninterrupted_one(stop, tmp_path):
    steps, batches = 40, toy_batches(40)
    whole, expected, _ = finished(srlora(), steps=steps)

    net = toy_net()
    adaptation = Adaptation(net, srlora())
    adaptation.start()
    adaptation.plan(steps)
    optimizer = optimizer_of(net)
    train(net, adaptation, optimizer, batches[:stop])
    state = {"net": net.state_dict(), "adaptation": adaptation.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "state.pt")

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    net = toy_net()
    adaptation = Adaptation(net, srlora())
    adaptation.start()
    adaptation.load_state_dict(state["adaptation"])
    net.load_state_dict(state["net"])
    optimizer = optimizer_of(net)
    optimizer.load_state_dict(state["optimizer"])
    train(net, adaptation, optimizer, batches[stop:], first_step=stop)
    for (name, value), other in zip(whole.state_dict().items(), net.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert torch.equal(adaptation.controller.importance.smoothed, expected.controller.importance.smoothed)
    assert adaptation.controller.progress().done == expected.controller.progress().done == 3


def test_load_then_start_takes_the_spectra_from_the_pretrained_weights():
    net, adaptation, _ = finished(srlora())
    other = toy_net()
    loaded = Adaptation(other, srlora())
    loaded.load_state_dict(adaptation.state_dict())
    other.load_state_dict(net.state_dict())
    assert not loaded.controller.spectra
    with loaded.disabled():
        x = toy_batches(1)[0][0]
        torch.testing.assert_close(other(x), toy_net()(x), rtol=0, atol=1e-6)
    loaded.start()
    for name, spectrum in adaptation.controller.spectra.items():
        assert torch.equal(loaded.controller.spectra[name].U, spectrum.U)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (LoRA(rank=4, alpha=8.0), "srlora_pl.SRLoRA.*srlora_pl.LoRA"),
        (srlora(rank=2), r"method.rank 4 \(now 2\)"),
        (srlora(target_rank=10), r"method.target_rank 12 \(now 10\)"),
    ],
)
def test_a_state_of_another_method_is_refused(method, says):
    _, adaptation, _ = finished(srlora(), steps=5)
    with pytest.raises(UserError, match=says):
        Adaptation(toy_net(), method).load_state_dict(adaptation.state_dict())


@pytest.mark.parametrize("order", ["start, load", "load, start"])
@pytest.mark.parametrize("method", [srlora(), LoRA(rank=4)])
def test_other_pretrained_weights_are_refused_where_they_matter(method, order):
    _, adaptation, _ = finished(method, steps=5)
    other = Adaptation(toy_net(seed=5), method)
    if order == "start, load":
        other.start()
        with pytest.raises(UserError, match="other pretrained weights"):
            other.load_state_dict(adaptation.state_dict())
    else:
        other.load_state_dict(adaptation.state_dict())  # all values come from the file: enough to test or predict
        if method.starts_from == "spectrum":
            with pytest.raises(UserError, match="other pretrained weights"):
                other.start()
