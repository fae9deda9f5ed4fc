"""States of 8 bits: each step stores what a slow reference says, and state dicts keep and convert.

`tests.support.formats` has the reference: torch's update in float32, and codes rounded by the same
random bits.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recap_fast
from recap_fast import build_info, fuse
from recap_fast._native import use_instruction_set
from recap_fast.optim import FusedAdagrad, FusedAdam, FusedSGD, float32_state
from tests.support.formats import (
    BLOCK,
    EIGHT_BITS,
    STORED,
    UPDATES,
    Formats,
    Stored,
    assert_stored,
    expected_step,
    from_codes,
    fused,
    numbers_of_codes,
    parameter,
    stored,
)
from tests.support.optimizers import (
    SCALE,
    TORCH,
    assert_unchanged,
    for_loop,
    grad_scaler,
    numbers,
    same_bits,
    snapshot,
)

needs_grad_dtype = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has gradients of one dtype only"
)
SHAPE = (50, 100)  # the last of its blocks has 8 elements
PLAIN = Formats(torch.float32, torch.float32, EIGHT_BITS)
WITH_STATES = [update for update in UPDATES if update != "sgd"]


def _check_steps(
    update: str, formats: Formats, steps: int = 3, shape: tuple[int, ...] = SHAPE, **more: Any
) -> None:
    param = parameter(shape, 0, formats)
    optimizer, options = fused(update, [("w", param)], formats, **more)
    before = Stored(param.detach().clone(), {})
    for step in range(1, steps + 1):
        param.grad = numbers(shape, step, formats.grad)
        optimizer.step()
        expected = expected_step(
            UPDATES[update][0], options, before, param.grad, formats, name="w", step=step
        )
        before = stored(optimizer, param)
        assert_stored(before, expected, formats)


# --- what is stored ------------------------------------------------------------------------------


@needs_grad_dtype
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("update", WITH_STATES)
def test_a_step_stores_what_the_reference_does(update: str, dtype: torch.dtype) -> None:
    for grad, options in itertools.product(STORED, ("nearest", "master", "stochastic")):
        _check_steps(update, Formats(dtype, grad, EIGHT_BITS, options), steps=2)


@pytest.mark.parametrize("size", [4096, 4097, 20_001, 300_001])
def test_tensors_short_and_long(size: int) -> None:
    _check_steps("amsgrad", PLAIN, steps=2, shape=(size,))


@pytest.mark.parametrize("options", [{"maximize": True}, {"weight_decay": 0.01}], ids=str)
@pytest.mark.parametrize("update", ["adam", "adagrad", "momentum", "rmsprop"])
def test_options_mean_the_same(update: str, options: dict[str, Any]) -> None:
    _check_steps(update, PLAIN, **options)


def test_a_state_has_a_byte_for_each_element_and_a_scale_for_each_block() -> None:
    param = parameter(SHAPE, 0, PLAIN)
    optimizer, _ = fused("amsgrad", [param], PLAIN)
    param.grad = numbers(SHAPE, 1, torch.float32)
    optimizer.step()
    state = dict(optimizer.state[param])
    assert state.pop("step") == 1
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    for name in names:
        codes, scales = state.pop(name), state.pop(f"{name}_scale")
        assert (codes.dtype, codes.shape) == (torch.uint8, SHAPE)
        assert (scales.dtype, scales.shape) == (torch.float32, (-(-param.numel() // BLOCK),))
    assert not state


@pytest.mark.parametrize("dtype", STORED)
def test_small_parameters_and_those_with_gaps_have_float32(dtype: torch.dtype) -> None:
    params = [
        nn.Parameter(numbers((63, 65), 0, dtype)),
        nn.Parameter(numbers((100, 100), 0, dtype).t()),
        nn.Parameter(numbers((100, 200), 0, dtype)[:, ::2]),
    ]
    optimizer = FusedAdam(params, state_dtype="8bit")
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    for param in params:
        assert {v.dtype for v in optimizer.state[param].values()} == {torch.float32}
        assert optimizer.state[param].keys() == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("start", [0.0, 0.3])
def test_adagrad_begins_with_its_initial_sum(start: float) -> None:
    param = parameter(SHAPE, 0, PLAIN)
    optimizer = FusedAdagrad([param], initial_accumulator_value=start, state_dtype="8bit")
    state = optimizer.state[param]
    found = from_codes("sum", state["sum"], state["sum_scale"])
    torch.testing.assert_close(found, torch.full(SHAPE, start))
    param.grad = torch.zeros(SHAPE)
    optimizer.step()
    found = from_codes("sum", state["sum"], state["sum_scale"])
    torch.testing.assert_close(found, torch.full(SHAPE, start))


def test_a_second_moment_is_right_in_the_mean() -> None:
    """Where its codes are rounded to nearest, it never leaves its first place but upwards."""
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.zeros(4096))
    optimizer = FusedAdam([("w", param)], lr=0.0, state_dtype="8bit")
    exact = torch.zeros(4096, dtype=torch.float64)
    nearest = torch.zeros(4096)
    table = torch.from_numpy(numbers_of_codes("exp_avg_sq")).float()
    for _ in range(4000):
        param.grad = torch.randn(4096, generator=generator)
        optimizer.step()
        exact.lerp_(param.grad.double().square(), 0.001)
        nearest.lerp_(param.grad.square(), 0.001)
        scales = (nearest.view(-1, BLOCK).amax(1) / table[-1]).repeat_interleave(BLOCK)
        places = torch.bucketize(nearest / scales, (table[1:] + table[:-1]) / 2)
        nearest = table[places] * scales
    state = optimizer.state[param]
    found = from_codes("exp_avg_sq", state["exp_avg_sq"], state["exp_avg_sq_scale"])
    assert found.mean().item() == pytest.approx(exact.mean().item(), rel=0.01)
    assert nearest.mean().item() != pytest.approx(exact.mean().item(), rel=0.1)


def test_a_block_with_a_nan_becomes_nan_and_no_other() -> None:
    param = nn.Parameter(numbers((4096,), 0, torch.float32))
    optimizer = FusedAdam([param], state_dtype="8bit")
    for _ in range(2):
        param.grad = numbers((4096,), 1, torch.float32)
        param.grad[300] = torch.nan
        optimizer.step()
    is_nan = param.detach().isnan()
    assert is_nan[256:384].all() and int(is_nan.sum()) == BLOCK


# --- the same bits -------------------------------------------------------------------------------


def _run(update: str, shapes: Any = ((20_001,), SHAPE, (7,)), split: bool = False) -> list[Tensor]:
    params = [parameter(shape, i, PLAIN) for i, shape in enumerate(shapes)]
    named = [(f"p{i}", param) for i, param in enumerate(params)]
    groups: Any = [{"params": [each]} for each in reversed(named)] if split else named
    optimizer, _ = fused(update, groups, PLAIN)
    for step in range(3):
        for i, param in enumerate(params):
            param.grad = numbers(param.shape, 100 * step + i, torch.float32)
        optimizer.step()
    states = (v for p in params for _, v in sorted(optimizer.state[p].items()))
    return [*(param.detach() for param in params), *states]


def _assert_same(these: list[Tensor], those: list[Tensor]) -> None:
    assert len(these) == len(those)
    assert all(same_bits(a, b) for a, b in zip(these, those, strict=True))


@pytest.mark.cpu_engine
@pytest.mark.parametrize("update", ["amsgrad", "momentum"])
def test_bits_depend_on_no_thread(update: str) -> None:
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        runs.append(_run(update, ((300_000,), (8193,))))
    _assert_same(*runs)


@pytest.mark.parametrize("update", ["amsgrad", "lion"])
def test_bits_of_named_parameters_depend_on_no_split_into_groups(update: str) -> None:
    _assert_same(_run(update), _run(update, split=True))


@pytest.mark.cpu_engine
@pytest.mark.parametrize("update", WITH_STATES)
def test_bits_depend_on_no_instruction_set(update: str) -> None:
    runs = []
    for name in build_info()["instruction_sets"]:
        use_instruction_set(name)
        runs.append(_run(update))
    for run in runs[1:]:
        _assert_same(runs[0], run)


# --- scaling, clipping, clearing -----------------------------------------------------------------


@pytest.mark.parametrize("clears", [False, True])
def test_a_grad_scaler_changes_nothing(clears: bool) -> None:
    ours, theirs = (parameter(SHAPE, 0, PLAIN) for _ in range(2))
    scaled = FusedAdam([("w", ours)], state_dtype="8bit", clear_grads=clears)
    plain = FusedAdam([("w", theirs)], state_dtype="8bit")
    scaler = grad_scaler("cpu")
    for step in range(4):
        theirs.grad = numbers(SHAPE, step, torch.float32)
        ours.grad = theirs.grad * SCALE
        if step == 2:
            ours.grad[3, 7] = torch.inf
        before = snapshot(scaled, [ours])
        scaler.step(scaled)
        scaler.update(SCALE)
        if step == 2:
            if not clears:
                assert_unchanged(before, scaled, [ours])
            continue
        plain.step()
        assert not (clears and ours.grad.any())
        _assert_same([ours.detach(), *scaled.state[ours].values()],
                     [theirs.detach(), *plain.state[theirs].values()])  # fmt: skip


# --- state dicts ---------------------------------------------------------------------------------


def _trained(state_dtype: Any, steps: int = 3, kind: Any = FusedAdam) -> tuple[Any, nn.Parameter]:
    param = nn.Parameter(numbers(SHAPE, 0, torch.float32))
    optimizer = kind([("w", param)], lr=0.05, state_dtype=state_dtype)
    for step in range(steps):
        param.grad = numbers(SHAPE, step, torch.float32)
        optimizer.step()
    return optimizer, param


def _go_on(optimizer: Any, param: nn.Parameter, steps: int = 2) -> list[Tensor]:
    for step in range(10, 10 + steps):
        param.grad = numbers(SHAPE, step, torch.float32)
        optimizer.step()
    return [param.detach(), *(value for _, value in sorted(optimizer.state[param].items()))]


def _saved(state_dict: Any) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_resumed_training_has_the_same_bits(how: str) -> None:
    optimizer, param = _trained("8bit")
    if how == "state_dict":
        resumed, copied = _trained("8bit", steps=0)
        resumed.load_state_dict(_saved(optimizer.state_dict()))
        copied.data.copy_(param.data)
    else:
        both = (optimizer, param)
        resumed, copied = (
            copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
        )
    _assert_same(_go_on(optimizer, param), _go_on(resumed, copied))


@pytest.mark.parametrize("other", [None, *STORED])
def test_load_state_dict_converts_in_both_directions(other: Any) -> None:
    source, _ = _trained(other)
    target, param = _trained("8bit", steps=0)
    target.load_state_dict(_saved(source.state_dict()))
    (before,) = source.state.values()
    state = target.state[param]
    for name in ("exp_avg", "exp_avg_sq"):
        found, wanted = from_codes(name, state[name], state[f"{name}_scale"]), before[name].float()
        # Half a place of 3 or 4 bits, down to the least number that a block can have.
        least = wanted.abs().max() * 2.0**-15
        torch.testing.assert_close(found, wanted, rtol=2.0**-4, atol=least.item())
    _go_on(target, param)

    back, param = _trained(other, steps=0)
    back.load_state_dict(_saved(target.state_dict()))
    state = back.state[param]
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
    (coded,) = target.state.values()
    for name in ("exp_avg", "exp_avg_sq"):
        wanted = from_codes(name, coded[name], coded[f"{name}_scale"])
        assert same_bits(state[name], wanted.to(other or torch.float32))
    _go_on(back, param)


@pytest.mark.parametrize("algorithm", ["adam", "adagrad", "sgd", "rmsprop"])
def test_checkpoints_of_torch_load_and_go_back(algorithm: str) -> None:
    options = {"momentum": 0.9} if algorithm == "sgd" else {}
    param = nn.Parameter(numbers(SHAPE, 0, torch.float32))
    theirs = for_loop(algorithm, [param], **options)
    param.grad = numbers(SHAPE, 1, torch.float32)
    theirs.step()
    ours, _ = fused(algorithm if algorithm != "sgd" else "momentum", [param], PLAIN)
    ours.load_state_dict(theirs.state_dict())
    assert torch.uint8 in {value.dtype for value in ours.state[param].values()}
    ours.step()
    again = TORCH[algorithm]([param], **options)
    again.load_state_dict(float32_state(ours))
    assert torch.uint8 not in {value.dtype for value in again.state[param].values()}
    assert again.state[param].keys() == theirs.state[param].keys()
    for name, value in again.state[param].items():
        if name != "step":
            state = ours.state[param]
            assert same_bits(value, from_codes(name, state[name], state[f"{name}_scale"]))
    again.step()


def test_an_optimizer_is_fused_in_mid_training() -> None:
    param = nn.Parameter(numbers(SHAPE, 0, torch.float32))
    optimizer = torch.optim.Adam([param])
    param.grad = numbers(SHAPE, 1, torch.float32)
    optimizer.step()
    fuse(optimizer, state_dtype="8bit")
    assert optimizer.state[param]["exp_avg"].dtype == torch.uint8
    optimizer.step()
    assert optimizer.state[param]["step"] == 2


def test_combined_optimizers_convert_by_name() -> None:
    def made(state_dtype: Any) -> tuple[Any, nn.Module]:
        torch.manual_seed(0)
        model = nn.Linear(100, 50)
        section: dict[str, Any] = {"lr": 0.05}
        if state_dtype is not None:
            section["state_dtype"] = state_dtype
        return recap_fast.build_optimizer(model, {"adam": section})[0], model

    def step(optimizer: Any, model: nn.Module, seed: int) -> None:
        for param in model.parameters():
            param.grad = numbers(param.shape, seed, torch.float32)
        optimizer.step()

    for before, after in itertools.permutations(("8bit", None, "bfloat16"), 2):
        optimizer, model = made(before)
        step(optimizer, model, 1)
        other, copied = made(after)
        copied.load_state_dict(model.state_dict())
        step(other, copied, 2)
        other.load_state_dict(_saved(optimizer.state_dict()))
        dtypes = {v.dtype for s in other.state_dict()["state"].values() for v in s.values()}
        assert (torch.uint8 in dtypes) == (after == "8bit")
        step(other, copied, 3)
    same, copied = made("bfloat16")
    copied.load_state_dict(model.state_dict())
    step(same, copied, 1)
    step(same, copied, 2)


# --- what is refused -----------------------------------------------------------------------------


def test_other_names_and_float64_are_refused() -> None:
    param = nn.Parameter(numbers(SHAPE, 0, torch.float64))
    with pytest.raises(ValueError, match="float64 alone"):
        FusedAdam([param], state_dtype="8bit")
    for wrong in ("8", "int8"):
        with pytest.raises(TypeError, match="state_dtype"):
            FusedSGD([nn.Parameter(torch.ones(3))], momentum=0.9, state_dtype=wrong)


@pytest.mark.parametrize(("before", "after"), [("8bit", torch.bfloat16), (None, "8bit")])
def test_a_group_that_is_edited_is_refused_by_name(before: Any, after: Any) -> None:
    """Nothing says with which scales the codes of another format begin."""
    optimizer, param = _trained(before)
    optimizer.param_groups[0]["state_dtype"] = after
    unchanged = snapshot(optimizer, [param])
    with pytest.raises(RuntimeError, match=r"'exp_avg' of parameter w .* load the state"):
        optimizer.step()
    assert_unchanged(unchanged, optimizer, [param])


def test_scales_that_do_not_fit_are_refused_by_name() -> None:
    optimizer, param = _trained("8bit")
    optimizer.state[param]["exp_avg_scale"] = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"'exp_avg_scale' of parameter w .*128 elements"):
        optimizer.step()
    del optimizer.state[param]["exp_avg_scale"]
    with pytest.raises(KeyError, match="parameter w has no 'exp_avg_scale'"):
        optimizer.step()


def test_scales_that_are_exchanged_are_used() -> None:
    optimizer, param = _trained("8bit")
    twin, other = copy.deepcopy((optimizer, param))
    for each, at in ((optimizer, param), (twin, other)):
        each.state[at]["exp_avg_scale"].mul_(2)
    optimizer.state[param]["exp_avg_scale"] = optimizer.state[param]["exp_avg_scale"].clone()
    _assert_same(_go_on(optimizer, param), _go_on(twin, other))
