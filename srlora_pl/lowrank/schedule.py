"""Which optimizer steps switch (Eq. 13 and 14), in integers."""

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """``planned`` switches spread evenly over the optimizer steps ``first_step`` to ``last_step``.

    Switch i of N falls after step ``first_step + floor(i * steps / N)``. The N-th, at the very end, is never done:
    nothing would train after it.
    """

    first_step: int
    last_step: int
    planned: int

    @property
    def to_do(self) -> int:
        """How many of the planned switches fall before the end."""
        return max(self.planned - 1, 0)

    def step_of(self, i: int) -> int:
        """The optimizer step after which switch ``i`` (from 1) falls."""
        return self.first_step + i * (self.last_step - self.first_step) // self.planned

    def due(self, step: int) -> int:
        """How many switches should have been done once optimizer step ``step`` is over."""
        if self.to_do == 0:
            return 0
        # i * L // N <= t  is the same as  i <= ((t + 1) * N - 1) // L
        passed = ((step - self.first_step + 1) * self.planned - 1) // (self.last_step - self.first_step)
        return max(0, min(passed, self.to_do))


@dataclass(frozen=True)
class Pace:
    """A schedule, and how many of its switches are done."""

    schedule: Schedule
    done: int = 0

    @property
    def missing(self) -> int:
        return self.schedule.to_do - self.done

    @property
    def next_step(self) -> int | None:
        """The optimizer step after which the next switch falls; None where there is none to come."""
        return self.schedule.step_of(self.done + 1) if self.missing > 0 else None

    def one_more(self) -> "Pace":
        return replace(self, done=self.done + 1)

    def state(self) -> dict[str, Any]:
        return {**asdict(self.schedule), "done": self.done}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> "Pace":
        settings = dict(state)
        done = settings.pop("done")
        return cls(Schedule(**settings), done)
