"""The generated answers of an evaluation: graded, counted, and written as they come, so that none is lost."""

import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from srlora_pl.util.files import write_whole, writing_to

Row = dict[str, Any]


class Answers:
    """The answers of the samples of several splits, kept in memory and, in a file, on disk.

    Each process appends a line an answer to a file of its own; the first one joins them into ``file`` at the end, in
    the order of the data. A process that begins anew with the same model takes the answers that are there.

    Args:
        file: None keeps them in memory only.
        model: a digest of everything that the answers depend on besides the prompt.
    """

    def __init__(self, file: Path | None, model: str) -> None:
        self.file, self.model = file, model
        self.rank = distributed.get_rank() if _several() else 0
        self.rows: dict[tuple[str, int], Row] = {}
        own = self.file and self._part
        self._is_torn = bool(own and own.is_file() and not own.read_bytes().endswith(b"\n"))  # by a kill in a line
        self._earlier = {(row["split"], row["index"]): row for row in self._left()}

    @property
    def _part(self) -> Path:
        assert self.file is not None
        return self.file.with_name(f"{self.file.name}.{self.rank}.part")

    def _parts(self) -> list[Path]:
        return sorted(self.file.parent.glob(f"{glob.escape(self.file.name)}.*.part")) if self.file else []

    def _left(self) -> Iterator[Row]:
        """The whole lines of files that processes with the same model left behind."""
        for file in self._parts():
            for line in file.read_bytes().split(b"\n")[:-1]:
                try:
                    row = json.loads(line)
                except ValueError:  # of a machine that went down
                    continue
                if row.pop("model", None) == self.model:
                    yield row

    def earlier(self, split: str, index: int, prompt: str) -> Row | None:
        """The answer to this prompt that an interrupted evaluation of the same model has left."""
        row = self._earlier.get((split, index))
        return row if row and row["prompt"] == prompt else None

    def add(self, rows: Sequence[Row]) -> None:
        """Keep answers; each has a ``split`` and an ``index``. Those that were left on disk are there already."""
        self.rows |= {(row["split"], row["index"]): row for row in rows}
        new = [row for row in rows if self._earlier.get((row["split"], row["index"])) is not row]
        if self.file is not None and new:
            lines = "".join(json.dumps({**row, "model": self.model}, ensure_ascii=False) + "\n" for row in new)
            lines, self._is_torn = "\n" * self._is_torn + lines, False
            with writing_to(str(self.file)):
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self._part.open("ab") as part:
                    part.write(lines.encode(errors="backslashreplace"))

    def of(self, split: str) -> list[Row]:
        """The answers of a split from all processes, in the order of the data; all of them must call this."""
        own = {key: row for key, row in self.rows.items() if key[0] == split}
        parts: list[Any] = [own]
        if _several():
            parts = [None] * distributed.get_world_size()
            distributed.all_gather_object(parts, own)
        everything = {key: row for part in parts for key, row in part.items()}
        return [everything[key] for key in sorted(everything, key=lambda key: key[1])]

    def write(self, rows: Sequence[Row]) -> None:
        """Write all answers to the file, in the first process, and remove the parts that they come from."""
        if self.file is None or self.rank:
            return
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        with writing_to(str(self.file)):
            write_whole(self.file, "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))
            for part in self._parts():
                part.unlink(missing_ok=True)


def digest(*contents: Any) -> str:
    """A digest of JSON values, the same in every process."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:16]


def counts(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """The shares of ``rows`` that are right (the ``score``), unfinished and without a readable answer, in float64."""
    total = max(1, len(rows))
    right = sum(bool(row["correct"]) for row in rows)
    shares = {
        "accuracy": right,
        "unfinished": sum(not row.get("finished", True) for row in rows),
        "unreadable": sum(row["answer"] is None for row in rows),
        "score": right,
    }
    return {name: torch.tensor(count / total, dtype=torch.float64) for name, count in shares.items()}


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
