"""The folder that an export writes: whole or not at all, without weights of another export."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from srlora_pl.export.serving import FILES
from srlora_pl.models import peft_folder
from srlora_pl.util.errors import UserError

# A folder holds one of them, for libraries load all that they know; big ONNX weights lie beside the program.
WEIGHTS = ("model.safetensors", peft_folder.WEIGHTS, peft_folder.PICKLE, *FILES.values(), f"{FILES['onnx']}.data")


def require_free(folder: str | Path, force: bool) -> Path:
    """The absolute path of a ``folder`` that may be written; one that holds files only with ``force``."""
    target = Path(folder).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"--output {folder} is a file, give a folder")
    if not force and target.is_dir() and any(target.iterdir()):
        raise UserError(f"--output {folder} holds files already, give a new folder or --force to overwrite them")
    return target


@contextmanager
def whole_or_nothing(target: Path) -> Iterator[Path]:
    """A new folder that replaces ``target``, or is moved into it, if the block succeeds, and vanishes otherwise."""
    there = next(parent for parent in target.parents if parent.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=there) as place:
            new = Path(place, "new")
            new.mkdir()
            yield new
            for file in new.iterdir():
                file.chmod(new.stat().st_mode & 0o666)  # safetensors lets only the owner read
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            target.parent.mkdir(parents=True, exist_ok=True)
            _move(new, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--output {target} cannot be written ({reason}), so nothing was: name another place"
        ) from error


def _move(new: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        new.replace(target)  # at once; an empty folder may be in the way
        return
    # File by file, and the weights are away for as long as old and new ones are mixed.
    files = sorted(new.iterdir(), key=lambda file: file.name in WEIGHTS)
    for name in (*WEIGHTS, peft_folder.CONFIG):
        (target / name).unlink(missing_ok=True)
    for file in files:
        file.replace(target / file.name)
