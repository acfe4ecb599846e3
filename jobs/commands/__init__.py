"""What the console script `crane` does, one module per group of commands."""
