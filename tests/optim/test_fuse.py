"""`fuse` and `unfuse` of torch.optim optimizers: the same training as without, at any moment."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import subprocess
import sys
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from recap_fast import fuse, unfuse
from recap_fast.optim import FusedAdam, FusedOptimizer, FusedSGD
from tests.support.optimizers import (
    FUSED,
    TORCH,
    UPDATES,
    WAYS,
    assert_same,
    parameters,
    set_grads,
    snapshot,
)

STEPS = 8
# How torch may have been told to run its step. On the CPU, its fused Adagrad takes the same.
EXECUTION = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "for loop": {"foreach": False, "fused": False},
}


class Pair:
    """Two equal torch optimizers over equal parameters, of which the first may be fused."""

    def __init__(self, update: str, device: torch.device | str = "cpu", **more: Any) -> None:
        algorithm, options = UPDATES[update]
        self.algorithm = algorithm
        more = {key: value for key, value in more.items() if key in ("lr", *WAYS[algorithm])}
        self.params = [parameters(4, device=device) for _ in range(2)]
        self.optimizers = [
            TORCH[algorithm](self.groups(params), **{"lr": 0.1, **options, **more})
            for params in self.params
        ]

    @staticmethod
    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": params[:2]}, {"params": params[2:], "lr": 0.03}]

    @property
    def ours(self) -> torch.optim.Optimizer:
        return self.optimizers[0]

    @property
    def theirs(self) -> torch.optim.Optimizer:
        return self.optimizers[1]

    def step(self, start: int, steps: int = 1) -> None:
        for step in range(start, start + steps):
            for params, optimizer in zip(self.params, self.optimizers, strict=True):
                set_grads(params, step)
                if step % 3 == 1:
                    params[1].grad = None
                optimizer.step()

    def check(self) -> None:
        stepper = getattr(self.ours, "_stepper", None)
        assert stepper is None or not stepper._left, "torch took the step"
        assert_same(self.ours, self.params[0], self.theirs, self.params[1])


# --- the class and what it keeps -----------------------------------------------------------------


@pytest.mark.parametrize("algorithm", FUSED)
def test_it_stays_the_same_object_with_the_same_parts(algorithm: str) -> None:
    optimizer = TORCH[algorithm](parameters(3), lr=0.1)
    optimizer.step()
    parts = {
        name: value for name, value in vars(optimizer).items() if name != "_zero_grad_profile_name"
    }
    assert fuse(optimizer) is optimizer
    assert type(optimizer) is FUSED[algorithm] and isinstance(optimizer, TORCH[algorithm])
    assert all(vars(optimizer)[name] is value for name, value in parts.items())
    assert unfuse(optimizer) is optimizer
    assert type(optimizer) is TORCH[algorithm]
    assert vars(optimizer).keys() - {"_zero_grad_profile_name"} == parts.keys()
    assert all(vars(optimizer)[name] is value for name, value in parts.items())


def test_twice_is_once() -> None:
    pair = Pair("adam")
    fuse(fuse(pair.ours))
    pair.step(0, 2)
    fuse(pair.ours)
    pair.step(2, 2)
    pair.check()
    unfuse(unfuse(pair.ours))
    pair.step(4, 2)
    pair.check()


def test_a_list_or_tuple_is_fused_one_by_one() -> None:
    pairs = [Pair("adam"), Pair("sgd"), Pair("adagrad")]
    optimizers = [pair.ours for pair in pairs]
    assert fuse(optimizers) is optimizers
    assert all(isinstance(optimizer, FusedOptimizer) for optimizer in optimizers)
    for pair in pairs:
        pair.step(0, 3)
        pair.check()
    as_tuple = tuple(optimizers)
    assert unfuse(as_tuple) is as_tuple
    assert not any(isinstance(optimizer, FusedOptimizer) for optimizer in optimizers)


@pytest.mark.parametrize("function", [fuse, unfuse])
def test_what_is_no_optimizer_is_refused_before_anything_changes(function: Any) -> None:
    adam = torch.optim.Adam(parameters(1))
    with pytest.raises(TypeError, match="Linear"):
        function([adam, nn.Linear(1, 1)])
    assert type(adam) is torch.optim.Adam


# --- the same training ---------------------------------------------------------------------------


@pytest.mark.parametrize("execution", EXECUTION)
@pytest.mark.parametrize("update", UPDATES)
def test_training_goes_on_as_before(device: torch.device, update: str, execution: str) -> None:
    """Fused before the first step, or after some; given back before the end."""
    for begin, end in ((0, STEPS), (3, 6)):
        pair = Pair(update, device, **EXECUTION[execution])
        flags = [(group.get("foreach"), group.get("fused")) for group in pair.ours.param_groups]
        pair.step(0, begin)
        fuse(pair.ours)
        pair.step(begin, end - begin)
        pair.check()
        pair.ours.load_state_dict(pair.theirs.state_dict())
        unfuse(pair.ours)
        assert type(pair.ours) is TORCH[pair.algorithm]
        assert flags == [
            (group.get("foreach"), group.get("fused")) for group in pair.ours.param_groups
        ]
        pair.step(end, STEPS - end + 1)
        pair.check()


@pytest.mark.parametrize("update", ["adam", "adagrad", "momentum"])
@pytest.mark.parametrize("saved", ["fused", "torch"])
def test_state_dicts_load_both_ways(update: str, saved: str) -> None:
    pair = Pair(update)
    fuse(pair.ours)
    pair.step(0, 3)
    source, target = pair.optimizers if saved == "fused" else pair.optimizers[::-1]
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file))
    pair.step(3, 3)
    pair.check()


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("update", ["adamw", "adagrad", "momentum"])
def test_a_rate_that_is_a_tensor_is_followed(update: str, shape: tuple[int, ...]) -> None:
    pair = Pair(update)
    for optimizer in pair.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = torch.full(shape, group["lr"], dtype=torch.float64)
    schedulers = [LambdaLR(optimizer, lambda step: 0.7**step) for optimizer in pair.optimizers]
    held = pair.ours.param_groups[0]["lr"]
    for step in range(5):
        if step == 2:
            fuse(pair.ours)
        pair.step(step)
        for scheduler in schedulers:
            scheduler.step()
    assert pair.ours.param_groups[0]["lr"] is held
    pair.check()


def test_state_that_others_hold_or_share_goes_on() -> None:
    optimizer = torch.optim.Adagrad(parameters(2), lr=0.1)
    optimizer.share_memory()
    sums = [state["sum"] for state in optimizer.state.values()]
    before = [own.clone() for own in sums]
    fuse(optimizer).step()
    for held, old, state in zip(sums, before, optimizer.state.values(), strict=True):
        assert state["sum"] is held and held.is_shared() and not torch.equal(held, old)
        assert state["step"].item() == 1


def test_state_stays_part_of_what_it_was_part_of() -> None:
    """Such as one buffer for all parameters, which a program sums over processes."""
    params = [torch.nn.Parameter(torch.zeros(5)) for _ in range(2)]
    whole, mask = torch.zeros(10), torch.ones(5)
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    for param, part in zip(params, whole.split(5), strict=True):
        param.grad = torch.ones(5)
        optimizer.state[param] = {"momentum_buffer": part, "mask": mask}
    fuse(optimizer).step()
    assert (whole == 1).all()
    assert all(optimizer.state[param]["mask"] is mask for param in params)


def test_groups_may_come_and_change_after_it() -> None:
    pair = Pair("adamw")
    fuse(pair.ours)
    pair.step(0, 2)
    for params, optimizer in zip(pair.params, pair.optimizers, strict=True):
        params.append(parameters(5)[4])
        optimizer.add_param_group({"params": [params[4]], "weight_decay": 0.5})
        optimizer.param_groups[0]["betas"] = (0.5, 0.9)
    pair.step(2, 2)
    pair.check()


# --- hooks, schedulers, scalers ------------------------------------------------------------------


def test_hooks_stay_and_can_be_removed() -> None:
    pair = Pair("sgd")
    calls: list[str] = []
    handles = [
        pair.ours.register_step_pre_hook(lambda *_: calls.append("pre")),
        pair.ours.register_step_post_hook(lambda *_: calls.append("post")),
        pair.ours.register_state_dict_pre_hook(lambda *_: calls.append("save")),
        pair.ours.register_state_dict_post_hook(lambda *_: calls.append("saved")),
        pair.ours.register_load_state_dict_pre_hook(lambda *_: calls.append("load")),
        pair.ours.register_load_state_dict_post_hook(lambda *_: calls.append("loaded")),
    ]
    for convert in (fuse, unfuse, fuse):
        convert(pair.ours)
        pair.step(0)
        pair.ours.load_state_dict(pair.ours.state_dict())
        assert calls == ["pre", "post", "save", "saved", "load", "loaded"]
        calls.clear()
        pair.check()
    for handle in handles:
        handle.remove()
    pair.ours.step()
    assert calls == []


def test_hooks_of_parameters_go_on() -> None:
    param = nn.Parameter(torch.ones(3))
    seen = []
    param.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    optimizer = fuse(torch.optim.SGD([param], lr=1.0))
    (2 * param).sum().backward()
    optimizer.step()
    assert len(seen) == 1 and param.tolist() == [-1.0] * 3


SCHEDULERS: dict[str, Callable[[Any], LRScheduler]] = {
    "lambda": lambda o: LambdaLR(o, lambda step: 0.9**step),
    "one cycle": lambda o: OneCycleLR(o, max_lr=0.3, total_steps=20),
    "plateau": lambda o: ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("update", ["adam", "momentum"])
@pytest.mark.parametrize("moment", ["before", "at once", "later"])
def test_schedulers_go_on(kind: str, update: str, moment: str) -> None:
    """Attached before or after, and without torch's warnings about the order of steps."""
    if kind == "one cycle" and update == "momentum" and moment == "before":
        update = "nesterov"
    pair = Pair(update)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if moment == "before":
            fuse(pair.ours)
        schedulers = [SCHEDULERS[kind](optimizer) for optimizer in pair.optimizers]
        for step in range(STEPS):
            if (moment, step) in (("at once", 0), ("later", 3)):
                fuse(pair.ours)
            if (moment, step) == ("later", 6):
                unfuse(pair.ours)
            pair.step(step)
            for scheduler in schedulers:
                metrics = [1.0] if kind == "plateau" else []
                scheduler.step(*metrics)
            for ours, theirs in zip(*(o.param_groups for o in pair.optimizers), strict=True):
                for key in ("lr", "betas", "momentum"):
                    assert ours.get(key) == theirs.get(key)
    pair.check()


def test_a_scheduler_really_reaches_the_native_step() -> None:
    """And not torch's, which the wrapper that a scheduler makes is bound to."""
    params = parameters(2)
    optimizer = torch.optim.SGD(params, lr=0.1)
    LambdaLR(optimizer, lambda step: 1.0)
    fuse(optimizer).step()
    assert optimizer._stepper is not None
    del optimizer._opt_called
    optimizer.step()
    assert optimizer._opt_called
    unfuse(optimizer).step()
    assert not hasattr(optimizer, "_stepper") or optimizer._stepper is None


def test_a_scheduler_keeps_no_optimizer_alive() -> None:
    optimizer = torch.optim.SGD(parameters(1), lr=0.1)
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    fuse(optimizer).step()
    gone = weakref.ref(optimizer)
    del scheduler, optimizer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("execution", ["default", "fused"])
@pytest.mark.parametrize("update", ["adam", "adagrad", "momentum"])
def test_grad_scalers_go_on(update: str, execution: str) -> None:
    pair = Pair(update, **EXECUTION[execution])
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2) for _ in range(2)]
    for step in range(STEPS):
        if step == 2:
            fuse(pair.ours)
        if step == 6:
            unfuse(pair.ours)
        for params, optimizer, scaler in zip(pair.params, pair.optimizers, scalers, strict=True):
            loss = sum((param * (step + 1 + i)).sum() for i, param in enumerate(params))
            if step == 4:
                loss = loss * torch.inf
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        for ours, theirs in zip(*pair.params, strict=True):
            if step != 4:
                torch.testing.assert_close(ours.grad, theirs.grad)
    pair.check()


@pytest.mark.parametrize("execution", EXECUTION)
def test_a_scaler_treats_it_as_before(execution: str) -> None:
    optimizer = torch.optim.Adam(parameters(1), **EXECUTION[execution])
    before = getattr(optimizer, "_step_supports_amp_scaling", False)
    assert getattr(fuse(optimizer), "_step_supports_amp_scaling", False) == before
    assert getattr(unfuse(optimizer), "_step_supports_amp_scaling", False) == before


# --- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"]
)
def test_copies_train_on(duplicate: Any) -> None:
    pair = Pair("adam")
    scheduler = LambdaLR(pair.ours, lambda step: 1.0)
    fuse(pair.ours)
    pair.step(0, 2)
    twin = duplicate(pair.ours)
    assert type(twin) is FusedAdam and scheduler.optimizer is pair.ours
    own = [param for group in twin.param_groups for param in group["params"]]
    pair.params[0], pair.optimizers[0] = own, twin
    pair.step(2, 2)
    pair.check()
    unfuse(twin)
    pair.step(4, 2)
    pair.check()


# --- classes derived from torch's ----------------------------------------------------------------


class NamedAdamW(torch.optim.AdamW):
    """With another constructor and method, but torch's step."""

    def __init__(self, params: Any, name: str) -> None:
        super().__init__(params, lr=0.1)
        self.name = name

    def greet(self) -> str:
        return f"I am {self.name}"


class HalvedSGD(torch.optim.SGD):
    """With a step of its own."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = param.grad / 2
        return super().step(closure)


def test_a_class_with_torchs_step_is_kept_and_steps_natively() -> None:
    params = [parameters(3) for _ in range(2)]
    ours, theirs = NamedAdamW(params[0], "Ada"), NamedAdamW(params[1], "Ada")
    fuse(ours)
    assert isinstance(ours, NamedAdamW) and isinstance(ours, FusedOptimizer)
    assert ours.greet() == "I am Ada"
    for step in range(3):
        for own, optimizer in zip(params, (ours, theirs), strict=True):
            set_grads(own, step)
            optimizer.step()
    assert_same(ours, params[0], theirs, params[1])
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours)
        set_grads(twin.param_groups[0]["params"], 0)
        twin.step()
        assert twin._stepper is not None
    assert type(unfuse(ours)) is NamedAdamW


def test_a_class_with_a_step_of_its_own_keeps_it(caplog: pytest.LogCaptureFixture) -> None:
    params = parameters(1)
    optimizer = HalvedSGD(params, lr=1.0)
    before, grad = params[0].detach().clone(), params[0].grad.clone()
    with caplog.at_level(logging.INFO, "recap_fast"):
        fuse(optimizer).step()
    assert type(optimizer) is HalvedSGD
    torch.testing.assert_close(params[0].detach(), before - grad / 2)
    assert "0 of 1 param groups are native; group 0: HalvedSGD has a step of its own" in caplog.text


class Wrapper(torch.optim.Optimizer):
    """As libraries wrap optimizers."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups


def test_a_wrapper_of_a_library_is_named(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = Wrapper(torch.optim.SGD(parameters(1)))
    fuse(optimizer)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "fuse: 0 of 1 param groups are native; group 0: Wrapper wraps another optimizer: pass "
        "`optimizer.optimizer`, or call `fuse` before the library wraps it"
    )
    fuse(optimizer.optimizer)
    assert isinstance(optimizer.optimizer, FusedOptimizer)


@pytest.mark.parametrize(
    ("kinds", "level"),
    [
        ([torch.optim.Adadelta], logging.WARNING),
        ([torch.optim.Adadelta, torch.optim.NAdam], logging.WARNING),
        ([torch.optim.Adadelta, torch.optim.SGD], logging.INFO),
        ([torch.optim.SGD], logging.INFO),
        ([], logging.INFO),  # nothing could be native
    ],
)
def test_a_fuse_that_changes_nothing_warns(
    kinds: list[type[torch.optim.Optimizer]], level: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "recap_fast"):
        fuse([kind(parameters(1)) for kind in kinds])
    assert [record.levelno for record in caplog.records] == [level]


class Trained(torch.nn.Linear):
    def configure_optimizers(self) -> None: ...


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "found None: pass the optimizer"),
        (torch.optim.Adam, r"found the class torch\.optim\.adam\.Adam: make an instance of it"),
        (
            Trained(1, 1),
            r"found a .*Trained: call {function} on the optimizer in configure_optimizers, before",
        ),
        (torch.nn.Linear(1, 1), r"found a .*\.Linear: pass the optimizer of the model"),
        (3, "found a builtins.int; pass the optimizer inside it"),
    ],
    ids=["None", "class", "LightningModule", "model", "number"],
)
@pytest.mark.parametrize("function", [fuse, unfuse])
def test_what_is_no_optimizer_is_refused_with_a_remedy(
    function: Any, found: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message.format(function=function.__name__)):
        function(found)
    with pytest.raises(TypeError, match=message.format(function=function.__name__)):
        function([torch.optim.SGD(parameters(1)), found])


def test_what_has_an_optimizer_is_refused_with_a_remedy() -> None:
    found = types.SimpleNamespace(optimizer=torch.optim.SGD(parameters(1)))
    for function in (fuse, unfuse):
        with pytest.raises(TypeError, match="SimpleNamespace: pass its attribute `optimizer`"):
            function(found)


def test_a_step_replaced_on_the_object_stays(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = torch.optim.SGD(parameters(1), lr=1.0)
    calls: list[int] = []
    step = optimizer.step
    optimizer.step = lambda *args: (calls.append(1), step(*args))
    with caplog.at_level(logging.INFO, "recap_fast"):
        fuse(optimizer).step()
    assert calls == [1] and type(optimizer) is torch.optim.SGD
    assert "the step of this SGD was replaced on the object" in caplog.text


# --- unfuse of what was made fused ---------------------------------------------------------------


@pytest.mark.parametrize("algorithm", FUSED)
def test_an_optimizer_made_fused_becomes_torchs(algorithm: str) -> None:
    params = [parameters(3) for _ in range(2)]
    ours, theirs = FUSED[algorithm](params[0], lr=0.1), TORCH[algorithm](params[1], lr=0.1)
    for step in range(4):
        if step == 2:
            assert type(unfuse(ours)) is TORCH[algorithm]
        for own, optimizer in zip(params, (ours, theirs), strict=True):
            set_grads(own, step)
            optimizer.step()
    assert_same(ours, params[0], theirs, params[1])


def test_counts_are_where_torchs_fused_step_wants_them() -> None:
    """In float32, which it reads; the default of a float64 program is another."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        params = [nn.Parameter(torch.ones(3, dtype=torch.float64))]
        optimizer = FusedAdam(params)
        optimizer.param_groups[0]["fused"] = True
        set_grads(params, 0)
        optimizer.step()
        unfuse(optimizer).step()
    finally:
        torch.set_default_dtype(default)
    assert optimizer.state[params[0]]["step"].item() == 2


class OwnAdam(FusedAdam):
    pass


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda p: FusedSGD(p, clip_grad_norm=1.0), ValueError, "clip_grad_norm=1.0"),
        (OwnAdam, TypeError, "OwnAdam is derived from a class of recap_fast.optim"),
    ],
)
def test_what_torch_could_not_go_on_with_stays(make: Any, error: Any, match: str) -> None:
    bad, good = make(parameters(1)), FusedAdam(parameters(1))
    kind = type(bad)
    with pytest.raises(error, match=match):
        unfuse([good, bad])
    assert type(bad) is kind and type(good) is FusedAdam


# --- what it says --------------------------------------------------------------------------------


def test_it_says_in_one_line_what_is_native(caplog: pytest.LogCaptureFixture) -> None:
    complex_ = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    mixed = torch.optim.Adam(
        [{"params": parameters(1)}, {"params": [complex_]}, {"params": parameters(1)}]
    )
    rms = torch.optim.Adadelta(parameters(1))
    with caplog.at_level(logging.INFO, "recap_fast"):
        fuse(torch.optim.SGD(parameters(1)))
        fuse([mixed, rms])
    assert [record.getMessage() for record in caplog.records] == [
        "fuse: 1 of 1 param groups are native",
        "fuse: 2 of 4 param groups are native; group 1 of optimizer 0: complex64 parameters; "
        "group 0 of optimizer 1: Adadelta has a step of its own",
    ]


def test_torchrec_is_not_imported_for_an_optimizer_of_torch() -> None:
    code = (
        "import sys, torch; from recap_fast import fuse, unfuse\n"
        "p = torch.nn.Parameter(torch.ones(2)); p.grad = torch.ones(2)\n"
        "o = fuse(torch.optim.Adam([p])); o.step(); unfuse(o).step()\n"
        "assert not any(name.startswith(('torchrec', 'pydantic')) for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_states_are_untouched_by_the_conversion() -> None:
    params = parameters(3)
    optimizer = torch.optim.Adam(params, lr=0.1)
    optimizer.step()
    before = snapshot(optimizer, params)
    for convert in (fuse, unfuse):
        convert(optimizer)
        after = snapshot(optimizer, params)
        for old, new in zip(before[0], after[0], strict=True):
            assert torch.equal(old, new)
        for old_state, new_state in zip(before[1], after[1], strict=True):
            assert list(old_state) == list(new_state)
            assert all(torch.equal(old_state[key], new_state[key]) for key in old_state)
            assert all(isinstance(value, Tensor) for value in new_state.values())
