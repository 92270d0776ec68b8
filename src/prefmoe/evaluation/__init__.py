"""How good a reward model is: accuracy with intervals, best-of-n, consistency, and the report."""
