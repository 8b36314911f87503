"""How exactly float32 matrices are multiplied."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

_BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


def restorer() -> Callable[[], None]:
    """A function that sets the process back to its present precision."""
    try:
        return partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    except RuntimeError:  # torch refuses to say it once a backend has been set by its own name
        return partial(_set_each, [backend.fp32_precision for backend in _BACKENDS])


def _set_each(precisions: Sequence[str]) -> None:
    for backend, precision in zip(_BACKENDS, precisions, strict=True):
        backend.fp32_precision = precision


def trained_dtype(frozen: torch.dtype) -> torch.dtype:
    """The type of what trains beside a weight of type ``frozen``: that type, but never less than float32."""
    return torch.promote_types(frozen, torch.float32)


def float64_device(device: torch.device) -> torch.device:
    """Where to compute in float64 what is on ``device``: there, or on the CPU if it may not be able to.

    Apple's GPUs are not, and not even to convert; so first move, then convert: ``x.to(float64_device(...)).double()``.
    """
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32, no reduced matmul precision, no autocast: what is fused must equal what is taken away."""
    restore = restorer()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        restore()
