"""The several processes of one run."""

import contextlib
import subprocess
import time
from collections.abc import Iterator

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from srlora_pl.training import lightning_internals as internals
from srlora_pl.util.errors import UserError

_GRACE = 3  # seconds that the first process gets to end this one, if it has met the same error


@contextlib.contextmanager
def ending_together(trainer: Trainer) -> Iterator[None]:
    """An error of one process ends all of them, and the user reads it once."""
    try:
        yield
    except Exception as error:
        if rank_zero_only.rank and isinstance(error, UserError):  # type: ignore[attr-defined]
            time.sleep(_GRACE)
        children = internals.child_processes(trainer)
        if not isinstance(error, UserError) and any(_has_refused(child) for child in children):
            raise SystemExit(2) from error
        for child in children:
            child.kill()
        raise


def _has_refused(child: subprocess.Popen) -> bool:
    """Whether a process that was started ends by itself, after it has told the user why."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return child.wait(2 * _GRACE) == 2
    return False
