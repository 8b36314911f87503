"""An adapted network as plain weights and as one LoRA on W0, held against what the network itself computes."""

import pytest
import torch
from torch import nn

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, LoRA, LowRankLinear, PiSSA
from srlora_pl.lowrank.delta import change, merged_copy, overall_error
from srlora_pl.lowrank.export import plain_copy
from tests.helpers.errors import mentions
from tests.helpers.toys import SRLORA, assert_same_state, changes, toy_batches, toy_net, trained

METHODS = {
    "lora": (LoRA(rank=2, alpha=5.0), 0, 1),
    "pissa": (PiSSA(rank=2, alpha=5.0), 0, 2),
    "no switch": (SRLORA(target_rank=2), 0, 2),
    "one switch": (SRLORA(target_rank=4), 1, 3),
    "many switches": (SRLORA(target_rank=8), 5, 7),
    "rslora, two recycled": (SRLORA(target_rank=8, fusion_ratio=1.0, use_rslora=True), 2, 6),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_merged_copy_computes_the_same(name):
    method, switches, _ = METHODS[name]
    adaptation, _ = trained(method)
    assert adaptation.controller.progress().done == switches
    net = adaptation.merged_copy()
    assert not any(isinstance(module, LowRankLinear) or module.training for module in net.modules())
    x = toy_batches(1, seed=3)[0][0]
    torch.testing.assert_close(net(x), adaptation.net(x), atol=1e-6, rtol=1e-5)
    assert list(net.state_dict()) == list(toy_net().state_dict())


def test_the_merged_copy_leaves_the_network_alone():
    adaptation, _ = trained(SRLORA(target_rank=8), dtype=torch.float64)
    adaptation.net.register_buffer("mean", torch.ones(3, dtype=torch.float64))
    before = {name: value.clone() for name, value in adaptation.net.state_dict().items()}
    net = adaptation.merged_copy()
    assert {value.dtype for value in net.state_dict().values()} == {torch.float32}
    for value in net.state_dict().values():
        value.zero_()
    for name, value in adaptation.net.state_dict().items():
        assert value.dtype == torch.float64
        assert torch.equal(value, before[name])
    assert adaptation.net.training


def test_the_merged_copy_of_a_merged_network():
    adaptation, _ = trained(SRLORA(target_rank=8))
    apart = adaptation.merged_copy()
    adaptation.merge()
    for value, other in zip(adaptation.merged_copy().state_dict().values(), apart.state_dict().values(), strict=True):
        assert torch.equal(value, other)


def test_the_merged_copy_takes_other_weights():
    adaptation, before = trained(SRLORA(target_rank=8))
    with torch.no_grad():
        before.head.load_state_dict(adaptation.net.head.state_dict())
    weights = {name: before.get_parameter(f"{name}.weight") for name in adaptation.layers}
    net = merged_copy(adaptation.net, adaptation.layers, weights)
    for name, value in before.state_dict().items():
        assert torch.equal(net.state_dict()[name], value)


@pytest.mark.parametrize("name", METHODS)
def test_the_factors_are_the_whole_change(name):
    method, _, directions = METHODS[name]
    adaptation, before = trained(method, dim=48, hidden=64)
    factors, exact = change(adaptation), changes(adaptation, before)
    sides = 1 if isinstance(method, LoRA) else 2
    # every pair came out of the weight and went, or may still go, back into it
    pairs = method.rank if isinstance(method, LoRA) else directions
    assert {ledger.rank + 2 for ledger in adaptation.ledgers.values()} == {sides * pairs}
    assert list(factors) == list(adaptation.layers)
    for layer, each in factors.items():
        assert each.rank == sides * pairs * adaptation.layers[layer].parts
        assert each.B.dtype == each.A.dtype == torch.float32
        assert each.lost == each.error == 0
        assert exact[layer].norm() > 1e-3
        torch.testing.assert_close(each.B.double() @ each.A.double(), exact[layer], atol=1e-6, rtol=0)
        assert each.size == pytest.approx(float(exact[layer].norm()), rel=1e-4)


@pytest.mark.parametrize("export", [Adaptation.merged_copy, change])
def test_a_reduced_matmul_precision_does_not_reach_what_is_exported(export, monkeypatch):
    """Not every processor computes differently at a lower setting, so look at the setting itself."""
    adaptation, _ = trained(SRLORA(target_rank=8), pretrained=toy_net().state_dict)
    for ledger in adaptation.ledgers.values():
        ledger.updates = None  # so that the difference of weights is computed
    seen, merge = [], LowRankLinear.merged_weight

    def watched(layer):
        seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
        return merge(layer)

    monkeypatch.setattr(LowRankLinear, "merged_weight", watched)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            export(adaptation)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [("highest", False)] * len(adaptation.layers)


def test_in_float64_the_factors_are_exact():
    adaptation, before = trained(SRLORA(target_rank=8), dtype=torch.float64, dim=48, hidden=64)
    for layer, each in change(adaptation).items():
        torch.testing.assert_close((each.B @ each.A).double(), changes(adaptation, before)[layer], atol=2e-7, rtol=0)


def test_nothing_changed_before_training():
    adaptation = Adaptation(toy_net(), SRLORA(target_rank=8))
    for _ in range(2):  # before and after the start
        for each in change(adaptation).values():
            assert (each.B @ each.A).abs().max() < 1e-6
        adaptation.start()
    compressed = change(Adaptation(toy_net(), LoRA(rank=2)), rank=1).values()
    assert overall_error(compressed) == 0
    assert {each.error for each in compressed} == {0}


def test_some_parts_of_a_fused_layer():
    adaptation, before = trained(SRLORA(target_rank=4, target_modules=["query", "value"]), dim=24)
    factors, exact = change(adaptation), changes(adaptation, before)
    for layer, each in factors.items():
        assert each.rank == 2 * 2 * 3  # both sides, two matrices, three directions
        torch.testing.assert_close(each.B.double() @ each.A.double(), exact[layer], atol=1e-6, rtol=0)
        assert not each.B[24:48].any()  # key


def test_the_rank_never_exceeds_the_smaller_side():
    adaptation, before = trained(SRLORA(target_rank=12), steps=11)
    exact = changes(adaptation, before)
    for layer, each in change(adaptation).items():
        assert each.rank == min(exact[layer].shape) == 12
        assert each.lost == 0
        torch.testing.assert_close(each.B.double() @ each.A.double(), exact[layer], atol=1e-6, rtol=0)


@pytest.mark.parametrize("dim", [12, 40])
def test_without_a_ledger_it_is_the_difference_of_the_weights(dim):
    # 40: fewer directions than the smaller side
    kept, _ = trained(SRLORA(target_rank=9), steps=9, dim=dim)
    adaptation, before = trained(SRLORA(target_rank=9), steps=9, dim=dim, pretrained=toy_net(dim=dim).state_dict)
    for ledger in adaptation.ledgers.values():
        ledger.updates = None
    exact, factors, others = changes(adaptation, before), change(adaptation), change(kept)
    for layer, each in factors.items():
        assert each.rank == others[layer].rank == min(2 * 8 * adaptation.layers[layer].parts, *exact[layer].shape)
        torch.testing.assert_close(each.B.double() @ each.A.double(), exact[layer], atol=2e-6, rtol=0)
    for rank in (3, 12 if dim == 12 else 18):
        for layer, each in change(adaptation, rank).items():
            assert each.rank == min(rank, factors[layer].rank)


@pytest.mark.parametrize("target_rank", [4, 12])  # stacks that are thinner and wider than the weights
@pytest.mark.parametrize("rank", [1, 5])
def test_compression_is_the_best_of_its_rank(rank, target_rank):
    adaptation, before = trained(SRLORA(target_rank=target_rank), steps=11)
    exact, factors = changes(adaptation, before), change(adaptation, rank)
    tails = {layer: torch.linalg.svdvals(value)[rank:].norm() for layer, value in exact.items()}
    for layer, each in factors.items():
        assert each.rank == rank
        left = exact[layer] - each.B.double() @ each.A.double()
        assert float(left.norm()) == pytest.approx(float(tails[layer]), abs=1e-5)
        assert each.lost == pytest.approx(float(tails[layer]), abs=1e-5)
        assert each.error == pytest.approx(float(tails[layer] / exact[layer].norm()), rel=1e-3, abs=1e-4)
        assert each.error > 1e-3
    together = torch.stack(list(tails.values())).norm() / torch.stack([v.norm() for v in exact.values()]).norm()
    assert overall_error(factors.values()) == pytest.approx(float(together), rel=1e-3)


def test_a_rank_above_the_exact_one_keeps_the_exact_factors():
    adaptation, _ = trained(SRLORA(target_rank=4, exclude_modules=["qkv"]), dim=20)
    for each, exact in zip(change(adaptation, 20).values(), change(adaptation).values(), strict=True):
        assert torch.equal(each.B, exact.B)
        assert each.lost == 0


@pytest.mark.parametrize("rank", [0, 13])
def test_ranks_that_no_layer_can_have_are_refused(rank):
    adaptation, _ = trained(SRLORA(target_rank=4))
    with pytest.raises(UserError, match=mentions(f"rank {rank}", "12", "blocks.0.qkv")):
        change(adaptation, rank)


def test_what_was_merged_before_is_added():
    adaptation, before = trained(SRLORA(target_rank=4, target_modules=["fc1"]), dim=24)
    generator = torch.Generator().manual_seed(0)
    earlier = {
        "blocks.0.fc1": (torch.randn(20, 2, generator=generator), torch.randn(2, 24, generator=generator)),
        "blocks.1.proj": (torch.randn(24, 1, generator=generator), torch.randn(1, 24, generator=generator)),
    }
    exact, factors = changes(adaptation, before), change(adaptation, before=earlier)
    assert set(factors) == {"blocks.0.fc1", "blocks.1.fc1", "blocks.1.proj"}
    for layer, each in factors.items():
        B, A = earlier.get(layer, (torch.zeros(1), torch.zeros(1)))
        wanted = exact.get(layer, 0) + (B.double() @ A.double() if layer in earlier else 0)
        torch.testing.assert_close(each.B.double() @ each.A.double(), wanted, atol=2e-6, rtol=0)


def test_what_is_shared_in_the_network_is_shared_in_the_copy():
    net = toy_net()
    net.again, net.head.weight = net.blocks[0], nn.Parameter(net.head.weight.double())
    net.tied = nn.Linear(12, 3)
    net.tied.weight = net.head.weight
    copied = Adaptation(net, LoRA(rank=2, target_modules=[r"blocks\.1\.fc1"])).merged_copy()
    assert copied.again is copied.blocks[0]
    assert copied.tied.weight is copied.head.weight
    assert copied.head.weight.dtype == torch.float32
    assert isinstance(copied.blocks[1].fc1, nn.Linear)


def test_the_former_name_of_the_merged_copy():
    adaptation, _ = trained(SRLORA(target_rank=8))
    assert_same_state(plain_copy(adaptation), adaptation.merged_copy())
