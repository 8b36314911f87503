"""What the optimizer remembers of recycled pairs: of one parameter, and at the switches of a whole network."""

import pytest
import torch
from torch import nn

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, LowRankLinear
from srlora_pl.lowrank.optimizer_state import growth_of, recycle
from tests.helpers.toys import finished, one_step, srlora, toy_net

# with the names of first and of second moments
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
    grown = growth_of(matrix.A[recycled], A), growth_of(matrix.B[:, recycled].T, B.T)
    rows = lambda state: matrix.of(state).T, matrix.of
    for parameter, rows_of, growth in zip((layer.lora_B, layer.lora_A), rows, grown, strict=True):
        assert recycle(optimizer, parameter, rows_of, recycled, growth, how) == set()
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


# --- of a whole network, at a switch


@pytest.mark.parametrize("how", ["warm", "zero", "keep"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_switch_recycles_the_optimizer_state_of_its_pairs(name, how):
    kind, options, _, second = OPTIMIZERS[name]
    _, adaptation, optimizer = finished(srlora(optimizer_state=how), steps=5, optimizer=kind, **options)
    matrices = adaptation.matrices
    assert any("[k]" in m.name for m in matrices)

    def states(m):
        out = {}
        for side, parameter, view in (("A", m.layer.lora_A, m.of), ("B", m.layer.lora_B, lambda t, m=m: m.of(t).T)):
            for key, value in optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    out[side, key] = view(value).clone()
        return out

    before, pairs = [states(m) for m in matrices], [(m.B.clone(), m.A.clone()) for m in matrices]
    held = [adaptation.controller.active[m.name] for m in matrices]
    adaptation.controller._switch(matrices, 1, optimizer)
    for m, old, (B, A), directions in zip(matrices, before, pairs, held, strict=True):
        recycled = adaptation.controller.active[m.name] != directions
        assert recycled.sum() == 2
        growth = {
            "B": m.A.square().sum(1) / A.square().sum(1),
            "A": m.B.square().sum(0) / B.square().sum(0),
        }
        assert old
        for (side, key), value in states(m).items():
            assert torch.equal(value[~recycled], old[side, key][~recycled])
            expected = old[side, key][recycled]
            if how == "zero" or (how == "warm" and key not in second):
                expected = torch.zeros_like(expected)
            elif how == "warm":
                expected = expected * growth[side][recycled, None]
            torch.testing.assert_close(value[recycled], expected)


def test_a_state_of_unknown_meaning_is_zeroed_and_said():
    with pytest.warns(UserWarning, match="Adamax keeps exp_inf"):
        _, adaptation, optimizer = finished(srlora(), steps=5, optimizer=torch.optim.Adamax)
    with pytest.warns(UserWarning, match="Adamax keeps exp_inf"):
        adaptation.controller._switch(adaptation.matrices, 1, optimizer)


def test_factored_states_are_refused_at_the_first_step():
    with pytest.raises(UserError, match=r"Adafactor keeps '(row|col)_var'.*optimizer_state"):
        finished(srlora(), optimizer=torch.optim.Adafactor)
    finished(srlora(optimizer_state="keep"), optimizer=torch.optim.Adafactor)


def test_lbfgs_is_refused_at_the_first_step():
    net = toy_net()
    adaptation = Adaptation(net, srlora(), trainable=["head"])
    adaptation.start()
    adaptation.plan(8)
    one_step(net, adaptation)
    with pytest.raises(UserError, match=r"LBFGS keeps one history of all parameters"):
        adaptation.after_optimizer(1, torch.optim.LBFGS([*net.head.parameters()]))
