"""Memory and time of a training step of a causal language model: ours, and PEFT's LoRA on the same linears.

    python -m benchmarks.causal memory --precision bf16 --weights bfloat16
    python -m benchmarks.causal time --length 256
    python -m benchmarks.causal time --length gsm8k --root ../shared/data/causal

PEFT's LoRA is that of any script with transformers: the labels go to the network, which makes the loss from whole
logits. Ours is a method by the name of its overlay in ``configs/methods``, with rank 8 and alpha 8. All have the same
dtypes and AdamW.

``memory``: the most resident memory of a process that loads the model and takes two steps, less what it had once all
was imported. Each variant has a process of its own. All tokens are answers.

``time``: the processor's seconds, which other programs hardly lengthen, for the steps of all variants, interleaved in
one process. With a number of tokens every sample has that length, all of it answers, and the ratio is the median over
the rounds of seconds over seconds of the same round. With ``gsm8k`` samples have the real lengths and answers of
GSM8K's training set in MetaMathQA's form: ours in length buckets, PEFT's padded to the longest of a random batch. Then
the ratio is of seconds for a token of text, over batches evenly spread from the shortest to the longest.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if not __package__:  # run as a file, whose folder holds a kernels.py that transformers would take for a package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from benchmarks.report import report
from benchmarks.step_time import method_of
from srlora_pl import CausalLM, MetaMathData
from srlora_pl.models import causal, pretrained
from srlora_pl.util.system import device_name

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 2  # the second has AdamW's state
RUN = 1562  # steps of LoRA-SB's runs on MetaMathQA; with some switches, none of them timed
Batch = dict[str, Tensor]


class Ours:
    """A `CausalLM` outside of a Trainer."""

    def __init__(self, method: str, arguments: argparse.Namespace) -> None:
        options = {"weights": arguments.weights, "loss_chunk": arguments.loss_chunk}
        self.task = CausalLM(arguments.backbone, method_of(method), **options)
        self.task.adaptation.start()
        self.task.adaptation.plan(RUN)
        self.net = self.task.net
        self.before, self.after = self.task.adaptation.before_optimizer, self.task.adaptation.after_optimizer

    def loss(self, batch: Batch) -> Tensor:
        return self.task.training_loss(batch)


class Peft:
    """PEFT's LoRA, the loss computed by transformers."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        net = causal.build(arguments.backbone, weights=arguments.weights)
        config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=8, target_modules=LINEARS)
        self.net = get_peft_model(net, config).train()

    def loss(self, batch: Batch) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        return self.net(**inputs, use_cache=False).loss

    def before(self, step: int) -> None:
        """Nothing comes between the backward pass and the optimizer."""

    after = before


class Variant:
    """One way to train a copy of the model."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name, self.steps = name, 0
        self.way: Ours | Peft = Peft(arguments) if name == "peft" else Ours(name, arguments)
        self.trained = [p for p in self.way.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        self.autocast: Callable[[], Any] = nullcontext
        if arguments.precision == "bf16":
            self.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
        self.seconds: list[float] = []

    def step(self, batch: Batch) -> None:
        begin = time.process_time()
        with self.autocast():
            loss = self.way.loss(batch)
        loss.backward()
        self.steps += 1
        self.way.before(self.steps)
        self.optimizer.step()
        self.way.after(self.steps)
        self.optimizer.zero_grad()
        self.seconds.append(time.process_time() - begin)


def equal_lengths(size: int, length: int) -> Batch:
    """Tokens (size, length), all of them answers."""
    ids = torch.randint(1000, 2000, (size, length))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def gsm8k(arguments: argparse.Namespace, in_buckets: bool) -> list[Batch]:
    """``rounds`` batches, evenly spread over an epoch's by their lengths."""
    data = MetaMathData(arguments.root, limit=None, batch_size=arguments.batch)
    module = SimpleNamespace(backbone_name=pretrained.resolve(arguments.backbone))
    trainer: Any = SimpleNamespace(
        lightning_module=module, world_size=1, global_rank=0, accumulate_grad_batches=1, state=SimpleNamespace(fn="fit")
    )
    data.trainer = trainer
    data.load("fit")
    train: Any = data.train_set
    generator = torch.Generator().manual_seed(0)
    order = data.train_order(0) if in_buckets else torch.randperm(len(train), generator=generator)
    groups = [group for group in order.split(arguments.batch) if len(group) == arguments.batch]
    groups.sort(key=lambda group: int(train.lengths[group].max()))
    places = [(2 * i + 1) * len(groups) // (2 * arguments.rounds) for i in range(arguments.rounds)]
    batches = []
    for group in (groups[place] for place in places):
        batch = train.__getitems__(group.tolist())
        real = torch.arange(batch["input_ids"].shape[1]) < train.lengths[group][:, None]
        batches.append({**batch, "attention_mask": real.long()})
    return batches


def resident(key: str) -> int:
    """Bytes of this process's memory: ``VmRSS`` now, ``VmHWM`` at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def measure_peak(arguments: argparse.Namespace) -> None:
    """Print the bytes of the one variant; the process does nothing else."""
    imported = resident("VmRSS")
    variant = Variant(arguments.variants[0], arguments)
    batch = equal_lengths(arguments.batch, int(arguments.length))
    for _ in range(STEPS):
        variant.step(batch)
    print(resident("VmHWM") - imported)


def memory(arguments: argparse.Namespace) -> tuple[dict[str, float], dict[str, int]]:
    """The ratios to PEFT's, and the bytes."""
    given = vars(arguments) | {"what": "one"}
    peaks = {}
    for name in arguments.variants:
        words = [f"--{key}={value}" for key, value in given.items() if key not in ("what", "variants")]
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.causal", "one", "--variants", name, *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        if done.returncode:
            raise SystemExit(done.stderr)
        peaks[name] = int(done.stdout.splitlines()[-1])
    return {f"{name}_vs_peft": peak / peaks["peft"] for name, peak in peaks.items() if name != "peft"}, peaks


def times(arguments: argparse.Namespace) -> tuple[dict[str, float], dict[str, Any]]:
    """The ratios to PEFT's, and the seconds and, of real lengths, the tokens."""
    variants = {name: Variant(name, arguments) for name in arguments.variants}
    if arguments.length.isdigit():
        one = equal_lengths(arguments.batch, int(arguments.length))
        batches = {name: [one] * arguments.rounds for name in variants}
    else:
        ways = {in_buckets: gsm8k(arguments, in_buckets) for in_buckets in (True, False)}
        batches = {name: ways[name != "peft"] for name in variants}
    for i in range(-1, arguments.rounds):
        turn = i % len(variants)  # no variant always follows the same other
        for name in [*variants][turn:] + [*variants][:turn]:
            variants[name].step(batches[name][i])
    seconds = {name: variant.seconds[1:] for name, variant in variants.items()}
    tokens = {name: [int(each["attention_mask"].sum()) for each in batches[name]] for name in variants}
    places = {name: [each["attention_mask"].numel() for each in batches[name]] for name in variants}

    def ratio(name: str) -> float:
        if arguments.length.isdigit():
            return statistics.median(a / b for a, b in zip(seconds[name], seconds["peft"], strict=True))
        own, theirs = (sum(seconds[each]) / sum(tokens[each]) for each in (name, "peft"))
        return own / theirs

    ratios = {f"{name}_vs_peft": ratio(name) for name in variants if name != "peft"}
    return ratios, {"seconds": seconds, "tokens": tokens, "places": places}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "time", "one"], help="one: the process of a variant")
    parser.add_argument("--backbone", default="smollm2")
    parser.add_argument("--variants", nargs="+", default=["lora", "srlora", "peft"])
    parser.add_argument("--precision", choices=["32", "bf16"], default="32")
    parser.add_argument("--weights", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--loss_chunk", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", default="512", help="tokens, or gsm8k for its real lengths")
    parser.add_argument("--root", default="../shared/data/causal", help="a folder with gsm8k/train.jsonl")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.what == "one":
        measure_peak(arguments)
        return
    if "peft" not in arguments.variants:
        arguments.variants.append("peft")
    shape = (
        f"{arguments.batch} x {arguments.length} tokens, precision {arguments.precision}, {arguments.weights} weights"
    )
    result = {
        "benchmark": f"causal {arguments.what}",
        "arguments": vars(arguments),
        "device": device_name(torch.device("cpu")),
    }
    if arguments.what == "memory":
        ratios, peaks = memory(arguments)
        header = ["variant", "MiB", "this / peft"]
        rows = [[name, f"{peak / 2**20:,.0f}", ratios.get(f"{name}_vs_peft", 1.0)] for name, peak in peaks.items()]
        report(f"{arguments.backbone}, {shape}", header, rows, {**result, "ratios": ratios, "bytes": peaks})
        return
    ratios, told = times(arguments)
    header = ["variant", "seconds a step", "tokens a second", "text in a batch", "this / peft"]
    rows = []
    for name, seconds in told["seconds"].items():
        tokens, places = sum(told["tokens"][name]), sum(told["places"][name])
        speed, filled = tokens / sum(seconds), f"{tokens / places:.0%}"
        rows.append([name, statistics.median(seconds), speed, filled, ratios.get(f"{name}_vs_peft", 1.0)])
    report(f"{arguments.backbone}, {shape}", header, rows, {**result, "ratios": ratios, **told})


if __name__ == "__main__":
    main()
