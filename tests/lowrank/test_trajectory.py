"""The whole trajectory against Algorithm 1 in plain fp64."""

import numpy as np
import pytest
import torch
from torch import nn

from srlora_pl.lowrank import Adaptation, SRLoRA
from srlora_pl.lowrank.methods import switching
from srlora_pl.lowrank.methods.switching import lowest
from tests.helpers.reference import ReferenceSRLoRA
from tests.helpers.toys import toy_batches, toy_net, train

STEPS, RANK, ALPHA, TARGET, GAMMA = 60, 4, 10.0, 12, 0.5
OPTIMIZERS = {
    "sgd": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    "adamw": {"name": "adamw", "lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1},
}
TOLERANCE = 1e-9


def build_optimizer(settings, parameters):
    options = {key: value for key, value in settings.items() if key != "name"}
    return {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[settings["name"]](parameters, **options)


def run_package(optimizer, **options):
    net = toy_net(dtype=torch.float64)
    W0s = [w.clone().numpy() for block in net.blocks for w in matrices_of(block)]
    method = SRLoRA(rank=RANK, alpha=ALPHA, target_rank=TARGET, fusion_ratio=GAMMA, **options)
    adaptation = Adaptation(net, method)
    adaptation.start()
    adaptation.plan(STEPS)
    optimizer = build_optimizer(optimizer, [p for p in net.parameters() if p.requires_grad])
    return net, W0s, adaptation, optimizer


def matrices_of(block):
    return [
        *block.qkv.weight.detach().chunk(3),
        block.proj.weight.detach(),
        block.fc1.weight.detach(),
        block.fc2.weight.detach(),
    ]


def functional_loss(net):
    """The toy net as a function of its effective weights only."""
    depth = len(net.blocks)

    def loss(weights, batch):
        x, y = batch
        x = nn.functional.linear(x, net.embed.weight, net.embed.bias)
        for i in range(depth):
            block = net.blocks[i]
            q, k, v, proj, fc1, fc2 = weights[6 * i : 6 * i + 6]
            bq, bk, bv = block.qkv.bias.chunk(3)
            linear = nn.functional.linear
            x = x + linear(torch.tanh(linear(x, q, bq) * linear(x, k, bk)) + linear(x, v, bv), proj, block.proj.bias)
            x = x + linear(torch.tanh(linear(x, fc1, block.fc1.bias)), fc2, block.fc2.bias)
        return nn.functional.cross_entropy(nn.functional.linear(x, net.head.weight, net.head.bias), y)

    return loss


def assert_same_records(adaptation, matrices):
    """What is recorded of pairs at switches, against copies of all that were ever drawn."""
    for i, record in enumerate(adaptation.controller.switch_records()):
        assert record.ranks == {matrix.name: RANK for matrix in adaptation.matrices}
        expected = np.array([row for m in matrices for row in m.records[i]]).T
        found = record.pairs.ages, record.pairs.sizes, record.pairs.scores, record.pairs.changes
        for values, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(values.numpy(), theirs, atol=TOLERANCE, rtol=0)
        low = [RANK * j + k for j, m in enumerate(matrices) for k in m.chosen[i]]
        assert record.pairs.recycled.nonzero().flatten().tolist() == low
    assert i == 2


def follow(name, **options):
    """Train the package and the plain algorithm side by side, and compare all that they hold."""
    net, W0s, adaptation, optimizer = run_package(OPTIMIZERS[name], **options)
    planned = (TARGET - RANK) // 2
    reference = ReferenceSRLoRA(
        W0s,
        RANK,
        ALPHA / RANK,
        recycled=2,
        switch_steps={i * STEPS // planned for i in range(1, planned)},
        optimizer=OPTIMIZERS[name],
        reset=options.pop("reset_scores", "all"),
        state=options.pop("optimizer_state", "warm"),
        **{name: value for name, value in options.items() if name != "redraw_directions"},
    )
    for ours, theirs in zip(adaptation.matrices, reference.matrices, strict=True):
        if options.get("redraw_directions") == "random":  # which are any: those of the package
            drawn = adaptation.controller.drawn_from(ours)
            assert not np.isclose(drawn.U[:, RANK:], theirs.U[:, RANK : len(drawn)]).all(0).any()
            theirs.U[:, : len(drawn)], theirs.Vt[: len(drawn)] = drawn.U.numpy(), drawn.Vh.numpy()
    loss = functional_loss(net)
    for step, batch in enumerate(toy_batches(STEPS, dtype=torch.float64)):
        train(net, adaptation, optimizer, [batch], first_step=step)
        reference.train_step(loss, batch)
    assert adaptation.controller.progress().done == planned - 1 == 3
    for ours, theirs in zip(adaptation.matrices, reference.matrices, strict=True):
        for value, expected in ((ours.weight, theirs.W), (ours.B, theirs.B), (ours.A, theirs.A)):
            np.testing.assert_allclose(value.numpy(), expected, atol=TOLERANCE, rtol=0)
        assert len(adaptation.controller.intervals[ours.name]) == theirs.next_direction
        # which pairs were recycled: the directions that the pairs hold tell the whole history
        assert adaptation.controller.active[ours.name].tolist() == theirs.births
    assert_same_records(adaptation, reference.matrices)
    return adaptation, reference


@pytest.mark.parametrize("state", ["warm", "zero", "keep"])
@pytest.mark.parametrize("reset", ["all", "recycled"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("beta1", "beta2"), [(0.85, 0.85), (0.7, 0.95)])
def test_trajectory_equals_the_plain_algorithm(beta1, beta2, name, reset, state):
    adaptation, reference = follow(name, reset_scores=reset, optimizer_state=state, beta1=beta1, beta2=beta2)
    averages = adaptation.controller.importance
    smoothed, uncertainty = (
        averages.of(adaptation.matrices, flat) for flat in (averages.smoothed, averages.uncertainty)
    )
    for i, theirs in enumerate(reference.matrices):
        for mine, index in ((smoothed, 0), (uncertainty, 1)):
            for name in ("A", "B"):
                value, expected = mine[i][f"lora_{name}"].numpy(), theirs.averages[name][index]
                np.testing.assert_allclose(value, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("select", "redraw_scale"), [("age", "sigma"), ("importance", "median"), ("age", "median")])
@pytest.mark.parametrize("redraw_directions", ["singular", "random"])
def test_the_variants_follow_the_plain_algorithm_too(redraw_directions, select, redraw_scale, name):
    follow(name, select=select, redraw_scale=redraw_scale, redraw_directions=redraw_directions)


def test_the_reference_would_notice_a_wrong_choice(monkeypatch):
    """Sanity of the test above: recycling the highest pairs instead leaves the trajectory by far."""
    net, _, adaptation, optimizer = run_package(OPTIMIZERS["sgd"])
    wrong_net, _, wrong, wrong_optimizer = run_package(OPTIMIZERS["sgd"])
    batches = toy_batches(STEPS, dtype=torch.float64)
    train(net, adaptation, optimizer, batches)
    monkeypatch.setattr(switching, "lowest", lambda scores, count: lowest(-scores, count))
    train(wrong_net, wrong, wrong_optimizer, batches)
    gap = max(
        (a.merged_weight() - b.merged_weight()).abs().max().item()
        for a, b in zip(adaptation.layers.values(), wrong.layers.values(), strict=True)
    )
    assert gap > 1e6 * TOLERANCE
