"""Seconds and bytes of a training step: ours, PEFT's LoRA, full fine-tuning, and the floor of a frozen backbone.

    python -m benchmarks.step_time --model vit_base_patch16_224 --batch 8
    python -m benchmarks.step_time --model deberta-v3-base --batch 16 --length cola --glue ../shared/data/glue \\
        --tokenizer ../shared/models/deberta_v3_tokenizer

A step is forward, backward, scores, optimizer and the share of a switch that falls on it at the paper's interval. All
variants train copies of one network with random weights, interleaved in one process; a ratio is the median over the
rounds of seconds over seconds of the same round. The floor trains the head alone but sends gradients through the whole
backbone. With ``--length`` and a GLUE task the texts have their real lengths: ours in length buckets, the others padded
to 128 or, with ``--same-padding``, all padded to 128.
"""

import argparse
import copy
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import timm
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, DebertaV2Config

from benchmarks.models import DEBERTA_V3_BASE
from benchmarks.report import report
from benchmarks.texts import glue_batches
from srlora_pl.lowrank import Adaptation, LoRA, PiSSA, SRLoRA
from srlora_pl.models.deberta import use_fast_attention
from srlora_pl.util.system import device_name

# Optimizer steps between two switches in the paper's runs: 5,000 steps and 30 switches; CoLA's 10,700 and 62.
INTERVAL = {"image": 5000 / 30, "text": 10_700 / 62}
RANK, ALPHA = 8, 8.0
OURS = ("lora", "pissa", "srlora")
Batch = dict[str, Tensor]


class Variant:
    """One way to train a copy of the network."""

    def __init__(self, name: str, net: nn.Module, kind: str, device: torch.device, optimizer: str) -> None:
        self.name, self.net, self.kind = name, copy.deepcopy(net).to(device), kind
        self.adaptation: Adaptation | None = None
        getattr(self, f"_{name}", self._ours)()
        trained = [p for p in self.net.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in trained)
        if optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)
        else:
            self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        self.seconds: list[float] = []
        self.switch_seconds = 0.0

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
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=linears), self.net)
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_("lora_" in name or name.startswith(tuple(self._head)))

    def _ours(self) -> None:
        target = {"target_rank": 128} if self.name == "srlora" else {}
        method = {"lora": LoRA, "pissa": PiSSA, "srlora": SRLoRA}[self.name](rank=RANK, alpha=ALPHA, **target)
        self.adaptation = Adaptation(self.net, method, self._head)
        if self.kind == "text":
            use_fast_attention(self.net, "benchmark")  # type: ignore[arg-type]
        self.adaptation.start()
        self.adaptation.plan(round(30 * INTERVAL[self.kind]))

    def loss(self, batch: Batch) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name not in ("label", "index")}
        if self.kind == "text":
            logits = self.net(**inputs).logits
        else:
            logits = self.net(inputs["image"])
        return nn.functional.cross_entropy(logits.float(), batch["label"])

    def step(self, batch: Batch, autocast: Callable[[], Any]) -> None:
        with autocast():
            loss = self.loss(batch)
        loss.backward()
        if self.adaptation is not None:
            self.adaptation.before_optimizer(1)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed_step(self, batch: Batch, autocast: Callable[[], Any]) -> None:
        with _timed(self.seconds, batch["label"].device):
            self.step(batch, autocast)

    def time_a_switch(self, device: torch.device) -> None:
        """The median of three."""
        assert self.adaptation is not None
        seconds: list[float] = []
        for _ in range(3):
            due = self.adaptation.controller.progress().done + 1
            with _timed(seconds, device):
                assert self.adaptation.after_optimizer(round(due * INTERVAL[self.kind]) + 1, self.optimizer)
        self.switch_seconds = statistics.median(seconds)

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
            loss = self.loss(batch)
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
def _timed(seconds: list[float], device: torch.device) -> Iterator[None]:
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
    variants = [Variant(name, net, kind, device, optimizer) for name in arguments.variants]
    del net
    if arguments.compile:
        for variant in variants:
            compile_blocks(variant.net)
    for i in range(-arguments.warmup, arguments.rounds):
        pair = [{name: value.to(device) for name, value in batch.items()} for batch in next(batches)]
        turn = i % len(variants)  # no variant always follows the same other
        for variant in variants[turn:] + variants[:turn]:
            mine = pair[0] if variant.name in OURS and not arguments.same_padding else pair[1]
            variant.timed_step(mine, autocast) if i >= 0 else variant.step(mine, autocast)
    batch = {name: value.to(device) for name, value in next(batches)[1].items()}
    memory = {}
    for variant in variants:
        memory[variant.name] = (variant.peak_bytes if device.type == "cuda" else variant.kept_bytes)(batch, autocast)
        if variant.name == "srlora":
            variant.time_a_switch(device)
    return {"variants": {v.name: v for v in variants}, "memory": memory, "kind": kind, "device": device_name(device)}


def ratios(variants: dict[str, Variant], kind: str) -> dict[str, float]:
    """Seconds of SRLoRA, its switches included, over those of each other variant; the median over rounds."""
    mine = variants["srlora"]
    share = mine.switch_seconds / INTERVAL[kind]
    return {
        f"srlora_vs_{name}": statistics.median(
            (own + share) / other for own, other in zip(mine.seconds, variant.seconds, strict=True)
        )
        for name, variant in variants.items()
        if name != "srlora"
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
    arguments = parser.parse_args()
    result = measure(arguments)
    variants: dict[str, Variant] = result["variants"]
    against = ratios(variants, result["kind"])
    header = ["variant", "trainable", "seconds a step", "srlora / this", "MiB"]
    rows = [
        [
            name,
            f"{variant.trainable:,}",
            statistics.median(variant.seconds),
            against.get(f"srlora_vs_{name}", 1.0),
            f"{result['memory'][name] / 2**20:,.0f}",
        ]
        for name, variant in variants.items()
    ]
    padding = "same padding" if arguments.same_padding else "ours in buckets" if not arguments.length.isdigit() else ""
    setting = f"length {arguments.length} {padding}" if result["kind"] == "text" else ""
    title = f"{arguments.model}, batch {arguments.batch}, {setting} precision {arguments.precision}, {result['device']}"
    base = result["memory"]["srlora"]
    report(
        title,
        header,
        rows,
        {
            "benchmark": "step_time",
            "arguments": vars(arguments),
            "device": result["device"],
            "ratios": against,
            "memory": {f"srlora_vs_{name}": base / size for name, size in result["memory"].items() if name != "srlora"},
            "bytes": result["memory"],
            "seconds": {name: statistics.median(variant.seconds) for name, variant in variants.items()},
            "switch_seconds": variants["srlora"].switch_seconds,
        },
    )


if __name__ == "__main__":
    main()
