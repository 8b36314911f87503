"""Tied-LoRA beyond the contract: each kind of matrix has one A and one B in the whole network."""

import copy

import pytest
import torch
from torch import nn

from srlora_pl.lowrank import Adaptation, LoRA, TiedLoRA
from tests.helpers.toys import optimizer_of, toy_batches, toy_net, train


def adapted(targets=("fc1", "fc2"), depth: int = 2, **settings) -> Adaptation:
    net = toy_net(dtype=torch.float64, depth=depth)
    return Adaptation(net, TiedLoRA(rank=3, alpha=6.0, target_modules=list(targets), **settings))


def test_one_matrix_with_its_vectors_frozen_is_lora() -> None:
    tied, lora = adapted(["fc1"], depth=1), toy_net(dtype=torch.float64, depth=1)
    ours = Adaptation(lora, LoRA(rank=3, alpha=6.0, target_modules=["fc1"]))
    layer = tied.matrices[0].layer
    layer.lora_u.requires_grad_(False)
    layer.lora_v.requires_grad_(False)
    ours.matrices[0].A.copy_(layer.shared[0].shared_A)
    for adaptation in (tied, ours):
        train(adaptation.net, adaptation, optimizer_of(adaptation.net), toy_batches(6, dtype=torch.float64))
    assert torch.equal(layer.shared[0].shared_A, ours.matrices[0].A)
    assert torch.equal(layer.shared[0].shared_B, ours.matrices[0].B)
    assert float(ours.matrices[0].B.detach().abs().max()) > 0


def test_the_gradients_of_the_shared_factors_are_sums_over_the_blocks() -> None:
    """Of the gradient s diag(u) B^T diag(v) G of A, and its like for B, with G of each block."""
    adaptation = adapted(["fc1"])
    shared = adaptation.matrices[0].layer.shared[0]
    shared.shared_B.data.normal_()
    for matrix in adaptation.matrices:
        matrix.layer.lora_u.data.normal_()
        matrix.layer.lora_v.data.normal_()
    plain = adaptation.merged_copy().double()
    x = toy_batches(1, dtype=torch.float64)[0][0]
    adaptation.net(x).square().sum().backward()
    for block in plain.blocks:
        block.fc1.weight.requires_grad_()
    for ours, theirs in zip(adaptation.net.blocks, plain.blocks, strict=True):
        theirs.fc1.weight.data.copy_(ours.fc1.merged_weight())
    plain(x).square().sum().backward()
    A = B = 0
    for ours, theirs in zip(adaptation.net.blocks, plain.blocks, strict=True):
        u, v, G = ours.fc1.lora_u.detach(), ours.fc1.lora_v.detach(), theirs.fc1.weight.grad
        A = A + 2 * u[:, None] * (shared.shared_B.detach().T @ (v[:, None] * G))
        B = B + 2 * (v[:, None] * G) @ (u[:, None] * shared.shared_A.detach()).T
    torch.testing.assert_close(shared.shared_A.grad, A, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(shared.shared_B.grad, B, rtol=1e-10, atol=1e-10)


def test_the_tied_tensors_are_there_once() -> None:
    """In the state, in the list of parameters, and in a copy, which is tied to its own."""
    adaptation = adapted(["query", "value", "fc1"])
    for net in (adaptation.net, copy.deepcopy(adaptation.net)):
        names = [name for name in net.state_dict() if "shared" in name]
        assert names == [f"tied_{k}.shared_{side}" for k in ("qkv_q_", "qkv_v_", "fc1") for side in "AB"]
        tied = {id(p) for name in ("tied_qkv_q_", "tied_qkv_v_", "tied_fc1") for p in getattr(net, name).parameters()}
        used = {id(p) for m in net.modules() for each in getattr(m, "shared", ()) for p in each.parameters()}
        assert used == tied
        (group,) = optimizer_of(net).param_groups
        assert len({id(p) for p in group["params"]}) == len(group["params"])
        assert tied <= {id(p) for p in group["params"]}


def test_layers_of_other_shapes_or_ranks_share_among_themselves() -> None:
    net = toy_net(depth=3)
    net.blocks[2].fc1, net.blocks[2].fc2 = nn.Linear(12, 28), nn.Linear(28, 12)
    adaptation = Adaptation(net, TiedLoRA(rank=3, target_modules=["fc1", "proj"], rank_pattern={"1.proj": 2}))
    shared = {matrix.layer_name: matrix.layer.shared[0] for matrix in adaptation.matrices}
    assert shared["blocks.0.fc1"] is shared["blocks.1.fc1"]
    assert shared["blocks.2.fc1"].shared_B.shape == (28, 3)
    assert shared["blocks.0.proj"] is shared["blocks.2.proj"]
    assert shared["blocks.1.proj"].shared_A.shape == (2, 12)
    net(toy_batches(1)[0][0]).sum().backward()


@pytest.mark.parametrize("kind", ["fc1", "qkv"])
def test_it_starts_as_lora_does(kind: str) -> None:
    adaptation = adapted([kind])
    for matrix in adaptation.matrices:
        (B, A), layer = matrix.factors(), matrix.layer
        assert not B.any()
        assert 0.5 / 12**0.5 < float(A.abs().max()) <= 1 / 12**0.5
        assert bool((layer.lora_u == 1).all())
        assert bool((layer.lora_v == 1).all())
    assert len({tuple(m.factors()[1].flatten().tolist()) for m in adaptation.matrices}) == (1 if kind == "fc1" else 3)


def test_the_shared_B_may_have_a_rate_of_its_own() -> None:
    adaptation = adapted(["fc1"], lr_ratio=16.0)
    rates = {id(p): group["lr"] for group in adaptation.param_groups(0.01) for p in group["params"]}
    holder, layer = adaptation.matrices[0].layer.shared[0], adaptation.matrices[0].layer
    assert rates[id(holder.shared_B)] == 0.16
    assert {rates[id(p)] for p in (holder.shared_A, layer.lora_u, layer.lora_v)} == {0.01}
