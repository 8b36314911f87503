"""Configs by name, and what the program calls itself."""

import sys
from pathlib import Path

import pytest

from srlora_pl.run import config
from srlora_pl.util.errors import UserError
from srlora_pl.util.program import CONFIGS, program
from tests.helpers.errors import mentions
from tests.helpers.paths import ROOT
from tests.helpers.waiting import run


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "configs/quickstart.yaml", "configs/quickstart"])
def test_a_config_is_found_by_name_in_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(config.find(name)) == ROOT / "configs/quickstart.yaml"
    assert Path(config.find("methods/lora")) == ROOT / "configs/methods/lora.yaml"


def test_the_users_own_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/quickstart.yaml").touch()
    assert config.find("quickstart") == "configs/quickstart.yaml"
    (tmp_path / "quickstart.yaml").touch()
    assert config.find("quickstart.yaml") == "quickstart.yaml"
    assert config.find("quickstart") == "configs/quickstart.yaml"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("quickstrt", "'quickstart'"),
        ("configs/quikstart.yaml", "'quickstart.yaml'"),
        ("methods/piza", "'methods/pissa'"),
        ("mine.yml", "'mine.yaml'"),
    ],
)
def test_a_mistyped_name_is_told(name, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(UserError, match=mentions(name, f"did you mean {near}")):
        config.find(name)


def test_configs_are_listed_and_copied_over_nothing(tmp_path):
    names = {str(file.relative_to(CONFIGS).with_suffix("")) for file in CONFIGS.rglob("*.yaml")}
    assert {line.split()[0] for line in config.overview()} == names
    config.copy_to(tmp_path)
    for name in names:
        assert (tmp_path / f"{name}.yaml").read_bytes() == (CONFIGS / f"{name}.yaml").read_bytes()
    (tmp_path / "quickstart.yaml").write_text("mine")
    with pytest.raises(UserError, match=mentions(str(tmp_path), "deberta_cola_srlora.yaml", "give another folder")):
        config.copy_to(tmp_path)
    assert (tmp_path / "quickstart.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("/usr/bin/srlora", "srlora"),
        ("cli.py", "python cli.py"),
        (str(ROOT / "srlora_pl/__main__.py"), "python -m srlora_pl"),
    ],
)
def test_the_program_is_named_as_it_was_called(called, name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [called, "fit"])
    assert program() == name


@pytest.mark.parametrize(
    ("words", "name"), [(["-m", "srlora_pl"], "python -m srlora_pl"), (["cli.py"], "python cli.py")]
)
def test_help_and_errors_name_the_program_as_it_was_called(words, name):
    said = run([sys.executable, *words, "--help"], cwd=ROOT)
    assert f"{name} fit --config quickstart" in said.stdout
    assert run([sys.executable, *words, "figures"], cwd=ROOT).stderr.endswith(f"see {name} figures --help\n")
