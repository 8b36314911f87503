"""`attach`: a plain loop that trains, to the bit, as one that calls every hook itself."""

import pickle
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation
from tests.helpers.toys import METHODS, assert_same_state, begun, finished, optimizer_of, srlora, toy_batches, toy_net

STEPS = 40
OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "fused adamw": partial(torch.optim.AdamW, fused=True),
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}


def attached(method, steps=STEPS, kind=torch.optim.AdamW):
    net = toy_net()
    adaptation = Adaptation(net, method)
    optimizer = optimizer_of(net, kind)
    adaptation.attach(optimizer, steps)
    return net, adaptation, optimizer


def plain_loop(net, optimizer, batches):
    """Of someone who has never heard of this package."""
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()


def assert_same_run(loop, other):
    """Weights, histories and scores, to the bit."""
    assert_same_state(loop[0], other[0])
    ours, theirs = (tree_flatten(each[1].state_dict()) for each in (loop, other))
    assert ours[1] == theirs[1]
    for value, expected in zip(ours[0], theirs[0], strict=True):
        assert torch.equal(value, expected) if isinstance(value, torch.Tensor) else value == expected


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_an_attached_loop_equals_one_that_calls_every_hook(method, kind):
    expected = finished(METHODS[method], optimizer=OPTIMIZERS[kind])
    loop = attached(METHODS[method], kind=OPTIMIZERS[kind])
    plain_loop(loop[0], loop[2], toy_batches(STEPS))
    assert loop[1].step == STEPS
    assert loop[1].controller.progress().done == (3 if method == "srlora" else 0)
    assert_same_run(loop, expected)


@pytest.mark.parametrize("order", ["load, attach", "attach, load", "adaptation, attach, net"])
@pytest.mark.parametrize("method", METHODS)
def test_an_attached_loop_goes_on_from_its_state(method, order):
    expected = finished(METHODS[method])
    net, adaptation, optimizer = attached(METHODS[method])
    plain_loop(net, optimizer, toy_batches(STEPS)[:13])
    state = deepcopy((net.state_dict(), adaptation.state_dict(), optimizer.state_dict()))

    net = toy_net()
    adaptation = Adaptation(net, METHODS[method])
    optimizer = optimizer_of(net)
    for call in order.split(", "):
        if call == "attach":
            adaptation.attach(optimizer, STEPS)
        if call in ("adaptation", "load"):
            adaptation.load_state_dict(state[1])
        if call in ("net", "load"):
            net.load_state_dict(state[0])
    optimizer.load_state_dict(state[2])
    assert adaptation.step == 13
    plain_loop(net, optimizer, toy_batches(STEPS)[13:])
    assert_same_run((net, adaptation), expected)


def test_a_schedule_of_the_learning_rate_may_be_made_before_and_after():
    """It wraps the optimizer's step."""
    loops = []
    for first in (True, False):
        net = toy_net()
        adaptation, optimizer = Adaptation(net, srlora()), optimizer_of(net)
        make = partial(torch.optim.lr_scheduler.LinearLR, optimizer, 0.1, total_iters=STEPS)
        schedule = make() if first else None
        adaptation.attach(optimizer, STEPS)
        schedule = schedule or make()
        for batch in toy_batches(STEPS):
            plain_loop(net, optimizer, [batch])
            schedule.step()
        assert adaptation.controller.progress().done == 3
        loops.append((net, adaptation))
    assert_same_run(*loops)


# --- under a loss scale


def scaled_loop(net, optimizer, batches, overflows=(), before=None, after=None):
    """As the examples of torch.amp have it; gradients overflow in the named batches.

    Without hooks that are attached, ``before`` and ``after`` are called around every step that is not skipped.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    for i, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(net(x), y)).backward()
        if i in overflows:
            next(p for p in net.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")
        if before is not None:
            scaler.unscale_(optimizer)
            if i not in overflows:
                before()
        scaler.step(optimizer)
        scaler.update()
        if after is not None and i not in overflows:
            after()
    return scaler


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_a_scaler_skips_is_no_step(method):
    batches, overflows = toy_batches(STEPS + 2), (6, 9)
    net, adaptation, optimizer = attached(METHODS[method])
    scaler = scaled_loop(net, optimizer, batches, overflows)
    assert scaler.get_scale() == 2.0 ** (10 - 2 + 1 + (STEPS + 2 - 10) // 4)
    assert adaptation.step == STEPS

    explicit = begun(METHODS[method])
    scaled_loop(
        explicit[0],
        explicit[2],
        batches,
        overflows,
        before=lambda: explicit[1].before_optimizer(explicit[1].step + 1),
        after=lambda: explicit[1].after_optimizer(explicit[1].step + 1, explicit[2]),
    )
    assert_same_run((net, adaptation), explicit)
    # and scales are powers of 2, which round nothing
    unscaled = attached(METHODS[method])
    plain_loop(unscaled[0], unscaled[2], [batch for i, batch in enumerate(batches) if i not in overflows])
    assert_same_run((net, adaptation), unscaled)


def test_an_optimizer_that_unscales_by_itself_gives_the_same_scores():
    fused = OPTIMIZERS["fused adamw"]
    loop, unscaled = attached(srlora(), kind=fused), attached(srlora(), kind=fused)
    scaled_loop(loop[0], loop[2], toy_batches(STEPS))
    plain_loop(unscaled[0], unscaled[2], toy_batches(STEPS))
    assert loop[1].controller.scores()["blocks.0.fc1"].any()
    assert_same_run(loop, unscaled)


# --- refusals


@pytest.mark.parametrize("given", [lambda closure: ((closure,), {}), lambda closure: ((), {"closure": closure})])
def test_a_closure_is_refused_before_it_is_called(given):
    net, adaptation, optimizer = attached(srlora())
    before, called = deepcopy(net.state_dict()), []
    args, kwargs = given(lambda: called.append(1))
    with pytest.raises(UserError, match=r"attach\(\) takes no optimizer\.step\(closure\)"):
        optimizer.step(*args, **kwargs)
    assert not called
    assert adaptation.step == 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    optimizer.step(None)
    optimizer.step(closure=None)
    assert adaptation.step == 2


def test_an_optimizer_of_other_parameters_is_refused():
    net = toy_net()
    adaptation = Adaptation(net, srlora(), trainable="head")
    with pytest.raises(UserError, match=r"does not train the adapters of blocks\.0\.qkv"):
        adaptation.attach(torch.optim.SGD(net.head.parameters(), lr=0.01), STEPS)
    assert not adaptation.started


def test_a_run_that_is_too_short_leaves_the_optimizer_alone():
    net = toy_net()
    adaptation, optimizer = Adaptation(net, srlora()), optimizer_of(net)
    with pytest.raises(UserError, match=r"4 switches .* do not fit into 3 optimizer steps"):
        adaptation.attach(optimizer, 3)
    plain_loop(net, optimizer, toy_batches(2))
    assert adaptation.step == 0


@pytest.mark.parametrize("same", [True, False], ids=["same optimizer", "another"])
def test_a_second_run_is_counted_once(same):
    """Eight steps of twenty, with a switch after the fifth; then a run of its own, with switches after 4 and 8."""
    net, adaptation, optimizer = attached(srlora(), 20)
    plain_loop(net, optimizer, toy_batches(8))
    second = optimizer if same else optimizer_of(net)
    adaptation.attach(second, 12)
    assert adaptation.steps_before == 8
    plain_loop(net, second, toy_batches(12))
    assert (adaptation.step, adaptation.steps_before) == (12, 8)
    for intervals in adaptation.controller.histories().values():
        assert intervals[:, 0].unique().tolist() == [0, 5, 12, 16]
    if not same:
        plain_loop(net, optimizer, toy_batches(1))
        assert adaptation.step == 12


def test_what_is_attached_can_be_pickled():
    """Without the hooks of the optimizer, which stays behind."""
    net, adaptation, _ = attached(srlora())
    again = pickle.loads(pickle.dumps(adaptation))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.net.parameters(), strict=True))
    again.attach(torch.optim.SGD([p for p in again.net.parameters() if p.requires_grad], lr=0.1), 20)
