import pytest
import torch
from torch import nn

from srlora_pl.lowrank.importance import all_finite
from tests.helpers.toys import finished, srlora, toy_batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_as_large_as_their_type_holds_are_finite(dtype):
    """Their squares, or their sum, would not be."""
    largest = torch.finfo(dtype).max
    gradients = [torch.full((3, 4), largest, dtype=dtype), torch.full((5,), -largest, dtype=dtype)]
    assert all_finite(gradients)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(place, poison):
    gradients = [torch.ones(3, 4), torch.ones(5, dtype=torch.bfloat16)]
    assert all_finite(gradients)
    gradients[place].view(-1)[2] = poison
    assert not all_finite(gradients)


def test_no_gradients_hold_nothing_that_is_not_finite():
    assert all_finite([])


@pytest.mark.parametrize("where", ["a pair", "a pair of weight 0", "the head"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_with_a_non_finite_gradient_leaves_no_trace_in_the_averages(poison, where):
    net, adaptation, optimizer = finished(srlora(), steps=5)
    net.head.requires_grad_(True)
    before = adaptation.controller.importance.smoothed.clone(), adaptation.controller.importance.uncertainty.clone()
    x, y = toy_batches(1)[0]
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    lora_A = adaptation.layers["blocks.1.fc2"].lora_A
    if where == "a pair of weight 0":
        lora_A.data[1, 3] = 0
    (net.head.weight if where == "the head" else lora_A).grad[1, 3] = poison
    adaptation.before_optimizer(1)
    assert torch.equal(adaptation.controller.importance.smoothed, before[0])
    assert torch.equal(adaptation.controller.importance.uncertainty, before[1])
    (net.head.weight if where == "the head" else lora_A).grad[1, 3] = 0
    adaptation.before_optimizer(1)
    assert not torch.equal(adaptation.controller.importance.smoothed, before[0])


def test_a_layer_without_a_gradient_scores_as_with_a_gradient_of_0():
    _, adaptation, _ = finished(srlora(), steps=5)
    state, layer = adaptation.state_dict(), adaptation.layers["blocks.0.fc1"]
    averages = []
    for nothing in (None, torch.zeros_like(layer.lora_B)):
        adaptation.controller.importance.smoothed.copy_(state["controller"]["smoothed"])
        layer.lora_B.grad = nothing
        adaptation.before_optimizer(1)
        averages.append(adaptation.controller.importance.smoothed.clone())
    assert torch.equal(*averages)
    assert not torch.equal(averages[0], state["controller"]["smoothed"])


def test_a_step_that_was_left_out_leaves_no_trace():
    _, adaptation, _ = finished(srlora(), steps=5)
    before = adaptation.controller.importance.smoothed.clone(), adaptation.controller.importance.uncertainty.clone()
    adaptation.net.zero_grad()
    adaptation.before_optimizer(1)
    assert torch.equal(adaptation.controller.importance.smoothed, before[0])
    assert torch.equal(adaptation.controller.importance.uncertainty, before[1])
