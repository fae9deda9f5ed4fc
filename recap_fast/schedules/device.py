"""Learning rates in device memory, which the native step itself moves along their schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from recap_fast.config import LearningRate
from recap_fast.schedules.compute import compute_lr


def _table_of(schedules: Sequence[LearningRate]) -> list[float]:
    """Returns ``schedules`` as the table of numbers that the step reads."""
    from recap_fast._native import native  # which `recap_fast.keyed` does without

    table = native.ScheduleTable()
    for schedule in schedules:
        if (rate := schedule.constant) is not None:
            table.add_constant(rate)
        elif (pieces := schedule.piecewise_constant) is not None:
            table.add_piecewise_constant(
                pieces.learning_rate_boundaries, pieces.learning_rate_values
            )
        elif (ramp := schedule.linear_ramp_to_constant) is not None:
            table.add_linear_ramp_to_constant(ramp.learning_rate, ramp.num_ramp_steps)
        elif (cosine := schedule.linear_ramp_to_cosine) is not None:
            table.add_linear_ramp_to_cosine(
                cosine.learning_rate,
                cosine.num_ramp_steps,
                cosine.final_learning_rate,
                cosine.final_num_steps,
            )
    return table.numbers()


class DeviceRates:
    """The learning rates of some param groups, in the memory of one CUDA device.

    An optimizer's step reads them there and then moves them on by one step, without the host: a
    captured CUDA graph follows the schedules by itself.

    Args:
        schedules: by the position of the param group among those that step together.
        device: where the parameters of all these groups are.

    Attributes:
        groups: the positions.
        schedules: float64, the table that the step reads.
        rates: float64, one per param group.
        step: int64, 0-dim, the number of steps taken.
    """

    def __init__(self, schedules: Mapping[int, LearningRate], device: torch.device) -> None:
        self._configs = list(schedules.values())
        self.groups = list(schedules)
        table = torch.tensor(_table_of(self._configs), dtype=torch.float64, device="cpu")
        self.schedules = table.to(device)
        self.rates = torch.zeros(len(schedules), dtype=torch.float64, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.move_to(0)

    def move_to(self, step: int) -> None:
        """Sets the rates to those of ``step``, from which the optimizer's next step goes on."""
        rates = [compute_lr(config, step) for config in self._configs]
        self.rates.copy_(torch.tensor(rates, dtype=torch.float64, device="cpu"))
        self.step.fill_(step)
