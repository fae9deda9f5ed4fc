"""What becomes of the tables in several backward passes before a step."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from recap_fast.embeddings.passes import Pass
from recap_fast.names import some

logger = logging.getLogger("recap_fast")


class SeveralBackwards:
    """The passes of a table-batched module since the last step.

    Attributes:
        mode: "update" by each, as FBGEMM does; "accumulate", and update by the sum of them in the
            step; or "refuse" the second.
        held: With "accumulate", the passes whose gradients came back.
        counted: Whether a forward pass was counted since the last step.
    """

    def __init__(self, mode: str = "update") -> None:
        self.mode = mode
        self.held: list[Pass] = []
        self.counted = False
        self._updates = 0
        self._warned = False

    @property
    def accumulates(self) -> bool:
        """Whether a backward pass is to be held until the step."""
        return self.mode == "accumulate"

    def count_update(self, tables: Sequence[str]) -> None:
        """Counts a backward pass that is about to update the tables.

        Raises:
            RuntimeError: It is the second since the last step, and such are refused.
        """
        if self._updates and (self.mode == "refuse" or not self._warned):
            self._complain(tables)
        self._updates += 1

    def _complain(self, tables: Sequence[str]) -> None:
        what = (
            f"the fused tables {some(tables)} are looked up or propagated through more than once "
            "before a step"
        )
        if self.mode == "refuse":
            raise RuntimeError(
                f"{what}, which several_backwards refuses; nothing was updated by this pass. Call "
                "optimizer.step() and optimizer.zero_grad() between backward passes, look a table "
                "up once, or choose several_backwards: accumulate, which has one update of the sum"
            )
        self._warned = True
        logger.warning(
            "%s: FBGEMM updates them at each, which is no update of the sum of the gradients. If "
            "that is not wanted, choose several_backwards: accumulate (or refuse) in "
            "emb_optimizer_config",
            what,
        )

    def begin_step(self) -> None:
        """From now on, the next backward pass is the first one."""
        self._updates = 0
        self.counted = False

    def clear(self) -> None:
        """Drops what is held, as `zero_grad` does."""
        self.held.clear()
        self._updates = 0

    def unscale(self, inverse: Tensor, found_inf: Tensor) -> None:
        """Multiplies all gradients that are held by a number, as a `GradScaler` does.

        Args:
            inverse: The number, shape ().
            found_inf: Set to 1 if one of the gradients is not finite, shape (1,).
        """
        for gradient in (each.gradient for each in self.held if each.gradient is not None):
            found = torch.zeros(1, device=gradient.device)
            torch._amp_foreach_non_finite_check_and_unscale_(
                [gradient], found, inverse.to(gradient.device, torch.float32)
            )
            found_inf.copy_(torch.maximum(found_inf, found.to(found_inf.device).view_as(found_inf)))
