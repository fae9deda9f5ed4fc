"""What the parts of a combined optimizer's behaviour know of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torchrec.optim import keyed
from torchrec.optim.fused import FusedOptimizer


class Combined(Protocol):
    """What `CombinedOptimizer` is to those of its parts that are in other files."""

    defaults: dict[str, Any]

    @property
    def optimizers(self) -> list[tuple[str, keyed.KeyedOptimizer]]:
        """The parts, with their keys; what is appended is stepped from then on."""

    @property
    def leaves(self) -> list[Optimizer]:
        """The optimizers that own param groups and state, in order."""

    @property
    def fused_leaves(self) -> list[FusedOptimizer]:
        """Those of `leaves` that update embeddings in the backward pass."""

    @property
    def state_owners(self) -> list[Optimizer]:
        """`leaves`, and after them the wrappers around some."""

    @property
    def param_groups(self) -> Sequence[dict[str, Any]]:
        """All param groups, in order."""

    def name_of(self, param: Tensor) -> str:
        """What a message calls a parameter."""

    def check_groups_may_go(self) -> None:
        """Raises if no param group can be taken away or replaced."""

    def prepare_for_torch_format(self) -> None:
        """Makes all state that torch's helpers expect."""
