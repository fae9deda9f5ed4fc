"""The fused optimizers are torch.optim optimizers: param groups, state, checkpoints, hooks."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import weakref
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from recap_fast.optim import FusedAdagrad, FusedAdam, FusedSGD
from tests.support.optimizers import (
    FUSED,
    LAYOUTS,
    TORCH,
    UPDATES,
    WAYS,
    assert_same,
    for_loop,
    parameter,
    parameters,
    same_bits,
    set_grads,
)


class Pair:
    """Ours and torch's over equal parameters, for what must hold of both."""

    def __init__(self, update: str, device: torch.device, count: int = 3, **more: Any) -> None:
        self.algorithm, options = UPDATES[update]
        self.options = {"lr": 0.1, **options, **more}
        self.params = [parameters(count, device=device) for _ in range(2)]
        self.optimizers = [
            FUSED[self.algorithm](self.params[0], **self.options),
            for_loop(self.algorithm, self.params[1], **self.options),
        ]

    def step(self, steps: int = 1, start: int = 0) -> None:
        for step in range(start, start + steps):
            for params, optimizer in zip(self.params, self.optimizers, strict=True):
                set_grads(params, step)
                optimizer.step()

    def check(self) -> None:
        assert_same(self.optimizers[0], self.params[0], self.optimizers[1], self.params[1])


# --- construction --------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", FUSED)
def test_a_fused_optimizer_is_torchs_class_with_torchs_param_groups(algorithm: str) -> None:
    params = parameters(1)
    ours, theirs = FUSED[algorithm](params), TORCH[algorithm](params)
    assert isinstance(ours, TORCH[algorithm])
    assert ours.param_groups == theirs.param_groups
    assert list(ours.param_groups[0]) == list(theirs.param_groups[0])
    assert ours.defaults == theirs.defaults


@pytest.mark.parametrize("fused", [None, False, True])
@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("algorithm", FUSED)
def test_other_ways_of_stepping_make_no_difference(
    algorithm: str, foreach: bool | None, fused: bool | None, device: torch.device
) -> None:
    params = [parameters(2, device=device) for _ in range(3)]
    ours = FUSED[algorithm](params[0], lr=0.1, foreach=foreach, fused=fused)
    plain = FUSED[algorithm](params[1], lr=0.1)
    theirs = TORCH[algorithm](params[2], lr=0.1)
    ours.step()
    plain.step()
    theirs.load_state_dict(ours.state_dict())  # whatever the groups say of it, torch can use
    theirs.step()
    for mine, other in zip(*params[:2], strict=True):
        assert same_bits(mine, other)
    ours.load_state_dict(theirs.state_dict())
    ours.step()


def test_an_argument_without_effect_is_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recap_fast.optim.native_step._logged", set())
    with caplog.at_level(logging.INFO, "recap_fast"):
        FusedAdam(parameters(1), fused=True)
        FusedAdam(parameters(1))
        assert not caplog.records
        FusedAdam(parameters(1), foreach=True, fused=False)
        assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
        assert "foreach=True" in caplog.text and "fused=False" in caplog.text
        FusedSGD(parameters(1), foreach=False, fused=False)
    assert len(caplog.records) == 2


@pytest.mark.parametrize("algorithm", FUSED)
def test_a_param_group_may_say_how_torch_would_step_it(algorithm: str) -> None:
    params = parameters(2)
    group = {"params": params[:1], "foreach": True, "fused": False}
    optimizer = FUSED[algorithm]([group, {"params": params[1:]}], lr=0.1)
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert not any(same_bits(param, old) for param, old in zip(params, before, strict=True))
    theirs = for_loop(algorithm, [{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
    theirs.load_state_dict(optimizer.state_dict())
    theirs.step()


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("adam", {"lr": -1.0}),
        ("adam", {"betas": (1.0, 0.9)}),
        ("adamw", {"eps": -1.0}),
        ("adagrad", {"lr_decay": -1.0}),
        ("sgd", {"momentum": -1.0}),
        ("sgd", {"nesterov": True}),
    ],
)
def test_arguments_out_of_range_are_refused_as_in_torch(
    algorithm: str, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError) as theirs:
        TORCH[algorithm](parameters(1), **options)
    with pytest.raises(ValueError) as ours:
        FUSED[algorithm](parameters(1), **options)
    assert str(ours.value) == str(theirs.value)


def test_named_parameters_keep_their_names() -> None:
    model = nn.Linear(2, 2)
    optimizer = FusedAdam(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    set_grads(model.parameters(), 0)
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_a_group_may_be_empty(device: torch.device) -> None:
    param = parameters(1, device=device)[0]
    before = param.detach().clone()
    FusedAdam([{"params": []}, {"params": [param]}, {"params": []}], lr=0.1).step()
    assert not torch.equal(param, before)


def test_groups_have_hyperparameters_of_their_own(device: torch.device) -> None:
    params = [parameters(3, device=device) for _ in range(2)]
    groups = [
        [{"params": p[:1], "lr": 0.5}, {"params": p[1:2], "weight_decay": 0.1}, {"params": p[2:]}]
        for p in params
    ]
    ours = FusedAdam(groups[0], lr=0.1, betas=(0.8, 0.9))
    theirs = for_loop("adam", groups[1], lr=0.1, betas=(0.8, 0.9))
    ours.step()
    theirs.step()
    assert_same(ours, params[0], theirs, params[1])


def test_a_lazy_parameter_is_stepped_once_it_has_a_shape(device: torch.device) -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1)).to(device)
    optimizer = FusedAdam(model.parameters(), lr=0.1)
    model[1].weight.grad = torch.ones(1, 3, device=device)
    optimizer.step()
    model(torch.ones(2, 4, device=device)).sum().backward()
    optimizer.step()
    assert optimizer.state[model[0].weight]["step"].item() == 1
    assert optimizer.state[model[1].weight]["step"].item() == 2


# --- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", UPDATES)
def test_state_is_made_in_the_step_in_which_torch_makes_it(
    update: str, device: torch.device
) -> None:
    pair = Pair(update, device)
    pair.check()  # Adagrad has its state from the start
    for absent in (0, 1, 2):
        for params, optimizer in zip(pair.params, pair.optimizers, strict=True):
            set_grads(params[absent + 1 :], absent)
            for param in params[: absent + 1]:
                param.grad = None
            optimizer.step()
        pair.check()
    pair.step()
    pair.check()


@pytest.mark.parametrize("algorithm", ["adam", "adagrad"])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_steps_are_counted_in_torchs_dtype(
    default: torch.dtype, algorithm: str, device: torch.device
) -> None:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        param = parameters(1, device=device)[0]
        optimizer = FUSED[algorithm]([param])
        optimizer.step()
        optimizer.step()
    finally:
        torch.set_default_dtype(previous)
    step = optimizer.state[param]["step"]
    assert step.dtype == default and step.shape == () and step.item() == 2
    assert step.is_cpu  # as torch's, where reading it waits for no device


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_has_the_layout_it_has_in_torch(layout: str, device: torch.device) -> None:
    params = [parameter((2, 3, 4, 5), 0, device=device, layout=layout) for _ in range(2)]
    optimizers = [FusedAdam([params[0]]), for_loop("adam", [params[1]])]
    for param, optimizer in zip(params, optimizers, strict=True):
        param.grad = torch.ones_like(param)
        optimizer.step()
    ours, theirs = (o.state[p] for p, o in zip(params, optimizers, strict=True))
    assert ours["exp_avg"].stride() == theirs["exp_avg"].stride()


@pytest.mark.parametrize("update", ["adam", "adagrad", "momentum"])
def test_a_parameter_without_elements_has_its_steps_counted(
    update: str, device: torch.device
) -> None:
    algorithm, options = UPDATES[update]
    params = [parameter((0, 3), 0, device=device) for _ in range(2)]
    ours = FUSED[algorithm]([params[0]], **options)
    theirs = for_loop(algorithm, [params[1]], **options)
    for _ in range(2):
        set_grads(params, 0)
        ours.step()
        theirs.step()
        assert_same(ours, params[:1], theirs, params[1:])
    if algorithm != "sgd":
        assert ours.state[params[0]]["step"].item() == 2
    # The momentum buffer exists: the next step is not its first.
    assert ours.state[params[0]].keys() == theirs.state[params[1]].keys()


def test_parameters_in_use_by_autograd_are_seen_to_change(device: torch.device) -> None:
    param = parameters(1, device=device)[0]
    loss = (param * param).sum()
    version = param._version
    FusedSGD([param], lr=0.1).step()
    assert param._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_parameter_without_gradient_is_not_seen_to_change(device: torch.device) -> None:
    params = parameters(2, device=device)
    params[0].grad = None
    version = params[0]._version
    FusedSGD(params, lr=0.1).step()
    assert params[0]._version == version


def test_gradients_are_left_as_they_are(device: torch.device) -> None:
    params = parameters(2, device=device)
    params[1].grad = params[1].grad.t().contiguous().t()
    before = [param.grad.clone() for param in params]
    FusedAdam(params, weight_decay=0.1, maximize=True).step()
    assert all(same_bits(p.grad, grad) for p, grad in zip(params, before, strict=True))


def test_a_gradient_that_is_a_view_of_negated_memory_is_read_negated(device: torch.device) -> None:
    """As autograd makes them for the imaginary part of a conjugate."""
    for values in (torch.ones(2, 3), torch.ones(3)):
        params = [nn.Parameter(torch.zeros_like(values, device=device)) for _ in range(2)]
        for param, optimizer in zip(params, [FusedSGD, torch.optim.SGD], strict=True):
            param.grad = torch._neg_view(values.to(device))
            optimizer([param], lr=1.0).step()
        assert torch.equal(params[0], params[1])


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", ["deepcopy", "torch.save"])
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
@pytest.mark.parametrize("update", UPDATES)
def test_checkpoints_load_in_mid_training_in_both_directions(
    update: str, direction: str, copied: str, device: torch.device
) -> None:
    def copy_of(state: dict[str, Any]) -> dict[str, Any]:
        if copied == "deepcopy":
            return copy.deepcopy(state)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    pair = Pair(update, device)
    pair.step(2)
    source = 1 if direction == "from torch" else 0
    target = 1 - source
    state = copy_of(pair.optimizers[source].state_dict())
    with torch.no_grad():
        for to, from_ in zip(pair.params[target], pair.params[source], strict=True):
            to.copy_(from_)
    make = [FUSED[pair.algorithm], for_loop][target]
    arguments = (pair.params[target],) if target == 0 else (pair.algorithm, pair.params[target])
    pair.optimizers[target] = make(*arguments, **pair.options)
    pair.optimizers[target].load_state_dict(state)
    pair.check()
    pair.step(2, start=2)
    pair.check()


def test_state_dicts_have_the_form_of_torchs(device: torch.device) -> None:
    for update in UPDATES:
        pair = Pair(update, device)
        pair.step()
        ours, theirs = (optimizer.state_dict() for optimizer in pair.optimizers)
        assert ours.keys() == theirs.keys()
        assert ours["state"].keys() == theirs["state"].keys()
        for number, state in theirs["state"].items():
            assert list(ours["state"][number]) == list(state)
        groups = zip(ours["param_groups"], theirs["param_groups"], strict=True)
        for mine, other in groups:
            expected = {**other, **dict.fromkeys(WAYS[pair.algorithm])}
            assert list(mine.items()) == list(expected.items())


def test_a_checkpoint_of_torchs_fused_optimizer_loads(device: torch.device) -> None:
    params = [parameters(2, device=device) for _ in range(2)]
    fused = torch.optim.Adam(params[0], lr=0.1, fused=True)
    fused.step()
    ours = FusedAdam(params[1], lr=0.1)
    ours.step()
    ours.load_state_dict(copy.deepcopy(fused.state_dict()))
    assert ours.param_groups[0]["fused"] is None
    set_grads(params[0], 1)
    set_grads(params[1], 1)
    ours.step()
    fused.step()
    assert_same(ours, params[1], fused, params[0])


def test_a_checkpoint_loads_into_a_used_optimizer(device: torch.device) -> None:
    params = parameters(2, device=device)
    optimizer = FusedAdam(params, lr=0.1)
    optimizer.step()
    state, values = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    set_grads(params, 1)
    optimizer.step()
    expected = [param.detach().clone() for param in params]
    for _ in range(2):
        optimizer.load_state_dict(copy.deepcopy(state))
        with torch.no_grad():
            for param, value in zip(params, values, strict=True):
                param.copy_(value)
        set_grads(params, 1)
        optimizer.step()
        assert all(same_bits(p, e) for p, e in zip(params, expected, strict=True))


def test_state_of_another_memory_layout_is_taken_over(device: torch.device) -> None:
    """As after a model was converted to channels last."""
    for layout in LAYOUTS:
        params = [parameter((2, 3, 4, 5), 0, device=device) for _ in range(2)]
        ours, theirs = FusedAdam([params[0]], lr=0.1), for_loop("adam", [params[1]], lr=0.1)
        for step in range(3):
            for param, optimizer in zip(params, (ours, theirs), strict=True):
                set_grads([param], step)
                optimizer.step()
            params[0].data = LAYOUTS[layout](params[0].data)
        assert_same(ours, params[:1], theirs, params[1:])


@pytest.mark.parametrize("update", ["adam", "adagrad", "momentum"])
@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_optimizers_can_be_pickled_and_copied(how: str, update: str, device: torch.device) -> None:
    algorithm, options = UPDATES[update]
    params = parameters(2, device=device)
    optimizer = FUSED[algorithm](params, **options)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    scheduler.step()
    pair = (params, optimizer)
    params_copy, optimizer_copy = (
        copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    )
    assert type(optimizer_copy) is type(optimizer)
    assert optimizer_copy.param_groups[0]["params"][0] is params_copy[0]
    for group in (params, params_copy):
        set_grads(group, 1)
    optimizer_copy.step()
    assert not torch.equal(params[0], params_copy[0])  # nothing is shared
    optimizer.step()
    assert_same(optimizer_copy, params_copy, optimizer, params, rtol=0)


def test_a_state_dict_refers_to_the_state(device: torch.device) -> None:
    """As in torch, `state_dict` copies nothing."""
    params = parameters(1, device=device)
    optimizer = FusedAdam(params)
    optimizer.step()
    saved = optimizer.state_dict()["state"][0]
    optimizer.step()
    assert saved["step"].item() == 2
    assert saved["exp_avg"] is optimizer.state[params[0]]["exp_avg"]


# --- edits between steps -------------------------------------------------------------------------


@pytest.mark.parametrize("update", UPDATES)
def test_a_param_group_can_be_added_after_steps(update: str, device: torch.device) -> None:
    if UPDATES[update][0] == "adagrad":
        pytest.skip("torch.optim.Adagrad fails on it; see the test of ours below")
    pair = Pair(update, device)
    pair.step(2)
    for params, optimizer in zip(pair.params, pair.optimizers, strict=True):
        params.extend(parameters(2, seed=7, device=device))
        optimizer.add_param_group({"params": params[3:], "lr": 0.5})
    pair.step(2)
    pair.check()


def test_adagrad_gets_the_state_of_an_added_group(device: torch.device) -> None:
    params = parameters(2, device=device)
    optimizer = FusedAdagrad(params[:1], initial_accumulator_value=0.5)
    optimizer.step()
    optimizer.add_param_group({"params": params[1:]})
    optimizer.step()
    assert optimizer.state[params[1]]["step"].item() == 1
    expected = 0.5 + params[1].grad ** 2
    torch.testing.assert_close(optimizer.state[params[1]]["sum"], expected)


def test_adagrad_starts_over_from_the_initial_value_of_the_constructor(
    device: torch.device,
) -> None:
    """As torch's starts in its constructor, and from 2.13 on later too, whatever the group says."""
    params = parameters(1, device=device)
    group = {"params": params, "initial_accumulator_value": 0.5}
    optimizer = FusedAdagrad([group], initial_accumulator_value=0.25)
    for _ in range(2):
        optimizer.step()
        expected = 0.25 + params[0].grad ** 2
        torch.testing.assert_close(optimizer.state[params[0]]["sum"], expected)
        optimizer.state.clear()


def _replace_in_list(group: dict[str, Any], new: nn.Parameter) -> None:
    group["params"][1] = new


def _append(group: dict[str, Any], new: nn.Parameter) -> None:
    group["params"].append(new)


def _remove_and_append(group: dict[str, Any], new: nn.Parameter) -> None:
    del group["params"][0]
    group["params"].append(new)


def _replace_list(group: dict[str, Any], new: nn.Parameter) -> None:
    group["params"] = [group["params"][0], new]


def _replace_by_tuple(group: dict[str, Any], new: nn.Parameter) -> None:
    group["params"] = (new,)


@pytest.mark.parametrize(
    "edit",
    [
        _replace_in_list,
        _append,
        _remove_and_append,
        _replace_list,
        _replace_by_tuple,
    ],
)
def test_the_params_of_a_group_can_be_edited(edit: Any, device: torch.device) -> None:
    pair = Pair("adam", device)
    pair.step()
    for params, optimizer in zip(pair.params, pair.optimizers, strict=True):
        params.append(parameters(1, seed=7, device=device)[0])
        edit(optimizer.param_groups[0], params[-1])
    pair.step(2)
    pair.check()


def test_a_parameter_can_be_appended_to_a_group_with_names(device: torch.device) -> None:
    first, second = parameters(2, device=device)
    optimizer = FusedAdam([("first", first)])
    optimizer.step()
    optimizer.param_groups[0]["params"].append(second)
    optimizer.step()
    assert optimizer.state[second]["step"].item() == 1


def test_a_rate_set_to_a_tensor_by_a_step_that_failed_is_followed(device: torch.device) -> None:
    param = nn.Parameter(torch.zeros(3, device=device))
    optimizer = FusedSGD([param], lr=0.5)
    param.grad = torch.ones_like(param)
    optimizer.step()
    group, rate = optimizer.param_groups[0], torch.tensor(1.0, device=device)
    group["lr"], momentum, group["momentum"] = rate, group["momentum"], "much"
    with pytest.raises(TypeError, match="momentum"):
        optimizer.step()
    group["momentum"] = momentum
    for value in (1.0, 2.0, 4.0):
        rate.fill_(value)
        optimizer.step()
    assert param.tolist() == [-7.5] * 3


def test_a_param_group_can_be_replaced(device: torch.device) -> None:
    pair = Pair("sgd", device)
    pair.step()
    for optimizer in pair.optimizers:
        optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.0}
    pair.step()
    pair.check()


def test_the_list_of_param_groups_can_be_replaced(device: torch.device) -> None:
    pair = Pair("sgd", device)
    pair.step()
    for optimizer in pair.optimizers:
        optimizer.param_groups = [{**optimizer.param_groups[0], "lr": 0.5}]
    pair.step()
    pair.check()


def test_a_param_group_can_be_removed(device: torch.device) -> None:
    params = parameters(2, device=device)
    optimizer = FusedSGD([{"params": [param]} for param in params], lr=0.1)
    optimizer.step()
    before = params[0].detach().clone()
    del optimizer.param_groups[0]
    optimizer.step()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("keep_old", [True, False])
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"])
def test_a_state_entry_can_be_replaced(key: str, keep_old: bool, device: torch.device) -> None:
    pair = Pair("amsgrad", device)
    pair.step(2)
    kept = []
    for params, optimizer in zip(pair.params, pair.optimizers, strict=True):
        state = optimizer.state[params[1]]
        if keep_old:
            kept.append((state[key], state[key].clone()))
        state[key] = state[key].clone() * 3
    for step in range(2):
        pair.step(start=step)
        pair.check()
    assert all(torch.equal(old, value) for old, value in kept)  # nobody writes to it any more


def _double(state: Any) -> None:
    for entries in state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            entries[key].mul_(2.0)


def _clear(state: Any) -> None:
    state.clear()


def _delete_one(state: Any) -> None:
    del state[next(iter(state))]


def _empty_one(state: Any) -> None:
    next(iter(state.values())).clear()


def _replace_one(state: Any) -> None:
    param = next(iter(state))
    state[param] = {key: value.clone() * 2 for key, value in state[param].items()}


def _count_again(state: Any) -> None:
    for entries in state.values():
        entries["step"].fill_(7.0)


def _move(state: Any) -> None:
    for entries in state.values():
        entries["exp_avg"].data = entries["exp_avg"].data.clone() * 2


def _add_entry(state: Any) -> None:
    for entries in state.values():
        entries["ema"] = torch.zeros(3)


@pytest.mark.parametrize(
    "edit",
    [_double, _clear, _delete_one, _empty_one, _replace_one, _count_again, _move, _add_entry],
)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "gaps"])
def test_the_state_can_be_edited(edit: Any, layout: str, device: torch.device) -> None:
    pair = Pair("adam", device)
    for params in pair.params:
        for param in params:
            param.data = LAYOUTS[layout](param.data)
    pair.step(2)
    for optimizer in pair.optimizers:
        edit(optimizer.state)
    pair.step()
    pair.check()
    pair.step()
    pair.check()


def test_the_whole_state_can_be_replaced(device: torch.device) -> None:
    pair = Pair("momentum", device)
    pair.step(2)
    for optimizer in pair.optimizers:
        optimizer.state = defaultdict(dict, copy.copy(optimizer.state))
        optimizer.state.pop(next(iter(optimizer.state)))
    pair.step(2)
    pair.check()


def _clone(param: nn.Parameter) -> None:
    param.data = param.data.clone()


def _transpose(param: nn.Parameter) -> None:
    param.data = LAYOUTS["transposed"](param.data)


def _into_gaps(param: nn.Parameter) -> None:
    param.data = LAYOUTS["gaps"](param.data)


def _set(param: nn.Parameter) -> None:
    with torch.no_grad():
        param.set_(param.detach().clone().untyped_storage(), 0, param.shape, param.stride())


def _swap(param: nn.Parameter) -> None:
    torch.utils.swap_tensors(param, nn.Parameter(param.detach().clone() * 2))


@pytest.mark.parametrize("move", [_clone, _transpose, _into_gaps, _set, _swap])
def test_parameters_can_be_moved(move: Any, device: torch.device) -> None:
    pair = Pair("adam", device)
    pair.step()
    for params in pair.params:
        for param in params:
            param.grad = None
            move(param)
    pair.step(2)
    pair.check()


def test_a_resized_parameter_starts_over_once_its_state_is_dropped(device: torch.device) -> None:
    pair = Pair("adam", device)
    pair.step()
    for params, optimizer in zip(pair.params, pair.optimizers, strict=True):
        params[1].data = torch.ones(7, device=device)
        del optimizer.state[params[1]]
    pair.step(2)
    pair.check()


@pytest.mark.parametrize("swap", [True, False])
def test_a_module_can_change_its_dtype(swap: bool, device: torch.device) -> None:
    """`Module.to` swaps the tensors or replaces their data; state is cast when it is loaded."""
    previous = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        model = nn.Linear(3, 2).to(device)
        optimizer = FusedAdam(model.parameters(), lr=0.1)
        set_grads(model.parameters(), 0)
        optimizer.step()
        optimizer.zero_grad()
        saved = copy.deepcopy(optimizer.state_dict())
        model.double()
        optimizer.load_state_dict(saved)  # casts to the parameter's dtype
        set_grads(model.parameters(), 1)
        optimizer.step()
        assert optimizer.state[model.weight]["exp_avg"].dtype == torch.float64
        assert optimizer.state[model.weight]["step"].item() == 2
    finally:
        torch.__future__.set_swap_module_params_on_conversion(previous)


def test_dropped_parameters_and_gradients_are_freed(device: torch.device) -> None:
    """The optimizer holds parameters as torch's does, and no gradient beyond the step."""
    params = parameters(2, device=device)
    optimizer = FusedAdam(params, lr=0.1)
    optimizer.step()
    grad = weakref.ref(params[0].grad)
    optimizer.zero_grad()
    assert grad() is None
    gone = weakref.ref(params[1])
    del optimizer, params
    assert gone() is None  # at once, without a garbage collection


HYPERPARAMETERS = [
    ("adam", {"lr": 0.5}),
    ("adam", {"betas": (0.5, 0.6)}),
    ("adam", {"betas": [0.5, 0.6]}),
    ("adam", {"betas": (torch.tensor(0.5), torch.tensor(0.75))}),
    ("adam", {"eps": 0.1}),
    ("adam", {"weight_decay": 0.1}),
    ("adam_l2", {"weight_decay": 0}),
    ("adam", {"maximize": True}),
    ("amsgrad", {"amsgrad": False}),
    ("adam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    ("adamw", {"weight_decay": 0.5}),
    ("adagrad", {"lr_decay": 0.5}),
    ("adagrad", {"eps": 0.1, "lr": torch.tensor(0.25)}),
    ("sgd", {"lr": 1}),
    ("sgd", {"weight_decay": 0.1}),
    ("sgd", {"momentum": 0.5}),
    ("momentum", {"momentum": 0.5, "dampening": 0.1}),
    ("momentum", {"momentum": 0}),
    ("momentum", {"nesterov": True, "dampening": 0}),
    ("nesterov", {"nesterov": False}),
]


@pytest.mark.parametrize(("update", "edit"), HYPERPARAMETERS)
def test_hyperparameters_can_be_edited(
    update: str, edit: dict[str, Any], device: torch.device
) -> None:
    pair = Pair(update, device)
    pair.step(2)
    for optimizer in pair.optimizers:
        optimizer.param_groups[0].update(edit)
    pair.step(2)
    pair.check()


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_learning_rate_tensor_can_change_in_place(
    shape: tuple[int, ...], device: torch.device
) -> None:
    pair = Pair("adam", device, lr=torch.full(shape, 0.1, dtype=torch.float64))
    rate = pair.options["lr"]
    for step, value in enumerate((0.1, 0.5, 0.0)):
        rate.fill_(value)
        pair.step(start=step)
        pair.check()


def test_a_list_of_betas_can_change_in_place(device: torch.device) -> None:
    pair = Pair("adam", device)
    for optimizer in pair.optimizers:
        optimizer.param_groups[0]["betas"] = [0.9, 0.999]
    pair.step()
    for optimizer in pair.optimizers:
        optimizer.param_groups[0]["betas"][0] = 0.5
    pair.step()
    pair.check()


def test_tensors_in_a_tuple_of_betas_can_change_in_place(device: torch.device) -> None:
    pair = Pair("adam", device)
    betas = (torch.tensor(0.5), torch.tensor(0.75))
    for optimizer in pair.optimizers:
        optimizer.param_groups[0]["betas"] = betas
    for step, values in enumerate([(0.5, 0.75), (0.5, 0.875), (0.25, 0.875)]):
        for beta, value in zip(betas, values, strict=True):
            beta.fill_(value)
        pair.step(start=step)
        pair.check()


def test_a_mutable_number_is_read_in_every_step(device: torch.device) -> None:
    rate = pytest.importorskip("numpy").array(0.5)
    pair = Pair("sgd", device, lr=rate)
    pair.step()
    rate[...] = 0.125
    pair.step(start=1)
    pair.check()


def test_amsgrad_switched_on_later_is_refused_by_name(device: torch.device) -> None:
    params = parameters(2, device=device)
    optimizer = FusedAdam([("first", params[0]), ("second", params[1])])
    optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(KeyError, match="parameter first has no 'max_exp_avg_sq'"):
        optimizer.step()


# What is wrong with the state of a parameter, and the error that says so.
WRONG_STATES = {
    "missing": (lambda state: state.pop("exp_avg"), KeyError),
    "no tensor": (lambda state: state.update(exp_avg=1.0), TypeError),
    "another dtype": (lambda state: state.update(exp_avg=state["exp_avg"].double()), RuntimeError),
    "a negative count": (lambda state: state["step"].fill_(-1), ValueError),
}


@pytest.mark.parametrize("wrong", WRONG_STATES)
def test_only_a_parameter_with_a_gradient_needs_a_right_state(
    wrong: str, device: torch.device
) -> None:
    spoil, error = WRONG_STATES[wrong]
    params = parameters(2, device=device)
    optimizer = FusedAdam([("first", params[0]), ("second", params[1])])
    optimizer.step()
    spoil(optimizer.state[params[0]])
    grad, params[0].grad = params[0].grad, None
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert params[0].equal(before[0]) and not params[1].equal(before[1])
    params[0].grad = grad
    before = [param.detach().clone() for param in params]
    with pytest.raises(error, match="parameter first"):
        optimizer.step()
    assert all(map(torch.equal, params, before))


# --- step, zero_grad, hooks, schedulers ----------------------------------------------------------


def test_a_closure_is_called_once_with_gradients_enabled(device: torch.device) -> None:
    param = nn.Parameter(torch.ones(3, device=device))
    optimizer = FusedSGD([param], lr=0.1)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (param * 2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() == 6.0
    torch.testing.assert_close(param.data, torch.full_like(param, 0.8))
    assert optimizer.step() is None


def test_an_exception_in_a_closure_leaves_everything_as_it_was(device: torch.device) -> None:
    param = parameters(1, device=device)[0]
    before = param.detach().clone()
    optimizer = FusedAdam([param])
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert torch.equal(param, before) and not optimizer.state


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool, device: torch.device) -> None:
    params = parameters(2, device=device)
    optimizer = FusedAdam(params)
    optimizer.zero_grad(set_to_none=set_to_none)
    for param in params:
        assert param.grad is None if set_to_none else not param.grad.any()
    optimizer.step()
    # A gradient of zero is a gradient: Adam counts the step.
    assert len(optimizer.state) == (0 if set_to_none else 2)


def test_hooks_run_around_a_step(device: torch.device) -> None:
    param = nn.Parameter(torch.ones(3, device=device))
    optimizer = FusedSGD([param], lr=1.0)
    order = []

    def before(name: str) -> Any:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            order.append((name, param[0].item()))
            param.grad = torch.full_like(param, 0.25)

        return hook

    def after(name: str) -> Any:
        return lambda *_: order.append((name, param[0].item()))

    handles = [
        register_optimizer_step_pre_hook(before("global pre")),
        register_optimizer_step_post_hook(after("global post")),
        optimizer.register_step_pre_hook(before("pre")),
        optimizer.register_step_post_hook(after("post")),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert order == [("global pre", 1.0), ("pre", 1.0), ("post", 0.75), ("global post", 0.75)]
    optimizer.step()
    assert len(order) == 4


def test_state_dict_hooks_run(device: torch.device) -> None:
    optimizer = FusedAdam(parameters(1, device=device))
    calls = []
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("save"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save", "loaded"]


def test_a_scheduler_sets_the_rate_of_every_step(device: torch.device) -> None:
    pair = Pair("adam", device)
    schedulers = [LambdaLR(optimizer, lambda step: 1 / (1 + step)) for optimizer in pair.optimizers]
    for step in range(4):
        pair.step(start=step)
        for scheduler in schedulers:
            scheduler.step()
    pair.check()


def test_a_subclass_inherits_the_step(device: torch.device) -> None:
    class Own(FusedAdam):
        pass

    param = parameters(1, device=device)[0]
    optimizer = Own([param])
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    optimizer.step()
    assert calls == [1] and optimizer.state[param]["step"].item() == 1
