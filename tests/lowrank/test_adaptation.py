"""The invariants of a start and of all that one can do with an adapted network."""

import pytest
import torch
from torch import nn

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, LoRA, PiSSA, SRLoRA
from srlora_pl.lowrank.kernels import merged as merge
from tests.helpers.errors import mentions
from tests.helpers.toys import (
    ROUNDING,
    assert_same_state,
    begun,
    finished,
    one_step,
    optimizer_of,
    srlora,
    toy_batches,
    toy_net,
    train,
)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("alpha", [0.5, 4.0, 40.0])
@pytest.mark.parametrize("method", [LoRA, PiSSA, SRLoRA])
def test_injection_and_start_leave_the_output(method, alpha, dtype):
    net = toy_net(dtype=dtype)
    x = toy_batches(1, dtype=dtype)[0][0]
    before = net(x)
    adaptation = Adaptation(net, method(rank=4, alpha=alpha))
    assert torch.equal(net(x), before)
    adaptation.start()
    torch.testing.assert_close(net(x), before, rtol=0, atol=20 * ROUNDING[dtype])
    moved = any(ledger.updates for ledger in adaptation.ledgers.values())
    assert moved == (method is not LoRA)


@pytest.mark.parametrize("method", [PiSSA(rank=4, alpha=8.0), srlora(), LoRA(rank=4, alpha=8.0)])
def test_disabled_computes_as_the_pretrained_network(method):
    net, adaptation, _ = finished(method)
    pristine, x = toy_net(), toy_batches(1)[0][0]
    after = net(x)
    assert (after - pristine(x)).abs().max() > 1e-2
    with adaptation.disabled():
        torch.testing.assert_close(net(x), pristine(x), rtol=0, atol=1e-5)
    assert torch.equal(net(x), after)


@pytest.mark.parametrize("method", [LoRA(rank=3), srlora()], ids=["lora", "srlora"])
def test_merged_pairs_hide_nothing(method):
    net, adaptation, _ = finished(method)
    x = toy_batches(1)[0][0]
    after, state, W0 = net(x), adaptation.state_dict(), adaptation.pretrained_weights()
    adaptation.merge()
    with adaptation.disabled():
        torch.testing.assert_close(net(x), toy_net()(x), rtol=0, atol=1e-5)
    assert all(torch.equal(weight, W0[name]) for name, weight in adaptation.pretrained_weights().items())
    with pytest.raises(UserError, match=r"merged into the weights, call unmerge\(\) before training"):
        adaptation.start()
    adaptation.load_state_dict(state)
    assert not any(layer.merged for layer in adaptation.layers.values())
    assert torch.equal(net(x), after)


def test_a_merged_network_has_the_state_of_an_unmerged_one():
    net, adaptation, _ = finished(srlora())
    state = {name: value.clone() for name, value in net.state_dict().items()}
    x = toy_batches(1)[0][0]
    before = net(x)
    adaptation.merge()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    net.load_state_dict({name: value + 1 if "lora" in name else value for name, value in state.items()})
    assert not any(layer.merged for layer in adaptation.layers.values())
    assert (net(x) - before).abs().max() > 1e-2
    net.load_state_dict(state)
    assert torch.equal(net(x), before)


def test_disabled_pairs_are_neither_merged_nor_unmerged_and_stay_so_outside_an_inner_block():
    net, adaptation, _ = finished(srlora())
    x = toy_batches(1)[0][0]
    after = net(x)
    with adaptation.disabled():
        pretrained = net(x)
        with adaptation.disabled():
            assert torch.equal(net(x), pretrained)
        for name, weight in adaptation.pretrained_weights().items():
            assert torch.equal(weight, adaptation.layers[name].weight)
        assert torch.equal(net(x), pretrained)
        for change in (adaptation.merge, adaptation.unmerge):
            with pytest.raises(UserError, match=r"merge\(\) has no meaning while the adapters are disabled\(\)"):
                change()
    assert torch.equal(net(x), after)


def _precision():
    return torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")


def test_merge_is_exact_idempotent_and_undone_to_the_bit(monkeypatch):
    net, adaptation, _ = finished(srlora())
    x = toy_batches(1)[0][0]
    before, state = net(x), {k: v.clone() for k, v in net.state_dict().items()}
    adaptation.merge()
    merged = [layer.weight.clone() for layer in adaptation.layers.values()]
    adaptation.merge()
    for layer, weight in zip(adaptation.layers.values(), merged, strict=True):
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer.merged_weight(), weight)
    torch.testing.assert_close(net(x), before, rtol=0, atol=2e-5)
    adaptation.unmerge()
    seen = []
    monkeypatch.setattr("srlora_pl.lowrank.linear.merged", lambda *a: seen.append(_precision()) or merge(*a))
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            adaptation.merge()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {("highest", False)}
    for layer, weight in zip(adaptation.layers.values(), merged, strict=True):
        assert torch.equal(layer.weight, weight)
    adaptation.unmerge()
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert torch.equal(net(x), before)


def test_training_without_a_start_is_refused():
    net = toy_net()
    with pytest.raises(UserError, match=r"call start\(\) before the first step"):
        one_step(net, Adaptation(net, PiSSA(rank=2)))
    net = toy_net()
    one_step(net, Adaptation(net, LoRA(rank=2)))  # needs none


def test_trained_pairs_without_their_history_are_not_started_over():
    net, adaptation, _ = finished(srlora())
    other = toy_net()
    restored = Adaptation(other, srlora())
    other.load_state_dict(net.state_dict())
    with pytest.raises(UserError, match=r"hold values before their start, .*adaptation\.load_state_dict"):
        restored.start()
    other = toy_net()
    Adaptation(other, srlora()).load_state_dict(adaptation.state_dict())
    other.load_state_dict(net.state_dict())
    x = toy_batches(1)[0][0]
    assert torch.equal(other(x), net(x))


def test_weights_made_coarser_after_the_adaptation_are_refused_where_they_change():
    adaptation = Adaptation(toy_net(), srlora())
    adaptation.net.blocks[1].fc2.bfloat16()
    with pytest.raises(UserError, match=mentions("SRLoRA", "torch.bfloat16", "float32")):
        adaptation.start()
    adaptation = Adaptation(toy_net(), LoRA(rank=2))
    adaptation.net.bfloat16()
    adaptation.start()


def test_parameters_may_be_replaced_as_a_whole():
    net = toy_net()
    adaptation = Adaptation(net, srlora())
    adaptation.start()
    net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)
    optimizer = optimizer_of(net)
    adaptation.plan(40)
    train(net, adaptation, optimizer, toy_batches(40))
    expected, reference, _ = finished(srlora())
    assert reference.controller.progress().done == adaptation.controller.progress().done > 0
    x = toy_batches(1)[0][0]
    assert torch.equal(net(x), expected(x))


def test_adapted_layers_that_never_get_a_gradient_are_named():
    net = toy_net()
    adaptation = Adaptation(net, srlora())
    adaptation.start()
    net.blocks[1].forward = lambda x: x
    for _ in range(19):
        one_step(net, adaptation)
    with pytest.raises(UserError, match=r"no gradient has reached blocks\.1\.qkv, .* and 1 more in 20 steps"):
        one_step(net, adaptation)


def test_a_layer_may_be_left_out_of_some_steps():
    net = toy_net()
    adaptation = Adaptation(net, srlora())
    adaptation.start()
    forward, net.blocks[1].forward = net.blocks[1].forward, lambda x: x
    for _ in range(15):
        one_step(net, adaptation)
    net.blocks[1].forward = forward
    for _ in range(10):
        one_step(net, adaptation)
    adaptation.require_gradients()


def test_a_rank_beyond_the_spectrum_is_an_error_that_names_the_matrix():
    net = toy_net()
    with torch.no_grad():
        net.blocks[0].proj.weight[:] = torch.outer(torch.arange(1.0, 13), torch.ones(12))
    with pytest.raises(UserError, match=mentions("4", "blocks.0.proj", "1", "rank")):
        Adaptation(net, PiSSA(rank=4)).start()


@pytest.mark.parametrize(
    ("method", "options", "trained"),
    [
        # a pair has out + in numbers: of q, k, v and proj 24, of fc1 and fc2 32
        (LoRA(rank=2), {}, 2 * 2 * (4 * 24 + 2 * 32)),
        (srlora(target_modules=["fc1"]), {"trainable": ["head"]}, 2 * 4 * (12 + 20) + 3 * 13),
    ],
)
def test_the_number_of_parameters_that_train_is_printed(method, options, trained, capsys):
    net = toy_net()
    everything = sum(parameter.numel() for parameter in net.parameters())
    adaptation = Adaptation(net, method, **options)
    pairs = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in adaptation.layers.values())
    adaptation.print_trainable_parameters()
    share = f"{100 * trained / (everything + pairs):.2f}%"
    assert capsys.readouterr().out == f"{trained:,} of {everything + pairs:,} parameters train ({share})\n"


def test_the_names_of_version_0_1_warn_and_work():
    expected, reference, _ = finished(srlora())
    net, adaptation, optimizer = begun(srlora())
    switched = []
    for step, (x, y) in enumerate(toy_batches(40), start=1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        with pytest.warns(DeprecationWarning, match="before_optimizer") as warned:
            adaptation.observe()
        assert warned[0].filename == __file__
        optimizer.step()
        with pytest.warns(DeprecationWarning, match="after_optimizer") as warned:
            switched += [step] if adaptation.switch_if_due(step, optimizer) else []
        assert warned[0].filename == __file__
    assert switched == [10, 20, 30]
    assert_same_state(net, expected)
    assert torch.equal(adaptation.controller.importance.smoothed, reference.controller.importance.smoothed)


def test_the_former_name_takes_gradients_and_the_loss_scale():
    net, adaptation, _ = begun(srlora())
    other, theirs, _ = begun(srlora())
    (x, y), scale = toy_batches(1)[0], torch.tensor(4.0)
    nn.functional.cross_entropy(net(x), y).backward()
    (scale * nn.functional.cross_entropy(other(x), y)).backward()
    gradients = [parameter.grad for parameter in other.parameters() if parameter.grad is not None]
    with pytest.warns(DeprecationWarning, match="before_optimizer"):
        theirs.observe(gradients, scale.reciprocal())
    adaptation.before_optimizer(1)
    assert torch.equal(theirs.controller.importance.smoothed, adaptation.controller.importance.smoothed)
    with pytest.warns(DeprecationWarning, match="before_optimizer"):
        theirs.observe([torch.tensor([float("nan")])], scale.reciprocal())
    assert torch.equal(theirs.controller.importance.smoothed, adaptation.controller.importance.smoothed)
