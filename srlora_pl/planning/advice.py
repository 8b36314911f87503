"""What to change so that a run fits: from what costs least on, each change on top of those before it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import Parameter, signature
from typing import Any, get_args

from srlora_pl.models.weights import NF4
from srlora_pl.planning.needs import Needs, needs
from srlora_pl.planning.step import Step, batch_for, measure
from srlora_pl.tasks.base import Task
from srlora_pl.util.errors import UserError

ROOM = 0.9  # of a device's memory; the rest is the driver's, and lost between tensors
_MOST = 64  # devices


@dataclass(frozen=True)
class Plan:
    """A run that is planned.

    Attributes:
        build: the task on the meta device, with changes of its arguments.
        size: samples of a micro-batch.
        length: tokens of a text at most; None for images.
        precision: of the trainer.
        devices: over which the frozen weights are split.
        accumulated: micro-batches of an optimizer step.
        separate: whether a device has memory of its own, beside the machine's.
        changes: of the task's arguments.
    """

    build: Callable[..., Task]
    size: int
    length: int | None
    precision: str
    devices: int = 1
    accumulated: int = 1
    separate: bool = True
    changes: tuple[tuple[str, Any], ...] = ()

    @cached_property
    def task(self) -> Task:
        return self.build(**dict(self.changes))

    @cached_property
    def step(self) -> Step:
        task = self.task
        longest = getattr(task, "max_tokens", None)
        length = min(self.length or 1, longest or self.length or 1)
        return measure(task, batch_for(task, self.size, length), self.precision)

    @cached_property
    def needs(self) -> Needs:
        step = self.step  # in which the task takes the precision that it trains in
        return needs(self.task, step, self.devices)

    @property
    def memory(self) -> int:
        """Bytes on a device."""
        return self.needs.device if self.separate else self.needs.together

    def checkpointed(self, again: bool) -> "Plan":
        """The same with activations that are computed again, or kept."""
        same = self.task.hparams["activation_checkpointing"] == again
        return self if same else _with(self, activation_checkpointing=again)

    def fits(self, memory: float) -> bool:
        return self.memory <= ROOM * memory


def advice(plan: Plan, memory: float) -> list[str]:
    """Whether ``plan`` fits into ``memory``, in bytes, and if not, what to change, in lines for the user."""
    room = f"{memory / 1e9:.1f} GB, of which a tenth is left to the driver and to gaps"
    if plan.fits(memory):
        return [f"It fits: {plan.memory / 1e9:.2f} GB of {room}."]
    lines = [f"It does not fit: {plan.memory / 1e9:.2f} GB of {room}. From what costs least on:"]
    for way, changed in _ways(plan, memory):
        plan = changed
        lines.append(f"  {way}: {plan.memory / 1e9:.2f} GB")
        if plan.fits(memory):
            return [*lines, "With these changes it fits."]
    return [*lines, "That is not enough: shorten the texts, take a method that trains less, or a smaller network."]


def _ways(plan: Plan, memory: float) -> Iterator[tuple[str, Plan]]:
    """The changes, each with those before it."""
    if plan.size > 1:
        plan = _smaller(plan, memory)
        accumulated = f" --trainer.accumulate_grad_batches {plan.accumulated}"
        yield f"--data.batch_size {plan.size}{accumulated} (smaller products)", plan
    arguments = plan.task.hparams
    if arguments.get("activation_checkpointing") is False:
        plan = _with(plan, activation_checkpointing=True)
        yield "--model.activation_checkpointing true (a third more work)", plan
    whole = plan
    kinds = _kinds_of_weights(plan.task)
    for kind in kinds[kinds.index(arguments["weights"]) + 1 :] if kinds else ():
        try:
            changed = _with(plan, weights=kind)
            changed.needs  # noqa: B018
        except UserError:  # the method does not take them
            continue
        plan, whole = changed, whole if kind == NF4 else changed
        yield f"--model.weights {kind} ({_ROUNDS[kind]})", plan
    plan = whole
    while plan.separate and can_split(plan.task) and plan.devices < _MOST and not plan.fits(memory):
        devices = 2 * plan.devices
        plan = _again(plan, devices=devices)
        yield f"{devices} devices, --trainer.strategy fsdp2 --trainer.devices {devices} (traffic)", plan


def can_split(task: Task) -> bool:
    """Whether fsdp2 takes the run: it splits no weights in four bits, and leaves no gradient whole for an optimizer."""
    method = task.adaptation.method
    return task.hparams["weights"] != NF4 and not (method.trains_weights and method.own_optimizer is not None)


_ROUNDS = {"bfloat16": "exact for weights published so", NF4: "rounds them to four bits"}


def _kinds_of_weights(task: Task) -> list[str]:
    """What ``model.weights`` may be, from the largest on; nothing for a task without."""
    known = [parameters["weights"] for kind in type(task).__mro__ if "weights" in (parameters := _parameters(kind))]
    return [*get_args(known[0].annotation)] if known else []


def _parameters(kind: type[Any]) -> Mapping[str, Parameter]:
    return signature(kind.__init__).parameters


def _with(plan: Plan, **changes: Any) -> Plan:
    return replace(plan, changes=tuple({**dict(plan.changes), **changes}.items()))


def _again(plan: Plan, devices: int) -> Plan:
    """The same on more devices, whose steps are the same."""
    other = replace(plan, devices=devices)
    vars(other).update(task=plan.task, step=plan.step)
    return other


def _smaller(plan: Plan, memory: float) -> Plan:
    """The largest share of the micro-batch that fits, or else a single sample."""
    one = replace(plan, size=1, accumulated=plan.accumulated * plan.size)
    each = (plan.memory - one.memory) / (plan.size - 1)
    divisors = [size for size in range(plan.size - 1, 0, -1) if plan.size % size == 0]
    size = next((n for n in divisors if one.memory + (n - 1) * each <= ROOM * memory), 1)
    return one if size == 1 else replace(plan, size=size, accumulated=plan.accumulated * plan.size // size)
