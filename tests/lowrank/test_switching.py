"""SRLoRA's switches: what they change and leave, which pairs they take, and after which steps they fall."""

import re
import warnings

import pytest
import torch

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, Spectrum, SRLoRA
from srlora_pl.lowrank.methods.switching import lowest
from tests.helpers.toys import (
    ROUNDING,
    begun,
    finished,
    one_step,
    optimizer_of,
    srlora,
    toy_batches,
    toy_net,
    train,
)


def drawn(adaptation):
    """How many directions each matrix has drawn, by name."""
    return {name: len(intervals) for name, intervals in adaptation.controller.histories().items()}


def most_planned(adaptation):
    """N_switch of the rank that switches most often."""
    return max(pace.schedule.planned for pace in adaptation.controller.paces.values())


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("alpha", [0.5, 40.0])
def test_a_switch_leaves_the_effective_weight_and_moves_everything_else(alpha, dtype):
    net, adaptation, optimizer = finished(srlora(alpha=alpha), steps=5, dtype=dtype)
    x = toy_batches(1, dtype=dtype)[0][0]
    before, output = [layer.merged_weight() for layer in adaptation.layers.values()], net(x)
    weights = [layer.weight.clone() for layer in adaptation.layers.values()]
    adaptation.controller._switch(adaptation.matrices, 1, optimizer)
    for layer, effective, weight in zip(adaptation.layers.values(), before, weights, strict=True):
        torch.testing.assert_close(layer.merged_weight(), effective, rtol=0, atol=ROUNDING[dtype])
        assert (layer.weight - weight).abs().max() > 1e-3
    torch.testing.assert_close(net(x), output, rtol=0, atol=20 * ROUNDING[dtype])


def test_a_reduced_matmul_precision_does_not_reach_a_switch(monkeypatch):
    _, adaptation, optimizer = finished(srlora(), steps=5)
    seen = set()  # not every processor computes differently at a lower setting, so look at the setting itself
    draw = Spectrum.pairs
    monkeypatch.setattr(
        Spectrum, "pairs", lambda *a, **k: seen.add(torch.get_float32_matmul_precision()) or draw(*a, **k)
    )
    before = [layer.merged_weight() for layer in adaptation.layers.values()]
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            adaptation.controller._switch(adaptation.matrices, 1, optimizer)
        assert seen == {"highest"}
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    for layer, effective in zip(adaptation.layers.values(), before, strict=True):
        torch.testing.assert_close(layer.merged_weight(), effective, rtol=0, atol=ROUNDING[torch.float32])


def test_the_weight_moves_only_at_a_switch_and_the_number_of_trainable_parameters_never():
    steps = 40
    net = toy_net()
    adaptation = Adaptation(net, srlora())
    adaptation.start()
    adaptation.plan(steps)
    optimizer = optimizer_of(net)
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
    _, adaptation, _ = finished(srlora())
    for name, intervals in adaptation.controller.histories().items():
        fused = torch.nonzero(intervals[:, 1] >= 0).flatten().tolist()
        assert sorted(fused + adaptation.controller.active[name].tolist()) == list(range(10)), name
        assert len(intervals) == 10


def test_pairs_train_only_while_they_are_not_merged():
    _, adaptation, optimizer = finished(srlora(), steps=5)
    adaptation.merge()
    with pytest.raises(UserError, match=r"merged into the weights, call unmerge\(\) before training"):
        adaptation.before_optimizer(6)
    with pytest.raises(UserError, match=r"merged into the weights, call unmerge\(\) before a change of its weight"):
        adaptation.controller._switch(adaptation.matrices, 6, optimizer)


def test_one_side_of_the_pairs_may_be_frozen():
    """As LoRA-FA does (Zhang et al. 2023, arXiv 2308.03303)."""
    net = toy_net()
    adaptation = Adaptation(net, srlora())
    for layer in adaptation.layers.values():
        layer.lora_A.requires_grad_(False)
    adaptation.start()
    adaptation.plan(20)
    optimizer = optimizer_of(net, torch.optim.SGD)
    train(net, adaptation, optimizer, toy_batches(20))
    assert adaptation.controller.progress().done == 3


@pytest.mark.parametrize(
    ("forgotten", "says"),
    [
        ("plan", r"no switch is planned, call plan\(\)"),
        ("before_optimizer", r"nothing has scored the pairs, call before_optimizer\(\)"),
        ("optimizer", r"the optimizer does not train the adapters of blocks\.0\.qkv: make it after the adaptation"),
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
    if forgotten != "before_optimizer":
        one_step(net, adaptation)
    with pytest.raises(UserError, match=says):
        adaptation.after_optimizer(1, optimizer)


def test_each_rank_scores_until_its_own_switch():
    """Rank 4 switches after steps 10 and 20, rank 2 after every fifth; a switch of the one is none of the other."""
    method = srlora(rank_pattern={"fc1": 2})
    net, adaptation, optimizer = begun(method, 40)
    assert {rank: pace.schedule.step_of(1) for rank, pace in adaptation.controller.paces.items()} == {2: 4, 4: 10}
    scores = {rank: [] for rank in (2, 4)}
    for step in range(1, 10):
        train(net, adaptation, optimizer, toy_batches(1, seed=step), first_step=step - 1)
        for rank in scores:
            of_all = adaptation.controller.scores()
            scores[rank].append(sum(of_all[m.name].sum().item() for m in adaptation.matrices if m.rank == rank))
    assert [step for step, score in enumerate(scores[2], start=1) if score == 0] == [4, 8]
    assert 0 not in scores[4]


def test_switches_are_counted_by_the_rank_that_does_most():
    net, adaptation, optimizer = begun(srlora(rank_pattern={"fc1": 2}), 60)
    for step in range(60):
        expected = adaptation.controller.metrics(step + 1)["switches"]
        progress = adaptation.controller.progress()
        assert progress.done + progress.missing == progress.planned == 9
        train(net, adaptation, optimizer, toy_batches(1), first_step=step)
        assert adaptation.controller.progress().done == expected
    assert adaptation.controller.progress().done == 9


def test_a_history_goes_on_over_runs_that_count_from_0():
    """Eight steps of twenty, with a switch after the fifth; then a run of its own, with switches after 4 and 8."""
    net, adaptation, optimizer = begun(srlora(), 20)
    train(net, adaptation, optimizer, toy_batches(8))
    adaptation.plan(12)
    assert adaptation.steps_before == 8
    train(net, adaptation, optimizer, toy_batches(12))
    for intervals in adaptation.controller.histories().values():
        assert intervals[:, 0].unique().tolist() == [0, 5, 12, 16]
        drawn, fused = intervals.unbind(1)
        assert ((fused < 0) | (fused > drawn)).all()
    again = Adaptation(toy_net(), srlora())
    again.load_state_dict(adaptation.state_dict())
    again.plan(24, first_step=0)
    assert again.steps_before == 20


def plan(method, steps, **net):
    adaptation = Adaptation(toy_net(**net), method)
    adaptation.start()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adaptation.plan(steps)
    return adaptation, [str(w.message) for w in caught]


def test_a_switch_after_every_step_is_allowed():
    adaptation, _ = plan(srlora(), 4)
    assert [adaptation.controller.paces[4].schedule.step_of(i) for i in (1, 2, 3)] == [1, 2, 3]


def test_the_largest_spectrum_and_the_furthest_matrix_decide_how_many_switches_there_are():
    """min(out, in) is 5 for embed and 12 for fc1; at rank 2 a switch takes one direction more."""
    net = toy_net()
    adaptation = Adaptation(net, SRLoRA(rank=2, alpha=4.0, target_rank=12, target_modules=["embed", "fc1"]))
    adaptation.start()
    with pytest.warns(UserWarning, match=r"fewer than 12 .*: embed \(5\)"):
        adaptation.plan(20)
    assert most_planned(adaptation) == 10
    optimizer = optimizer_of(net, torch.optim.SGD)
    train(net, adaptation, optimizer, toy_batches(12))
    assert set(drawn(adaptation).values()) == {5, 8}
    with pytest.warns(UserWarning, match=r"fewer than 12"), pytest.warns(UserWarning, match="now ends at step 40"):
        adaptation.plan(40, 12)
    assert most_planned(adaptation) == 12 - 8


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
    assert most_planned(adaptation) == 4
    assert len(said) == 1
    assert "100" in said[0]
    assert "12" in said[0]


def test_a_remainder_that_fills_no_switch_is_said():
    adaptation, said = plan(srlora(target_rank=11), 50)
    assert most_planned(adaptation) == 3
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
    optimizer = optimizer_of(net, torch.optim.SGD)
    train(net, adaptation, optimizer, toy_batches(40))
    reached = drawn(adaptation)
    assert reached.pop("blocks.0.proj") == 6
    assert set(reached.values()) == {10}


def test_with_a_rank_pattern_every_rank_walks_to_the_same_target():
    _net, adaptation, _ = finished(srlora(rank_pattern={"fc1": 2}), steps=60)
    assert {name: layer.rank for name, layer in adaptation.layers.items()}["blocks.0.fc1"] == 2
    # r = 4, r' = 2: 4 switches planned, 3 done; r = 2, r' = 1: 10 planned, 9 done
    for name, count in drawn(adaptation).items():
        assert count == (11 if "fc1" in name else 10)


def test_a_second_start_and_plan_go_on_from_where_the_first_ended():
    net, adaptation, _optimizer = finished(srlora(target_rank=12), steps=20)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    adaptation.start()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    adaptation.plan(20)
    # 3 of 4 switches were done, the directions for one are left, and one alone would fall on the last step
    assert (most_planned(adaptation), adaptation.controller.progress().missing) == (1, 0)


@pytest.mark.parametrize("size", [8, 300])
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_of_equal_scores_the_lower_indices_are_the_lowest(size, share):
    generator = torch.Generator().manual_seed(0)
    count = int(share * size)
    for levels in (1, 2, 5):
        scores = torch.randint(levels, (size,), generator=generator).float()
        expected = sorted(sorted(range(size), key=lambda k, scores=scores: (scores[k], k))[:count])
        assert lowest(scores, count).tolist() == expected


def test_intervals_tell_when_each_direction_was_active():
    _, adaptation, _ = finished(srlora())
    # 4 switches planned, 3 done, of 2 pairs each, after steps 10, 20 and 30
    for name, intervals in adaptation.controller.histories().items():
        assert intervals[:, 0].tolist() == [0] * 4 + [10] * 2 + [20] * 2 + [30] * 2
        ends = intervals[:, 1]
        assert sorted(ends.tolist()) == [-1] * 4 + [10] * 2 + [20] * 2 + [30] * 2
        assert sorted(adaptation.controller.active[name].tolist()) == torch.nonzero(ends == -1).flatten().tolist()
        assert (ends[ends > 0] > intervals[ends > 0, 0]).all()


def test_a_choice_by_age_keeps_no_scores():
    _, adaptation, _ = finished(srlora(select="age"))
    assert not adaptation.controller.scores()
    assert not adaptation.controller.importance.smoothed.any()
    _, scored, _ = finished(srlora())
    assert scored.controller.scores()
