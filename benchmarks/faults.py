"""Kill runs with SIGKILL, resume them until they are done, and compare each with one that nobody disturbed.

    python -m benchmarks.faults --images 36 --texts 12

Every attempt is ``main(["fit", "--config", ..., "--ckpt_path", "last"])`` of the command line in a process of its own,
forked from this one so that torch is imported once; the undisturbed run is a plain ``python cli.py fit``. Attempts say
through a pipe where they are, and are slowed there so that a kill can hit; a kill comes a random time after a random
one of these marks, or (``anywhere``) a random time after the start. It counts under the last mark before death.

What is compared, bit for bit: weights, averages, optimizer, schedule and position in the last checkpoint, and the
best one; metrics.csv; the curves in TensorBoard's files.
"""

import argparse
import contextlib
import csv
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

if not __package__:  # run as a file, whose folder holds a kernels.py that transformers would take for a package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import yaml
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.report import report
from srlora_pl import cli
from srlora_pl.lowrank.methods.switching import Switching
from srlora_pl.run.run import Run
from srlora_pl.training import checkpoints
from srlora_pl.util.system import device_name

ROOT = Path(__file__).parents[1]
AIMS = ("step", "switch", "checkpoint", "validation", "anywhere")
PIPE = "FAULTS_PIPE"

IMAGES: dict[str, Any] = {
    "seed_everything": 3,
    "model": {
        "class_path": "srlora_pl.ImageClassifier",
        "init_args": {
            "backbone": "vit_tiny_in64",
            "backbone_kwargs": {"drop_path_rate": 0.1},
            "method": {
                "class_path": "srlora_pl.SRLoRA",
                "init_args": {"rank": 2, "target_rank": 14, "dropout": 0.1, "layers": "3-5"},
            },
            "optimizer": "adamw",
            "lr": 0.002,
            "mixup": 0.2,
            "warmup_steps": 3,
        },
    },
    "data": {
        "class_path": "srlora_pl.ImageData",
        "init_args": {"name": "digits", "batch_size": 2, "hflip": False, "crop_scale": [0.7, 1.0]},
    },
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 20,
        "val_check_interval": 6,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 3,
        "limit_test_batches": 2,
        "log_every_n_steps": 2,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    },
}
SAVE_OFTEN = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"every_n_train_steps": 2, "filename": "often-{step}"},
}
TEXTS: dict[str, Any] = {
    "seed_everything": 3,
    "model": {
        "class_path": "srlora_pl.TextClassifier",
        "init_args": {
            "backbone": "encoder",
            "backbone_checkpoint": "encoder/model.safetensors",
            "method": {"class_path": "srlora_pl.SRLoRA", "init_args": {"rank": 2, "target_rank": 12}},
            "lr": 0.01,
        },
    },
    "data": {
        "class_path": "srlora_pl.TextData",
        "init_args": {"root": "texts.csv", "batch_size": 8, "max_length": 32, "cache_dir": "tokens"},
    },
    "trainer": {**IMAGES["trainer"], "max_steps": 30},
}


# -- in the process that is killed


def say(place: str, pause: float = 0.0) -> None:
    """Tell the parent where this process is, and stay there for a moment."""
    os.write(int(os.environ[PIPE]), f"{place}\n".encode())
    time.sleep(pause)


class Places(Callback):
    """Marks steps and validations."""

    def on_train_batch_start(self, *_: Any) -> None:
        say("step")

    def on_before_optimizer_step(self, *_: Any) -> None:
        say("step", 0.01)

    def on_train_batch_end(self, *_: Any) -> None:
        say("step", 0.01)

    def on_validation_start(self, *_: Any) -> None:
        say("validation", 0.01)

    def on_validation_batch_end(self, *_: Any) -> None:
        say("validation", 0.01)

    def on_validation_end(self, *_: Any) -> None:
        say("validation", 0.01)

    def on_fit_end(self, *_: Any) -> None:
        say("test")


class Slowly:
    """A file whose first large piece is written in two parts, with a mark between them."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.whole = file, True

    def write(self, data: Any) -> int:
        if len(data) < 1024 or not self.whole:
            return self.file.write(data)
        self.whole = False
        data = bytes(data)
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        say("checkpoint", 0.02)
        self.file.write(data[len(data) // 2 :])
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def watched() -> None:
    """Put marks around checkpoints and switches, of which a user's callback does not know."""
    replacing, switch, trainer = checkpoints.replacing, Switching._switch, Run.instantiate_trainer

    @contextlib.contextmanager
    def slowly(path: Path) -> Iterator[Any]:
        say("checkpoint", 0.01)
        with replacing(path) as file:
            yield Slowly(file)
            say("checkpoint", 0.02)  # written, but not yet in its place
        say("checkpoint", 0.02)

    def switched(self: Switching, matrices: list[Any], *rest: Any) -> None:
        say("switch", 0.005)
        switch(self, matrices, *rest)
        say("switch", 0.01)

    def with_places(self: Run, **options: Any) -> Any:
        built = trainer(self, **options)
        built.callbacks.append(Places())
        return built

    checkpoints.replacing, Switching._switch, Run.instantiate_trainer = slowly, switched, with_places  # type: ignore


# -- the parent


class Story:
    """One run, from its first attempt to its end, in the folder ``home``."""

    def __init__(self, home: Path, arguments: list[str], rng: random.Random) -> None:
        self.home, self.arguments, self.rng = home, arguments, rng
        self.log = home / "log.txt"

    def attempt(self, aim: str | None, within: float) -> str | None:
        """Start or resume; kill at ``aim``, or never for None. Where it died, or None when it came to its end.

        ``within``: seconds after the start, for the aim ``anywhere``.
        """
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            self._run(writer)
        os.close(writer)
        try:
            place = self._follow(pid, reader, aim, within)
        finally:
            os.close(reader)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            return place
        if code := os.waitstatus_to_exitcode(status):
            raise RuntimeError(f"attempt ended with {code}:\n{self.log.read_text()[-3000:]}")
        return None

    def _run(self, writer: int) -> None:
        code = 1
        with contextlib.suppress(BaseException):
            os.chdir(self.home)
            os.set_inheritable(writer, True)
            os.environ[PIPE] = str(writer)
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.argv = ["cli.py", *self.arguments]
            watched()
            try:
                code = cli.main()
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

    def _follow(self, pid: int, reader: int, aim: str | None, within: float) -> str:
        """Read marks until the process is dead; kill it once its time has come."""
        begin = time.monotonic()
        deadline = begin + self.rng.uniform(0, within) if aim == "anywhere" else None
        left = {"step": 25, "switch": 8, "checkpoint": 24, "validation": 8}.get(aim or "", 0)
        left = self.rng.randint(1, left) if left else 0
        place, text = "start", b""
        while True:
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([reader], [], [], wait)[0]:
                os.kill(pid, signal.SIGKILL)
                deadline = None
                continue
            data = os.read(reader, 4096)
            if not data:
                return place
            *lines, text = (text + data).split(b"\n")
            for line in lines:
                place = line.decode()
                left -= place == aim
                if place == aim and left == 0:
                    deadline = time.monotonic() + self.rng.uniform(0, 0.03)


def outcome(home: Path) -> dict[str, Any]:
    """All that a finished run in ``home`` has left, but for times and places."""
    (file,) = home.glob("runs/*/*/checkpoints/last.ckpt")
    folder = file.parent.parent
    last = torch.load(file, weights_only=True)
    # A kill between writing a better one and deleting the old one leaves both; the run knows which is the best.
    states = [state for state in last["callbacks"].values() if state.get("monitor") == "val/loss"]
    best = Path(states[0]["best_model_path"])
    with (folder / "metrics.csv").open() as metrics:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(metrics)]
    return {
        "last": {key: value for key, value in last.items() if key not in ("callbacks", "loops")},
        "best": (best.name, torch.load(best, weights_only=True)["state_dict"]),
        "metrics": rows,
        "curves": curves(folder),
    }


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Of TensorBoard, by tag steps and values; those of time and memory differ between any two runs."""
    events = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    tags = (tag for tag in events.Tags()["scalars"] if not tag.startswith(("time/", "memory/")))
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def difference(one: Any, other: Any, where: str = "") -> str | None:
    """The first place where two outcomes are not equal to the bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
        return None if same else where
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs: Any = [(key, one[key], other[key]) for key in one]
    elif isinstance(one, (list, tuple)) and type(one) is type(other) and len(one) == len(other):
        pairs = zip(range(len(one)), one, other, strict=True)
    else:
        return None if type(one) is type(other) and (one == other or one != one) else f"{where}: {one!r}, {other!r}"
    return next(filter(None, (difference(a, b, f"{where}.{key}") for key, a, b in pairs)), None)


def make_texts(home: Path) -> None:
    """A small encoder with weights of its own, its tokenizer, and sentences to tell apart."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(30))]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words), max_position_embeddings=64, **sizes)
    BertForSequenceClassification(config).save_pretrained(home / "encoder")
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 64}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(home / "encoder")
    rng = random.Random(0)
    lines = ["text,label"]
    for _ in range(90):
        numbers = [rng.randrange(30) for _ in range(rng.randint(1, 25))]
        lines.append(" ".join(f"w{i}" for i in numbers) + f",{'even' if sum(numbers) % 2 == 0 else 'odd'}")
    (home / "texts.csv").write_text("\n".join(lines) + "\n")


def prepare(home: Path, kind: str, variant: int) -> list[str]:
    """Fill a run's folder; the arguments of the command line."""
    home.mkdir(parents=True)
    settings = IMAGES if kind == "images" else TEXTS
    trainer, data = dict(settings["trainer"]), settings["data"]
    if variant % 2 == 0:
        trainer["callbacks"] = [SAVE_OFTEN]
    else:
        trainer |= {"accumulate_grad_batches": 2, "val_check_interval": 7}
        data = {**data, "init_args": {**data["init_args"], "num_workers": 1}}
    if kind == "texts":
        make_texts(home)
    (home / "run.yaml").write_text(yaml.safe_dump({**settings, "trainer": trainer, "data": data}))
    return ["fit", "--config", "run.yaml", "--ckpt_path", "last"]


def undisturbed(home: Path, arguments: list[str]) -> float:
    """A plain process from start to end; its seconds."""
    begin = time.monotonic()
    paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    subprocess.run(
        [sys.executable, ROOT / "cli.py", *arguments],
        cwd=home,
        env={**os.environ, "PYTHONPATH": paths},
        check=True,
        capture_output=True,
    )
    return time.monotonic() - begin


def stories(kind: str, kills: int, each: int, seed: int, home: Path) -> tuple[Counter[str], Counter[str]]:
    """Kill ``kills`` times, about ``each`` times a run; kills by place, and of those the ones survived."""
    rng = random.Random(f"{kind} {seed}")
    tried: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    expected: dict[int, tuple[Any, float]] = {}
    number = 0
    while tried.total() < kills:
        variant = number % 2
        if variant not in expected:
            reference = home / f"{kind}-undisturbed-{variant}"
            seconds = undisturbed(reference, prepare(reference, kind, variant))
            expected[variant] = outcome(reference), seconds
        whole, seconds = expected[variant]
        folder = home / f"{kind}-{number}"
        story = Story(folder, prepare(folder, kind, variant), rng)
        here: Counter[str] = Counter()
        while here.total() < min(each, kills - tried.total()):
            place = story.attempt(AIMS[(tried + here).total() % len(AIMS)], seconds / 2)
            if place is None:
                break
            here[place] += 1
            print(f"{kind} {number}: killed at {place}", flush=True)
        else:
            story.attempt(None, 0)
        tried += here
        if found := difference(outcome(folder), whole):
            print(f"{kind} {number}: differs at {found[:500]}", flush=True)
        else:
            survived += here
            print(f"{kind} {number}: {here.total()} kills, equal to the undisturbed run", flush=True)
        number += 1
    return tried, survived


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=36, help="kills of runs on images")
    parser.add_argument("--texts", type=int, default=12, help="kills of runs on texts")
    parser.add_argument("--each", type=int, default=5, help="kills of one run at most")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # the undisturbed run too: sums of two threads round differently
    result: dict[str, Any] = {"benchmark": "faults", "device": device_name(torch.device("cpu")), "seed": arguments.seed}
    rows = []
    with tempfile.TemporaryDirectory() as home:
        os.environ["XDG_CACHE_HOME"] = f"{home}/cache"
        for kind, kills in (("images", arguments.images), ("texts", arguments.texts)):
            tried, survived = stories(kind, kills, arguments.each, arguments.seed, Path(home))
            rows += [[kind, place, tried[place], survived[place]] for place in sorted(tried)]
            result[kind] = {place: [tried[place], survived[place]] for place in sorted(tried)}
    report("kills with SIGKILL", ["run", "place of death", "tried", "survived"], rows, result)
    raise SystemExit(any(tried != survived for _, _, tried, survived in rows))


if __name__ == "__main__":
    main()
