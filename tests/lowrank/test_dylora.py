"""DyLoRA beyond the contract: the ranks it draws, and the models it holds, one for each rank."""

from collections import Counter
from itertools import pairwise

import pytest
import torch

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, DyLoRA, LoRA
from srlora_pl.lowrank.delta import change
from tests.helpers.toys import assert_same_state, optimizer_of, toy_batches, toy_net, train, trained


def begun(seed: int = 0, **settings) -> Adaptation:
    net = toy_net(dtype=torch.float64)
    torch.manual_seed(seed)
    return Adaptation(net, DyLoRA(**{"rank": 4, "alpha": 8.0, **settings}), ["head"])


def pairs_of_next_step(adaptation: Adaptation) -> int:
    (pairs,) = {int((matrix.layer.gate > 0).sum()) for matrix in adaptation.matrices}
    return pairs


@pytest.mark.parametrize("rslora", [False, True])
def test_with_all_pairs_in_every_step_it_is_lora_to_the_bit(rslora: bool) -> None:
    dynamic, lora = begun(min_rank=4, use_rslora=rslora), toy_net(dtype=torch.float64)
    ours = Adaptation(lora, LoRA(rank=4, alpha=8.0, use_rslora=rslora), ["head"])
    for one, other in zip(ours.matrices, dynamic.matrices, strict=True):
        one.A.copy_(other.A)
    for adaptation in (dynamic, ours):
        train(adaptation.net, adaptation, optimizer_of(adaptation.net), toy_batches(8, dtype=torch.float64))
    assert_same_state(dynamic.net, ours.net)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("pairs", [1, 2, 4])
def test_a_step_trains_the_first_pairs_as_a_lora_of_that_rank(pairs: int, rslora: bool) -> None:
    """With its own scaling, and no gradient for the other pairs."""
    dynamic, lora = begun(use_rslora=rslora), toy_net(dtype=torch.float64)
    ours = Adaptation(lora, LoRA(rank=pairs, alpha=8.0, use_rslora=rslora), ["head"])
    for one, other in zip(ours.matrices, dynamic.matrices, strict=True):
        other.B.normal_()
        other.layer.open_gate(pairs)
        one.A.copy_(other.A[:pairs])
        one.B.copy_(other.B[:, :pairs])
    x = toy_batches(1, dtype=torch.float64)[0][0]
    outputs = [adaptation.net.train()(x) for adaptation in (dynamic, ours)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    for output in outputs:
        output.square().sum().backward()
    for one, other in zip(ours.matrices, dynamic.matrices, strict=True):
        A, B = (other.of(parameter.grad) for parameter in (other.layer.lora_A, other.layer.lora_B))
        torch.testing.assert_close(A[:pairs], one.of(one.layer.lora_A.grad), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(B[:, :pairs], one.of(one.layer.lora_B.grad), rtol=1e-8, atol=1e-8)
        assert not A[pairs:].any()
        assert not B[:, pairs:].any()


def test_ranks_are_drawn_evenly_and_by_step() -> None:
    controller = begun(rank=8, min_rank=3).controller
    drawn = [controller.rank_of_step(step) for step in range(1, 10_001)]
    counts = Counter(drawn)
    assert set(counts) == {3, 4, 5, 6, 7, 8}
    assert all(abs(count - 10_000 / 6) < 4 * (10_000 / 6) ** 0.5 for count in counts.values())
    follows = Counter(pairwise(drawn))
    assert min(follows.values()) > 200, "a rank does not tell the next one"


def test_all_matrices_have_the_rank_of_the_step_and_resumed_runs_too() -> None:
    adaptation = begun()
    seen = []
    for step in range(1, 13):
        seen.append(pairs_of_next_step(adaptation))
        assert pairs_of_next_step(adaptation) == adaptation.controller.rank_of_step(step)
        batch = toy_batches(1, dtype=torch.float64)
        train(adaptation.net, adaptation, optimizer_of(adaptation.net), batch, first_step=step - 1)
        adaptation.after_optimizer(step)
    assert len(set(seen)) > 2
    resumed = begun(seed=97)
    assert [resumed.controller.rank_of_step(step) for step in range(1, 13)] != seen
    assert pairs_of_next_step(resumed) != pairs_of_next_step(adaptation)
    resumed.load_state_dict(adaptation.state_dict())
    assert pairs_of_next_step(resumed) == pairs_of_next_step(adaptation)
    assert [resumed.controller.rank_of_step(step) for step in range(1, 13)] == seen


def test_all_processes_draw_with_the_seed_of_the_first() -> None:
    """From the first step on: a run starts and plans before it."""
    first, other = begun(seed=1), begun(seed=3)
    assert pairs_of_next_step(other) != pairs_of_next_step(first)
    other.run_on_rank_zero = lambda compute: first.seed
    for adaptation in (first, other):
        adaptation.start()
        adaptation.plan(100)
    assert pairs_of_next_step(other) == pairs_of_next_step(first) == first.controller.rank_of_step(1)
    steps = range(1, 101)
    assert [*map(other.controller.rank_of_step, steps)] == [*map(first.controller.rank_of_step, steps)]
    assert [*map(begun(seed=3).controller.rank_of_step, steps)] != [*map(first.controller.rank_of_step, steps)]


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_at_every_rank_evaluation_merging_and_change_agree(rank: int) -> None:
    """Whatever the last step trained with."""
    adaptation, before = trained(DyLoRA(rank=4, alpha=8.0), dtype=torch.float64)
    x = toy_batches(1, dtype=torch.float64)[0][0]
    adaptation.net.eval()
    full = adaptation.net(x)
    with adaptation.at_rank(rank):
        expected = adaptation.net(x)
        factors = change(adaptation)
        torch.testing.assert_close(adaptation.merged_copy().double()(x), expected, rtol=0, atol=1e-5)
    for matrix in adaptation.matrices:
        update = 8.0 / rank * matrix.B[:, :rank] @ matrix.A[:rank]
        found = matrix.of_weight(factors[matrix.layer_name].B.double() @ factors[matrix.layer_name].A.double())
        torch.testing.assert_close(found, update, rtol=0, atol=1e-7)
    assert torch.equal(expected, full) == (rank == 4)
    assert torch.equal(adaptation.net(x), full), "afterwards it is as before"
    before.head.load_state_dict(adaptation.net.head.state_dict())
    for name, each in factors.items():
        before.get_parameter(f"{name}.weight").data.copy_(
            each.applied_to(before.get_parameter(f"{name}.weight").detach())
        )
    torch.testing.assert_close(before(x), expected, rtol=0, atol=1e-5)


def test_another_evaluation_rank_may_read_a_state() -> None:
    adaptation, _ = trained(DyLoRA(rank=4, alpha=8.0), dtype=torch.float64)
    net = toy_net(dtype=torch.float64)
    small = Adaptation(net, DyLoRA(rank=4, alpha=8.0, evaluation_rank=2), ["head"])
    small.load_state_dict(adaptation.state_dict())
    net.load_state_dict(adaptation.net.state_dict())
    x = toy_batches(1, dtype=torch.float64)[0][0]
    with adaptation.at_rank(2):
        torch.testing.assert_close(net.eval()(x), adaptation.net.eval()(x), rtol=0, atol=0)
    with pytest.raises(UserError, match="min_rank 1 \\(now 2\\)"):
        Adaptation(toy_net(), DyLoRA(rank=4, alpha=8.0, min_rank=2)).load_state_dict(adaptation.state_dict())


def test_ranks_that_are_not_there_are_refused() -> None:
    adaptation = begun()
    with pytest.raises(UserError, match="rank 5 does not lie between 1 and"), adaptation.at_rank(5):
        pass
    lora = Adaptation(toy_net(), LoRA(rank=4))
    with pytest.raises(UserError, match="LoRA"), lora.at_rank(2):
        pass
    adaptation.merge()
    with pytest.raises(UserError, match="unmerge"), adaptation.at_rank(2):
        pass


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"min_rank": 0}, "min_rank is 0"),
        ({"min_rank": 9}, "min_rank is 9"),
        ({"evaluation_rank": 9}, "evaluation_rank is 9"),
        ({"rank_pattern": {"fc1": 2}}, "rank_pattern"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        DyLoRA(**settings)


@pytest.mark.slow
def test_another_rank_compiles_nothing_anew() -> None:
    adaptation = begun()
    graphs = []
    adaptation.net.train().compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    x = toy_batches(1, dtype=torch.float64)[0][0]
    adaptation.net(x)
    count = len(graphs)
    for pairs in (1, 3, 2, 4):
        for matrix in adaptation.matrices:
            matrix.layer.open_gate(pairs)
        adaptation.net(x)
    assert len(graphs) == count > 0
