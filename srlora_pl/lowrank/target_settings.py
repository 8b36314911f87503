"""The settings that say where adapters go, with which rank, strength and pace."""

import math
import re
from collections.abc import Iterable
from typing import ClassVar

from srlora_pl.util.errors import UserError

ALL_LINEAR = "all-linear"


def name_matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` (a name or a regular expression) is all of a dotted ``name`` or its last components."""
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None


def is_below(name: str, entries: Iterable[str]) -> bool:
    """Whether a dotted ``name`` is one of ``entries`` or lies in one."""
    return any(f"{name}.".startswith(f"{entry}.") for entry in entries)


class TargetSettings:
    """Where a method puts its adapters, how many pairs each has, and how strong they are.

    Args:
        rank: pairs per matrix, r.
        alpha: strength; the pairs act with s = alpha / rank.
        target_modules: ``all-linear`` (every linear inside the repeated blocks), or names or regular expressions
            that match the end of a layer's dotted name. ``query``, ``key`` and ``value`` also mean these parts of
            a fused qkv.
        exclude_modules: names or regular expressions of layers to leave out.
        layers: only these blocks, such as ``6-11`` or ``0,3-5``, or a list of their numbers.
        rank_pattern: ranks of their own for layers that match a name or regular expression; the first match counts.
        alpha_pattern: the same for alpha.
        dropout: on the input of the pairs, in [0, 1).
        use_rslora: s = alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).
        lr_ratio: of the learning rates of B and of all else (LoRA+, arXiv 2402.12354); the paper advises 16, with half
            of LoRA's own rate.

    Attributes:
        limits_rank: a rank above min(out, in) is refused.

    Raises:
        UserError: a value outside its range.
    """

    limits_rank: ClassVar[bool] = True

    def __init__(
        self,
        rank: int = 8,
        *,
        alpha: float = 8.0,
        target_modules: str | list[str] = ALL_LINEAR,
        exclude_modules: str | list[str] | None = None,
        layers: str | int | list[int] | None = None,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        lr_ratio: float = 1.0,
    ) -> None:
        self.rank, self.alpha, self.dropout, self.use_rslora = rank, alpha, dropout, use_rslora
        self.lr_ratio = lr_ratio
        self.target_modules = target_modules
        self.exclude_modules = [exclude_modules] if isinstance(exclude_modules, str) else exclude_modules or []
        self.layers, self._layers = layers, _parse_layers(layers)
        self.rank_pattern, self.alpha_pattern = rank_pattern or {}, alpha_pattern or {}
        for value, where in [
            (rank, "rank"),
            *((v, f"rank_pattern[{k!r}]") for k, v in self.rank_pattern.items()),
        ]:
            if not isinstance(value, int) or value < 1:
                raise UserError(f"method.{where} is {value}, it must be a whole number of at least 1")
        for alpha_, where in [
            (alpha, "alpha"),
            *((v, f"alpha_pattern[{k!r}]") for k, v in self.alpha_pattern.items()),
        ]:
            if not (alpha_ > 0 and math.isfinite(alpha_)):
                raise UserError(f"method.{where} is {alpha_}, it must be a finite number above 0")
        if not 0 <= dropout < 1:
            raise UserError(f"method.dropout is {dropout}, it must lie in [0, 1)")
        if not 0 < lr_ratio < math.inf:
            raise UserError(f"method.lr_ratio is {lr_ratio}, it must be a finite number above 0")
        patterns = [target_modules] if isinstance(target_modules, str) else target_modules
        for pattern in [*patterns, *self.exclude_modules, *self.rank_pattern, *self.alpha_pattern]:
            require_pattern(pattern)

    def rank_of(self, layer: str) -> int:
        """r of the layer with this dotted name."""
        return next((r for pattern, r in self.rank_pattern.items() if name_matches(pattern, layer)), self.rank)

    def scaling_of(self, layer: str) -> float:
        """s of the layer with this dotted name."""
        alpha = next((a for pattern, a in self.alpha_pattern.items() if name_matches(pattern, layer)), self.alpha)
        rank = self.rank_of(layer)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def takes_layer(self, block: int | None) -> bool:
        """Whether ``layers`` admits the block with this number (None: outside numbered blocks)."""
        return self._layers is None or block in self._layers


def _parse_layers(layers: str | int | list[int] | None) -> set[int] | None:
    if layers is None:
        return None
    chosen: set[int] = set()
    for part in str(layers).strip("[]").replace(" ", "").split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not found:
            raise UserError(f"method.layers is {layers!r}, write block numbers such as 6-11 or 0,3-5")
        chosen |= set(range(int(found[1]), int(found[2] or found[1]) + 1))
    return chosen


def require_pattern(pattern: str) -> None:
    """Refuse a ``pattern`` of the user's that is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"method names the layers {pattern!r}, which is no regular expression: {error}") from None
