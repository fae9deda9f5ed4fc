"""The state of optimizers: made, placed in memory, and loaded."""
