"""Seconds and bytes of a training step: our methods, PEFT's LoRA, full fine-tuning, and a frozen backbone.

    python -m benchmarks.step_time --model vit_base_patch16_224 --batch 8
    python -m benchmarks.step_time --variants lora lora_xs dora peft_dora vera vera@256
    python -m benchmarks.step_time --model deberta-v3-base --batch 16 --length cola --glue ../shared/data/glue \\
        --tokenizer ../shared/models/deberta_v3_tokenizer

A variant is a method, by the name of its overlay in ``configs/methods``: with rank 8 and alpha 8 if the overlay says
nothing else, or another rank as in ``vera@256``. Others are ``peft`` and ``peft_dora``, PEFT's LoRA and DoRA on the
same linears; ``full``, the plain network; and ``floor``, which trains the head alone but sends gradients through the
whole backbone.

A step is forward, backward, optimizer, what the method does before and after it, and the share of a switch or restart
that falls on a step in a run of the paper's length. (AdaLoRA's choices, in every 500th part of such a run, and new
projections of GaLore are left out.) All variants train copies of one network with random weights, interleaved in one
process; a ratio is the median over the rounds of seconds over seconds of the same round. With ``--length`` and a GLUE
task the texts have their real lengths: ours in length buckets, the others padded to 128 or, with ``--same-padding``,
all padded to 128.
"""

import argparse
import copy
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, whose folder holds a kernels.py that transformers would take for a package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import timm
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, DebertaV2Config

from benchmarks.models import DEBERTA_V3_BASE
from benchmarks.report import report
from benchmarks.texts import glue_batches
from srlora_pl.lowrank import Adaptation, Method
from srlora_pl.lowrank.methods import from_spec
from srlora_pl.lowrank.starts.gradient import gradients
from srlora_pl.models.deberta import use_fast_attention
from srlora_pl.run import config
from srlora_pl.tasks.optim import build_optimizer
from srlora_pl.util.system import REPOSITORY, device_name

STEPS = {"image": 5000, "text": 10_700}  # of the paper's runs, CoLA's for texts
# What an overlay is laid over; the paper's runs switch 29 times with these.
SETTINGS = {"class_path": "srlora_pl.SRLoRA", "init_args": {"rank": 8, "alpha": 8.0, "target_rank": 128}}
RATE = {"sgd": 1e-3, "adamw": 1e-5}
Batch = dict[str, Tensor]


def method_of(name: str) -> Method:
    """The method of ``configs/methods/NAME.yaml``; NAME@RANK has a rank of its own."""
    overlay, _, rank = name.partition("@")
    files = [
        {"model": {"class_path": "srlora_pl.ImageClassifier", "init_args": {"method": SETTINGS}}},
        config.read(str(REPOSITORY / "configs" / "methods" / f"{overlay}.yaml")),
    ]
    spec = config.combine(files)[0]["model"]["init_args"]["method"]
    return from_spec({**spec, "init_args": {**spec["init_args"], **({"rank": int(rank)} if rank else {})}})


class Variant:
    """One way to train a copy of the network.

    Args:
        batch: for methods that start from gradients, to estimate them from.
    """

    def __init__(
        self, name: str, net: nn.Module, kind: str, device: torch.device, optimizer: str, batch: Batch | None = None
    ) -> None:
        self.name, self.net, self.kind = name, copy.deepcopy(net).to(device), kind
        self.adaptation: Adaptation | None = None
        others = {"full": self._full, "floor": self._floor, "peft": self._peft, "peft_dora": self._peft}
        if name in others:
            others[name]()
            groups: list[dict[str, Any]] = [{"params": [p for p in self.net.parameters() if p.requires_grad]}]
        else:
            self.adaptation = self._adapt(batch, RATE[optimizer])
            groups = self.adaptation.param_groups(RATE[optimizer])
        self.trainable = sum(p.numel() for group in groups for p in group["params"])
        own = self.adaptation and self.adaptation.method.optimizer(self.adaptation, groups, optimizer)
        self.optimizer = own or build_optimizer(optimizer, groups, RATE[optimizer], 0.9, scaled_gradients=False)
        self.seconds: list[float] = []
        self.steps, self.event_seconds, self.events = 0, 0.0, 0

    @property
    def _head(self) -> list[str]:
        return ["head"] if self.kind == "image" else ["pooler", "classifier"]

    def _full(self) -> None:
        self.net.requires_grad_(True)

    def _floor(self) -> None:
        self.net.requires_grad_(False)
        for name in self._head:
            self.net.get_submodule(name).requires_grad_(True)
        embed = self.net.get_submodule("patch_embed" if self.kind == "image" else "deberta.embeddings")
        embed.register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_())

    def _peft(self) -> None:
        linears = r"blocks\.\d+\..*(qkv|proj|fc1|fc2)" if self.kind == "image" else r".*layer\.\d+\..*(_proj|dense)"
        dora = self.name == "peft_dora"
        inject_adapter_in_model(LoraConfig(r=8, lora_alpha=8, use_dora=dora, target_modules=linears), self.net)
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_("lora_" in name or name.startswith(tuple(self._head)))

    def _adapt(self, batch: Batch | None, lr: float) -> Adaptation:
        method = method_of(self.name)
        adaptation = Adaptation(self.net, method, self._head)
        if self.kind == "text":
            use_fast_attention(self.net, "benchmark")  # type: ignore[arg-type]
        adaptation.start(gradients(self.losses, [batch], lr) if method.starts_from == "gradient" else None)
        adaptation.plan(STEPS[self.kind])
        return adaptation

    def losses(self, batch: Batch) -> Tensor:
        """Of each sample, (B,)."""
        inputs = {name: value for name, value in batch.items() if name not in ("label", "index")}
        if self.kind == "text":
            logits = self.net(**inputs).logits
        else:
            logits = self.net(inputs["image"])
        return nn.functional.cross_entropy(logits.float(), batch["label"], reduction="none")

    def step(self, batch: Batch, autocast: Callable[[], Any]) -> None:
        with autocast():
            loss = self.losses(batch).mean()
        loss.backward()
        self.steps += 1
        if self.adaptation is not None:
            self.adaptation.before_optimizer(self.steps)
        self.optimizer.step()
        if self.adaptation is not None:
            self.adaptation.after_optimizer(self.steps, self.optimizer)
        self.optimizer.zero_grad()

    def timed_step(self, batch: Batch, autocast: Callable[[], Any]) -> None:
        with timed(self.seconds, batch["label"].device):
            self.step(batch, autocast)

    def time_events(self) -> None:
        """The median of three switches or restarts, where the method has any."""
        if self.adaptation is None:
            return
        seconds: list[float] = []
        progress = self.adaptation.controller.progress
        self.events = progress().planned
        while len(seconds) < 3 and (step := progress().next_step):
            with timed(seconds, next(self.net.parameters()).device):
                self.adaptation.after_optimizer(step, self.optimizer)
        self.event_seconds = statistics.median(seconds) if seconds else 0.0

    @property
    def step_seconds(self) -> list[float]:
        """By round, with the share of an event that falls on a step."""
        return [own + self.event_seconds * self.events / STEPS[self.kind] for own in self.seconds]

    def kept_bytes(self, batch: Batch, autocast: Callable[[], Any]) -> int:
        """Bytes of parameters, gradients, optimizer state and of what the backward pass needs."""
        own = {p.untyped_storage().data_ptr() for p in [*self.net.parameters(), *self.net.buffers()]}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast():
            loss = self.losses(batch).mean()
        loss.backward()
        gradients = sum(p.grad.nbytes for p in self.net.parameters() if p.grad is not None)
        self.optimizer.zero_grad()
        states = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        if self.adaptation is not None:
            states += [v for v in self.adaptation.controller.state_dict().values() if isinstance(v, Tensor)]
        fixed = sum(t.nbytes for t in [*self.net.parameters(), *self.net.buffers(), *states])
        return fixed + gradients + sum(kept.values())

    def peak_bytes(self, batch: Batch, autocast: Callable[[], Any]) -> int:
        """What the GPU's allocator held at most in a step, without the other variants."""
        others = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.step(batch, autocast)
        states = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        own = sum(t.nbytes for t in [*self.net.parameters(), *self.net.buffers(), *states])
        return torch.cuda.max_memory_allocated() - others + own


@contextmanager
def timed(seconds: list[float], device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - begin)


def network(model: str) -> tuple[nn.Module, str]:
    torch.manual_seed(0)
    if model == "deberta-v3-base":
        net = AutoModelForSequenceClassification.from_config(DebertaV2Config(**DEBERTA_V3_BASE)).train()
        return net, "text"
    options = {"img_size": 64, "patch_size": 8} if model == "vit_tiny" else {}
    net = timm.create_model("vit_tiny_patch16_224" if model == "vit_tiny" else model, num_classes=100, **options)
    return net, "image"


def compile_blocks(net: nn.Module) -> None:
    for name, module in net.named_modules():
        if re.fullmatch(r"(.*\.)?(blocks|layer)\.\d+", name):
            module.compile()


def image_batches(net: nn.Module, size: int) -> Iterator[tuple[Batch, Batch]]:
    shape = timm.data.resolve_model_data_config(net)["input_size"]
    shape = (3, *net.patch_embed.img_size) if hasattr(net, "patch_embed") else shape
    batch = {"image": torch.randn(size, *shape), "label": torch.randint(100, (size,))}
    while True:
        yield batch, batch


def random_texts(size: int, length: int) -> Iterator[tuple[Batch, Batch]]:
    ids = torch.randint(1000, 2000, (size, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "label": torch.randint(2, (size,))}
    while True:
        yield batch, batch


def real_texts(task: str, root: str, tokenizer: str, size: int, rounds: int) -> Iterator[tuple[Batch, Batch]]:
    """Pairs of batches, one in length buckets and one padded to 128, evenly through an epoch of the task."""
    ways = [glue_batches(task, root, tokenizer, size, rounds, padded) for padded in (False, True)]
    while True:
        yield from zip(*ways, strict=True)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device)
    net, kind = network(arguments.model)
    if kind == "image":
        batches = image_batches(net, arguments.batch)
    elif arguments.length.isdigit():
        batches = random_texts(arguments.batch, int(arguments.length))
    else:
        batches = real_texts(arguments.length, arguments.glue, arguments.tokenizer, arguments.batch, arguments.rounds)
    dtype = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}[arguments.precision]

    def autocast() -> Any:
        return nullcontext() if dtype is None else torch.autocast(device.type, dtype)

    optimizer = arguments.optimizer or ("sgd" if kind == "image" else "adamw")
    # More than a batch, whose gradients may have fewer directions than LoRA-GA needs.
    many = next(image_batches(net, 32) if kind == "image" else random_texts(32, 64))[0]
    first = {name: value.to(device) for name, value in many.items()}
    variants = [Variant(name, net, kind, device, optimizer, first) for name in arguments.variants]
    del net
    if arguments.compile:
        for variant in variants:
            compile_blocks(variant.net)
    for i in range(-arguments.warmup, arguments.rounds):
        pair = [{name: value.to(device) for name, value in batch.items()} for batch in next(batches)]
        turn = i % len(variants)  # no variant always follows the same other
        for variant in variants[turn:] + variants[:turn]:
            mine = pair[0] if variant.adaptation is not None and not arguments.same_padding else pair[1]
            variant.timed_step(mine, autocast) if i >= 0 else variant.step(mine, autocast)
    batch = {name: value.to(device) for name, value in next(batches)[1].items()}
    memory = {}
    for variant in variants:
        memory[variant.name] = (variant.peak_bytes if device.type == "cuda" else variant.kept_bytes)(batch, autocast)
        variant.time_events()
    return {"variants": {v.name: v for v in variants}, "memory": memory, "kind": kind, "device": device_name(device)}


def ratios(variants: dict[str, Variant], base: str) -> dict[str, float]:
    """Seconds of each other variant, its events included, over those of ``base``; the median over rounds."""
    return {
        f"{name}_vs_{base}": statistics.median(
            own / other for own, other in zip(variant.step_seconds, variants[base].step_seconds, strict=True)
        )
        for name, variant in variants.items()
        if name != base
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm ViT, vit_tiny or deberta-v3-base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", default="128", help="tokens, or a GLUE task for its real lengths")
    parser.add_argument("--same-padding", action="store_true", help="ours pads to 128 too")
    parser.add_argument("--glue", default="nyu-mll/glue")
    parser.add_argument("--tokenizer", default="microsoft/deberta-v3-base")
    parser.add_argument("--precision", choices=["32", "bf16", "16"], default="32")
    parser.add_argument("--optimizer", choices=["sgd", "adamw"], help="by default the paper's: sgd for images")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--variants", nargs="+", default=["floor", "full", "peft", "lora", "pissa", "srlora"])
    parser.add_argument("--base", default="lora", help="the variant that all others are compared with")
    arguments = parser.parse_args()
    if arguments.base not in arguments.variants:
        arguments.variants.insert(0, arguments.base)
    result = measure(arguments)
    variants: dict[str, Variant] = result["variants"]
    base = arguments.base
    against, memory = ratios(variants, base), result["memory"]
    header = ["variant", "trainable", "seconds a step", f"this / {base}", "MiB"]
    rows = [
        [
            name,
            f"{variant.trainable:,}",
            statistics.median(variant.step_seconds),
            against.get(f"{name}_vs_{base}", 1.0),
            f"{memory[name] / 2**20:,.0f}",
        ]
        for name, variant in variants.items()
    ]
    padding = "same padding" if arguments.same_padding else "ours in buckets" if not arguments.length.isdigit() else ""
    setting = f"length {arguments.length} {padding}" if result["kind"] == "text" else ""
    title = f"{arguments.model}, batch {arguments.batch}, {setting} precision {arguments.precision}, {result['device']}"
    report(
        title,
        header,
        rows,
        {
            "benchmark": "step_time",
            "arguments": vars(arguments),
            "device": result["device"],
            "ratios": against,
            "memory": {f"{name}_vs_{base}": size / memory[base] for name, size in memory.items() if name != base},
            "bytes": memory,
            "seconds": {name: statistics.median(variant.seconds) for name, variant in variants.items()},
            "event_seconds": {name: variant.event_seconds for name, variant in variants.items() if variant.events},
        },
    )


if __name__ == "__main__":
    main()
