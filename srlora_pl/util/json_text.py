"""JSON that every program can read: NaN and infinity are no part of it."""

import json
import math
from collections.abc import Callable
from typing import Any

_KEY = "not_finite"


def write(content: dict[str, Any]) -> str:
    """The text of ``content``, with null for a number that is not finite.

    Which one it was says ``not_finite`` at the end: ``{"scores.val/loss": "nan"}``.
    """
    found: dict[str, str] = {}

    def plain(name: str, value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            found[name] = str(value)
            return None
        return value

    kept = _mapped(content, plain)
    return json.dumps(kept | {_KEY: found} if found else kept, indent=1, allow_nan=False)


def read(text: str) -> dict[str, Any]:
    """What was given to `write`."""
    content = json.loads(text)
    found = content.pop(_KEY, {})
    return _mapped(content, lambda name, value: float(found[name]) if name in found else value)


def _mapped(node: Any, change: Callable[[str, Any], Any], name: str = "") -> Any:
    """``node`` with each value in its lists and mappings changed; of its dotted name, such as ``scores.val/loss``."""
    if isinstance(node, dict):
        return {key: _mapped(value, change, f"{name}.{key}".lstrip(".")) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_mapped(value, change, f"{name}.{i}") for i, value in enumerate(node)]
    return change(name, node)
