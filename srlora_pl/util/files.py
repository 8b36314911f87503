"""Files that are whole or absent, whatever happens while they are written; and their names."""

import contextlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from srlora_pl.util.errors import UserError, did_you_mean

try:
    import fcntl
except ImportError:  # Windows: leftovers of dead processes stay
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".unfinished"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file open for writing that takes the place of ``path`` once the block ends, on disk and at once.

    Until then, and if the block fails or the process dies in it, what was at ``path`` stays. The file lies beside
    ``path``, on the same file system, under a hidden name that ends in ``.unfinished``; what dead processes have left
    of that kind in the folder is removed first.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    # Nothing of its name: Lightning looks for SLURM's checkpoints by a part of theirs.
    unfinished = path.with_name(f".{secrets.token_hex(8)}{_SUFFIX}")
    try:
        with unfinished.open("xb") as file:
            lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextlib.contextmanager
def writing_to(place: str) -> Iterator[None]:
    """Turns an OSError of the block into a UserError that ``place``, in the user's words, cannot be written to."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{place} cannot be written to ({error.strerror}): name another place") from error


def require_there(place: str, path: Path) -> None:
    """Refuse a ``path`` at which nothing is, given as ``place`` in the user's words."""
    if not path.exists():
        near = did_you_mean(str(path), map(str, path.parent.glob(f"*{path.suffix}")))
        raise UserError(f"{place} {str(path)!r} does not exist{near}")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path``, see `replacing`."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def relative(path: str | Path) -> Path:
    """``path`` as seen from here, where that is shorter."""
    path, here = Path(path).resolve(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def lock(file: BinaryIO) -> bool:
    """Whether no living process holds ``file``, which then is held until it is closed or its process dies.

    Unlike the number of a process, a lock means the same on every machine that shares the disk.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks
        return False
    return True


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Refuse the block while another process is in one for ``folder``, as far as that can be told.

    Unlike a `lock` it is not handed on to the processes that this one starts, which may outlive it by some seconds.
    """
    name = folder / ".lock"
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(name.open("ab"))
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stack.callback(name.unlink, missing_ok=True)
        except BlockingIOError as error:
            raise UserError(
                f"another run is at work in {relative(folder)}: wait for its end, or begin a new run without "
                "--ckpt_path"
            ) from error
        except (OSError, AttributeError):  # a folder that takes no file, a file system or a system without locks
            pass
        yield


def _remove_leftovers(folder: Path) -> None:
    for leftover in folder.glob(f".*{_SUFFIX}"):
        with contextlib.suppress(OSError), leftover.open("rb") as file:
            status = leftover.stat()
            # An empty one may have been made this very moment, and not be locked yet.
            if (status.st_size or time.time() - status.st_mtime > 60) and lock(file):
                leftover.unlink()


def _sync_folder(folder: Path) -> None:
    """Put the new name itself on disk; some file systems do that of their own and refuse to be asked."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_hub_name(root: str) -> bool:
    """Whether ``root``, which is no local folder, can be the name of a repository."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", root) is not None
