"""The section "What differs from torch": a test for each entry, under its title."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import recap_fast
from recap_fast.optim import FusedAdagrad, FusedAdam, FusedRMSprop, FusedSGD, FusedSparseAdam
from tests.recipes.page import PAGE
from tests.support.optimizers import DTYPES, FUSED, TORCH, numbers, parameter, same_bits, set_grads

Make = Callable[..., torch.optim.Optimizer]
SHOWN: list[str] = []


def shows(title: str) -> Callable[[Any], Any]:
    """Marks the test of the entry with this title."""
    SHOWN.append(title)
    return lambda test: test


def test_every_entry_has_a_test() -> None:
    section = PAGE.read_text().partition("\n## What differs from torch\n")[2]
    section = section.partition("\n## ")[0]
    assert sorted(re.findall(r"^- \*\*(.*?)\.?\*\*", section, re.MULTILINE)) == sorted(SHOWN)


def _trained(make: Make, dtype: torch.dtype, steps: int = 10) -> Tensor:
    param = parameter((200,), 0, dtype)
    optimizer = make([param], lr=0.01)
    for step in range(steps):
        set_grads([param], step)
        optimizer.step()
    return param.detach()


@shows("Rounding")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding(dtype: torch.dtype) -> None:
    def fused(params: list[Tensor], lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=lr, fused=True)

    ours, fused_by_torch = _trained(FusedAdam, dtype), _trained(fused, dtype)
    default = _trained(torch.optim.Adam, dtype)
    unit = torch.finfo(dtype).eps * default.abs()
    if dtype.itemsize == 2:
        assert not torch.equal(ours, default)
        # Both round their float32 results once per step; few of these lie near a boundary.
        assert ((ours - fused_by_torch).abs() > 0).float().mean() < 0.02
    else:
        assert ((ours - default).abs() <= 4 * unit).all()


@shows("Bits")
def test_bits() -> None:
    values = numbers((50_000,), 0, torch.float32)
    results = []
    threads = torch.get_num_threads()
    for count, parts in ((1, 1), (2, 3)):
        params = [nn.Parameter(part.clone()) for part in values.tensor_split(parts)]
        optimizer = FusedAdam([{"params": [param]} for param in params])
        torch.set_num_threads(count)
        for _ in range(3):
            for param in params:
                param.grad = param.detach().square()
            optimizer.step()
        torch.set_num_threads(threads)
        results.append(torch.cat([param.detach() for param in params]))
    assert same_bits(*results)


def _sparse() -> nn.Parameter:
    param = nn.Parameter(torch.ones(4, 2))
    param.grad = torch.ones(4, 2).to_sparse()
    return param


@shows("All or nothing")
def test_all_or_nothing() -> None:
    for make, stepped in ((torch.optim.Adam, True), (FusedAdam, False)):
        good = nn.Parameter(torch.ones(3))
        good.grad = torch.ones(3)
        optimizer = make([{"params": [good]}, {"params": [_sparse()]}])
        with pytest.raises(RuntimeError, match=r"[Ss]parse"):
            optimizer.step()
        assert (not torch.equal(good.detach(), torch.ones(3))) == stepped
        assert (good in optimizer.state) == stepped


def _complex() -> nn.Parameter:
    param = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    param.grad = torch.ones_like(param)
    return param


def _other_dtype() -> nn.Parameter:
    param = nn.Parameter(torch.ones(3))
    param.grad_dtype = torch.float64
    param.grad = torch.ones(3, dtype=torch.float64)
    return param


def _other_device() -> nn.Parameter:
    param = nn.Parameter(torch.ones(3, device="meta"))
    param.grad = torch.ones_like(param)
    return param


def _wrapper() -> nn.Parameter:
    param = nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))
    param.grad = TwoTensor(torch.ones(3), torch.ones(3))
    return param


@shows("Sparse gradients")
def test_sparse_gradients() -> None:
    values, rows = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[2, 0, 2]])
    results = []
    for make in (torch.optim.SparseAdam, FusedAdam, FusedSparseAdam):
        param = nn.Parameter(torch.ones(4, 1))
        param.grad = torch.sparse_coo_tensor(rows, values, (4, 1))
        make([param], lr=0.1).step()
        results.append(param.detach())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
    with pytest.raises(RuntimeError, match="SparseAdam"):
        torch.optim.Adam([_with_rows()]).step()
    with pytest.raises(RuntimeError, match=r"momentum=0\.9"):
        FusedSGD([_with_rows()], momentum=0.9).step()
    param, expected = _with_rows(), _with_rows()
    recap_fast.fuse(torch.optim.SGD([param], momentum=0.9)).step()
    torch.optim.SGD([expected], momentum=0.9).step()
    assert torch.equal(param, expected)


def _with_rows() -> nn.Parameter:
    param = nn.Parameter(torch.ones(4, 2))
    param.grad = torch.ones(4, 2).to_sparse(1)
    return param


@shows("Refused")
@pytest.mark.parametrize("make", [_sparse, _complex, _other_dtype, _other_device, _wrapper])
def test_refused(make: Callable[[], nn.Parameter]) -> None:
    torch.optim.SGD([make()]).step()
    with pytest.raises((RuntimeError, TypeError), match="parameter 0 of param group 0"):
        FusedSGD([make()]).step()
    param = make()
    recap_fast.fuse(torch.optim.SGD([param])).step()
    expected = make()
    torch.optim.SGD([expected]).step()
    if not param.is_meta:
        assert bool((param == expected).all())


def test_parameters_that_share_memory_are_refused() -> None:
    for make in (torch.optim.SGD, FusedSGD, lambda p: recap_fast.fuse(torch.optim.SGD(p, lr=1.0))):
        memory = torch.zeros(4)
        params = [nn.Parameter(memory[:3]), nn.Parameter(memory[1:])]
        for param in params:
            param.grad = torch.ones(3)
        optimizer = make(params)
        optimizer.param_groups[0]["lr"] = 1.0
        if make is FusedSGD:
            with pytest.raises(ValueError, match="share memory"):
                optimizer.step()
        else:
            optimizer.step()
            assert memory.tolist() == [-1, -2, -2, -1]


@pytest.mark.parametrize("algorithm", FUSED)
def test_a_differentiable_step_is_refused(algorithm: str) -> None:
    with pytest.raises(ValueError, match="differentiable"):
        FUSED[algorithm]([nn.Parameter(torch.ones(1))], differentiable=True)


@shows("`foreach` and `fused`")
def test_foreach_and_fused() -> None:
    results = []
    for options in ({}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}):

        def make(params: Any, options: dict[str, bool] = options, **rest: Any) -> FusedAdam:
            return FusedAdam(params, **rest, **options)

        results.append(_trained(make, torch.float32))
    assert all(same_bits(result, results[0]) for result in results)

    saved = torch.optim.Adam([nn.Parameter(torch.ones(1))], fused=True).state_dict()
    for make, fused in ((torch.optim.Adam, True), (FusedAdam, None)):
        optimizer = make([nn.Parameter(torch.ones(1))])
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["fused"] is fused


@shows("Names")
@pytest.mark.parametrize("algorithm", FUSED)
def test_names(algorithm: str) -> None:
    optimizer = FUSED[algorithm]([nn.Parameter(torch.ones(1))])
    assert isinstance(optimizer, TORCH[algorithm])
    assert type(optimizer).__name__ == f"Fused{TORCH[algorithm].__name__}"


@shows("Compiled steps")
def test_compiled_steps() -> None:
    torch._dynamo.reset()
    counters = {}
    for make in (torch.optim.SGD, FusedSGD):
        param = parameter((3,), 0)
        set_grads([param], 0)
        optimizer = make([param], lr=0.1)
        counter = CompileCounter()
        torch.compile(lambda step=optimizer.step: step(), backend=counter)()
        counters[make] = counter.frame_count
    torch._dynamo.reset()
    assert counters == {torch.optim.SGD: 1, FusedSGD: 0}


class _Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@shows("Dispatch")
def test_dispatch() -> None:
    for make, seen in ((torch.optim.Adam, True), (FusedAdam, False)):
        param = parameter((3,), 0)
        set_grads([param], 0)
        optimizer = make([param])
        optimizer.step()
        average = optimizer.state[param]["exp_avg"]
        versions = param._version, average._version
        with _Operations() as operations:
            optimizer.step()
        assert (operations.count > 0) == seen
        assert param._version == versions[0] + 1
        assert (average._version > versions[1]) == seen


@shows("Centered RMSprop")
def test_centered_rmsprop() -> None:
    # A variance of 0, as the difference of two averages that are rounded.
    results = []
    for kind in (FusedRMSprop, torch.optim.RMSprop):
        param = nn.Parameter(torch.zeros(1000))
        optimizer = kind([param], lr=1e-3, alpha=0.5, eps=1e-3, centered=True)
        for _ in range(100):
            param.grad = torch.linspace(0.1, 1.0, 1000)
            optimizer.step()
        results.append(param.isnan())
    assert results[1].any() and not results[0].any()


@shows("State has a fixed size")
def test_state_has_a_fixed_size() -> None:
    param = parameter((3,), 0)
    set_grads([param], 0)
    optimizer = FusedAdagrad([param])
    optimizer.step()
    with pytest.raises(RuntimeError, match="not resizable"):
        optimizer.state[param]["sum"].resize_(100)
    optimizer.state[param]["sum"] = torch.zeros(3)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["sum"], param.grad.square())


@shows("State has its parameter's strides")
@pytest.mark.parametrize(
    ("algorithm", "name", "options", "torchs"),
    [("adam", "exp_avg", {}, (3, 1)), ("sgd", "momentum_buffer", {"momentum": 0.5}, (1, 2))],
    ids=["adam", "sgd"],
)
def test_state_has_the_strides_of_its_parameter(
    algorithm: str, name: str, options: dict[str, Any], torchs: tuple[int, int]
) -> None:
    trained = []
    for make, expected in ((FUSED[algorithm], (1, 2)), (TORCH[algorithm], torchs)):
        param = nn.Parameter(numbers((2, 3), 0, torch.float32))
        param.grad = numbers((3, 2), 1, torch.float32).t()
        optimizer = make([param], lr=0.5, **options)
        optimizer.step()
        param.data = param.detach().t().contiguous().t()
        optimizer.step()
        assert optimizer.state[param][name].stride() == expected
        trained.append(param.detach())
    torch.testing.assert_close(*trained)


@shows("`_init_group`")
def test_init_group() -> None:
    for base, called in ((torch.optim.SGD, True), (FusedSGD, False)):
        calls = []

        class Derived(base):
            def _init_group(self, *args: Any, calls: list = calls) -> Any:
                calls.append(args)
                return super()._init_group(*args)

        param = parameter((3,), 0)
        set_grads([param], 0)
        Derived([param]).step()
        assert bool(calls) == called


# Combined optimizers


@pytest.fixture
def keyed() -> Any:
    return pytest.importorskip("torchrec.optim.keyed", reason="needs torchrec")


def _both(keyed: Any, **options: Any) -> list[tuple[Any, list[nn.Parameter]]]:
    """torchrec's combined optimizer of two parameters, `a` and `b`, and ours."""
    made = []
    for fuse in (lambda optimizer: optimizer, recap_fast.fuse):
        params = [parameter((3,), seed) for seed in range(2)]
        wrappers = [
            keyed.KeyedOptimizerWrapper(
                {name: param}, lambda given: torch.optim.Adam(given, lr=0.1)
            )
            for name, param in zip("ab", params, strict=True)
        ]
        made.append((fuse(keyed.CombinedOptimizer(wrappers)), params))
    return made


@shows("Closures")
def test_closures(keyed: Any) -> None:
    for (optimizer, params), (calls, result) in zip(
        _both(keyed), ((2, None), (1, 0.5)), strict=True
    ):
        set_grads(params, 0)
        evaluated = []

        def closure(evaluated: list = evaluated) -> float:
            evaluated.append(True)
            return 0.5

        assert optimizer.step(closure) == result
        assert len(evaluated) == calls


@shows("`zero_grad(set_to_none=False)`")
def test_zero_grad(keyed: Any) -> None:
    for (optimizer, params), kept in zip(_both(keyed), (False, True), strict=True):
        set_grads(params, 0)
        optimizer.zero_grad(set_to_none=False)
        assert all((param.grad is not None) == kept for param in params)


@shows("Loading")
def test_loading(keyed: Any) -> None:
    ((trained, params), _), fresh = _both(keyed), _both(keyed)
    set_grads(params, 0)
    trained.step()
    saved = trained.state_dict()
    with pytest.raises(ValueError):
        fresh[0][0].load_state_dict(saved)
    ours, our_params = fresh[1]
    ours.load_state_dict(saved)
    for param, other in zip(our_params, params, strict=True):
        assert torch.equal(ours.state[param]["exp_avg"], trained.state[other]["exp_avg"])
    wrong = {**saved, "state": {**saved["state"], "b": {**saved["state"]["b"]}}}
    wrong["state"]["a"] = {**saved["state"]["a"], "exp_avg": torch.full((3,), 9.0)}
    wrong["state"]["b"]["exp_avg"] = torch.zeros(4)
    with pytest.raises(ValueError, match="'b' has shape"):
        ours.load_state_dict(wrong)
    assert torch.equal(ours.state[our_params[0]]["exp_avg"], saved["state"]["a"]["exp_avg"])


@shows("`init_state(count_step=False)`")
def test_init_state(keyed: Any) -> None:
    (theirs, their_params), (ours, our_params) = _both(keyed)
    theirs.init_state()
    ours.init_state(count_step=False)
    assert [float(theirs.state[param]["step"]) for param in their_params] == [1, 1]
    assert [float(ours.state[param]["step"]) for param in our_params] == [0, 0]
    assert all(param.grad is None for param in our_params)
    (ours, our_params) = _both(keyed)[1]
    ours.init_state()
    assert [float(ours.state[param]["step"]) for param in our_params] == [1, 1]


@shows("Editing")
def test_editing(keyed: Any) -> None:
    (theirs, _), (ours, params) = _both(keyed)
    with pytest.raises(NotImplementedError):
        theirs.add_param_group({"params": [parameter((2,), 5)]})
    added = parameter((2,), 5)
    ours.add_param_group({"params": [added]})
    set_grads([*params, added], 0)
    ours.step()
    assert set(ours.state) == {*params, added}
    ours.state.clear()
    assert not any(part.state for part in ours.leaves)


@shows("Hooks inside")
def test_hooks_inside(keyed: Any) -> None:
    for (optimizer, params), order in zip(_both(keyed), ("pPpP", "ppPP"), strict=True):
        set_grads(params, 0)
        called: list[str] = []
        inner = [part._optimizer for _, part in optimizer.optimizers]
        for each in inner:
            each.register_step_pre_hook(lambda *_, called=called: called.append("p"))
            each.register_step_post_hook(lambda *_, called=called: called.append("P"))
        optimizer.step()
        assert "".join(called) == order
    inner[0].register_step_pre_hook(lambda _, args, kwargs: (args, kwargs))
    with pytest.raises(RuntimeError, match="pre hook"):
        optimizer.step()
