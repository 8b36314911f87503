"""Tables as text."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of one line for ``header`` and each of ``rows``."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def csv_of(rows: Sequence[Mapping[str, Any]], columns: Iterable[str] = ()) -> str:
    """A CSV with ``columns``, by default those of all ``rows``."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns) or list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
