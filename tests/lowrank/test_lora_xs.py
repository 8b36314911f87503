"""LoRA-XS beyond the contract: its start, and the gradient of its core."""

import pytest
import torch

from srlora_pl.lowrank import Adaptation, LoRAXS
from tests.helpers.toys import toy_net


def adapted(seed: int = 0, drawn: int = 0, **settings) -> Adaptation:
    net = toy_net(dtype=torch.float64)
    torch.manual_seed(seed)
    torch.randn(drawn)
    adaptation = Adaptation(net, LoRAXS(rank=4, **settings), ["head"])
    adaptation.start()
    return adaptation


def test_it_starts_on_the_leading_singular_directions() -> None:
    adaptation = adapted()
    for matrix in adaptation.matrices:
        U, sigma, Vh = torch.linalg.svd(matrix.weight)
        best = (U[:, :4] * sigma[:4]) @ Vh[:4]
        torch.testing.assert_close(matrix.B @ matrix.A, best, rtol=0, atol=1e-12)
        torch.testing.assert_close(matrix.B.T @ matrix.B, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
        R = matrix.of(matrix.layer.lora_R)
        assert 0.3e-5 < float(R.detach().std()) < 3e-5


def test_the_start_moves_the_weight_by_little() -> None:
    """At most s ||B|| ||R|| ||A|| = s sigma_1 ||R||."""
    adaptation = adapted()
    for matrix in adaptation.matrices:
        B, A = matrix.factors()
        sigma = torch.linalg.matrix_norm(matrix.weight, 2)
        R = torch.linalg.matrix_norm(matrix.of(matrix.layer.lora_R.detach()), 2)
        moved = matrix.scaling * torch.linalg.matrix_norm(B @ A, 2)
        assert 0 < moved <= matrix.scaling * sigma * R * (1 + 1e-12)
        assert float(R) < 8e-5


def test_the_start_depends_on_the_seed_and_the_matrix_alone() -> None:
    """Not on what else has drawn random numbers."""
    one, same, other = adapted(1), adapted(1, drawn=7), adapted(2)
    cores = [[matrix.of(matrix.layer.lora_R.detach()) for matrix in each.matrices] for each in (one, same, other)]
    assert all(map(torch.equal, cores[0], cores[1]))
    assert not any(map(torch.equal, cores[0], cores[2]))
    assert len({tuple(core.flatten().tolist()) for core in cores[0]}) == len(cores[0])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_gradient_of_the_core_is_that_of_the_weight_between_the_factors(dropout: float) -> None:
    """dR = s B^T G A^T, with G = dY^T X and X as dropped."""
    adaptation = adapted(dropout=dropout)
    matrix = adaptation.matrices[-1]
    layer = matrix.layer
    x, dy = torch.randn(7, layer.in_features, dtype=torch.float64), torch.randn(7, layer.out_features).double()
    torch.manual_seed(0)
    seen = layer.dropout(x)
    torch.manual_seed(0)
    layer(x).backward(dy)
    G = dy.T @ seen
    torch.testing.assert_close(layer.lora_R.grad, matrix.scaling * matrix.B.T @ G @ matrix.A.T, rtol=0, atol=1e-12)
    assert layer.lora_A.grad is None
    assert layer.lora_B.grad is None


def test_at_full_rank_it_spans_every_change() -> None:
    net = toy_net(dtype=torch.float64)
    adaptation = Adaptation(net, LoRAXS(rank=12, init_std=0.0, target_modules=["proj"]))
    adaptation.start()
    for matrix in adaptation.matrices:
        wanted = torch.randn(matrix.shape, dtype=torch.float64)
        R = torch.linalg.pinv(matrix.B) @ wanted @ torch.linalg.pinv(matrix.A) / matrix.scaling
        matrix.of(matrix.layer.lora_R.data).copy_(R)
        torch.testing.assert_close(matrix.layer.merged_weight() - matrix.weight, wanted, rtol=0, atol=1e-10)
