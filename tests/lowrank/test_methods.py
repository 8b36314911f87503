"""The settings of the methods, and the values that they begin with."""

import math

import pytest
import torch
from scipy.stats import kstest
from torch import nn

from srlora_pl import UserError
from srlora_pl.lowrank import LoRA, LowRankLinear, PiSSA, SRLoRA
from tests.helpers.errors import mentions


@pytest.mark.parametrize("parts", [1, 3])
def test_lora_draws_A_uniformly_within_1_over_the_root_of_its_inputs_and_leaves_B_at_0(parts):
    torch.manual_seed(0)
    layer = LowRankLinear(nn.Linear(400, 60 * parts), 16, 1.0, parts, adapted=tuple(range(parts)))
    drawn = []
    for matrix in layer.matrices("qkv"):
        LoRA(rank=16).initialize(matrix)
        drawn.append(matrix.A * 400**0.5)
        assert kstest(drawn[-1].flatten(), "uniform", args=(-1, 2)).pvalue > 0.01
        assert drawn[-1].abs().max() <= 1 + 1e-6
    assert not any(torch.equal(A, drawn[0]) for A in drawn[1:])
    assert not layer.lora_B.any()


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_an_alpha_that_scales_nothing_sensibly_is_refused(alpha):
    with pytest.raises(UserError, match=mentions("method.alpha", alpha)):
        LoRA(alpha=alpha)
    with pytest.raises(UserError, match=mentions("method.alpha_pattern['fc1']", alpha)):
        LoRA(alpha_pattern={"fc2": 1.0, "fc1": alpha})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fusion_ratio": 0.3}, ["fusion_ratio", "0.3", "rank 8", "2.4"]),
        ({"fusion_ratio": 0.0}, ["fusion_ratio", "0.0"]),
        ({"fusion_ratio": 1.5}, ["fusion_ratio", "1.5"]),
        ({"fusion_ratio": 0.5, "rank": 1}, ["0.5", "rank 1"]),
        ({"fusion_ratio": 0.5, "rank_pattern": {"fc1": 3}}, ["0.5", "rank 3", "1.5"]),
        ({"target_rank": 7}, ["target_rank", "7", "rank 8"]),
        ({"target_rank": 12.5}, ["target_rank", "12.5", "whole number"]),
        ({"beta1": 1.0}, ["beta1", "1.0"]),
        ({"beta2": 0.0}, ["beta2", "0.0"]),
        ({"reset_scores": "none"}, ["reset_scores", "'none'", "all, recycled"]),
        ({"optimizer_state": "hot"}, ["optimizer_state", "'hot'", "warm, zero, keep"]),
    ],
)
def test_srloras_own_values(options, words):
    with pytest.raises(UserError, match=mentions(*words)):
        SRLoRA(**options)


def test_the_rank_comes_first_for_every_method():
    assert {method(3).rank for method in (LoRA, PiSSA)} == {3}
    assert (SRLoRA(4, target_rank=12).rank, SRLoRA(4, target_rank=12).target_rank) == (4, 12)
    with pytest.raises(TypeError):
        SRLoRA(4, 12)


def test_spec_rebuilds_the_method():
    method = SRLoRA(rank=4, target_rank=12, target_modules=["fc1"], layers="0-1")
    spec = method.spec()
    assert spec["class_path"] == "srlora_pl.SRLoRA"
    assert SRLoRA(**spec["init_args"]).spec() == spec
    assert spec["init_args"]["layers"] == "0-1"
    assert set(spec["init_args"]) == {
        "rank", "alpha", "target_modules", "exclude_modules", "layers", "rank_pattern", "alpha_pattern", "dropout",
        "use_rslora", "lr_ratio", "target_rank", "fusion_ratio", "beta1", "beta2", "reset_scores", "optimizer_state",
        "select", "redraw_scale", "redraw_directions",
    }  # fmt: skip
