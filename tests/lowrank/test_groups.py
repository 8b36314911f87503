"""Groups of parameters with rates of their own, and LoRA+."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, BitFit, LoRA, LoRAXS, PiSSA, SRLoRA
from srlora_pl.lowrank.groups import param_groups
from tests.helpers.errors import mentions
from tests.helpers.toys import assert_same_state, toy_batches, toy_net, train


def named(groups, net) -> dict[tuple[float, float], list[str]]:
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    return {(g["lr"], g["weight_decay"]): [names[id(p)] for p in g["params"]] for g in groups}


def test_one_group_per_learning_rate_and_decay() -> None:
    net = nn.ModuleDict({"body": nn.Linear(3, 3), "norm": nn.LayerNorm(3), "head": nn.Linear(3, 2)})
    net["body"].bias.requires_grad_(False)
    head = set(net["head"].parameters())
    one = param_groups(net.parameters(), lambda p: 1.0, 0.0)
    assert named(one, net) == {(1.0, 0.0): ["body.weight", "norm.weight", "norm.bias", "head.weight", "head.bias"]}
    four = param_groups(net.parameters(), lambda p: 3.0 if p in head else 1.0, 0.1)
    assert named(four, net) == {
        (1.0, 0.1): ["body.weight"],
        (1.0, 0.0): ["norm.weight", "norm.bias"],
        (3.0, 0.1): ["head.weight"],
        (3.0, 0.0): ["head.bias"],
    }


def adapted(method, **options) -> Adaptation:
    adaptation = Adaptation(toy_net(**options), method, ["head"])
    adaptation.start()
    return adaptation


def test_B_has_a_rate_of_its_own_and_the_head_keeps_its_own() -> None:
    adaptation = adapted(LoRA(rank=2, lr_ratio=16.0, target_modules=["fc1"]), depth=1)
    groups = named(adaptation.param_groups(0.01, weight_decay=0.1, head_lr=0.5), adaptation.net)
    assert groups == {
        (0.01, 0.1): ["blocks.0.fc1.lora_A"],
        (0.16, 0.1): ["blocks.0.fc1.lora_B"],
        (0.5, 0.1): ["head.weight"],
        (0.5, 0.0): ["head.bias"],
    }
    assert list(named(adaptation.param_groups(0.01), adaptation.net)) == [(0.01, 0.0), (0.16, 0.0)]


def test_ratio_1_is_the_method_without_it() -> None:
    without, with_1 = adapted(LoRA(rank=2)), adapted(LoRA(rank=2, lr_ratio=1.0))
    plain = [{"params": [p for p in without.net.parameters() if p.requires_grad]}]
    for adaptation, groups in ((without, plain), (with_1, with_1.param_groups(0.01))):
        optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)
        assert len(optimizer.param_groups) == 1
        train(adaptation.net, adaptation, optimizer, toy_batches(5))
    assert_same_state(without.net, with_1.net)


def test_one_step_of_sgd_moves_B_by_so_much_more() -> None:
    moved = {}
    for ratio in (1.0, 16.0):
        adaptation = adapted(PiSSA(rank=2, lr_ratio=ratio), dtype=torch.float64)
        before = [(m.A.clone(), m.B.clone()) for m in adaptation.matrices]
        groups = adaptation.param_groups(0.01)
        train(adaptation.net, adaptation, torch.optim.SGD(groups), toy_batches(1, dtype=torch.float64))
        moved[ratio] = [(m.A - A, m.B - B) for m, (A, B) in zip(adaptation.matrices, before, strict=True)]
    for (A, B), (A16, B16) in zip(moved[1.0], moved[16.0], strict=True):
        torch.testing.assert_close(A16, A, rtol=0, atol=1e-14)
        torch.testing.assert_close(B16, 16 * B, rtol=0, atol=1e-14)


def test_a_schedule_multiplies_both_rates() -> None:
    adaptation = adapted(LoRA(rank=2, lr_ratio=16.0))
    optimizer = torch.optim.SGD(adaptation.param_groups(0.5))
    scheduler = LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for step in range(4):
        assert [group["lr"] for group in optimizer.param_groups] == [0.5 / (step + 1), 8.0 / (step + 1)]
        optimizer.step()
        scheduler.step()


def test_a_method_that_trains_no_B_has_no_ratio() -> None:
    with pytest.raises(UserError, match=mentions("lr_ratio", "16", "LoRAXS")):
        adapted(LoRAXS(rank=2, lr_ratio=16.0))
    with pytest.raises(TypeError, match="lr_ratio"):
        BitFit(lr_ratio=16.0)


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ratio_that_is_no_ratio_is_refused(ratio) -> None:
    with pytest.raises(UserError, match=mentions("method.lr_ratio", ratio)):
        LoRA(lr_ratio=ratio)


def test_an_optimizer_that_knows_no_ratio_is_refused() -> None:
    adaptation = adapted(LoRA(rank=2, lr_ratio=16.0))
    optimizer = torch.optim.SGD([p for p in adaptation.net.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(UserError, match=mentions("lr_ratio", "16", "param_groups")):
        adaptation.attach(optimizer, 5)
    adaptation.attach(torch.optim.SGD(adaptation.param_groups(0.1)), 5)


@pytest.mark.parametrize("kind", [LoRA, SRLoRA, LoRAXS])
def test_a_state_from_before_the_ratio_counts_as_ratio_1(kind) -> None:
    state = adapted(kind(rank=2)).state_dict()
    del state["method"]["init_args"]["lr_ratio"]
    adapted(kind(rank=2)).load_state_dict(state)
    if kind is not LoRAXS:
        with pytest.raises(UserError, match=mentions("lr_ratio 1.0", "now 16.0")):
            adapted(kind(rank=2, lr_ratio=16.0)).load_state_dict(state)


def test_rslora_is_lora_with_a_larger_alpha() -> None:
    x = toy_batches(1)[0][0]
    outputs = []
    for method in (LoRA(rank=4, alpha=3.0, use_rslora=True), LoRA(rank=4, alpha=6.0)):
        adaptation = adapted(method)
        for matrix in adaptation.matrices:
            matrix.B.copy_(torch.ones_like(matrix.B))
        outputs.append(adaptation.net(x))
    assert torch.equal(*outputs)
