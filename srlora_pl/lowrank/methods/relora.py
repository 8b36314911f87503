"""ReLoRA (Lialin et al. 2023, arXiv 2307.05695)."""

from collections.abc import Callable
from typing import Any, Literal

from srlora_pl.lowrank.method import AdaptedNetwork
from srlora_pl.lowrank.methods.lora import LoRA
from srlora_pl.lowrank.methods.restarting import Restarting
from srlora_pl.lowrank.schedule import Schedule
from srlora_pl.util.errors import UserError, require_one_of

STATES = ("magnitude", "random", "zero", "keep")


class ReLoRA(LoRA):
    """LoRA that at even intervals fuses its pairs into the weight and starts anew: the change may reach rank r (n + 1).

    The learning rate rises anew after each restart. It ends where the run's own schedule does (the authors' cosine ends
    at a tenth of its height); a plain loop multiplies its rate by `rate_factor`.

    Args:
        rank: pairs per matrix, r.
        restarts: how many there are in a run, n; with 0 this is LoRA.
        restart_warmup: optimizer steps after a restart over which the learning rate rises from 0 to that of the run's
            schedule, at most a tenth of an interval.
        optimizer_state: what the optimizer forgets of the pairs at a restart: all elements but those of the largest
            first moments (``magnitude``) or ``random`` ones, all of them (``zero``), or none (``keep``). The authors'
            code chooses for each moment by itself, which divides a first moment by a forgotten second one.
        pruned: the share of elements that ``magnitude`` and ``random`` forget; ``random`` was used with 0.999.
        kwargs: see `Method`.

    Raises:
        UserError: a value outside its range.
    """

    moves_weights = True
    averages = False  # across a restart a pair means different directions

    def __init__(
        self,
        rank: int = 8,
        *,
        restarts: int = 3,
        restart_warmup: int = 100,
        optimizer_state: Literal["magnitude", "random", "zero", "keep"] = "magnitude",
        pruned: float = 0.9,
        **kwargs: Any,
    ) -> None:
        super().__init__(rank, **kwargs)
        self.restarts, self.restart_warmup = restarts, restart_warmup
        self.optimizer_state, self.pruned = optimizer_state, pruned
        for value, where in ((restarts, "restarts"), (restart_warmup, "restart_warmup")):
            if not isinstance(value, int) or value < 0:
                raise UserError(f"method.{where} is {value}, it must be a whole number of at least 0")
        require_one_of("method.optimizer_state", optimizer_state, STATES)
        if not 0 < pruned < 1:
            raise UserError(f"method.pruned is {pruned}, it must lie between 0 and 1")

    def schedule(self, last_step: int) -> Schedule:
        """The restarts of a run of ``last_step`` optimizer steps; none where these are too few."""
        return Schedule(0, last_step, self.restarts + 1 if self.restarts < last_step else 0)

    def rate_factor(self, step: int, last_step: float, factor: Callable[[int], float]) -> float:
        if last_step == float("inf"):
            return factor(step)
        schedule = self.schedule(int(last_step))
        if not (restarts := schedule.due(step)):
            return factor(step)
        begin = schedule.step_of(restarts)
        ramp = min(self.restart_warmup, int(last_step) // schedule.planned // 10)
        since = step - begin
        return since / ramp * factor(begin + ramp) if since < ramp else factor(step)

    def controller(self, adaptation: AdaptedNetwork) -> Restarting:
        return Restarting(self, adaptation)
