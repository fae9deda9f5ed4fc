# The extension module as Python sees it; csrc/bindings/module.cpp makes it.
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from torch import Tensor, dtype

STEPPED: Final[int]
SKIPPED: Final[int]
STALE: Final[int]
NEEDS_STATE: Final[int]

torch_version: Final[str]
has_cuda_engine: Final[bool]

def instruction_sets() -> list[str]: ...
def use_instruction_set(name: str) -> bool: ...
def instruction_set_in_use() -> str: ...

class GroupSource:
    def __init__(
        self,
        algorithm: str,
        name: str,
        group: dict[str, Any],
        state: dict[Tensor, Any],
        names: Sequence[str],
    ) -> None: ...

def any_on_cuda(groups: Sequence[GroupSource]) -> bool: ...
def is_on_cuda(object: Tensor) -> bool: ...

class ScheduleTable:
    def __init__(self) -> None: ...
    def add_constant(self, rate: float) -> None: ...
    def add_piecewise_constant(
        self, boundaries: Sequence[float], rates: Sequence[float]
    ) -> None: ...
    def add_linear_ramp_to_constant(self, rate: float, ramp: float) -> None: ...
    def add_linear_ramp_to_cosine(
        self, rate: float, ramp: float, final_rate: float, final_step: float
    ) -> None: ...
    def numbers(self) -> list[float]: ...

class StateBlock:
    def __init__(self, size: int) -> None: ...
    @property
    def size(self) -> int: ...
    @property
    def address(self) -> int: ...
    def tensor(
        self, offset: int, shape: Sequence[int], strides: Sequence[int], dtype: dtype
    ) -> Tensor: ...

class NewState:
    def __init__(
        self,
        slot: int,
        entries: dict[str, Any],
        is_first: bool,
        left_behind: Mapping[Tensor, Any] | None,
    ) -> None: ...

class BoundPlan:
    def __init__(
        self,
        groups: Sequence[GroupSource],
        optimizers: Sequence[object],
        new_states: Sequence[NewState],
        device_values: bool,
    ) -> None: ...
    @property
    def is_captured(self) -> bool: ...
    @property
    def has_device_plans(self) -> bool: ...
    @property
    def failed_elsewhere(self) -> bool: ...
    @property
    def grad_norm(self) -> float: ...
    @property
    def slots_without_state(self) -> list[int]: ...
    def adopt(self) -> None: ...
    def step_plainly(self) -> bool: ...
    def step(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        unscale_by: Tensor | None = None,
        others: Sequence[Callable[[], Any]] = (),
    ) -> int: ...
    def check_captured_rates(self) -> None: ...
    def set_clipping(
        self,
        max_norm: float,
        part_of_slot: Sequence[int],
        parts: int,
        total: Callable[[list[float]], float] | None,
    ) -> None: ...
    def sums_of_squares(self, part_of_slot: Sequence[int], parts: int) -> list[Tensor]: ...
    def set_schedules(
        self, groups: Sequence[int], schedules: Tensor, rates: Tensor, step: Tensor
    ) -> None: ...
