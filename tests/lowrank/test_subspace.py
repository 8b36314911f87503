"""Leading triplets by subspace iteration: those of an exact decomposition, proved, or none at all."""

import pytest
import torch
from torch import Tensor

from srlora_pl.lowrank import Spectrum
from srlora_pl.lowrank.starts import spectrum, subspace

N, K = 200, 12


def matrix(sigma: Tensor, out: int = 300, seed: int = 0) -> Tensor:
    """A matrix (out, n) with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    n = len(sigma)
    U = torch.linalg.qr(torch.randn(out, n, dtype=torch.float64, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    return U * sigma @ V.T


def found(W: Tensor, k: int = K, seed: int = 1):
    return subspace.leading(W, k, torch.Generator().manual_seed(seed))


INDEX = torch.arange(N, dtype=torch.float64)
SPECTRA = {
    "decaying": 0.97**INDEX,
    "steep": 0.5**INDEX,  # the last of K at 5e-4
    "power law": (1 + INDEX) ** -1.0,
    "flat": 1 - 1e-3 * INDEX,
    "one far above": torch.cat([torch.tensor([1e3], dtype=torch.float64), 0.99 ** INDEX[1:]]),
    "cluster at the front": torch.where(INDEX < 5, 1 + 1e-9 * INDEX, 0.5 * 0.98**INDEX),
    "cluster across the border": torch.where((INDEX > 8) & (INDEX < 30), 0.5 + 1e-10 * INDEX, 0.97**INDEX),
    "all equal": torch.ones(N, dtype=torch.float64),
    "little more than k": torch.where(INDEX < K + 3, 0.9**INDEX, 0),
}


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kind", SPECTRA)
def test_they_are_the_leading_triplets(kind, wide):
    sigma = SPECTRA[kind].sort(descending=True).values
    W = matrix(sigma)
    W = W.T if wide else W
    U, values, Vh = found(W)
    torch.testing.assert_close(values, sigma[:K], rtol=1e-9, atol=0)
    for residual in (W @ Vh.T - U * values, W.T @ U - Vh.T * values):
        assert bool((residual.norm(dim=0) < 1e-6 * values).all())
    for vectors in (U, Vh.T):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(K, dtype=torch.float64), rtol=0, atol=1e-8)
    best = torch.linalg.svd(W, full_matrices=False)
    below = sigma[:K] > 1.001 * sigma[K]  # where the border cuts through a cluster, its part of it is free
    projections = (vectors[:, : int(below.sum())] for vectors in (Vh.T, best.Vh.T))
    ours, exact = (vectors @ vectors.T for vectors in projections)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-4)


def test_the_same_name_gives_the_same_bits():
    W = matrix(SPECTRA["decaying"])
    assert all(torch.equal(one, other) for one, other in zip(found(W), found(W), strict=True))
    assert not torch.equal(found(W)[2], found(W, seed=2)[2])


@pytest.mark.parametrize("kind", ["less than k", "far down"])
def test_what_the_gram_matrix_cannot_tell_is_left_to_an_exact_decomposition(kind):
    sigma = torch.where(INDEX < 8, 1.0, 0) if kind == "less than k" else 0.3**INDEX
    assert found(matrix(sigma.double())) is None


def test_a_direction_that_the_start_misses_is_noticed(monkeypatch):
    """Residuals would be small: zeros in the start stay zeros."""
    W = torch.diag(1.0 / (1 + INDEX))
    draw = torch.randn

    def missing(*args, **kwargs):
        start = draw(*args, **kwargs)
        start[3] = 0
        return start

    assert found(W) is not None
    monkeypatch.setattr(torch, "randn", missing)
    assert found(W) is None


def test_a_spectrum_too_slow_to_separate_is_given_up(monkeypatch):
    monkeypatch.setattr(subspace, "_ROUNDS", 1)
    assert found(matrix(SPECTRA["flat"])) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["decaying", "flat", "cluster at the front", "less than k"])
def test_a_spectrum_of_a_wide_matrix_is_the_exact_one(kind, dtype, monkeypatch):
    sigma = torch.where(INDEX < 8, 0.8**INDEX, 0) if kind == "less than k" else SPECTRA[kind]
    W = matrix(sigma.sort(descending=True).values).to(dtype)
    exact = Spectrum.of(W, K)
    monkeypatch.setattr(subspace, "pays", lambda *_: True)
    other = Spectrum.of(W, K)
    assert len(other) == len(exact) == (8 if kind == "less than k" else K)
    assert other.U.dtype == dtype
    torch.testing.assert_close(other.sigma, exact.sigma, rtol=1e-6, atol=0)
    torch.testing.assert_close(  # a cluster's own basis is free
        (other.U * other.sigma) @ other.Vh, (exact.U * exact.sigma) @ exact.Vh, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(("shape", "k"), [((3072, 768), 32), ((1536, 576), 16), ((2048, 2048), 129)])
def test_small_widths_and_many_directions_stay_exact_to_the_bit(shape, k, monkeypatch):
    assert not subspace.pays(min(shape), k)
    assert subspace.pays(3072, 128)


@pytest.mark.slow
@pytest.mark.parametrize("k", [32, 128])
def test_a_random_matrix_of_full_width(k, monkeypatch):
    monkeypatch.setattr(spectrum, "_exact_svd", lambda *_: pytest.fail("it did not converge"))
    W = torch.randn(2048, 2304, generator=torch.Generator().manual_seed(0))
    sigma = Spectrum.of(W, k).sigma
    torch.testing.assert_close(sigma, torch.linalg.svdvals(W.double())[:k].float(), rtol=1e-6, atol=0)
