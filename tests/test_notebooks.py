"""The notebooks run from top to bottom, and what is kept of their outputs is of the cells they hold."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from notebooks.execute import execute
from tests.helpers.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(notebook: NotebookNode) -> list[set[str]]:
    """Of what each cell shows: texts printed, tables, pictures."""
    return [
        {kind for output in cell.outputs for kind in output.get("data", {"stream": None})}
        for cell in code_cells(notebook)
    ]


def texts(notebook: NotebookNode) -> str:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    parts = [output.get("text", "") for output in outputs]
    parts += [text for each in outputs for kind, text in each.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(parts)


def numbers(pattern: str, text: str) -> list[float]:
    (found,) = re.findall(pattern, text)
    return [float(number.replace(",", "")) for number in ([found] if isinstance(found, str) else found)]


def check_quickstart(text: str) -> None:
    (right, all_), (percent,) = numbers(r"(\d+) of (\d+) test images", text), numbers(r"are right: ([\d.]+)%", text)
    assert all_ == 360
    assert abs(percent - 100 * right / all_) < 0.06
    assert percent > 50  # guessing gives 10
    assert numbers(r"(\d+) matrices, (\d+) pairs each, (\d+) switches: {(\d+)} directions", text) == [36, 8, 5, 28]


def check_switch(text: str) -> None:
    begun, after_twenty = numbers(r"after step 1: ([\d.]+)", text) + numbers(r"after step 20: ([\d.]+)", text)
    assert after_twenty < begun
    assert re.search(r"left directions \[[1-8], [1-8], [1-8], [1-8]\] for \[9, 10, 11, 12\]", text)
    # eight pairs of 192 + 192 numbers, and a head of 192 x 10 + 10
    assert numbers(r"([\d,]+) trained parameters", text) == [8 * (192 + 192) + 1930]
    assert "equal to the bit" in text


def check_own_model(text: str) -> None:
    lightning = numbers(r"5 to 9: ([\d.]+)% before, ([\d.]+)% after, with (\d) switches", text)
    plain_loop = numbers(r"5 to 9: ([\d.]+)% of the test images", text)
    assert lightning[1:] == [*plain_loop, 3]  # the same seed, the same batches: the same network
    assert lightning[1] > 80
    per_block = 2 * 4 * (16 + 64) + 2 * 4 * (48 + 128)
    assert numbers(r"([\d,]+) parameters train", text) == [3 * per_block + 48 * 5 + 5]
    assert "out_proj cannot be adapted" in text
    assert "did you mean 'head'?" in text


def check_comparison(text: str) -> None:
    rows = re.findall(r"^\| (\w+) \| - \| 2 \| ([\d.]+) ± ", text, re.MULTILINE)
    assert [method for method, _ in rows] == ["lora", "pissa", "srlora"]
    runs = re.findall(r"^\d +(\w+) +(\d) +([\d.]+) +[\d.]+ +16 +167818$", text, re.MULTILINE)
    assert len(runs) == 6
    for method, mean in rows:
        own = [100 * float(accuracy) for name, _, accuracy in runs if name == method]
        assert abs(float(mean) - sum(own) / 2) < 0.01
    assert len(re.findall(r"paired t-test over 2 seeds|too few seeds in common", text)) == 3


CHECKS = {
    "01_quickstart": check_quickstart,
    "02_inside_a_switch": check_switch,
    "03_your_own_model": check_own_model,
    "04_compare_methods": check_comparison,
}


@pytest.fixture
def _jupyter(tmp_path, monkeypatch):
    """The user's own settings and history of Jupyter are left alone."""
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))


@pytest.mark.usefixtures("_jupyter")
@pytest.mark.parametrize(
    "file",
    [pytest.param(file, marks=() if file.stem == "03_your_own_model" else pytest.mark.slow) for file in NOTEBOOKS],
    ids=lambda file: file.stem,
)
def test_a_notebook_runs_from_top_to_bottom(file, tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    copy = shutil.copy(file, folder)
    executed = execute(Path(copy), folder)
    CHECKS[file.stem](texts(executed))
    kept = nbformat.read(file, as_version=4)
    assert kinds(executed) == kinds(kept), "execute it again: python notebooks/execute.py"
    CHECKS[file.stem](texts(kept))
    assert [each.name for each in folder.iterdir()] == [file.name]  # it writes nothing where it lies


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_kept_outputs_are_of_one_run_and_of_no_machine(file):
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert all(not cell.metadata for cell in notebook.cells)
    assert "python_version" not in str(notebook.metadata) + str(notebook.metadata.get("language_info"))
    assert not re.search(r"(?<![\w:/.<])/\w+/\w|\b[A-Z]:\\", texts(notebook))  # absolute paths
    assert "memory at the peak" not in texts(notebook)


def test_every_notebook_has_its_checks():
    assert [file.stem for file in NOTEBOOKS] == list(CHECKS)
