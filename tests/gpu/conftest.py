"""The GPU suite: what only a CUDA device can show. Skipped as a whole where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import card

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if reason := card.why_not():
        for item in items:
            if _HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def _errors_surface_here() -> Iterator[None]:
    """A kernel that fails is reported by the test that launched it."""
    yield
    torch.cuda.synchronize()


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device is an error, as far as it goes through torch."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode(before)
