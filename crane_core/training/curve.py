"""Names and thresholds in the curve of a training, for whoever reads it without torch."""

OVERWHELMED = 2.0
"""Largest gradient norm of another term of the loss, as a multiple of that of the ranking. At the default settings
CRANE's contrast stays at 0.005 and LightGCN's regularisation at 0.04 (Last.fm 2K)."""
GRADIENT = "gradient_"
"""Prefix of the name of a term of the loss, for the norm of its gradient."""
