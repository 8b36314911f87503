"""What is recorded of pairs at switches; the numbers of a whole run are held in `test_trajectory`."""

import pytest
import torch

from srlora_pl.lowrank import Adaptation
from srlora_pl.lowrank.formats import switch_records
from srlora_pl.lowrank.methods.recording import changes
from srlora_pl.lowrank.switch_records import Pairs, SwitchRecord
from tests.helpers.toys import begun, finished, srlora, toy_batches, toy_net, train


def record(step, ranks, ages, recycled):
    """A record of which only some is known."""
    zeros = torch.zeros(len(ages))
    return SwitchRecord(step, ranks, Pairs(zeros, torch.tensor(recycled), torch.tensor(ages), zeros, zeros, zeros))


def test_the_first_chance_is_that_of_the_pairs_that_the_last_switch_drew():
    first = record(10, {"q": 4, "k": 2}, [10] * 6, [1, 1, 0, 0, 1, 0])
    assert first.first_chance is None
    # after step 20, of pairs of 10: two of q, of which one goes, and one of k, which goes
    assert record(20, {"q": 4, "k": 2}, [10, 10, 20, 20, 10, 20], [1, 0, 0, 1, 1, 0]).first_chance == 2 / 3
    # k switches for the first time, so none of its pairs was ever drawn
    assert record(20, {"q": 4, "k": 2}, [10, 10, 20, 20, 20, 20], [1, 0, 0, 1, 1, 1]).first_chance == 1 / 2
    # the last switch of q fell after step 10, that of k after step 15
    assert record(20, {"q": 2, "k": 2}, [10, 20, 5, 10], [0, 1, 1, 0]).first_chance == 1 / 2


def changed(dtype, by):
    """Of the pairs of one matrix after a start and a random change of both factors, relative to their sizes."""
    net = toy_net(dtype=dtype, dim=64, hidden=96)
    adaptation = Adaptation(net, srlora())
    adaptation.start()
    matrix = adaptation.matrices[-1]
    drawn = adaptation.controller.spectra[matrix.name].first(matrix.rank)
    B0, A0 = matrix.B.double().clone(), matrix.A.double().clone()
    generator = torch.Generator().manual_seed(0)
    for factor in (matrix.B, matrix.A):
        factor *= 1 + by * torch.randn(factor.shape, generator=generator, dtype=torch.float64).to(dtype)
    found = changes(matrix, drawn.U, drawn.Vh, drawn.sigma)
    before, after = (torch.einsum("ok,ki->koi", *pair) for pair in ((B0, A0), (matrix.B.double(), matrix.A.double())))
    return found / drawn.sigma, matrix.scaling * (after - before).flatten(1).norm(dim=1) / drawn.sigma


@pytest.mark.parametrize("by", [0, 1e-6, 1e-3, 1.0])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 4e-7), (torch.float64, 1e-14)])
def test_a_change_is_known_to_rounding_however_small(dtype, error, by):
    found, expected = changed(dtype, by)
    assert (expected > by / 2).all() or by == 0
    torch.testing.assert_close(found.double(), expected.double(), rtol=10 * error, atol=error)


def test_sizes_are_kept_by_direction():
    _, adaptation, _ = finished(srlora())
    controller = adaptation.controller
    assert set(controller.recording.sizes) == {matrix.name for matrix in adaptation.matrices}
    for name, sizes in controller.recording.sizes.items():
        assert len(sizes) == len(controller.intervals[name]) == 10
        torch.testing.assert_close(sizes, controller.spectra[name].sigma[:10], rtol=1e-6, atol=0)


def test_each_rank_has_records_of_its_own_switches():
    """Rank 4 switches after steps 10, 20 and 30, and rank 2 nine times, perhaps after the same ones."""
    _, adaptation, _ = finished(srlora(rank_pattern={"fc1": 2}), steps=40)
    records = adaptation.controller.switch_records()
    assert len(records) >= 9
    for each in records:
        drawn = {name: intervals[:, 0] for name, intervals in adaptation.controller.intervals.items()}
        switched = {matrix.name: matrix.rank for matrix in adaptation.matrices if each.step in drawn[matrix.name]}
        assert each.ranks == switched
        assert each.pairs.recycled.sum() == sum(switched.values()) / 2
        assert len(each.pairs.ages) == sum(switched.values())


def test_a_run_of_a_state_without_records_begins_them():
    sgd = {"optimizer": torch.optim.SGD, "lr": 0.1}
    whole, half, resumed = (begun(srlora(), **sgd) for _ in range(3))
    train(*whole, toy_batches(40))
    train(*half, toy_batches(40)[:13])
    state = half[1].state_dict()
    del state["controller"]["recording"]
    assert switch_records(state) == []
    resumed[1].load_state_dict(state)
    resumed[0].load_state_dict(half[0].state_dict())
    train(*resumed, toy_batches(40)[13:], first_step=13)
    _, *expected = whole[1].controller.switch_records()
    found = resumed[1].controller.switch_records()
    assert [each.step for each in found] == [each.step for each in expected] == [20, 30]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.pairs, theirs.pairs, rtol=1e-5, atol=1e-6)
