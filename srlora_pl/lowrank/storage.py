"""Nested containers with tensors as a folder: a safetensors file, and a JSON file that runs no code."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from srlora_pl.util.cache import fingerprint, keep
from srlora_pl.util.errors import UserError
from srlora_pl.util.files import replacing

TENSORS, CONTENT = "adaptation.safetensors", "adaptation.json"
_TENSOR = "<tensor>"  # {"<tensor>": NAME} stands for a tensor of the other file


def write(folder: Path, content: dict[str, Any]) -> None:
    """Write ``content``: dicts with text as keys, lists, tuples (read as lists), numbers, text, None and tensors."""
    tensors: dict[str, Tensor] = {}
    plain = _without_tensors(content, tensors)
    keep(tensors, folder / TENSORS)
    with replacing(folder / CONTENT) as file:
        file.write(json.dumps({"content": plain, "digest": _digest(plain, tensors)}, indent=1).encode())


def read(folder: Path) -> dict[str, Any]:
    """The content that `write` wrote, its tensors on the CPU.

    Raises:
        UserError: a file is missing or damaged, or the two were not written together.
    """
    try:
        tensors = load_file(folder / TENSORS)
        saved = json.loads((folder / CONTENT).read_text("utf-8"))
        if saved["digest"] == _digest(saved["content"], tensors):
            return _with_tensors(saved["content"], tensors)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise UserError(f"{folder} holds no adaptation that can be read ({error}): give a folder of save()") from error
    raise UserError(f"{folder}: {CONTENT} and {TENSORS} do not belong together or are damaged, save it again")


def _digest(plain: Any, tensors: dict[str, Tensor]) -> str:
    both = json.dumps(plain) + fingerprint(dict(sorted(tensors.items())))
    return hashlib.sha256(both.encode()).hexdigest()


def _without_tensors(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        name = str(len(tensors))
        tensors[name] = node.detach().cpu().clone().contiguous()
        return {_TENSOR: name}
    if isinstance(node, dict):
        return {key: _without_tensors(value, tensors) for key, value in node.items()}
    return [_without_tensors(each, tensors) for each in node] if isinstance(node, list | tuple) else node


def _with_tensors(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, dict):
        if node.keys() == {_TENSOR}:
            return tensors[node[_TENSOR]]
        return {key: _with_tensors(value, tensors) for key, value in node.items()}
    return [_with_tensors(each, tensors) for each in node] if isinstance(node, list) else node
