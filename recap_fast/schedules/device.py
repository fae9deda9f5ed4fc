"""Learning rates in device memory, which the native step itself moves along their schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from recap_fast.config import LearningRate
from recap_fast.schedules.compute import compute_lr

# As csrc/plan/schedules.h describes: the kind and its arguments.
_KINDS = (
    "constant",
    "piecewise_constant",
    "linear_ramp_to_constant",
    "linear_ramp_to_cosine",
)
_NUMBERS_PER_SCHEDULE = 5


def pack(schedules: Sequence[LearningRate]) -> list[float]:
    """Returns ``schedules`` as the table of numbers that ``csrc/plan/schedules.h`` reads."""
    table: list[float] = []
    pieces: list[float] = []
    for schedule in schedules:
        kind = next(kind for kind in _KINDS if getattr(schedule, kind) is not None)
        section = getattr(schedule, kind)
        if kind == "constant":
            arguments = [section]
        elif kind == "piecewise_constant":
            begin = _NUMBERS_PER_SCHEDULE * len(schedules) + len(pieces)
            arguments = [begin, len(section.learning_rate_boundaries)]
            pieces += section.learning_rate_boundaries + section.learning_rate_values
        elif kind == "linear_ramp_to_constant":
            arguments = [section.learning_rate, section.num_ramp_steps]
        else:
            arguments = [
                section.learning_rate,
                section.num_ramp_steps,
                section.final_learning_rate,
                section.final_num_steps,
            ]
        padding = [0.0] * (_NUMBERS_PER_SCHEDULE - 1 - len(arguments))
        table += [_KINDS.index(kind), *arguments, *padding]
    return table + pieces


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
        epoch: int64, 0-dim, the number of steps taken.
    """

    def __init__(self, schedules: Mapping[int, LearningRate], device: torch.device) -> None:
        self._configs = list(schedules.values())
        self.groups = list(schedules)
        table = torch.tensor(pack(self._configs), dtype=torch.float64, device="cpu")
        self.schedules = table.to(device)
        self.rates = torch.zeros(len(schedules), dtype=torch.float64, device=device)
        self.epoch = torch.zeros((), dtype=torch.int64, device=device)
        self.move_to(0)

    def move_to(self, step: int) -> None:
        """Sets the rates to those of ``step``, from which the optimizer's next step goes on."""
        rates = [compute_lr(config, step) for config in self._configs]
        self.rates.copy_(torch.tensor(rates, dtype=torch.float64, device="cpu"))
        self.epoch.fill_(step)
