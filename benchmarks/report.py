"""What every benchmark prints: a table, and as its last line one JSON object."""

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from srlora_pl.util.system import versions


def report(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], result: dict[str, Any]) -> None:
    """Print ``rows`` under ``header``, then ``result`` with device and versions as one line of JSON."""
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=120, highlight=False).print(table)
    print(json.dumps({**result, "versions": versions()}))
