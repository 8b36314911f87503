"""What watches a run and writes about it."""

from srlora_pl.reporting.csv_log import ResumableCSVLogger
from srlora_pl.reporting.curves import ResumableCurves, ResumableMLFlowLogger, ResumableTensorBoardLogger
from srlora_pl.reporting.monitor import Monitor
from srlora_pl.reporting.predictions import GLUEWriter, PredictionWriter
from srlora_pl.reporting.progress import MatrixTable, Progress, ProgressLines, bar_or_lines
from srlora_pl.reporting.summary import Summary

__all__ = [
    "GLUEWriter",
    "MatrixTable",
    "Monitor",
    "PredictionWriter",
    "Progress",
    "ProgressLines",
    "ResumableCSVLogger",
    "ResumableCurves",
    "ResumableMLFlowLogger",
    "ResumableTensorBoardLogger",
    "Summary",
    "bar_or_lines",
]
