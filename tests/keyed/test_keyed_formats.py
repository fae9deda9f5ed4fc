"""Combined optimizers whose parameters and states are stored in other formats."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torchrec.optim import keyed

import recap_fast
from recap_fast import reference
from recap_fast.keyed import CombinedOptimizer
from recap_fast.keyed.fused import FusedCombinedOptimizer
from recap_fast.optim import FusedAdam, FusedLion, FusedSGD
from recap_fast.torch_classes import TORCH_CLASSES

NAMES = ["tower.weight", "tower.bias", "momentum", "plain", "signs"]
SHAPES = [(2, 3), (3,), (300,), (5, 2), ()]
FORMATS: dict[str, dict[str, Any]] = {
    "none": {},
    "short states": {"state_dtype": torch.bfloat16},
    "long states": {"state_dtype": torch.float32},
    "master": {"master_weights": True},
    "by chance": {"stochastic_rounding": True, "rounding_seed": 7},
}
KINDS = [*FORMATS, "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Run:
    """Parameters, and an Adam, an SGD with momentum and one without, and a Lion under keys."""

    def __init__(self, kind: str, dtype: torch.dtype, steps: int = 0, seed: int = 0) -> None:
        self.dtype = dtype
        generator = torch.Generator().manual_seed(seed)
        self.params = {
            name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            for name, shape in zip(NAMES, SHAPES, strict=True)
        }
        classes: Any = {"adam": FusedAdam, "sgd": FusedSGD, "lion": FusedLion}
        if kind == "reference":
            classes = TORCH_CLASSES
        formats = FORMATS.get(kind, {})
        combined = CombinedOptimizer if kind == "reference" else FusedCombinedOptimizer

        def part(names: dict[str, str], algorithm: str, **options: Any) -> Any:
            params = {name: self.params[own] for name, own in names.items()}
            return keyed.KeyedOptimizerWrapper(
                params, lambda p: classes[algorithm](p, lr=0.1, **options, **formats)
            )

        tower = {name.removeprefix("tower."): name for name in NAMES[:2]}
        self.optimizer = combined(
            [
                ("tower", part(tower, "adam", amsgrad=True)),
                ("", part({NAMES[2]: NAMES[2]}, "sgd", momentum=0.9)),
                ("", part({NAMES[3]: NAMES[3]}, "sgd")),
                ("", part({NAMES[4]: NAMES[4]}, "lion")),
            ]
        )
        self.step(0, steps)

    def step(self, start: int, steps: int) -> Run:
        for step in range(start, start + steps):
            generator = torch.Generator().manual_seed(100 + step)
            for param in self.params.values():
                param.grad = torch.randn(param.shape, generator=generator).to(self.dtype)
            self.optimizer.step()
        return self

    def states(self) -> dict[str, dict[str, Any]]:
        return {
            name: dict(self.optimizer.state[param])
            for name, param in self.params.items()
            if param in self.optimizer.state
        }

    def everything(self) -> dict[str, Any]:
        return copy.deepcopy(
            {"params": {name: param.detach() for name, param in self.params.items()}}
            | self.states()
        )

    def set_params(self, other: Run) -> None:
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(other.params[name])


def _assert_same(these: dict[str, dict[str, Any]], those: dict[str, dict[str, Any]]) -> None:
    assert these.keys() == those.keys()
    for name, entries in these.items():
        assert entries.keys() == those[name].keys(), name
        for key, value in entries.items():
            assert value.dtype == those[name][key].dtype
            assert torch.equal(value, those[name][key]), (name, key)


def _assert_converted(source: Run, target: Run, made: Run) -> None:
    """`target` has the states of `source`, in the formats that `made` has them in."""
    saved, loaded = source.states(), target.states()
    for name, wanted in made.states().items():
        found = loaded.get(name, {})
        assert found.keys() == wanted.keys() or not found
        assert found or not wanted.keys() & saved.get(name, {}).keys()
        for key, value in found.items():
            assert value.dtype == wanted[key].dtype
            if key in saved.get(name, {}):
                assert torch.equal(value, saved[name][key].to(value.dtype))
            elif key == "master_param":
                assert torch.equal(value, target.params[name].float())
            else:
                assert key in ("step", "param_remainder") and not value.any()


# --- goes on as it would have --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("with_groups", [False, True])
def test_a_resumed_training_is_the_undisturbed_one(
    with_groups: bool, kind: str, dtype: torch.dtype
) -> None:
    whole, first = Run(kind, dtype, 5), Run(kind, dtype, 3)
    resumed = Run(kind, dtype, seed=1)
    resumed.set_params(first)
    for run in (first, resumed):
        run.optimizer.save_param_groups(with_groups)
    file = io.BytesIO()
    torch.save(first.optimizer.state_dict(), file)
    file.seek(0)
    resumed.optimizer.load_state_dict(torch.load(file, weights_only=True))
    _assert_same(resumed.everything(), first.everything())
    _assert_same(resumed.step(3, 2).everything(), whole.everything())


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))],
    ids=["copy", "pickle"],
)
def test_copies_train_on(duplicate: Callable[..., Any], kind: str) -> None:
    whole, first = Run(kind, torch.bfloat16, 5), Run(kind, torch.bfloat16, 3)
    params, optimizer = duplicate((first.params, first.optimizer))
    other = Run(kind, torch.bfloat16)
    other.params, other.optimizer = params, optimizer
    _assert_same(other.step(3, 2).everything(), whole.everything())
    _assert_same(first.step(3, 2).everything(), whole.everything())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FORMATS)
def test_state_that_is_made_beforehand_is_that_of_the_first_step(
    kind: str, dtype: torch.dtype
) -> None:
    whole, run = Run(kind, dtype, 2), Run(kind, dtype)
    run.optimizer.init_state(count_step=False)
    before = run.everything()
    dtypes = {
        name: {key: value.dtype for key, value in entries.items()}
        for name, entries in whole.states().items()
    }
    for name, entries in run.states().items():
        assert {key: value.dtype for key, value in entries.items()} == dtypes[name]
    _assert_same(before, run.everything())
    run.step(0, 2)
    # A momentum buffer of zero is not one that the first gradient fills; without dampening it
    # becomes the same.
    _assert_same(run.everything(), whole.everything())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_momentum_that_is_yet_to_come_leaves_the_rest(dtype: torch.dtype) -> None:
    params = [nn.Parameter(torch.randn(5).to(dtype)) for _ in range(2)]
    params[1].data.copy_(params[0])
    runs = []
    for param in params:
        optimizer = FusedSGD([("w", param)], lr=0.01, master_weights=True, momentum=0.9)
        optimizer = FusedCombinedOptimizer(
            [keyed.KeyedOptimizerWrapper({"w": param}, lambda _, made=optimizer: made)]
        )
        runs.append(optimizer)
    runs[0].param_groups[0]["dampening"] = runs[1].param_groups[0]["dampening"] = 0.5
    runs[0].init_state(count_step=False)
    state = runs[0].state[params[0]]
    assert state["momentum_buffer"] is None
    rest = "param_remainder" if dtype == torch.bfloat16 else "master_param"
    assert state[rest].dtype == (torch.int16 if dtype == torch.bfloat16 else torch.float32)
    for step in range(3):
        for param, optimizer in zip(params, runs, strict=True):
            param.grad = torch.full_like(param, 0.3 + step)
            optimizer.step()
    assert torch.equal(*params)
    for key, value in runs[0].state[params[0]].items():
        assert torch.equal(value, runs[1].state[params[1]][key]), key


# --- from one format to another ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("with_groups", [False, True])
def test_every_format_loads_into_every_other(
    with_groups: bool, source: str, dtype: torch.dtype
) -> None:
    saved = Run(source, dtype, 2)
    before = saved.everything()
    for kind in KINDS:
        for steps in (0, 1):
            target = Run(kind, dtype, steps, seed=1)
            target.set_params(saved)
            if with_groups:  # but for execution, torch's have the same
                if "reference" in (kind, source) and kind != source:
                    continue
                saved.optimizer.save_param_groups(True)
                target.optimizer.save_param_groups(True)
            target.optimizer.load_state_dict(saved.optimizer.state_dict())
            _assert_converted(saved, target, Run(kind, dtype, 1))
            for group in target.optimizer.param_groups:
                found = {key: group[key] for key in FORMATS.get(kind, {}) if key != "rounding_seed"}
                expected = {**FORMATS.get(kind, {})}
                expected.pop("rounding_seed", None)
                assert found == expected
            target.step(2, 1)
    _assert_same(saved.everything(), before)


def test_a_saved_seed_counts() -> None:
    saved, own = Run("by chance", torch.bfloat16, 1), Run("master", torch.bfloat16, 1)
    for run in (saved, own):
        run.optimizer.save_param_groups(True)
    own.optimizer.load_state_dict(saved.optimizer.state_dict())
    assert {group["rounding_seed"] for group in own.optimizer.param_groups} == {7}
    plain = Run("none", torch.bfloat16, 1)
    plain.optimizer.save_param_groups(True)
    plain.optimizer.load_state_dict(saved.optimizer.state_dict())
    assert not any("rounding_seed" in group for group in plain.optimizer.param_groups)


def test_state_of_another_algorithm_is_still_refused() -> None:
    """A step count alone says nothing, but what is kept besides does."""
    source, target = Run("by chance", torch.bfloat16, 2), Run("master", torch.bfloat16, 2)
    saved = source.optimizer.state_dict()
    states = saved["state"]
    states["plain"], states["momentum"] = states["momentum"], states["plain"]
    before = target.everything()
    with pytest.raises(ValueError, match="other entries for"):
        target.optimizer.load_state_dict(saved)
    _assert_same(target.everything(), before)


# --- torch's helpers -----------------------------------------------------------------------------


def _built(kind: str, dtype: torch.dtype, seed: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)
    formats = dict(FORMATS.get(kind, {}))
    if "state_dtype" in formats:
        formats["state_dtype"] = str(formats["state_dtype"]).removeprefix("torch.")
    config = {
        "adam": {"lr": 0.1, **formats},
        "groups": {"biases": {"pattern": "bias", "sgd": {"lr": 0.1, "momentum": 0.9, **formats}}},
    }
    build = reference.build_optimizer if kind == "reference" else recap_fast.build_optimizer
    return model, build(model, config)[0]


def _train(model: nn.Module, optimizer: Any, start: int, steps: int) -> None:
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"flatten_optimizer_state_dict": True}], ids=str)
def test_torchs_helpers_move_it_exactly(
    options: dict[str, bool], dtype: torch.dtype, kind: str
) -> None:
    how = StateDictOptions(**options)
    model, optimizer = _built(kind, dtype, 0)
    _train(model, optimizer, 0, 2)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=how))
    other_model, other = _built(kind, dtype, 1)
    other_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other_model, other, saved, options=how)
    for steps in (0, 2):
        _train(model, optimizer, 2, steps)
        _train(other_model, other, 2, steps)
        for mine, theirs in zip(model.parameters(), other_model.parameters(), strict=True):
            assert torch.equal(mine, theirs)
            _assert_same({"": dict(optimizer.state[mine])}, {"": dict(other.state[theirs])})


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_torchs_helpers_move_it_between_formats(source: str, target: str) -> None:
    dtype = torch.bfloat16
    model, optimizer = _built(source, dtype, 0)
    _train(model, optimizer, 0, 2)
    saved = get_optimizer_state_dict(model, optimizer)
    other_model, other = _built(target, dtype, 1)
    other_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other_model, other, copy.deepcopy(saved))
    names: dict[str, Tensor] = dict(other_model.named_parameters())
    for name, entries in saved["state"].items():
        for key, value in entries.items():
            own = other.state[names[name]]
            assert key not in own or torch.equal(own[key], value.to(own[key].dtype))
            assert key in own or key in ("step", "param_remainder")
    _train(other_model, other, 2, 1)
