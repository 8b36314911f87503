"""What a run prints besides its progress: notes, closing words, and none of the warnings that help nobody."""

import logging
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table

# Warnings that tell the user of a config nothing: each is answered by this program, or meant to be so.
_NOISE = (
    ".*does not have many workers which may be a bottleneck",
    ".*fp16 is not supported on CPU",  # a note says so
    ".*Checkpoint directory .* exists and is not empty",  # a resumed run goes on in its own folder
    ".*The dirpath has changed from",  # of test and predict, which save nothing; or the run's folder was moved
    ".*The number of training batches .* is smaller than the logging interval",
    ".*callbacks used to create the checkpoint need to be provided",  # test and predict choose no checkpoint
    ".*treespec, LeafSpec.* is deprecated",
    ".*Total length of `list` across ranks is zero",  # no validation split
    ".*could not find the monitored key",  # the same; the closing words say so
    r"\s*Unable to serialize instance",  # a note says so
    r"\s*Dump of a value that does not round-trip: a Text",  # text in quotes, which is written as text
    ".*using the WeightAveraging callback, but loading a checkpoint outside",  # to score the averages, as intended
)


@rank_zero_only
def note(text: str) -> None:
    """One line on stderr, from the first process."""
    print(f"note: {text}", file=sys.stderr)


@rank_zero_only
def close(scores: Mapping[str, float], lines: Sequence[str]) -> None:
    """The last words of a run on stdout: a table of ``scores``, and ``lines``."""
    console = Console(highlight=False, soft_wrap=True)
    if scores:
        table = Table("score", "value")
        for name, value in scores.items():
            table.add_row(name, f"{value:.4f}")
        console.print(table)
    for line in lines:
        console.print(line, markup=False)


def quieten() -> None:
    """Filter warnings, Lightning's log and tracebacks of threads for the rest of the process."""
    threading.excepthook = _of_thread
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        warnings.simplefilter("ignore")  # the first rank warns of the same
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "Tip: For seamless" not in record.getMessage())


def _of_thread(failure: threading.ExceptHookArgs) -> None:
    """Print a traceback, but none of TensorBoard's writer: the main thread gets its error, such as a full disk, too."""
    if type(failure.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failure)
