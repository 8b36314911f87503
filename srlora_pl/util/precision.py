"""How exactly float32 matrices are multiplied."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

_BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


class MatmulPrecision(NamedTuple):
    """What the process is set to: by `torch.set_float32_matmul_precision`, or else by each backend's own setting.

    Once a backend has been set by its own name, torch refuses to say the first.
    """

    of_all: str | None
    of_each: tuple[str, ...]

    @classmethod
    def now(cls) -> "MatmulPrecision":
        try:
            of_all = torch.get_float32_matmul_precision()
        except RuntimeError:
            of_all = None
        return cls(of_all, tuple(backend.fp32_precision for backend in _BACKENDS))

    def restore(self) -> None:
        if self.of_all is not None:
            torch.set_float32_matmul_precision(self.of_all)
            return
        for backend, precision in zip(_BACKENDS, self.of_each, strict=True):
            backend.fp32_precision = precision


def float64_device(device: torch.device) -> torch.device:
    """Where to compute in float64 what is on ``device``: there, or on the CPU if it may not be able to.

    Apple's GPUs are not, and not even to convert; so first move, then convert: ``x.to(float64_device(...)).double()``.
    """
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32, no reduced matmul precision, no autocast: what is fused must equal what is taken away."""
    before = MatmulPrecision.now()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        before.restore()
