"""`fuse` of optimizers that cannot step natively in all param groups: the rest steps as torch does.

What is left to torch must train exactly as torch, bit for bit; the native groups as near as ever.
"""

from __future__ import annotations

import copy
import logging
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing._internal.two_tensor import TwoTensor

from recap_fast import fuse, unfuse
from recap_fast._native import native
from recap_fast.optim import FusedOptimizer, FusedSGD
from recap_fast.optim.left_to_torch import why_not_native
from recap_fast.optim.stepper import Stepper
from tests.optim.test_errors import BAD_PARAMETERS
from tests.support.optimizers import TORCH, assert_same, parameters, same_bits, set_grads

SPARSE = {
    "sgd": ("sgd", {"lr": 0.1}),
    "momentum": ("sgd", {"lr": 0.1, "momentum": 0.9}),
    "adagrad": ("adagrad", {"lr": 0.1, "lr_decay": 0.1}),
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.EmbeddingBag(10, 4, sparse=True, mode="sum")
        self.head = nn.Linear(4, 3)

    def backward(self, seed: int, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(0, 10, (5, 2), generator=generator)
        (scale * self.head(self.table(rows)).square().mean()).backward()


class Pair:
    """Two equal models with equal torch optimizers, of which the first is for `fuse`."""

    def __init__(self, update: str, mixed_group: bool = False, **more: Any) -> None:
        algorithm, options = SPARSE[update]
        self.models = [Model() for _ in range(2)]
        self.optimizers = []
        for model in self.models:
            groups = [
                {"params": list(model.head.parameters())},
                {"params": list(model.table.parameters()), "lr": 0.2},
            ]
            if mixed_group:
                groups = [{"params": list(model.parameters())}]
            self.optimizers.append(TORCH[algorithm](groups, **options, **more))

    @property
    def ours(self) -> torch.optim.Optimizer:
        return self.optimizers[0]

    def step(self, start: int, steps: int = 1) -> None:
        for step in range(start, start + steps):
            for model, optimizer in zip(self.models, self.optimizers, strict=True):
                optimizer.zero_grad()
                model.backward(step)
                optimizer.step()

    def check(self, exactly: bool = False) -> None:
        params = [list(model.parameters()) for model in self.models]
        for ours, theirs in zip(*params, strict=True):
            if exactly:
                assert same_bits(ours, theirs)
            else:
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        states = [
            {name: optimizer.state.get(param, {}) for name, param in model.named_parameters()}
            for model, optimizer in zip(self.models, self.optimizers, strict=True)
        ]
        for name, theirs in states[1].items():
            ours = states[0][name]
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                torch.testing.assert_close(ours[key].to_dense(), value.to_dense())


# --- sparse gradients ----------------------------------------------------------------------------


@pytest.mark.parametrize("mixed_group", [False, True], ids=["groups of their own", "one group"])
@pytest.mark.parametrize("begin", [0, 2])
@pytest.mark.parametrize("update", SPARSE)
def test_sparse_gradients_train_as_in_torch(
    update: str, begin: int, mixed_group: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pair = Pair(update, mixed_group)
    pair.step(0, begin)
    with caplog.at_level(logging.INFO, "recap_fast"):
        fuse(pair.ours)
        pair.step(begin, 4)
    group = 0 if mixed_group else 1
    said = [record.getMessage() for record in caplog.records]
    reason = "sparse gradients with momentum"
    if update != "momentum":
        assert said == [f"fuse: {group + 1} of {group + 1} param groups are native"]
    elif begin == 0:  # nobody could know before the first gradient
        assert said[1:] == [f"param group {group} steps in torch's own way from now on: {reason}"]
    else:
        assert said == [
            f"fuse: {group} of {group + 1} param groups are native; group {group}: {reason}"
        ]
    exactly = mixed_group and update == "momentum"
    pair.check(exactly=exactly)
    unfuse(pair.ours)
    pair.step(begin + 4, 2)
    pair.check(exactly=exactly)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"]
)
def test_a_copy_leaves_them_to_torch_too(duplicate: Any) -> None:
    pair = Pair("momentum")
    fuse(pair.ours)
    pair.step(0, 2)
    model, optimizer = duplicate((pair.models[0], pair.ours))
    pair.models[0], pair.optimizers[0] = model, optimizer
    pair.step(2, 3)
    pair.check()


def test_a_state_dict_goes_both_ways() -> None:
    pair = Pair("momentum")
    fuse(pair.ours)
    pair.step(0, 2)
    for source, target in (pair.optimizers, pair.optimizers[::-1]):
        target.load_state_dict(copy.deepcopy(source.state_dict()))
        pair.step(2, 2)
        pair.check()


def test_hooks_run_once_a_step() -> None:
    pair = Pair("sgd")
    calls: list[str] = []
    pair.ours.register_step_pre_hook(lambda *_: calls.append("pre"))
    pair.ours.register_step_post_hook(lambda *_: calls.append("post"))
    fuse(pair.ours)
    pair.optimizers, pair.models = pair.optimizers[:1], pair.models[:1]
    handle = register_optimizer_step_pre_hook(lambda *_: calls.append("global"))
    try:
        with torch.profiler.profile() as profile:
            pair.step(0, 2)
    finally:
        handle.remove()
    assert calls == ["global", "pre", "post"] * 2
    ranges = [event.name for event in profile.events() if event.name.startswith("Optimizer.step")]
    assert ranges == ["Optimizer.step#FusedSGD.step"] * 2


def test_a_grad_scaler_works() -> None:
    pair = Pair("momentum")
    fuse(pair.ours)
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0) for _ in range(2)]
    for step in range(5):
        for model, optimizer, scaler in zip(pair.models, pair.optimizers, scalers, strict=True):
            optimizer.zero_grad()
            model.backward(step, float(scaler.scale(torch.ones(()))))
            if step == 2:
                model.head.bias.grad[0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
    pair.check()


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_a_scale_that_is_handed_to_the_step_reaches_all_groups(found_inf: float) -> None:
    """As torch's scaler does where the optimizer was made with ``fused=True``."""
    pair = Pair("sgd")
    fuse(pair.ours)
    pair.step(0)
    before = [param.detach().clone() for param in pair.models[0].parameters()]
    for model, optimizer in zip(pair.models, pair.optimizers, strict=True):
        optimizer.zero_grad()
        model.backward(1, 64.0 if optimizer is pair.ours else 1.0)
    pair.ours.grad_scale, pair.ours.found_inf = torch.tensor(64.0), torch.tensor(found_inf)
    for optimizer in pair.optimizers:
        optimizer.step()
    if found_inf:
        for param, old in zip(pair.models[0].parameters(), before, strict=True):
            assert same_bits(param, old)
    else:
        pair.check()


def test_what_torch_refuses_is_refused_as_in_torch() -> None:
    models = [Model() for _ in range(2)]
    messages = []
    for model, convert in zip(models, (fuse, lambda o: o), strict=True):
        optimizer = convert(torch.optim.AdamW(model.table.parameters()))
        model.backward(0)
        with pytest.raises(RuntimeError) as error:
            optimizer.step()
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "sparse" in messages[0]


def test_what_torch_refused_too_is_native_once_it_is_mended() -> None:
    params, others = parameters(3), parameters(3)
    optimizer = fuse(torch.optim.Adam(params, lr=0.1))
    expected = torch.optim.Adam(others, lr=0.1, foreach=False)
    for step in range(3):
        for each, own in ((optimizer, params), (expected, others)):
            set_grads(own, step)
            if step == 1:
                each.param_groups[0]["lr"] = "fast"
                with pytest.raises(TypeError):
                    each.step()
                each.param_groups[0]["lr"] = 0.2
                for state in each.state.values():  # torch counts before it looks at the rate
                    state["step"].fill_(1)
            before = [param.detach().clone() for param in own]
            each.step()
            assert not any(map(torch.equal, before, own))
    assert optimizer._left_to_torch.reason(optimizer.param_groups[0]) is None
    assert not optimizer._stepper._left


def test_an_optimizer_that_was_made_fused_goes_on_refusing_them() -> None:
    model = Model()
    optimizer = fuse(FusedSGD(model.parameters(), lr=0.1, momentum=0.9))
    model.backward(0)
    with pytest.raises(RuntimeError, match="Sparse gradient"):
        optimizer.step()


# --- other reasons -------------------------------------------------------------------------------


def _complex(number: int) -> nn.Parameter:
    values = torch.linspace(-1, 1, 4 + number)
    return nn.Parameter(torch.complex(values, values.flip(0)))


def _pair_of_tensors(number: int) -> nn.Parameter:
    values = torch.linspace(-1, 1, 4 + number)
    return nn.Parameter(TwoTensor(values, values.clone()))


def _step_both(
    odd: Any, algorithm: str, steps: int = 3, group: dict[str, Any] | None = None, **options: Any
) -> tuple[list[torch.optim.Optimizer], list[list[Any]]]:
    """Trains group 0, that is usual, and group 1, that is odd; fused in the middle, and never."""
    params = [[*parameters(2), odd(0), odd(1)] for _ in range(2)]
    optimizers = [
        TORCH[algorithm]([{"params": own[:2]}, {"params": own[2:], **(group or {})}], **options)
        for own in params
    ]
    for step in range(steps):
        if step == 1:
            fuse(optimizers[0])
        for own, optimizer in zip(params, optimizers, strict=True):
            set_grads(own[:2], step)
            for number, param in enumerate(own[2:]):
                param.grad = torch.ones_like(param) * (0.5 + step - number)
            optimizer.step()
    return optimizers, params


@pytest.mark.parametrize("algorithm", TORCH)
@pytest.mark.parametrize("kind", [_complex, _pair_of_tensors])
def test_parameters_of_other_kinds_train_as_in_torch(algorithm: str, kind: Any) -> None:
    if kind is _complex and algorithm == "lion":
        pytest.skip("a complex number has no sign")
    if kind is _pair_of_tensors and algorithm == "adagrad":
        pytest.skip("torch.optim.Adagrad cannot make its state")
    (ours, theirs), (our_params, their_params) = _step_both(kind, algorithm, lr=0.1)
    assert isinstance(ours, FusedOptimizer)
    assert_same(ours, our_params[:2], theirs, their_params[:2])
    for mine, other in zip(our_params[2:], their_params[2:], strict=True):
        assert (
            torch.equal(torch.view_as_real(mine), torch.view_as_real(other))
            if (kind is _complex)
            else torch.equal(mine.a, other.a)
        )


def _on_meta(number: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(3 + number, device="meta"))


def _frozen_whole_numbers(number: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(3 + number, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize("algorithm", TORCH)
def test_a_group_on_a_device_without_an_engine_is_torchs(algorithm: str) -> None:
    (ours, theirs), (our_params, their_params) = _step_both(_on_meta, algorithm, lr=0.1)
    assert_same(ours, our_params[:2], theirs, their_params[:2])
    assert "parameters on meta" in ours._left_to_torch.reason(ours.param_groups[1])


def test_what_is_frozen_is_no_obstacle(caplog: pytest.LogCaptureFixture) -> None:
    odd = [_frozen_whole_numbers(0), _complex(0).requires_grad_(False)]
    with caplog.at_level(logging.INFO, "recap_fast"):
        optimizer = fuse(torch.optim.Adam([*parameters(2), *odd]))
        optimizer.step()
    assert [record.getMessage() for record in caplog.records] == [
        "fuse: 1 of 1 param groups are native"
    ]


def test_a_differentiable_group_stays_torchs() -> None:
    kind = lambda number: nn.Parameter(torch.ones(3 + number))  # noqa: E731
    (ours, theirs), (our_params, their_params) = _step_both(
        kind, "adam", group={"differentiable": True, "foreach": False}, lr=0.1
    )
    assert_same(ours, our_params, theirs, their_params)
    assert ours._left_to_torch.reason(ours.param_groups[1]) == "differentiable=True"


def test_capturable_where_torch_cannot_capture_is_torchs_error() -> None:
    messages = []
    for convert in (fuse, lambda o: o):
        params = parameters(1)
        optimizer = convert(torch.optim.Adam(params, capturable=True))
        with pytest.raises(AssertionError, match="capturable") as error:
            optimizer.step()
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_parameters_that_share_memory_train_as_in_torch(caplog: pytest.LogCaptureFixture) -> None:
    results = []
    for convert in (fuse, lambda o: o):
        memory = torch.ones(10)
        params = [nn.Parameter(memory[:6]), nn.Parameter(memory[5:])]
        optimizer = convert(torch.optim.SGD(params, lr=0.1))
        set_grads(params, 0)
        with caplog.at_level(logging.INFO, "recap_fast"):
            optimizer.step()
        results.append(memory)
    assert torch.equal(*results)
    assert "share memory" in caplog.text


def test_gradients_of_another_dtype_train_as_in_torch() -> None:
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    results = []
    for convert in (fuse, lambda o: o):
        param = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        param.grad_dtype = torch.float32
        param.grad = torch.full((3,), 0.3)
        convert(torch.optim.SGD([param], lr=0.1)).step()
        results.append(param.detach())
    assert torch.equal(*results)


def test_a_parameter_that_has_left_is_not_kept_alive() -> None:
    params = parameters(3)
    params[0].grad = torch.ones_like(params[0]).to_sparse()
    optimizer = fuse(torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.1))
    optimizer.step()
    gone = weakref.ref(params.pop(0))
    del optimizer.param_groups[0]
    optimizer.step()
    assert gone() is None


def test_a_parameter_that_becomes_native_again_does_so() -> None:
    params = parameters(2)
    optimizer = fuse(torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.1))
    optimizer.param_groups[0]["differentiable"] = True
    optimizer.step()
    assert [len(groups) for groups in optimizer._stepper._built.groups] == [1]
    optimizer.param_groups[0]["differentiable"] = False
    optimizer.param_groups = list(optimizer.param_groups)  # the next step looks at all again
    optimizer.step()
    assert [len(groups) for groups in optimizer._stepper._built.groups] == [2]


@pytest.mark.parametrize("kind", BAD_PARAMETERS)
def test_what_is_foretold_is_what_the_native_step_refuses(kind: str) -> None:
    """But for frozen parameters, and those that torch refuses as well."""
    param = BAD_PARAMETERS[kind][0]()
    group = {**torch.optim.SGD(parameters(1)).param_groups[0], "params": [param]}
    with pytest.raises((RuntimeError, TypeError)):
        native.BoundPlan(
            [native.GroupSource("sgd", "group", group, {}, ["p"], False)],
            [FusedSGD(parameters(1))],
            [],
            False,
        )
    assert (why_not_native(group) is None) == (kind == "expanded")
    param.grad = None
    param.requires_grad_(False)
    assert why_not_native(group) is None


def test_a_failure_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch must not step what a device may have stepped already."""
    params = parameters(2)
    optimizer = fuse(torch.optim.SGD(params, lr=0.1))
    before = [param.detach().clone() for param in params]

    def fail(*_: Any) -> None:
        raise RuntimeError("a launch failed")

    monkeypatch.setattr(Stepper, "_step_natively", fail)
    optimizer._stepper = Stepper([optimizer])
    with pytest.raises(RuntimeError, match="a launch failed"):
        optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
