"""Steps whose values are computed on the device: capturable optimizers, device schedules, graphs.

Without a GPU these run in the build whose emulated CUDA engine steps CPU tensors; a graph that is
captured and replayed takes a real one.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from recap_fast.optim import FusedAdam, FusedSGD
from recap_fast.optim.stepper import Stepper
from tests.support.optimizers import (
    EMULATED,
    FUSED,
    TORCH,
    UPDATES,
    assert_unchanged,
    combine,
    numbers,
    parameter,
    parameters,
    same_bits,
    scheduled,
    schedules,
    set_grads,
    shim,
    snapshot,
    wrapped,
)


@pytest.fixture
def device() -> torch.device:
    if EMULATED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    return torch.device("cuda")


@contextlib.contextmanager
def _capturing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A region in which the current stream is captured."""
    if EMULATED:
        with monkeypatch.context() as patch:
            patch.setenv("RECAP_EMULATED_CAPTURE", "1")
            yield
    else:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            yield


def _twins(update: str, device: torch.device, **options: Any) -> tuple[Any, list[Any], list[Any]]:
    algorithm, own = UPDATES[update]
    params = [parameters(3, device=device) for _ in range(2)]
    optimizers = [
        FUSED[algorithm](group, **own, **options, capturable=capturable)
        for group, capturable in zip(params, (False, True), strict=True)
    ]
    return optimizers, *params


def _assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    for index, (one, other) in enumerate(zip(a, b, strict=True)):
        assert same_bits(one.data, other.data), f"parameter {index}"


# --- capturable ----------------------------------------------------------------------------------


@pytest.mark.parametrize("update", UPDATES)
def test_values_of_the_device_have_the_bits_of_the_host(update: str, device: torch.device) -> None:
    optimizers, *params = _twins(update, device)
    for step in range(6):
        for group, optimizer in zip(params, optimizers, strict=True):
            set_grads(group, step)
            if step == 2:
                group[1].grad = None  # its count stands still
            optimizer.step()
        _assert_same_bits(*params)
    host, values = optimizers
    for mine, other in zip(*params, strict=True):
        assert host.state[mine].keys() == values.state[other].keys()
        for key, state in values.state[other].items():
            assert torch.equal(state.cpu(), host.state[mine][key].cpu()), key


@pytest.mark.parametrize(
    ("dtype", "formats"),
    [
        (torch.float32, {"state_dtype": torch.bfloat16}),
        (torch.float32, {"state_dtype": "8bit"}),
        (torch.bfloat16, {"master_weights": True}),
        (torch.bfloat16, {"stochastic_rounding": True}),
    ],
)
@pytest.mark.parametrize("update", ["adam", "sgd"])
def test_chances_are_those_of_the_host(
    update: str, dtype: torch.dtype, formats: dict[str, Any], device: torch.device
) -> None:
    """They follow from step counts, of which SGD has none but for them."""
    options = {"momentum": 0.9} if update == "sgd" else {}
    runs = []
    for capturable in (False, True):
        params = [nn.Parameter(numbers(s, 0, dtype).to(device)) for s in ((50, 100), (7,))]
        named = [(f"p{i}", param) for i, param in enumerate(params)]
        optimizer = FUSED[update](named, lr=0.01, **options, **formats, capturable=capturable)
        for step in range(5):
            for i, param in enumerate(params):
                param.grad = numbers(param.shape, 10 * step + i, dtype).to(device)
            if step == 2:
                params[0].grad = None  # its count stands still
            optimizer.step()
        states = (v for p in params for _, v in sorted(optimizer.state[p].items()))
        runs.append([*params, *(state.cpu() for state in states)])
    _assert_same_bits(*runs)


def test_step_counts_are_on_the_device(device: torch.device) -> None:
    params = parameters(2, device=device)
    optimizer = FusedAdam(params, capturable=True)
    for _ in range(3):
        optimizer.step()
    for param in params:
        count = optimizer.state[param]["step"]
        assert (count.shape, count.dtype, count.device.type) == ((), torch.float32, device.type)
        assert count.item() == 3


def test_a_count_is_that_of_the_parameter(device: torch.device) -> None:
    """Also after the plan was built anew, and for a parameter without elements."""
    params = [*parameters(2, device=device), nn.Parameter(torch.empty(0, 3, device=device))]
    params[2].grad = torch.empty(0, 3, device=device)
    optimizer = FusedAdam(params, capturable=True)
    optimizer.step()
    params[0].grad = None
    optimizer.step()
    late = parameter((2, 2), 5, device=device)
    late.grad = numbers((2, 2), 6, torch.float32, device)
    optimizer.add_param_group({"params": [late]})
    optimizer.step()
    counts = [optimizer.state[param]["step"].item() for param in (*params, late)]
    assert counts == [1, 3, 3, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("algorithm", ["adam", "adagrad", "sgd"])
def test_a_tensor_rate_is_read_where_it_is(
    algorithm: str, dtype: torch.dtype, device: torch.device
) -> None:
    params = [parameters(2, device=device) for _ in range(2)]
    rate = torch.tensor(0.0, dtype=dtype, device=device)
    by_tensor = FUSED[algorithm](params[0], lr=rate, capturable=True)
    by_number = FUSED[algorithm](params[1], lr=0.0, capturable=True)
    for step in range(3):
        rate.fill_(0.1 / (step + 1))
        by_number.param_groups[0]["lr"] = rate.item()
        for group, optimizer in zip(params, (by_tensor, by_number), strict=True):
            set_grads(group, step)
            optimizer.step()
    _assert_same_bits(*params)


def test_checkpoints_go_to_and_from_host_values(device: torch.device) -> None:
    for source in (False, True):
        optimizers, *params = _twins("amsgrad", device)
        if source:
            optimizers.reverse()
            params.reverse()
        set_grads(params[0], 0)
        for _ in range(2):
            optimizers[0].step()
        saved = copy.deepcopy(optimizers[0].state_dict())
        own = dict(optimizers[1].param_groups[0])
        optimizers[1].load_state_dict(saved)
        optimizers[1].param_groups[0]["capturable"] = own["capturable"]
        with torch.no_grad():
            for mine, other in zip(*params, strict=True):
                other.copy_(mine)
                other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        _assert_same_bits(*params)
        assert [state["step"].item() for state in optimizers[1].state.values()] == [3, 3, 3]


def test_a_checkpoint_of_torchs_capturable_adam_loads(device: torch.device) -> None:
    if EMULATED:
        pytest.skip("torch's own capturable Adam needs a CUDA device")
    params = [parameters(2, device=device) for _ in range(2)]
    theirs = TORCH["adam"](params[0], lr=0.1, capturable=True)
    theirs.step()
    ours = FusedAdam(params[1], lr=0.1, capturable=True)
    ours.load_state_dict(theirs.state_dict())
    ours.step()
    theirs.step()
    assert [state["step"].item() for state in ours.state.values()] == [2, 2]


def test_switching_capturable_off_brings_the_counts_back(device: torch.device) -> None:
    params = parameters(2, device=device)
    optimizer = FusedAdam(params, capturable=True)
    optimizer.step()
    optimizer.param_groups[0]["capturable"] = False
    optimizer.step()
    counts = [optimizer.state[param]["step"] for param in params]
    assert [(count.item(), count.device.type) for count in counts] == [(2, "cpu"), (2, "cpu")]


def test_dampening_waits_for_the_first_step_that_is_taken(device: torch.device) -> None:
    """Which step that is, only the device knows, when a scaler may skip it."""
    params = parameters(1, device=device)
    optimizer = FusedSGD(params, lr=1.0, momentum=0.9, dampening=0.5, capturable=True)
    for found in (1.0, 0.0):
        optimizer.found_inf = torch.full((), found, device=device)
        optimizer.step()
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], params[0].grad)
    optimizer.step()
    expected = 0.9 * params[0].grad + 0.5 * params[0].grad
    torch.testing.assert_close(optimizer.state[params[0]]["momentum_buffer"], expected)


# --- schedules on the device ---------------------------------------------------------------------

_scheduled = functools.partial(scheduled, capturable=True)


def test_rates_on_the_device_are_those_of_the_host(device: torch.device) -> None:
    optimizer, scheduler, _ = _scheduled(device, device_schedule=True)
    (rates,) = optimizer._device_rates
    for step in range(12):
        on_device = rates.rates.cpu()
        on_host = torch.tensor(scheduler.get_last_lr(), dtype=torch.float64)
        torch.testing.assert_close(on_device, on_host, rtol=1e-15, atol=0)
        assert rates.step.item() == step
        optimizer.step()
        scheduler.step()


def test_rates_on_the_device_go_by_the_number_of_their_group(device: torch.device) -> None:
    """Not by their place: of several devices, each has the rates of some groups."""
    configs = schedules()
    from recap_fast.schedules.device import DeviceRates  # needs pydantic

    params = parameters(2, device=device)
    optimizer = FusedSGD([{"params": [param]} for param in params], lr=1.0, capturable=True)
    stepper = Stepper([optimizer])
    stepper.move_with([DeviceRates({1: configs["constant"], 0: configs["piecewise"]}, device)])
    before = [param.detach().clone() for param in params]
    stepper.step(None, None)
    for param, start, rate in zip(params, before, (0.1, 0.05), strict=True):
        torch.testing.assert_close(param.detach(), start - rate * param.grad)


def test_the_trajectory_is_that_of_host_schedules(device: torch.device) -> None:
    runs = [_scheduled(device, device_schedule=on_device) for on_device in (False, True)]
    for step in range(12):
        for optimizer, scheduler, params in runs:
            set_grads(params, step)
            optimizer.step()
            scheduler.step()
    for mine, other in zip(runs[0][2], runs[1][2], strict=True):
        torch.testing.assert_close(mine, other, rtol=2**-22, atol=2**-24)


def test_a_step_without_gradients_moves_the_schedules_too(device: torch.device) -> None:
    optimizer, scheduler, params = _scheduled(device, device_schedule=True)
    for param in params:
        param.grad = None
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    (rates,) = optimizer._device_rates
    torch.testing.assert_close(rates.rates.tolist(), scheduler.get_last_lr(), rtol=1e-15, atol=0)


def test_a_resumed_run_goes_on_at_the_saved_step(device: torch.device) -> None:
    whole, half, resumed = (_scheduled(device, device_schedule=True) for _ in range(3))
    for step in range(10):
        if step == 5:
            resumed[0].init_state()
            resumed[0].load_state_dict(half[0].state_dict())
            resumed[1].load_state_dict(half[1].state_dict())
            with torch.no_grad():
                for mine, other in zip(resumed[2], half[2], strict=True):
                    mine.copy_(other)
        for optimizer, scheduler, params in (whole, half if step < 5 else resumed):
            set_grads(params, step)
            optimizer.step()
            scheduler.step()
    _assert_same_bits(whole[2], resumed[2])


def test_init_state_counts_a_step_but_moves_no_schedule(device: torch.device) -> None:
    runs = [_scheduled(device, device_schedule=on_device) for on_device in (False, True)]
    for step in range(6):
        for optimizer, scheduler, params in runs:
            if step in (0, 3):
                optimizer.init_state()
            set_grads(params, step)
            optimizer.step()
            scheduler.step()
    for mine, other in zip(runs[0][2], runs[1][2], strict=True):
        torch.testing.assert_close(mine, other, rtol=2**-22, atol=2**-24)
    optimizer, scheduler, params = runs[1]
    (rates,) = optimizer._device_rates
    torch.testing.assert_close(rates.rates.tolist(), scheduler.get_last_lr(), rtol=1e-15, atol=0)
    assert optimizer.state[params[0]]["step"].item() == 8


def test_a_group_added_under_a_device_schedule_has_the_rate_it_was_given(
    device: torch.device,
) -> None:
    optimizer, scheduler, params = _scheduled(device, device_schedule=True)
    extra = parameter((3,), 7, device=device)
    optimizer.step()
    optimizer.add_param_group({"params": [extra], "betas": (0.0, 0.0), "eps": 0.0, "lr": 0.25})
    scheduler.step()
    before = extra.detach().clone()
    for step in range(3):
        set_grads([*params, extra], step)
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close((before - extra.detach()).abs(), torch.full_like(before, 0.25))
    (rates,) = optimizer._device_rates
    scheduled_rates = scheduler.get_last_lr()[:-1]
    torch.testing.assert_close(rates.rates.tolist(), scheduled_rates, rtol=1e-15, atol=0)


def test_groups_that_move_under_a_device_schedule_are_refused(device: torch.device) -> None:
    """Schedules there go by place."""
    optimizer, *_ = _scheduled(device, device_schedule=True)
    optimizer.step()
    with pytest.raises(ValueError, match="rates on the device go by the place"):
        del optimizer.param_groups[0]
    assert len(optimizer.param_groups) == len(optimizer.optimizers)
    optimizer.optimizers[0][1]._optimizer.add_param_group(
        {"params": [parameter((2,), 1, device=device)]}
    )
    with pytest.raises(RuntimeError, match="add_param_group"):
        optimizer.step()


def test_a_rate_set_by_hand_under_a_device_schedule_is_refused(device: torch.device) -> None:
    optimizer, scheduler, _ = _scheduled(device, device_schedule=True)
    optimizer.step()
    optimizer.param_groups[1]["lr"] = 0.5
    with pytest.raises(RuntimeError, match=r"param group 1 was set to 0\.5"):
        scheduler.step()


def test_a_device_schedule_needs_capturable_groups(device: torch.device) -> None:
    optimizer = combine([wrapped({"a": parameters(1, device=device)[0]})])
    with pytest.raises(ValueError, match="param group 0 is not capturable"):
        shim(optimizer, {"a": schedules()["ramp"]}, device_schedule=True)


# --- several devices -----------------------------------------------------------------------------


def test_parameters_of_several_devices_are_stepped_once_each(
    as_if_on_cuda: Callable[..., Tensor],
) -> None:
    if not EMULATED:
        pytest.skip("takes devices that need not exist; see tests/gpu/test_gpu_streams.py")
    memory, expected = parameters(6), parameters(6)
    params = []
    for index, param in enumerate(memory):
        moved, grad = param.detach(), param.grad
        if index % 3:  # else it stays on the third device, the CPU
            moved, grad = (as_if_on_cuda(t, index % 3 - 1) for t in (moved, grad))
        params.append(nn.Parameter(moved))
        params[-1].grad = grad
    assert len({param.device for param in params}) == 3
    optimizer, twin = (FusedSGD([{"params": p}], lr=0.5) for p in (params, expected))
    for _ in range(2):
        optimizer.step()
        twin.step()
    _assert_same_bits(memory, expected)


# --- a device that fails -------------------------------------------------------------------------


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("steps", [0, 1], ids=["plan", "launch"])
def test_what_fails_on_the_device_is_an_error_of_that_step(
    steps: int, capturable: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first step the plan cannot be built."""
    if not EMULATED:
        pytest.skip("a device does not fail when asked to; see tests/gpu/test_gpu_errors.py")
    params = parameters(2, device=device)
    optimizer = FusedAdam(params, capturable=capturable)
    for _ in range(steps):
        optimizer.step()
    before = snapshot(optimizer, params)
    what = ("create an event", "launch the optimizer step")[steps]
    with monkeypatch.context() as patch:
        patch.setenv("RECAP_EMULATED_FAILURE", "1")
        with pytest.raises(RuntimeError, match=f"CUDA device 0: cannot {what}: invalid argument"):
            optimizer.step()
    assert_unchanged(before, optimizer, params)
    optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [steps + 1] * 2


# --- what the host does not read -----------------------------------------------------------------


class _NothingRead(TorchDispatchMode):
    """Refuses what would have the host wait for a number."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number is read"
        return func(*args, **(kwargs or {}))


def _steps_by_schedule(device: torch.device, **options: bool) -> Callable[[], Any]:
    optimizer, scheduler, _ = _scheduled(device, **options)
    return lambda: (optimizer.step(), scheduler.step())


def _scaled(device: torch.device) -> Callable[[], Any]:
    optimizer = FusedAdam(parameters(3, device=device))
    optimizer.grad_scale = torch.full((), 2.0, device=device)
    optimizer.found_inf = torch.zeros((), device=device)
    return optimizer.step


def _clipped(device: torch.device) -> Callable[[], Any]:
    optimizer = FusedAdam(parameters(3, device=device), capturable=True)
    stepper = Stepper([optimizer], max_norm=0.5)
    scale, found = torch.full((), 2.0, device=device), torch.zeros((), device=device)

    def step(owner: FusedAdam = optimizer) -> None:  # the stepper does not keep it
        stepper.step(scale, found)

    return step


@pytest.mark.parametrize(
    "make",
    [
        lambda device: FusedAdam(parameters(3, device=device), capturable=True).step,
        _scaled,
        _clipped,
        _steps_by_schedule,
        lambda device: _steps_by_schedule(device, tensors=True),
        lambda device: _steps_by_schedule(device, device_schedule=True),
        lambda device: _steps_by_schedule(device, tensors=True, device_schedule=True),
    ],
    ids=["capturable", "scaled", "clipped", "numbers", "tensors", "schedules", "both"],
)
def test_a_step_reads_no_number_of_the_device(
    make: Callable[[torch.device], Callable[[], Any]], device: torch.device
) -> None:
    step = make(device)
    for _ in range(2):
        step()
    with _NothingRead():
        for _ in range(3):
            step()


# --- capture -------------------------------------------------------------------------------------


def test_a_capture_without_capturable_is_refused(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters(2, device=device)
    optimizer = FusedAdam(params)
    optimizer.step()
    before = snapshot(optimizer, params)
    with _capturing(monkeypatch), pytest.raises(RuntimeError, match="capturable=True"):
        optimizer.step()
    assert_unchanged(before, optimizer, params)
    optimizer.step()


def test_a_capture_of_the_first_step_is_refused(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters(2, device=device)
    optimizer = FusedAdam(params, capturable=True)
    with _capturing(monkeypatch), pytest.raises(RuntimeError, match="before a CUDA graph"):
        optimizer.step()
    optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [1, 1]


def test_a_gradient_that_is_missing_during_capture_is_named(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters(2, device=device)
    optimizer = FusedAdam([("first", params[0]), ("second", params[1])], capturable=True)
    optimizer.step()
    params[1].grad = None
    with _capturing(monkeypatch), pytest.raises(RuntimeError, match="parameter second has no grad"):
        optimizer.step()
    optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [2, 1]


@pytest.fixture
def host(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device whose work no graph captures, where tensors of a test may have to be empty."""
    if EMULATED:
        monkeypatch.setenv("RECAP_EMULATED_HOST", "1")
        return torch.device("meta")
    return torch.device("cpu")


def test_a_rate_on_another_device_than_its_parameter_is_refused(
    device: torch.device, host: torch.device
) -> None:
    outside = nn.Parameter(torch.empty(0, device=host))
    outside.grad = torch.empty(0, device=host)
    params, rate = parameters(2, device=device), torch.tensor(0.1, device=device)
    optimizer = FusedAdam(
        [{"params": params, "capturable": True}, {"params": [outside], "lr": rate}]
    )
    before = snapshot(optimizer, params)
    message = f"the lr of param group 1 is a tensor on {rate.device}, .* is on {host}; pass a numb"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_unchanged(before, optimizer, params)


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_parameter_that_a_capture_would_leave_out_is_named(
    max_norm: float | None,
    device: torch.device,
    host: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = parameters(2, device=device)
    outside = nn.Parameter(torch.empty(0, device=host))
    outside.grad = torch.empty(0, device=host)
    groups = [{"params": params, "capturable": True}, {"params": [outside], "capturable": False}]
    optimizer = FusedAdam(groups)
    stepper = Stepper([optimizer], max_norm=max_norm)
    stepper.step(None, None)
    before = snapshot(optimizer, params)
    message = f"parameter 0 of param group 1 on {host} would change now, but not when"
    with _capturing(monkeypatch), pytest.raises(RuntimeError, match=message):
        stepper.step(None, None)
    assert_unchanged(before, optimizer, params)
    assert optimizer.state[outside]["step"].item() == 1
    outside.grad = None
    with _capturing(monkeypatch):
        stepper.step(None, None)
    assert optimizer.state[outside]["step"].item() == 1


def test_a_plan_that_must_be_replaced_during_capture_stays(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To free its memory would be a part of the graph."""
    params = parameters(3, device=device)
    grad, params[2].grad = params[2].grad, None
    optimizer = FusedAdam(params, capturable=True)
    optimizer.step()
    plan = optimizer._stepper._plan
    moved = params[0].data
    for change, undo in (
        (lambda: setattr(params[2], "grad", grad), lambda: setattr(params[2], "grad", None)),
        (
            lambda: setattr(params[0], "data", moved.clone()),
            lambda: setattr(params[0], "data", moved),
        ),
    ):
        change()
        before = snapshot(optimizer, params)
        with _capturing(monkeypatch), pytest.raises(RuntimeError, match="before a CUDA graph"):
            optimizer.step()
        assert optimizer._stepper._plan is plan
        assert_unchanged(before, optimizer, params)
        undo()
        optimizer.step()
        assert optimizer._stepper._plan is plan


def test_a_state_of_another_layout_is_not_replaced_during_capture(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy would be a part of the graph, and the state not be filled before a replay."""
    params = [parameter((3, 5), 0, device=device, layout="transposed")]
    set_grads(params, 0)
    optimizer = FusedAdam(params, capturable=True)
    optimizer.step()
    state = optimizer.state[params[0]]
    state["exp_avg"] = contiguous = state["exp_avg"].contiguous()
    before = snapshot(optimizer, params)
    with _capturing(monkeypatch), pytest.raises(RuntimeError, match="before a CUDA graph"):
        optimizer.step()
    assert state["exp_avg"] is contiguous
    assert_unchanged(before, optimizer, params)
    optimizer.step()
    assert state["exp_avg"].stride() == params[0].stride()


def test_a_rate_changed_on_the_host_after_capture_is_refused(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters(2, device=device)
    optimizer = FusedAdam(params, lr=0.1, capturable=True)
    optimizer.step()
    with _capturing(monkeypatch):
        optimizer.step()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.2
    with pytest.raises(RuntimeError, match=r"param group 0 changed from 0\.1 to 0\.2 after a CUDA"):
        optimizer.step()


def test_a_captured_rate_may_not_change_under_a_later_plan_either(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph still has it."""
    optimizer, scheduler, params = _scheduled(device, device_schedule=False)
    optimizer.step()
    with _capturing(monkeypatch):
        optimizer.step()
    params[0].data = params[0].data.clone()  # moved
    before = snapshot(optimizer, params)
    rate = optimizer.param_groups[1]["lr"]
    for _ in range(2):  # when the plan is replaced, and after that
        optimizer.param_groups[1]["lr"] = rate + 0.5
        with pytest.raises(RuntimeError, match="param group 0 of optimizer 1 changed from"):
            optimizer.step()
        assert_unchanged(before, optimizer, params)
        optimizer.param_groups[1]["lr"] = rate
        optimizer.step()
        before = snapshot(optimizer, params)
    with pytest.raises(RuntimeError, match="param group 0 of optimizer 2 changed from"):
        scheduler.step()


def test_another_tensor_as_rate_after_capture_is_refused(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = torch.tensor(0.1, device=device)
    optimizer = FusedAdam(parameters(2, device=device), lr=rate, capturable=True)
    optimizer.step()
    with _capturing(monkeypatch):
        optimizer.step()
    rate.fill_(0.2)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = rate.clone()
    with pytest.raises(RuntimeError, match="from a tensor on the device to another after"):
        optimizer.step()


@pytest.mark.parametrize("to_tensor", [True, False])
def test_a_rate_that_moves_off_or_onto_the_device_after_capture_is_refused(
    to_tensor: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.tensor(0.1, device=device)
    before, after = (0.1, tensor) if to_tensor else (tensor, 0.1)
    optimizer = FusedAdam(parameters(2, device=device), lr=before, capturable=True)
    optimizer.step()
    with _capturing(monkeypatch):
        optimizer.step()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = after
    words = ["0.1", "a tensor on the device"]
    first, second = words if to_tensor else reversed(words)
    with pytest.raises(RuntimeError, match=f"param group 0 changed from {first} to {second} after"):
        optimizer.step()


def test_a_scheduler_that_changes_a_captured_rate_says_so(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, scheduler, _ = _scheduled(device, device_schedule=False)
    optimizer.step()
    with _capturing(monkeypatch):
        optimizer.step()
    with pytest.raises(RuntimeError, match="device_schedule=True"):
        scheduler.step()


def test_a_device_schedule_goes_on_after_capture(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, scheduler, _ = _scheduled(device, device_schedule=True)
    optimizer.step()
    scheduler.step()
    with _capturing(monkeypatch):
        optimizer.step()
    scheduler.step()
    optimizer.step()
    scheduler.step()


def test_a_captured_plan_is_kept_when_another_takes_its_place(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph goes on reading its memory."""
    optimizer, _, params = _scheduled(device, device_schedule=True)
    optimizer.step()
    with _capturing(monkeypatch):
        optimizer.step()
    stepper = optimizer._stepper
    captured = [stepper._plan]
    shim(optimizer, schedules(), device_schedule=True)
    optimizer.step()
    assert stepper._captured == captured
    with _capturing(monkeypatch):
        optimizer.step()
    captured.append(stepper._plan)
    params[0].data = params[0].data.clone()  # moved
    optimizer.step()
    assert stepper._captured == captured
