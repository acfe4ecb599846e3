"""Models side by side on one dataset in memory: the baselines, the published references, CRANE and its variants."""
