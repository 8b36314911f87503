"""BitFit beyond the contract: which biases train."""

import pytest
import torch
from torch import nn

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, BitFit
from tests.helpers.errors import mentions
from tests.helpers.toys import optimizer_of, toy_batches, toy_net, train


def trained_names(net: nn.Module, **settings) -> set[str]:
    Adaptation(net, BitFit(**settings), ["head"])
    return {name for name, parameter in net.named_parameters() if parameter.requires_grad}


def test_all_biases_train_and_the_head() -> None:
    net = toy_net(depth=1)
    net.norm = nn.LayerNorm(12)
    biases = {"embed.bias", *(f"blocks.0.{name}.bias" for name in ("qkv", "proj", "fc1", "fc2")), "norm.bias"}
    assert trained_names(net) == {*biases, "head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("biases", "found"),
    [
        (["qkv", "fc1"], ["blocks.0.qkv", "blocks.0.fc1", "blocks.1.qkv", "blocks.1.fc1"]),
        ("blocks.1", ["blocks.1.qkv", "blocks.1.proj", "blocks.1.fc1", "blocks.1.fc2"]),
        ("fc[12]", ["blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2"]),
    ],
)
def test_some_biases_are_named(biases, found) -> None:
    assert trained_names(toy_net(), biases=biases) == {*(f"{name}.bias" for name in found), "head.weight", "head.bias"}


def test_no_matrix_moves_whatever_the_decay() -> None:
    net, before = toy_net(), toy_net().state_dict()
    adaptation = Adaptation(net, BitFit())
    adaptation.start()
    train(net, adaptation, optimizer_of(net, weight_decay=0.1), toy_batches(5))
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.endswith("bias")), name


@pytest.mark.parametrize(
    ("net", "settings", "words"),
    [
        (nn.Sequential(nn.Linear(3, 3, bias=False)), {}, ["no biases", "LoRA"]),
        (toy_net(), {"biases": ["qvk"]}, ["biases", "'qvk'", "'qkv'"]),
        (toy_net(), {"biases": "head"}, ["biases", "'head'"]),
    ],
)
def test_biases_that_are_not_there_are_refused(net, settings, words) -> None:
    with pytest.raises(UserError, match=mentions(*words)):
        Adaptation(net, BitFit(**settings), ["head"] if hasattr(net, "head") else [])


def test_a_wrong_expression_is_refused() -> None:
    with pytest.raises(UserError, match=mentions("'(qkv'", "regular expression")):
        BitFit(biases="(qkv")
