"""AdaLoRA beyond the contract: its budget, its penalty, and PEFT's own trajectory."""

import copy

import pytest
import torch
from torch import nn

from srlora_pl import UserError
from srlora_pl.lowrank import AdaLoRA, Adaptation
from srlora_pl.lowrank.delta import change
from srlora_pl.models import peft_folder
from tests.helpers.errors import mentions
from tests.helpers.toys import begun, one_step, optimizer_of, toy_batches, toy_net, train

DOUBLE = {"dtype": torch.float64}
PLAIN = ["proj", "fc1", "fc2"]
STEPS = 40


def adalora(**settings) -> AdaLoRA:
    return AdaLoRA(**{"rank": 2, "init_rank": 3, "alpha": 5.0, "interval_share": 0.05, **settings})


def penalty(pairs, weight: float) -> torch.Tensor:
    """weight / 2M times the sum of ||A A^T - I|| + ||B^T B - I||, the term that the paper adds to the loss."""
    norms = [
        torch.linalg.matrix_norm(each - torch.eye(len(each)).to(each)) for B, A in pairs for each in (A @ A.T, B.T @ B)
    ]
    return weight * sum(norms) / len(norms)


def test_the_whole_trajectory_is_that_of_peft() -> None:
    peft = pytest.importorskip("peft")
    ours, adaptation, optimizer = begun(adalora(target_modules=PLAIN, orthogonality=0.3), STEPS, torch.float64)
    config = peft.AdaLoraConfig(
        init_r=3, target_r=2, tinit=4, tfinal=12, deltaT=2, total_step=STEPS, lora_alpha=5, target_modules=PLAIN,
        orth_reg_weight=0.0,
    )  # fmt: skip
    theirs = peft.get_peft_model(toy_net(**DOUBLE), config).double()
    layers = {m: theirs.base_model.model.get_submodule(m.layer_name) for m in adaptation.matrices}
    for matrix, layer in layers.items():
        layer.lora_A.default.data = matrix.A.clone()
        layer.lora_B.default.data = matrix.B.clone()
        layer.lora_E.default.data.zero_()
        layer.ranknum.default.requires_grad_(False)
        assert float(layer.scaling["default"] / (layer.ranknum.default + 1e-5)) == pytest.approx(matrix.scaling)
    reference = optimizer_of(theirs)
    pairs = [(layer.lora_B.default, layer.lora_A.default) for layer in layers.values()]
    for step, (x, y) in enumerate(toy_batches(STEPS, **DOUBLE), start=1):
        train(ours, adaptation, optimizer, [(x, y)], step - 1)
        reference.zero_grad()
        (nn.functional.cross_entropy(theirs(x), y) + penalty(pairs, 0.3)).backward()
        reference.step()
        theirs.base_model.update_and_allocate(step)
        for matrix, layer in layers.items():
            expected = layer.lora_A.default, layer.lora_B.default, layer.lora_E.default[:, 0]
            for own, value in zip(matrix.layer.adapter_parameters(), expected, strict=True):
                torch.testing.assert_close(own, value, rtol=0, atol=1e-12)
    assert sum(int(matrix.layer.acting().sum()) for matrix in layers) == 2 * len(layers)


def test_the_budget_falls_and_is_kept_at_every_step() -> None:
    net, adaptation, optimizer = begun(adalora(), STEPS)
    controller, matrices = adaptation.controller, adaptation.matrices
    first, final = 3 * len(matrices), 2 * len(matrices)
    for step, batch in enumerate(toy_batches(STEPS), start=1):
        expected = final
        if step < 28:
            expected = first if step <= 4 else int((first - final) * (1 - (step - 4) / 24) ** 3 + final)
        assert controller.budget(step) == controller.metrics(step)["budget"] == expected
        train(net, adaptation, optimizer, [batch], step - 1)
        acting = sum(int(matrix.layer.acting().sum()) for matrix in {m.layer: m for m in matrices}.values())
        if step >= 28 or (step > 4 and step % 2 == 0):
            assert acting == expected
    ranks = {len(matrix.factors()[1]) for matrix in matrices}
    assert len(ranks) > 1


def test_the_E_of_a_fused_linear_is_a_vector_like_any_other() -> None:
    """So that weight decay leaves it alone."""
    adaptation = Adaptation(toy_net(), adalora(target_modules=["qkv", "fc1"]))
    decays = {id(p): group["weight_decay"] for group in adaptation.param_groups(0.01, 0.1) for p in group["params"]}
    assert {decays[id(layer.lora_E)] for layer in adaptation.layers.values()} == {0.0}
    assert {decays[id(layer.lora_A)] for layer in adaptation.layers.values()} == {0.1}


@pytest.mark.parametrize("inverse_scale", [None, 1 / 64])
def test_the_penalty_is_a_gradient(inverse_scale) -> None:
    """That of autograd, in gradients that may be scaled."""
    net, adaptation, _ = begun(adalora(orthogonality=0.7), STEPS, torch.float64)
    parameters = [p for layer in adaptation.layers.values() for p in layer.adapter_parameters()]
    pairs = [(matrix.of(matrix.layer.lora_B), matrix.of(matrix.layer.lora_A)) for matrix in adaptation.matrices]
    penalty(pairs, 0.7).backward()
    expected = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    net.zero_grad()
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    adaptation.before_optimizer(1, inverse_scale=inverse_scale and torch.tensor(inverse_scale, **DOUBLE))
    for parameter, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad * (inverse_scale or 1), wanted, rtol=0, atol=1e-14)


def test_scaled_gradients_give_the_same_scores() -> None:
    runs = [begun(adalora(), STEPS, torch.float64) for _ in range(2)]
    for (net, adaptation, optimizer), scale in zip(runs, (1, 64), strict=True):
        x, y = toy_batches(1, **DOUBLE)[0]
        (scale * nn.functional.cross_entropy(net(x), y)).backward()
        inverse = None if scale == 1 else torch.tensor(1 / scale, **DOUBLE)
        adaptation.before_optimizer(1, inverse_scale=inverse)
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter.grad /= scale
        optimizer.step()
        adaptation.after_optimizer(1, optimizer)
    one, other = (adaptation.controller.scores() for _, adaptation, _ in runs)
    for name, scores in one.items():
        assert scores.any()
        torch.testing.assert_close(other[name], scores, rtol=1e-12, atol=0)


def test_a_step_with_an_overflow_leaves_scores_and_triplets_alone() -> None:
    net, adaptation, optimizer = begun(adalora(), STEPS, torch.float64)
    batches = toy_batches(STEPS, **DOUBLE)
    train(net, adaptation, optimizer, batches[:9])
    before = copy.deepcopy((net.state_dict(), adaptation.controller.importance.state_dict()))
    x, y = batches[9]
    optimizer.zero_grad()
    (float("inf") * nn.functional.cross_entropy(net(x), y)).backward()
    adaptation.before_optimizer(10)  # and the optimizer does nothing
    assert adaptation.after_optimizer(10, optimizer)
    after = net.state_dict(), adaptation.controller.importance.state_dict()
    for ours, theirs in zip(after, before, strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_file_from_before_the_end_of_a_step_is_made_up_for() -> None:
    """It holds the step's gradients, which no other step has."""
    net, adaptation, optimizer = begun(adalora(), STEPS)
    batches = toy_batches(STEPS)
    train(net, adaptation, optimizer, batches[:9])
    x, y = batches[9]
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    adaptation.before_optimizer(10)
    optimizer.step()
    resumed = begun(adalora(), STEPS)
    resumed[1].load_state_dict(copy.deepcopy(adaptation.state_dict()))
    resumed[0].load_state_dict(net.state_dict())
    resumed[2].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for run in ((net, adaptation, optimizer), resumed):
        assert run[1].after_optimizer(10, run[2])
        train(*run, batches[10:], 10)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in resumed[0].state_dict().items())


def test_a_step_is_scored_also_where_the_run_goes_on_with_another_length() -> None:
    """Its file is from before the end of the step."""
    net, adaptation, optimizer = begun(adalora(), STEPS)
    train(net, adaptation, optimizer, toy_batches(9))
    before = adaptation.controller.importance.smoothed.clone()
    one_step(net, adaptation)
    adaptation.plan(2 * STEPS, first_step=10)
    adaptation.after_optimizer(10, optimizer)
    assert not torch.equal(adaptation.controller.importance.smoothed, before)


def test_a_matrix_may_end_without_a_triplet_and_still_be_exported(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    net, adaptation, optimizer = begun(adalora(target_modules=PLAIN), STEPS)
    train(net, adaptation, optimizer, toy_batches(STEPS))
    net.blocks[0].fc1.lora_E.data.zero_()
    net.blocks[1].fc2.lora_E.data.copy_(torch.tensor([0.0, 0.3, 0.0]))
    factors = change(adaptation)
    assert "blocks.0.fc1" not in factors
    assert factors["blocks.1.fc2"].rank == 1
    assert len({each.rank for each in factors.values()}) > 1
    peft_folder.write(tmp_path, factors, {}, ("base", None), None)
    loaded = peft.PeftModel.from_pretrained(toy_net(), str(tmp_path))
    x = toy_batches(1)[0][0]
    torch.testing.assert_close(loaded(x), net(x), rtol=0, atol=1e-5)


def test_an_equal_first_and_last_budget_takes_no_triplet() -> None:
    net, adaptation, optimizer = begun(adalora(init_rank=2), STEPS)
    train(net, adaptation, optimizer, toy_batches(STEPS))
    assert all(len(matrix.factors()[1]) == 2 for matrix in adaptation.matrices)


def test_a_rank_pattern_shares_out_the_budget() -> None:
    adaptation = Adaptation(toy_net(), adalora(rank_pattern={"fc1": 4}))
    assert {m.rank for m in adaptation.matrices if "fc1" in m.name} == {6}
    assert {m.rank for m in adaptation.matrices if "fc1" not in m.name} == {3}
    assert adaptation.controller.final == 2 * (4 + 5 * 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_rank": 1}, ["method.init_rank", "1", "rank 2"]),
        ({"beta1": 0.0}, ["method.beta1", "0.0"]),
        ({"initial_share": 1.0}, ["method.initial_share", "1.0"]),
        ({"initial_share": 0.5, "final_share": 0.5}, ["initial_share", "final_share", "below 1"]),
        ({"interval_share": -0.1}, ["method.interval_share", "-0.1"]),
        ({"orthogonality": -1.0}, ["method.orthogonality", "-1.0"]),
    ],
)
def test_values_out_of_range_are_refused(settings, words) -> None:
    with pytest.raises(UserError, match=mentions(*words)):
        adalora(**settings)
