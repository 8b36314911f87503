"""Execute notebooks and keep what they show: ``python notebooks/execute.py`` for all, or followed by their files."""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).parent
# Jupyter would add the version of Python, and when each cell ran.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # to networks this small threads give nothing, and on a busy machine they take much
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's, of bars that are off
}


def execute(notebook: Path, folder: Path) -> NotebookNode:
    """``notebook`` with what its cells give from top to bottom, in a Python that starts in ``folder``.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    content = nbformat.read(notebook, as_version=4)
    where = {"metadata": {"path": str(folder)}}
    options = {"timeout": 600, "kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
    client = NotebookClient(content, resources=where, **options)
    client.execute(env={**os.environ, **ENVIRONMENT})
    content.metadata = nbformat.from_dict(METADATA)
    for cell in (each for each in content.cells if each.cell_type == "code"):
        # The line about time and memory is true of one machine only.
        cell.outputs = [output for output in cell.outputs if "memory at the peak" not in str(output)]
    return content


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:] or sorted(HERE.glob("*.ipynb"))):
        print(file.name, flush=True)
        nbformat.write(execute(file, HERE), file)
