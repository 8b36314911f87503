"""README, CONTRIBUTING.md and the pages of docs/, and the fenced blocks of code on them."""

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests.helpers.paths import ROOT

README = ROOT / "README.md"
_FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[\w ./]+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        page: its file.
        mark: the comment above it, which readers do not see; "" without one.
        language: ``bash``, ``python``, ...
        text: the code.
    """

    page: Path
    mark: str
    language: str
    text: str


@cache
def pages() -> dict[str, str]:
    """The text of each page, by its path from the root."""
    files = [
        README,
        ROOT / "CONTRIBUTING.md",
        *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts),
    ]
    return {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}


def blocks(language: str, *names: str) -> list[Block]:
    """The blocks of a language ("": of any) on the pages ``names``, by default on all, in order."""
    return [
        Block(ROOT / page, found["mark"] or "", found["language"], found["text"])
        for page, text in pages().items()
        for found in _FENCE.finditer(text)
        if language in ("", found["language"]) and (not names or page in names)
    ]
