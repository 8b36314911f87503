"""The files that a project's host reads are sound, and say what pyproject.toml says."""

import tomllib
from pathlib import Path

import pytest
import yaml

import srlora_pl
from tests.helpers.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FILES = [*(ROOT / ".github").rglob("*.yml"), *ROOT.glob(".*.yaml"), ROOT / "CITATION.cff"]


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_is_yaml(path: Path) -> None:
    assert load(path)


def test_the_citation_is_of_this_version() -> None:
    citation = load(ROOT / "CITATION.cff")
    assert (citation["version"], citation["license"]) == (srlora_pl.__version__, PROJECT["license"])
    assert "arXiv:2505.12433" in str(citation["references"])


def test_the_tests_run_on_every_python_that_is_allowed() -> None:
    versions = load(ROOT / ".github/workflows/tests.yml")["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert PROJECT["requires-python"] == f">={versions[0]}"


def test_ruff_is_the_same_before_a_commit() -> None:
    (rev,) = [repo["rev"] for repo in load(ROOT / ".pre-commit-config.yaml")["repos"] if "ruff" in repo["repo"]]
    assert f"\nruff=={rev.removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text()
