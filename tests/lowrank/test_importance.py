import pytest
import torch

from srlora_pl.lowrank.importance import all_finite


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
