"""LoRA-GA (arXiv 2407.05000): its start, and its first step."""

from functools import partial

import pytest
import torch
from torch import Tensor

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, LoRAGA, gradients
from srlora_pl.lowrank.linear import Matrix
from tests.helpers.errors import mentions
from tests.helpers.toys import full_rank_losses, toy_batches, toy_net

RANK = 3


def started(seed: int = 0, **settings) -> tuple[Adaptation, dict[str, Tensor]]:
    """The adaptation after its start, and the gradients (out, in) of the mean loss at W0 by layer."""
    plain, net, batches = (
        make(dtype=torch.float64) for make in (toy_net, toy_net, lambda dtype: toy_batches(3, dtype=dtype))
    )
    torch.cat([full_rank_losses(plain, batch) for batch in batches]).mean().backward()
    torch.manual_seed(seed)
    adaptation = Adaptation(net, LoRAGA(RANK, alpha=6.0, **settings), ["head"])
    adaptation.start(gradients(partial(full_rank_losses, net), batches))
    return adaptation, {name: plain.get_parameter(f"{name}.weight").grad for name in adaptation.layers}


def svd(matrix: Matrix, G: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(matrix.of_weight(G[matrix.layer_name]), full_matrices=False)


def W0_of(matrix: Matrix) -> Tensor:
    return matrix.of_weight(toy_net(dtype=torch.float64).get_parameter(f"{matrix.layer_name}.weight").detach())


PLACES = {"ArB2r": (range(3), range(3, 6)), "A2rBr": (range(3, 6), range(3)), "ArBr": (range(0, 6, 2), range(1, 6, 2))}


@pytest.mark.parametrize("direction", PLACES)
def test_the_pairs_lie_along_the_directions_of_the_gradient(direction: str) -> None:
    adaptation, G = started(direction=direction, scale="unit")
    of_A, of_B = map(list, PLACES[direction])
    for matrix in adaptation.matrices:
        U, _, Vh = svd(matrix, G)
        # Up to the sign that a pair of singular vectors shares.
        torch.testing.assert_close((matrix.A @ Vh[of_A].T).abs(), torch.eye(3).double(), rtol=0, atol=1e-10)
        torch.testing.assert_close((U[:, of_B].T @ matrix.B).abs(), torch.eye(3).double(), rtol=0, atol=1e-10)
        torch.testing.assert_close(
            matrix.weight + matrix.scaling * matrix.B @ matrix.A, W0_of(matrix), rtol=0, atol=1e-13
        )


def test_random_directions_are_halves_and_depend_on_the_seed() -> None:
    one, G = started(1, direction="random", scale="unit")
    same, other = started(1, direction="random", scale="unit")[0], started(2, direction="random", scale="unit")[0]
    for matrix in one.matrices:
        U, _, Vh = svd(matrix, G)
        of_A = (matrix.A @ Vh[:6].T).abs().argmax(1).tolist()
        of_B = (U[:, :6].T @ matrix.B).abs().argmax(0).tolist()
        assert sorted(of_A + of_B) == list(range(6))
    assert all(torch.equal(a.A, b.A) for a, b in zip(one.matrices, same.matrices, strict=True))
    assert not all(torch.equal(a.A, b.A) for a, b in zip(one.matrices, other.matrices, strict=True))


def test_the_first_change_is_the_best_of_twice_the_rank() -> None:
    """With SGD dW = -lr s^2 c^2 [G]_2r to first order."""
    adaptation, G = started()
    lr, net = 1e-7, adaptation.net
    torch.cat([full_rank_losses(net, batch) for batch in toy_batches(3, dtype=torch.float64)]).mean().backward()
    before = {m: m.weight + m.scaling * m.B @ m.A for m in adaptation.matrices}
    for layer in adaptation.layers.values():
        for parameter in layer.adapter_parameters():
            parameter.data -= lr * parameter.grad
    for m in adaptation.matrices:
        U, sigma, Vh = svd(m, G)
        best = (U[:, :6] * sigma[:6]) @ Vh[:6]
        c = m.shape[0] ** 0.25 / 16**0.5
        changed = m.weight + m.scaling * m.B @ m.A - before[m]
        torch.testing.assert_close(changed / -lr, m.scaling**2 * c**2 * best, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", ["stable", "gd", "unit", "weights"])
def test_the_pairs_have_the_length_of_their_scale(scale: str) -> None:
    for matrix in started(scale=scale, gamma=9.0)[0].matrices:
        expected = {
            "stable": matrix.shape[0] ** 0.25 / 3,
            "gd": 1 / matrix.scaling,
            "unit": 1.0,
            "weights": float((torch.linalg.svdvals(W0_of(matrix))[:3] / matrix.scaling).sqrt().mean()),
        }[scale]
        for rows in (matrix.A, matrix.B.T):
            torch.testing.assert_close(
                rows.norm(dim=1), torch.full((3,), expected).double(), rtol=1e-7, atol=0
            )  # of the Gram matrix


@pytest.mark.parametrize("gamma", [1e-2, 1e6])
def test_clipped_pairs_take_no_more_off_a_weight_than_its_largest_entry(gamma: float) -> None:
    clipped, free = started(gamma=gamma, norm_clip=True)[0], started(gamma=gamma)[0]
    for matrix, other in zip(clipped.matrices, free.matrices, strict=True):
        offset, unclipped = ((m.scaling * m.B @ m.A).abs().max() for m in (matrix, other))
        torch.testing.assert_close(offset, torch.minimum(unclipped, W0_of(matrix).abs().max()), rtol=1e-12, atol=0)
        torch.testing.assert_close(
            matrix.weight + matrix.scaling * matrix.B @ matrix.A, W0_of(matrix), rtol=0, atol=1e-13
        )


def test_it_needs_twice_as_many_directions_as_pairs() -> None:
    net = toy_net(dtype=torch.float64)
    adaptation = Adaptation(net, LoRAGA(rank=7), ["head"])
    with pytest.raises(UserError, match=mentions("14", "blocks.0.qkv", "12")):
        adaptation.start(gradients(partial(full_rank_losses, net), toy_batches(3, dtype=torch.float64)))


@pytest.mark.parametrize("settings", [{"direction": "ArB"}, {"scale": "big"}, {"gamma": 0.0}, {"gradient_samples": -1}])
def test_settings_out_of_range_are_refused(settings) -> None:
    with pytest.raises(UserError, match=mentions(*settings)):
        LoRAGA(**settings)
