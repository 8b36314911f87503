"""What watches a run and writes about it."""

from srlora_pl.callbacks.csv_log import ContinuedCSVLogger
from srlora_pl.callbacks.curves import ContinuedCurves, ContinuedTensorBoardLogger
from srlora_pl.callbacks.interrupts import Interrupts
from srlora_pl.callbacks.monitor import Monitor
from srlora_pl.callbacks.predictions import GLUEWriter, PredictionWriter
from srlora_pl.callbacks.progress import MatrixTable, Progress
from srlora_pl.callbacks.summary import Summary

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
