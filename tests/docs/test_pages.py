"""The pages name every config and method, and their Python code runs."""

import re
import sys
import tomllib
from typing import Any

import pytest
import torch

import srlora_pl
from srlora_pl import lowrank
from srlora_pl.lowrank import methods
from srlora_pl.lowrank.methods import REGISTRY
from tests.helpers.pages import blocks, pages
from tests.helpers.paths import ROOT
from tests.helpers.waiting import run


def example(word: str) -> str:
    (found,) = [block.text for block in blocks("python", "docs/own_model.md") if word in block.text]
    return found


def test_the_plain_loop_example_trains_and_switches():
    names: dict[str, Any] = {}
    exec(example("adaptation.merge()"), names)
    assert names["adaptation"].controller.progress().done == 1
    assert all(layer.merged for layer in names["adaptation"].layers.values())


def test_the_plain_loop_example_goes_on_as_if_it_had_not_been_stopped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training = example("adaptation.merge()").partition("adaptation.merge()")[0]
    made, loop = training.split("for step in range(1, 21):")
    save, load = example("loop.pt").split("\n\n")

    def names_after(*parts):
        """The names that ``parts`` leave: code, or the steps of the loop."""
        names: dict[str, Any] = {}
        torch.manual_seed(0)  # of a net that is not pretrained here
        for part in parts:
            steps = f"for step in {part}:\n    torch.manual_seed(step){loop}" if isinstance(part, range) else part
            exec(steps, names)
        return names

    whole = names_after(made, range(1, 21))
    names_after(made, range(1, 8), save)
    resumed = names_after(made.partition("adaptation.attach(")[0], load, range(8, 21))
    assert resumed["adaptation"].controller.progress().done == 1
    for (name, value), other in zip(
        whole["net"].state_dict().items(), resumed["net"].state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name


def test_the_loop_example_needs_no_lightning():
    assert "lightning" not in example("adaptation.merge()")


def test_the_page_shows_readmes_example():
    (readmes,) = [block.text for block in blocks("python", "README.md")]
    assert example("SRLoRAMixin") == readmes


@pytest.mark.parametrize("page", pages())
def test_config_files_named_on_a_page_exist(page):
    for path in set(re.findall(r"configs/[\w/]+\.yaml", pages()[page])):
        assert (ROOT / path).is_file(), path


def test_a_table_names_every_extra_that_users_want():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = set(re.findall(r"^\| `(\w+)` \|", pages()["docs/start.md"].partition("## Extras")[2], re.MULTILINE))
    assert named == set(extras) - {"test", "docs", "dev"}


def test_a_table_names_every_config():
    named = set(re.findall(r"^\| `([\w.]+)` \|", pages()["docs/tasks.md"], re.MULTILINE))
    assert named == {file.stem for file in (ROOT / "configs").glob("*.yaml")}


def test_a_table_names_every_method_and_overlay():
    lines = pages()["docs/methods/index.md"].splitlines()
    rows = [line.split(" | ") for line in lines if "`srlora_pl." in line and line.startswith("| [`")]
    linked = [pair for row in rows for pair in re.findall(r"\[`(\w+)`\]\((\w+\.md)\)", row[0])]
    overlays = {name for name, _ in linked}
    assert overlays == {file.stem for file in (ROOT / "configs/methods").glob("*.yaml")}
    named = {name for row in rows for name in re.findall(r"`srlora_pl\.(\w+)`", row[1])}
    assert named == {kind.__name__ for kind in REGISTRY}
    folder = ROOT / "docs/methods"
    assert {page for _, page in linked} == {file.name for file in folder.glob("*.md")} - {"index.md"}


def test_each_method_has_a_page_with_its_settings_formula_and_source():
    tables = {}
    for page, text in pages().items():
        if page.startswith("docs/methods/") and not page.endswith("index.md"):
            assert all(f"\n## {part}\n" in text for part in ("When to use it", "Settings", "Try it", "Source")), page
            (shown,) = re.findall(r"```\{settings\} srlora_pl\.(\w+)", text)
            tables[shown] = page
    assert set(tables) == {kind.__name__ for kind in REGISTRY}


def test_the_house_has_every_room():
    (plan,) = [block.text for block in blocks("text", "docs/house.md")]
    rooms = [path.name for path in (ROOT / "srlora_pl").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert [room for room in rooms if f" {room}/" not in plan] == []


def test_the_api_pages_name_everything_public():
    text = "".join(text for page, text in pages().items() if page.startswith("docs/api/"))
    named = {name.rpartition(".")[2] for name in re.findall(r"^\.\. auto\w+:: ([\w.]+)$", text, re.MULTILINE)}
    assert "srlora_pl.lowrank.methods\n   :members:" in text
    assert {*srlora_pl.__all__, *lowrank.__all__} - set(methods.__all__) <= named


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path):
    pytest.importorskip("furo")
    options = ["-q", "-W", "--keep-going", "-d", tmp_path / "trees"]
    built = run([sys.executable, "-m", "sphinx", *options, ROOT / "docs", tmp_path])
    assert built.returncode == 0, built.stderr
