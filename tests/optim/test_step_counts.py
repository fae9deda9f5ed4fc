"""Step counts are where the user has them: held, shared, or part of something larger."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.support.optimizers import FUSED, for_loop, is_stepped_on_device, parameters

pytestmark = pytest.mark.cpu_engine  # elsewhere counts are taken to the device


def _with_counts(
    algorithm: str, counts: list[Tensor], make: Callable[..., torch.optim.Optimizer]
) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    params = parameters(len(counts))
    optimizer = make(algorithm, params)
    names = {"adam": ("exp_avg", "exp_avg_sq"), "adagrad": ("sum",)}[algorithm]
    for param, count in zip(params, counts, strict=True):
        moments = {name: torch.zeros_like(param.detach()) for name in names}
        optimizer.state[param] = {"step": count, **moments}
    return optimizer, params


def _fused(algorithm: str, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return FUSED[algorithm](params)


@pytest.mark.parametrize("algorithm", ["adam", "adagrad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_count_that_is_held_goes_on_counting(algorithm: str, dtype: torch.dtype) -> None:
    whole = torch.zeros(6, dtype=dtype)
    counts = [torch.zeros((), dtype=dtype).share_memory_(), whole[2], whole[4:5], whole[5]]
    optimizer, params = _with_counts(algorithm, counts, _fused)
    for _ in range(3):
        optimizer.step()
    assert [count.item() for count in counts] == [3, 3, 3, 3]
    assert whole.tolist() == [0, 0, 3, 0, 3, 3]
    assert counts[0].is_shared()
    for param, count in zip(params, counts, strict=True):
        assert optimizer.state[param]["step"] is count
    counts[0].fill_(7)
    optimizer.step()
    assert [count.item() for count in counts] == [8, 4, 4, 4]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", ["adam", "adagrad"])
def test_a_count_of_any_number_type_goes_on(algorithm: str, dtype: torch.dtype) -> None:
    """As some converters of checkpoints write them, and torch takes them."""
    seen = []
    for make in (_fused, for_loop):
        counts = [torch.tensor(count, dtype=dtype) for count in (3, 4)]
        optimizer, params = _with_counts(algorithm, counts, make)
        for _ in range(2):
            optimizer.step()
        assert [optimizer.state[param]["step"].item() for param in params] == [5, 6]
        seen.append([param.detach().clone() for param in params])
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_count_that_two_parameters_share_counts_both_as_in_torch() -> None:
    seen = []
    for make in (_fused, for_loop):
        count = torch.zeros(())
        optimizer, params = _with_counts("adam", [count, count], make)
        for _ in range(3):
            optimizer.step()
        seen.append((count.item(), [param.detach().clone() for param in params]))
    assert seen[0][0] == seen[1][0] == 6
    for ours, theirs in zip(seen[0][1], seen[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("algorithm", ["adam", "adagrad"])
def test_counts_that_the_optimizer_made_may_be_held_and_shared(algorithm: str) -> None:
    params = parameters(3)
    optimizer = FUSED[algorithm](params)
    optimizer.step()
    held = [optimizer.state[param]["step"] for param in params]
    held[1].share_memory_()
    optimizer.step()
    assert [count.item() for count in held] == [2, 2, 2]
    assert [count.is_shared() for count in held] == [False, True, False]
    assert all(optimizer.state[p]["step"] is c for p, c in zip(params, held, strict=True))


def test_a_count_without_a_value_is_refused_before_anything_changes() -> None:
    optimizer, params = _with_counts("adam", [torch.zeros((), device="meta")], _fused)
    assert not is_stepped_on_device(params[0])
    before = params[0].detach().clone()
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        optimizer.step()
    assert torch.equal(params[0], before)


def _counts(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> list[float]:
    return [optimizer.state[param]["step"].item() for param in params]


@pytest.mark.parametrize("wrong", [-1.0, -7.0, 0.5, math.inf])
def test_a_count_made_wrong_is_refused_and_no_other_counts(wrong: float) -> None:
    params = parameters(3)
    optimizer = FUSED["adam"](params)
    optimizer.step()
    optimizer.state[params[1]]["step"].fill_(wrong)
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match="it must be a whole number of steps"):
        optimizer.step()
    assert _counts(optimizer, params) == [1, wrong, 1]
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    optimizer.state[params[1]]["step"].fill_(1)
    optimizer.step()
    assert _counts(optimizer, params) == [2, 2, 2]


def test_a_step_that_fails_with_another_counts_nothing() -> None:
    params = parameters(3)
    optimizer = FUSED["adam"](params)
    optimizer.step()

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer._stepper.step(None, None, others=[fail])
    assert _counts(optimizer, params) == [1, 1, 1]
