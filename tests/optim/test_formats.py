"""Formats of parameters and states: each step stores what a slow reference says, on the CPU.

`tests.support.formats` has the reference: torch's update in float32, and the same random bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recap_fast import build_info
from recap_fast._native import use_instruction_set
from recap_fast.optim import (
    FusedAdam,
    FusedAdamW,
    FusedLion,
    FusedOptimizer,
    FusedRowwiseAdagrad,
    FusedSGD,
    FusedSparseAdam,
)
from tests.support.formats import (
    PARAM_OPTIONS,
    RESTS,
    SHORT,
    STORED,
    UPDATES,
    Formats,
    Stored,
    assert_stored,
    expected_step,
    fused,
    master_of,
    parameter,
    stored,
)
from tests.support.optimizers import (
    FUSED,
    LAYOUTS,
    SCALE,
    assert_unchanged,
    grad_scaler,
    laid_out,
    numbers,
    same_bits,
    snapshot,
)

needs_grad_dtype = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has gradients of one dtype only"
)

# One of each kind: what is rounded, and how.
KINDS = {
    "short states": Formats(torch.float32, torch.float32, torch.bfloat16),
    "half states": Formats(torch.float32, torch.float32, torch.float16),
    "remainder": Formats(torch.bfloat16, torch.bfloat16, None, "master"),
    "master": Formats(torch.float16, torch.float16, torch.bfloat16, "master"),
    "all by chance": Formats(torch.bfloat16, torch.bfloat16, None, "stochastic"),
    "half by chance": Formats(torch.float16, torch.float16, None, "stochastic"),
    "long states": Formats(torch.bfloat16, torch.bfloat16, torch.float32, "stochastic"),
}
kinds = pytest.mark.parametrize("formats", KINDS.values(), ids=KINDS)


def _before(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> Stored:
    if param in optimizer.state:
        return stored(optimizer, param)
    return Stored(param.detach().clone(), {})


def _check_steps(
    update: str, formats: Formats, steps: int = 3, shape: tuple[int, ...] = (37, 13), **more: Any
) -> None:
    param = parameter(shape, 0, formats)
    optimizer, options = fused(update, [("w", param)], formats, **more)
    for step in range(1, steps + 1):
        before = _before(optimizer, param)
        param.grad = numbers(shape, step, formats.grad)
        optimizer.step()
        expected = expected_step(
            UPDATES[update][0], options, before, param.grad, formats, name="w", step=step
        )
        assert_stored(stored(optimizer, param), expected, formats)


# --- what is stored ------------------------------------------------------------------------------


@needs_grad_dtype
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("update", UPDATES)
def test_every_combination_stores_what_the_reference_does(update: str, dtype: torch.dtype) -> None:
    for grad, state, options in itertools.product(STORED, (None, *STORED), PARAM_OPTIONS):
        _check_steps(update, Formats(dtype, grad, state, options))


@kinds
@pytest.mark.parametrize(
    "options", [{"maximize": True}, {"weight_decay": 0.01, "maximize": True}], ids=str
)
@pytest.mark.parametrize("update", ["adam", "adagrad", "momentum", "rmsprop"])
def test_options_mean_the_same(update: str, options: dict[str, Any], formats: Formats) -> None:
    _check_steps(update, formats, **options)


@kinds
def test_decoupled_decay_means_the_same(formats: Formats) -> None:
    _check_steps("adam", formats, weight_decay=0.1, decoupled_weight_decay=True)


@kinds
@pytest.mark.parametrize("size", [1, 15, 16, 17, 511, 8193, 300_001])
def test_tensors_short_and_long(size: int, formats: Formats) -> None:
    _check_steps("adam", formats, steps=2, shape=(size,))


@kinds
@pytest.mark.parametrize("shape", [(), (0, 3)])
def test_no_dimensions_and_no_elements(shape: tuple[int, ...], formats: Formats) -> None:
    param = parameter(shape, 0, formats)
    optimizer, _ = fused("adam", [param], formats)
    param.grad = numbers(shape, 1, formats.grad)
    optimizer.step()
    assert all(value.shape in (shape, ()) for value in optimizer.state[param].values())


@kinds
def test_a_seed_and_a_name_say_which_chances(formats: Formats) -> None:
    for seed, name in ((0, "w"), (-1, "w"), (2**63 - 1, "layers.0.wäight")):
        param = parameter((300,), 0, formats)
        param.grad = numbers((300,), 1, formats.grad)
        optimizer, options = fused("adam", [(name, param)], formats, rounding_seed=seed)
        before = Stored(param.detach().clone(), {})
        optimizer.step()
        options.pop("rounding_seed")
        expected = expected_step(
            "adam", options, before, param.grad, formats, name=name, step=1, seed=seed
        )
        assert_stored(stored(optimizer, param), expected, formats)


@kinds
@pytest.mark.parametrize("update", UPDATES)
def test_state_has_the_dtypes_that_are_asked_for(update: str, formats: Formats) -> None:
    param = parameter((5, 3), 0, formats)
    optimizer, _ = fused(update, [param], formats)
    param.grad = numbers((5, 3), 1, formats.grad)
    optimizer.step()
    state = dict(optimizer.state[param])
    is_counted = update not in ("sgd", "momentum", "lion") or (
        formats.draws_for_param or (formats.draws_for_states and update != "sgd")
    )
    assert ("step" in state) == is_counted
    if is_counted:
        assert state.pop("step") == 1
    rest = RESTS[formats.param] if formats.has_master else None
    if rest is not None:
        dtype = torch.int16 if formats.param == torch.bfloat16 else torch.float32
        assert state.pop(rest).dtype == dtype
    assert {value.dtype for value in state.values()} <= {formats.stored_state}
    assert (not state) == (update == "sgd")


@needs_grad_dtype
def test_gradients_may_change_their_dtype() -> None:
    formats = Formats(torch.bfloat16, torch.bfloat16, None, "master")
    param = nn.Parameter(numbers((300,), 0, formats.param))
    param.grad_dtype = None
    optimizer, options = fused("adam", [("w", param)], formats)
    for step, dtype in enumerate((*STORED, *STORED), 1):
        before = _before(optimizer, param)
        param.grad = numbers((300,), step, dtype)
        optimizer.step()
        expected = expected_step("adam", options, before, param.grad, formats, name="w", step=step)
        assert_stored(stored(optimizer, param), expected, formats)


@needs_grad_dtype
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(("dtype", "grad"), [*itertools.permutations(STORED, 2)])
def test_gradients_of_another_dtype_need_no_option(
    update: str, dtype: torch.dtype, grad: torch.dtype
) -> None:
    """They are what they would be in float32, and all else stays as in torch."""
    _check_steps(update, Formats(dtype, grad))


def test_groups_have_formats_of_their_own() -> None:
    params = [nn.Parameter(numbers((40,), i, torch.bfloat16)) for i in range(4)]
    optimizer = FusedAdam(
        [
            {"params": params[0]},
            {"params": params[1], "state_dtype": torch.float32},
            {"params": params[2], "state_dtype": None, "stochastic_rounding": True},
            {"params": params[3], "master_weights": True},
        ],
        state_dtype=torch.float16,
    )
    for param in params:
        param.grad = numbers((40,), 9, torch.bfloat16)
    optimizer.step()
    dtypes = [optimizer.state[param]["exp_avg"].dtype for param in params]
    assert dtypes == [torch.float16, torch.float32, torch.bfloat16, torch.float16]
    assert ["param_remainder" in optimizer.state[param] for param in params] == [False] * 3 + [True]


def test_float64_beside_others_stays_as_it_is() -> None:
    double, short = (nn.Parameter(numbers((40,), 0, t)) for t in (torch.float64, torch.bfloat16))
    alone = nn.Parameter(double.detach().clone())
    optimizers = [
        FusedAdam([double, short], master_weights=True),
        FusedAdam([alone]),
    ]
    for param in (double, short, alone):
        param.grad = numbers((40,), 1, param.dtype)
    for optimizer in optimizers:
        optimizer.step()
    assert same_bits(double, alone)
    assert optimizers[0].state[double].keys() == optimizers[1].state[alone].keys()
    assert optimizers[0].state[short]["param_remainder"].any()


# --- edits between steps -------------------------------------------------------------------------


def test_states_follow_a_group_whose_formats_are_edited() -> None:
    param = nn.Parameter(numbers((300,), 0, torch.float32))
    optimizer = FusedAdam([("w", param)], lr=0.05)
    formats = Formats(torch.float32, torch.float32)
    for step, dtype in enumerate((None, torch.bfloat16, torch.float16, torch.bfloat16), 1):
        optimizer.param_groups[0]["state_dtype"] = dtype
        formats = formats._replace(state=dtype)
        before = _before(optimizer, param)
        for name, value in before.state.items():
            if name != "step":
                before.state[name] = value.to(formats.stored_state)  # to nearest
        param.grad = numbers((300,), step, torch.float32)
        optimizer.step()
        expected = expected_step(
            "adam", {"lr": 0.05}, before, param.grad, formats, name="w", step=step
        )
        assert_stored(stored(optimizer, param), expected, formats)


@pytest.mark.parametrize("dtype", SHORT)
def test_a_parameter_that_is_set_goes_on_from_there(dtype: torch.dtype) -> None:
    """Its master is then what it was set to, up to half a place."""
    formats = Formats(dtype, dtype, torch.float32, "master")
    param = parameter((64,), 0, formats)
    optimizer, _ = fused("adam", [("w", param)], formats)
    for step in range(1, 5):
        param.grad = numbers((64,), step, dtype)
        optimizer.step()
    for value in (0.0, 3.0):
        with torch.no_grad():
            param.fill_(value)
        param.grad = torch.zeros_like(param)
        before = param.detach().float()
        optimizer.zero_grad()
        optimizer.step()  # without a gradient nothing moves
        assert same_bits(param.detach().float(), before)
        param.grad = torch.zeros_like(param)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        assert same_bits(param.detach().float(), before)
        master = master_of(param, optimizer.state[param])
        places = torch.finfo(dtype).eps * max(value, 1e-30)
        torch.testing.assert_close(master, before, rtol=0, atol=places / 2)


# --- the same bits -------------------------------------------------------------------------------


def _run(
    update: str,
    formats: Formats,
    shapes: Sequence[tuple[int, ...]] = ((20_001,), (37, 13), (7,)),
    split: bool = False,
    steps: int = 3,
) -> list[Tensor]:
    """All that there is after some steps of named parameters, in one group or several."""
    params = [parameter(shape, i, formats) for i, shape in enumerate(shapes)]
    named = [(f"p{i}", param) for i, param in enumerate(params)]
    groups: Any = [{"params": [each]} for each in reversed(named)] if split else named
    optimizer, _ = fused(update, groups, formats)
    for step in range(steps):
        for i, param in enumerate(params):
            param.grad = numbers(param.shape, 100 * step + i, formats.grad)
        optimizer.step()
    return [
        *(param.detach() for param in params),
        *(value for param in params for _, value in sorted(optimizer.state[param].items())),
    ]


def _assert_same(these: Sequence[Tensor], those: Sequence[Tensor]) -> None:
    assert len(these) == len(those)
    assert all(same_bits(a, b) for a, b in zip(these, those, strict=True))


@pytest.mark.cpu_engine
@kinds
@pytest.mark.parametrize("update", ["amsgrad", "momentum"])
def test_bits_depend_on_no_thread(update: str, formats: Formats) -> None:
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        # Long enough to be shared out, and for the trial of ways to go through a large tensor.
        runs.append(_run(update, formats, [(300_000,), (8193,)]))
    _assert_same(*runs)


@kinds
@pytest.mark.parametrize("update", ["amsgrad", "lion"])
def test_bits_of_named_parameters_depend_on_no_split_into_groups(
    update: str, formats: Formats
) -> None:
    _assert_same(_run(update, formats), _run(update, formats, split=True))


@pytest.mark.cpu_engine
@kinds
@pytest.mark.parametrize("update", UPDATES)
def test_bits_depend_on_no_instruction_set(update: str, formats: Formats) -> None:
    runs = []
    for name in build_info()["instruction_sets"]:
        use_instruction_set(name)
        runs.append(_run(update, formats))
    for run in runs[1:]:
        _assert_same(runs[0], run)


@pytest.mark.cpu_engine
def test_infinities_and_nan_stay_what_they_are() -> None:
    """On every instruction set; beside numbers that are rounded away from zero to infinity."""
    finfo = torch.finfo(torch.float32)
    values = [0.0, finfo.tiny, 1e-7, 1.0, 65_519.0, 65_535.0, finfo.max, float("inf"), float("nan")]
    special = torch.tensor([*values, *(-value for value in values)])
    for formats, update in itertools.product(KINDS.values(), ("sgd", "momentum", "adam")):
        runs = []
        for name in build_info()["instruction_sets"]:
            use_instruction_set(name)
            count = len(special)
            param = nn.Parameter(special.repeat(count).to(formats.param))
            optimizer, _ = fused(update, [("w", param)], formats)
            for _ in range(2):
                param.grad = special.repeat_interleave(count).to(formats.grad)
                before = param.detach().clone()
                optimizer.step()
                assert param[before.isnan() | param.grad.isnan()].isnan().all()
                is_still = ~before.isnan() & (param.grad == 0)
                if update == "sgd":
                    assert torch.equal(param[is_still], before[is_still])
            runs.append([param.detach(), *optimizer.state[param].values()])
        for run in runs[1:]:
            for a, b in zip(runs[0], run, strict=True):
                assert torch.equal(a.isnan(), b.isnan())
                assert same_bits(a.nan_to_num(), b.nan_to_num())


@kinds
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_a_parameter_says_the_order_of_its_chances(
    layout: str, formats: Formats
) -> None:
    """Elements are counted in the order in which they lie in memory."""
    shape = (3, 4, 5, 6)
    values, grads = (numbers(shape, seed, formats.param) for seed in (0, 1))
    param = nn.Parameter(laid_out(values, layout))
    param.grad = laid_out(grads, layout) if layout == "transposed" else grads.clone()
    order = sorted(range(4), key=lambda dim: -param.stride(dim))
    alike = nn.Parameter(values.permute(order).contiguous())
    alike.grad = grads.permute(order).contiguous()
    found = []
    for each in (param, alike):
        optimizer, _ = fused("adam", [("w", each)], formats)
        optimizer.step()
        optimizer.step()
        found.append(stored(optimizer, each))
    assert same_bits(found[0].param.permute(order), found[1].param)
    for name, value in found[1].state.items():
        ours = found[0].state[name]
        assert same_bits(ours.permute(order) if ours.dim() else ours, value), name


# --- scaling, clipping, clearing -----------------------------------------------------------------


def _pair(formats: Formats, **more: Any) -> tuple[list[Any], list[list[nn.Parameter]]]:
    """Two optimizers over equal parameters, of which the first has more options."""
    optimizers, all_params = [], []
    for options in (more, {}):
        params = [parameter((50,), i, formats) for i in range(3)]
        named = [(f"p{i}", param) for i, param in enumerate(params)]
        optimizers.append(fused("adam", named, formats, **options)[0])
        all_params.append(params)
    return optimizers, all_params


@kinds
@pytest.mark.parametrize("by_the_step", [False, True])
def test_a_grad_scaler_changes_nothing(by_the_step: bool, formats: Formats) -> None:
    if formats.grad == torch.float16 and not by_the_step:
        pytest.skip("a GradScaler unscales no float16 gradients")
    (ours, theirs), (mine, others) = _pair(formats, step_supports_amp_scaling=by_the_step)
    scaler = grad_scaler("cpu")
    for step in range(4):
        is_skipped = step == 2
        for i, (param, other) in enumerate(zip(mine, others, strict=True)):
            other.grad = numbers((50,), 10 * step + i, formats.grad)
            param.grad = other.grad * SCALE
        if is_skipped:
            mine[1].grad[7] = float("inf")
        before = snapshot(ours, mine)
        scaler.step(ours)
        scaler.update(SCALE)
        if is_skipped:
            assert_unchanged(before, ours, mine)
            continue
        theirs.step()
        for param, other in zip(mine, others, strict=True):
            assert same_bits(param.detach(), other.detach())
            _assert_same([*ours.state[param].values()], [*theirs.state[other].values()])


@kinds
def test_clipping_is_by_the_norm_of_all(formats: Formats) -> None:
    (optimizer, _), (params, _) = _pair(formats, clip_grad_norm=0.5)
    for step in range(1, 4):
        grads = [numbers((50,), 10 * step + i, formats.grad) for i in range(3)]
        norm = torch.cat([grad.double() for grad in grads]).norm()
        before = [_before(optimizer, param) for param in params]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        assert optimizer.grad_norm == pytest.approx(norm.item(), rel=1e-6)
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            clipped = (grad.double() * (0.5 / norm)).float()
            expected = expected_step(
                "adam", {"lr": 0.05}, before[i], clipped, formats, name=f"p{i}", step=step
            )
            assert_stored(stored(optimizer, param), expected, formats)


@kinds
def test_gradients_are_cleared_where_they_are_read(formats: Formats) -> None:
    (ours, theirs), (mine, others) = _pair(formats, clear_grads=True)
    for step in range(3):
        for i, (param, other) in enumerate(zip(mine, others, strict=True)):
            param.grad = numbers((50,), 10 * step + i, formats.grad)
            other.grad = param.grad.clone()
        ours.step()
        theirs.step()
        for param, other in zip(mine, others, strict=True):
            assert not param.grad.any() and other.grad.all()
            assert same_bits(param.detach(), other.detach())
            _assert_same([*ours.state[param].values()], [*theirs.state[other].values()])


# --- what is refused -----------------------------------------------------------------------------


REFUSED: dict[str, tuple[dict[str, Any], torch.dtype, type[Exception], str]] = {
    "a name": ({"state_dtype": "bfloat16"}, torch.float32, TypeError, "state_dtype='bfloat16'"),
    "an integer": ({"state_dtype": torch.int8}, torch.float32, ValueError, "torch.int8"),
    "of float64": ({"state_dtype": torch.bfloat16}, torch.float64, ValueError, "float64 alone"),
    "float64": ({"state_dtype": torch.float64}, torch.float32, ValueError, "=torch.float64"),
    "both": (
        {"master_weights": True, "stochastic_rounding": True},
        torch.bfloat16,
        ValueError,
        "master_weights=True and stochastic_rounding=True",
    ),
    "a fraction": ({"rounding_seed": 0.5}, torch.float32, TypeError, "rounding_seed=0.5"),
    "a large seed": ({"rounding_seed": 2**63}, torch.float32, TypeError, "rounding_seed"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "dtype", "error", "match"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("algorithm", FUSED)
def test_what_cannot_be_is_refused_by_name(
    algorithm: str, options: dict[str, Any], dtype: torch.dtype, error: Any, match: str
) -> None:
    param = nn.Parameter(numbers((3,), 0, dtype))
    with pytest.raises(error, match=match):
        FUSED[algorithm]([param], **options)
    optimizer = FUSED[algorithm]([nn.Parameter(numbers((3,), 0, torch.float32))])
    with pytest.raises(error, match=match):
        optimizer.add_param_group({"params": [param], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.cpu_engine
@pytest.mark.parametrize("kind", [FusedAdam, FusedAdamW])
@pytest.mark.parametrize("option", [{"state_dtype": torch.bfloat16}, {"master_weights": True}])
def test_lazy_updates_take_no_formats(kind: type[FusedOptimizer], option: Any) -> None:
    with pytest.raises(ValueError, match=r"lazy=True.*state_dtype"):
        kind([nn.Parameter(numbers((3, 2), 0, torch.bfloat16))], lazy=True, **option)


@pytest.mark.cpu_engine
@pytest.mark.parametrize("kind", [FusedSparseAdam, FusedRowwiseAdagrad])
@pytest.mark.parametrize("option", [{"state_dtype": torch.float32}, {"stochastic_rounding": True}])
def test_updates_of_rows_take_no_formats(kind: type[FusedOptimizer], option: Any) -> None:
    param = nn.Parameter(numbers((3, 2), 0, torch.bfloat16))
    optimizer = kind([{"params": [("table", param)], **option}])
    param.grad = torch.ones_like(param)
    before = snapshot(optimizer, [param])
    with pytest.raises(RuntimeError, match=r"parameter table .*by rows"):
        optimizer.step()
    assert_unchanged(before, optimizer, [param])


@pytest.mark.cpu_engine
@pytest.mark.parametrize(
    ("kind", "formats"),
    [
        (FusedAdam, {"state_dtype": torch.bfloat16}),
        (FusedSGD, {"stochastic_rounding": True}),
        (FusedSGD, {"master_weights": True}),
    ],
)
def test_sparse_gradients_take_no_formats(kind: type[FusedOptimizer], formats: Any) -> None:
    dense, table = (nn.Parameter(numbers((4, 2), i, torch.bfloat16)) for i in range(2))
    optimizer = kind([("dense", dense), ("table", table)], **formats)
    dense.grad = torch.ones_like(dense)
    table.grad = torch.ones_like(table).to_sparse(1)
    before = snapshot(optimizer, [dense, table])
    with pytest.raises(RuntimeError, match=r"parameter table .*sparse"):
        optimizer.step()
    assert_unchanged(before, optimizer, [dense, table])


def test_a_master_that_is_missing_is_named() -> None:
    param = nn.Parameter(numbers((4,), 0, torch.bfloat16))
    optimizer = FusedLion([("w", param)])
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.param_groups[0]["master_weights"] = True
    with pytest.raises(KeyError, match="parameter w has no 'param_remainder'"):
        optimizer.step()
