"""Which process groups the tests run on."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=["gloo", "nccl"])
def backend(request: pytest.FixtureRequest) -> str:
    """A test that takes it is one body for CPUs and GPUs."""
    if request.param == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("nccl needs a CUDA device for each of two processes")
    return request.param
