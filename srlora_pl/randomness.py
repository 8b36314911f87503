"""All randomness of a run as a function of its seed and a position, so that any run can be continued exactly.

Nothing here keeps state: the order of an epoch, the augmentation of a sample and the dropout masks of a step
are drawn from (seed, stream, position). A resumed run that knows its position therefore draws the same numbers.
"""

import os
import random

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def run_seed() -> int:
    """The seed that ``seed_everything`` was called with (Lightning keeps it in ``PL_GLOBAL_SEED``), or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def derive(seed: int, *keys: int) -> int:
    """A 63-bit seed that depends on every one of ``keys`` (splitmix64, Steele et al. 2014)."""
    state = seed & _MASK
    for key in keys:
        state = _mix(state ^ _mix((key + 0x9E3779B97F4A7C15) & _MASK))
    return state >> 1


def _mix(z: int) -> int:
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

    ``keys``: int64, (n, k), for images (epoch, sample) a row. Returns float64, (n, draws), on ``keys``'s device.
    The same splitmix64 finaliser as `derive`, over whole tensors.
    """
    state = torch.full((len(keys),), derive(seed), dtype=torch.int64, device=keys.device)
    for column in keys.unbind(1):
        state = _mix_tensor(state ^ _mix_tensor(column + _signed(0x9E3779B97F4A7C15)))
    counter = torch.arange(1, draws + 1, device=keys.device) * _signed(0x9E3779B97F4A7C15)
    bits = _mix_tensor(state[:, None] + counter)
    return _shift(bits, 11).double() * 2.0**-53


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix_tensor(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)
