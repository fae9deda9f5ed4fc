"""The param groups of a model's dense parameters."""
