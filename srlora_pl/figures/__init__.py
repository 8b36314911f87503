"""The figures of a run and the numbers in them."""

from srlora_pl.figures.runs import direction_intervals, draw_runs, training_loss

__all__ = ["direction_intervals", "draw_runs", "training_loss"]
