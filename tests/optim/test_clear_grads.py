"""With clear_grads, a step leaves zeros in the gradients that it has read; all else is the same."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from recap_fast import unfuse
from recap_fast.optim import FusedAdam, FusedOptimizer, FusedRowwiseAdagrad, FusedSGD
from tests.support.optimizers import (
    DTYPES,
    FUSED,
    LAYOUTS,
    UPDATES,
    combine,
    grad_scaler,
    laid_out,
    numbers,
    parameter,
    parameters,
    same_bits,
    set_grads,
    wrapped,
)

SHAPES = [(3,), (2, 5, 4, 3), (70, 9), (), (0, 3), (300, 300)]


def _assert_cleared(params: list[nn.Parameter]) -> None:
    for index, param in enumerate(params):
        assert param.grad is not None and not param.grad.count_nonzero(), f"parameter {index}"


def _pair(
    kind: type[FusedOptimizer], params: list[nn.Parameter], **options: Any
) -> tuple[FusedOptimizer, FusedOptimizer, list[nn.Parameter]]:
    """An optimizer that clears, one that does not, and its parameters."""
    others = [nn.Parameter(param.detach().clone()) for param in params]
    return kind(params, clear_grads=True, **options), kind(others, **options), others


def _step_alike(
    clears: FusedOptimizer, params: list[nn.Parameter], other: FusedOptimizer, others: list[Any]
) -> None:
    """A step of both makes the same of parameters and states, and the first clears."""
    clears.step()
    other.step()
    _assert_cleared(params)
    for param, same in zip(params, others, strict=True):
        assert same_bits(param, same)
        for name, value in other.state[same].items():
            assert same_bits(clears.state[param][name], value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("update", UPDATES)
def test_buffers_are_zero_after_each_step(
    update: str, dtype: torch.dtype, device: torch.device
) -> None:
    algorithm, options = UPDATES[update]
    params = [parameter(shape, i, dtype, device) for i, shape in enumerate(SHAPES)]
    clears, other, others = _pair(FUSED[algorithm], params, lr=0.1, **options)
    buffers = [torch.zeros_like(param) for param in params]
    for param, buffer in zip(params, buffers, strict=True):
        param.grad = buffer
    for step in range(3):
        set_grads(others, step)
        for param, same in zip(params, others, strict=True):
            param.grad += same.grad
        _step_alike(clears, params, other, others)
        assert all(p.grad is buffer for p, buffer in zip(params, buffers, strict=True))


@pytest.mark.parametrize("grad_layout", [*LAYOUTS, "expanded", "negated"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_buffers_of_any_layout(layout: str, grad_layout: str, device: torch.device) -> None:
    shape = (4, 3, 2, 5)
    params = [parameter(shape, i, device=device, layout=layout) for i in range(3)]
    clears, other, others = _pair(FusedAdam, params)
    for step in range(2):
        for index, (param, same) in enumerate(zip(params, others, strict=True)):
            values = numbers(shape, 100 * step + index, torch.float32, device)
            if grad_layout == "expanded":
                param.grad = values[:, :1].expand(shape)
            elif grad_layout == "negated":
                param.grad = torch.view_as_complex(torch.stack([values, -values], -1)).conj().imag
            else:
                param.grad = laid_out(values, grad_layout)
            same.grad = param.grad.clone()
        _step_alike(clears, params, other, others)


def test_gradients_that_share_memory_are_all_read_before(device: torch.device) -> None:
    params = [parameter((20, 5), i, device=device) for i in range(4)]
    clears, other, others = _pair(FusedAdam, params)
    for step in range(3):
        memory = numbers((150,), step, torch.float32, device)
        # The first two are one tensor, the third overlaps them, the last lies apart.
        grads = [memory[:100], memory[:100], memory[30:130], numbers((100,), 9, torch.float32)]
        if step == 1:  # apart, as the next step is not
            grads = [grad.clone() for grad in grads]
        for param, same, grad in zip(params, others, grads, strict=True):
            param.grad = grad.to(device).view(20, 5)
            same.grad = param.grad.clone()
        _step_alike(clears, params, other, others)


def test_buckets_next_to_each_other_are_no_shared_memory(device: torch.device) -> None:
    """As the views of DDP's buckets: what lies around them stays."""
    params = [parameter((7,), i, device=device) for i in range(3)]
    clears, _, _ = _pair(FusedSGD, params)
    memory = torch.ones(30, device=device)
    for index, param in enumerate(params):
        param.grad = memory[2 + 8 * index : 9 + 8 * index]
    clears.step()
    assert memory.nonzero().flatten().tolist() == [0, 1, 9, 17, *range(25, 30)]


def test_a_changed_gradient_has_another_version(device: torch.device) -> None:
    (param,) = parameters(1, device=device)
    optimizer = FusedSGD([param], clear_grads=True)
    scale = torch.ones((), device=device, requires_grad=True)
    product = scale * param.grad
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_what_has_no_part_in_the_step_stays(device: torch.device) -> None:
    params = parameters(3, device=device)
    params[1].grad = None
    optimizer = FusedAdam(params, clear_grads=True)
    apart = parameters(1, device=device)[0]
    optimizer.step()
    assert params[1].grad is None
    assert apart.grad is not None and apart.grad.all()


def test_a_step_that_is_refused_clears_nothing(device: torch.device) -> None:
    params = parameters(2, device=device)
    optimizer = FusedAdam(params, clear_grads=True)
    optimizer.step()
    set_grads(params, 3)
    before = [param.grad.clone() for param in params]
    optimizer.param_groups[0]["eps"] = "large"
    with pytest.raises(TypeError, match="eps"):
        optimizer.step()
    assert all(same_bits(p.grad, grad) for p, grad in zip(params, before, strict=True))


@pytest.mark.parametrize("clip_grad_norm", [None, 1.0])
def test_a_skipped_step_clears_too(clip_grad_norm: float | None, device: torch.device) -> None:
    """Else what is not finite would stay so, whatever is added to it."""
    params = parameters(3, device=device)
    optimizer = FusedAdam(params, clear_grads=True, clip_grad_norm=clip_grad_norm)
    scaler = grad_scaler(device)
    for infinite in (False, True, False):
        before = [param.detach().clone() for param in params]
        set_grads(params, int(infinite))
        if infinite:
            params[1].grad.view(-1)[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        _assert_cleared(params)
        same = [same_bits(p.detach(), old) for p, old in zip(params, before, strict=True)]
        assert same == [infinite] * 3


def test_a_norm_that_is_not_finite_clears_too(device: torch.device) -> None:
    params = parameters(3, device=device)
    optimizer = FusedAdam(params, clear_grads=True, clip_grad_norm=1.0)
    params[2].grad.fill_(float("nan"))
    before = [param.detach().clone() for param in params]
    optimizer.step()
    _assert_cleared(params)
    assert all(same_bits(p.detach(), old) for p, old in zip(params, before, strict=True))


def test_clipping_is_by_the_gradients_before(device: torch.device) -> None:
    params = parameters(4, device=device)
    clears, other, others = _pair(FusedSGD, params, lr=0.1, clip_grad_norm=0.5)
    set_grads(others, 0)
    clears.step()
    other.step()
    _assert_cleared(params)
    assert float(clears.grad_norm) == float(other.grad_norm) > 0.5
    assert all(same_bits(p, same) for p, same in zip(params, others, strict=True))


@pytest.mark.cpu_engine
@pytest.mark.parametrize(
    "make",
    [
        lambda params, **options: FusedAdam(params, lazy=True, **options),
        FusedRowwiseAdagrad,
    ],
    ids=["lazy", "rowwise_adagrad"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_were_looked_up(make: Callable[..., FusedOptimizer], dtype: torch.dtype) -> None:
    table, other = (parameter((500, 12), 0, dtype) for _ in range(2))
    clears, keeps = make([table], clear_grads=True), make([other])
    table.grad = torch.zeros_like(table)
    for step in range(3):
        rows = torch.randint(0, 500, (40,), generator=torch.Generator().manual_seed(step))
        table.grad[rows] = numbers((40, 12), step, dtype)
        other.grad = table.grad.clone()
        _step_alike(clears, [table], keeps, [other])


@pytest.mark.cpu_engine
@pytest.mark.parametrize("kind", [FusedAdam, FusedSGD, FusedRowwiseAdagrad])
def test_a_sparse_gradient_has_no_rows_afterwards(kind: type[FusedOptimizer]) -> None:
    table, other = (parameter((50, 4), 0) for _ in range(2))
    clears, keeps = kind([table], lr=0.1, clear_grads=True), kind([other], lr=0.1)
    for step in range(2):
        rows = torch.tensor([[3, 7, 3, 49]])
        values = numbers((4, 4), step, torch.float32)
        table.grad, other.grad = (
            torch.sparse_coo_tensor(rows, values.clone(), (50, 4)) for _ in range(2)
        )
        clears.step()
        keeps.step()
        assert table.grad.is_sparse and table.grad._nnz() == 0
        assert same_bits(table, other)


@pytest.mark.cpu_engine
@pytest.mark.parametrize("apart", [False, True])
def test_sparse_gradients_may_share_memory(apart: bool) -> None:
    """Autograd gives one to both embeddings of a sum; a user may make one of a dense gradient."""
    rows = torch.arange(4)
    tables = [[nn.Embedding(4, 2, sparse=True) for _ in range(2)] for _ in range(2)]
    dense = [nn.Parameter(torch.zeros(4, 2)) for _ in range(2)]
    for pair, param, clears in zip(tables, dense, (True, False), strict=True):
        params = [param, *(table.weight for table in pair)]
        for table in pair:
            nn.init.zeros_(table.weight)
        if apart:
            optimizers = [FusedSGD([each], lr=1.0, clear_grads=clears) for each in params]
        else:
            optimizers = [FusedSGD(params, lr=1.0, clear_grads=clears)]
        for _ in range(2):
            sum(table(rows) for table in pair).backward(torch.ones(4, 2))
            param.grad = pair[0].weight.grad._values().view(4, 2)
            for optimizer in optimizers if not apart else reversed(optimizers):
                optimizer.step()
            for table in pair:
                table.weight.grad = None
        assert all(each.eq(-2).all() for each in params)


def test_what_was_copied_on_write_stays(device: torch.device) -> None:
    (param,) = parameters(1, device=device, grads=False)
    optimizer = FusedSGD([param], clear_grads=True)
    for lend in (
        lambda own: (torch._lazy_clone(own), own),
        lambda own: (own, torch._lazy_clone(own)),
    ):
        param.grad, other = lend(torch.ones_like(param))
        optimizer.step()
        assert not param.grad.count_nonzero()
        assert other.eq(1).all()


def test_members_of_a_combined_optimizer_clear_by_themselves(device: torch.device) -> None:
    params = parameters(3, device=device)
    optimizer = combine(
        [
            ("a", wrapped({"0": params[0]}, "adam", lr=0.1, clear_grads=True)),
            ("b", wrapped({"1": params[1], "2": params[2]}, "sgd", lr=0.1)),
        ]
    )
    optimizer.step()
    _assert_cleared(params[:1])
    assert all(param.grad.all() for param in params[1:])


def test_build_optimizer_clears_all_dense_groups(device: torch.device) -> None:
    pytest.importorskip("torchrec")
    from recap_fast import build_optimizer

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).to(device)
    config = {"adam": {"lr": 0.1}, "groups": {"last": {"pattern": "^1", "sgd": {"lr": 0.1}}}}
    optimizer, scheduler = build_optimizer(model, config, clear_grads=True)
    for _ in range(2):
        model(torch.ones(2, 3, device=device)).sum().backward()
        optimizer.step()
        scheduler.step()
        _assert_cleared(list(model.parameters()))


def test_the_step_takes_the_scale_unless_it_is_told_not_to() -> None:
    params = parameters(1)
    assert FusedAdam(params, clear_grads=True)._step_supports_amp_scaling is True
    told = FusedAdam(params, clear_grads=True, step_supports_amp_scaling=False)
    assert told._step_supports_amp_scaling is False


def test_copies_and_pickles_clear_and_checkpoints_know_nothing_of_it() -> None:
    optimizer = FusedAdam(parameters(2), clear_grads=True)
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.clear_grads
        params: list[Any] = other.param_groups[0]["params"]
        set_grads(params, 1)
        other.step()
        _assert_cleared(params)
    plain = torch.optim.Adam(parameters(2))
    plain.load_state_dict(optimizer.state_dict())
    assert "clear_grads" not in plain.param_groups[0]
    keeps = FusedAdam(parameters(2))
    keeps.load_state_dict(optimizer.state_dict())
    assert not keeps.clear_grads


def test_torchs_class_would_not_clear() -> None:
    optimizer = FusedAdam(parameters(1), clear_grads=True)
    with pytest.raises(ValueError, match="clear_grads=True"):
        unfuse(optimizer)
    assert isinstance(optimizer, FusedAdam)
