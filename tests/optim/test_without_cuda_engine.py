"""What a build without the CUDA engine says to those who have a CUDA device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from recap_fast import build_info
from recap_fast.optim import FusedAdam
from tests.support.optimizers import FUSED, parameters

pytestmark = pytest.mark.skipif(
    "cuda" in build_info()["engines"],
    reason="this build has the CUDA engine; tests/test_cuda_build.py runs these in one without",
)


@pytest.mark.parametrize("algorithm", ["adam", "sgd"])
def test_a_cuda_tensor_is_refused_by_name(
    algorithm: str, as_if_on_cuda: Callable[[Tensor], Tensor]
) -> None:
    good, memory = parameters(2)
    moved = nn.Parameter(as_if_on_cuda(memory.detach()))
    moved.grad = as_if_on_cuda(memory.grad)
    assert moved.device == moved.grad.device == torch.device("cuda", 0)
    optimizer = FUSED[algorithm]([("good", good), ("moved", moved)], lr=0.1)
    before = good.detach().clone(), memory.detach().clone()
    for _ in range(2):
        with pytest.raises(
            RuntimeError,
            match=r"parameter moved is on cuda:0; this build of recap_fast steps tensors on the "
            r"CPU only, having been built without a CUDA toolkit: move the model, or use recap_fas",
        ):
            optimizer.step()
        assert torch.equal(good, before[0]) and torch.equal(memory, before[1])
        assert not optimizer.state


def test_a_state_on_a_cuda_device_is_refused_by_name(
    as_if_on_cuda: Callable[[Tensor], Tensor],
) -> None:
    params = parameters(2)
    optimizer = FusedAdam([("first", params[0]), ("second", params[1])])
    optimizer.step()
    state = optimizer.state[params[1]]
    state["exp_avg"] = as_if_on_cuda(state["exp_avg"].clone())
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match=r"'exp_avg' of parameter second is .* on cuda:0"):
        optimizer.step()
    for param, old in zip(params, before, strict=True):
        assert torch.equal(param, old)
    assert [optimizer.state[param]["step"].item() for param in params] == [1, 1]


def test_capturable_is_refused() -> None:
    with pytest.raises(ValueError, match=r"capturable=True: .*no CUDA engine; leave it False, or"):
        FusedAdam(parameters(1), capturable=True)
