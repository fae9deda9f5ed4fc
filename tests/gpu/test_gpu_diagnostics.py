"""`python -m recap_fast` where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from recap_fast.diagnostics import bits, speed


@pytest.mark.usefixtures("device")
def test_the_engine_is_checked_on_every_gpu() -> None:
    checks = list(bits.checks())
    assert [check for check in checks if check.problem is not None] == []
    on_gpus = [check.what for check in checks if check.what.startswith("CUDA engine, GPU ")]
    assert len(on_gpus) == 2 * torch.cuda.device_count()


@pytest.mark.usefixtures("device")
def test_steps_on_the_gpu_are_timed() -> None:
    ratios = [ratio for ratio in speed.ratios(seconds=0.0) if ratio.what.endswith("GPU")]
    assert len(ratios) == len(speed.WORKLOADS)
    assert all(ratio.low <= ratio.median <= ratio.high for ratio in ratios)
