"""What every benchmark prints: a table, and as its last line one JSON object."""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo") as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"


def report(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], result: dict[str, Any]) -> None:
    """Print ``rows`` under ``header``, then ``result`` with device and versions as one line of JSON."""
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=120, highlight=False).print(table)
    versions = {name: version(name) for name in ("torch", "lightning", "timm", "transformers", "peft")}
    print(json.dumps({**result, "versions": versions}))
