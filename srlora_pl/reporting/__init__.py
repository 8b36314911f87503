"""What watches a run and writes about it."""

from srlora_pl.reporting.csv_log import ContinuedCSVLogger
from srlora_pl.reporting.curves import ContinuedCurves, ContinuedTensorBoardLogger
from srlora_pl.reporting.monitor import Monitor
from srlora_pl.reporting.predictions import GLUEWriter, PredictionWriter
from srlora_pl.reporting.progress import MatrixTable, Progress
from srlora_pl.reporting.summary import Summary
from srlora_pl.training.interrupts import Interrupts

__all__ = [
    "ContinuedCSVLogger",
    "ContinuedCurves",
    "ContinuedTensorBoardLogger",
    "GLUEWriter",
    "Interrupts",
    "MatrixTable",
    "Monitor",
    "PredictionWriter",
    "Progress",
    "Summary",
]
