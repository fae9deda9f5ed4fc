"""`recap_fast.reference` stores parameters and states in the formats of native steps."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recap_fast import build_optimizer, reference
from recap_fast.reference_formats import random_bits, rounded, to_codes
from recap_fast.state.codes import decoded
from tests.support import formats as oracle
from tests.support.formats import SHORT, Formats, Stored, assert_stored
from tests.support.optimizers import numbers, same_bits

ALGORITHMS: dict[str, dict[str, Any]] = {
    "adam": {"amsgrad": True, "weight_decay": 0.01},
    "adamw": {},
    "adagrad": {},
    "sgd": {"momentum": 0.9},
    "rmsprop": {"centered": True, "momentum": 0.5},
    "lion": {},
}
SECTIONS: dict[str, dict[str, Any]] = {
    "short states": {"state_dtype": "bfloat16"},
    "half states": {"state_dtype": "float16", "rounding_seed": 3},
    "codes": {"state_dtype": "8bit"},
    "master": {"master_weights": True},
    "master and codes": {"master_weights": True, "state_dtype": "8bit"},
    "by chance": {"stochastic_rounding": True},
}
DTYPES = [torch.float32, *SHORT]


def _made(build: Any, algorithm: str, dtype: torch.dtype, section: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = nn.Linear(100, 50).to(dtype)
    options = {"lr": 0.01, **ALGORITHMS[algorithm], **section}
    return build(model, {algorithm: options})[0], model


def _step(optimizer: Any, model: nn.Module, seed: int) -> None:
    for param in model.parameters():
        param.grad = numbers(param.shape, seed, param.dtype)
    optimizer.step()


def _stored(optimizer: Any, param: Tensor) -> Stored:
    state = {name: value.clone() for name, value in optimizer.state[param].items()}
    return Stored(param.detach().clone(), state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_it_stores_what_a_native_step_does(
    algorithm: str, section: dict[str, Any], dtype: torch.dtype
) -> None:
    builds = (build_optimizer, reference.build_optimizer)
    made = [_made(build, algorithm, dtype, section) for build in builds]
    options = "master" if "master_weights" in section else "nearest"
    formats = Formats(dtype, dtype, None, options)
    for step in (1, 2):
        for optimizer, model in made:
            _step(optimizer, model, step)
        (native, model), (slow, twin) = made
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            own, its = _stored(native, param), _stored(slow, other)
            assert own.state.get("step") == its.state.get("step")
            its.state.pop("step", None)
            assert_stored(own, its, formats)
        # What was rounded to another number goes no further.
        twin.load_state_dict(model.state_dict())
        slow.load_state_dict(native.state_dict())


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_a_checkpoint_of_either_loads_into_the_other(section: dict[str, Any]) -> None:
    builds = (build_optimizer, reference.build_optimizer)
    for first, second in (builds, builds[::-1]):
        source, model = _made(first, "adam", torch.bfloat16, section)
        target, other = _made(second, "adam", torch.bfloat16, section)
        for optimizer, own in ((source, model), (target, other)):
            _step(optimizer, own, 1)
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True))
        for param, twin in zip(model.parameters(), other.parameters(), strict=True):
            saved, loaded = source.state[param], target.state[twin]
            assert saved.keys() == loaded.keys()
            assert all(same_bits(value, loaded[name]) for name, value in saved.items())
        _step(target, other, 2)


@pytest.mark.parametrize(("seed", "step"), [(0, 1), (-5, 2), (2**63 - 1, 10**7)])
def test_random_bits_are_those_of_their_definition(seed: int, step: int) -> None:
    found = random_bits(seed, "tower.wäight", step, 100)
    wanted = oracle.chances(seed, "tower.wäight", step, 100)
    pairs = zip((*found.states, found.param), (*wanted.states, wanted.param), strict=True)
    for ours, theirs in pairs:
        assert ours.tolist() == theirs.tolist()


def test_rounding_is_that_of_its_definition() -> None:
    values = torch.cat([numbers((4000,), 1, torch.float32) * 2.0**e for e in (0, -20, -140, 15)])
    values[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    drawn = oracle.chances(0, "w", 1, values.numel()).param
    random = torch.from_numpy(drawn.astype("int64"))
    for dtype in SHORT:
        assert same_bits(rounded(values, dtype, random), oracle.stochastic(values, dtype, drawn))
    values[:3] = 0
    for name in ("exp_avg", "exp_avg_sq"):
        own = values.abs() if name == "exp_avg_sq" else values
        codes, scales = to_codes(name, own, random)
        wanted, its = oracle.to_codes(name, own, drawn)
        assert same_bits(scales, its)
        assert int((codes != wanted).sum()) <= 2  # by the last place of a quotient
        assert same_bits(decoded(name, codes, scales), oracle.from_codes(name, codes, scales))
