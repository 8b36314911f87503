"""HydraLoRA beyond the contract: its definition, and what a weight that depends on the input cannot do."""

import pytest
import torch
import torch.nn.functional as F

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, HydraLoRA, LoRA
from srlora_pl.lowrank.delta import change
from srlora_pl.lowrank.measures import size_of_change
from tests.helpers.errors import mentions
from tests.helpers.toys import optimizer_of, toy_batches, toy_net, train


def adapted(targets=("fc1",), **settings) -> Adaptation:
    """With random values everywhere."""
    method = HydraLoRA(**{"rank": 3, "alpha": 6.0, "heads": 4, "target_modules": list(targets), **settings})
    adaptation = Adaptation(toy_net(dtype=torch.float64), method, ["head"])
    for matrix in adaptation.matrices:
        matrix.B.normal_()
    return adaptation


def reference(matrix, x, seen):
    """The definition, head by head and token by token."""
    layer = matrix.layer
    route, bias = matrix.of(layer.lora_route), layer.bias.view(layer.parts, -1)[layer.adapted[matrix.index]]
    rows = []
    for token, dropped in zip(x.flatten(0, -2), seen.flatten(0, -2), strict=True):
        shares = torch.exp(route @ token) / torch.exp(route @ token).sum()
        heads = matrix.B.split(3, dim=1)
        update = sum(share * (B @ (matrix.A @ dropped)) for share, B in zip(shares, heads, strict=True))
        rows.append(matrix.weight @ token + bias + matrix.scaling * update)
    return torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("targets", [["fc1"], ["qkv"], ["query", "value"]])
def test_it_is_its_definition(targets: list[str], dropout: float) -> None:
    """The router sees x, the pairs see x after dropout; each part of a fused linear has its own of all."""
    adaptation = adapted(targets, dropout=dropout)
    layer = adaptation.matrices[0].layer
    x = torch.randn(2, 5, 12).double()
    torch.manual_seed(0)
    seen = layer.dropout(x)
    torch.manual_seed(0)
    y = layer(x)
    rows = dict(enumerate(F.linear(x, layer.weight, layer.bias).chunk(layer.parts, -1)))
    rows |= {layer.adapted[m.index]: reference(m, x, seen) for m in adaptation.matrices if m.layer is layer}
    torch.testing.assert_close(y, torch.cat([rows[part] for part in range(layer.parts)], -1), rtol=0, atol=1e-12)


def test_one_head_is_lora() -> None:
    hydra = adapted(["qkv", "fc1", "fc2"], heads=1)
    lora = Adaptation(
        toy_net(dtype=torch.float64), LoRA(rank=3, alpha=6.0, target_modules=["qkv", "fc1", "fc2"]), ["head"]
    )
    for one, other in zip(lora.matrices, hydra.matrices, strict=True):
        one.A.copy_(other.A)
        one.B.copy_(other.B)
    batches = toy_batches(5, dtype=torch.float64)
    for adaptation in (hydra, lora):
        train(adaptation.net, adaptation, optimizer_of(adaptation.net), batches)
    torch.testing.assert_close(hydra.net(batches[0][0]), lora.net(batches[0][0]), rtol=1e-9, atol=1e-9)


def test_the_shares_are_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    net, seen = toy_net(), []
    adaptation = Adaptation(net, HydraLoRA(target_modules=["fc1"]))
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda *a, **k: seen.append(softmax(*a, **k)) or seen[-1])
    with torch.autocast("cpu", torch.bfloat16):
        y = adaptation.matrices[0].layer(torch.randn(3, 12))
    assert y.dtype == torch.bfloat16
    assert {each.dtype for each in seen} == {torch.float32}


def test_every_matrix_starts_with_a_router_and_pairs_of_its_own() -> None:
    adaptation = Adaptation(toy_net(), HydraLoRA(rank=3, target_modules=["qkv", "fc1"]))
    starts = {
        tuple(m.of(p).flatten().tolist()) for m in adaptation.matrices for p in (m.layer.lora_A, m.layer.lora_route)
    }
    assert len(starts) == 2 * len(adaptation.matrices)
    assert not any(matrix.B.any() for matrix in adaptation.matrices)


def test_what_needs_a_weight_is_refused() -> None:
    adaptation = adapted()
    for refused in (adaptation.merged_copy, adaptation.layers["blocks.0.fc1"].merged_weight):
        with pytest.raises(UserError, match="HydraLoRA's change depends on the input, so it cannot be merged"):
            refused()
    with pytest.raises(UserError, match="HydraLinear is no part of a weight, so it cannot be merged"):
        adaptation.merge()
    with pytest.raises(UserError, match=mentions("HydraLoRA", "no LoRA")):
        change(adaptation)
    assert size_of_change(adaptation, adaptation.matrices[0]) is None
    assert not adaptation.layers["blocks.0.fc1"].merged


@pytest.mark.parametrize("heads", [0, 1.5])
def test_heads_out_of_range_are_refused(heads: float) -> None:
    with pytest.raises(UserError, match=f"heads is {heads}"):
        HydraLoRA(heads=heads)
