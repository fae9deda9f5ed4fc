"""State dicts, pickles and copies of optimizers that store parameters and states otherwise."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from recap_fast.optim import FusedAdam, FusedLion, FusedOptimizer, FusedSGD, float32_state
from tests.support.formats import SHORT, UPDATES, Formats, fused, parameter
from tests.support.optimizers import TORCH, assert_same, for_loop, numbers, same_bits

KINDS = {
    "none": Formats(torch.float32, torch.float32),
    "short states": Formats(torch.float32, torch.float32, torch.bfloat16),
    "half states": Formats(torch.float32, torch.float32, torch.float16),
    "none, bfloat16": Formats(torch.bfloat16, torch.bfloat16),
    "remainder": Formats(torch.bfloat16, torch.bfloat16, None, "master"),
    "remainder, long states": Formats(torch.bfloat16, torch.bfloat16, torch.float32, "master"),
    "by chance": Formats(torch.bfloat16, torch.bfloat16, None, "stochastic"),
    "by chance, long states": Formats(torch.bfloat16, torch.bfloat16, torch.float32, "stochastic"),
    "none, float16": Formats(torch.float16, torch.float16),
    "master": Formats(torch.float16, torch.float16, torch.bfloat16, "master"),
}
SHAPES = ((300,), (37, 13), (), (20_001,))


class Run:
    """Named parameters, and an optimizer of two groups."""

    def __init__(self, update: str, formats: Formats, values: Any = None, **more: Any) -> None:
        self.update, self.formats, self.more = update, formats, more
        self.params = [parameter(shape, i, formats) for i, shape in enumerate(SHAPES)]
        for param, value in zip(self.params, values or (), strict=values is not None):
            param.data.copy_(value.data)
        named = [(f"p{i}", param) for i, param in enumerate(self.params)]
        groups = [{"params": named[:2]}, {"params": named[2:], "lr": 0.01}]
        self.optimizer, self.options = fused(update, groups, formats, **more)

    def step(self, first: int, count: int) -> Run:
        for step in range(first, first + count):
            for i, param in enumerate(self.params):
                param.grad = numbers(param.shape, 100 * step + i, self.formats.grad)
            self.optimizer.step()
        return self

    def everything(self) -> list[Any]:
        states = [dict(sorted(self.optimizer.state[param].items())) for param in self.params]
        return [*(param.detach() for param in self.params), *states]


def _assert_same_run(these: list[Any], those: list[Any]) -> None:
    for a, b in zip(these, those, strict=True):
        if isinstance(a, Tensor):
            assert same_bits(a, b)
            continue
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert same_bits(value, b[name]), name


kinds = pytest.mark.parametrize("formats", KINDS.values(), ids=KINDS)


# --- goes on as it would have --------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("update", UPDATES)
def test_a_resumed_training_is_the_undisturbed_one(update: str, formats: Formats) -> None:
    """To the bit; of another seed, that of the checkpoint counts."""
    whole = Run(update, formats, rounding_seed=5).step(0, 5)
    first = Run(update, formats, rounding_seed=5).step(0, 3)
    file = io.BytesIO()
    torch.save([first.params, first.optimizer.state_dict()], file)
    file.seek(0)
    params, saved = torch.load(file, weights_only=True)
    resumed = Run(update, formats, params, rounding_seed=6)
    resumed.optimizer.load_state_dict(saved)
    _assert_same_run(resumed.everything(), first.everything())
    _assert_same_run(resumed.step(3, 2).everything(), whole.everything())


@kinds
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))],
    ids=["copy", "pickle"],
)
def test_copies_train_on_by_themselves(duplicate: Any, formats: Formats) -> None:
    whole = Run("amsgrad", formats).step(0, 5)
    first = Run("amsgrad", formats).step(0, 3)
    other = duplicate(first)
    _assert_same_run(other.step(3, 2).everything(), whole.everything())
    _assert_same_run(first.step(3, 2).everything(), whole.everything())
    keys = [key for key in ("state_dtype", "master_weights") if key in formats.options]
    assert all(other.optimizer.defaults[key] == formats.options[key] for key in keys)


@kinds
def test_torchs_helpers_move_it_exactly(formats: Formats) -> None:
    models, optimizers = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(formats.param))
        optimizers.append(fused("adam", models[-1].named_parameters(), formats)[0])
    for _ in range(2):
        for i, param in enumerate(models[0].parameters()):
            param.grad = numbers(param.shape, i, formats.grad)
        optimizers[0].step()
    saved = copy.deepcopy(get_optimizer_state_dict(models[0], optimizers[0]))
    models[1].load_state_dict(models[0].state_dict())
    set_optimizer_state_dict(models[1], optimizers[1], saved)
    for mine, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        _assert_same_run([dict(optimizers[0].state[mine])], [dict(optimizers[1].state[other])])


# --- from one format to another ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *SHORT])
@pytest.mark.parametrize("update", UPDATES)
def test_every_format_loads_into_every_other(update: str, dtype: torch.dtype) -> None:
    """Values as they are, up to the conversion; what the new format has more is made."""
    all_formats = [formats for formats in KINDS.values() if formats.param == dtype]
    runs = [Run(update, formats).step(0, 2) for formats in all_formats]
    for source in runs:
        values = source.everything()
        for formats in all_formats:
            target = Run(update, formats, source.params)
            target.optimizer.load_state_dict(copy.deepcopy(source.optimizer.state_dict()))
            fresh = Run(update, formats).step(0, 1)
            for i, param in enumerate(target.params):
                if source.optimizer.state.get(source.params[i]):
                    _check_converted(
                        source.optimizer.state[source.params[i]],
                        target.optimizer.state[param],
                        fresh.optimizer.state[fresh.params[i]],
                        param,
                    )
            for key in ("state_dtype", "master_weights", "stochastic_rounding"):
                own = [group.get(key) for group in target.optimizer.param_groups]
                assert own == [formats.options.get(key)] * 2
            target.step(2, 2)
        _assert_same_run(source.everything(), values)


def _check_converted(
    saved: dict[str, Tensor], loaded: dict[str, Tensor], made: dict[str, Tensor], param: Tensor
) -> None:
    assert loaded.keys() == made.keys()
    for name, value in loaded.items():
        assert value.dtype == made[name].dtype, name
        if name in saved:
            assert same_bits(value, saved[name].to(value.dtype)), name
        elif name == "master_param":
            assert torch.equal(value, param.detach().float())
        else:
            assert name in ("step", "param_remainder")
            assert not value.any()


@kinds
@pytest.mark.parametrize("update", [name for name in UPDATES if name != "lion"])
def test_states_of_torch_are_converted(update: str, formats: Formats) -> None:
    algorithm, _ = UPDATES[update]
    target = Run(update, formats)
    alike = [nn.Parameter(param.detach().clone()) for param in target.params]
    theirs = for_loop(algorithm, [{"params": alike[:2]}, {"params": alike[2:]}], **target.options)
    for i, param in enumerate(alike):
        param.grad = numbers(param.shape, i, param.dtype)
    theirs.step()
    target.optimizer.load_state_dict(theirs.state_dict())
    for param, other in zip(target.params, alike, strict=True):
        for name, value in theirs.state[other].items():
            if value is not None and name != "step":
                assert same_bits(
                    target.optimizer.state[param][name], value.to(formats.stored_state)
                )
    target.step(1, 1)


def test_a_refused_state_dict_changes_nothing() -> None:
    run = Run("adam", KINDS["remainder"]).step(0, 2)
    before = copy.deepcopy(run.everything())
    groups = [dict(group) for group in run.optimizer.param_groups]
    saved = run.optimizer.state_dict()
    saved["param_groups"] = saved["param_groups"][:1]
    with pytest.raises(ValueError, match="parameter group"):
        run.optimizer.load_state_dict(saved)
    _assert_same_run(run.everything(), before)
    assert [group.keys() for group in groups] == [g.keys() for g in run.optimizer.param_groups]


def test_hooks_see_tensors() -> None:
    """Those that change a state dict before it is loaded, and those that look at it after."""
    run = Run("adam", KINDS["short states"]).step(0, 2)
    seen: list[Any] = []

    def double(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {
            key: {**entries, "exp_avg": entries["exp_avg"] * 2}
            for key, entries in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    run.optimizer.register_load_state_dict_pre_hook(double)
    run.optimizer.register_load_state_dict_post_hook(
        lambda optimizer: seen.append(optimizer.state[run.params[0]]["exp_avg"].dtype)
    )
    before = run.optimizer.state[run.params[0]]["exp_avg"].clone()
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    after = run.optimizer.state[run.params[0]]["exp_avg"]
    assert seen == [torch.bfloat16]
    assert same_bits(after, before * 2)


# --- float32_state -------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("update", UPDATES)
def test_torchs_class_goes_on_from_it(update: str, formats: Formats) -> None:
    run = Run(update, formats, rounding_seed=3).step(0, 2)
    before = copy.deepcopy(run.everything())
    found = float32_state(run.optimizer)
    _assert_same_run(run.everything(), before)
    algorithm, _ = UPDATES[update]
    alike = [nn.Parameter(param.detach().clone()) for param in run.params]
    options = {key: value for key, value in run.options.items() if key != "rounding_seed"}
    theirs = TORCH[algorithm]([{"params": alike[:2]}, {"params": alike[2:]}], **options)
    plain = copy.deepcopy(theirs)
    for param in plain.param_groups[0]["params"] + plain.param_groups[1]["params"]:
        param.grad = torch.zeros_like(param)
    plain.step()
    expected = plain.state_dict()
    assert found["state"].keys() == expected["state"].keys()
    for key, entries in found["state"].items():
        wanted = expected["state"][key]
        assert entries.keys() == {name for name, value in wanted.items() if value is not None}
        own = run.optimizer.state[run.params[key]]
        for name, value in entries.items():
            assert value.dtype == torch.float32
            assert torch.equal(value, own[name].float())
    for group, wanted in zip(found["param_groups"], expected["param_groups"], strict=True):
        assert group.keys() - {"param_names"} == wanted.keys()
    theirs.load_state_dict(copy.deepcopy(found))
    for i, param in enumerate(alike):
        param.grad = numbers(param.shape, i, param.dtype)
    theirs.step()


def test_float32_state_of_float32_is_torchs() -> None:
    run = Run("adam", KINDS["none"]).step(0, 2)
    other = Run("adam", KINDS["none"], run.params)
    other.optimizer.load_state_dict(float32_state(run.optimizer))
    assert_same(run.optimizer, run.params, other.optimizer, other.params, rtol=0)


def test_float64_stays() -> None:
    param = nn.Parameter(numbers((3,), 0, torch.float64))
    optimizer = FusedAdam([param], master_weights=True)
    param.grad = torch.ones_like(param)
    optimizer.step()
    (state,) = float32_state(optimizer)["state"].values()
    assert state["exp_avg"].dtype == torch.float64


@pytest.mark.parametrize("kind", [FusedSGD, FusedLion])
def test_what_torch_counts_not_is_left_out(kind: type[FusedOptimizer]) -> None:
    param = nn.Parameter(numbers((3,), 0, torch.bfloat16))
    optimizer = kind([param], stochastic_rounding=True)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert "step" in optimizer.state[param]
    states = float32_state(optimizer)["state"]
    assert [list(state) for state in states.values()] == [["exp_avg"]] * (kind is FusedLion)


def test_another_optimizer_has_none() -> None:
    optimizer: Any = torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    with pytest.raises(TypeError, match=r"found a torch\.optim\.adam\.Adam"):
        float32_state(optimizer)
