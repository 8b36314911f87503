"""The exact, truncated singular value decomposition of a pretrained weight (Eq. 1)."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from srlora_pl.lowrank.method import AdaptedNetwork, ShowProgress, Sources, generator_for
from srlora_pl.lowrank.starts import subspace
from srlora_pl.util.cache import fingerprint, keep
from srlora_pl.util.errors import UserError
from srlora_pl.util.precision import float64_device, full_precision, trained_dtype

# Below this share of the largest singular value a direction is rounding noise of the stored weight.
_RANK_TOLERANCE = 1e-6
# The Gram matrix squares the condition number: fp64 leaves its eigenvectors fewer than eight digits beyond this.
_GRAM_LIMIT = 1e-4


@dataclass(frozen=True)
class Spectrum:
    """The first k singular triplets of W0, sigma descending: ``U`` (out, k), ``sigma`` (k,), ``Vh`` (k, in).

    k is at most what was asked for, and ends where the spectrum does (sigma_k < 1e-6 sigma_1).
    """

    U: Tensor
    sigma: Tensor
    Vh: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor, directions: int, name: str = "the weight") -> "Spectrum":
        """The first ``directions`` triplets of ``weight`` (out, in), computed in fp64.

        They are kept on the CPU in its dtype, or in float32 where that is half precision.

        Raises:
            UserError: if the weight, which errors call ``name``, is zero or holds a NaN or an infinity.
        """
        W = weight.to(float64_device(weight.device)).double()
        if not torch.isfinite(W).all():
            raise UserError(f"{name} holds NaN or infinity, load a sound checkpoint of the backbone")
        if not W.any():
            raise UserError(f"{name} is zero and has no singular directions, leave it out with exclude_modules")
        k = min(directions, *W.shape)
        found = subspace.leading(W, k, generator_for(name, 0)) if subspace.pays(min(W.shape), k) else None
        U, sigma, Vh = found or _exact_svd(W, k)
        k = int((sigma[:k] >= _RANK_TOLERANCE * sigma[0]).sum())
        U, sigma, Vh = U[:, :k], sigma[:k], Vh[:k]
        # A pair of vectors is defined up to a common sign: take the one where the largest entry of u is positive, so
        # that a run does not depend on the LAPACK at hand.
        sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
        U, Vh = U * sign, Vh * sign.T
        return cls(*(t.to(trained_dtype(weight.dtype)).cpu() for t in (U, sigma, Vh))).first(k)

    def __len__(self) -> int:
        return len(self.sigma)

    def require(self, count: int, name: str) -> None:
        """Refuse a spectrum of fewer than ``count`` triplets, that of the matrix ``name``."""
        if len(self) < count:
            raise UserError(
                f"the start needs {count} singular directions of {name}, which has {len(self)}: lower rank or give "
                "this layer its own in rank_pattern"
            )

    def first(self, count: int) -> "Spectrum":
        """The first ``count`` triplets, in memory of their own: a view would keep the whole decomposition alive."""
        parts = self.U[:, :count], self.sigma[:count], self.Vh[:count]
        return Spectrum(*(part.clone(memory_format=torch.contiguous_format) for part in parts))

    def pairs(self, first: int, count: int, scaling: float, like: Tensor) -> tuple[Tensor, Tensor]:
        """B (out, count) and A (count, in) along directions ``first`` to ``first + count`` (Eq. 2, Eq. 11).

        ``scaling * B @ A`` is the part of W0 along them: both factors carry sqrt(sigma / scaling).
        """
        chosen = slice(first, first + count)
        root = (self.sigma[chosen] / scaling).sqrt()
        B, A = self.U[:, chosen] * root, root[:, None] * self.Vh[chosen]
        return B.to(like.device, like.dtype), A.to(like.device, like.dtype)


def _exact_svd(W: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first k singular triplets of W, at least."""
    U, sigma, Vh = _gram_svd(W, k)
    return (U, sigma, Vh) if sigma[-1] >= _GRAM_LIMIT * sigma[0] else torch.linalg.svd(W, full_matrices=False)


def _gram_svd(W: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first k singular triplets of W by the eigenvectors of its smaller Gram matrix, much faster than svd."""
    if W.shape[0] < W.shape[1]:
        V, sigma, Uh = _gram_svd(W.T, k)
        return Uh.T, sigma, V.T
    values, V = torch.linalg.eigh(W.T @ W)
    sigma, V = values[-k:].flip(0).clamp(min=0).sqrt(), V[:, -k:].flip(1)
    return (W @ V) / sigma.clamp(min=torch.finfo(W.dtype).tiny), sigma, V.T


def spectra(progress: ShowProgress = iter, cache: Path | None = None) -> Sources:
    """The source of `Adaptation.start` for methods that start from spectra: the first triplets of every matrix.

    Args:
        progress: wraps the list of matrices to show how far the computation is.
        cache: a folder that keeps the spectra for the next start on these weights.
    """

    def find(adaptation: AdaptedNetwork) -> dict[str, Spectrum]:
        return adaptation.run_on_rank_zero(lambda: find_here(adaptation))

    def find_here(adaptation: AdaptedNetwork) -> dict[str, Spectrum]:
        matrices = adaptation.matrices
        directions = {matrix.name: adaptation.method.directions(matrix) for matrix in matrices}
        dtype = str(trained_dtype(matrices[0].weight.dtype)).removeprefix("torch.")
        file = None if cache is None else SpectrumCache(cache, f"{adaptation.weights.fingerprint}-{dtype}")
        if file is not None and (found := file.read(directions)) is not None:
            return found
        with full_precision():
            found = {}
            for matrix in progress(matrices):
                W0 = adaptation.weights.pretrained_weight(matrix)
                found[matrix.name] = Spectrum.of(W0, directions[matrix.name], f"the weight of {matrix.name}")
        if file is not None:
            file.write(found, directions)
        return found

    return find


class SpectrumCache:
    """The spectra of one network's weights, as a safetensors file.

    A file is taken only if it says that it was made of these very weights and its content has the digest that it
    names: one that is truncated, damaged or another network's counts as absent.

    Args:
        folder: made when it is needed.
        weights: a digest of the weights, their names and their dtype; it names the file.
    """

    def __init__(self, folder: Path, weights: str) -> None:
        self.file, self.weights = folder / f"{weights}.safetensors", weights

    def read(self, directions: Mapping[str, int]) -> dict[str, Spectrum] | None:
        """The spectra of the named matrices, each of that many directions; None if the file cannot give them."""
        try:
            with safe_open(self.file, "pt") as content:
                header = content.metadata() or {}
                tensors = {name: content.get_tensor(name) for name in sorted(content.keys())}
        except (OSError, SafetensorError):
            return None
        if (header.get("weights"), header.get("content")) != (self.weights, fingerprint(tensors)):
            return None
        asked = json.loads(header["asked"])
        if any(asked.get(name, 0) < count for name, count in directions.items()):
            return None
        found = {name: Spectrum(*(tensors[f"{name}/{part}"] for part in _PARTS)) for name in directions}
        return {name: spectrum.first(directions[name]) for name, spectrum in found.items()}

    def write(self, spectra: Mapping[str, Spectrum], directions: Mapping[str, int]) -> None:
        """Keep ``spectra``, of which ``directions`` were asked for; a folder that takes no file is only warned of."""
        parts = {f"{name}/{part}": getattr(spectrum, part) for name, spectrum in spectra.items() for part in _PARTS}
        tensors = dict(sorted(parts.items()))
        header = {"weights": self.weights, "content": fingerprint(tensors), "asked": json.dumps(dict(directions))}
        try:
            keep(tensors, self.file, header)
        except OSError as error:
            warnings.warn(f"the singular directions cannot be kept in {self.file.parent}: {error}", stacklevel=2)


_PARTS = ("U", "sigma", "Vh")
