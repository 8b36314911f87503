"""The memory that a run needs, by part: on each device, and in the machine's own memory."""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from srlora_pl.lowrank.adaptation import Adaptation
from srlora_pl.lowrank.starts.gradient import bytes_of_sums
from srlora_pl.lowrank.target_settings import is_below
from srlora_pl.lowrank.targets import linears_in_blocks, repeated_blocks
from srlora_pl.models.weights import NF4
from srlora_pl.planning.step import Step
from srlora_pl.tasks.base import Task


class Part(NamedTuple):
    """Bytes of one thing, on a device and in the machine's own memory."""

    name: str
    device: int
    host: int = 0


@dataclass(frozen=True)
class Needs:
    """All that a run needs.

    Attributes:
        step: the parts of an optimizer step; there is a moment when all of them are there.
        start: those of the start, before the first step.
        on_disk: bytes of the singular directions in the cache.
    """

    step: list[Part]
    start: list[Part]
    on_disk: int

    @property
    def device(self) -> int:
        """Bytes on each device."""
        return max(sum(part.device for part in parts) for parts in (self.step, self.start))

    @property
    def host(self) -> int:
        """Bytes in the machine's own memory, for each process."""
        return max(sum(part.host for part in parts) for parts in (self.step, self.start))

    @property
    def together(self) -> int:
        """Bytes where the machine's own memory is the device."""
        return max(sum(part.device + part.host for part in parts) for parts in (self.step, self.start))


def needs(task: Task, step: Step, devices: int = 1) -> Needs:
    """What a run of ``task`` needs whose steps are like ``step``.

    Args:
        devices: over which FSDP2 splits the frozen weights; where a method trains the network's own, all of them, with
            their gradients and states.
    """
    adaptation = task.adaptation
    share = devices if adaptation.method.trains_weights else 1
    frozen, adapters = _weights(task)
    kept = _pretrained_copy(adaptation)
    rest = sum(_bytes(layer.rest) for layer in adaptation.weights.layers.values() if layer.rest is not None)
    weights = [Part(f"frozen weights, {kind}", size // devices) for kind, size in frozen.items() if size]
    whole = [Part(f"frozen weights, {kind}", 0, size) for kind, size in frozen.items() if size]
    whole += [
        Part("int16 rests of the weights that change", 0, rest),
        Part("adapters, and what else trains", 0, adapters),
    ]
    gathered = _gathered(task) if devices > 1 else 0
    ours = [
        # Split rests lie on the device, with the weights.
        Part("int16 rests of the weights that change", *((0, rest) if devices == 1 else (rest // devices, 0))),
        Part("adapters, and what else trains", adapters // share),
    ]
    step_parts = [
        *weights,
        Part("weights gathered for a block and outside of blocks", gathered),
        *ours,
        Part("gradients", step.gradients // share),
        Part(f"states of the optimizer, {task.optimizer}", step.optimizer // share),
        Part("running averages of the method", step.method),
        Part("activations of a micro-batch", step.activations),
        Part("working memory, logits among it", step.working),
        Part("a weight that is read out of four bits", max(map(_bytes, _in_four_bits(task)), default=0)),
        Part("a copy of the adapted weights, until the first step", 0, kept),
    ]
    return Needs(_present(step_parts), _present(_start(task, weights, whole, ours, kept)), _spectra(adaptation))


def _present(parts: list[Part]) -> list[Part]:
    return [part for part in parts if part.device or part.host]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _weights(task: Task) -> tuple[Counter[str], int]:
    """Bytes of the frozen weights and buffers by kind, and of the adapters and all else that trains."""
    ours = {id(each) for layer in task.adaptation.layers.values() for each in layer.adapter_parameters()}
    in_four_bits = {id(each) for each in _in_four_bits(task)}
    frozen, trained = Counter[str](), 0
    for each in [*task.parameters(), *task.buffers()]:
        if each.requires_grad or id(each) in ours:
            trained += _bytes(each)
        elif id(each) in in_four_bits:
            frozen[NF4] += each.numel() // 2 + each.numel() // 64 * 2  # and a bfloat16 scale for each 64
        else:
            frozen[str(each.dtype).removeprefix("torch.")] += _bytes(each)
    return frozen, trained


def _in_four_bits(task: Task) -> list[Tensor]:
    """The weights that `srlora_pl.models.weights.prepared` puts into four bits."""
    if task.hparams["weights"] != NF4:
        return []
    blocks = repeated_blocks(task.net)
    adapted = [layer.weight for name, layer in task.adaptation.weights.layers.items() if is_below(name, blocks)]
    heads = task.trained_heads(task.net)
    return [*adapted, *(linear.weight for linear in linears_in_blocks(task.net, heads).values())]


def _gathered(task: Task) -> int:
    """Bytes of weights that FSDP2 holds whole during a step: of two blocks, one ahead, and outside of blocks.

    Of weights that train also the gradients of one block.
    """
    blocks = Counter[str](dict.fromkeys(names := repeated_blocks(task.net), 0))
    outside, all_split = 0, task.adaptation.method.trains_weights
    for name, parameter in task.net.named_parameters():
        if all_split or not parameter.requires_grad:
            block = next((each for each in names if is_below(name, [each])), None)
            if block is None:
                outside += _bytes(parameter)
            else:
                blocks[block] += _bytes(parameter)
    return outside + (3 if all_split else 2) * max(blocks.values(), default=0)


def _pretrained_copy(adaptation: Adaptation) -> int:
    """Bytes of the copy of the adapted weights that a start makes, for a checkpoint that is loaded behind it."""
    if adaptation.method.starts_from == "nothing":
        return 0
    return sum(_bytes(layer.weight) for layer in adaptation.weights.layers.values())


def _start(task: Task, weights: list[Part], whole: list[Part], ours: list[Part], kept: int) -> list[Part]:
    """The parts of loading and of the start, whichever takes more of the machine's own memory.

    Args:
        weights: as they are once they are on their device, split or not.
        whole: as they are before.
        ours: what else is there, as on the device.
        kept: bytes of the copy of the adapted weights.
    """
    adaptation, method = task.adaptation, task.adaptation.method
    loading = Part("weights in float32 while they are loaded", 0, 4 * sum(each.numel() for each in task.parameters()))
    if method.starts_from == "nothing":
        return [loading]
    svd = max(8 * (out * in_ + 4 * min(out, in_) ** 2) for out, in_ in (each.shape for each in adaptation.matrices))
    sums = Part("sums of gradients", 0, bytes_of_sums(adaptation) if method.starts_from == "gradient" else 0)
    # Spectra are found before the network is moved to its device, and split there.
    at = whole if method.starts_from == "spectrum" else [*weights, *ours]
    copy = Part("a copy of the adapted weights", 0, kept)
    start = [*at, copy, sums, Part("singular values of one matrix, in float64", svd)]
    return start if sum(each.host for each in start) >= loading.host else [*ours, loading]


def _spectra(adaptation: Adaptation) -> int:
    """Bytes of the singular triplets that the cache keeps."""
    if adaptation.method.starts_from != "spectrum":
        return 0
    sizes = ((matrix, adaptation.method.directions(matrix)) for matrix in adaptation.matrices)
    return sum(4 * min(count, *matrix.shape) * (sum(matrix.shape) + 1) for matrix, count in sizes)
