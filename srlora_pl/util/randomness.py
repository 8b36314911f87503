"""All randomness of a run as a function of its seed and a position, so that any run can be continued exactly.

Nothing here keeps state: the order of an epoch, the augmentation of a sample and the dropout masks of a step
are drawn from (seed, stream, position). A resumed run that knows its position therefore draws the same numbers.
"""

import os
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio, odd


def run_seed() -> int:
    """The seed that ``seed_everything`` was called with (Lightning keeps it in ``PL_GLOBAL_SEED``), or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def derive(seed: int, *keys: int) -> int:
    """A 63-bit seed that depends on every one of ``keys`` (splitmix64, Steele et al. 2014)."""
    state = seed & _MASK
    for key in keys:
        state = _mix(state ^ _mix((key + _GOLDEN) & _MASK))
    return state >> 1


def _mix(z: Any) -> Any:
    """splitmix64's finaliser of an int below 2**64, or of uint64s, whose products wrap by themselves."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def reseed(seed: int, position: int, rank: int = 0) -> None:
    """Seed Python, NumPy and torch (all devices) for the micro-batch at ``position`` of a run."""
    value = derive(seed, position, rank)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    torch.manual_seed(value)


def uniform(seed: int, keys: Tensor, draws: int) -> Tensor:
    """Random numbers in [0, 1) that depend on nothing but ``seed`` and each row of ``keys``.

    ``keys``: int64, (n, k), on the CPU, for images (epoch, sample) a row. Returns float64, (n, draws), on the CPU.
    The same splitmix64 as `derive`, over whole arrays.
    """
    state = np.full(len(keys), derive(seed), np.uint64)
    for column in keys.numpy().astype(np.uint64).T:
        state = _mix(state ^ _mix(column + _GOLDEN))
    counter = np.arange(1, draws + 1, dtype=np.uint64) * _GOLDEN
    bits = _mix(state[:, None] + counter)
    return torch.from_numpy((bits >> 11) * 2.0**-53)
