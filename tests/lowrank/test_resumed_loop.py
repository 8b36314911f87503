"""A loop without Lightning that is saved, made again and resumed, by calls in any order."""

import warnings
from copy import deepcopy

import pytest
import torch

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, LoRA, PiSSA, SRLoRA
from tests.helpers.errors import mentions
from tests.helpers.toys import toy_batches, toy_net, train

METHODS = {
    "lora": LoRA(rank=4, alpha=8.0),
    "pissa": PiSSA(rank=4, alpha=8.0),
    "srlora": SRLoRA(rank=4, alpha=8.0, target_rank=12),
}
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
    left_out = {id(p) for p in adaptation.untouched()} if compact else set()
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
        assert loop[1].switches_done == whole[1].switches_done == (3 if method == "srlora" else 0)
        assert said == []


@pytest.mark.parametrize("order", ["start, adaptation, net, plan 34", "start, plan 34, adaptation, net"])
def test_a_resumed_loop_of_another_length_plans_the_rest_and_says_so(order):
    """After 13 of 40 steps one of 4 switches is done; the others fall after 20, 27 and, not done, 34."""
    _, state = half_done(METHODS["srlora"], "adamw")
    loop, said = resumed(METHODS["srlora"], order, "adamw", state)
    assert [message for message in said if "ends at step 34: 2 switches" in message and "from 13 on" in message] == said
    assert len(said) == 1
    train(*loop, toy_batches(21), first_step=13)
    for each in loop[1].states.values():
        assert each.intervals[:, 0].unique().tolist() == [0, 10, 20, 27]


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
