"""Bottleneck adapters beyond the contract: their definition, their places, and their copies."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DebertaV2Config, DebertaV2Model

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, Bottleneck
from srlora_pl.lowrank.delta import change
from tests.helpers.toys import toy_batches, toy_net

TARGETS = ["proj", "fc2"]


def adapted(**settings) -> Adaptation:
    """With random values everywhere."""
    net = toy_net(dtype=torch.float64)
    adaptation = Adaptation(net, Bottleneck(**{"size": 6, "target_modules": TARGETS, **settings}), ["head"])
    for layer in adaptation.layers.values():
        for parameter in layer.adapter_parameters():
            parameter.data.normal_()
    return adaptation


def test_it_is_its_definition() -> None:
    adaptation = adapted()
    layer, plain = adaptation.layers["blocks.0.fc2"], toy_net(dtype=torch.float64).blocks[0].fc2
    x = torch.randn(3, 5, 20).double()
    h = plain(x)
    inner = F.gelu(h @ layer.down.T + layer.down_bias)
    torch.testing.assert_close(layer(x), h + inner @ layer.up.T + layer.up_bias, rtol=0, atol=1e-12)


def test_it_starts_near_the_identity_and_can_leave_it() -> None:
    net = toy_net(dtype=torch.float64)
    adaptation = Adaptation(net, Bottleneck(size=6, target_modules=TARGETS))
    layers = list(adaptation.layers.values())
    assert not any(p.any() for layer in layers for p in (layer.up, layer.up_bias, layer.down_bias))
    assert len({tuple(layer.down.flatten().tolist()) for layer in layers}) == len(layers) == 4
    net(toy_batches(1, dtype=torch.float64)[0][0]).sum().backward()
    assert all(layer.up.grad.any() for layer in layers)
    assert all(layer.up_bias.grad.any() for layer in layers)


def test_copies_and_pickles_have_adapters_of_their_own() -> None:
    adaptation = adapted()
    x = toy_batches(1, dtype=torch.float64)[0][0]
    expected = adaptation.net(x)
    for net in (copy.deepcopy(adaptation.net), pickle.loads(pickle.dumps(adaptation.net))):
        assert torch.equal(net(x), expected)
        net.blocks[0].fc2.up.data.zero_()
        assert not torch.equal(net(x), expected)
        assert torch.equal(adaptation.net(x), expected)


def test_the_frozen_linears_keep_their_names() -> None:
    """So a compact state leaves them out, and a pretrained one fits."""
    adaptation, before = adapted(), toy_net(dtype=torch.float64)
    own = adaptation.net.state_dict(keep_vars=True)
    added = {f"{name}.{parameter}" for name, layer in adaptation.layers.items() for parameter in layer.adapter_names}
    assert set(own) == {*before.state_dict(), *added}
    assert adaptation.net.load_state_dict(before.state_dict(), strict=False).unexpected_keys == []
    trained = {name for name, parameter in own.items() if parameter.requires_grad}
    assert trained == {*added, "head.weight", "head.bias"}


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", depth=2)


def deberta() -> nn.Module:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    return DebertaV2Model(DebertaV2Config(vocab_size=50, **sizes))


@pytest.mark.parametrize(
    ("net", "places"),
    [
        (vit, ["blocks.{}.attn.proj", "blocks.{}.mlp.fc2"]),
        (deberta, ["encoder.layer.{}.attention.output.dense", "encoder.layer.{}.output.dense"]),
    ],
)
def test_by_default_two_follow_each_block(net, places: list[str]) -> None:
    """The attention's output and the feed-forward's; 2 (2 d m + d + m) numbers a block."""
    adaptation = Adaptation(net(), Bottleneck())
    assert list(adaptation.layers) == [place.format(block) for block in (0, 1) for place in places]
    size = next(iter(adaptation.layers.values())).out_features
    count = sum(p.numel() for p in adaptation.net.parameters() if p.requires_grad)
    assert count == 2 * 2 * (2 * size * 64 + size + 64)


def test_layers_may_be_left_out() -> None:
    assert list(adapted(layers="1", exclude_modules="proj").layers) == ["blocks.1.fc2"]


def test_what_it_cannot_do_is_refused() -> None:
    adaptation = adapted()
    with pytest.raises(UserError, match="BottleneckLinear is no part of a weight, so it cannot be merged"):
        adaptation.merge()
    with pytest.raises(UserError, match="BottleneckLinear is no part of a weight, so it cannot be merged"):
        adaptation.merged_copy()
    with pytest.raises(UserError, match="Bottleneck does not train low-rank updates of weights alone"):
        change(adaptation)
    with pytest.raises(UserError, match=r"names a part of blocks.0.qkv.*name 'qkv'"):
        Adaptation(toy_net(), Bottleneck(target_modules="query"))
    with pytest.raises(UserError, match="size is 0"):
        Bottleneck(size=0)


def test_a_fused_linear_has_one_behind_it() -> None:
    adaptation = Adaptation(toy_net(), Bottleneck(size=5, target_modules="qkv"))
    assert adaptation.layers["blocks.0.qkv"].up.shape == (36, 5)


def test_half_precision_is_autocasts() -> None:
    net = toy_net()
    Adaptation(net, Bottleneck(size=6, target_modules=TARGETS))
    with torch.autocast("cpu", torch.bfloat16):
        assert net.blocks[0].proj(torch.randn(2, 12)).dtype == torch.bfloat16
