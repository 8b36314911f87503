"""GaLore (Zhao et al. 2024, arXiv 2403.03507)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from srlora_pl.lowrank.linear import Adapter
from srlora_pl.lowrank.method import AdaptedNetwork
from srlora_pl.lowrank.methods.full import Full
from srlora_pl.lowrank.own_optimizer import OwnOptimizer
from srlora_pl.lowrank.target_settings import ALL_LINEAR, TargetSettings
from srlora_pl.lowrank.targets import Target, select_whole
from srlora_pl.util.errors import UserError


class GaLoreOptimizer(OwnOptimizer):
    """Keeps the moments of a gradient G (out, in) along ``rank`` directions, which are renewed every ``gap`` steps.

    They are the leading singular directions of G on its smaller side: ``projection`` is (parts, r, in) or, where
    out < in, (parts, out, r). The moments stay as they are when it is renewed.
    """

    own = ("rank", "parts", "scale", "gap")

    def step_own(self, group: dict[str, Any]) -> None:
        for W in (each for each in group["params"] if each.grad is not None):
            G = W.grad.unflatten(0, (group["parts"], -1))
            state, tall = self.state[W], G.shape[1] >= G.shape[2]
            if int(state.get("step", 0)) % group["gap"] == 0:
                state["projection"] = _directions(G, group["rank"], tall)
            P = state["projection"]
            step = self.direction(W, G @ P.mT if tall else P.mT @ G, group)
            self.move(W, group["scale"] * (step @ P if tall else P @ step).flatten(0, 1), group)


def _directions(G: Tensor, rank: int, tall: bool) -> Tensor:
    """The leading singular directions of the smaller side of G (parts, out, in), in rows if it is ``tall``.

    Those along which G is 0 to rounding would be arbitrary, others in every setting of processes: they are 0 as well.
    """
    # What is not finite goes into the moments and is seen later; here it would stop in the middle.
    U, sigma, Vh = torch.linalg.svd(G.nan_to_num(0.0, 0.0, 0.0), full_matrices=False)
    smallest = sigma[:, :1] * max(G.shape[1:]) * torch.finfo(G.dtype).eps
    known = (sigma > smallest)[:, :rank].to(G)
    return known[:, :, None] * Vh[:, :rank] if tall else known[:, None, :] * U[..., :rank]


class GaLore(Full):
    """Full fine-tuning whose optimizer keeps the moments of the chosen matrices in few directions of their gradients.

    All other parameters train as in full fine-tuning.

    Args:
        rank: directions of each matrix, r; its moments then are 2 r max(out, in) numbers.
        scale: of the steps of these matrices.
        update_gap: optimizer steps between two choices of directions.
        target_modules, exclude_modules, layers, rank_pattern: see `Method`.

    Raises:
        UserError: a value outside its range; or some of query, key and value of a fused linear.
    """

    own_optimizer = GaLoreOptimizer

    def __init__(
        self,
        rank: int = 8,
        *,
        scale: float = 4.0,
        update_gap: int = 500,
        target_modules: str | list[str] = ALL_LINEAR,
        exclude_modules: str | list[str] | None = None,
        layers: str | int | list[int] | None = None,
        rank_pattern: dict[str, int] | None = None,
    ) -> None:
        where = {"target_modules": target_modules, "exclude_modules": exclude_modules, "layers": layers}
        TargetSettings.__init__(self, rank, rank_pattern=rank_pattern, **where)  # type: ignore[arg-type]
        self.scale, self.update_gap = scale, update_gap
        if not 0 < scale < float("inf"):
            raise UserError(f"method.scale is {scale}, it must be a finite number above 0")
        if not isinstance(update_gap, int) or update_gap < 1:
            raise UserError(f"method.update_gap is {update_gap}, it must be a whole number of at least 1")

    def inject(self, net: nn.Module, taken: Sequence[str]) -> dict[str, Adapter]:
        self._targets(net, taken)
        return {}

    def own_settings(self, adaptation: AdaptedNetwork) -> Mapping[int, dict[str, Any]]:
        return {
            id(target.module.weight): {
                "rank": self.rank_of(target.name),
                "parts": 3 if target.fused else 1,
                "scale": self.scale,
                "gap": self.update_gap,
            }
            for target in self._targets(adaptation.net, [*adaptation.trainable, *adaptation.new])
        }

    def _targets(self, net: nn.Module, taken: Sequence[str]) -> list[Target]:
        return select_whole(net, self, taken, "GaLore trains its weight as one")
