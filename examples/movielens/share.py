"""How processes that train together divide each batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch


@dataclass(frozen=True)
class Share:
    """One process's part of everything: the whole, if it is the only one.

    Attributes:
        rank: number of the process, from 0.
        processes: how many there are.
    """

    rank: int = 0
    processes: int = 1

    def check(self, batch_size: int) -> None:
        """Raises ValueError if a batch cannot be divided evenly.

        Means over equal parts add up to the mean over the batch; over unequal ones they do not.
        """
        if batch_size % self.processes:
            raise ValueError(
                f"batch_size={batch_size} is not a multiple of the {self.processes} processes that"
                " share each batch"
            )

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """The part of `rows` that is this process's: as long as all others, at least one long.

        If they cannot be divided evenly, the last row is repeated: all parts, one after the other,
        begin with `rows`.
        """
        length = -(-len(rows) // self.processes)
        position = torch.arange(self.rank * length, (self.rank + 1) * length)
        return rows[position.clamp(max=len(rows) - 1)]


WHOLE: Final = Share()
