"""What a stepper knows of the optimizers that it steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

from torch.optim import Optimizer

from recap_fast.optim.left_to_torch import LeftToTorch
from recap_fast.state.memory import Shares
from recap_fast.state.new import HasState


class Stepped(HasState, Protocol):
    """An optimizer whose param groups a native call can step.

    Attributes:
        algorithm: the native name of its update.
    """

    algorithm: ClassVar[str]
    _left_to_torch: LeftToTorch | None
    _clear_grads: bool

    @classmethod
    def torch_class(cls) -> type[Optimizer]:
        """The class whose step takes the param groups that are left to torch."""

    def _place_large_state(self, shares: Callable[[], Shares]) -> None: ...
