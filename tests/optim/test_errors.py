"""What a step refuses: by name, and before anything has been written.

Every test gives the optimizer good parameters first and the bad one last, and compares all of them
bit for bit with what they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from recap_fast import build_info
from recap_fast.optim import FusedAdam, FusedOptimizer, FusedRowwiseAdagrad, FusedSGD
from recap_fast.optim.stepper import Stepper
from tests.support.optimizers import (
    EMULATED,
    FUSED,
    UPDATES,
    assert_unchanged,
    combine,
    parameter,
    parameters,
    set_grads,
    snapshot,
    wrapped,
)

if TYPE_CHECKING:
    from recap_fast.keyed.fused import FusedCombinedOptimizer


def _assert_refused(
    optimizer: torch.optim.Optimizer,
    params: list[Any],
    error: type[Exception],
    match: str,
) -> None:
    before = snapshot(optimizer, params)
    for _ in range(2):  # refused once, refused again
        with pytest.raises(error, match=match):
            optimizer.step()
        assert_unchanged(before, optimizer, params)


# --- parameters ----------------------------------------------------------------------------------


def _with_grad(data: Tensor, grad: Tensor) -> nn.Parameter:
    param = nn.Parameter(data, requires_grad=data.is_floating_point() or data.is_complex())
    param.grad = grad
    return param


def _integer() -> nn.Parameter:
    data = torch.ones(3, dtype=torch.int32)
    return _with_grad(data, data.clone())


def _complex() -> nn.Parameter:
    data = torch.ones(3, dtype=torch.complex64)
    return _with_grad(data, data.clone())


def _meta() -> nn.Parameter:
    data = torch.ones(3, device="meta")
    return _with_grad(data, torch.ones(3, device="meta"))


def _expanded() -> nn.Parameter:
    return _with_grad(torch.ones(1).expand(3), torch.ones(3))


def _sparse() -> nn.Parameter:
    data = torch.eye(3).to_sparse()
    return _with_grad(data, data.clone())


def _wrapper() -> nn.Parameter:
    data = TwoTensor(torch.ones(3), torch.ones(3))
    return _with_grad(data, TwoTensor(torch.ones(3), torch.ones(3)))


BAD_PARAMETERS: dict[str, tuple[Callable[[], nn.Parameter], type[Exception], str]] = {
    "integer": (_integer, TypeError, "takes float32"),
    "complex": (_complex, TypeError, "takes float32"),
    "meta": (_meta, RuntimeError, "is on meta"),
    "expanded": (_expanded, RuntimeError, "elements that share memory"),
    "sparse": (_sparse, RuntimeError, "dense"),
    "wrapper": (_wrapper, TypeError, "is a TwoTensor"),
}


@pytest.mark.parametrize("started", [True, False], ids=["started", "first step"])
@pytest.mark.parametrize("kind", BAD_PARAMETERS)
@pytest.mark.parametrize("update", ["adam", "adagrad", "momentum"])
def test_a_parameter_that_cannot_be_stepped_is_refused(
    update: str, kind: str, started: bool
) -> None:
    make, error, match = BAD_PARAMETERS[kind]
    algorithm, options = UPDATES[update]
    params = parameters(2)
    bad = make()
    if algorithm == "adagrad" and kind in ("sparse", "wrapper"):
        pytest.skip("torch.optim.Adagrad makes its state when it is constructed")
    optimizer = FUSED[algorithm](params, **options)
    if started:
        optimizer.step()
        set_grads(params, 1)
    optimizer.add_param_group({"params": [bad]})
    if algorithm == "adagrad":
        optimizer.state.pop(bad, None)
    _assert_refused(optimizer, params, error, f"parameter 0 of param group 1.*{match}")
    assert not optimizer.state.get(bad)


@pytest.mark.parametrize("kind", BAD_PARAMETERS)
def test_a_parameter_without_gradient_is_skipped_whatever_it_is(kind: str) -> None:
    """As in torch: a frozen int8 or meta parameter in `model.parameters()` does no harm."""
    params, bad = parameters(2), BAD_PARAMETERS[kind][0]()
    bad.grad = None
    before = params[0].detach().clone()
    optimizer = FusedAdam([*params, bad])
    optimizer.step()
    assert not torch.equal(params[0], before)
    assert bad not in optimizer.state


def test_a_subclass_that_is_no_dtensor_is_refused() -> None:
    params = parameters(2)
    pair = nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))
    pair.grad = TwoTensor(torch.ones(3), torch.ones(3))
    optimizer = FusedAdam([*params, pair])
    _assert_refused(optimizer, params, TypeError, "parameter 2 of param group 0 is a TwoTensor")
    assert pair not in optimizer.state


def test_an_inference_tensor_is_refused_as_torch_refuses_it() -> None:
    params = parameters(2)
    with torch.inference_mode():
        inference = torch.ones(3)
    inference.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="inference tensor"):
        torch.optim.Adam([inference], foreach=False).step()
    optimizer = FusedAdam(params)
    optimizer.step()
    optimizer.add_param_group({"params": [inference]})
    _assert_refused(optimizer, [*params, inference], RuntimeError, "inference tensor")


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "gaps"])
def test_the_same_parameter_twice_is_refused(layout: str) -> None:
    param = parameter((2, 3), 0, layout=layout)
    set_grads([param], 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that it will refuse it too
        optimizer = FusedAdam([param, param])
    _assert_refused(optimizer, [param], ValueError, "0 of param group 0 and 1 of param group 0")


def test_parameters_that_share_memory_are_refused() -> None:
    memory = torch.ones(10)
    params = [nn.Parameter(memory[:6]), nn.Parameter(memory[5:])]
    set_grads(params, 0)
    optimizer = FusedAdam([("head", params[0]), ("tail", params[1])])
    _assert_refused(optimizer, params, ValueError, "head and tail share memory")


def test_parameters_beside_each_other_in_one_storage_are_stepped() -> None:
    memory = torch.ones(10)
    params = [nn.Parameter(memory[:5]), nn.Parameter(memory[5:])]
    set_grads(params, 0)
    FusedSGD(params, lr=1.0).step()
    torch.testing.assert_close(memory, 1 - torch.cat([param.grad for param in params]))


def test_interleaved_parameters_are_stepped() -> None:
    memory = torch.ones(4, 2)
    params = [nn.Parameter(memory[:, 0]), nn.Parameter(memory[:, 1])]
    set_grads(params, 0)
    FusedSGD(params, lr=1.0).step()
    torch.testing.assert_close(memory, 1 - torch.stack([p.grad for p in params], dim=1))


# --- gradients -----------------------------------------------------------------------------------


def _sparse_grad(param: nn.Parameter) -> None:
    param.grad = torch.ones_like(param).to_sparse()


def _other_shape(param: nn.Parameter) -> None:
    param.data = torch.ones(param.numel() + 1)


def _broadcastable_shape(param: nn.Parameter) -> None:
    param.grad.data = torch.ones(1, *param.shape)


def _other_dtype(param: nn.Parameter) -> None:
    param.grad.data = param.grad.data.double()


def _grad_dtype(param: nn.Parameter) -> None:
    param.grad = None
    param.grad_dtype = torch.float64
    param.grad = torch.ones_like(param, dtype=torch.float64)


def _wrapper_grad(param: nn.Parameter) -> None:
    param.grad = TwoTensor(torch.ones_like(param), torch.ones_like(param))


BAD_GRADIENTS: dict[str, tuple[Callable[[nn.Parameter], None], type[Exception], str]] = {
    "sparse": (_sparse_grad, RuntimeError, "has a Sparse gradient"),
    "of another shape": (_other_shape, RuntimeError, "must agree|changed"),
    "of a broadcastable shape": (_broadcastable_shape, RuntimeError, "must agree"),
    "of another dtype": (_other_dtype, RuntimeError, "must agree"),
    "of the dtype in grad_dtype": (_grad_dtype, RuntimeError, "must agree"),
    "a wrapper": (_wrapper_grad, TypeError, "tensor subclass"),
}


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "gaps"])
@pytest.mark.parametrize("started", [True, False], ids=["started", "first step"])
@pytest.mark.parametrize("kind", BAD_GRADIENTS)
def test_a_gradient_that_does_not_fit_is_refused(kind: str, started: bool, layout: str) -> None:
    spoil, error, match = BAD_GRADIENTS[kind]
    params = [*parameters(2), parameter((2, 3), 9, layout=layout)]
    set_grads(params, 0)
    optimizer = FusedAdam(params)
    if started:
        optimizer.step()
    spoil(params[2])
    _assert_refused(optimizer, params, error, f"parameter 2 of param group 0.*({match})")
    params[2].grad = None
    if kind != "of another shape":
        optimizer.step()  # and all is well again


def test_the_embedding_layer_with_sparse_gradients_is_named() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1))
    optimizer = FusedAdam(model.named_parameters(), weight_decay=0.1)
    model(torch.tensor([0, 2])).sum().backward()
    _assert_refused(
        optimizer, list(model.parameters()), RuntimeError, r"parameter 0\.weight.*sparse=False"
    )


@pytest.mark.skipif(not EMULATED, reason="needs the emulated CUDA engine, see tests/conftest.py")
def test_what_only_the_cpu_engine_has_is_refused_by_name() -> None:
    def table() -> nn.Parameter:
        param = nn.Parameter(torch.ones(5, 3))
        param.grad = torch.ones(5, 3)
        return param

    for make in (FusedRowwiseAdagrad, partial(FusedAdam, lazy=True)):
        param = table()
        message = "parameter table is on .* FusedRowwiseAdagrad and lazy=True do not run; fuse the"
        _assert_refused(make([("table", param)]), [param], RuntimeError, message)
    param = table()
    param.grad = param.grad.to_sparse(1)
    message = "parameter table has a Sparse gradient on .* fuse the table on FBGEMM"
    _assert_refused(FusedAdam([("table", param)]), [param], RuntimeError, message)


# --- state ---------------------------------------------------------------------------------------


BAD_STATES: dict[str, tuple[str, Callable[[Tensor], Any], type[Exception]]] = {
    "of another shape": ("exp_avg", lambda value: torch.zeros(7), RuntimeError),
    "of another dtype": ("exp_avg", lambda value: value.double(), RuntimeError),
    "on another device": ("exp_avg_sq", lambda value: value.to("meta"), RuntimeError),
    "sparse": ("exp_avg_sq", lambda value: value.to_sparse(), RuntimeError),
    "not a tensor": ("exp_avg", lambda value: 0.0, TypeError),
    "None": ("exp_avg", lambda value: None, TypeError),
    "a step of truth values": ("step", lambda value: torch.tensor(True), RuntimeError),
    "a step of several numbers": ("step", lambda value: torch.ones(2), RuntimeError),
    "a step that is a text": ("step", lambda value: "1", TypeError),
    "a wrapper": ("exp_avg", lambda value: TwoTensor(value.clone(), value.clone()), TypeError),
}


@pytest.mark.parametrize(
    "kind",
    [kind for kind in BAD_STATES],
)
def test_a_state_that_does_not_fit_is_refused(kind: str) -> None:
    key, spoil, error = BAD_STATES[kind]
    params = parameters(3)
    optimizer = FusedAdam(params)
    optimizer.step()
    state = optimizer.state[params[2]]
    good = state[key]
    state[key] = spoil(good)
    before = snapshot(optimizer, params[:2])
    for _ in range(2):
        with pytest.raises(error, match=f"'{key}' of parameter 2 of param group 0"):
            optimizer.step()
        assert_unchanged(before, optimizer, params[:2])
    state[key] = good
    optimizer.step()
    assert state["step"].item() == 2


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
def test_a_state_that_lacks_an_entry_is_refused(key: str) -> None:
    params = parameters(2)
    optimizer = FusedAdam(params)
    optimizer.step()
    del optimizer.state[params[1]][key]
    _assert_refused(optimizer, params, KeyError, f"parameter 1 of param group 0 has no '{key}'")


def test_a_parameter_resized_after_a_step_is_refused_while_it_has_its_state() -> None:
    params = parameters(2)
    optimizer = FusedAdam(params)
    optimizer.step()
    params[1].data = torch.ones(7)
    params[1].grad = torch.ones(7)
    _assert_refused(optimizer, params, RuntimeError, "'exp_avg' of parameter 1 of param group 0")


# --- param groups --------------------------------------------------------------------------------

REQUIRED = {
    "adam": ["lr", "betas", "eps", "weight_decay", "amsgrad"],
    "adamw": ["lr", "betas", "eps", "weight_decay", "amsgrad", "decoupled_weight_decay"],
    "adagrad": ["lr", "lr_decay", "eps", "weight_decay"],
    "sgd": ["lr", "momentum", "dampening", "weight_decay", "nesterov"],
}


@pytest.mark.parametrize(
    ("algorithm", "key"),
    [
        pytest.param(
            algorithm,
            key,
        )
        for algorithm, keys in REQUIRED.items()
        for key in keys
    ],
)
@pytest.mark.parametrize("started", [True, False], ids=["started", "first step"])
def test_a_missing_hyperparameter_is_named(algorithm: str, key: str, started: bool) -> None:
    params = parameters(2)
    optimizer = FUSED[algorithm]([{"params": [param]} for param in params])
    if started:
        optimizer.step()
    del optimizer.param_groups[1][key]
    _assert_refused(optimizer, params, KeyError, f"param group 1 has no '{key}'")


WRONG = [
    ("adam", {"lr": "x"}, TypeError),
    ("adam", {"lr": None}, TypeError),
    ("adam", {"lr": torch.ones(2)}, ValueError),
    ("adam", {"lr": torch.tensor(1j)}, ValueError),
    ("adam", {"betas": 0.9}, TypeError),
    ("adam", {"betas": (0.9,)}, TypeError),
    ("adam", {"betas": (0.9, "x")}, TypeError),
    ("adam", {"betas": "xy"}, TypeError),
    ("adam", {"eps": [1e-8]}, TypeError),
    ("adam", {"weight_decay": {}}, TypeError),
    ("adamw", {"amsgrad": torch.ones(2)}, TypeError),
    ("adam", {"capturable": torch.ones(2)}, TypeError),
    ("adagrad", {"lr_decay": "x"}, TypeError),
    ("sgd", {"momentum": "x"}, TypeError),
    ("sgd", {"dampening": None}, TypeError),
    pytest.param(
        "adam", {"capturable": True}, ValueError, marks=pytest.mark.cpu_engine, id="capturable"
    ),
    ("adam", {"differentiable": True}, ValueError),
    ("sgd", {"differentiable": True}, ValueError),
]


@pytest.mark.parametrize(("algorithm", "edit", "error"), WRONG)
@pytest.mark.parametrize("started", [True, False], ids=["started", "first step"])
def test_a_hyperparameter_of_the_wrong_kind_is_named(
    algorithm: str, edit: dict[str, Any], error: type[Exception], started: bool
) -> None:
    params = parameters(2)
    optimizer = FUSED[algorithm]([{"params": [param]} for param in params])
    if started:
        optimizer.step()
    good = dict(optimizer.param_groups[1])
    optimizer.param_groups[1].update(edit)
    _assert_refused(optimizer, params, error, f"param group 1.*{next(iter(edit))}")
    optimizer.param_groups[1].update(good)
    optimizer.step()


@pytest.mark.parametrize(
    ("algorithm", "switch", "bad"),
    [
        ("adam", {"amsgrad": True}, {"differentiable": True}),
        ("sgd", {"momentum": 0.9}, {"dampening": "x"}),
    ],
)
def test_a_switch_beside_a_refused_field_is_not_forgotten(
    algorithm: str, switch: dict[str, Any], bad: dict[str, Any]
) -> None:
    params = parameters(2)
    optimizer = FUSED[algorithm](params)
    optimizer.step()
    group = optimizer.param_groups[0]
    good = {key: group[key] for key in bad}
    group.update(switch | bad)
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(bad))}"):
        optimizer.step()
    group.update(good)
    if algorithm == "adam":
        _assert_refused(optimizer, params, KeyError, "max_exp_avg_sq")
    else:
        optimizer.step()
        assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], params[0].grad)


@pytest.mark.parametrize("algorithm", FUSED)
@pytest.mark.parametrize(
    "argument",
    [{"differentiable": True}, {"capturable": True}],
)
def test_other_ways_of_stepping_are_refused_at_construction(
    algorithm: str, argument: dict[str, bool]
) -> None:
    name = next(iter(argument))
    if name == "capturable" and "cuda" in build_info()["engines"]:
        pytest.skip("this build has the CUDA engine, for which the argument is")
    with pytest.raises(ValueError, match=f"{name}="):
        FUSED[algorithm](parameters(1), **argument)


# --- names ---------------------------------------------------------------------------------------


def _combined(params: list[nn.Parameter]) -> FusedCombinedOptimizer:
    return combine(
        [
            ("tower", wrapped({"weight": params[0]}, "adam")),
            ("", wrapped({"backbone.weight": params[1]}, "adagrad")),
            ("dense", wrapped({"ebc.t_user.weight": params[2]}, "sgd", momentum=0.9)),
        ]
    )


@pytest.mark.parametrize("started", [True, False], ids=["started", "first step"])
@pytest.mark.parametrize(
    ("index", "name"),
    [(0, "tower.weight"), (1, "backbone.weight"), (2, "dense.ebc.t_user.weight")],
)
def test_a_combined_optimizer_names_the_fqn(index: int, name: str, started: bool) -> None:
    params = parameters(3)
    optimizer = _combined(params)
    if started:
        optimizer.step()
    _sparse_grad(params[index])
    _assert_refused(optimizer, params, RuntimeError, f"parameter {name} has a Sparse gradient")


def test_a_combined_optimizer_names_the_group_and_its_optimizer() -> None:
    params = parameters(3)
    optimizer = _combined(params)
    optimizer.param_groups[1]["lr"] = "x"
    _assert_refused(optimizer, params, TypeError, "param group 0 of optimizer 1: 'lr'")


def test_one_parameter_in_two_optimizers_is_refused() -> None:
    param = parameters(1)[0]
    optimizer = combine([("a", wrapped({"x": param}, "adam")), ("b", wrapped({"y": param}, "sgd"))])
    _assert_refused(optimizer, [param], ValueError, r"a\.x and b\.y share memory")


# --- a failed first step -------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_class", [FusedAdam, FusedSGD])
def test_a_failed_first_step_leaves_no_state(optimizer_class: type[FusedOptimizer]) -> None:
    params = parameters(3)
    options = {"momentum": 0.9} if optimizer_class is FusedSGD else {}
    optimizer = optimizer_class(params, **options)
    _sparse_grad(params[2])
    _assert_refused(optimizer, params, RuntimeError, "Sparse gradient")
    assert len(optimizer.state) == 0
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("layout", ["contiguous", "gaps"])
def test_a_first_step_that_fails_once_state_was_made_takes_it_back(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as for lack of memory."""
    params = [parameter((2, 3), i, layout=layout) for i in range(2)]
    set_grads(params, 0)
    optimizer = FusedAdam(params)
    build, builds = Stepper._build, []

    def second_fails(self: Stepper, *args: Any, **kwargs: Any) -> Any:
        builds.append(1)
        if len(builds) == 2:
            raise MemoryError
        return build(self, *args, **kwargs)

    monkeypatch.setattr(Stepper, "_build", second_fails)
    before = snapshot(optimizer, params)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert_unchanged(before, optimizer, params)
    assert optimizer.state_dict()["state"] == {}
    optimizer.step()
    assert optimizer.state[params[0]]["step"].item() == 1


def test_betas_that_are_refused_leave_nothing_behind(device: torch.device) -> None:
    optimizers = [FusedAdam(parameters(1, device=device), lr=0.1) for _ in range(2)]
    for optimizer in optimizers:
        optimizer.step()
    group = optimizers[0].param_groups[0]
    good = group["betas"]
    group["betas"] = (0.5, 1.5)
    with pytest.raises(ValueError, match=r"betas\[1\]"):
        optimizers[0].step()
    group["betas"] = good
    first, second = (optimizer.param_groups[0]["params"][0] for optimizer in optimizers)
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(first, second)


def test_a_key_that_is_no_text_is_the_users(device: torch.device) -> None:
    (param,) = parameters(1, device=device)
    optimizer = FusedAdam([param])
    optimizer.param_groups[0]["\ud800"] = 1
    before = param.detach().clone()
    optimizer.step()
    assert not torch.equal(param, before)
