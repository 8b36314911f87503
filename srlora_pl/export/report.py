"""What an export wrote, and whether that is what was trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from srlora_pl.lowrank.delta import Factors, overall_error
from srlora_pl.util.errors import UserError


@dataclass(frozen=True)
class Report:
    """What an export wrote.

    Attributes:
        folder: where.
        size: of its weights, in bytes.
        dense_size: of the merged weights, in bytes.
        difference: the largest absolute difference between outputs of the trained model and of the files.
        largest: the largest absolute output of the trained model.
        factors: of the PEFT adapter, by layer.
        notes: further sentences for the user.
        files: the names of all files, sorted.
        compared: what ``difference`` and ``largest`` are of, ``output``, or ``weight`` where no inputs are known.
    """

    folder: Path
    size: int
    dense_size: int
    difference: float
    largest: float
    factors: Mapping[str, Factors] = field(default_factory=dict)
    notes: Sequence[str] = ()
    files: Sequence[str] = ()
    compared: str = "output"

    def lines(self) -> list[str]:
        """The report in words."""
        lines = []
        if any(factors.lost for factors in self.factors.values()):
            lines += [f"{name}: rank {f.rank}, relative error {f.error:.2e}" for name, f in self.factors.items()]
            lines.append(f"relative error of all changes together: {overall_error(self.factors.values()):.2e}")
        lines += self.notes
        size, dense = (f"{size / 2**20:.1f} MiB" for size in (self.size, self.dense_size))
        if self.factors:
            ranks = sorted({factors.rank for factors in self.factors.values()})
            span = " to ".join(map(str, dict.fromkeys([ranks[0], ranks[-1]])))
            lines.append(f"adapter of rank {span}: {size}, the merged weights would take {dense}")
        if self.factors and self.size > self.dense_size:
            lines.append("--format merged is the smaller file here, and the faster model")
        lines.append(
            f"largest {self.compared} difference to the trained model: {self.difference:.1e} ({self.compared}s up to "
            f"{self.largest:.1e})"
        )
        return [*lines, f"written to {self.folder}" + ("" if self.factors else f" ({size})")]


def size_of(net: nn.Module) -> int:
    return sum(value.nbytes for value in net.state_dict().values())


def require_finite(net: nn.Module) -> None:
    """Refuse a network with a value that is no number."""
    for name, value in net.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"{name} holds NaN or infinity, so nothing was written: export an earlier checkpoint")


def compare(found: Tensor, expected: Tensor, trained: Tensor) -> tuple[float, float]:
    """The largest difference of ``found`` and the ``trained`` outputs or weights, and the largest of these.

    Raises:
        UserError: ``found`` is not what is ``expected``.
    """
    largest = float(trained.abs().max())
    allowed = 1e-4 * largest + 1e-6  # a deep network's rounding in float32 comes to about 1e-5 of its outputs
    if not (distance := float((found - expected).abs().max())) <= allowed:
        raise UserError(
            f"the exported files differ from the trained model by {distance:.1e}, float32 explains no more than "
            f"{allowed:.1e}, so nothing was written: please report this with the model's name"
        )
    return float((found - trained).abs().max()), largest
