import math

import pytest
import torch
from scipy.stats import kstest
from torch import nn

from srlora_pl import UserError
from srlora_pl.lowrank import LoRA, LowRankLinear
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
