"""The figures of a run and the numbers in them."""

from srlora_pl.figures.drawings import direction_intervals, training_loss
from srlora_pl.figures.runs import draw_runs

__all__ = ["direction_intervals", "draw_runs", "training_loss"]
