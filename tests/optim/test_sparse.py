"""Sparse gradients of embedding tables: what the step makes of them, and what it leaves alone.

Each step is held to a step of torch's own class in float64, from the values ours started from and
the gradient summed in float64, as in ``test_rows.py``.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recap_fast import build_info, fuse, unfuse
from recap_fast._native import use_instruction_set
from recap_fast.optim import (
    FusedAdagrad,
    FusedAdam,
    FusedAdamW,
    FusedOptimizer,
    FusedRowwiseAdagrad,
    FusedSGD,
    FusedSparseAdam,
)
from tests.optim.test_rows import assert_rounded_once, rowwise_in_float64
from tests.support.optimizers import DTYPES, numbers

pytestmark = pytest.mark.cpu_engine  # a CUDA engine refuses them

Make = Callable[..., torch.optim.Optimizer]
CLASSES: dict[str, tuple[type[FusedOptimizer], type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (FusedSGD, torch.optim.SGD, {}),
    "sgd maximize": (FusedSGD, torch.optim.SGD, {"maximize": True}),
    "adagrad": (FusedAdagrad, torch.optim.Adagrad, {"lr_decay": 0.3, "eps": 1e-3}),
    "sparse adam": (FusedSparseAdam, torch.optim.SparseAdam, {"eps": 1e-3}),
    "adam": (FusedAdam, torch.optim.SparseAdam, {"eps": 1e-3, "betas": (0.3, 0.8)}),
}


def sparse(param: Tensor, lookups: int, seed: int) -> Tensor:
    """A gradient of that many lookups, half of them of the same few rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(param), (lookups,), generator=generator)
    rows[::2] %= max(1, len(param) // 8)
    values = numbers((lookups, *param.shape[1:]), seed, param.dtype)
    return torch.sparse_coo_tensor(rows[None], values, param.shape)


def summed(grad: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over the lookups of each row in float64, and of their magnitudes."""
    rows, values = grad._indices()[0], grad._values().double()
    zero = torch.zeros(grad.shape, dtype=torch.float64)
    return zero.index_add(0, rows, values), zero.index_add(0, rows, values.abs())


def touched(grad: Tensor) -> Tensor:
    return torch.zeros(len(grad), dtype=torch.bool).index_fill(0, grad._indices()[0], True)


SHAPES = [(50, 3), (700, 16), (300, 64), (40, 4, 5), (9, 67), (5, 1031), (60,)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CLASSES)
def test_a_step_is_that_of_torch_in_float64(name: str, dtype: torch.dtype) -> None:
    ours, theirs, options = CLASSES[name]
    params = [nn.Parameter(numbers(shape, i, dtype)) for i, shape in enumerate(SHAPES)]
    optimizer = ours(params, lr=0.1, **options)
    for step in range(3):
        before = copy.deepcopy([(p.detach(), optimizer.state.get(p, {})) for p in params])
        for i, param in enumerate(params):
            param.grad = sparse(param, len(param) // 2, 10 * step + i)
        optimizer.step()
        for param, (start, state) in zip(params, before, strict=True):
            exact = nn.Parameter(start.double())
            reference = theirs([exact], lr=0.1, **options)
            total, magnitude = summed(param.grad)
            is_touched = touched(param.grad)
            rows = is_touched.nonzero()[:, 0]
            exact.grad = torch.sparse_coo_tensor(rows[None], total[rows], total.shape)
            for key, value in state.items():
                reference.state[exact][key] = (
                    int(value) if key == "step" and name.endswith("adam") else value.double()
                )
            if name.endswith("adam") and not state:
                zeros = torch.zeros_like(exact)
                reference.state[exact].update(step=0, exp_avg=zeros, exp_avg_sq=zeros.clone())
            reference.step()
            # A sum of n rows rounds n - 1 times, each relative to what was summed.
            scale = start.double().abs() + exact.detach().abs() + 8 * magnitude + 1
            assert_rounded_once(param.detach(), exact.detach(), scale)
            assert torch.equal(param.detach()[~is_touched], start[~is_touched])
            found = optimizer.state.get(param, {})
            assert set(found) == set(reference.state[exact]) - {"momentum_buffer"}
            for key, value in found.items():
                if key == "step":
                    assert value.item() == step + 1
                    continue
                wanted = reference.state[exact][key]
                assert_rounded_once(value, wanted, wanted.abs() + 2 * magnitude * (magnitude + 1))
                if key in state:
                    assert torch.equal(value[~is_touched], state[key][~is_touched])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decoupled", [False, True])
def test_rowwise_adagrad_of_summed_rows(decoupled: bool, dtype: torch.dtype) -> None:
    options = {"weight_decay": 0.1, "decoupled_weight_decay": decoupled}
    params = [nn.Parameter(numbers(shape, i, dtype)) for i, shape in enumerate(SHAPES)]
    optimizer = FusedRowwiseAdagrad(params, lr=0.1, eps=1e-3, **options)
    for step in range(2):
        before = [param.detach().clone() for param in params]
        sums = [optimizer.state[p]["sum"].clone() if step else torch.zeros(len(p)) for p in params]
        for i, param in enumerate(params):
            param.grad = sparse(param, len(param), 10 * step + i)
        optimizer.step()
        for param, start, start_sums in zip(params, before, sums, strict=True):
            total, magnitude = summed(param.grad)
            expected, new_sums = rowwise_in_float64(
                start, start_sums, total, 0.1, eps=1e-3, **options
            )
            largest = magnitude.amax().item()
            scale = start.double().abs() + expected.abs() + 8 * magnitude + 4
            assert_rounded_once(param.detach(), expected, scale)
            assert_rounded_once(
                optimizer.state[param]["sum"], new_sums, new_sums + 2 * largest * (largest + 1)
            )


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lazy_adam_is_adam_on_touched_rows(dtype: torch.dtype, amsgrad: bool) -> None:
    start = numbers((100, 16), 1, dtype)
    lazy_param, eager_param = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 0.1, "weight_decay": 0.1, "amsgrad": amsgrad}
    lazy, eager = (
        FusedAdamW([lazy_param], lazy=True, **options),
        FusedAdamW([eager_param], **options),
    )
    rows = torch.tensor([[7, 3, 99]])
    grad = torch.sparse_coo_tensor(rows, numbers((3, 16), 2, dtype), start.shape)
    lazy_param.grad, eager_param.grad = grad, grad.to_dense()
    lazy.step()
    eager.step()
    is_touched = touched(grad)
    assert torch.equal(lazy_param[is_touched], eager_param[is_touched])
    assert torch.equal(lazy_param[~is_touched], start[~is_touched])


def _trained(kind: type[FusedOptimizer], dtype: torch.dtype, reverse: bool = False) -> list[Tensor]:
    shapes = [(3000, 64), (40, 3), (4000, 16), (300, 8)]
    params = [nn.Parameter(numbers(shape, i, dtype)) for i, shape in enumerate(shapes)]
    groups = [{"params": [param]} for param in params]
    optimizer = kind(groups[::-1] if reverse else groups, lr=0.1, clip_grad_norm=100.0)
    for step in range(2):
        for i, param in enumerate(params):
            param.grad = sparse(param, 2000, 10 * step + i)
        optimizer.step()
    states = [optimizer.state.get(param, {}).values() for param in params]
    norm = torch.tensor(optimizer.grad_norm)
    return [*(p.detach() for p in params), *itertools.chain(*states), norm]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [FusedAdam, FusedRowwiseAdagrad, FusedSGD])
def test_bits_depend_on_nothing_else(kind: type[FusedOptimizer], dtype: torch.dtype) -> None:
    expected = _trained(kind, dtype)
    for set_ in build_info()["instruction_sets"]:
        use_instruction_set(set_)
        for threads, reverse in ((1, True), (2, False)):
            torch.set_num_threads(threads)
            found = _trained(kind, dtype, reverse)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _forms() -> dict[str, Tensor]:
    """One gradient in several forms, of rows 1, 4 and 1 again."""
    values = numbers((3, 4), 3, torch.float32)
    rows, shape = torch.tensor([[4, 1, 1]]), (6, 4)
    plain = torch.sparse_coo_tensor(rows, values, shape)
    wide = torch.stack([values, values], dim=1)[:, 0]
    spread = torch.tensor([[4, 0], [1, 0], [1, 0]])
    merged = torch.sparse_coo_tensor(
        torch.tensor([[4, 1]]), torch.stack([values[0], values[1] + values[2]]), shape
    )
    return {
        "plain": plain,
        "coalesced": plain.coalesce(),
        "values with gaps": torch.sparse_coo_tensor(rows, wide, shape),
        "values by columns": torch.sparse_coo_tensor(rows, values.t().contiguous().t(), shape),
        "indices with gaps": torch.sparse_coo_tensor(spread.t()[:1], values, shape),
        "said to be coalesced, not sorted": merged._coalesced_(True),
    }


@pytest.mark.parametrize("form", _forms())
def test_any_form_of_gradient_is_read_and_left_as_it_was(form: str) -> None:
    param = nn.Parameter(numbers((6, 4), 1, torch.float32))
    expected = param.detach().clone()
    grad = param.grad = _forms()[form]
    indices, values = grad._indices().clone(), grad._values().clone()
    is_coalesced = grad.is_coalesced()
    dense = _forms()["plain"].to_dense()
    FusedSGD([param], lr=0.5).step()
    torch.testing.assert_close(param.detach(), expected - 0.5 * dense, rtol=1e-6, atol=0)
    assert param.grad is grad and grad.is_coalesced() == is_coalesced
    assert torch.equal(grad._indices(), indices) and torch.equal(grad._values(), values)


@pytest.mark.parametrize("kind", [FusedSGD, FusedAdagrad, FusedSparseAdam, FusedRowwiseAdagrad])
@pytest.mark.parametrize("dims", [1, 2])
def test_an_empty_gradient_counts_a_step_and_changes_nothing(
    kind: type[FusedOptimizer], dims: int
) -> None:
    param = nn.Parameter(torch.ones(5, 3))
    optimizer = kind([param])
    param.grad = torch.zeros(5, 3).to_sparse(dims)
    version = param._version
    optimizer.step()
    assert torch.equal(param, torch.ones(5, 3)) and param._version > version
    assert kind is FusedSGD or optimizer.state[param]["step"].item() == 1


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_layers_and_towers_train_as_in_torch(mode: str) -> None:
    torch.manual_seed(0)
    ours = nn.ModuleList(
        [
            nn.EmbeddingBag(100, 8, sparse=True, mode=mode),
            nn.Embedding(50, 8, sparse=True, padding_idx=0),
            nn.Linear(8, 1),
        ]
    )
    theirs = copy.deepcopy(ours)
    optimizer = FusedAdagrad(ours.parameters(), lr=0.1)
    reference = torch.optim.Adagrad(theirs.parameters(), lr=0.1)
    for _ in range(5):
        bags, ids = torch.randint(100, (16, 2)), torch.randint(50, (16,))
        for model, each in ((ours, optimizer), (theirs, reference)):
            each.zero_grad()
            pooled, looked_up, tower = model
            tower(pooled(bags) + looked_up(ids)).square().sum().backward()
            each.step()
    for param, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        # Five steps; eps is tiny, so that a first step is the sign of a gradient.
        torch.testing.assert_close(param, other, rtol=1e-4, atol=1e-5)


def test_gradients_may_be_sparse_at_one_step_and_dense_at_the_next() -> None:
    param, other = (nn.Parameter(numbers((20, 8), 1, torch.float32)) for _ in range(2))
    optimizer, reference = FusedAdagrad([param], lr=0.1), torch.optim.Adagrad([other], lr=0.1)
    for step in range(4):
        grad = sparse(param, 12, step).coalesce()
        param.grad = grad if step % 2 else grad.to_dense()
        other.grad = param.grad.clone()
        optimizer.step()
        reference.step()
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)


# --- norms and scales ----------------------------------------------------------------------------


def test_the_norm_is_that_of_the_coalesced_gradient() -> None:
    param, dense = nn.Parameter(torch.ones(50, 8)), nn.Parameter(torch.ones(7))
    optimizer = FusedSGD([param, dense], lr=1.0, clip_grad_norm=0.5)
    param.grad, dense.grad = sparse(param, 60, 1), numbers((7,), 2, torch.float32)
    total = summed(param.grad)[0]
    norm = (total.square().sum() + dense.grad.double().square().sum()).sqrt()
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx(norm.item(), rel=1e-6)
    expected = 1 - total * 0.5 / (norm + 1e-6)
    torch.testing.assert_close(param.detach().double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_step", [False, True])
def test_a_scaler_unscales_and_skips(by_step: bool, dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.ones(50, 8, dtype=dtype))
    optimizer = FusedSGD([param], lr=0.5, step_supports_amp_scaling=by_step)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    unscaled = sparse(param, 20, 1)
    param.grad = unscaled * 1024.0
    grad = param.grad
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(param.grad.to_dense(), unscaled.to_dense())
    assert param.grad is grad
    plain = nn.Parameter(torch.ones(50, 8, dtype=dtype))
    plain.grad = unscaled
    FusedSGD([plain], lr=0.5).step()
    assert torch.equal(param, plain)
    param.grad = unscaled * float("inf")
    scaler.step(optimizer)
    assert torch.equal(param, plain)


# --- what is refused -----------------------------------------------------------------------------


def _assert_refused(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], message: str
) -> None:
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    for param, data in zip(params, before, strict=True):
        assert torch.equal(param, data)
        assert not optimizer.state[param] or optimizer.state[param]["step"].item() == 0


REFUSED: dict[str, tuple[type[FusedOptimizer], dict[str, Any], str]] = {
    "momentum": (FusedSGD, {"momentum": 0.9}, "with momentum=0.9: set it to 0"),
    "sgd decay": (FusedSGD, {"weight_decay": 0.1}, "with weight_decay=0.1: set it to 0"),
    "adagrad decay": (FusedAdagrad, {"weight_decay": 0.1}, "with weight_decay=0.1: set it to 0"),
    "adam decay": (FusedAdam, {"weight_decay": 0.1}, "without weight_decay: .* or lazy=True"),
    "amsgrad": (FusedAdam, {"amsgrad": True}, "without amsgrad: .* or lazy=True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_would_move_other_rows_are_refused(name: str) -> None:
    kind, options, message = REFUSED[name]
    tower, table = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5, 3))
    optimizer = kind([("tower", tower), ("table", table)], **options)
    tower.grad, table.grad = torch.ones(3), sparse(table, 4, 1)
    _assert_refused(optimizer, [tower, table], "parameter table has a Sparse gradient.*" + message)


def _out_of_range(param: nn.Parameter) -> Tensor:
    rows = torch.tensor([[0, 5]])
    return torch.sparse_coo_tensor(rows, torch.ones(2, 3), (5, 3), check_invariants=False)


GRADIENTS: dict[str, tuple[Callable[[nn.Parameter], Tensor], str]] = {
    "elements": (lambda param: torch.ones(5, 3).to_sparse(), "2 sparse dimensions"),
    "rows": (_out_of_range, "of rows that the parameter does not have: it has 5"),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_that_are_refused(name: str) -> None:
    make, message = GRADIENTS[name]
    tower, table = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5, 3))
    optimizer = FusedAdagrad([("tower", tower), ("table", table)])
    tower.grad, table.grad = torch.ones(3), make(table)
    _assert_refused(optimizer, [tower, table], "parameter table has a .*" + message)


def test_rows_that_are_not_contiguous_are_refused() -> None:
    table = nn.Parameter(torch.ones(3, 5).t())
    table.grad = sparse(table, 4, 1)
    _assert_refused(FusedSGD([("table", table)]), [table], "table .* make the parameter contiguous")


def test_sparse_adam_takes_no_dense_gradient() -> None:
    table = nn.Parameter(torch.ones(5, 3))
    table.grad = torch.ones(5, 3)
    message = "parameter table has a dense gradient, and SparseAdam takes sparse ones only"
    _assert_refused(FusedSparseAdam([("table", table)]), [table], message)


# --- fuse ----------------------------------------------------------------------------------------


def test_fuse_takes_sparse_adam_in_mid_training_and_gives_it_back() -> None:
    ours, theirs = (nn.Parameter(numbers((40, 8), 1, torch.float32)) for _ in range(2))
    optimizer, reference = (torch.optim.SparseAdam([p], lr=0.1) for p in (ours, theirs))
    for step in range(6):
        ours.grad = theirs.grad = sparse(ours, 30, step)
        optimizer.step()
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        if step == 1:
            assert type(fuse(optimizer)) is FusedSparseAdam
        if step == 2:
            assert isinstance(optimizer.state[ours]["step"], Tensor)
            restored = FusedSparseAdam([ours], lr=0.1)
            restored.load_state_dict(copy.deepcopy(reference.state_dict()))
            optimizer.state = restored.state
            reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if step == 3:
            unfuse(optimizer)
            assert type(optimizer) is torch.optim.SparseAdam
            assert optimizer.state[ours]["step"] == 4 and type(optimizer.state[ours]["step"]) is int


def test_fuse_leaves_momentum_to_torch(caplog: pytest.LogCaptureFixture) -> None:
    params = [nn.Parameter(torch.ones(5, 3)) for _ in range(4)]
    make: Make = torch.optim.SGD
    optimizers = [make(params[i : i + 2], lr=0.1, momentum=0.9) for i in (0, 2)]
    fuse(optimizers[0])
    with caplog.at_level("INFO", logger="recap_fast"):
        for step in range(3):
            for i in range(4):
                params[i].grad = sparse(params[i], 4, 2 * step + i % 2)
            for optimizer in optimizers:
                optimizer.step()
    assert "sparse gradients with momentum" in caplog.text
    assert torch.equal(params[0], params[2]) and torch.equal(params[1], params[3])


class Table(nn.Parameter):
    """A class of a library's own, with memory like any other."""


def test_fuse_takes_parameters_of_other_classes(caplog: pytest.LogCaptureFixture) -> None:
    table = Table(torch.ones(5, 3))
    table.grad = sparse(table, 4, 1)
    with caplog.at_level("INFO", logger="recap_fast"):
        fuse(torch.optim.SGD([table], lr=0.5)).step()
    assert [record.getMessage() for record in caplog.records] == [
        "fuse: 1 of 1 param groups are native"
    ]
    expected = 1 - 0.5 * summed(table.grad)[0]
    torch.testing.assert_close(table.detach().double(), expected, rtol=1e-6, atol=0)


def one_row(param: Tensor, row: int = 1) -> Tensor:
    values = torch.ones(1, *param.shape[1:], dtype=param.dtype)
    return torch.sparse_coo_tensor(torch.tensor([[row]]), values, param.shape)


def test_memory_that_no_engine_steps_in_place_is_stepped_all_the_same() -> None:
    shifted = torch.frombuffer(memoryview(bytearray(88))[2:82], dtype=torch.float32).view(5, 4)
    for start in (shifted, torch._neg_view(torch.ones(5, 4))):
        param, expected = nn.Parameter(start), nn.Parameter(start.clone().resolve_neg())
        optimizers = FusedSGD([param], lr=0.1), torch.optim.SGD([expected], lr=0.1)
        for grad in (torch.ones(5, 4), one_row(expected), one_row(expected, 3)):
            param.grad, expected.grad = grad, grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        torch.testing.assert_close(param.detach().resolve_neg(), expected.detach())


def test_tables_without_columns() -> None:
    params = [nn.Parameter(torch.ones(shape)) for shape in ((5, 0), (9, 3), (5, 0))]
    for clip_grad_norm in (None, 10.0):
        for param in params:
            param.grad = one_row(param)
        FusedSGD(params, lr=0.1, clip_grad_norm=clip_grad_norm).step()
    assert params[1][1].tolist() == pytest.approx([0.8] * 3)


def test_freed_values_are_refused() -> None:
    param = nn.Parameter(torch.ones(5, 4))
    param.grad = one_row(param)
    param.grad._values().untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="whose memory was freed"):
        FusedSGD([param], lr=0.1).step()
    assert (param == 1).all()


def test_a_gradient_that_is_not_native_comes_after_native_steps() -> None:
    seen = []
    for make in (fuse, lambda optimizer: optimizer):
        param = nn.Parameter(torch.zeros(5, 2))
        optimizer = make(torch.optim.SGD([param], lr=0.1, momentum=0.9))
        for grad in (torch.ones(5, 2), one_row(param), torch.ones(5, 2)):
            param.grad = grad
            optimizer.step()
        seen.append(param.detach())
    torch.testing.assert_close(*seen)


def test_sparse_adam_with_a_group_left_to_torch() -> None:
    seen = []
    for make in (fuse, lambda optimizer: optimizer):
        params = [nn.Parameter(torch.ones(5, 4)), nn.Parameter(torch.ones(4, 5).t())]
        groups = [{"params": [param]} for param in params]
        optimizer = make(torch.optim.SparseAdam(groups, lr=0.1))
        for row in (1, 2, 1):
            for param in params:
                param.grad = one_row(param, row)
            optimizer.step()
        seen.append([param.detach() for param in params])
        assert [int(optimizer.state[param]["step"]) for param in params] == [3, 3]
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs)
