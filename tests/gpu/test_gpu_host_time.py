"""What a step costs the host does not depend on what it costs the device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from recap_fast.optim import FusedAdam
from tests.gpu.helpers import host_seconds


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
def test_host_time_does_not_grow_with_elements(capturable: bool, device: torch.device) -> None:
    fastest = []
    for size in (1_000, 100_000_000):
        param = nn.Parameter(torch.ones(size, device=device))
        param.grad = torch.ones(size, device=device)
        optimizer = FusedAdam([param], capturable=capturable)
        for _ in range(3):
            optimizer.step()
        fastest.append(min(host_seconds(optimizer.step) for _ in range(50)))
        del optimizer, param
    small, large = fastest
    assert large < 2 * small + 20e-6, f"{1e6 * small:.1f} and {1e6 * large:.1f} µs"
