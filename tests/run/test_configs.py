"""Every shipped config is parsed against the real signatures, alone and under every overlay; nothing is trained."""

import re
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification

import srlora_pl
from srlora_pl import Adaptation, GLUEData, LoRA, LoRASB, SRLoRA
from srlora_pl.data.loader import EpochBatches
from srlora_pl.lowrank.schedule import Schedule
from srlora_pl.run import config
from srlora_pl.run.run import Run
from srlora_pl.util.signatures import arguments_of_class
from tests.helpers.paths import ROOT

TASKS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
OVERLAYS = {
    "adalora": "AdaLoRA",
    "bitfit": "BitFit",
    "bottleneck": "Bottleneck",
    "dora": "DoRA",
    "dylora": "DyLoRA",
    "full": "Full",
    "galore": "GaLore",
    "hydralora": "HydraLoRA",
    "linear_probe": "LinearProbe",
    "lora": "LoRA",
    "lora_ga": "LoRAGA",
    "lora_plus": "LoRA",
    "lora_pro": "LoRAPro",
    "lora_sb": "LoRASB",
    "lora_xs": "LoRAXS",
    "peft_ia3": "Peft",
    "pissa": "PiSSA",
    "prefix_tuning": "PrefixTuning",
    "prompt_tuning": "PromptTuning",
    "relora": "ReLoRA",
    "rslora": "LoRA",
    "srlora": "SRLoRA",
    "tied_lora": "TiedLoRA",
    "vera": "VeRA",
}
SHARED = ("rank", "alpha", "target_modules")
NOT_IN_THE_PAPER = "# not in the paper"


class GLUE(NamedTuple):
    """What the paper gives for a task, and what follows for the rows of the official train split (Eq. 13, 14)."""

    epochs: int
    batch: int
    lr: float
    target_rank: int
    rows: int
    steps: int
    planned: int
    done: int
    interval: float
    reached: int


GLUE_TASKS = {
    "sst2": GLUE(20, 16, 3e-5, 512, 67_349, 84_200, 126, 125, 668.3, 508),
    "mrpc": GLUE(20, 32, 2e-4, 256, 3_668, 2_300, 62, 61, 37.1, 252),
    "cola": GLUE(20, 16, 1e-4, 256, 8_551, 10_700, 62, 61, 172.6, 252),
    "qnli": GLUE(10, 32, 1e-4, 128, 104_743, 32_740, 30, 29, 1091.3, 124),
    "rte": GLUE(50, 16, 1e-4, 16, 2_490, 7_800, 2, 1, 3900.0, 12),
    "stsb": GLUE(20, 8, 1e-4, 32, 5_749, 14_380, 6, 5, 2396.7, 28),
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("reading a config needs no network")

    monkeypatch.setattr("socket.socket.connect", refuse)


class Parsed(Run):
    """A run that stops once its settings are known."""

    def instantiate_classes(self) -> None:
        pass


@cache
def parse(*names: str, options: tuple[str, ...] = ()) -> Any:
    """The settings of a fit on these configs; cached, so not to be changed."""
    files = [str(ROOT / "configs" / name) for name in names]
    return Parsed("fit", files, [config.read(file) for file in files], list(options)).config


def test_there_is_an_overlay_for_each_method() -> None:
    assert {path.stem for path in (ROOT / "configs/methods").glob("*.yaml")} == set(OVERLAYS)


@pytest.mark.parametrize("name", TASKS)
def test_config_parses_and_names_its_method(name: str) -> None:
    method = parse(name).model.init_args.method
    assert method.class_path == ("srlora_pl.LoRASB" if name.endswith("_lora_sb.yaml") else "srlora_pl.SRLoRA")
    given = config.read(str(ROOT / "configs" / name))["model"]["init_args"]["method"]["init_args"]
    assert {key: method.init_args[key] for key in given} == given


# Every overlay on an image task, a text task and a language model, and one of them on every task.
EVERY_KIND = ("quickstart.yaml", "roberta_cola_lora_sb.yaml", "smollm2_gsm8k_srlora.yaml")
OVERLAID = [(name, overlay) for name in EVERY_KIND for overlay in OVERLAYS]
OVERLAID += [(name, "lora") for name in TASKS if (name, "lora") not in OVERLAID]


@pytest.mark.parametrize(("name", "overlay"), OVERLAID)
def test_overlay_changes_the_method_and_keeps_the_rest(
    name: str, overlay: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parse.cache_clear()  # a cached answer would print nothing
    alone, under = parse(name).clone(), parse(name, f"methods/{overlay}.yaml").clone()
    before, after = alone.model.init_args.pop("method"), under.model.init_args.pop("method")
    assert after.class_path == f"srlora_pl.{OVERLAYS[overlay]}"
    own = config.read(str(ROOT / f"configs/methods/{overlay}.yaml"))["model"]["init_args"]["method"].get(
        "init_args", {}
    )
    given = after.as_dict().get("init_args", {})
    assert set(given) <= set(arguments_of_class(getattr(srlora_pl, OVERLAYS[overlay])))
    kept = [key for key in SHARED if key in given and key not in own]
    assert [given[key] for key in kept] == [before.init_args[key] for key in kept]
    assert {key: given[key] for key in own} == own
    assert alone == under
    assert "note:" not in capsys.readouterr().err
    if after.class_path == before.class_path and not own:
        assert after == before


@pytest.mark.parametrize("first", OVERLAYS)
def test_the_last_of_two_overlays_gives_the_method(first: str) -> None:
    name = "quickstart.yaml"
    assert parse(name, f"methods/{first}.yaml", "methods/srlora.yaml") == parse(name)
    lora = parse(name, "methods/lora.yaml")
    assert parse(name, f"methods/{first}.yaml", "methods/lora.yaml") == lora


def test_a_method_on_the_command_line_is_an_overlay(capsys: pytest.CaptureFixture[str]) -> None:
    parse.cache_clear()
    lora = parse("quickstart.yaml", "methods/lora.yaml")
    assert parse("quickstart.yaml", options=("--model.method", "srlora_pl.LoRA")) == lora
    assert "note:" not in capsys.readouterr().err
    typed = ("--model.method.target_rank", "64")
    assert parse("quickstart.yaml", "methods/lora.yaml", options=typed) == lora
    assert "note: srlora_pl.LoRA takes no target_rank: dropped\n" in capsys.readouterr().err


@pytest.mark.parametrize("dataset", ["cifar100", "stl10", "mnist"])
def test_vision_configs_hold_the_papers_settings(dataset: str) -> None:
    settings = parse(f"vit_{dataset}_srlora.yaml")
    model, trainer = settings.model.init_args, settings.trainer
    assert model.backbone == "vit_base_patch16_224.orig_in21k"
    assert (model.optimizer, model.schedule, model.warmup_steps) == ("sgd", "cosine", 500)
    assert (model.method.init_args.rank, model.method.init_args.alpha) == (8, 8.0)
    assert trainer.precision == "16-mixed"
    assert (trainer.max_steps, trainer.val_check_interval, trainer.check_val_every_n_epoch) == (5000, 500, None)
    assert settings.data.init_args.name == dataset


def marked_lines(name: str) -> tuple[set[str], set[str]]:
    """The keys of a config whose lines are marked as not in the paper, and all others with a value."""
    lines = (ROOT / "configs" / name).read_text().splitlines()
    values = [line for line in lines if re.match(r"\s*\w+: *\S", line)]
    marked = {line.split(":")[0].strip() for line in values if line.endswith(NOT_IN_THE_PAPER)}
    return marked, {line.split(":")[0].strip() for line in values if not line.endswith(NOT_IN_THE_PAPER)}


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_glue_configs_hold_the_papers_settings(task: str) -> None:
    settings, paper = parse(f"deberta_{task}_srlora.yaml"), GLUE_TASKS[task]
    model, data, trainer = settings.model.init_args, settings.data.init_args, settings.trainer
    assert (model.backbone, model.backbone_kwargs) == ("microsoft/deberta-v3-base", None)
    assert (model.optimizer, model.lr, model.weight_decay) == ("adamw", paper.lr, 0.0)
    assert (model.head_lr, model.warmup_steps, model.label_smoothing) == (None, 500, 0.0)
    method = model.method.init_args
    assert (method.rank, method.alpha, method.dropout, method.target_modules) == (8, 8.0, 0.0, "all-linear")
    assert (method.target_rank, method.fusion_ratio) == (paper.target_rank, 0.5)
    assert (method.beta1, method.beta2) == (0.85, 0.85)
    assert (data.task, data.batch_size, data.max_length, data.val_fraction) == (task, paper.batch, 128, 0.0)
    assert (trainer.max_epochs, trainer.max_steps, trainer.precision) == (paper.epochs, -1, "32-true")
    assert (trainer.val_check_interval, trainer.check_val_every_n_epoch) == (500, None)


# Optimizer steps of 30 epochs in batches of 128, and 6 % of them.
ROBERTA = {"cola": (2010, 120), "rte": (600, 36), "mrpc": (870, 52), "stsb": (1350, 81), "qnli": (24_570, 1474)}
ROBERTA |= {"sst2": (15_810, 948)}


@pytest.mark.parametrize("task", ROBERTA)
def test_roberta_configs_hold_the_papers_settings(task: str) -> None:
    settings, (steps, warmup) = parse(f"roberta_{task}_lora_sb.yaml"), ROBERTA[task]
    model, data, trainer = settings.model.init_args, settings.data.init_args, settings.trainer
    assert model.backbone == "FacebookAI/roberta-large"
    assert (model.optimizer, model.lr, model.weight_decay, model.schedule) == ("adamw", 1e-3, 0.01, "linear")
    assert model.warmup_steps == warmup == int(0.06 * steps)
    assert -(-GLUE_TASKS[task].rows // data.batch_size) * trainer.max_epochs == steps
    assert (data.task, data.batch_size, data.max_length, data.val_fraction) == (task, 128, 128, 0.0)
    assert (trainer.precision, trainer.gradient_clip_val) == ("32-true", None)
    method = model.method.init_args
    assert (method.rank, method.alpha, method.first_step, method.gradient_samples) == (24, None, "adamw", 0.001)


def test_the_roberta_configs_train_as_many_numbers_as_the_paper_lists() -> None:
    """55.3K for LoRA-XS and LoRA-SB at rank 24; 2,162K for LoRA at rank 8."""
    settings = parse("roberta_cola_lora_sb.yaml").model.init_args.method.init_args
    config = RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    for method, numbers in ((LoRASB(**settings), 55_296), (LoRA(8, target_modules=settings.target_modules), 2_162_688)):
        with torch.device("meta"):
            net = RobertaForSequenceClassification(config)
        adaptation = Adaptation(net, method, ["classifier"])
        adapters = [p for layer in adaptation.layers.values() for p in layer.adapter_parameters() if p.requires_grad]
        assert sum(p.numel() for p in adapters) == numbers


class Language(NamedTuple):
    """What LoRA-SB's paper and its authors' code give for a language model; counts in millions of numbers."""

    backbone: str
    shapes: dict[str, int]
    lr: float
    schedule: str
    dropout: float
    rows: int
    batch: int
    length: int
    epochs: int
    warmup: int
    lora: float
    lora_sb: float


_MATH: dict[str, Any] = {"lr": 1e-4, "schedule": "cosine", "dropout": 0.0, "rows": 50_000, "batch": 1, "length": 512}
_MATH |= {"epochs": 1, "warmup": 32}
LANGUAGE = {
    "llama3.2_3b_commonsense": Language(
        "meta-llama/Llama-3.2-3B",
        {"layers": 28, "hidden": 3072, "inner": 8192, "heads": 24, "kv": 8, "head": 128},
        *(2e-3, "linear", 0.05, 170_420, 6, 256, 2, 36),
        *(48.63, 1.81),
    ),
    "mistral_7b_math": Language(
        "mistralai/Mistral-7B-v0.1",
        {"layers": 32, "hidden": 4096, "inner": 14336, "heads": 32, "kv": 8, "head": 128},
        **_MATH,
        lora=83.89,
        lora_sb=2.06,
    ),
    "gemma2_9b_math": Language(
        "google/gemma-2-9b",
        {"layers": 42, "hidden": 3584, "inner": 14336, "heads": 16, "kv": 8, "head": 256},
        **_MATH,
        lora=108.04,
        lora_sb=2.71,
    ),
}


@pytest.mark.parametrize("method", ["lora_sb", "srlora"])
@pytest.mark.parametrize("task", LANGUAGE)
def test_language_configs_hold_the_papers_settings(task: str, method: str) -> None:
    settings, paper = parse(f"{task}_{method}.yaml"), LANGUAGE[task]
    model, data, trainer = settings.model.init_args, settings.data.init_args, settings.trainer
    assert (model.backbone, model.optimizer, model.weight_decay) == (paper.backbone, "adamw", 0.01)
    assert (model.schedule, model.warmup_steps) == (paper.schedule, paper.warmup)
    own = model.method.init_args
    assert own.target_modules == "all-linear"
    if method == "lora_sb":
        assert (model.lr, own.dropout, model.weights) == (paper.lr, paper.dropout, "bfloat16")
        assert (own.rank, own.alpha, own.first_step, own.gradient_samples) == (96, None, "adamw", 0.001)
    else:
        assert model.weights == "bfloat16"  # whose changes are exact, in two halves
        assert (own.rank, own.alpha, own.fusion_ratio, own.beta1, own.beta2) == (32, 32.0, 0.5, 0.85, 0.85)
    assert (data.template, data.boundary, data.too_long, data.val_fraction) == ("lora_sb", "merged", "cut", 0.0)
    assert (data.batch_size, data.max_length) == (paper.batch, paper.length)
    assert (trainer.precision, trainer.max_epochs, trainer.gradient_clip_val) == ("bf16-mixed", paper.epochs, 1.0)
    steps = -(-paper.rows // (data.batch_size * trainer.accumulate_grad_batches)) * paper.epochs
    assert trainer.accumulate_grad_batches == 32
    assert model.warmup_steps == -(-steps // 50)  # 2 %, rounded up
    if "math" in task:
        assert data.limit == paper.rows


@pytest.mark.parametrize("method", ["lora_sb", "srlora"])
@pytest.mark.parametrize("task", LANGUAGE)
def test_each_line_of_a_language_config_says_where_it_is_from(task: str, method: str) -> None:
    lines = (ROOT / f"configs/{task}_{method}.yaml").read_text().splitlines()
    values = [line for line in lines if re.match(r"\s*\w+: *\S", line) and "class_path" not in line]
    assert len(values) > 20
    for line in values:
        assert re.search(r"  # (the paper|the authors' code|SRLoRA's paper|ours)(\W.*)?$", line), line


@pytest.mark.parametrize("task", LANGUAGE)
def test_the_language_configs_train_as_many_numbers_as_the_paper_lists(task: str) -> None:
    """LoRA of rank 32, and LoRA-SB of rank 96; of one block, times their number."""
    paper, target = LANGUAGE[task], parse(f"{task}_lora_sb.yaml").model.init_args.method.init_args.target_modules
    shapes = paper.shapes
    config = LlamaConfig(
        hidden_size=shapes["hidden"],
        intermediate_size=shapes["inner"],
        num_attention_heads=shapes["heads"],
        num_key_value_heads=shapes["kv"],
        head_dim=shapes["head"],
        num_hidden_layers=2,
        vocab_size=8,
    )
    for method, numbers in ((LoRA(32, target_modules=target), paper.lora), (LoRASB(96), paper.lora_sb)):
        with torch.device("meta"):
            net = LlamaForCausalLM(config)
        adaptation = Adaptation(net, method, [])
        assert len(adaptation.layers) == 2 * 7
        adapters = [p for layer in adaptation.layers.values() for p in layer.adapter_parameters() if p.requires_grad]
        assert sum(p.numel() for p in adapters) / 2 * shapes["layers"] / 1e6 == pytest.approx(numbers, abs=0.006)


class Rows:
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_glue_configs_switch_as_often_as_planned(task: str) -> None:
    settings, expected = parse(f"deberta_{task}_srlora.yaml"), GLUE_TASKS[task]
    data = GLUEData(**settings.data.init_args)
    data.train_set = Rows(expected.rows)  # type: ignore[assignment]
    assert settings.trainer.accumulate_grad_batches == 1
    steps = len(EpochBatches(data)) * settings.trainer.max_epochs
    assert steps == expected.steps
    method = SRLoRA(**settings.model.init_args.method.init_args)
    recycled = method.recycled_rank(method.rank)
    schedule = Schedule(0, steps, (method.target_rank - method.rank) // recycled)
    assert (schedule.planned, schedule.due(steps)) == (expected.planned, expected.done)
    assert steps / schedule.planned == pytest.approx(expected.interval, abs=0.051)
    assert method.rank + schedule.due(steps) * recycled == expected.reached


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_what_the_paper_does_not_say_about_glue_is_marked(task: str) -> None:
    marked, others = marked_lines(f"deberta_{task}_srlora.yaml")
    assert marked == {"seed_everything", "train_pooler", "fast_attention", "schedule", "matmul_precision"}
    papers = "backbone rank alpha target_modules target_rank fusion_ratio beta1 beta2 optimizer lr weight_decay"
    papers += " warmup_steps task batch_size val_fraction max_length precision max_epochs val_check_interval"
    assert others - {"class_path", "root", "check_val_every_n_epoch", "log_every_n_steps"} == set(papers.split())


@pytest.mark.parametrize("dataset", ["cifar100", "stl10", "mnist"])
def test_what_the_paper_does_not_say_is_marked(dataset: str) -> None:
    marked, _ = marked_lines(f"vit_{dataset}_srlora.yaml")
    ours = "target_rank fusion_ratio beta1 beta2 lr momentum batch_size val_fraction hflip crop_scale test_crop_pct"
    ours += " matmul_precision"
    assert set(ours.split()) <= marked
    papers = "backbone rank alpha optimizer schedule warmup_steps precision max_steps val_check_interval"
    assert not set(papers.split()) & marked


@pytest.mark.parametrize("name", [*TASKS, *(f"methods/{name}.yaml" for name in OVERLAYS)])
def test_header_says_what_to_run(name: str) -> None:
    header = "".join(re.findall(r"^#.*\n", (ROOT / "configs" / name).read_text(), re.M))
    assert "# Needs:" in header
    assert f"--config configs/{name}" in header
    assert re.search(r"# Or", header)


@pytest.mark.parametrize("name", TASKS)
def test_commands_of_the_header_parse(name: str) -> None:
    header = (ROOT / "configs" / name).read_text().replace(" \\\n#", " ")
    commands = re.findall(r"python cli\.py fit (.*)", header)
    assert len(commands) == 2
    for command in commands:
        words = command.split()
        files = [words[i + 1].removeprefix("configs/") for i, word in enumerate(words) if word == "--config"]
        rest = [word for i, word in enumerate(words) if word != "--config" and words[i - 1] != "--config"]
        assert parse(*files, options=tuple(rest)) is not None
