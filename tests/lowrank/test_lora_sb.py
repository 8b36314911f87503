"""The theory of LoRA-SB (arXiv 2411.19557): what its start and its steps are, numerically."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, LoRASB, gradients
from srlora_pl.lowrank.linear import Matrix
from tests.helpers.errors import mentions
from tests.helpers.toys import full_rank_losses, toy_batches, toy_net

RANK, LR = 3, 0.05


def started(dtype: torch.dtype = torch.float64, **settings) -> tuple[Adaptation, dict[str, Tensor]]:
    """The adaptation after its start, and the gradients (out, in) of the mean loss at W0 by layer."""
    plain, net, batches = toy_net(dtype=dtype), toy_net(dtype=dtype), toy_batches(3, dtype=dtype)
    torch.cat([full_rank_losses(plain, batch) for batch in batches]).mean().backward()
    adaptation = Adaptation(net, LoRASB(RANK, **settings), ["head"])
    adaptation.start(gradients(partial(full_rank_losses, net), batches, lr=LR))
    return adaptation, {name: plain.get_parameter(f"{name}.weight").grad for name in adaptation.layers}


def of(matrix: Matrix, gradient: dict[str, Tensor]) -> Tensor:
    return matrix.of_weight(gradient[matrix.layer_name])


def core(matrix: Matrix) -> Tensor:
    return matrix.of(matrix.layer.lora_R.detach())


def update(matrix: Matrix) -> Tensor:
    """W_eff - W."""
    B, A = matrix.factors()
    return matrix.scaling * B @ A


def best(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of this rank (Eckart and Young 1936)."""
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ Vh[:rank]


def close(one: Tensor, other: Tensor, tolerance: float = 1e-12) -> bool:
    return float((one - other).norm() / other.norm()) < tolerance


@pytest.mark.parametrize("alpha", [None, 12.0])
@pytest.mark.parametrize("first_step", ["adamw", "sgd"])
def test_it_starts_at_the_best_approximation_of_the_first_step(first_step: str, alpha: float | None) -> None:
    """Eq. 7 to 11; s = 1, or alpha / r = 4."""
    adaptation, G = started(first_step=first_step, alpha=alpha)
    for matrix in adaptation.matrices:
        step = -LR * (of(matrix, G).sign() if first_step == "adamw" else of(matrix, G))
        assert close(update(matrix), best(step, RANK))
        assert matrix.scaling == (1 if alpha is None else 4)
        W0 = matrix.of_weight(toy_net(dtype=torch.float64).get_parameter(f"{matrix.layer_name}.weight"))
        assert torch.equal(matrix.weight, W0)  # nothing is taken off


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_the_factors_are_orthonormal(dtype: torch.dtype, tolerance: float) -> None:
    adaptation, _ = started(dtype)
    for matrix in adaptation.matrices:
        for columns in (matrix.B, matrix.A.T):
            torch.testing.assert_close(columns.T @ columns, torch.eye(RANK, dtype=dtype), rtol=0, atol=tolerance)


def gradients_now(adaptation: Adaptation) -> tuple[dict[str, Tensor], Tensor]:
    """The gradients with respect to W_eff by layer, and the mean loss; those of R are in ``.grad``."""
    net, batches = adaptation.net, toy_batches(3, dtype=torch.float64)
    plain = toy_net(dtype=torch.float64)
    plain.load_state_dict(adaptation.merged_copy().state_dict())
    for name, layer in adaptation.layers.items():
        plain.get_parameter(f"{name}.weight").data.copy_(layer.merged_weight())
    net.zero_grad()
    loss = torch.cat([full_rank_losses(net, batch) for batch in batches]).mean()
    loss.backward()
    torch.cat([full_rank_losses(plain, batch) for batch in batches]).mean().backward()
    return {name: plain.get_parameter(f"{name}.weight").grad for name in adaptation.layers}, loss.detach()


@pytest.mark.parametrize("alpha", [None, 12.0])
def test_the_gradient_of_the_core_and_its_best_use(alpha: float | None) -> None:
    """Lemma 2: dL/dR = s B^T G A^T. Theorem 3: 1 / s^2 of it makes s B g A the closest to G, so s = 1 needs nothing."""
    adaptation, _ = started(alpha=alpha)
    G, _ = gradients_now(adaptation)
    for matrix in adaptation.matrices:
        B, A, s, g = matrix.B, matrix.A, matrix.scaling, matrix.of(matrix.layer.lora_R.grad)
        torch.testing.assert_close(g, s * B.T @ of(matrix, G) @ A.T, rtol=0, atol=1e-13)
        closest = torch.linalg.lstsq(s * torch.kron(B, A.T.contiguous()), of(matrix, G).flatten()).solution
        torch.testing.assert_close(closest.view(RANK, RANK), g / s**2, rtol=0, atol=1e-12)


def test_a_step_lowers_the_loss_by_the_squared_gradient() -> None:
    """Theorem 4: to first order by lr ||dL/dR||^2."""
    adaptation, _ = started()
    _, before = gradients_now(adaptation)
    lr, cores = 1e-7, [layer.lora_R for layer in adaptation.layers.values()]
    expected = lr * sum(float(R.grad.square().sum()) for R in cores)
    for R in cores:
        R.data -= lr * R.grad
    _, after = gradients_now(adaptation)
    assert float(before - after) == pytest.approx(expected, rel=1e-4)


def test_from_the_pretrained_weight_sgd_makes_the_best_step() -> None:
    """Theorem 6: with G at W0 and ``first_step: sgd`` the update of R is the best approximation of -lr G."""
    adaptation, G = started(first_step="sgd")
    for matrix in adaptation.matrices:
        G0, B, A = of(matrix, G), matrix.B, matrix.A
        assert close(B @ (B.T @ G0 @ A.T) @ A, best(G0, RANK))


def test_with_adamw_that_step_is_another() -> None:
    """Theorem 6 does not hold for the directions of sign(G)."""
    adaptation, G = started(first_step="adamw")
    errors = [
        float((m.B @ (m.B.T @ of(m, G) @ m.A.T) @ m.A - best(of(m, G), RANK)).norm() / best(of(m, G), RANK).norm())
        for m in adaptation.matrices
    ]
    assert min(errors) > 0.05


def test_the_first_step_after_the_start_is_a_projection_and_not_the_best() -> None:
    """There G is taken at W0 + [D]_r: the update is B B^T G A^T A exactly, near the best one of its rank."""
    adaptation, _ = started(first_step="sgd")
    G, _ = gradients_now(adaptation)
    before = {matrix: update(matrix) for matrix in adaptation.matrices}
    for layer in adaptation.layers.values():
        layer.lora_R.data -= LR * layer.lora_R.grad
    for matrix in adaptation.matrices:
        step, B, A = (update(matrix) - before[matrix]) / -LR, matrix.B, matrix.A
        assert close(step, B @ B.T @ of(matrix, G) @ A.T @ A, 1e-11)
        assert not close(step, best(of(matrix, G), RANK), 1e-6)


def test_training_does_not_depend_on_the_strength() -> None:
    """Theorem 5: SGD at s = 1, and at s = 4 with a rate of 1 / s^2 for R."""
    weights = []
    for alpha, lr in ((None, LR), (4.0 * RANK, LR / 16)):
        adaptation, _ = started(alpha=alpha)
        optimizer = torch.optim.SGD([layer.lora_R for layer in adaptation.layers.values()], lr=lr)
        for _ in range(5):
            gradients_now(adaptation)
            optimizer.step()
        weights.append([layer.merged_weight() for layer in adaptation.layers.values()])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_first_step_of_lower_rank_is_met_exactly_and_its_other_directions_train() -> None:
    """The softmax of 3 classes gives the last layer a gradient of rank 2."""
    net, batches = toy_net(dtype=torch.float64), toy_batches(3, dtype=torch.float64)
    adaptation = Adaptation(net, LoRASB(RANK, first_step="sgd"), ["head"])

    def losses(batch):
        return nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="none")

    adaptation.start(gradients(losses, batches, lr=LR))
    plain = toy_net(dtype=torch.float64)
    torch.cat([nn.functional.cross_entropy(plain(x), y, reduction="none") for x, y in batches]).mean().backward()
    matrix = adaptation.matrices[-1]
    assert close(update(matrix), -LR * plain.blocks[1].fc2.weight.grad)
    for columns in (matrix.B, matrix.A.T):
        torch.testing.assert_close(columns.T @ columns, torch.eye(RANK).double(), rtol=0, atol=1e-12)
    assert int((core(matrix) != 0).sum()) == 2
    torch.cat([losses(batch) for batch in batches]).sum().backward()
    assert bool((matrix.layer.lora_R.grad != 0).all())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"first_step": "lion"}, ["first_step", "lion", "adamw"]),
        ({"gradient_samples": 0}, ["gradient_samples", "0"]),
        ({"gradient_samples": 1.5}, ["gradient_samples", "1.5"]),
        ({"gradient_samples": math.nan}, ["gradient_samples", "nan"]),
        ({"gradient_samples": math.inf}, ["gradient_samples", "inf"]),
        ({"alpha_pattern": {"fc1": 4.0}}, ["alpha_pattern", "fc1", "method.alpha"]),
        ({"use_rslora": True}, ["use_rslora", "True", "method.alpha"]),
    ],
)
def test_settings_out_of_range_are_refused(settings, words) -> None:
    with pytest.raises(UserError, match=mentions(*words)):
        LoRASB(**settings)


def test_the_rate_of_the_first_step_must_be_given() -> None:
    net = toy_net(dtype=torch.float64)
    adaptation = Adaptation(net, LoRASB(rank=1), ["head"])
    with pytest.raises(UserError, match=mentions("LoRASB", "lr")):
        adaptation.start(gradients(partial(full_rank_losses, net), toy_batches(1, dtype=torch.float64)))
