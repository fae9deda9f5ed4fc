"""The learning rate of a schedule at a step."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Final

from recap_fast.config import LearningRate, LinearRampToCosine

# The rate of every group until a schedule sets it: training with it blows up at once.
DEFAULT_LR: Final = 24601.0


def compute_lr(config: LearningRate, step: int) -> float:
    """Returns the learning rate at `step`, the number of optimizer steps taken before.

    The four kinds mean what they mean in the recap recommender:

    * constant: the rate;
    * piecewise constant: boundary `i` is the first step of value `i + 1`;
    * linear ramp to constant: 0 at step 0, `learning_rate` from `num_ramp_steps` on;
    * linear ramp to cosine: the same ramp, then half a cosine period to `final_learning_rate`,
      reached at `final_num_steps` and kept.

    Raises:
        ValueError: If `step` is not a whole number, or negative.
    """
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"step must be an int, 0 or greater; found {step!r}")
    if config.constant is not None:
        return config.constant
    if config.piecewise_constant is not None:
        pieces = config.piecewise_constant
        return pieces.learning_rate_values[bisect_right(pieces.learning_rate_boundaries, step)]
    if config.linear_ramp_to_constant is not None:
        ramp = config.linear_ramp_to_constant
        return min(ramp.learning_rate, ramp.learning_rate / ramp.num_ramp_steps * step)
    if config.linear_ramp_to_cosine is not None:
        return _ramp_to_cosine(config.linear_ramp_to_cosine, step)
    raise AssertionError("LearningRate holds exactly one schedule")


def _ramp_to_cosine(ramp: LinearRampToCosine, step: int) -> float:
    if step < ramp.num_ramp_steps:
        return ramp.learning_rate / ramp.num_ramp_steps * step
    if step > ramp.final_num_steps:
        return ramp.final_learning_rate
    done, length = step - ramp.num_ramp_steps, ramp.final_num_steps - ramp.num_ramp_steps
    share_left = 0.5 * (1.0 + math.cos(math.pi * done / length))
    return ramp.final_learning_rate + (ramp.learning_rate - ramp.final_learning_rate) * share_left
