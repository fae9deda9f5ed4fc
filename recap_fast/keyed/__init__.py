"""torchrec's keyed optimizers with the behaviour that a training loop expects of an optimizer."""

from recap_fast import torchrec_checked  # noqa: F401 - first: says if torchrec is missing

# isort: split
from recap_fast.keyed.combined import CombinedOptimizer
from recap_fast.keyed.walk import is_dense, leaves, walk

__all__ = ["CombinedOptimizer", "is_dense", "leaves", "walk"]
