"""What a run needs, from its config alone: parameters, memory by part, work, and what to change if it does not fit."""
