"""What watches a run and writes about it."""

from srlora_pl.callbacks.csv_log import ContinuedCSVLogger
from srlora_pl.callbacks.predictions import GLUEWriter, PredictionWriter

__all__ = ["ContinuedCSVLogger", "GLUEWriter", "PredictionWriter"]
