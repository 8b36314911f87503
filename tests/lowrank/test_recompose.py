"""One matrix: which pairs are chosen, and what the optimizer remembers of them."""

import pytest
import torch
from torch import nn

from srlora_pl.lowrank import LowRankLinear
from srlora_pl.lowrank.recompose import lowest, recycle_optimizer_state


@pytest.mark.parametrize("size", [8, 300])
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_of_equal_scores_the_lower_indices_are_the_lowest(size, share):
    generator = torch.Generator().manual_seed(0)
    count = int(share * size)
    for levels in (1, 2, 5):
        scores = torch.randint(levels, (size,), generator=generator).float()
        expected = sorted(sorted(range(size), key=lambda k, scores=scores: (scores[k], k))[:count])
        assert lowest(scores, count).tolist() == expected


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}, {"momentum_buffer"}, set()),
    "adamw": (torch.optim.AdamW, {}, {"exp_avg"}, {"exp_avg_sq"}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}, {"exp_avg"}, {"exp_avg_sq", "max_exp_avg_sq"}),
    "nadam": (torch.optim.NAdam, {}, {"exp_avg"}, {"exp_avg_sq"}),
    "radam": (torch.optim.RAdam, {}, {"exp_avg"}, {"exp_avg_sq"}),
    "adagrad": (torch.optim.Adagrad, {}, set(), {"sum"}),
    "rmsprop": (
        torch.optim.RMSprop,
        {"momentum": 0.5, "centered": True},
        {"momentum_buffer", "grad_avg"},
        {"square_avg"},
    ),
}


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def redrawn(optimizer, **options):
    """The middle one of three adapted matrices, whose pairs 0 and 2 have new values, and the old ones.

    The old pair 2 has a partner of norm 0 on either side.
    """
    layer = LowRankLinear(nn.Linear(5, 12).double(), 3, 1.0, parts=3, adapted=(0, 1, 2))
    layer.lora_A.data.copy_(normal(3, 3, 5))
    layer.lora_B.data.copy_(normal(3, 4, 3))
    made = optimizer([layer.lora_A, layer.lora_B], lr=1e-3, **options)
    for _ in range(2):
        layer.lora_A.grad, layer.lora_B.grad = 1e-5 * normal(3, 3, 5), 1e-5 * normal(3, 4, 3)
        made.step()
    matrix, recycled = layer.matrices("qkv")[1], torch.tensor([0, 2])
    fused = matrix.B[:, recycled], matrix.A[recycled]
    fused[0][:, 1], fused[1][1] = 0, 0
    matrix.B[:, recycled], matrix.A[recycled] = 3 * normal(4, 2), 5 * normal(2, 5)
    return made, matrix, recycled, fused


@pytest.mark.parametrize("how", ["warm", "zero"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_of_recycled_pairs_fit_their_new_partners(name, how):
    kind, options, first, second = OPTIMIZERS[name]
    optimizer, matrix, recycled, (B, A) = redrawn(kind, **options)
    layer = matrix.layer
    before = {p: {k: v.clone() for k, v in optimizer.state[p].items() if k in first | second} for p in optimizer.state}
    assert recycle_optimizer_state(optimizer, matrix, recycled, (B, A), how) == set()
    # of pair 0 the squared norm of the new partner over the old one's; a partner of norm 0 gave nothing to rescale
    growth_B = matrix.A[0].square().sum() / A[0].square().sum(), 1
    growth_A = matrix.B[:, 0].square().sum() / B[:, 0].square().sum(), 1
    assert all(abs(growth[0] - 1) > 0.5 for growth in (growth_A, growth_B))
    for parameter, growth in ((layer.lora_A, growth_A), (layer.lora_B, growth_B)):
        assert before[parameter].keys() == first | second
        for key, old in before[parameter].items():
            expected = old.clone() if parameter is layer.lora_A else old.mT.clone()
            assert expected[1].abs().min() > 0
            for k, factor in zip((0, 2), growth, strict=True):
                expected[1, k] *= factor if how == "warm" and key in second else 0
            value = optimizer.state[parameter][key]
            value = value if parameter is layer.lora_A else value.mT
            torch.testing.assert_close(value, expected, rtol=1e-14, atol=0)
