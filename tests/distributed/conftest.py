"""Which process groups the tests run on."""

from __future__ import annotations

import fbgemm_gpu
import pytest
import torch


@pytest.fixture(params=["gloo", "nccl"], scope="module")
def backend(request: pytest.FixtureRequest) -> str:
    """A test that takes it is one body for CPUs and GPUs."""
    if request.param == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("nccl needs a CUDA device per process, and fbgemm-gpu with CUDA for tables")
    return request.param


@pytest.fixture(scope="module")
def table_backend(backend: str) -> str:
    """The same for models with tables."""
    if backend == "nccl" and fbgemm_gpu.__variant__ != "cuda":
        pytest.skip("nccl needs fbgemm-gpu with CUDA")
    return backend
