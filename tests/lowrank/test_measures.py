"""What is measured of a run, held against plain dense float64 computations and against what was done to each pair."""

import math

import pytest
import timm
import torch

from srlora_pl.lowrank import Adaptation, LoRA, PiSSA
from srlora_pl.lowrank.measures import (
    Size,
    by_kind,
    drawn_after,
    scores_by_kind,
    size_of_change,
    switches_survived,
)
from srlora_pl.lowrank.schedule import Pace
from tests.helpers.toys import SRLORA, changes, trained

METHODS = {
    "lora": LoRA(rank=2, alpha=5.0),
    "pissa": PiSSA(rank=2, alpha=5.0),
    "many switches": SRLORA(target_rank=8),
    "more pairs than rows": SRLORA(target_rank=12, fusion_ratio=1.0),
}


def plain_size(change):
    """Norm, stable rank and effective rank, term by term."""
    sigma = torch.linalg.svdvals(change).tolist()
    shares = [value / sum(sigma) for value in sigma]
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    norm = change.square().sum().sqrt().item()
    return norm, norm**2 / sigma[0] ** 2, math.exp(entropy)


@pytest.mark.parametrize("name", METHODS)
def test_the_size_of_the_change_is_that_of_the_dense_difference(name):
    adaptation, before = trained(METHODS[name], steps=12, dtype=torch.float64)
    dense = changes(adaptation, before)
    for matrix in adaptation.matrices:
        size = size_of_change(adaptation, matrix)
        norm, stable, effective = plain_size(matrix.of_weight(dense[matrix.layer_name]))
        assert norm > 1e-2
        assert size.norm == pytest.approx(norm, rel=1e-9)
        assert size.stable_rank == pytest.approx(stable, rel=1e-9)
        assert size.effective_rank == pytest.approx(effective, rel=1e-9)


def test_sizes_that_are_known():
    assert Size.of(torch.tensor([3.0, 3.0, 3.0, 0.0])).stable_rank == pytest.approx(3)
    assert Size.of(torch.tensor([3.0, 3.0, 3.0, 0.0])).effective_rank == pytest.approx(3)
    assert Size.of(torch.tensor([4.0, 3.0])).norm == 5
    assert Size.of(torch.zeros(3)) == Size(0.0, 0.0, 0.0)


def test_nothing_has_changed_before_training():
    adaptation, _ = trained(PiSSA(rank=2, alpha=5.0), steps=0, dtype=torch.float64)
    sizes = [size_of_change(adaptation, matrix) for matrix in adaptation.matrices]
    assert max(size.norm for size in sizes) < 1e-14


def test_a_matrix_whose_updates_are_gone_is_left_out():
    adaptation, _ = trained(SRLORA(target_rank=8))
    matrix = adaptation.matrices[0]
    adaptation.ledgers[matrix].updates = None
    assert size_of_change(adaptation, matrix) is None


def test_a_change_that_diverged_is_not_measured():
    adaptation, _ = trained(PiSSA(rank=2), steps=1)
    matrix = adaptation.matrices[0]
    assert size_of_change(adaptation, matrix) is not None
    matrix.A[0, 0] = math.inf
    assert size_of_change(adaptation, matrix) is None


def test_kinds_are_places_in_a_block():
    adaptation, _ = trained(LoRA(rank=2), steps=0)
    kinds = by_kind(adaptation)
    assert list(kinds) == ["qkv[q]", "qkv[k]", "qkv[v]", "proj", "fc1", "fc2"]
    assert [matrix.name for matrix in kinds["qkv[k]"]] == ["blocks.0.qkv[k]", "blocks.1.qkv[k]"]


def test_the_stages_of_a_network_have_their_kinds_in_common():
    net = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 2), embed_dim=12, num_heads=(2, 2))
    kinds = by_kind(Adaptation(net, LoRA(rank=2)))
    every = [f"layers.{stage}.blocks.{block}" for stage, block in ((0, 0), (1, 0), (1, 1))]
    expected = {f"attn.{part}" for part in ("qkv[q]", "qkv[k]", "qkv[v]", "proj")} | {"mlp.fc1", "mlp.fc2"}
    assert {*kinds} == {*expected, "downsample.reduction"}
    for kind in expected:
        assert [matrix.name for matrix in kinds[kind]] == [f"{block}.{kind}" for block in every]


def test_scores_are_those_of_every_matrix_of_the_kind():
    adaptation, _ = trained(SRLORA(target_rank=2))
    each = adaptation.controller.scores()
    found = scores_by_kind(adaptation)
    assert found["fc1"].tolist() == [*each["blocks.0.fc1"].tolist(), *each["blocks.1.fc1"].tolist()]
    assert all((values > 0).all() for values in found.values())
    assert scores_by_kind(trained(LoRA(rank=2), steps=0)[0]) == {}


def test_the_age_of_pairs():
    """Switches of one pair of two after steps 4, 8, 12, 16 and 20 of 24."""
    adaptation, _ = trained(SRLORA(target_rank=8), steps=24)
    assert adaptation.controller.progress().done == 5
    histories = adaptation.controller.histories()
    survived = switches_survived(histories, drawn := drawn_after(histories))
    last_drawn = drawn.view(-1, 2).max(1).values
    assert last_drawn.tolist() == [20] * len(adaptation.matrices)
    assert set(drawn.tolist()) <= {0, 4, 8, 12, 16, 20}
    assert torch.equal(survived, (20 - drawn) // 4)
    assert len(set(survived.tolist())) > 2


def test_the_next_switch_is_the_one_that_comes():
    adaptation, _ = trained(SRLORA(target_rank=8), steps=24)
    assert adaptation.controller.progress().next_step is None
    steps = []
    (pace,) = adaptation.controller.paces.values()
    for done in range(pace.schedule.to_do):
        adaptation.controller.paces = {2: Pace(pace.schedule, done)}
        steps.append(adaptation.controller.progress().next_step)
    assert steps == [4, 8, 12, 16, 20]
    assert trained(LoRA(rank=2), steps=0)[0].controller.progress().next_step is None
