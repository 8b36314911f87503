"""The leading singular triplets of a wide matrix by block subspace iteration, where they are few.

The block is filtered with Chebyshev polynomials of the Gram matrix G = W^T W (Zhou, Saad, Tiago and Chelikowsky 2006),
then turned to Ritz vectors, until every triplet satisfies ``||W v - s u|| < 1e-6 s`` and ``||W^T u - s v|| < 1e-6 s``.

Small residuals show that these are singular triplets, not that they are the leading ones: a direction to which the
start happens to be orthogonal never appears. So the result is proved. With P the projection onto the complement of the
k vectors, the largest eigenvalue of P G P is at least the (k + 1)-th of G (Courant and Fischer), and it is below mu if
mu I - P G P has a Cholesky factorization, which costs a fraction of the iteration. mu is the k-th found eigenvalue and
1e-5 of it: what else there is differs from the last direction by less than rounding of its place in the order. Inside a
cluster of equal singular values any basis is as good as another; they need no gap.
"""

import math

import torch
from torch import Tensor

_TOLERANCE = 1e-6  # of the residuals, relative to the singular value
_SLACK = 1e-5  # of the proof, relative to the last eigenvalue
_DEGREE = 8  # of a polynomial: lower ones need more Ritz vectors, higher ones overshoot
_ROUNDS = 20  # flat spectra of width 4,096 need 8
_GROWTH = 1e10  # of the largest eigenvalue over the damped ones in one round, else the others drown in rounding
_CLUSTER = 0.99  # of the last wanted eigenvalue: what is above it grows, though a cluster be larger than the block
_FLOOR = 1e-8  # below this share of the largest eigenvalue, those of G have no digits left


def pays(width: int, count: int) -> bool:
    """Whether ``count`` triplets of a matrix with the smaller side ``width`` are found faster here than by eigh.

    By measurement (`benchmarks/spectrum_time.py`), on flat spectra, which are the slowest.
    """
    return width >= 2048 and 16 * count <= width


def leading(W: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor] | None:
    """The first ``count`` triplets U (out, k), sigma (k,), Vh (k, in) of ``W``; None where they cannot be proved.

    Args:
        W: (out, in), float64.
        generator: of the start, on the CPU.
    """
    if W.shape[0] < W.shape[1]:
        found = leading(W.T, count, generator)
        return found and (found[2].T, found[1], found[0].T)
    G = _gram(W)
    V = _invariant(G, count, generator)
    if V is None or not _is_leading(G, V):
        return None
    WV = W @ V
    sigma = WV.norm(dim=0)
    U = WV / sigma
    residual = torch.maximum((WV - U * sigma).norm(dim=0), (W.T @ U - V * sigma).norm(dim=0))
    return (U, sigma, V.T) if bool((residual < _TOLERANCE * sigma).all()) else None


def _gram(W: Tensor) -> Tensor:
    """W^T W, (in, in), half of it computed."""
    G = W.new_empty(W.shape[1], W.shape[1])
    for begin in range(0, len(G), width := max(len(G) // 8, 1)):
        rows = slice(begin, begin + width)
        torch.mm(W[:, rows].T, W[:, begin:], out=G[rows, begin:])
        G[begin:, rows] = G[rows, begin:].T
    return G


def _invariant(G: Tensor, count: int, generator: torch.Generator) -> Tensor | None:
    """Eigenvectors V (n, count) of ``G`` (n, n), eigenvalues descending; None where too many rounds went by."""
    size = min(count + max(16, count // 2), len(G))
    start = torch.randn(len(G), size, dtype=G.dtype, generator=generator).to(G.device)
    Q = torch.linalg.qr(G @ start).Q
    for _ in range(_ROUNDS):
        GQ = G @ Q
        values, vectors = torch.linalg.eigh(Q.T @ GQ)
        values, vectors = values.flip(0), vectors.flip(1)
        if values[count - 1] < _FLOOR * values[0]:
            return None
        Q, GQ = Q @ vectors, GQ @ vectors
        right = (GQ - Q * values).norm(dim=0) < _TOLERANCE * values / 2  # as much below as sigma is above its square
        done = int(right[:count].cumprod(0).sum())  # these stay, and only help to turn the others
        if done == count:
            return Q[:, :count]
        damped = torch.minimum(values[-1], _CLUSTER * values[count - 1])
        filtered = _filtered(G, Q[:, :done], Q[:, done:], GQ[:, done:], values[done:], damped)
        Q = torch.linalg.qr(torch.cat([Q[:, :done], filtered], 1)).Q
    return None


def _filtered(G: Tensor, V: Tensor, X: Tensor, GX: Tensor, values: Tensor, damped: Tensor) -> Tensor:
    """T(P G P) X of the polynomial T that is small on [0, ``damped``] and grows fastest beyond.

    Args:
        V: (n, l), what P takes out.
        X: (n, b), orthonormal Ritz vectors.
        GX: G X.
        values: their Ritz values, (b,), descending.
    """
    damped = damped.clamp(min=torch.finfo(G.dtype).eps * values[0])
    largest = float(2 * values[0] / damped - 1)
    degree = min(_DEGREE, int(math.log(2 * _GROWTH) / math.acosh(max(largest, 1 + 1e-12))))
    before, now = X, (2 / damped) * GX - X
    for _ in range(degree - 1):
        product = G @ now
        product -= V @ (V.T @ product)
        before, now = now, 2 * ((2 / damped) * product - now) - before
    return now / now.norm(dim=0).clamp(min=torch.finfo(G.dtype).tiny)


def _is_leading(G: Tensor, V: Tensor) -> bool:
    """Whether no vector orthogonal to ``V`` (n, k), orthonormal, has a larger value than the last of V; see above."""
    GV = G @ V
    inner = V.T @ GV
    mixed = V @ GV.T
    rest = G - mixed - mixed.T + V @ inner @ V.T
    rest.neg_().diagonal().add_(inner[-1, -1] * (1 + _SLACK))
    return int(torch.linalg.cholesky_ex(rest).info) == 0
