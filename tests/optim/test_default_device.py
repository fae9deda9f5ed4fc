"""A default device other than the parameters': what the optimizer makes is where they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.optimizers import FUSED, UPDATES, combined, for_loop, parameters


@pytest.mark.parametrize("name", UPDATES)
def test_the_first_step_makes_state_where_the_parameter_is(name: str) -> None:
    algorithm, options = UPDATES[name]
    params, twins = parameters(3), parameters(3)
    expected = for_loop(algorithm, twins, **options)
    optimizer = FUSED[algorithm](params, **options)  # torch's Adagrad makes its state here
    with torch.device("meta"):
        optimizer.step()
        optimizer.step()
    expected.step()
    expected.step()
    for param, twin in zip(params, twins, strict=True):
        assert {value.device for value in optimizer.state[param].values()} <= {param.device}
        torch.testing.assert_close(param, twin)


@pytest.mark.parametrize("algorithm", FUSED)
def test_a_state_dict_is_loaded_to_where_the_parameter_is(algorithm: str) -> None:
    options: dict[str, Any] = {"momentum": 0.9} if algorithm == "sgd" else {}
    params = parameters(2)
    optimizer = FUSED[algorithm](params, **options)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    fresh = FUSED[algorithm](twins, **options)
    with torch.device("meta"):
        fresh.load_state_dict(saved)
    for param, twin in zip(params, twins, strict=True):
        twin.grad = param.grad
        for key, value in optimizer.state[param].items():
            assert fresh.state[twin][key].device == param.device
            assert torch.equal(fresh.state[twin][key], value)
    optimizer.step()
    fresh.step()
    assert all(map(torch.equal, params, twins))


def test_a_combined_optimizer_loads_to_where_its_parameters_are() -> None:
    pytest.importorskip("torchrec")
    params = parameters(4)
    optimizer = combined(params)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    fresh = combined(twins := [nn.Parameter(param.detach().clone()) for param in params])
    with torch.device("meta"):
        fresh.load_state_dict(saved)
    for param, twin in zip(params, twins, strict=True):
        twin.grad = param.grad
    optimizer.step()
    fresh.step()
    assert all(map(torch.equal, params, twins))
    assert {v.device.type for state in fresh.state.values() for v in state.values()} == {"cpu"}
