"""What watches a run and writes about it."""

from srlora_pl.reporting.csv_log import ResumableCSVLogger
from srlora_pl.reporting.curves import ResumableCurves, ResumableMLFlowLogger, ResumableTensorBoardLogger
from srlora_pl.reporting.monitor import Monitor
from srlora_pl.reporting.predictions import GLUEWriter, PredictionWriter
from srlora_pl.reporting.progress import MatrixTable, Progress
from srlora_pl.reporting.summary import Summary

__all__ = [
    "GLUEWriter",
    "MatrixTable",
    "Monitor",
    "PredictionWriter",
    "Progress",
    "ResumableCSVLogger",
    "ResumableCurves",
    "ResumableMLFlowLogger",
    "ResumableTensorBoardLogger",
    "Summary",
]
