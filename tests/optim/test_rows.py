"""Updates by rows of dense gradients: row-wise Adagrad and lazy Adam.

Each step is held to one in float64 that starts from the values ours started from, as in
``test_oracle.py``; what must not change is compared bit by bit.
"""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recap_fast import build_info, fuse, unfuse
from recap_fast._native import use_instruction_set
from recap_fast.optim import FusedAdam, FusedAdamW, FusedRowwiseAdagrad
from tests.support.optimizers import DTYPES, LAYOUTS, laid_out, numbers

pytestmark = pytest.mark.cpu_engine  # a CUDA engine refuses them

# Rows of one element, of less than a vector, of the usual widths, of more than a block and a tile.
SHAPES = [(7,), (30, 1), (50, 3), (700, 16), (30, 64), (9, 67), (5, 1031), (2, 9000), (4, 3, 5)]
ROWWISE: dict[str, dict[str, Any]] = {
    "plain": {},
    "l2": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "maximize": {"weight_decay": 0.1, "maximize": True, "eps": 1e-3},
}
LAZY: dict[str, tuple[type[FusedAdam] | type[FusedAdamW], dict[str, Any]]] = {
    "adam": (FusedAdam, {}),
    "adam l2": (FusedAdam, {"weight_decay": 0.1}),
    "adamw": (FusedAdamW, {"weight_decay": 0.1}),
    "amsgrad": (FusedAdam, {"amsgrad": True, "weight_decay": 0.1}),
    "fast averages": (FusedAdam, {"betas": (0.3, 0.4)}),
}


def row_gradient(param: Tensor, seed: int, share: float = 0.5) -> tuple[Tensor, Tensor]:
    """A gradient in which a share of the rows is not zero, and which these are."""
    generator = torch.Generator().manual_seed(seed)
    touched = torch.rand(param.shape[0], generator=generator) < share
    grad = numbers(param.shape, seed, param.dtype)
    grad[~touched] = 0.0
    grad[~touched & (torch.rand(len(touched), generator=generator) < 0.5)] *= -1  # -0 too
    return grad, touched


def rowwise_in_float64(
    weight: Tensor,
    sums: Tensor,
    grad: Tensor,
    lr: float,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step; row by row for the rows with a gradient."""
    start, rows = weight.double(), (len(weight), -1)
    g = grad.double() * (-1 if maximize else 1)
    touched = (g != 0).reshape(rows).any(dim=1)
    if not decoupled_weight_decay:
        g = g + weight_decay * start
    new_sums = sums.double() + (g**2).reshape(rows).mean(dim=1)
    multiplier = lr / (new_sums.sqrt() + eps)
    kept = 1 - lr * weight_decay if decoupled_weight_decay else 1.0
    updated = kept * start - (multiplier[:, None] * g.reshape(rows)).reshape(g.shape)
    is_touched = touched.reshape(-1, *[1] * (g.dim() - 1))
    return torch.where(is_touched, updated, start), torch.where(touched, new_sums, sums.double())


def assert_rounded_once(found: Tensor, expected: Tensor, scale: Tensor) -> None:
    """`found` is `expected` up to the rounding of one step of numbers as large as `scale`."""
    compute = torch.float64 if found.dtype == torch.float64 else torch.float32
    eps = torch.finfo(compute).eps
    # In the type of the update some ten operations, of half a unit in the last place each; storing
    # the result takes half a unit of its own type.
    allowed = 8 * eps * scale + 0.51 * torch.finfo(found.dtype).eps * expected.abs()
    if found.dtype == torch.float16:
        allowed += 2.0**-25  # half a subnormal
    assert ((found.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ROWWISE.values(), ids=ROWWISE)
def test_rowwise_adagrad_is_that_of_float64(options: dict[str, Any], dtype: torch.dtype) -> None:
    params = [nn.Parameter(numbers(shape, i, dtype)) for i, shape in enumerate(SHAPES)]
    optimizer = FusedRowwiseAdagrad(params, lr=0.1, **options)
    for step in range(3):
        before = [param.detach().clone() for param in params]
        sums = [
            optimizer.state[p]["sum"].clone() if step else torch.zeros(p.shape[0]) for p in params
        ]
        touched = []
        for i, param in enumerate(params):
            param.grad, rows = row_gradient(param, 10 * step + i)
            touched.append(rows)
        optimizer.step()
        for param, start, start_sums, rows in zip(params, before, sums, touched, strict=True):
            expected, new_sums = rowwise_in_float64(start, start_sums, param.grad, 0.1, **options)
            state = optimizer.state[param]
            assert list(state) == ["step", "sum"] and state["step"].item() == step + 1
            assert state["sum"].shape == (param.shape[0],)
            assert state["sum"].dtype == (
                torch.float64 if dtype == torch.float64 else torch.float32
            )
            assert_rounded_once(state["sum"], new_sums, new_sums)
            # A step is at most lr times the root of the row's elements.
            assert_rounded_once(param.detach(), expected, start.double().abs() + expected.abs() + 4)
            assert torch.equal(param.detach()[~rows], start[~rows])
            assert not torch.equal(param.detach()[rows], start[rows]) or not rows.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAZY)
def test_lazy_adam_is_adam_where_a_gradient_is_not_zero(name: str, dtype: torch.dtype) -> None:
    kind, options = LAZY[name]
    start = [numbers(shape, i, dtype) for i, shape in enumerate(SHAPES)]
    params = [nn.Parameter(data.clone()) for data in start]
    lazy = kind(params, lr=0.1, lazy=True, **options)
    for step in range(3):
        before = copy.deepcopy([(param.detach(), lazy.state.get(param, {})) for param in params])
        touched = []
        for i, param in enumerate(params):
            param.grad, rows = row_gradient(param, 10 * step + i)
            touched.append(rows)
        lazy.step()
        # Adam itself, from the same state.
        others = [nn.Parameter(data.clone()) for data, _ in before]
        eager = kind(others, lr=0.1, **options)
        for other, param, (_, state) in zip(others, params, before, strict=True):
            other.grad = param.grad
            if step:
                eager.state[other] = copy.deepcopy(state)
        eager.step()
        for param, other, (data, state), rows in zip(params, others, before, touched, strict=True):
            assert lazy.state[param]["step"].item() == step + 1
            assert torch.equal(param.detach()[rows], other.detach()[rows])
            assert torch.equal(param.detach()[~rows], data[~rows])
            for key, value in lazy.state[param].items():
                if key == "step":
                    continue
                assert torch.equal(value[rows], eager.state[other][key][rows])
                assert torch.equal(value[~rows], state[key][~rows] if step else value[~rows] * 0)


def make(kind: str, params: list[nn.Parameter], **options: Any) -> Any:
    if kind == "rowwise":
        return FusedRowwiseAdagrad(params, lr=0.1, weight_decay=0.1, **options)
    return FusedAdamW(params, lr=0.1, lazy=True, **options)


def trained(kind: str, dtype: torch.dtype, split: bool = False) -> list[Tensor]:
    shapes = [(1200, 64), (40, 3), (4000, 16), (3, 9000)]  # work for two threads
    params = [nn.Parameter(numbers(shape, i, dtype)) for i, shape in enumerate(shapes)]
    groups = [{"params": [param]} for param in params] if split else params
    optimizer = make(kind, groups)
    for step in range(2):
        for i, param in enumerate(params):
            param.grad, _ = row_gradient(param, 10 * step + i)
        optimizer.step()
    states = [optimizer.state[param].values() for param in params]
    return [*(p.detach() for p in params), *itertools.chain(*states)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rowwise", "lazy"])
def test_bits_depend_on_nothing_else(kind: str, dtype: torch.dtype) -> None:
    expected = trained(kind, dtype)
    for set_ in build_info()["instruction_sets"]:
        use_instruction_set(set_)
        for threads, split in ((1, True), (2, False)):
            torch.set_num_threads(threads)
            found = trained(kind, dtype, split)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["rowwise", "lazy"])
def test_any_layout_of_parameter_and_gradient(kind: str, layout: str) -> None:
    values = numbers((6, 4, 5, 3), 1, torch.float32)
    plain, other = nn.Parameter(values.clone()), nn.Parameter(laid_out(values, layout))
    optimizers = [make(kind, [plain]), make(kind, [other])]
    for step in range(2):
        grad, _ = row_gradient(values, step)
        plain.grad = grad
        other.grad = laid_out(grad, layout if step else "transposed")
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(plain, other)


@pytest.mark.parametrize("kind", ["rowwise", "lazy"])
def test_what_is_not_a_number_is_not_zero(kind: str) -> None:
    param = nn.Parameter(torch.ones(3, 20))
    optimizer = make(kind, [param])
    param.grad = torch.zeros(3, 20)
    param.grad[1, 19] = torch.nan
    param.grad[2, 19] = torch.finfo(torch.float32).smallest_normal / 4
    optimizer.step()
    assert torch.equal(param[0], torch.ones(20))
    assert param[1, 19].isnan()
    assert (param[2] != 1).any()  # by the decay


@pytest.mark.parametrize("kind", ["rowwise", "lazy"])
@pytest.mark.parametrize("shape", [(), (0, 4), (4, 0), (1,)])
def test_parameters_without_rows_or_of_one(kind: str, shape: tuple[int, ...]) -> None:
    param = nn.Parameter(torch.ones(shape))
    optimizer = make(kind, [param])
    param.grad = torch.ones(shape)
    optimizer.step()
    assert optimizer.state[param]["step"].item() == 1
    assert (param != 1).all()


def test_lazy_may_be_an_option_of_a_group_and_change() -> None:
    table, tower = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    groups = [{"params": [table], "lazy": True}, {"params": [tower]}]
    optimizer = FusedAdamW(groups, weight_decay=0.5, lr=0.1)
    for param in (table, tower):
        param.grad = torch.zeros(3, 2)
    optimizer.step()
    assert torch.equal(table, torch.ones(3, 2)) and (tower < 1).all()
    optimizer.param_groups[0]["lazy"] = False
    optimizer.step()
    assert (table < 1).all()
    later = nn.Parameter(torch.ones(1))
    lazy = FusedAdam([table], lazy=True)
    lazy.add_param_group({"params": [later]})
    assert lazy.param_groups[1]["lazy"]


def test_a_checkpoint_of_torch_leaves_lazy_as_it_is() -> None:
    param = nn.Parameter(torch.ones(3, 2))
    param.grad = torch.ones(3, 2)
    theirs = torch.optim.AdamW([param])
    theirs.step()
    ours = FusedAdamW([param], lazy=True)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lazy"]
    before = param.detach().clone()
    param.grad = torch.zeros(3, 2)
    ours.step()
    assert torch.equal(param, before)
    theirs.load_state_dict(ours.state_dict())
    theirs.step()


@pytest.mark.parametrize("dtype", DTYPES)
def test_checkpoints_and_copies_of_rowwise_adagrad(dtype: torch.dtype) -> None:
    param = nn.Parameter(numbers((50, 16), 1, dtype))
    optimizer = FusedRowwiseAdagrad([param], lr=0.1)
    param.grad, _ = row_gradient(param, 1)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = nn.Parameter(param.detach().clone())
    other = FusedRowwiseAdagrad([twin])
    other.load_state_dict(torch.load(file))
    copied = copy.deepcopy((param, optimizer))
    for p, o in ((param, optimizer), (twin, other), copied):
        p.grad, _ = row_gradient(param, 2)
        o.step()
    for p, o in ((twin, other), copied):
        assert torch.equal(p, param)
        assert torch.equal(o.state[p]["sum"], optimizer.state[param]["sum"])
        assert o.state[p]["step"].item() == 2


def test_clipping_and_scaling_of_rows() -> None:
    plain, clipped = nn.Parameter(torch.ones(50, 16)), nn.Parameter(torch.ones(50, 16))
    optimizer = FusedRowwiseAdagrad([clipped], eps=0.1, clip_grad_norm=0.5)
    expected = FusedRowwiseAdagrad([plain], eps=0.1)
    grad, _ = row_gradient(plain.detach(), 1)
    plain.grad, clipped.grad = grad.clone(), grad.clone()
    norm = torch.nn.utils.clip_grad_norm_([plain], 0.5)
    optimizer.step()
    expected.step()
    assert optimizer.grad_norm == pytest.approx(norm.item())
    torch.testing.assert_close(clipped, plain, rtol=1e-6, atol=0)


ROW_STATES = {
    "shape": torch.zeros(3, 2),
    "dtype": torch.zeros(3, dtype=torch.float64),
    "gaps": torch.zeros(6)[::2],
}


@pytest.mark.parametrize("state", ROW_STATES.values(), ids=ROW_STATES)
def test_a_sum_that_is_not_one_per_row_is_refused(state: Tensor) -> None:
    param = nn.Parameter(torch.ones(3, 2))
    param.grad = torch.ones(3, 2)
    optimizer = FusedRowwiseAdagrad([("table", param)])
    optimizer.state[param] = {"step": torch.tensor(1.0), "sum": state}
    with pytest.raises(RuntimeError, match=r"'sum' of parameter table .* one number for each row"):
        optimizer.step()
    assert torch.equal(param, torch.ones(3, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0; it must be 0 or more"),
        ({"eps": -1e-3}, "eps is -0.001; it must be 0 or more"),
        ({"weight_decay": float("nan")}, "weight_decay is nan; it must be 0 or more"),
        ({"lr": torch.ones(2)}, "lr is a tensor of 2 elements"),
        ({"capturable": True}, "capturable=True"),
    ],
)
def test_arguments_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedRowwiseAdagrad([nn.Parameter(torch.ones(3, 2))], **options)


def test_what_is_lazy_is_never_left_to_torch() -> None:
    table, other = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    optimizer = fuse(torch.optim.AdamW([{"params": [table]}, {"params": [other]}]))
    optimizer.param_groups[0].update(lazy=True, differentiable=True)  # no native step does that
    table.grad, other.grad = torch.ones(3, 2), torch.ones(3, 2)
    with pytest.raises(ValueError, match="differentiable=True is not supported"):
        optimizer.step()
    assert torch.equal(table, torch.ones(3, 2)) and torch.equal(other, torch.ones(3, 2))
    with pytest.raises(ValueError, match="lazy=True, of which AdamW knows nothing"):
        unfuse(optimizer)
    optimizer.param_groups[0]["lazy"] = False
    optimizer.step()
    assert (table < 1).all()
    assert type(unfuse(optimizer)) is torch.optim.AdamW
