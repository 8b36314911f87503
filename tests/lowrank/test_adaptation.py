"""The invariants of a start, of switches and of what one can do with an adapted network."""

import re
import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, LoRA, PiSSA, Spectrum, SRLoRA
from srlora_pl.lowrank.kernels import merged as merge
from srlora_pl.util.precision import full_precision
from tests.helpers.toys import toy_batches, toy_net, train

# rounding of one layer's products, a few dozen terms each
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-14}


def srlora(**options):
    return SRLoRA(**{"rank": 4, "alpha": 8.0, "target_rank": 12, **options})


def begun(method, steps, dtype=torch.float32, optimizer=torch.optim.AdamW, **options):
    net = toy_net(dtype=dtype)
    adaptation = Adaptation(net, method)
    adaptation.start()
    adaptation.plan(steps)
    return net, adaptation, optimizer([p for p in net.parameters() if p.requires_grad], lr=0.01, **options)


def trained(method, steps=40, dtype=torch.float32, optimizer=torch.optim.AdamW, **options):
    run = begun(method, steps, dtype, optimizer, **options)
    train(*run, toy_batches(steps, dtype=dtype))
    return run


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
    moved = any((s.spectrum is not None) for s in adaptation.states.values())
    assert moved == method.needs_spectrum


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("alpha", [0.5, 40.0])
def test_a_switch_leaves_the_effective_weight_and_moves_everything_else(alpha, dtype):
    net, adaptation, optimizer = trained(srlora(alpha=alpha), steps=5, dtype=dtype)
    x = toy_batches(1, dtype=dtype)[0][0]
    before, output = [layer.merged_weight() for layer in adaptation.layers.values()], net(x)
    weights = [layer.weight.clone() for layer in adaptation.layers.values()]
    adaptation._switch(adaptation.matrices, 1, optimizer)
    for layer, effective, weight in zip(adaptation.layers.values(), before, weights, strict=True):
        torch.testing.assert_close(layer.merged_weight(), effective, rtol=0, atol=ROUNDING[dtype])
        assert (layer.weight - weight).abs().max() > 1e-3
    torch.testing.assert_close(net(x), output, rtol=0, atol=20 * ROUNDING[dtype])


def test_a_reduced_matmul_precision_does_not_reach_a_switch(monkeypatch):
    _, adaptation, optimizer = trained(srlora(), steps=5)
    seen = set()  # not every processor computes differently at a lower setting, so look at the setting itself
    draw = Spectrum.pairs
    monkeypatch.setattr(
        Spectrum, "pairs", lambda *a, **k: seen.add(torch.get_float32_matmul_precision()) or draw(*a, **k)
    )
    before = [layer.merged_weight() for layer in adaptation.layers.values()]
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            adaptation._switch(adaptation.matrices, 1, optimizer)
        assert seen == {"highest"}
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    for layer, effective in zip(adaptation.layers.values(), before, strict=True):
        torch.testing.assert_close(layer.merged_weight(), effective, rtol=0, atol=ROUNDING[torch.float32])


def test_a_precision_that_was_set_for_one_backend_is_kept():
    backend = torch.backends.cuda.matmul
    backend.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError):  # what torch says then
            torch.get_float32_matmul_precision()
        with full_precision():
            assert (torch.get_float32_matmul_precision(), backend.fp32_precision) == ("highest", "ieee")
        assert backend.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_weight_moves_only_at_a_switch_and_the_number_of_trainable_parameters_never():
    steps = 40
    net = toy_net()
    adaptation = Adaptation(net, srlora())
    adaptation.start()
    adaptation.plan(steps)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    moved = []
    for step, batch in enumerate(toy_batches(steps)):
        before = {name: layer.weight.clone() for name, layer in adaptation.layers.items()}
        train(net, adaptation, optimizer, [batch], first_step=step)
        changed = [name for name, layer in adaptation.layers.items() if not torch.equal(layer.weight, before[name])]
        assert changed in ([], list(adaptation.layers))
        moved += [step + 1] if changed else []
        assert sum(p.numel() for p in net.parameters() if p.requires_grad) == trainable
    assert moved == [10, 20, 30]


def test_directions_never_repeat():
    _, adaptation, _ = trained(srlora())
    for matrix, state in adaptation.states.items():
        fused = torch.nonzero(state.intervals[:, 1] >= 0).flatten().tolist()
        assert sorted(fused + state.directions.tolist()) == list(range(10)), matrix.name
        assert state.next_direction == 10


@pytest.mark.parametrize("method", [PiSSA(rank=4, alpha=8.0), srlora(), LoRA(rank=4, alpha=8.0)])
def test_ledger(method):
    """W_eff - W0 = s * (what training did to every pair that was ever active), the sum kept here in fp64."""
    steps = 40
    net = toy_net(dtype=torch.float64)
    adaptation = Adaptation(net, method)
    W0 = {name: layer.weight.clone() for name, layer in adaptation.layers.items()}
    adaptation.start()
    adaptation.plan(steps)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)
    ledger = {name: torch.zeros_like(w) for name, w in W0.items()}
    for step, batch in enumerate(toy_batches(steps, dtype=torch.float64)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch[0]), batch[1]).backward()
        adaptation.observe()
        before = {name: layer.merged_weight() - layer.weight for name, layer in adaptation.layers.items()}
        optimizer.step()
        for name, layer in adaptation.layers.items():
            ledger[name] += layer.merged_weight() - layer.weight - before[name]
        adaptation.after_optimizer(step + 1, optimizer)
    for name, layer in adaptation.layers.items():
        assert ledger[name].abs().max() > 1e-2
        torch.testing.assert_close(layer.merged_weight() - W0[name], ledger[name], rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", [PiSSA(rank=4, alpha=8.0), srlora(), LoRA(rank=4, alpha=8.0)])
def test_disabled_computes_as_the_pretrained_network(method):
    net, adaptation, _ = trained(method)
    pristine, x = toy_net(), toy_batches(1)[0][0]
    after = net(x)
    assert (after - pristine(x)).abs().max() > 1e-2
    with adaptation.disabled():
        torch.testing.assert_close(net(x), pristine(x), rtol=0, atol=1e-5)
    assert torch.equal(net(x), after)


@pytest.mark.parametrize("method", [LoRA(rank=3), srlora()], ids=["lora", "srlora"])
def test_merged_pairs_hide_nothing(method):
    net, adaptation, _ = trained(method)
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
    net, adaptation, _ = trained(srlora())
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


def test_pairs_train_only_while_they_are_not_merged():
    _, adaptation, optimizer = trained(srlora(), steps=5)
    adaptation.merge()
    for step in (adaptation.observe, lambda: adaptation._switch(adaptation.matrices, 6, optimizer)):
        with pytest.raises(UserError, match=r"merged into the weights, call unmerge\(\) before training"):
            step()


def test_disabled_pairs_are_neither_merged_nor_unmerged_and_stay_so_outside_an_inner_block():
    net, adaptation, _ = trained(srlora())
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
            with pytest.raises(UserError, match=r"merge\(\) has no meaning while the pairs are disabled\(\)"):
                change()
    assert torch.equal(net(x), after)


def _precision():
    return torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")


def test_merge_is_exact_idempotent_and_undone_to_the_bit(monkeypatch):
    net, adaptation, _ = trained(srlora())
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


# --- optimizer state -------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "adam-amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {}),
    "adagrad": (torch.optim.Adagrad, {}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
}
SECOND = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}


@pytest.mark.parametrize("how", ["warm", "zero", "keep"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_of_recycled_pairs(name, how):
    optimizer, options = OPTIMIZERS[name]
    _, adaptation, optimizer = trained(srlora(optimizer_state=how), steps=5, optimizer=optimizer, **options)
    matrices = adaptation.matrices
    assert any("[k]" in m.name for m in matrices)

    def states(m):
        out = {}
        for side, parameter, view in (("A", m.layer.lora_A, m.of_A), ("B", m.layer.lora_B, lambda t, m=m: m.of_B(t).T)):
            for key, value in optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    out[side, key] = view(value).clone()
        return out

    before, pairs = [states(m) for m in matrices], [(m.B.clone(), m.A.clone()) for m in matrices]
    held = [adaptation.states[m].directions.clone() for m in matrices]
    adaptation._switch(matrices, 1, optimizer)
    for m, old, (B, A), directions in zip(matrices, before, pairs, held, strict=True):
        recycled = adaptation.states[m].directions != directions
        assert recycled.sum() == 2
        growth = {
            "B": m.A.square().sum(1) / A.square().sum(1),
            "A": m.B.square().sum(0) / B.square().sum(0),
        }
        assert old
        for (side, key), value in states(m).items():
            assert torch.equal(value[~recycled], old[side, key][~recycled])
            expected = old[side, key][recycled]
            if how == "zero" or (how == "warm" and key not in SECOND):
                expected = torch.zeros_like(expected)
            elif how == "warm":
                expected = expected * growth[side][recycled, None]
            torch.testing.assert_close(value[recycled], expected)


def test_a_state_of_unknown_meaning_is_zeroed_and_said():
    _, adaptation, optimizer = trained(srlora(), steps=5, optimizer=torch.optim.Adamax)
    with pytest.warns(UserWarning, match="Adamax keeps exp_inf"):
        adaptation._switch(adaptation.matrices, 1, optimizer)


def test_factored_states_are_refused_at_the_first_step():
    with pytest.raises(UserError, match=r"Adafactor keeps '(row|col)_var'.*optimizer_state"):
        trained(srlora(), optimizer=torch.optim.Adafactor)
    trained(srlora(optimizer_state="keep"), optimizer=torch.optim.Adafactor)


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["a pair", "a pair of weight 0", "the head"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_with_a_non_finite_gradient_leaves_no_trace_in_the_averages(poison, where):
    net, adaptation, optimizer = trained(srlora(), steps=5)
    net.head.requires_grad_(True)
    before = adaptation.importance.smoothed.clone(), adaptation.importance.uncertainty.clone()
    x, y = toy_batches(1)[0]
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    lora_A = adaptation.layers["blocks.1.fc2"].lora_A
    if where == "a pair of weight 0":
        lora_A.data[1, 3] = 0
    (net.head.weight if where == "the head" else lora_A).grad[1, 3] = poison
    adaptation.observe()
    assert torch.equal(adaptation.importance.smoothed, before[0])
    assert torch.equal(adaptation.importance.uncertainty, before[1])
    (net.head.weight if where == "the head" else lora_A).grad[1, 3] = 0
    adaptation.observe()
    assert not torch.equal(adaptation.importance.smoothed, before[0])


def step_of(net, adaptation):
    nn.functional.cross_entropy(net(toy_batches(1)[0][0]), toy_batches(1)[0][1]).backward()
    adaptation.observe()
    net.zero_grad()


def test_adapted_layers_that_never_get_a_gradient_are_named():
    net = toy_net()
    adaptation = Adaptation(net, srlora())
    adaptation.start()
    net.blocks[1].forward = lambda x: x
    for _ in range(19):
        step_of(net, adaptation)
    with pytest.raises(UserError, match=r"no gradient has reached blocks\.1\.qkv, .* and 1 more in 20 steps"):
        step_of(net, adaptation)


def test_a_layer_may_be_left_out_of_some_steps():
    net = toy_net()
    adaptation = Adaptation(net, srlora())
    adaptation.start()
    forward, net.blocks[1].forward = net.blocks[1].forward, lambda x: x
    for _ in range(15):
        step_of(net, adaptation)
    net.blocks[1].forward = forward
    for _ in range(10):
        step_of(net, adaptation)
    adaptation.require_gradients()


def test_a_layer_without_a_gradient_scores_as_with_a_gradient_of_0():
    _, adaptation, _ = trained(srlora(), steps=5)
    state, layer = adaptation.state_dict(), adaptation.layers["blocks.0.fc1"]
    averages = []
    for nothing in (None, torch.zeros_like(layer.lora_B)):
        adaptation.importance.smoothed.copy_(state["smoothed"])
        layer.lora_B.grad = nothing
        adaptation.observe()
        averages.append(adaptation.importance.smoothed.clone())
    assert torch.equal(*averages)
    assert not torch.equal(averages[0], state["smoothed"])


def test_a_step_that_was_left_out_leaves_no_trace():
    _, adaptation, _ = trained(srlora(), steps=5)
    before = adaptation.importance.smoothed.clone(), adaptation.importance.uncertainty.clone()
    adaptation.net.zero_grad()
    adaptation.observe()
    assert torch.equal(adaptation.importance.smoothed, before[0])
    assert torch.equal(adaptation.importance.uncertainty, before[1])


# --- several ranks, several runs -------------------------------------------------------------------------------------


def test_each_rank_scores_until_its_own_switch():
    """Rank 4 switches after steps 10 and 20, rank 2 after every fifth; a switch of the one is none of the other."""
    method = srlora(rank_pattern={"fc1": 2})
    net, adaptation, optimizer = begun(method, 40)
    assert {rank: schedule.step_of(1) for rank, schedule in adaptation.schedules.items()} == {2: 4, 4: 10}
    scores = {rank: [] for rank in (2, 4)}
    for step in range(1, 10):
        train(net, adaptation, optimizer, toy_batches(1, seed=step), first_step=step - 1)
        for rank in scores:
            matrices = [matrix for matrix in adaptation.matrices if matrix.rank == rank]
            scores[rank].append(sum(each.sum() for each in adaptation.importance.pair_scores(matrices)).item())
    assert [step for step, score in enumerate(scores[2], start=1) if score == 0] == [4, 8]
    assert 0 not in scores[4]


def test_switches_are_counted_by_the_rank_that_does_most():
    net, adaptation, optimizer = begun(srlora(rank_pattern={"fc1": 2}), 60)
    for step in range(60):
        expected = adaptation.switches_after(step + 1)
        assert adaptation.switches_done + adaptation.switches_missed == adaptation.switches_to_do == 9
        train(net, adaptation, optimizer, toy_batches(1), first_step=step)
        assert adaptation.switches_done == expected
    assert adaptation.switches_done == 9


def test_a_history_goes_on_over_runs_that_count_from_0():
    """Eight steps of twenty, with a switch after the fifth; then a run of its own, with switches after 4 and 8."""
    net, adaptation, optimizer = begun(srlora(), 20)
    train(net, adaptation, optimizer, toy_batches(8))
    adaptation.plan(12)
    assert adaptation.steps_before == 8
    train(net, adaptation, optimizer, toy_batches(12))
    for state in adaptation.states.values():
        assert state.intervals[:, 0].unique().tolist() == [0, 5, 12, 16]
        drawn, fused = state.intervals.unbind(1)
        assert ((fused < 0) | (fused > drawn)).all()
    again = Adaptation(toy_net(), srlora())
    again.load_state_dict(adaptation.state_dict())
    again.plan(24, first_step=0)
    assert again.steps_before == 20


# --- calls that a plain loop may forget ------------------------------------------------------------------------------


def test_training_without_a_start_is_refused():
    net = toy_net()
    with pytest.raises(UserError, match=r"call start\(\) before the first step"):
        step_of(net, Adaptation(net, PiSSA(rank=2)))
    net = toy_net()
    step_of(net, Adaptation(net, LoRA(rank=2)))  # needs none


@pytest.mark.parametrize(
    ("forgotten", "says"),
    [
        ("plan", r"no switch is planned, call plan\(\)"),
        ("observe", r"nothing has scored the pairs, call observe\(\)"),
        ("optimizer", r"the optimizer does not train the pairs of blocks\.0\.qkv: make it after the adaptation"),
    ],
)
def test_a_switch_without_what_it_needs_is_refused(forgotten, says):
    net = toy_net()
    adaptation = Adaptation(net, srlora(), trainable="head")
    trains = net.head.parameters() if forgotten == "optimizer" else net.parameters()
    optimizer = torch.optim.SGD([p for p in trains if p.requires_grad], lr=0.01)
    adaptation.start()
    if forgotten != "plan":
        adaptation.plan(4)
    if forgotten != "observe":
        step_of(net, adaptation)
    with pytest.raises(UserError, match=says):
        adaptation.after_optimizer(1, optimizer)


def test_trained_pairs_without_their_history_are_not_started_over():
    net, adaptation, _ = trained(srlora())
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
    with pytest.raises(UserError, match=r"the weights are torch\.bfloat16"):
        adaptation.start()
    adaptation = Adaptation(toy_net(), LoRA(rank=2))
    adaptation.net.bfloat16()
    adaptation.start()


def test_one_side_of_the_pairs_may_be_frozen():
    """As LoRA-FA does (Zhang et al. 2023, arXiv 2308.03303)."""
    net = toy_net()
    adaptation = Adaptation(net, srlora())
    for layer in adaptation.layers.values():
        layer.lora_A.requires_grad_(False)
    adaptation.start()
    adaptation.plan(20)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01)
    train(net, adaptation, optimizer, toy_batches(20))
    assert adaptation.switches_done == 3


def test_lbfgs_is_refused_at_the_first_step():
    net = toy_net()
    adaptation = Adaptation(net, srlora(), trainable=["head"])
    adaptation.start()
    adaptation.plan(8)
    step_of(net, adaptation)
    with pytest.raises(UserError, match=r"LBFGS keeps one history of all parameters"):
        adaptation.after_optimizer(1, torch.optim.LBFGS([*net.head.parameters()]))


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
    done = adaptation.switches_done
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)
    train(net, adaptation, optimizer, toy_batches(28), first_step=12)
    assert adaptation.switches_done > done
    flat, expected = (tree_flatten(each)[0] for each in (state, copy))
    assert len(flat) == len(expected)
    for a, b in zip(flat, expected, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_state_of_other_layers_is_refused():
    _, adaptation, _ = trained(srlora(), steps=5)
    with pytest.raises(UserError, match="the checkpoint adapts other layers than this model has"):
        Adaptation(toy_net(depth=3), srlora()).load_state_dict(adaptation.state_dict())


def test_parameters_may_be_replaced_as_a_whole():
    net = toy_net()
    adaptation = Adaptation(net, srlora())
    adaptation.start()
    net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)
    adaptation.plan(40)
    train(net, adaptation, optimizer, toy_batches(40))
    expected, reference, _ = trained(srlora())
    assert reference.switches_done == adaptation.switches_done > 0
    x = toy_batches(1)[0][0]
    assert torch.equal(net(x), expected(x))


# --- limits of the plan ----------------------------------------------------------------------------------------------


def plan(method, steps, **net):
    adaptation = Adaptation(toy_net(**net), method)
    adaptation.start()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adaptation.plan(steps)
    return adaptation, [str(w.message) for w in caught]


def test_a_switch_after_every_step_is_allowed():
    adaptation, _ = plan(srlora(), 4)
    assert [adaptation.schedules[4].step_of(i) for i in (1, 2, 3)] == [1, 2, 3]


def test_the_largest_spectrum_and_the_furthest_matrix_decide_how_many_switches_there_are():
    """min(out, in) is 5 for embed and 12 for fc1; at rank 2 a switch takes one direction more."""
    net = toy_net()
    adaptation = Adaptation(net, SRLoRA(rank=2, alpha=4.0, target_rank=12, target_modules=["embed", "fc1"]))
    adaptation.start()
    with pytest.warns(UserWarning, match=r"fewer than 12 .*: embed \(5\)"):
        adaptation.plan(20)
    assert adaptation.switches_planned == 10
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01)
    train(net, adaptation, optimizer, toy_batches(12))
    assert {state.next_direction for state in adaptation.states.values()} == {5, 8}
    with pytest.warns(UserWarning, match=r"fewer than 12"):
        adaptation.plan(40, 12)
    assert adaptation.switches_planned == 12 - 8


def test_more_switches_than_steps_is_an_error():
    with pytest.raises(UserError, match=r"4 switches .*target_rank 12, rank 4.* 3 optimizer steps.*max_steps by 1"):
        plan(srlora(), 3)


@pytest.mark.filterwarnings("ignore:.*no whole number of switches", "ignore:.*have fewer than")
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7])
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 2, "target_rank": 24},
        {"rank": 4, "target_rank": 20, "fusion_ratio": 0.25},
        {"rank": 6, "target_rank": 20, "fusion_ratio": 1.0},
        {"rank": 10, "target_rank": 12, "fusion_ratio": 0.1},
        {"rank": 2, "target_rank": 24, "rank_pattern": {"fc1": 4}},
        {"rank": 2, "target_rank": 24, "rank_pattern": {"fc1": 12}},
        {"rank": 4, "target_rank": 100, "target_modules": ["embed", "fc1"]},
    ],
)
def test_the_target_that_is_named_fits_and_no_larger_one_does(options, steps):
    """min(out, in) is 16 of most matrices and 5 of embed."""

    def refused(**changes):
        try:
            plan(srlora(**{**options, **changes}), steps, dim=16, hidden=20)
        except UserError as error:
            return str(error)
        return None

    said = refused()
    if said is None:
        return
    named = re.search(r"lower method.target_rank to (\d+)", said)
    if named is None:  # the other ranks are too large already
        largest = max(options["rank"], *options.get("rank_pattern", {}).values())
        assert refused(target_rank=largest) is not None
        return
    assert refused(target_rank=int(named[1])) is None
    assert refused(target_rank=int(named[1]) + 1) is not None


def test_a_target_that_can_no_longer_be_lowered_is_not_named():
    net, adaptation, optimizer = begun(srlora(rank=2), 20)
    train(net, adaptation, optimizer, toy_batches(5))
    with pytest.raises(UserError, match=r"8 switches .* do not fit into 3 .*, raise trainer.max_steps by 5$"):
        adaptation.plan(8, 5)


def test_a_target_above_every_matrix_is_planned_for_the_largest_and_said_once():
    adaptation, said = plan(srlora(target_rank=100), 50)
    # min(out, in) is 12 everywhere
    assert adaptation.switches_planned == 4
    assert len(said) == 1
    assert "100" in said[0]
    assert "12" in said[0]


def test_a_remainder_that_fills_no_switch_is_said():
    adaptation, said = plan(srlora(target_rank=11), 50)
    assert adaptation.switches_planned == 3
    assert said == [said[0]]
    assert "no whole number of switches of 2 for rank 4" in said[0]


def test_a_matrix_whose_spectrum_is_used_up_stops_and_is_named():
    net = toy_net()
    with torch.no_grad():  # rank 7: three pairs' worth beyond r = 4
        u, s, v = torch.linalg.svd(net.blocks[0].proj.weight)
        net.blocks[0].proj.weight.copy_(u[:, :7] * s[:7] @ v[:7])
    adaptation = Adaptation(net, srlora())
    adaptation.start()
    with pytest.warns(UserWarning, match=r"fewer than 12 .*blocks\.0\.proj \(7\)"):
        adaptation.plan(40)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01)
    train(net, adaptation, optimizer, toy_batches(40))
    reached = {m.name: s.next_direction for m, s in adaptation.states.items()}
    assert reached.pop("blocks.0.proj") == 6
    assert set(reached.values()) == {10}


def test_a_rank_beyond_the_spectrum_is_an_error_that_names_the_matrix():
    net = toy_net()
    with torch.no_grad():
        net.blocks[0].proj.weight[:] = torch.outer(torch.arange(1.0, 13), torch.ones(12))
    with pytest.raises(UserError, match=r"rank 4 is above the 1 .*blocks\.0\.proj"):
        Adaptation(net, PiSSA(rank=4)).start()


def test_with_a_rank_pattern_every_rank_walks_to_the_same_target():
    _net, adaptation, _ = trained(srlora(rank_pattern={"fc1": 2}), steps=60)
    assert {name: layer.rank for name, layer in adaptation.layers.items()}["blocks.0.fc1"] == 2
    # r = 4, r' = 2: 4 switches planned, 3 done; r = 2, r' = 1: 10 planned, 9 done
    for matrix, state in adaptation.states.items():
        assert state.next_direction == (11 if "fc1" in matrix.name else 10)


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [7, 20, 21])
def test_a_loop_that_is_stopped_and_resumed_equals_the_uninterrupted_one(stop, tmp_path):
    steps, batches = 40, toy_batches(40)
    whole, expected, _ = trained(srlora(), steps=steps)

    net = toy_net()
    adaptation = Adaptation(net, srlora())
    adaptation.start()
    adaptation.plan(steps)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)
    train(net, adaptation, optimizer, batches[:stop])
    state = {"net": net.state_dict(), "adaptation": adaptation.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "state.pt")

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    net = toy_net()
    adaptation = Adaptation(net, srlora())
    adaptation.start()
    adaptation.load_state_dict(state["adaptation"])
    net.load_state_dict(state["net"])
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)
    optimizer.load_state_dict(state["optimizer"])
    train(net, adaptation, optimizer, batches[stop:], first_step=stop)
    for (name, value), other in zip(whole.state_dict().items(), net.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert torch.equal(adaptation.importance.smoothed, expected.importance.smoothed)
    assert adaptation.switches_done == expected.switches_done == 3


def test_load_then_start_takes_the_spectra_from_the_pretrained_weights():
    net, adaptation, _ = trained(srlora())
    other = toy_net()
    loaded = Adaptation(other, srlora())
    loaded.load_state_dict(adaptation.state_dict())
    other.load_state_dict(net.state_dict())
    assert not any(s.spectrum for s in loaded.states.values())
    with loaded.disabled():
        x = toy_batches(1)[0][0]
        torch.testing.assert_close(other(x), toy_net()(x), rtol=0, atol=1e-6)
    loaded.start()
    for mine, theirs in zip(loaded.states.values(), adaptation.states.values(), strict=True):
        assert torch.equal(mine.spectrum.U, theirs.spectrum.U)
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
    _, adaptation, _ = trained(srlora(), steps=5)
    with pytest.raises(UserError, match=says):
        Adaptation(toy_net(), method).load_state_dict(adaptation.state_dict())


@pytest.mark.parametrize("order", ["start, load", "load, start"])
@pytest.mark.parametrize("method", [srlora(), LoRA(rank=4)])
def test_other_pretrained_weights_are_refused_where_they_matter(method, order):
    _, adaptation, _ = trained(method, steps=5)
    other = Adaptation(toy_net(seed=5), method)
    if order == "start, load":
        other.start()
        with pytest.raises(UserError, match="other pretrained weights"):
            other.load_state_dict(adaptation.state_dict())
    else:
        other.load_state_dict(adaptation.state_dict())  # all values come from the file: enough to test or predict
        if method.needs_spectrum:
            with pytest.raises(UserError, match="other pretrained weights"):
                other.start()


def test_a_second_start_and_plan_go_on_from_where_the_first_ended():
    net, adaptation, _optimizer = trained(srlora(target_rank=12), steps=20)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    adaptation.start()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    adaptation.plan(20)
    # 3 of 4 switches were done, the directions for one are left, and one alone would fall on the last step
    assert (adaptation.switches_planned, adaptation.switches_to_do) == (1, 0)
