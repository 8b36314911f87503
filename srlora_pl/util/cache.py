"""Where things are kept between runs that can always be made again."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from srlora_pl.util.files import replacing


def cache_folder(kind: str) -> Path:
    """``srlora_pl/<kind>`` in the user's cache: below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srlora_pl" / kind


def keep(tensors: Mapping[str, Tensor], file: Path, header: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all: several processes may do so at once, and any may be killed."""
    with replacing(file) as new:
        new.write(save(dict(tensors), header))


def fingerprint(weights: dict[str, Tensor]) -> str:
    """A digest of names, shapes and values: equal only for the same weights to the bit, in fp32 as in fp64."""
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        if hasattr(weight, "packed"):  # in four bits, see lowrank/nf4.py
            digest.update(fingerprint({"packed": weight.packed, "scales": weight.scales}).encode())
            continue
        values = weight.detach().cpu()
        single = values.float().contiguous()
        digest.update(single.numpy().data)
        if values.dtype == torch.float64 and (rest := values - single).any():
            digest.update(rest.contiguous().numpy().data)
    return digest.hexdigest()
