"""The figures on the pages of settings and of the paper's tables, held against the code."""

import inspect
import re
from argparse import Namespace
from pathlib import Path

import yaml

import srlora_pl
from srlora_pl.comparison.command import _digests, plans_of
from srlora_pl.run.run import TRAINER_DEFAULTS
from srlora_pl.run.trainer import Trainer
from srlora_pl.util.signatures import arguments_of_class, defaults_of_class
from tests.helpers.pages import pages
from tests.helpers.paths import ROOT

CLASSES = {
    "model.method": (srlora_pl.SRLoRA,),
    "model": (srlora_pl.ImageClassifier, srlora_pl.TextClassifier),
    "data": (srlora_pl.ImageData, srlora_pl.GLUEData),
}


def test_each_setting_exists_and_has_its_default():
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \|", pages()["docs/settings.md"], re.MULTILINE)
    assert len(rows) >= 20
    trainer = inspect.signature(Trainer.__mro__[1].__init__).parameters
    for key, told in rows:
        part, _, name = key.rpartition(".")
        written = re.findall(r"`([^`]+)`", told)
        if part in CLASSES:
            kinds = [kind for kind in CLASSES[part] if name in arguments_of_class(kind)]
            assert kinds, key
            defaults = [defaults_of_class(kind)[name] for kind in kinds if name in defaults_of_class(kind)]
            assert [yaml.safe_load(text) for text in written] == [*dict.fromkeys(defaults)] or told == "-", key
        elif part == "trainer":
            default = {"precision": "32-true", "log_every_n_steps": 50} | TRAINER_DEFAULTS
            assert yaml.safe_load(written[0]) == default.get(name, trainer[name].default), key
        else:
            assert key in ("seed_everything", "model.backbone_kwargs.img_size"), key


def plans(table: str, *grid: str) -> list:
    options = {"config": [], "table": table, "methods": None, "seeds": 5, "grid": grid, "output": "runs/table4"}
    return plans_of(Namespace(**options), ())


def test_the_runs_and_steps_of_the_tables():
    page = pages()["docs/reproduce.md"]
    rows = {line.split(" | ")[0].lstrip("| "): line.split(" | ")[1:] for line in page.splitlines() if " | " in line}
    total = []
    for column, table in enumerate(("4", "3")):
        steps = []
        for plan in plans(table):
            text = Path(plan.configs[0]).read_text("utf-8")
            comment = re.search(r"setting: ([\d,]+) steps", text)
            steps.append(int(comment[1].replace(",", "")) if comment else yaml.safe_load(text)["trainer"]["max_steps"])
        runs = sum(plan.size for plan in plans(table))
        assert rows["runs"][column].rstrip(" |").endswith(f"= {runs}")
        told = rows["steps of a run"][column].rstrip(" |")
        assert told == ("5,000" if table == "4" else ", ".join(f"{each:,}" for each in steps))
        total.append(f"{sum(steps) * runs // len(steps):,}")
    assert [cell.rstrip(" |") for cell in rows["steps in all"]] == total
    (grid,) = re.findall(r"--grid (\S+)", page)
    assert f"That is {sum(plan.size for plan in plans('4', grid))} runs" in page


def test_a_task_that_was_run_by_itself_counts_for_the_table():
    """The same folder, files and runs, so that the table's command only collects."""
    whole = plans("4")[0]
    config = str(ROOT / "configs/vit_cifar100_srlora.yaml")
    options = {"config": [config], "table": None, "methods": "lora,srlora", "seeds": 5, "grid": ()}
    (alone,) = plans_of(Namespace(**options, output="runs/table4/vit_cifar100_srlora"), ())
    assert (alone.folder, _digests(alone), alone.trials) == (whole.folder, _digests(whole), whole.trials)
