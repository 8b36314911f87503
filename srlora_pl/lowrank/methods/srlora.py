"""SRLoRA (Yang, Wang and Hossain 2025)."""

from typing import Any, Literal

from srlora_pl.lowrank.linear import Matrix
from srlora_pl.lowrank.method import AdaptedNetwork
from srlora_pl.lowrank.methods.pissa import PiSSA
from srlora_pl.lowrank.methods.switching import Switching
from srlora_pl.util.errors import UserError, require_one_of


class SRLoRA(PiSSA):
    """PiSSA that at intervals fuses its least important pairs and re-draws them from unused singular directions.

    Args:
        rank: pairs per matrix, r.
        target_rank: how far down the spectrum training may walk, r_target.
        fusion_ratio: share of the pairs that a switch recycles, gamma; gamma * rank must be a whole number.
        beta1: decay of the smoothed sensitivity (Eq. 4).
        beta2: decay of its uncertainty (Eq. 5).
        reset_scores: after a switch all scores start anew, or only those of the recycled pairs (Alg. 1, line 10).
        optimizer_state: what the optimizer remembers of recycled pairs: ``warm``, first moments 0 and second moments
            rescaled to the new partner; ``zero``, nothing; ``keep``, everything.
        select: which pairs a switch recycles: the least important (``importance``, Eq. 7) or the oldest (``age``), for
            which nothing needs to be scored.
        redraw_scale: the size s ||b|| ||a|| of re-drawn pairs: their singular value (``sigma``, Eq. 11) or the
            ``median`` of the matrix's pairs, so that the directions of small singular values train as fast.
        redraw_directions: what they point along: the next ``singular`` vectors (Eq. 11) or ``random`` ones.
        kwargs: see `Method`.

    Raises:
        UserError: a value outside its range.
    """

    averages = False  # across a switch a pair means different directions

    def __init__(
        self,
        rank: int = 8,
        *,
        target_rank: int = 128,
        fusion_ratio: float = 0.5,
        beta1: float = 0.85,
        beta2: float = 0.85,
        reset_scores: Literal["all", "recycled"] = "all",
        optimizer_state: Literal["warm", "zero", "keep"] = "warm",
        select: Literal["importance", "age"] = "importance",
        redraw_scale: Literal["sigma", "median"] = "sigma",
        redraw_directions: Literal["singular", "random"] = "singular",
        **kwargs: Any,
    ) -> None:
        super().__init__(rank, **kwargs)
        self.target_rank, self.fusion_ratio, self.beta1, self.beta2 = target_rank, fusion_ratio, beta1, beta2
        self.reset_scores, self.optimizer_state = reset_scores, optimizer_state
        self.select, self.redraw_scale, self.redraw_directions = select, redraw_scale, redraw_directions
        for value, where in ((beta1, "beta1"), (beta2, "beta2")):
            if not 0 < value < 1:
                raise UserError(f"method.{where} is {value}, it must lie between 0 and 1")
        require_one_of("method.reset_scores", reset_scores, ("all", "recycled"))
        require_one_of("method.optimizer_state", optimizer_state, ("warm", "zero", "keep"))
        require_one_of("method.select", select, ("importance", "age"))
        require_one_of("method.redraw_scale", redraw_scale, ("sigma", "median"))
        require_one_of("method.redraw_directions", redraw_directions, ("singular", "random"))
        for each in {rank, *self.rank_pattern.values()}:
            self.recycled_rank(each)
            if not isinstance(target_rank, int) or target_rank < each:
                raise UserError(
                    f"method.target_rank is {target_rank}, it must be a whole number of at least the rank {each}"
                )

    def recycled_rank(self, rank: int) -> int:
        """r' = gamma * rank: how many pairs of a matrix of this rank one switch recycles."""
        recycled = self.fusion_ratio * rank
        if not 0 < self.fusion_ratio <= 1 or abs(recycled - round(recycled)) > 1e-9 or round(recycled) < 1:
            raise UserError(
                f"method.fusion_ratio is {self.fusion_ratio} and {self.fusion_ratio} x rank {rank} = {recycled:g}: "
                "the ratio must lie in (0, 1] and the product be a whole number of at least 1"
            )
        return round(recycled)

    def directions(self, matrix: Matrix) -> int:
        return min(self.target_rank, *matrix.shape)

    def controller(self, adaptation: AdaptedNetwork) -> Switching:
        return Switching(self, adaptation)
