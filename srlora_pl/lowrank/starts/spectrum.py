"""The exact, truncated singular value decomposition of a pretrained weight (Eq. 1)."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from srlora_pl.lowrank.linear import Matrix
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

    def scattered(self, first: int, generator: torch.Generator) -> "Spectrum":
        """With random unit vectors in place of the singular ones from ``first`` on, of the same sigma."""
        U, V = self.U.clone(), self.Vh.T.clone()
        for vectors in (U, V):
            drawn = torch.randn(vectors[:, first:].shape, dtype=vectors.dtype, generator=generator)
            vectors[:, first:] = drawn / drawn.norm(dim=0)
        return Spectrum(U, self.sigma, V.T)

    def pairs(
        self, first: int, count: int, scaling: float, like: Tensor, size: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """B (out, count) and A (count, in) along directions ``first`` to ``first + count`` (Eq. 2, Eq. 11).

        ``scaling * B @ A`` is the part of W0 along them: both factors carry sqrt(sigma / scaling).

        Args:
            size: a scalar on ``like``'s device that takes the place of every sigma.
        """
        chosen = slice(first, first + count)
        sigma = self.sigma[chosen] if size is None else torch.ones_like(self.sigma[chosen])
        root = (sigma / scaling).sqrt()
        B, A = self.U[:, chosen] * root, root[:, None] * self.Vh[chosen]
        B, A = B.to(like.device, like.dtype), A.to(like.device, like.dtype)
        return (B, A) if size is None else (B * size.sqrt(), A * size.sqrt())


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
        cache: a folder that keeps the spectra, for the next start on these weights and for this run: in memory is then
            that of one matrix at a time.
    """

    def find(adaptation: AdaptedNetwork) -> "KeptSpectra":
        dtype = str(adaptation.matrices[0].dtype).removeprefix("torch.")
        folder = None if cache is None else SpectrumCache(cache, f"{adaptation.weights.fingerprint}-{dtype}")
        found = KeptSpectra(folder)
        for matrix in progress(adaptation.matrices):
            once = partial(find_one, adaptation, matrix, folder)
            found.take(matrix.name, adaptation.run_on_rank_zero(once), adaptation.method.directions(matrix))
        return found

    def find_one(adaptation: AdaptedNetwork, matrix: Matrix, folder: "SpectrumCache | None") -> Spectrum:
        count = adaptation.method.directions(matrix)
        if folder is not None and (found := folder.read(matrix.name, count)) is not None:
            return found
        with full_precision():
            W0 = adaptation.weights.pretrained_weight(matrix)
            found = Spectrum.of(W0, count, f"the weight of {matrix.name}")
        if folder is not None:
            folder.write(matrix.name, found, count)
        return found

    return find


class SpectrumCache:
    """The spectra of one network's weights, each in a safetensors file of its own.

    A file is taken only if it says that it was made of these very weights and this matrix, and its content has the
    digest that it names: one that is truncated, damaged or another's counts as absent.

    Args:
        folder: made when it is needed.
        weights: a digest of the weights, their names and their dtype; it names a folder in this one.
    """

    def __init__(self, folder: Path, weights: str) -> None:
        self.folder, self.weights = folder / weights, weights
        self._read: dict[str, tuple[int, int]] = {}  # sizes and times of files whose digest was right
        self._takes_files = True

    def file(self, name: str) -> Path:
        """Where the spectrum of the matrix ``name`` is kept."""
        return self.folder / f"{quote(name, safe='')}.safetensors"

    def read(self, name: str, directions: int) -> Spectrum | None:
        """The spectrum of the matrix ``name``, of that many directions; None if its file cannot give it."""
        file = self.file(name)
        try:
            status = file.stat()
            with safe_open(file, "pt") as content:
                header = content.metadata() or {}
                tensors = {part: content.get_tensor(part) for part in _PARTS}
        except (OSError, SafetensorError):
            return None
        seen = status.st_size, status.st_mtime_ns
        if self._read.get(name) != seen and header.get("content") != fingerprint(tensors):
            return None
        if (header.get("weights"), header.get("matrix")) != (self.weights, name) or int(header["asked"]) < directions:
            return None
        self._read[name] = seen
        return Spectrum(**tensors).first(directions)

    def write(self, name: str, spectrum: Spectrum, directions: int) -> None:
        """Keep ``spectrum``, of which ``directions`` were asked for; a folder that takes no file is only warned of."""
        tensors = {part: getattr(spectrum, part) for part in _PARTS}
        header = {"weights": self.weights, "matrix": name, "content": fingerprint(tensors), "asked": str(directions)}
        try:
            if self._takes_files:
                keep(tensors, self.file(name), header)
        except OSError as error:
            self._takes_files = False
            warnings.warn(f"the singular directions cannot be kept in {self.folder}: {error}", stacklevel=2)


class KeptSpectra(Mapping[str, Spectrum]):
    """Spectra by matrix: read from their files whenever they are asked for, or in memory where no file keeps them.

    Attributes:
        lengths: how many triplets each has.
    """

    def __init__(self, cache: SpectrumCache | None) -> None:
        self.lengths: dict[str, int] = {}
        self._cache = cache
        self._asked: dict[str, int] = {}
        self._in_memory: dict[str, Spectrum] = {}

    def take(self, name: str, spectrum: Spectrum, directions: int) -> None:
        """Add ``spectrum``, of which ``directions`` were asked for; in each process, whose folder may be its own."""
        self.lengths[name], self._asked[name] = len(spectrum), directions
        held = None
        if self._cache is not None and (held := self._cache.read(name, directions)) is None:
            self._cache.write(name, spectrum, directions)
            held = self._cache.read(name, directions)
        if held is None or not all(torch.equal(getattr(held, part), getattr(spectrum, part)) for part in _PARTS):
            self._in_memory[name] = spectrum

    def __getitem__(self, name: str) -> Spectrum:
        if self._cache is None or name in self._in_memory:
            return self._in_memory[name]
        if (spectrum := self._cache.read(name, self._asked[name])) is not None:
            return spectrum
        raise UserError(
            f"{self._cache.file(name)} held singular directions for this run and is gone or damaged: start the run "
            "again, or go on from its last checkpoint"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)


def lengths_of(spectra: Mapping[str, Spectrum]) -> dict[str, int]:
    """How many triplets each of ``spectra`` has, by matrix."""
    return spectra.lengths if isinstance(spectra, KeptSpectra) else {name: len(each) for name, each in spectra.items()}


_PARTS = ("U", "sigma", "Vh")
