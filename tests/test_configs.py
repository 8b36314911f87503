"""Every shipped config is parsed against the real signatures, alone and under every overlay; nothing is trained."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from srlora_pl import config
from srlora_pl.run import Run

ROOT = Path(__file__).parent.parent
TASKS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
OVERLAYS = {"lora": "LoRA", "pissa": "PiSSA", "srlora": "SRLoRA"}
SHARED = ("rank", "alpha", "target_modules")


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
    settings = Parsed("fit", files, [config.read(file) for file in files], list(options)).config
    del settings["config"]  # the texts that they came from
    return settings


def test_there_is_an_overlay_for_each_method() -> None:
    assert {path.stem for path in (ROOT / "configs/methods").glob("*.yaml")} == set(OVERLAYS)


@pytest.mark.parametrize("name", TASKS)
def test_config_parses_and_names_srlora(name: str) -> None:
    method = parse(name).model.init_args.method
    assert method.class_path == "srlora_pl.SRLoRA"
    given = config.read(str(ROOT / "configs" / name))["model"]["init_args"]["method"]["init_args"]
    assert {key: method.init_args[key] for key in given} == given


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("name", TASKS)
def test_overlay_changes_the_method_and_keeps_the_rest(
    name: str, overlay: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parse.cache_clear()  # a cached answer would print nothing
    alone, under = parse(name).clone(), parse(name, f"methods/{overlay}.yaml").clone()
    before, after = alone.model.init_args.pop("method"), under.model.init_args.pop("method")
    assert after.class_path == f"srlora_pl.{OVERLAYS[overlay]}"
    assert [after.init_args[key] for key in SHARED] == [before.init_args[key] for key in SHARED]
    assert alone == under
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    if overlay == "srlora":
        assert after == before
        assert notes == []
    else:
        assert "target_rank" not in after.init_args
        assert notes == [f"note: {after.class_path} takes no beta1, beta2, fusion_ratio, target_rank: dropped"]


@pytest.mark.parametrize("first", OVERLAYS)
@pytest.mark.parametrize("name", TASKS)
def test_the_last_of_two_overlays_gives_the_method(name: str, first: str) -> None:
    assert parse(name, f"methods/{first}.yaml", "methods/srlora.yaml") == parse(name)
    lora = parse(name, "methods/lora.yaml")
    assert parse(name, f"methods/{first}.yaml", "methods/lora.yaml") == lora


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


@pytest.mark.parametrize("dataset", ["cifar100", "stl10", "mnist"])
def test_what_the_paper_does_not_say_is_marked(dataset: str) -> None:
    lines = (ROOT / "configs" / f"vit_{dataset}_srlora.yaml").read_text().splitlines()
    marked = {line.split(":")[0].strip() for line in lines if line.endswith("# not in the paper")}
    ours = "target_rank fusion_ratio beta1 beta2 lr momentum batch_size val_fraction hflip crop_scale test_crop_pct"
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
