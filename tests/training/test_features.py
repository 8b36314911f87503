"""What goes with which method: every cell is tried, a "no" is a refusal by name, and docs/features.md says the same."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from transformers import AutoTokenizer

from srlora_pl import CausalLM, InstructionData, Peft, PrefixTuning, PromptTuning, UserError, export_model
from srlora_pl.lowrank import Method
from srlora_pl.lowrank.methods import REGISTRY
from srlora_pl.tasks.base import Task
from srlora_pl.training import checkpoints
from srlora_pl.util.signatures import arguments_of_class
from srlora_pl.util.tables import markdown
from tests.helpers.causal import tiny_llama
from tests.helpers.digits import SmallDigits, model
from tests.helpers.digits import trainer as digits_trainer
from tests.helpers.encoders import BERT, ShuffledData, samples
from tests.helpers.instructions import save_tokenizer, write
from tests.helpers.models import encoder_folder, text_task
from tests.helpers.paths import ROOT
from tests.helpers.texts import WORDS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("backbone")]
IA3 = {"peft_type": "IA3", "feedforward_modules": ".*fc2"}
STEPS = 6
PAGE = ROOT / "docs/features.md"


def causal_folder(folder: Path) -> str:
    """A network with its tokenizer, and texts for it."""
    folder.mkdir()
    vocabulary = len(AutoTokenizer.from_pretrained(save_tokenizer(folder)))
    tiny_llama(vocab_size=vocabulary).save_pretrained(folder)
    rows = [{"prompt": "how " * (1 + i % 5), "answer": "yes " * (1 + i % 3)} for i in range(40)]
    for split in ("train", "val"):
        write(folder / f"{split}.jsonl", rows)
    return str(folder)


class Trial:
    """Short runs of one method in a folder."""

    def __init__(self, kind: type[Method], home: Path) -> None:
        self.kind, self.home = kind, home
        self.text = encoder_folder(home / "text", BERT) if kind is PromptTuning else None
        self.causal = causal_folder(home / "causal") if kind is PrefixTuning else None

    def settings(self, **more: Any) -> dict[str, Any]:
        ours: dict[str, Any] = {"rank": 2, "alpha": 4.0, "target_rank": 6, "gradient_samples": 40, "size": 4, **more}
        if self.kind is Peft:
            ours |= {"config": IA3, "target_modules": ["attn.proj", "fc1", "fc2"]}
        known = arguments_of_class(self.kind)
        return {name: value for name, value in ours.items() if name in known or name in more}

    def task(self, method: dict[str, Any] | None = None, **options: Any) -> Task:
        L.seed_everything(3, verbose=False)
        made = self.kind(**self.settings(**(method or {})))
        if self.text is not None:
            return text_task(self.text, made, **options)
        if self.causal is not None:
            return CausalLM(self.causal, made, **options)
        return model(method=made, mixup=0.0, cutmix=0.0, **options)

    def fit(self, task: Task, name: str, *callbacks: Any, ckpt_path: Path | None = None, **options: Any) -> Task:
        rows = [{**each, "input_ids": each["input_ids"] % len(WORDS)} for each in samples(40, torch.arange(40) % 2)]
        data: Any = SmallDigits() if self.text is None else ShuffledData(rows)
        if self.causal is not None:
            data = InstructionData(self.causal, template="{prompt}", max_length=16, batch_size=4)
        images = self.text is None and self.causal is None
        validation = {} if images else {"val_check_interval": None, "limit_val_batches": 0}
        run = digits_trainer(self.home / name, *callbacks, max_steps=STEPS, **validation, **options)
        run.fit(task, datamodule=data, ckpt_path=ckpt_path)
        return task

    @cache  # noqa: B019
    def trained(self) -> Task:
        return self.fit(self.task(), "whole")


def resume(trial: Trial) -> None:
    whole = trial.trained()
    resumed = trial.fit(trial.task(), "resumed", ckpt_path=trial.home / "whole/step=3.ckpt")
    for (name, value), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def compact(trial: Trial) -> None:
    """Nothing that did not change is in the file."""
    task = trial.trained()
    saved = checkpoints.read(trial.home / f"whole/step={STEPS}.ckpt")["state_dict"]
    before = trial.task().state_dict()
    ours = {id(p) for layer in task.adaptation.layers.values() for p in layer.adapter_parameters()}
    others = {name: p for name, p in task.named_parameters() if name in saved and id(p) not in ours}
    assert not [name for name, p in others.items() if not p.requires_grad and torch.equal(p, before[name])]


def disabled(trial: Trial) -> None:
    task = trial.trained()
    with task.adaptation.disabled():
        pass


def merged(trial: Trial) -> None:
    export_model(trial.trained(), trial.home / "merged", "merged", force=True)


def as_peft(trial: Trial) -> None:
    export_model(trial.trained(), trial.home / "peft", "peft", force=True)


def averaged(trial: Trial) -> None:
    trial.fit(trial.task(), "averaged", WeightAveraging())


def half(trial: Trial) -> None:
    trial.fit(trial.task(), "half", precision="bf16-mixed")


def stored(weights: str) -> Callable[[Trial], None]:
    """A run that stops and goes on to the bit."""

    def with_weights(trial: Trial) -> None:
        options, name = {"precision": "bf16-mixed"}, f"whole-{weights}"
        whole = trial.fit(trial.task(weights=weights), name, **options)
        file = trial.home / name / "step=3.ckpt"
        resumed = trial.fit(trial.task(weights=weights), f"resumed-{weights}", ckpt_path=file, **options)
        for (key, value), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(value, other), key

    return with_weights


def compiled(trial: Trial) -> None:
    task = trial.task(compile=True)
    assert any(module._compiled_call_impl is not None for module in task.modules())
    trial.fit(task, "compiled")


def setting(**values: Any) -> Callable[[Trial], None]:
    def with_setting(trial: Trial) -> None:
        trial.fit(trial.task(values), "setting")

    return with_setting


FEATURES: dict[str, Callable[[Trial], None]] = {
    "exact resume": resume,
    "compact file": compact,
    "half precision": half,
    "weights in bfloat16": stored("bfloat16"),
    "weights in nf4": stored("nf4"),
    "`compile`": compiled,
    "weight averages": averaged,
    "`disabled()`": disabled,
    "merged export": merged,
    "PEFT export": as_peft,
    "`dropout`": setting(dropout=0.1),
    "`rank_pattern`": setting(rank_pattern={"fc1": 4}),
    "`lr_ratio`": setting(lr_ratio=2.0),
    "parts of a fused qkv": setting(target_modules=["query", "fc1"]),
}
HEAD = """# What goes with which method

Made and kept true by `tests/training/test_features.py`, which tries every cell on a small network. "-" is refused by
name, before training. All methods train in `ddp` and equal one process (`tests/lowrank/test_contract.py`), and in
`fsdp2` but GaLore, which needs whole gradients (`tests/training/test_fsdp2.py`); weights in nf4 do not go with `fsdp2`.
`Peft` is tried with IA3, `PromptTuning` on BERT, `PrefixTuning` on a Llama, all others on a ViT. A compact file holds
the changes since the pretrained weights; where all of a network trains that is all of it.

"""


def outcome(trial: Trial, name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    if name == "`compile`":  # without a compiler: what matters is whether the graphs can be traced
        whole = nn.Module.compile
        monkeypatch.setattr(nn.Module, "compile", lambda self: whole(self, backend="eager"))
    try:
        FEATURES[name](trial)
    except (UserError, TypeError) as error:  # the second for settings that a method lacks
        named = rf"{trial.kind.__name__}|IA3|Hydra|Prompt|Prefix"
        pattern = named if isinstance(error, UserError) else r"unexpected keyword argument"
        return "-" if re.search(pattern, str(error), re.IGNORECASE) else f"{type(error).__name__}: {error}"
    return "yes"


def rows_of(page: str) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows[2:]}


@pytest.mark.parametrize("kind", REGISTRY, ids=lambda kind: kind.__name__)
def test_the_page_says_what_goes_with_it(kind: type[Method], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial, found = Trial(kind, tmp_path), []
    for name in FEATURES:
        with monkeypatch.context() as patch:
            found.append(outcome(trial, name, patch))
    print(markdown([kind.__name__, *found], []).splitlines()[0])  # the row, for the page
    assert rows_of(PAGE.read_text())[kind.__name__] == found


def test_the_page_has_every_method_and_feature() -> None:
    page = PAGE.read_text()
    assert page.startswith(HEAD)
    assert f"\n| method | {' | '.join(FEATURES)} |\n" in page
    assert list(rows_of(page)) == [kind.__name__ for kind in REGISTRY]
