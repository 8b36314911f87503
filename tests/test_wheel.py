"""The wheel by itself, installed over the libraries and used outside the repository."""

import json
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.waiting import run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and no more."""
    home = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    run([*pip, "wheel", ROOT, "--no-deps", "--no-build-isolation", "--no-index", "-w", home / "wheels"], check=True)
    wheels = [*(home / "wheels").glob("*.whl")]
    run([*pip, "install", *wheels, "--no-deps", "--no-index", "--target", home / "site"], check=True)
    return home / "site"


@pytest.fixture
def srlora(installed, tmp_path, monkeypatch):
    """The installed program, called in an empty folder."""
    monkeypatch.setenv("PYTHONPATH", str(installed))
    return lambda *words, **options: run([installed / "bin/srlora", *words], cwd=tmp_path, **options)


def test_the_quickstart_runs_in_an_empty_folder(srlora, installed, tmp_path):
    few = ["--trainer.max_steps=20", "--trainer.val_check_interval=10", "--model.warmup_steps=5"]
    said = srlora("fit", "--config", "quickstart", "--config", "methods/pissa", *few)
    assert said.returncode == 0, said.stderr
    folder = tmp_path / "runs/quickstart-pissa/version_0"
    assert json.loads((folder / "summary.json").read_text())["steps"] == 20
    assert "20 steps" in said.stdout
    assert [each.name for each in tmp_path.iterdir()] == ["runs"]
    again = srlora("fit", "--config", folder / "config.yaml", "--ckpt_path", "last", "--trainer.max_steps=22")
    assert again.returncode == 0, again.stderr
    assert json.loads((folder / "summary.json").read_text())["steps"] == 22


def test_it_names_itself_and_its_version(srlora, installed):
    version = {"__name__": "srlora_pl"}
    exec((ROOT / "srlora_pl/__init__.py").read_text(), version)
    assert srlora("--version").stdout == f"srlora_pl {version['__version__']}\n"
    about = next(installed.glob("srlora_pl-*.dist-info/METADATA")).read_text()
    assert f"\nVersion: {version['__version__']}\n" in about
    assert "srlora fit --config quickstart" in srlora("--help").stdout
    assert srlora("fit", "--config", "nowhere").stderr == "error: the config file nowhere does not exist\n"


def test_it_holds_the_configs_and_the_mark_of_its_types(srlora, installed, tmp_path):
    srlora("configs", "--to", "mine", check=True)
    shipped = {str(file.relative_to(ROOT / "configs")): file.read_bytes() for file in ROOT.glob("configs/**/*.yaml")}
    copied = {str(file.relative_to(tmp_path / "mine")): file.read_bytes() for file in tmp_path.rglob("*.yaml")}
    assert copied == shipped
    assert (installed / "srlora_pl/py.typed").is_file()
    assert not (installed / "tests").exists()
