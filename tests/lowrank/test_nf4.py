"""Frozen weights in four bits: what trains beside them computes as beside their values, and they stay as they are."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from srlora_pl import UserError
from srlora_pl.lowrank.nf4 import NF4
from tests.helpers.errors import mentions

pytest.importorskip("bitsandbytes")
# The quantiles of a normal distribution, see the appendix of arXiv 2305.14314.
LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


@pytest.fixture
def W() -> torch.Tensor:
    return torch.randn(48, 40, generator=torch.Generator().manual_seed(0))


def layer(weight: torch.Tensor) -> nn.Linear:
    torch.manual_seed(1)
    linear = nn.Linear(40, 48)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def same(one: NF4, other: NF4) -> bool:
    return torch.equal(one.packed, other.packed) and torch.equal(one.scales, other.scales)


def test_each_block_takes_the_nearest_of_sixteen_levels(W):
    blocks = W.view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    levels = ((blocks / scales)[..., None] - LEVELS).abs().argmin(-1)
    torch.testing.assert_close(NF4.of(W).values().view(-1, 64), LEVELS[levels] * scales.bfloat16(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("shape", [(7, 9), (3, 40), (1, 1)])
def test_any_size_can_be_quantised(shape):
    W = torch.randn(shape)
    assert NF4.of(W).values().shape == shape
    assert (NF4.of(W).values() - W).abs().max() < 0.2 * W.abs().max()


def test_a_value_takes_little_more_than_half_a_byte():
    quantised = NF4.of(torch.randn(256, 128))
    assert quantised.nbytes == sum(part.nbytes for part in (quantised.packed, quantised.scales))
    assert quantised.nbytes / quantised.numel() == 0.53125


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_was_quantised_is_quantised_to_the_same_bits(W, dtype):
    quantised = NF4.of(W)
    assert same(NF4.of(quantised.values(dtype)), quantised)
    assert torch.equal(quantised.values(dtype), quantised.values().to(dtype))  # rounded once


@pytest.mark.parametrize("autocast", [False, True])
def test_a_linear_layer_computes_with_the_values_and_keeps_four_bits(W, autocast):
    x = torch.randn(2, 5, 40, requires_grad=True)
    kept, outputs = [], []

    def keep(each):
        kept.append(type(each))
        return each

    for weight in (NF4.of(W), NF4.of(W).values()):
        linear = layer(weight)
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda each: (kept.append(type(each)), each)[1], lambda each: each
            ),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            y = linear(x)
        outputs.append((y, *torch.autograd.grad(y.float().sin().sum(), x)))
    assert kept[0] is NF4
    assert all(torch.equal(*both) for both in zip(*outputs, strict=True))


def test_copies_files_and_moves_keep_the_bits(W):
    linear = layer(NF4.of(W))
    file = io.BytesIO()
    torch.save(linear.state_dict(), file)
    file.seek(0)
    loaded = layer(NF4.of(torch.ones_like(W)))
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for each in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear)), copy.deepcopy(linear).double(), loaded):
        assert isinstance(each.weight, nn.Parameter)
        assert not each.weight.requires_grad
        assert each.weight.dtype == each.bias.dtype
        assert same(each.weight, linear.weight)
    assert linear.to("meta").weight.packed.is_meta
    assert file.getbuffer().nbytes < W.nbytes


def test_a_plain_state_is_rounded_to_four_bits(W):
    linear = layer(NF4.of(torch.ones_like(W)))
    linear.load_state_dict({"weight": W, "bias": linear.bias})
    assert same(linear.weight, NF4.of(W))


def test_nothing_writes_to_it(W):
    weight = NF4.of(W)
    with pytest.raises(UserError, match=mentions("add_", "four bits", "model.weights")):
        weight.add_(1.0)
    with pytest.raises(UserError, match="four bits"):
        F.relu_(weight)


@pytest.mark.slow
def test_it_can_be_compiled(W):
    linear, x = layer(NF4.of(W)), torch.randn(5, 40, requires_grad=True)
    gradients = [torch.autograd.grad(net(x).sin().sum(), x)[0] for net in (linear, torch.compile(linear))]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
