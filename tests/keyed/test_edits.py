"""State and param groups of a combined optimizer, edited by hand: as on a torch optimizer.

Every trajectory is compared with `torch.optim` optimizers that were edited alike.
"""

from __future__ import annotations

import collections
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import keyed
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.warmup import WarmupOptimizer, WarmupStage

import recap_fast
from recap_fast import checkpoint, reference
from recap_fast.config import EmbeddingOptimizerConfig
from recap_fast.embeddings import fuse_embeddings
from recap_fast.keyed import CombinedOptimizer, leaves
from recap_fast.keyed.fused import FusedCombinedOptimizer
from recap_fast.optim import FusedAdam, FusedSGD
from recap_fast.scheduler import RecapLRShim
from tests.support.models import (
    EmbeddingRanker,
    Ranker,
    constant,
    features,
    multi_task_config,
    ramp,
    tables,
)

both = pytest.mark.parametrize("kind", ["reference", "fused"])

NAMES = ["tower", "backbone", "table"]


def _parameters(seed: int, count: int = 3) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(2, 3, generator=generator)) for _ in range(count)]


def _set_grads(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


class Separate:
    """Adam, Adam and SGD with momentum, of torch, as one: what is expected."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.members: list[torch.optim.Optimizer] = [
            torch.optim.Adam([params[0]], lr=0.1),
            torch.optim.Adam([params[1]], lr=0.05),
            torch.optim.SGD([params[2]], lr=0.1, momentum=0.9),
        ]

    def step(self) -> None:
        for member in self.members:
            member.step()


class Run:
    """A combined optimizer, and torch's for twins of its parameters."""

    def __init__(self, kind: str, steps: int = 3) -> None:
        self.params, self.twins = _parameters(0), _parameters(0)
        self.torch = Separate(self.twins)
        fused = kind == "fused"
        adam, sgd = (FusedAdam, FusedSGD) if fused else (torch.optim.Adam, torch.optim.SGD)
        make = FusedCombinedOptimizer if fused else CombinedOptimizer
        wrap = keyed.KeyedOptimizerWrapper
        self.optimizer = make(
            [
                (NAMES[0], wrap({"w": self.params[0]}, lambda p: adam(p, lr=0.1))),
                (NAMES[1], wrap({"w": self.params[1]}, lambda p: adam(p, lr=0.05))),
                (NAMES[2], wrap({"w": self.params[2]}, lambda p: sgd(p, lr=0.1, momentum=0.9))),
            ]
        )
        self.taken = 0
        self.steps(steps)

    def steps(self, count: int) -> None:
        for _ in range(count):
            for params in (self.params, self.twins):
                _set_grads(params, self.taken)
            self.optimizer.step()
            self.torch.step()
            self.taken += 1

    def add(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Another parameter and its twin, which a test puts into groups."""
        for params in (self.params, self.twins):
            params += _parameters(10 + len(params), 1)
        return self.params[-1], self.twins[-1]

    def assert_alike(self) -> None:
        for index, (mine, twin) in enumerate(zip(self.params, self.twins, strict=True)):
            torch.testing.assert_close(mine, twin, msg=lambda m, i=index: f"parameter {i}: {m}")


# --- state ---------------------------------------------------------------------------------------


def _clear(states: list[Any], params: list[nn.Parameter]) -> None:
    for state in states:
        state.clear()


def _delete_one(states: list[Any], params: list[nn.Parameter]) -> None:
    for state in states:
        if params[1] in state:
            del state[params[1]]


def _pop_one(states: list[Any], params: list[nn.Parameter]) -> None:
    assert sum(state.pop(params[2], None) is not None for state in states) == 1


def _pop_all(states: list[Any], params: list[nn.Parameter]) -> None:
    for state in states:
        for param in list(state):
            assert state.pop(param)
        assert not state


def _popitem(states: list[Any], params: list[nn.Parameter]) -> None:
    for state in states:
        while state:
            state.popitem()


def _replace_entries(states: list[Any], params: list[nn.Parameter]) -> None:
    for state in states:
        if params[0] in state:
            state[params[0]] = {k: torch.ones_like(v) for k, v in state[params[0]].items()}


def _replace_one_entry(states: list[Any], params: list[nn.Parameter]) -> None:
    for state in states:
        if params[0] in state:
            state[params[0]]["exp_avg"] = torch.ones(2, 3)


def _update(states: list[Any], params: list[nn.Parameter]) -> None:
    for state in states:
        state.update({p: {k: v * 2 for k, v in e.items()} for p, e in state.items()})


@both
@pytest.mark.parametrize(
    "edit",
    [
        *(_clear, _delete_one, _pop_one, _pop_all, _popitem),
        *(_replace_entries, _replace_one_entry, _update),
    ],
)
def test_editing_state_does_what_it_does_in_torch(kind: str, edit: Callable[..., None]) -> None:
    run = Run(kind)
    edit([run.optimizer.state], run.params)
    edit([member.state for member in run.torch.members], run.twins)
    run.steps(3)
    run.assert_alike()
    count = run.optimizer.state[run.params[0]]["step"]
    assert count == run.torch.members[0].state[run.twins[0]]["step"]


@both
def test_assigning_state(kind: str) -> None:
    run = Run(kind)
    kept = copy.deepcopy(run.optimizer.state_dict()["state"])
    run.optimizer.state = run.optimizer.state  # changes nothing
    assert len(run.optimizer.state) == 3
    run.optimizer.state = collections.defaultdict(dict)
    for member in run.torch.members:
        member.state = collections.defaultdict(dict)
    run.steps(2)
    run.assert_alike()
    run.optimizer.state = {
        param: copy.deepcopy(kept[f"{name}.w"])
        for name, param in zip(NAMES[:2], run.params[:2], strict=True)
    }
    for index, member in enumerate(run.torch.members):
        member.state = collections.defaultdict(dict)
        if index < 2:
            member.state[run.twins[index]] = copy.deepcopy(kept[f"{NAMES[index]}.w"])
    run.steps(2)
    run.assert_alike()


@both
def test_state_reads_like_a_defaultdict(kind: str) -> None:
    run = Run(kind, steps=0)
    param = run.params[1]
    assert not run.optimizer.state and len(run.optimizer.state) == 0
    assert run.optimizer.state.get(param) is None and param not in run.optimizer.state
    run.optimizer.state[param]["note"] = 3  # torch's creates it
    assert list(run.optimizer.state) == [param]
    del run.optimizer.state[param]
    with pytest.raises(KeyError):
        del run.optimizer.state[param]
    run.steps(1)
    assert [p for p, _ in run.optimizer.state.items()] == run.params
    assert [sorted(entries) for entries in run.optimizer.state.values()] == [
        ["exp_avg", "exp_avg_sq", "step"],
        ["exp_avg", "exp_avg_sq", "step"],
        ["momentum_buffer"],
    ]
    for copied in (copy.copy(run.optimizer.state), copy.deepcopy(run.optimizer.state)):
        assert type(copied) is dict and len(copied) == 3
    assert "momentum_buffer" in repr(run.optimizer.state)


@both
def test_what_a_user_keeps_there_by_name_is_saved_and_loaded(kind: str) -> None:
    run, resumed = Run(kind), Run(kind, steps=0)
    run.optimizer.state["note"] = [3, "x"]
    run.steps(1)
    saved = copy.deepcopy(run.optimizer.state_dict())
    assert saved["state"]["note"] == [3, "x"]
    resumed.optimizer.load_state_dict(saved)
    assert resumed.optimizer.state["note"] == [3, "x"]
    resumed.optimizer.load_state_dict(saved)
    run.optimizer.state["note"] = {"seen": 1}  # which could be the state of a parameter
    with pytest.raises(ValueError, match="such as 'note'"):
        resumed.optimizer.load_state_dict(run.optimizer.state_dict())


@both
def test_state_of_a_stranger_has_no_name(kind: str) -> None:
    run = Run(kind)
    run.optimizer.state[nn.Parameter(torch.ones(7))] = {"x": torch.ones(7)}  # as torch allows
    with pytest.raises(ValueError, match=r"shape \(7,\) that is in no param group"):
        run.optimizer.state_dict()


@both
def test_what_reading_creates_does_not_hinder_loading(kind: str) -> None:
    """Plain SGD has no state; looking for it leaves an empty dict, in torch too."""
    params = _parameters(0, 2)
    sgd, make = (FusedSGD, FusedCombinedOptimizer)
    if kind == "reference":
        sgd, make = torch.optim.SGD, CombinedOptimizer
    one, other = (
        make([(str(i), keyed.KeyedOptimizerWrapper({"w": p}, sgd)) for i, p in enumerate(params)])
        for _ in range(2)
    )
    assert one.state[params[0]] == {}
    assert one.state_dict()["state"] == {"0.w": {}}
    other.load_state_dict(one.state_dict())
    other.state[params[1]]
    one.load_state_dict(other.state_dict())
    assert set(one.state) == set(params)


# --- param groups --------------------------------------------------------------------------------


def _added(run: Run, how: str) -> None:
    mine, twin = run.add()
    options = {"params": [mine], "lr": 0.5, "betas": (0.5, 0.75)}
    if how == "add_param_group":
        run.optimizer.add_param_group(options)
    elif how == "named":
        run.optimizer.add_param_group({**options, "params": [("late.w", mine)]})
    elif how == "iadd":
        run.optimizer.param_groups += [{**run.optimizer.param_groups[0], **options}]
    elif how == "assigned":
        groups = [*run.optimizer.param_groups, {**run.optimizer.param_groups[0], **options}]
        run.optimizer.param_groups = groups
    else:
        run.optimizer.param_groups.append({**run.optimizer.param_groups[0], **options})
    run.torch.members.append(torch.optim.Adam([twin], lr=0.5, betas=(0.5, 0.75)))


HOW = pytest.mark.parametrize("how", ["add_param_group", "named", "append", "iadd", "assigned"])


@both
@HOW
def test_a_group_can_be_added(kind: str, how: str) -> None:
    run = Run(kind)
    _added(run, how)
    assert [len(group["params"]) for group in run.optimizer.param_groups] == [1] * 4
    assert run.optimizer.param_groups[-1]["params"][0] is run.params[-1]  # last, as in torch
    run.steps(3)
    run.optimizer.param_groups[-1]["lr"] = run.torch.members[-1].param_groups[0]["lr"] = 0.01
    run.steps(2)
    run.assert_alike()


@both
@HOW
def test_a_checkpoint_has_the_added_group(kind: str, how: str) -> None:
    """Under the name that it was given, or else its place; as for whoever adds it again."""
    run = Run(kind)
    _added(run, how)
    run.steps(2)
    run.optimizer.save_param_groups(True)
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    name = "late.w" if how == "named" else "param_groups.3.params.0"
    assert [*saved["state"]] == [*run.optimizer.params] == [*(f"{n}.w" for n in NAMES), name]

    for other in ("fused", "reference"):
        resumed = Run(other, steps=0)
        with pytest.raises(ValueError, match=f"such as '{name}'"):
            resumed.optimizer.load_state_dict(saved)
        _added(resumed, how)
        resumed.optimizer.save_param_groups(True)
        resumed.optimizer.param_groups[-1]["lr"] = 7.0
        resumed.optimizer.load_state_dict(saved)
        assert resumed.optimizer.param_groups[-1]["lr"] == 0.5
        with torch.no_grad():
            for mine, param in zip(resumed.params, run.params, strict=True):
                mine.copy_(param)
        twin = copy.deepcopy((run.params, run.optimizer))
        for seed in range(2):
            _set_grads(resumed.params, seed)
            _set_grads(twin[0], seed)
            resumed.optimizer.step()
            twin[1].step()
        for mine, param in zip(resumed.params, twin[0], strict=True):
            torch.testing.assert_close(mine, param)


@both
def test_a_group_goes_to_an_optimizer_with_its_options(kind: str) -> None:
    run = Run(kind)
    mine, twin = run.add()
    run.optimizer.add_param_group({"params": mine, "momentum": 0.5, "name": "late"})
    run.torch.members.append(torch.optim.SGD([twin], lr=0.1, momentum=0.5))
    run.steps(3)
    run.assert_alike()
    assert run.optimizer.param_groups[-1]["name"] == "late"
    before = len(run.optimizer.param_groups)
    for group, message in (
        ({"params": [nn.Parameter(torch.ones(2))], "betas": (0, 0), "momentum": 0.5}, "has all of"),
        ({"params": [run.params[0]]}, "more than one parameter group"),
    ):
        with pytest.raises(ValueError, match=message):
            run.optimizer.add_param_group(group)
    with pytest.raises(TypeError, match="must be a dict"):
        run.optimizer.add_param_group([mine])
    with pytest.raises(ValueError, match=r"lacks betas, .*add_param_group fills in"):
        run.optimizer.param_groups.append({"params": [], "lr": 0.1, "eps": 1.0})
    assert len(run.optimizer.param_groups) == before


@both
def test_groups_can_be_taken_away_and_replaced(kind: str) -> None:
    run = Run(kind)
    group = run.optimizer.param_groups.pop(1)
    assert group["params"] == [run.params[1]]
    member = run.torch.members.pop(1)
    run.steps(2)
    run.assert_alike()
    run.optimizer.param_groups.append(group)  # at the end, in an optimizer of its own
    assert len(run.optimizer.param_groups) == 3
    run.optimizer.param_groups[0] = {**run.optimizer.param_groups[0], "lr": 0.25}
    run.torch.members[0].param_groups[0] = {**run.torch.members[0].param_groups[0], "lr": 0.25}
    run.torch.members.append(torch.optim.Adam([run.twins[1]], lr=0.05))
    run.torch.members[-1].state[run.twins[1]] = member.state[run.twins[1]]
    run.steps(2)
    run.assert_alike()


@both
def test_a_parameter_takes_its_state_to_another_group(kind: str) -> None:
    """As in torch, where one state is for all groups; if the other is of the same algorithm."""
    run = Run(kind)
    adam = torch.optim.Adam(
        [{"params": [run.twins[0]], "lr": 0.1}, {"params": [run.twins[1]], "lr": 0.05}]
    )
    for index in range(2):
        adam.state[run.twins[index]] = run.torch.members[index].state[run.twins[index]]
    run.torch.members[:2] = [adam]
    for groups, param in (
        (run.optimizer.param_groups, run.params[0]),
        (adam.param_groups, run.twins[0]),
    ):
        groups[0]["params"].remove(param)
        groups[1]["params"].append(param)
    run.steps(3)
    run.assert_alike()
    assert len(run.optimizer.state) == 3
    assert [*run.optimizer.state_dict()["state"]] == ["backbone.w", "tower.w", "table.w"]

    moved = run.optimizer.param_groups[1]["params"].pop()
    adam.param_groups[1]["params"].pop()
    run.optimizer.param_groups[2]["params"].append(moved)
    run.torch.members[1].param_groups[0]["params"].append(run.twins[0])
    run.steps(2)
    run.assert_alike()
    assert list(run.optimizer.state[moved]) == ["momentum_buffer"]


def _exchange(groups: Any, params: list[Any]) -> None:
    groups[0]["params"][0], groups[1]["params"][0] = params[1], params[0]


def _move(groups: Any, params: list[Any]) -> None:
    groups[1]["params"].append(groups[0]["params"].pop())


def _make_state(run: Run) -> None:
    run.optimizer.init_state(count_step=False)


def _save_and_load(run: Run) -> None:
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))


def _read(run: Run) -> None:
    assert all(run.optimizer.state[param] for param in run.params)


@both
@pytest.mark.parametrize("change", [_move, _exchange])
@pytest.mark.parametrize("between", [None, _make_state, _save_and_load, _read])
def test_what_comes_before_the_next_step_finds_the_state(
    kind: str, change: Callable[..., None], between: Callable[[Run], None] | None
) -> None:
    run = Run(kind)
    adam = torch.optim.Adam(
        [{"params": [run.twins[0]], "lr": 0.1}, {"params": [run.twins[1]], "lr": 0.05}]
    )
    for index in range(2):
        adam.state[run.twins[index]] = run.torch.members[index].state[run.twins[index]]
    run.torch.members[:2] = [adam]
    change(run.optimizer.param_groups, run.params)
    change(adam.param_groups, run.twins)
    if between is not None:
        between(run)
    run.steps(3)
    run.assert_alike()
    assert run.optimizer.state[run.params[0]]["step"] == 6
    saved = run.optimizer.state_dict()["state"]
    assert all(saved[f"{name}.w"]["step"] == 6 for name in NAMES[:2])


@both
@pytest.mark.parametrize("left", [{}, {"exp_avg": None}])
def test_nothing_that_was_left_hides_the_state(kind: str, left: dict[str, Any]) -> None:
    """As an empty dict, which looking for state makes."""
    run = Run(kind, steps=0)
    run.optimizer.state[run.params[0]].update(left)
    _move(run.optimizer.param_groups, run.params)
    run.torch.members[0] = torch.optim.Adam([run.twins[0]], lr=0.05)
    run.steps(2)
    run.assert_alike()
    assert run.optimizer.state[run.params[0]]["step"] == 2
    assert dict(run.optimizer.state.items())[run.params[0]]["step"] == 2
    assert run.optimizer.state.get(run.params[0])["step"] == 2
    assert run.optimizer.state_dict()["state"]["tower.w"]["step"] == 2


@both
def test_momentum_goes_on_in_another_group(kind: str) -> None:
    """It is not taken for the first step, in which dampening does not count."""
    params, twins = _parameters(0, 2), _parameters(0, 2)
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    fused = kind == "fused"
    make = FusedCombinedOptimizer if fused else CombinedOptimizer
    sgd = FusedSGD if fused else torch.optim.SGD
    optimizer = make(
        [
            (str(i), keyed.KeyedOptimizerWrapper({"w": param}, lambda p: sgd(p, **options)))
            for i, param in enumerate(params)
        ]
    )
    expected = torch.optim.SGD([{"params": [twin]} for twin in twins], **options)
    for seed in range(4):
        if seed == 2:
            for each in (optimizer, expected):
                each.param_groups[1]["params"].append(each.param_groups[0]["params"].pop())
        for each, own in ((optimizer, params), (expected, twins)):
            _set_grads(own, seed)
            each.step()
    for mine, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(mine, twin)


@both
def test_all_made_anew(kind: str) -> None:
    """As pruning and restarts do it."""
    run = Run(kind)
    run.optimizer.param_groups.clear()
    run.optimizer.state.clear()
    assert run.optimizer.param_groups == [] and not run.optimizer.state
    run.optimizer.add_param_group({"params": run.params, "lr": 0.125})
    run.torch.members = [torch.optim.Adam(run.twins, lr=0.125)]
    run.steps(3)
    run.assert_alike()
    saved = run.optimizer.state_dict()["state"]
    assert [*saved] == [f"{name}.w" for name in NAMES]  # the names that they always had


@both
@pytest.mark.parametrize("how", ["insert", "reverse", "assigned"])
def test_groups_keep_their_order(kind: str, how: str) -> None:
    run = Run(kind)
    before = list(run.optimizer.param_groups)
    with pytest.raises(ValueError, match="keep their order"):
        if how == "insert":
            run.optimizer.param_groups.insert(0, {**before[0], "params": []})
        elif how == "reverse":
            run.optimizer.param_groups.reverse()
        else:
            run.optimizer.param_groups = before[::-1]
    assert all(a is b for a, b in zip(run.optimizer.param_groups, before, strict=True))


@both
def test_a_list_that_is_held_is_brought_up_to_date_before_it_is_edited(kind: str) -> None:
    run = Run(kind)
    groups = run.optimizer.param_groups
    _added(run, "add_param_group")
    del groups[0]
    assert len(groups) == len(run.optimizer.param_groups) == 3
    assert type(copy.deepcopy(groups)) is type(pickle.loads(pickle.dumps(groups))) is list


@both
def test_parameters_of_a_group_can_be_edited(kind: str) -> None:
    run = Run(kind)
    mine, twin = run.add()
    run.optimizer.param_groups[0]["params"].append(mine)
    run.torch.members[0].param_groups[0]["params"].append(twin)
    run.optimizer.param_groups[1]["params"].remove(run.params[1])
    run.torch.members[1].param_groups[0]["params"].remove(run.twins[1])
    run.steps(3)
    run.assert_alike()
    saved = copy.deepcopy(run.optimizer.state_dict())
    assert [*saved["state"]] == ["tower.w", "param_groups.0.params.1", "backbone.w", "table.w"]

    resumed = Run(kind, steps=0)
    extra, _ = resumed.add()
    resumed.optimizer.param_groups[0]["params"].append(extra)
    resumed.optimizer.param_groups[1]["params"].clear()
    resumed.optimizer.load_state_dict(saved)
    # What is in no group keeps its state, until it is put back.
    resumed.optimizer.param_groups[1]["params"].append(resumed.params[1])
    run.optimizer.param_groups[1]["params"].append(run.params[1])
    run.torch.members[1].param_groups[0]["params"].append(run.twins[1])
    with torch.no_grad():
        for mine, param in zip(resumed.params, run.params, strict=True):
            mine.copy_(param)
    taken = run.taken
    run.steps(2)
    run.assert_alike()
    for step in (taken, taken + 1):
        _set_grads(resumed.params, step)
        resumed.optimizer.step()
    for mine, param in zip(resumed.params, run.params, strict=True):
        torch.testing.assert_close(mine, param)


def test_a_plan_is_told_of_the_added_optimizer() -> None:
    """One native call for all, hooks, and the clipping of the whole."""
    run = Run("fused")
    combined = FusedCombinedOptimizer(run.optimizer.optimizers, clip_grad_norm=0.5)
    run.optimizer = combined
    _set_grads(run.params, 0)
    combined.step()
    mine, _ = run.add()
    combined.add_param_group({"params": [mine], "lr": 0.1})
    _set_grads(run.params, 1)
    combined.step()
    grads = torch.stack([param.grad.norm() for param in run.params])
    assert combined.grad_norm == pytest.approx(grads.norm().item(), rel=1e-6)
    assert combined._others == [] and len(combined._native) == 4


def test_torchrecs_own_can_be_edited_once_it_is_fused() -> None:
    params = _parameters(0, 2)
    twins = _parameters(0, 2)
    optimizer = keyed.CombinedOptimizer(
        [
            (str(i), keyed.KeyedOptimizerWrapper({"w": param}, torch.optim.Adam))
            for i, param in enumerate(params)
        ]
    )
    expected = torch.optim.Adam([{"params": [twin]} for twin in twins])

    def step(seed: int) -> None:
        for each, own in ((optimizer, params), (expected, twins)):
            _set_grads(own, seed)
            each.step()

    step(0)
    recap_fast.fuse(optimizer)
    for each, own in ((optimizer, params), (expected, twins)):
        own += _parameters(5, 1)
        each.add_param_group({"params": own[-1:], "lr": 0.25})
        del each.state[own[0]]
    step(1)
    recap_fast.unfuse(optimizer)
    step(2)
    for mine, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(mine, twin)


# --- what stands around --------------------------------------------------------------------------


def _wrapped(kind: str) -> tuple[Any, list[nn.Parameter]]:
    params = _parameters(0, 2)
    adam = FusedAdam if kind == "fused" else torch.optim.Adam
    parts = [
        keyed.KeyedOptimizerWrapper({"w": param}, lambda p: adam(p, lr=0.1)) for param in params
    ]
    clipped = GradientClippingOptimizer(parts[0], GradientClipping.VALUE, max_gradient=0.5)
    warm = WarmupOptimizer(parts[1], [WarmupStage(max_iters=10, value=0.0)], lr=0.1)
    make = FusedCombinedOptimizer if kind == "fused" else CombinedOptimizer
    return make([("a", clipped), ("b", warm)]), params


@both
def test_under_torchrecs_wrappers(kind: str) -> None:
    """State that is cleared starts anew, the warm-up too; a group needs to say who wraps it."""
    optimizer, params = _wrapped(kind)
    fresh, fresh_params = _wrapped(kind)
    for seed in range(3):
        _set_grads(params, seed)
        optimizer.step()
    optimizer.state.clear()
    optimizer.param_groups[1]["lr"] = fresh.param_groups[1]["lr"]
    with torch.no_grad():
        for mine, param in zip(fresh_params, params, strict=True):
            mine.copy_(param)
    for seed in range(3):
        for each, own in ((optimizer, params), (fresh, fresh_params)):
            _set_grads(own, seed)
            each.step()
    for mine, param in zip(fresh_params, params, strict=True):
        assert torch.equal(mine, param)
    with pytest.raises(ValueError, match=r"append a pair .* to optimizer\.optimizers"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.1})

    late = nn.Parameter(torch.ones(2))
    member = keyed.KeyedOptimizerWrapper(
        {"w": late}, lambda p: (FusedAdam if kind == "fused" else torch.optim.Adam)(p, lr=0.5)
    )
    optimizer.optimizers.append(("late", member))
    late.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(late.detach(), torch.full((2,), 0.5))
    assert [*optimizer.params] == ["a.w", "b.w", "b.__warmup", "late.w"]


@both
def test_a_warm_up_around_a_combined_optimizer_is_in_its_checkpoint(kind: str) -> None:
    def make() -> tuple[Any, Run]:
        run = Run(kind, steps=0)
        stages = [WarmupStage(max_iters=10, value=0.0)]
        return WarmupOptimizer(run.optimizer, stages, lr=0.1), run

    whole, run = make()
    for seed in range(4):
        _set_grads(run.params, seed)
        whole.step()
    resumed, other = make()
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert whole.param_groups[0]["lr"] == resumed.param_groups[0]["lr"] == pytest.approx(0.04)
    names = [*(f"{name}.w" for name in NAMES), "__warmup"]
    assert [*other.optimizer.params] == names == [*copy.deepcopy(other.optimizer).params]


@both
def test_a_group_added_to_a_nested_optimizer_is_seen_outside(kind: str) -> None:
    run = Run(kind)
    outer = (FusedCombinedOptimizer if kind == "fused" else CombinedOptimizer)(
        [("all", run.optimizer)]
    )
    mine, twin = run.add()
    run.optimizer.add_param_group({"params": [mine], "lr": 0.5})
    run.torch.members.append(torch.optim.Adam([twin], lr=0.5))
    run.optimizer = outer
    run.steps(2)
    run.assert_alike()
    assert len(outer.param_groups) == 4 and mine in outer.state


def _shim(optimizer: Any) -> RecapLRShim:
    rates = {"a": ramp(0.5, 8), "b": constant(0.25), "c": ramp(0.125, 4)}
    return RecapLRShim(optimizer, rates)


@both
@HOW
def test_an_added_group_keeps_the_rate_it_was_given(kind: str, how: str) -> None:
    run = Run(kind, steps=0)
    scheduler = _shim(run.optimizer)
    run.steps(1)
    _added(run, how)
    for _ in range(2):
        scheduler.step()
    rates = [group["lr"] for group in run.optimizer.param_groups]
    assert rates == [0.125, 0.25, 0.0625, 0.5] == scheduler.get_last_lr()
    run.optimizer.param_groups[-1]["lr"] = 0.75
    scheduler.load_state_dict(scheduler.state_dict())
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.125, 0.25, 0.0625, 0.75]
    both_parts = (run.optimizer, scheduler)
    optimizer, scheduler = pickle.loads(pickle.dumps(both_parts))
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1875, 0.25, 0.09375, 0.75]


@both
def test_schedules_stay_with_their_groups(kind: str) -> None:
    """Where one is taken away, and where one is added to an optimizer inside."""
    run = Run(kind, steps=0)
    scheduler = _shim(run.optimizer)
    run.optimizer.param_groups.pop(1)
    run.optimizer.optimizers[0][1]._optimizer.add_param_group(
        {"params": [nn.Parameter(torch.ones(2))], "lr": 3.0}
    )
    run.optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.0625, 3.0, 0.03125]


@both
def test_a_torch_scheduler_says_so_as_it_does_in_torch(kind: str) -> None:
    messages = []
    for run in (Run(kind), None):
        params = _parameters(0)
        optimizer = run.optimizer if run else torch.optim.Adam(params, lr=0.1)
        scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
        optimizer.step()
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.1})
        try:
            scheduler.step()
            messages.append(None)
        except ValueError as error:
            messages.append(str(error))
    assert messages[0] == messages[1]


@both
@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_after_edits(kind: str, how: str) -> None:
    run = Run(kind)
    _shim(run.optimizer)
    _added(run, "append")
    run.optimizer.param_groups[0]["params"].append(run.add()[0])
    run.steps(1)
    everything = (run.params, run.optimizer)
    params, optimizer = (
        copy.deepcopy(everything) if how == "deepcopy" else pickle.loads(pickle.dumps(everything))
    )
    assert [*optimizer.params] == [*run.optimizer.params]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.1})
    assert len(run.optimizer.param_groups) == 4  # the copy is its own
    for each, own in ((optimizer, params), (run.optimizer, run.params)):
        _set_grads(own, 50)
        each.step()
    for mine, other in zip(params, run.params, strict=True):
        assert torch.equal(mine, other)


# --- fused tables, and what build_optimizer returns ----------------------------------------------

EMBEDDINGS = EmbeddingOptimizerConfig(learning_rate=constant(0.125), rowwise_adagrad={})


def _with_tables(kind: str) -> tuple[nn.Module, Any, RecapLRShim]:
    torch.manual_seed(0)
    model = fuse_embeddings(EmbeddingRanker(), EMBEDDINGS)
    build = recap_fast.build_optimizer if kind == "fused" else reference.build_optimizer
    return model, *build(model, multi_task_config(), EMBEDDINGS)


def _train(model: nn.Module, optimizer: Any, scheduler: Any, seeds: range) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        model(features(seed)).square().sum().backward()
        optimizer.step()
        scheduler.step()


@both
@pytest.mark.parametrize("how", ["clear", "assign"])
def test_clearing_resets_fused_tables_too(kind: str, how: str) -> None:
    model, optimizer, scheduler = _with_tables(kind)
    _train(model, optimizer, scheduler, range(3))
    fresh = _with_tables(kind)
    fresh[0].load_state_dict(model.state_dict())
    fresh[2].load_state_dict(scheduler.state_dict())
    if how == "clear":
        optimizer.state.clear()
    else:
        optimizer.state = collections.defaultdict(dict)
    for run in ((model, optimizer, scheduler), fresh):
        _train(*run, range(3, 6))
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh[0].state_dict()[name]), name


@both
def test_clearing_resets_torchrecs_own_fused_tables(kind: str) -> None:
    def make() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        collection = FusedEmbeddingBagCollection(
            tables=tables(),
            optimizer_type=torch.optim.Adagrad,
            optimizer_kwargs={"lr": 0.5},
            location=EmbeddingLocation.HOST,
        )
        combine = FusedCombinedOptimizer if kind == "fused" else CombinedOptimizer
        return collection, combine([collection.fused_optimizer()])

    def train(model: nn.Module, optimizer: Any, seeds: range) -> None:
        for seed in seeds:
            model(features(seed)).values().square().sum().backward()
            optimizer.step()

    used, fresh = make(), make()
    train(*used, range(3))
    used[1].state.clear()
    assert len(used[1].state) == 2
    fresh[0].load_state_dict(used[0].state_dict())
    for run in (used, fresh):
        train(*run, range(3, 6))
    for name, value in used[0].state_dict().items():
        assert torch.equal(value, fresh[0].state_dict()[name]), name


@both
def test_the_state_of_a_fused_table_cannot_be_taken_away_or_replaced(kind: str) -> None:
    model, optimizer, scheduler = _with_tables(kind)
    _train(model, optimizer, scheduler, range(2))
    (leaf,) = (leaf for leaf in leaves(optimizer) if hasattr(leaf, "_emb_module"))
    table = next(iter(leaf.params.values()))
    name = r"ebc\.embedding_bags\.t_user\.weight"
    for edit in (
        lambda: optimizer.state.pop(table),
        lambda: optimizer.state.update({table: {"sum": torch.zeros(6)}}),
        lambda: setattr(optimizer, "state", {table: {"sum": torch.zeros(6)}}),
    ):
        count = len(optimizer.state)
        with pytest.raises(ValueError, match=f"the state of {name} is memory of FBGEMM"):
            edit()
        assert len(optimizer.state) == count
    for param, state in optimizer.state.items():  # what moving an optimizer to a device does
        optimizer.state[param] = {key: value.to("cpu") for key, value in state.items()}
    with pytest.raises(ValueError, match=f"the group of {name} cannot be taken away"):
        optimizer.param_groups.clear()
    _train(model, optimizer, scheduler, range(2, 3))


@both
def test_a_new_tower_joins_and_is_in_checkpoints(kind: str, tmp_path: Any) -> None:
    class WithLate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.old, self.late = Ranker(), nn.Linear(20, 1)

    def start(add: bool = True) -> tuple[nn.Module, Any, Any]:
        model = WithLate()
        build = recap_fast.build_optimizer if kind == "fused" else reference.build_optimizer
        optimizer, scheduler = build(model.old, multi_task_config())
        named = [(f"late.{name}", param) for name, param in model.late.named_parameters()]
        with pytest.raises(ValueError, match="give the group an lr"):
            optimizer.add_param_group({"params": named})
        if add:
            optimizer.add_param_group({"params": named, "lr": 0.0625})
        return model, optimizer, scheduler

    def train(model: nn.Module, optimizer: Any, scheduler: Any, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            inputs = torch.randn(4, 20, generator=torch.Generator().manual_seed(seed))
            (model.old(inputs) + model.late(inputs)).square().sum().backward()
            optimizer.step()
            scheduler.step()

    whole = start()
    train(*whole, range(3))
    assert [*whole[1].state_dict()["state"]][-2:] == ["late.weight", "late.bias"]
    checkpoint.save(tmp_path, 3, *whole)
    resumed = start()
    resumed[1].param_groups[-1]["lr"] = 5.0
    assert checkpoint.load(tmp_path, *resumed).step == 3
    assert resumed[1].param_groups[-1]["lr"] == 0.0625
    for run in (whole, resumed):
        train(*run, range(3, 6))
    for name, value in whole[0].state_dict().items():
        assert torch.equal(value, resumed[0].state_dict()[name]), name
    without = start(add=False)
    with pytest.raises(checkpoint.CheckpointMismatchError, match=r"'late\.weight' in its optim"):
        checkpoint.load(tmp_path, *without)


def _values(optimizer: Any) -> dict[str, dict[str, Tensor]]:
    return copy.deepcopy(optimizer.state_dict()["state"])


@both
def test_checkpoints_go_on_after_a_reset(kind: str, tmp_path: Any) -> None:
    model, optimizer, scheduler = _with_tables(kind)
    _train(model, optimizer, scheduler, range(3))
    optimizer.state.clear()
    _train(model, optimizer, scheduler, range(3, 5))
    checkpoint.save(tmp_path, 5, model, optimizer, scheduler)
    resumed = _with_tables(kind)
    checkpoint.load(tmp_path, *resumed)
    for name, entries in _values(optimizer).items():
        for key, value in entries.items():
            assert torch.equal(value, _values(resumed[1])[name][key]), (name, key)
    assert optimizer.state[next(iter(optimizer.params.values()))]["step"] == 2
