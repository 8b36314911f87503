"""Heads that come with pretrained weights, and the classes that their outputs mean."""

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from srlora_pl.util.errors import listed
from srlora_pl.util.randomness import run_seed


@dataclass(frozen=True)
class FoundHead:
    """A head of the size that the data ask for, which came with the pretrained weights.

    Attributes:
        place: where it comes from, in the user's words.
        layers: dotted names of the layers that give an output per class.
        names: the class of each output; empty if unknown.
    """

    place: str
    layers: tuple[str, ...]
    names: tuple[str, ...] = ()


def output_layers(net: nn.Module, heads: Iterable[str], outputs: int) -> tuple[str, ...]:
    """The dotted name of the last layer with ``outputs`` outputs in each of ``heads`` that has one."""
    found = []
    for head in heads:
        parts = net.get_submodule(head).named_modules(prefix=head)
        layers = [(name, part) for name, part in parts if isinstance(part, nn.Linear | nn.Conv2d)]
        found += [name for name, part in layers if len(part.weight) == outputs][-1:]
    return tuple(found)


@torch.no_grad()
def settle(net: nn.Module, head: FoundHead, classes: Sequence[str]) -> str:
    """Make the outputs of ``head`` in ``net`` mean ``classes``, in place; returns a sentence for the user.

    With the same names its rows are put into the order of ``classes``; with other names it is initialised anew; without
    names on one side it stays.
    """
    layers = [net.get_submodule(name) for name in head.layers]
    theirs, ours = _comparable(head.names), _comparable(classes)
    if theirs and sorted(theirs) == sorted(ours):
        rows = [theirs.index(name) for name in ours]
        for parameter in (each for layer in layers for each in layer.parameters()):
            parameter.copy_(parameter[rows].clone())
        put = "" if theirs == ours else ", put into the order of the data's"
        return f"The run begins with the head of {head.place}: its classes have the same names{put}."
    if _tells(theirs) and _tells(ours):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run_seed())  # in every process, whatever was drawn there until now
            for layer in layers:
                fresh: Any = copy.deepcopy(layer).cpu()
                fresh.reset_parameters()
                layer.load_state_dict(fresh.state_dict())
        others = f"other classes ({listed(head.names, most=2)}) than the data's ({listed(classes, most=2)})"
        return f"The run begins with a new head: that of {head.place} is for {others}."
    order = f"; their order must be that of the data ({listed(classes, most=2)})" if len(classes) > 1 else ""
    return f"The run begins with the head of {head.place}, which names no classes to compare{order}."


def _comparable(names: Sequence[str]) -> list[str]:
    """``names`` without regard to case, unless two differ in nothing else."""
    folded = [str(name).strip().casefold() for name in names]
    return folded if len(set(folded)) == len(folded) else [str(name) for name in names]


def _tells(names: Sequence[str]) -> bool:
    """Whether ``names`` are more than numbers, as transformers' ``LABEL_0``."""
    return not all(re.fullmatch(r"(label_)?-?\d+", name) for name in names)
