"""Methods that are made in tests, as anybody may make one: the contract holds for them too."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srlora_pl.lowrank import Adaptation, AdaptedLinear, Adapter, Method, Peft, Spectrum, methods
from srlora_pl.lowrank.methods.pissa import PiSSA
from srlora_pl.util.signatures import arguments_of_class

# What a method needs to be told of a `ToyNet`, where its defaults are names in real networks.
TOY_SETTINGS: dict[type[Method], dict] = {methods.Bottleneck: {"target_modules": ["proj", "fc2"]}}


def made(kind: type[Method], **settings) -> Method:
    """A method of ``kind`` with those of the ``settings`` that it takes, for a `ToyNet`: not all have a rank."""
    known = arguments_of_class(kind)
    return kind(**{name: value for name, value in settings.items() if name in known}, **TOY_SETTINGS.get(kind, {}))


def trainer_of(adaptation: Adaptation, kind: type[Optimizer], **settings) -> Optimizer:
    """An optimizer of ``kind`` or, where the method has one, its own in the same form."""
    form = "sgd" if kind is torch.optim.SGD else "adamw"
    own = adaptation.method.optimizer(adaptation, adaptation.param_groups(settings["lr"]), form)
    return own or kind([p for p in adaptation.net.parameters() if p.requires_grad], **settings)


class CoreLinear(AdaptedLinear):
    """``lora_A`` and ``lora_B`` are frozen, ``core`` (r, r) between them trains."""

    adapter_names = ("lora_A", "lora_B", "core")

    def build(self, p, out, in_):
        self.lora_A = nn.Parameter(self.weight.new_zeros(*p, self.rank, in_))
        self.lora_B = nn.Parameter(self.weight.new_zeros(*p, out, self.rank))
        self.core = nn.Parameter(self.weight.new_zeros(*p, self.rank, self.rank))

    def factors(self):
        return self.lora_B @ self.core, self.lora_A


class Core(PiSSA):
    """A core between frozen singular directions, as LoRA-XS has it (arXiv 2405.17604); the weight stays."""

    layer = CoreLinear
    moves_weights = False

    def frozen_adapter(self):
        return ("lora_A", "lora_B")

    def start(self, adaptation, matrix, source: Spectrum):
        matrix.B.copy_(source.U[:, : matrix.rank])
        matrix.A.copy_(source.sigma[: matrix.rank, None] * source.Vh[: matrix.rank])


class Bottleneck(Adapter):
    """Adds ``up(tanh(down(y)))`` to the output y of a module."""

    adapter_names = ("down", "up")

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, size) / size**0.5)
        self.up = nn.Parameter(torch.zeros(size, rank))

    def forward(self, y: Tensor) -> Tensor:
        return y if self.disabled else y + torch.tanh(y @ self.down.T.to(y)) @ self.up.T.to(y)


class Bottlenecks(Method):
    """A `Bottleneck` behind every ``fc2``; it replaces no linear."""

    additive = False

    def inject(self, net: nn.Module, taken: Sequence[str]) -> dict[str, Adapter]:
        layers: dict[str, Adapter] = {}
        for name, linear in list(net.named_modules()):
            if name.endswith("fc2"):
                adapter = Bottleneck(linear.out_features, self.rank).to(linear.weight)
                net.get_submodule(name.rpartition(".")[0]).add_module("bottleneck", adapter)
                linear.register_forward_hook(lambda _, inputs, y, adapter=adapter: adapter(y))
                layers[f"{name.rpartition('.')[0]}.bottleneck"] = adapter
        return layers


class OldestFirst(methods.SRLoRA):
    """Re-draws the oldest pairs along random directions."""

    def __init__(self, rank: int = 8, *, select: str = "age", redraw_directions: str = "random", **kwargs: Any) -> None:
        super().__init__(rank, select=select, redraw_directions=redraw_directions, **kwargs)


class OneSize(methods.SRLoRA):
    """Re-draws all pairs at one size."""

    def __init__(self, rank: int = 8, *, redraw_scale: str = "median", **kwargs: Any) -> None:
        super().__init__(rank, redraw_scale=redraw_scale, **kwargs)


class Tuner(Peft):
    """A tuner of PEFT on the linears that are not fused, which PEFT has no parts of."""

    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self, rank: int = 4, alpha: float = 8.0) -> None:
        super().__init__(self.settings, target_modules=["proj", "fc1", "fc2"])
        self.rank, self.alpha = rank, alpha


class PeftLoRA(Tuner):
    settings: ClassVar[dict[str, Any]] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_bias": True}


class IA3(Tuner):
    settings: ClassVar[dict[str, Any]] = {"peft_type": "IA3", "feedforward_modules": ".*fc2"}


class OFT(Tuner):
    settings: ClassVar[dict[str, Any]] = {"peft_type": "OFT", "r": 0, "oft_block_size": 4}


# PEFT's tuners stand for Peft; prompts and prefixes need a network of texts.
METHODS: list[type[Method]] = [
    *(kind for kind in methods.REGISTRY if kind not in (methods.Peft, methods.PromptTuning, methods.PrefixTuning)),
    OldestFirst,
    OneSize,
    PeftLoRA,
    IA3,
    OFT,
    Core,
    Bottlenecks,
]
