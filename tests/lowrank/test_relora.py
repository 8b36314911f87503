"""ReLoRA beyond the contract: its restarts, what the optimizer forgets, and the learning rate."""

import copy
import math

import pytest
import torch

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, LoRA, ReLoRA
from tests.helpers.errors import mentions
from tests.helpers.toys import assert_same_state, begun, toy_batches, toy_net, train

DOUBLE = {"dtype": torch.float64}


def relora(**settings) -> ReLoRA:
    return ReLoRA(**{"rank": 2, "alpha": 5.0, "restarts": 3, **settings})


def test_a_restart_leaves_the_output_and_enters_the_pairs_into_the_ledger() -> None:
    net, adaptation, optimizer = begun(relora(), **DOUBLE)
    batches = toy_batches(40, **DOUBLE)
    pairs = {matrix: [] for matrix in adaptation.matrices}
    W0 = adaptation.pretrained_weights()
    for begin in (0, 10, 20):
        train(net, adaptation, optimizer, batches[begin : begin + 9], begin)
        before = copy.deepcopy(net)
        x, y = batches[begin + 9]
        torch.nn.functional.cross_entropy(net(x), y).backward()
        adaptation.before_optimizer(begin + 10)
        optimizer.step()
        output, old = net(x), {matrix: (matrix.B.clone(), matrix.A.clone()) for matrix in pairs}
        assert adaptation.after_optimizer(begin + 10, optimizer)
        torch.testing.assert_close(net(x), output, rtol=0, atol=1e-12)
        for matrix, (B, A) in old.items():
            pairs[matrix].append(matrix.scaling * B @ A)
            assert not matrix.B.any()
            assert not torch.isclose(matrix.A, A).any()
            assert 0 < float(matrix.A.abs().max()) <= matrix.A.shape[1] ** -0.5
        assert not torch.equal(before.blocks[0].fc1.weight, net.blocks[0].fc1.weight)
    for matrix, fused in pairs.items():
        change = matrix.weight - matrix.of_weight(W0[matrix.layer_name])
        torch.testing.assert_close(change, sum(fused), rtol=0, atol=1e-12)
        assert torch.linalg.matrix_rank(change) == 6
    train(net, adaptation, optimizer, batches[30:], 30)
    assert adaptation.controller.progress() == (3, 3, None)


def test_without_restarts_it_is_lora() -> None:
    ours, theirs = (begun(method) for method in (relora(restarts=0), LoRA(rank=2, alpha=5.0)))
    for run in (ours, theirs):
        train(*run, toy_batches(12))
    assert_same_state(ours[0], theirs[0])


@pytest.mark.parametrize(("how", "share"), [("magnitude", 0.75), ("random", 0.75), ("zero", 1.0), ("keep", 0.0)])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop])
def test_the_optimizer_forgets_its_share(how, share, optimizer) -> None:
    net, adaptation, optimizer = begun(relora(optimizer_state=how, pruned=0.75), 8, torch.float64, optimizer)
    batches = toy_batches(8, **DOUBLE)
    train(net, adaptation, optimizer, batches[:1])
    train(net, adaptation, optimizer, batches[1:2], 1)
    for name in ("proj", "fc1"):
        layer = net.blocks[1].get_submodule(name)
        for parameter in layer.adapter_parameters():
            states = {k: v for k, v in optimizer.state[parameter].items() if v.numel() > 1}
            zero = {key: state == 0 for key, state in states.items()}
            first = zero.get("exp_avg", zero.get("square_avg"))
            assert all(torch.equal(each, first) for each in zero.values())
            tolerance = 0.2 if how == "random" else 0.5 / parameter.numel()
            assert float(first.double().mean()) == pytest.approx(share, abs=tolerance)


def test_magnitude_keeps_the_largest_first_moments() -> None:
    net, adaptation, optimizer = begun(relora(pruned=0.9), 8, **DOUBLE)
    train(net, adaptation, optimizer, toy_batches(1, **DOUBLE))
    other = copy.deepcopy((net, adaptation, optimizer))
    layer = net.blocks[0].fc2
    x, y = toy_batches(2, **DOUBLE)[1]
    torch.nn.functional.cross_entropy(net(x), y).backward()
    train(*other, [(x, y)], 1)
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    before = optimizer.state[layer.lora_A]["exp_avg"].abs().flatten()
    after = other[2].state[other[0].blocks[0].fc2.lora_A]["exp_avg"].flatten()
    assert torch.equal(after.nonzero().flatten().sort().values, before.topk(4).indices.sort().values)


def test_a_forgotten_state_makes_the_first_updates_larger_than_the_rate() -> None:
    """(1 - 0.9) g / sqrt(1 - 0.999) g: the reason for the ramp of the learning rate."""
    net, adaptation, optimizer = begun(relora(optimizer_state="zero"), 8, torch.float64, weight_decay=0.0)
    batches = toy_batches(8, **DOUBLE)
    train(net, adaptation, optimizer, batches[:2])
    for state in optimizer.state.values():
        state["step"].fill_(100_000)
    train(net, adaptation, optimizer, batches[2:3], 2)
    moved = torch.cat([matrix.B.abs().flatten() for matrix in adaptation.matrices])
    assert float(moved.median() / 0.01) == pytest.approx(10**0.5, rel=1e-2)


def cosine(step: int) -> float:
    return step / 20 if step < 20 else (1 + math.cos(math.pi * (step - 20) / 380)) / 2


def test_the_rate_rises_anew_after_a_restart() -> None:
    method, K, ramp = relora(restart_warmup=8), 100, 8

    def expected(t: int) -> float:
        if t >= K and t % K < ramp:
            return t % K / ramp * cosine(K * (t // K) + ramp)
        return cosine(t)

    found = [method.rate_factor(t, 4 * K, cosine) for t in range(4 * K)]
    assert found == pytest.approx([expected(t) for t in range(4 * K)], abs=1e-15)
    for t in (100, 200, 300):
        assert found[t - 1] > 0.1
        assert found[t] == 0
        assert found[t + 1] == pytest.approx(cosine(t + 8) / 8)
    # a tenth of an interval at most
    assert [relora().rate_factor(t, 400, cosine) for t in (109, 110)] == pytest.approx([0.9 * cosine(110), cosine(110)])


def test_a_method_without_a_rate_of_its_own_follows_the_loop() -> None:
    assert [LoRA().rate_factor(t, 400, cosine) for t in range(400)] == [cosine(t) for t in range(400)]
    assert [relora().rate_factor(t, 2, cosine) for t in range(2)] == [cosine(0), cosine(1)]


@pytest.mark.parametrize("how", ["magnitude", "random"])
def test_a_file_from_before_a_restart_is_made_up_for(how) -> None:
    """Whatever torch's seed is by then."""
    net, adaptation, optimizer = begun(relora(optimizer_state=how), 8)
    for stop, (x, y) in enumerate(toy_batches(4), start=1):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        adaptation.before_optimizer(stop)
        optimizer.step()
        if stop < 4:
            adaptation.after_optimizer(stop, optimizer)
    resumed = begun(relora(optimizer_state=how), 8)
    resumed[1].load_state_dict(copy.deepcopy(adaptation.state_dict()))
    resumed[0].load_state_dict(net.state_dict())
    resumed[2].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed, run in enumerate(((net, adaptation, optimizer), resumed)):
        torch.manual_seed(seed)
        assert run[1].after_optimizer(4, run[2])
        assert not run[1].after_optimizer(4, run[2])
        train(*run, toy_batches(8)[4:], 4)
    assert_same_state(resumed[0], net)


def test_a_run_of_another_length_spreads_its_restarts_anew() -> None:
    net, adaptation, optimizer = begun(relora(), 40)
    train(net, adaptation, optimizer, toy_batches(12))
    with pytest.warns(UserWarning, match="ends at step 20.*1 are to come"):
        adaptation.plan(20, first_step=12)
    assert not adaptation.after_optimizer(12, optimizer)
    with pytest.warns(UserWarning, match="ends at step 80"):
        adaptation.plan(80, first_step=12)
    assert adaptation.controller.progress() == (1, 4, 20)


def test_a_run_that_is_too_short_is_refused() -> None:
    adaptation = Adaptation(toy_net(), relora())
    adaptation.start()
    with pytest.raises(UserError, match=mentions("method.restarts", 3, "trainer.max_steps")):
        adaptation.plan(3)
    assert "No restart" in adaptation.plan(3, strict=False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"restarts": -1}, ["method.restarts", "-1"]),
        ({"restart_warmup": 1.5}, ["method.restart_warmup", "1.5"]),
        ({"optimizer_state": "warm"}, ["method.optimizer_state", "'warm'", "magnitude"]),
        ({"pruned": 1.0}, ["method.pruned", "1.0"]),
    ],
)
def test_values_out_of_range_are_refused(settings, words) -> None:
    with pytest.raises(UserError, match=mentions(*words)):
        ReLoRA(**settings)
