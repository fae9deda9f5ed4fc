"""What is different about some of the dense parameters: the entries of `groups`."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from recap_fast.config.algorithms import (
    ALGORITHMS,
    AlgorithmSections,
    DenseSection,
    RecapAlgorithmSections,
)
from recap_fast.config.base import BaseConfig, NonNegative


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return pattern


class GroupOptions(BaseConfig):
    """An entry of `groups`: what is different about some of the dense parameters.

    It says which by its key or by its `pattern`:

    * without a pattern: those of the group that is called like the key, which is a task of
      `tower_learning_rates`, `backbone`, `single_task`, or in an `OptimizerConfig` `ALL_PARAMS`;
    * with a pattern: those whose name it is found in, whatever group they are in. They leave it for
      a group of their own, "<group>.<key>", which comes after it.

    Which entry wins:

    * Of several patterns that match a parameter, the first in the file takes it.
    * A parameter that a pattern took has the algorithm of that entry; without one, that of the
      entry of the group it left; without one, the common algorithm. Hyperparameters are those of
      this one section.
    * Its schedule is that of the group it left, so the `lr_multiplier`s of both entries multiply.
    * So do their `weight_decay_multiplier`s, but where the algorithm is the pattern's own: then
      only that entry multiplies its weight decay.

    Embedding tables in groups of their own ("dense_ebc") are left to `EmbeddingOptimizerConfig`.

    Attributes:
        pattern: A regular expression, searched for anywhere in a parameter's FQN as `re.search`
            does; the FQN is without what wrappers such as DDP add. Anchor it with ^ and $.
        lr_multiplier: Factor of the schedule, 0 or greater.
        weight_decay_multiplier: Factor of `weight_decay`, 0 or greater.
        adam, adamw, ...: The algorithm, at most one of `AlgorithmSections`; its hyperparameters
            replace all others.
    """

    at_most_one_of = (ALGORITHMS,)

    pattern: Annotated[str, Field(min_length=1), AfterValidator(_check_pattern)] | None = None
    lr_multiplier: NonNegative = 1.0
    weight_decay_multiplier: NonNegative = 1.0

    @property
    def algorithm(self) -> tuple[str, DenseSection] | None:
        """The name of the algorithm of this entry and its section; None if it has none."""
        for name in self._given(ALGORITHMS):
            return name, getattr(self, name)
        return None


class GroupConfig(GroupOptions, AlgorithmSections):
    """An entry of `groups` in an `OptimizerConfig`; see `GroupOptions`."""


class RecapGroupConfig(GroupOptions, RecapAlgorithmSections):
    """An entry of `groups` in a `RecapOptimizerConfig`; see `GroupOptions`."""
