"""What a frozen weight W is made of: tensors that products read, behind `dense` and `add_`."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from srlora_pl.lowrank.ledger import Update
from srlora_pl.lowrank.nf4 import plain
from srlora_pl.lowrank.shards import own_rows, whole
from srlora_pl.util.errors import UserError
from srlora_pl.util.precision import trained_dtype


@dataclass(frozen=True)
class Plain:
    """A weight that is its own values.

    Attributes:
        weight: (out, in), which products read.
    """

    weight: Tensor

    def dense(self) -> Tensor:
        """W (out, in) in float32 at least: the weight itself where it has that precision, else a new tensor."""
        return self.weight.to(trained_dtype(self.weight.dtype))

    def copy_(self, W: Tensor) -> None:
        """Take the values of ``W`` (out, in)."""
        self.weight.copy_(W)

    def add_(self, update: Update, device: torch.device | None = None) -> None:
        """W += alpha B A, computed on ``device``, by default where the weight is."""
        W = self.dense()
        moved = W.to(device or W.device)
        update.add_to(moved)
        if moved is not self.weight:
            self.copy_(moved)

    def part(self, view: Callable[[Tensor], Tensor]) -> "Plain":
        """The same of some rows, of which ``view`` makes a view of a tensor (out, in)."""
        return Plain(view(self.weight))


@dataclass(frozen=True)
class Halves(Plain):
    """A float32 weight in two halves of its bits: the nearest bfloat16, which products read, and the rest.

    Attributes:
        weight: (out, in), bfloat16.
        rest: (out, in), int16, zero for a weight that is bfloat16 itself. Only a change of the weight needs it, so it
            may lie in other memory.
    """

    rest: Tensor

    def dense(self) -> Tensor:
        return join(self.weight, self.rest)

    def copy_(self, W: Tensor) -> None:
        upper, rest = split(W)
        self.weight.copy_(upper)
        self.rest.copy_(rest)

    def part(self, view: Callable[[Tensor], Tensor]) -> Plain:
        return Halves(view(self.weight), view(self.rest))


@dataclass(frozen=True)
class FourBits(Plain):
    """A weight in four bits, which never changes.

    Attributes:
        weight: an `NF4` (out, in).
        rows: makes the view of its values that is meant.
    """

    rows: Callable[[Tensor], Tensor] = Tensor.detach

    def dense(self) -> Tensor:
        return self.rows(plain(self.weight, trained_dtype(self.weight.dtype)))

    def copy_(self, W: Tensor) -> None:
        raise UserError("a weight in four bits (model.weights nf4) cannot change, take bfloat16 or float32")

    def part(self, view: Callable[[Tensor], Tensor]) -> Plain:
        return FourBits(self.weight, view)


class Split(Plain):
    """A weight whose rows lie in several processes: all of them must read and change it together.

    Reading gathers it. A change is one of each process's own rows, to the bit that of the whole weight.

    Args:
        kept: what the weight is made of, with its tensors split.
        view: of a tensor (out, in), on some of its rows.
    """

    def __init__(self, kept: Plain, view: Callable[[Tensor], Tensor] = lambda rows: rows) -> None:
        self.kept, self.view = kept, view

    def _each(self, change: Callable[[Tensor], Tensor]) -> Plain:
        return type(self.kept)(*(change(getattr(self.kept, field.name)) for field in fields(self.kept)))

    @contextmanager
    def _own(self) -> Iterator[Plain]:
        with ExitStack() as stack:
            yield self._each(lambda tensor: stack.enter_context(own_rows(tensor))).part(self.view)

    def dense(self) -> Tensor:
        return self.view(self._each(whole).dense())

    def copy_(self, W: Tensor) -> None:
        with self._own() as own:
            own.copy_(W)

    def add_(self, update: Update, device: torch.device | None = None) -> None:
        with self._own() as own:
            own.add_(update, device)

    def part(self, view: Callable[[Tensor], Tensor]) -> Plain:
        return Split(self.kept, view)


def split(W: Tensor) -> tuple[Tensor, Tensor]:
    """Finite float32 values as the nearest bfloat16 (ties away from zero), and an int16 that `join` takes."""
    bits = W.contiguous().view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def join(upper: Tensor, rest: Tensor) -> Tensor:
    """The float32 values, a new tensor on the device of ``upper``, that `split` took apart; equal to the bit."""
    bits = upper.contiguous().view(torch.int16).to(torch.int32) << 16
    return bits.add_(rest.to(upper.device)).view(torch.float32)
