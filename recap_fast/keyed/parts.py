"""What the parts of a combined optimizer's behaviour know of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torchrec.optim import keyed
from torchrec.optim.fused import FusedOptimizer


class Combined(Protocol):
    """What `CombinedOptimizer` is to those of its parts that are in other files.

    Its members are described there.
    """

    defaults: dict[str, Any]

    @property
    def optimizers(self) -> list[tuple[str, keyed.KeyedOptimizer]]: ...

    @property
    def leaves(self) -> list[Optimizer]: ...

    @property
    def fused_leaves(self) -> list[FusedOptimizer]: ...

    @property
    def state_owners(self) -> list[Optimizer]: ...

    @property
    def param_groups(self) -> Sequence[dict[str, Any]]: ...

    def name_of(self, param: Tensor) -> str: ...

    def check_groups_may_go(self) -> None: ...

    def prepare_for_torch_format(self) -> None: ...
