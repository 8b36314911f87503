"""What a language model answers as it learns."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from srlora_pl.reporting.events import log_text
from srlora_pl.training import lightning_internals as internals
from srlora_pl.util.files import writing_to


class SampleAnswers(Callback):
    """Writes the task's answers to some prompts at each validation: to the loggers as text, and to JSON lines.

    Args:
        file: each line has the ``step``, the ``prompt``, the ``text`` that answers it, the ``reference``, and whether
            it is ``correct``, null where nothing grades it.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    @rank_zero_only
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        rows = pl_module.sample_answers()
        for logger in trainer.loggers if rows else ():
            text = "\n\n---\n\n".join(map(_in_markdown, rows))
            log_text(logger, "samples", text, internals.logged_step(trainer))
        lines = "".join(json.dumps({"step": trainer.global_step, **row}, ensure_ascii=False) + "\n" for row in rows)
        with writing_to(str(self.file)), self.file.open("ab") as file:
            file.write(lines.encode(errors="backslashreplace"))


def _in_markdown(row: dict[str, Any]) -> str:
    verdict = "" if row["correct"] is None else f" ({'right' if row['correct'] else 'wrong'})"
    parts = {"prompt": row["prompt"], f"answer{verdict}": row["text"], "reference": row["reference"]}
    return "\n\n".join(f"**{name}**\n\n```\n{text}\n```" for name, text in parts.items())
