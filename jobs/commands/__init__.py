"""The commands of the console script `crane`, one module for each group."""
