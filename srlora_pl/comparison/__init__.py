"""Methods compared on equal terms: a grid of runs, what they reached, and whether it differs."""
