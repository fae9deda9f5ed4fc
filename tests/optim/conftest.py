"""Fixtures of the tests of the step: where it runs, and engine settings that are put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from recap_fast import build_info
from recap_fast._native import use_instruction_set
from tests.support.lent_to_cuda import lend_to_cuda


@pytest.fixture(scope="session", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that a step runs on; a test that takes it is one body for all of them."""
    name: str = request.param
    if name not in build_info()["engines"]:
        pytest.skip(f"this build of recap_fast has no {name} engine")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    return torch.device(name)


@pytest.fixture(autouse=True)
def _engine_settings() -> Iterator[None]:
    """One thread, unless a test asks for more: on a busy machine, others would only wait.

    Afterwards puts back the number of threads, and the fastest instruction set.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    use_instruction_set(None)


@pytest.fixture
def as_if_on_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    return lend_to_cuda(monkeypatch)
