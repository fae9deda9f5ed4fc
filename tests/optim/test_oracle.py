"""The three algorithms against torch's for-loop, over random group layouts.

Each step is checked against a step of the same torch class in float64 that starts from the values
our step started from. So a tolerance covers the rounding of one step, whatever came before, and a
16-bit parameter is held to the rounding of its result: half a unit in its last place.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

pytest.importorskip("hypothesis")

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.optimizers import DTYPES, FUSED, LAYOUTS, for_loop, laid_out, numbers, parameter
from tests.support.rounding import assert_rounded, decays_apart, double, magnitudes

# The engine's tile has 8192 elements and its 16-bit block 512: below, at and beyond both.
SHAPES = [
    *[(), (0,), (1,), (3, 0), (5,), (1, 1, 1, 1), (3, 5), (2, 3, 4, 5), (7, 1, 3), (513,)],
    *[(61, 67), (8193,), (2, 8, 33, 17)],
]


@dataclass(frozen=True)
class SlotCase:
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    grad_layout: str
    has_grad: tuple[bool, ...]  # in each step


@dataclass(frozen=True)
class GroupCase:
    slots: tuple[SlotCase, ...]
    options: dict[str, Any]
    rates: tuple[float, ...]  # in each step
    lr_is_tensor: bool


STEPS = 3
_slots = st.builds(
    SlotCase,
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS)),
    grad_layout=st.sampled_from([*LAYOUTS, "expanded"]),
    has_grad=st.tuples(*[st.sampled_from([True, True, True, False])] * STEPS),
)
_decay = st.sampled_from([0.0, 0.01])
_beta = st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.999])
_eps = st.sampled_from([1e-8, 1e-3])
_adam = st.fixed_dictionaries(
    {
        "betas": st.tuples(_beta, _beta),
        "eps": _eps,
        "weight_decay": _decay,
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
    }
)
OPTIONS = {
    "adam": _adam,
    "adamw": _adam,
    "adagrad": st.fixed_dictionaries(
        {
            "lr_decay": st.sampled_from([0.0, 0.3]),
            "weight_decay": _decay,
            "initial_accumulator_value": st.sampled_from([0.0, 0.5]),
            "eps": _eps,
            "maximize": st.booleans(),
        }
    ),
    "rmsprop": st.fixed_dictionaries(
        {
            "alpha": st.sampled_from([0.3, 0.9, 0.999]),
            "eps": _eps,
            "weight_decay": _decay,
            "momentum": st.sampled_from([0.0, 0.5, 0.9]),
            "centered": st.booleans(),
            "maximize": st.booleans(),
        }
    ),
    "lion": st.fixed_dictionaries(
        {"betas": st.tuples(_beta, _beta), "weight_decay": _decay, "maximize": st.booleans()}
    ),
    "sgd": st.one_of(
        st.fixed_dictionaries(
            {
                "momentum": st.sampled_from([0.0, 0.5, 0.9]),
                "dampening": st.sampled_from([0.0, 0.3]),
                "weight_decay": _decay,
                "maximize": st.booleans(),
            }
        ),
        st.fixed_dictionaries(
            {"momentum": st.just(0.9), "nesterov": st.just(True), "weight_decay": _decay}
        ),
    ),
}


def _groups(algorithm: str) -> st.SearchStrategy[tuple[GroupCase, ...]]:
    group = st.builds(
        GroupCase,
        slots=st.lists(_slots, min_size=1, max_size=4).map(tuple),
        options=OPTIONS[algorithm],
        rates=st.tuples(*[st.sampled_from([0.0, 1e-3, 0.1, 1.0])] * STEPS),
        lr_is_tensor=st.booleans(),
    )
    return st.lists(group, min_size=1, max_size=4).map(tuple)


def _gradient(param: Tensor, layout: str, seed: int) -> Tensor:
    if layout == "expanded":
        return numbers((), seed, param.dtype, param.device).expand(param.shape)
    return laid_out(numbers(param.shape, seed, param.dtype, param.device), layout)


def _values(param: Tensor, state: dict[str, Any]) -> dict[str, Tensor]:
    return {"param": double(param), **{key: double(value) for key, value in state.items()}}


class Checked:
    """Our optimizer beside its truth, one parameter in float64 for each of ours."""

    def __init__(self, algorithm: str, groups: tuple[GroupCase, ...], device: torch.device) -> None:
        self.algorithm = algorithm
        self.cases = [slot for group in groups for slot in group.slots]
        self.params = [
            parameter(case.shape, index, case.dtype, device, case.layout)
            for index, case in enumerate(self.cases)
        ]
        self.truths = [nn.Parameter(double(param)) for param in self.params]
        self.ours = FUSED[algorithm](self._param_groups(groups, self.params))
        self.truth = for_loop(algorithm, self._param_groups(groups, self.truths))

    @staticmethod
    def _param_groups(
        groups: tuple[GroupCase, ...], params: list[nn.Parameter]
    ) -> list[dict[str, Any]]:
        remaining = iter(params)
        # A float64 tensor: with a float32 one, torch would compute the step size in float32.
        as_tensor = partial(torch.tensor, dtype=torch.float64)
        return [
            {
                "params": [next(remaining) for _ in group.slots],
                "lr": as_tensor(group.rates[0]) if group.lr_is_tensor else group.rates[0],
                **group.options,
            }
            for group in groups
        ]

    def set_rates(self, rates: list[float]) -> None:
        for optimizer in (self.ours, self.truth):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def set_gradients(self, number: int) -> None:
        for index, (case, param, truth) in enumerate(
            zip(self.cases, self.params, self.truths, strict=True)
        ):
            param.grad = truth.grad = None
            if case.has_grad[number]:
                param.grad = _gradient(param, case.grad_layout, 100 * number + index)
                truth.grad = double(param.grad)

    def _start_truth_from_ours(self) -> None:
        for param, truth in zip(self.params, self.truths, strict=True):
            truth.data.copy_(param.data)
            for key, value in self.ours.state.get(param, {}).items():
                self.truth.state[truth][key].copy_(value)

    def step_and_check(self) -> None:
        self._start_truth_from_ours()
        before = [
            {**_values(param, self.ours.state.get(param, {})), "grad": param.grad}
            for param in self.params
        ]
        self.ours.step()
        self.truth.step()
        groups = [group for group in self.truth.param_groups for _ in group["params"]]
        for index, (param, truth) in enumerate(zip(self.params, self.truths, strict=True)):
            assert (param in self.ours.state) == (truth in self.truth.state), f"state of {index}"
            if before[index]["grad"] is None:
                assert torch.equal(param.double(), before[index]["param"]), f"{index} was written"
                continue
            self._check_slot(index, groups[index], before[index])

    def _check_slot(self, index: int, group: dict[str, Any], before: dict[str, Tensor]) -> None:
        param, truth = self.params[index], self.truths[index]
        state, true_state = self.ours.state.get(param, {}), self.truth.state.get(truth, {})
        assert list(state) == list(true_state)
        after = _values(truth, true_state)
        if not set(state) <= set(before):  # torch made the state in this step
            before = {
                **{key: torch.zeros_like(value) for key, value in after.items()},
                **before,
            }
            if self.algorithm == "sgd":
                del before["momentum_buffer"]
        before["grad"] = double(before["grad"])
        sizes, update = magnitudes(self.algorithm, group, before, after)
        for key, value in state.items():
            assert value.device == param.device or key == "step"
            if key == "step":
                assert value.item() == true_state[key].item(), f"step of {index}"
                continue
            assert value.dtype == param.dtype and value.shape == param.shape
            assert_rounded(f"{key} of {index}", value, after[key], sizes[key], 0.0)
        decays = decays_apart(self.algorithm, group)
        again = before["param"].abs() if decays else 0.0
        assert_rounded(f"parameter {index}", param.data, after["param"], update, again)


@pytest.mark.parametrize("algorithm", FUSED)
@given(data=st.data())
@settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_every_step_is_torchs_step_rounded(
    algorithm: str, device: torch.device, data: st.DataObject
) -> None:
    groups = data.draw(_groups(algorithm))
    checked = Checked(algorithm, groups, device)
    for number in range(STEPS):
        checked.set_rates([group.rates[number] for group in groups])
        checked.set_gradients(number)
        checked.step_and_check()
