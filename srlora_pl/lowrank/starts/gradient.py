"""Starts from the gradients of the frozen weights (LoRA-SB, LoRA-GA), estimated layer by layer."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from srlora_pl.lowrank.linear import AdaptedLinear
from srlora_pl.lowrank.method import AdaptedNetwork, Gradient, ShowProgress, Sources, generator_for
from srlora_pl.lowrank.starts.spectrum import Spectrum
from srlora_pl.lowrank.target_settings import is_below
from srlora_pl.lowrank.targets import repeated_blocks
from srlora_pl.util.errors import UserError
from srlora_pl.util.precision import full_precision, trained_dtype

_MEMORY = 2 * 2**30  # bytes of sums on the host in one pass over the batches, unless a block of layers needs more


def gradients(
    losses: Callable[[Any], Tensor], batches: Iterable[Any], lr: float | None = None, progress: ShowProgress = iter
) -> Sources:
    """The source of `Adaptation.start` for methods that start from gradients.

    The gradients are summed over all samples, in float32 and in training mode (with dropout). The network, its
    gradients, buffers and modes, and torch's random state stay as they are. In a process group each process gives its
    own batches, and their sums are added up.

    The sums lie in the host's memory. Where all of them need more than 2 GiB, several passes over the same batches
    each take some of the network's blocks, with the same result to the bit.

    Args:
        losses: the loss of each sample of a batch, (B,).
        batches: of training samples, on the device of the network; kept where there are several passes.
        lr: the learning rate with which full fine-tuning would take its first step; LoRA-SB needs it.
        progress: wraps the list of matrices to show how far the decomposition is; in each pass.
    """

    def find(adaptation: AdaptedNetwork) -> dict[str, Spectrum]:
        groups, found = _groups(adaptation), dict[str, Spectrum]()
        given = batches if len(groups) == 1 else [*batches]
        for layers in groups:
            totals, samples = _sums(adaptation, layers, losses, given)
            found |= adaptation.run_on_rank_zero(partial(decompose, adaptation, totals, samples))
        return found

    def decompose(adaptation: AdaptedNetwork, totals: dict[str, Tensor], samples: int) -> dict[str, Spectrum]:
        found = {}
        with full_precision():
            for matrix in progress([matrix for matrix in adaptation.matrices if matrix.layer_name in totals]):
                total = matrix.of_weight(totals[matrix.layer_name]).to(matrix.device)
                name = f"the gradient of {matrix.name}"
                if not total.isfinite().all():
                    raise UserError(f"{name} holds NaN or infinity, see to the samples and the pretrained weights")
                step = adaptation.method.step_of(Gradient(total, samples, lr))
                found[matrix.name] = Spectrum.of(step, adaptation.method.directions(matrix), name)
        return found

    return find


def _groups(adaptation: AdaptedNetwork) -> list[dict[str, AdaptedLinear]]:
    """The adapted layers by name, in the groups of each pass: neighbouring blocks whose sums fit into the memory."""
    layers = {matrix.layer_name: matrix.layer for matrix in adaptation.matrices}
    blocks, groups, room = repeated_blocks(adaptation.net), list[dict[str, AdaptedLinear]](), 0
    for _, names in groupby(layers, lambda name: next((block for block in blocks if is_below(name, [block])), name)):
        block = {name: layers[name] for name in names}
        need = sum(map(_bytes, block.values()))
        if need > room:
            groups.append({})
            room = _MEMORY
        groups[-1] |= block
        room -= need
    return groups


def bytes_of_sums(adaptation: AdaptedNetwork) -> int:
    """The most bytes that the sums of one pass take on the host."""
    return max(sum(map(_bytes, layers.values())) for layers in _groups(adaptation))


def _bytes(layer: AdaptedLinear) -> int:
    return layer.weight.numel() * trained_dtype(layer.weight.dtype).itemsize


def _over_processes(values: Tensor, device: torch.device) -> Tensor:
    """The sum of ``values`` over all processes that train together, on whose ``device`` they are added up."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    moved = values.to(device)
    torch.distributed.all_reduce(moved)
    return moved.cpu()


def _sums(
    adaptation: AdaptedNetwork,
    layers: dict[str, AdaptedLinear],
    losses: Callable[[Any], Tensor],
    batches: Iterable[Any],
) -> tuple[dict[str, Tensor], int]:
    """The gradients (out, in) of ``layers`` summed over all samples, on the CPU, and the number of samples."""
    totals = {
        name: torch.zeros(layer.weight.shape, dtype=trained_dtype(layer.weight.dtype)) for name, layer in layers.items()
    }
    trained = [p for layer in layers.values() for p in layer.adapter_parameters() if p.requires_grad]
    seen, device = 0, adaptation.matrices[0].device
    with _as_it_was(adaptation.net, adaptation.seed), _gathered(layers, totals):
        for batch in batches:
            with torch.enable_grad():
                loss = losses(batch)
                # The adapters' own gradients are by the way: every path to a layer's output leads to one of them.
                torch.autograd.grad(loss.sum(), trained, allow_unused=True)
            seen += len(loss)
    samples = int(_over_processes(torch.tensor(seen), device))
    if not samples:
        raise UserError("there are no samples to estimate gradients from, give gradients() some batches")
    for name in totals:
        totals[name] = _over_processes(totals[name], device)
    return totals, samples


@contextmanager
def _gathered(layers: dict[str, AdaptedLinear], totals: dict[str, Tensor]) -> Iterator[None]:
    """Inside, every backward pass adds dY^T X of each layer to its total: on the device there is one at a time."""

    def watch(name: str, layer: AdaptedLinear, total: Tensor) -> Callable[..., None]:
        def after_forward(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            if not output.requires_grad:
                raise UserError(
                    f"{name} is called where torch records no gradients, so none can be estimated: where the forward "
                    "pass checkpoints it, do so with use_reentrant=False"
                )
            x = inputs[0].detach().reshape(-1, layer.in_features)

            @full_precision()
            def after_backward(dy: Tensor) -> None:
                total.add_((dy.reshape(-1, layer.out_features).T.to(total.dtype) @ x.to(total.dtype)).cpu())

            output.register_hook(after_backward)

        return after_forward

    hooks = [layer.register_forward_hook(watch(name, layer, totals[name])) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _as_it_was(net: nn.Module, seed: int) -> Iterator[None]:
    """Inside, ``net`` is in training mode; modes, buffers and torch's random state are as before afterwards."""
    modes = {module: module.training for module in net.modules()}
    buffers = {buffer: buffer.clone() for buffer in net.buffers()}
    devices = {parameter.device for parameter in net.parameters() if parameter.is_cuda}
    net.train()
    try:
        # Compiled code does not call hooks that were not there when it was compiled.
        with torch.random.fork_rng(devices=devices), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(generator_for("gradients", seed).initial_seed())
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
