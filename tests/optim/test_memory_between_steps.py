"""What may become of a tensor between two steps: other strides, other memory, or none at all."""

from __future__ import annotations

import collections
import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recap_fast.optim import FusedAdam, FusedSGD
from tests.support.optimizers import (
    EMULATED,
    assert_same,
    assert_unchanged,
    for_loop,
    numbers,
    snapshot,
)

WHERE = ["parameter", "exp_avg", "step", "gradient"]


def _parameter(shape: tuple[int, ...] = (3, 3)) -> nn.Parameter:
    param = nn.Parameter(numbers(shape, 1, torch.float32))
    param.grad = numbers(shape, 2, torch.float32)
    return param


def _tensor(optimizer: Any, param: nn.Parameter, where: str) -> Tensor:
    if where == "parameter":
        return param.detach()
    return param.grad if where == "gradient" else optimizer.state[param][where]


def _own_state(optimizer: Any, param: nn.Parameter) -> None:
    """In storages that can be resized and cloned lazily."""
    for key, value in optimizer.state[param].items():
        optimizer.state[param][key] = value.clone()


def _as_torch(change: Callable[[Any, nn.Parameter], None], shape: tuple[int, ...] = (3, 3)) -> None:
    """Compares three steps with torch's, after the second of which `change` was made."""
    params, optimizers = [], []
    for make in (FusedAdam, lambda params, **options: for_loop("adam", params, **options)):
        param = _parameter(shape)
        optimizer = make([param], lr=0.1)
        optimizer.step()
        _own_state(optimizer, param)
        optimizer.step()
        change(optimizer, param)
        optimizer.step()
        params.append(param)
        optimizers.append(optimizer)
    assert_same(optimizers[0], params[:1], optimizers[1], params[1:])


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_a_state_may_be_transposed_in_place(key: str) -> None:
    _as_torch(lambda optimizer, param: optimizer.state[param][key].t_())


@pytest.mark.parametrize("where", ["parameter", "exp_avg", "gradient"])
def test_a_tensor_may_be_set_to_another_place_of_its_storage(where: str) -> None:
    def change(optimizer: Any, param: nn.Parameter) -> None:
        tensor = _tensor(optimizer, param, where)
        room = torch.cat([tensor.flatten(), 2 * tensor.flatten() + 1])
        tensor.set_(room.untyped_storage(), 0, (3, 3), (3, 1))
        optimizer.step()
        tensor.set_(room.untyped_storage(), 9, (3, 3), (3, 1))

    _as_torch(change)


@pytest.mark.parametrize("key", ["exp_avg", "step"])
def test_a_state_of_another_shape_is_refused(key: str) -> None:
    param = _parameter((2, 3))
    optimizer = FusedAdam([param])
    optimizer.step()
    _own_state(optimizer, param)
    optimizer.step()
    state = optimizer.state[param][key]
    state.set_(torch.ones(6).untyped_storage(), 0, (3, 2), (2, 1))
    with pytest.raises(RuntimeError, match=f"the state '{key}' of parameter 0"):
        optimizer.step()


def test_a_parameter_with_gaps_may_get_other_gaps() -> None:
    def change(_: Any, param: nn.Parameter) -> None:
        param.data = torch.arange(40.0).as_strided((3, 2), (11, 3))

    _as_torch(lambda _, param: setattr(param, "data", torch.ones(3, 5)[:, :2]), (3, 2))
    _as_torch(change, (3, 2))


@pytest.mark.parametrize("grad", [
    torch.arange(12.0).view(4, 3).t(),
    torch.arange(24.0).view(3, 8)[:, ::2],
    torch.ones(()).expand(3, 4),
], ids=["transposed", "gaps", "expanded"])  # fmt: skip
def test_plain_sgd_takes_gradients_of_any_strides(grad: Tensor) -> None:
    results = []
    for make in (FusedSGD, lambda params, **options: for_loop("sgd", params, **options)):
        param = _parameter((3, 4))
        optimizer = make([param], lr=0.5)
        optimizer.step()
        param.grad = grad
        optimizer.step()
        param.grad = torch.zeros(3, 4)
        param.grad.set_(torch.arange(24.0).untyped_storage(), 1, (3, 4), (7, 2))
        optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("mapping", [collections.UserDict, collections.OrderedDict])
def test_a_state_may_be_any_mapping(mapping: Any) -> None:
    def change(optimizer: Any, param: nn.Parameter) -> None:
        optimizer.state[param] = mapping(optimizer.state[param])
        optimizer.step()
        optimizer.state[param]["exp_avg"] = torch.ones(3, 3)

    _as_torch(change)


@pytest.mark.parametrize("where", ["parameter", "exp_avg", "gradient"])
def test_what_was_cloned_lazily_is_not_written(where: str) -> None:
    clones = []

    def change(optimizer: Any, param: nn.Parameter) -> None:
        clone = torch._lazy_clone(_tensor(optimizer, param, where))
        clones.append((clone, torch.empty_like(clone).copy_(clone)))

    _as_torch(change)
    for clone, before in clones:
        assert torch.equal(clone, before)


@pytest.mark.parametrize("where", WHERE)
def test_freed_memory_is_refused_by_name(where: str) -> None:
    params = [_parameter(), _parameter()]
    optimizer = FusedAdam(params)
    optimizer.step()
    for param in params:
        _own_state(optimizer, param)
    optimizer.step()
    tensor = _tensor(optimizer, params[1], where)
    contents, size = tensor.clone(), tensor.untyped_storage().nbytes()
    before = snapshot(optimizer, params)
    tensor.untyped_storage().resize_(0)
    named = {"parameter": "parameter 1", "gradient": "the gradient of parameter 1"}
    with pytest.raises(RuntimeError, match=f"{named.get(where, where)}.* has no memory"):
        optimizer.step()
    tensor.untyped_storage().resize_(size)
    tensor.copy_(contents)
    assert_unchanged(before, optimizer, params)
    optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [3, 3]


def test_freed_memory_of_what_has_no_gradient_does_no_harm() -> None:
    params = [_parameter(), _parameter()]
    optimizer = FusedAdam(params)
    optimizer.step()
    params[1].grad = None
    params[1].untyped_storage().resize_(0)
    optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [2, 1]


@pytest.mark.parametrize("where", WHERE)
def test_elements_that_are_not_aligned(where: str) -> None:
    def change(optimizer: Any, param: nn.Parameter) -> None:
        tensor = _tensor(optimizer, param, where)
        room = torch.frombuffer(bytearray(41), dtype=torch.float32, offset=1, count=tensor.numel())
        room = room.view(tensor.shape).copy_(tensor)
        assert room.data_ptr() % 4 == 1
        if where == "parameter":
            param.data = room
        elif where == "gradient":
            param.grad = room
        else:
            optimizer.state[param][where] = room

    _as_torch(change)


# --- memory of several parameters ----------------------------------------------------------------


def _columns(*columns: slice) -> list[nn.Parameter]:
    room = torch.ones(3, 8)
    params = [nn.Parameter(room[:, each]) for each in columns]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


@pytest.mark.parametrize("columns", [
    (slice(0, 6), slice(4, 8)),
    (slice(0, 8), slice(2, 3)),
    (slice(0, 8, 2), slice(6, 8)),
    (slice(0, 6), slice(0, 6)),
])  # fmt: skip
def test_parameters_with_gaps_that_share_elements_are_refused(columns: Any) -> None:
    params = _columns(*columns)
    optimizer = FusedAdam(params)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=r"parameters 0 .* and 1 .* share memory"):
        optimizer.step()
    assert_unchanged(before, optimizer, params)
    params[0].grad = None  # a frozen alias does no harm
    optimizer.step()


@pytest.mark.parametrize("columns", [
    (slice(0, 4), slice(4, 8)),
    (slice(0, 8, 2), slice(1, 8, 2)),
    (slice(0, 3), slice(3, 5), slice(5, 8)),
])  # fmt: skip
def test_parameters_that_take_turns_in_the_same_memory_are_stepped(columns: Any) -> None:
    ours, theirs = _columns(*columns), _columns(*columns)
    optimizer, expected = FusedAdam(ours, lr=0.1), for_loop("adam", theirs, lr=0.1)
    for _ in range(2):
        optimizer.step()
        expected.step()
    assert_same(optimizer, ours, expected, theirs)


def test_a_parameter_with_gaps_given_twice_is_refused_by_name() -> None:
    (param,) = _columns(slice(0, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's
        optimizer = FusedAdam([param, param])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"parameters 0 .* and 1 .* share memory"):
            optimizer.step()
    assert not optimizer.state


# --- objects that are let go of ------------------------------------------------------------------


def _attribute(optimizer: Any, param: nn.Parameter) -> None:
    param.optimizer = optimizer


def _group(optimizer: Any, _: nn.Parameter) -> None:
    optimizer.param_groups[0]["owner"] = optimizer


def _state(optimizer: Any, param: nn.Parameter) -> None:
    optimizer.state[param]["owner"] = optimizer


def _hook(optimizer: Any, param: nn.Parameter) -> None:
    param.register_hook(lambda grad: (optimizer, grad)[1])


@pytest.mark.parametrize("refer", [_attribute, _group, _state, _hook])
@pytest.mark.parametrize("make", [FusedAdam, torch.optim.Adam], ids=["ours", "torch"])
def test_an_optimizer_that_refers_to_itself_is_collected(make: Any, refer: Any) -> None:
    def train() -> list[weakref.ref[Any]]:
        param = nn.Parameter(torch.ones(3))
        optimizer = make([param])
        param.sum().backward()
        optimizer.step()
        refer(optimizer, param)
        optimizer.step()
        return [weakref.ref(optimizer), weakref.ref(param)]

    references = train()
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_a_step_while_all_is_collected_does_no_harm() -> None:
    asked = []

    class Last:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

        def __del__(self) -> None:
            with contextlib.suppress(AttributeError):  # it is no longer to be found
                self.optimizer.step()
            asked.append(1)

    def train() -> None:
        param = _parameter()
        optimizer = FusedAdam([param])
        optimizer.step()
        optimizer.param_groups[0]["owner"] = Last(optimizer)
        optimizer.step()

    train()
    gc.collect()
    assert asked == [1]


# --- loading -------------------------------------------------------------------------------------


@pytest.mark.skipif(EMULATED, reason="counts are on the device")
def test_loading_takes_the_memory_that_torch_takes() -> None:
    """Large states stay where they are; once nobody else holds them, the step moves them."""
    param = nn.Parameter(torch.zeros(100_000))
    param.grad = torch.ones(100_000)
    optimizer = FusedAdam([param])
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"] = {0: {key: value.clone() for key, value in saved["state"][0].items()}}
    addresses = {key: saved["state"][0][key].data_ptr() for key in ("exp_avg", "exp_avg_sq")}
    optimizer.load_state_dict(saved)
    state = optimizer.state[param]
    assert {key: state[key].data_ptr() for key in addresses} == addresses
    optimizer.step()
    assert {key: state[key].data_ptr() for key in addresses} == addresses  # `saved` has them
    values = {key: state[key].clone() for key in addresses}
    del state, optimizer
    optimizer = FusedAdam([param])
    optimizer.load_state_dict(saved)
    del saved
    param.grad = None
    optimizer.step()
    state = optimizer.state[param]
    for key, value in values.items():
        assert state[key].data_ptr() != addresses[key]
        assert torch.equal(state[key], value)


@pytest.mark.parametrize("count", [2.0**63, 2.0**64, float("inf"), -1.0, 0.5, float("nan")])
@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.skipif(EMULATED, reason="counts are on the device")
def test_step_counts_give_torchs_result_or_an_error(count: float, loaded: bool) -> None:
    results = []
    for make in (FusedAdam, lambda params, **options: for_loop("adam", params, **options)):
        param = _parameter()
        optimizer = make([param], lr=0.1)
        optimizer.step()
        if loaded:
            saved = optimizer.state_dict()
            saved["state"][0]["step"] = torch.tensor(count)
            optimizer.load_state_dict(saved)
        else:
            optimizer.state[param]["step"].fill_(count)
        before = snapshot(optimizer, [param])
        if make is FusedAdam and not (count >= 0 and count == count // 1):
            with pytest.raises(
                ValueError, match=r"'step' of parameter 0 .* is .*; it must be a whole"
            ):
                optimizer.step()
            assert_unchanged(before, optimizer, [param])
            return
        optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("betas", [(1.0, 0.999), (0.9, 1.0), (0.9, 1), (float("nan"), 0.9)])
def test_betas_beyond_the_range_of_the_constructor_are_refused(betas: Any) -> None:
    param = _parameter()
    optimizer = FusedAdam([param])
    optimizer.step()
    optimizer.param_groups[0]["betas"] = betas
    before = snapshot(optimizer, [param])
    with pytest.raises(ValueError, match=r"param group 0: 'betas\[\d\]' is .*less than 1"):
        optimizer.step()
    assert_unchanged(before, optimizer, [param])
