"""What `srlora plan` says of a run on the CPU, and what two of its steps take.

    python -m benchmarks.plan --config smollm2_gsm8k_srlora --config methods/lora --data.batch_size 4

Measured is the most resident memory of a process that loads the network, starts and takes two steps, less what it had
once all was imported. All texts have ``data.max_length`` tokens, all of them answers. Memory is asked of the system for
each tensor (``MALLOC_MMAP_THRESHOLD_``): by default glibc keeps freed memory with gaps in it, up to 30 % more,
differently in each process. ``--as_it_is`` measures that.
"""

import argparse
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

if not __package__:  # run as a file, whose folder holds a kernels.py that transformers would take for a package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.causal import resident
from srlora_pl.planning.advice import Plan
from srlora_pl.planning.command import Planned
from srlora_pl.planning.step import batch_for, optimizer_of
from srlora_pl.run import config
from srlora_pl.util.cache import cache_folder

_EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def planned(words: list[str]) -> Planned:
    """The settings of the words of a command line: ``--config`` first."""
    files = [config.find(words[i + 1]) for i, word in enumerate(words) if word == "--config"]
    rest = [word for i, word in enumerate(words) if word != "--config" and words[i - 1] != "--config"]
    return Planned("fit", files, [config.read(file) for file in files], rest)


def measure(words: list[str]) -> None:
    """Print the bytes of a run; the process does nothing else."""
    run = planned(words)
    data, precision = run.config.data.init_args, str(run.config.trainer.precision)
    imported = resident("VmRSS")
    task = run.real_task()
    adaptation = task.adaptation
    adaptation.start(adaptation.method.sources(cache=cache_folder("spectra")))
    adaptation.plan(1000)
    optimizer = optimizer_of(task)
    batch = batch_for(task, data.batch_size, data.get("max_length") or 1)
    for step in (1, 2):
        with torch.autocast("cpu", torch.bfloat16) if "16" in precision else nullcontext():
            loss = task.training_loss(batch)
        optimizer.zero_grad()
        loss.backward()
        del loss
        adaptation.before_optimizer(step)
        optimizer.step()
        adaptation.after_optimizer(step, optimizer)
    print(resident("VmHWM") - imported)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="all else: as for `srlora plan`",
        allow_abbrev=False,
    )
    parser.add_argument("--as_it_is", action="store_true", help="leave the system's memory allocation as it is")
    parser.add_argument("--one", action="store_true", help="the process of the run that is measured")
    arguments, words = parser.parse_known_args()
    if arguments.one:
        measure(words)
        return
    run = planned(words)
    data = run.config.data.init_args
    plan = Plan(run.task, data.batch_size, data.get("max_length"), str(run.config.trainer.precision), separate=False)
    environment = os.environ | ({} if arguments.as_it_is else _EXACT)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.plan", "--one", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    measured = int(done.stdout.splitlines()[-1])
    print(f"planned {plan.memory / 1e6:,.0f} MB, measured {measured / 1e6:,.0f} MB: {plan.memory / measured - 1:+.1%}")


if __name__ == "__main__":
    main()
