"""The param groups of a combined optimizer as one list that can be edited."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torchrec.optim import keyed
from torchrec.optim.fused import FusedOptimizer

from recap_fast.keyed.parts import Combined
from recap_fast.keyed.walk import plain_leaves
from recap_fast.schedules.compute import DEFAULT_LR

_NO_OPTIONS = frozenset({"params", "param_names"})


class ParamGroups(list[dict[str, Any]]):
    """All param groups, in order; editing the list edits the optimizers inside.

    Groups can be appended, removed and replaced, but keep their order.
    """

    __slots__ = ("_optimizer",)

    def __init__(self, groups: Iterable[dict[str, Any]], optimizer: Combined) -> None:
        list.__init__(self, groups)
        self._optimizer = optimizer

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return list, (list(self),)  # a copy is a list of its own


def _written_through(name: str) -> Callable[..., Any]:
    method = getattr(list, name)

    @functools.wraps(method)
    def edit(self: ParamGroups, *args: Any, **kwargs: Any) -> Any:
        groups = list(self._optimizer.param_groups)  # which may have changed since
        result = method(groups, *args, **kwargs)
        set_param_groups(self._optimizer, groups)
        list.__setitem__(self, slice(None), groups)
        return self if name in ("__iadd__", "__imul__") else result

    return edit


for _name in (
    *("append", "extend", "insert", "remove", "pop", "clear", "sort", "reverse"),
    *("__setitem__", "__delitem__", "__iadd__", "__imul__"),
):
    setattr(ParamGroups, _name, _written_through(_name))


def set_param_groups(optimizer: Combined, groups: Sequence[dict[str, Any]]) -> None:
    """Makes `groups` those of `optimizer`, which may lack some of it, and have others at the end.

    If there are as many as before, those that are new take the place of those they stand for.

    Raises:
        ValueError: They are in another order; a new one lacks an option; or one of those that are
            gone is of fused tables. Nothing has changed.
    """
    owners = [(leaf, group) for leaf in optimizer.leaves for group in leaf.param_groups]
    known = {id(group) for _, group in owners}
    given = {id(group) for group in groups}
    kept = [(leaf, group) for leaf, group in owners if id(group) in given]
    if len(groups) == len(owners):
        placed = [
            (leaf, new if id(new) not in known else old)
            for (leaf, old), new in zip(owners, groups, strict=True)
        ]
    else:
        new = groups[len(kept) :]
        placed = kept + [(_like(optimizer, group.keys(), whole=True), group) for group in new]
    if [id(group) for _, group in placed] != [id(group) for group in groups]:
        raise ValueError(
            "param_groups: the groups inside a combined optimizer keep their order; append new "
            "ones at the end"
        )
    for leaf, group in placed:
        if id(group) not in known:
            _check_options(leaf, group)
    for leaf, group in owners:
        if isinstance(leaf, FusedOptimizer) and id(group) not in given:
            tables = map(optimizer.name_of, group["params"])
            raise ValueError(
                f"param_groups: the group of {next(tables, 'fused tables')} cannot be "
                "taken away or replaced, since tables train in the backward pass; set its lr to 0"
            )
    if known - given:
        optimizer.check_groups_may_go()
    count = len(owners) if len(groups) == len(owners) else len(kept)
    for leaf in {id(leaf): leaf for leaf, _ in owners}.values():
        own = [group for other, group in placed[:count] if other is leaf]
        if [id(group) for group in own] != [id(group) for group in leaf.param_groups]:
            leaf.param_groups[:] = own
    for leaf, group in placed[count:]:
        _append(optimizer, leaf, group)


def add_param_group(optimizer: Combined, group: dict[str, Any]) -> None:
    """See `CombinedOptimizer.add_param_group`."""
    if not isinstance(group, dict):
        raise TypeError(f"param_group must be a dict, but got {type(group)}")
    like = _like(optimizer, group.keys(), whole=False)
    if "lr" not in group and like.defaults.get("lr") == DEFAULT_LR:
        raise ValueError(
            "add_param_group: give the group an lr; the rates of the other groups come from their "
            "schedules, which it has none of"
        )
    member = _empty_copy(like)
    member.add_param_group(group)  # checks it, and fills in options
    others = {id(param) for each in optimizer.param_groups for param in each["params"]}
    if any(id(param) in others for param in group["params"]):
        raise ValueError("some parameters appear in more than one parameter group")
    optimizer.optimizers.append(("", _wrap(optimizer, member)))


def _append(optimizer: Combined, like: Optimizer, group: dict[str, Any]) -> None:
    member = _empty_copy(like)
    member.param_groups.append(group)
    optimizer.optimizers.append(("", _wrap(optimizer, member)))


def _like(optimizer: Combined, keys: Iterable[str], whole: bool) -> Optimizer:
    """The optimizer inside that is like the one which a new group is for.

    Args:
        optimizer: the combined one.
        keys: of the group.
        whole: whether they must be all that it needs.
    """
    candidates = [leaf for _, part in optimizer.optimizers for leaf in plain_leaves(part)]
    if not candidates:
        raise ValueError(
            "a param group cannot be added: all optimizers inside are wrapped, or clip by a norm "
            "of their own, and whether the new group is to be so too is not said; append a pair of "
            "a key and a keyed optimizer of it, wrapped or not, to optimizer.optimizers"
        )
    if whole:
        found = [leaf for leaf in candidates if leaf.defaults.keys() <= set(keys)]
        if not found:
            _check_options(candidates[0], dict.fromkeys(keys))
        return found[0]
    options = {key for key in keys if any(key in leaf.defaults for leaf in candidates)}
    found = [leaf for leaf in candidates if options <= leaf.defaults.keys()]
    if not found:
        names = ", ".join(sorted(options))
        raise ValueError(f"add_param_group: no optimizer inside has all of the options {names}")
    return found[0]


def _check_options(leaf: Optimizer, group: Mapping[str, Any]) -> None:
    missing = [name for name in ("params", *leaf.defaults) if name not in group]
    if missing:
        raise ValueError(
            f"param_groups: a new group lacks {', '.join(missing)}; add_param_group fills in what "
            "is not given"
        )


def _empty_copy(optimizer: Optimizer) -> Optimizer:
    """Another optimizer of the same class and defaults, without param groups."""
    copy = type(optimizer).__new__(type(optimizer))
    copy.__setstate__(
        {
            **optimizer.__getstate__(),
            "defaults": dict(optimizer.defaults),
            "state": defaultdict(dict),
            "param_groups": [],
        }
    )
    return copy


def _wrap(optimizer: Combined, member: Optimizer) -> keyed.KeyedOptimizerWrapper:
    # Without names: those of a group may change with it (see `names_of_others`).
    wrapper = keyed.KeyedOptimizerWrapper({}, lambda _: member)
    wrapper.save_param_groups(optimizer.defaults["_save_param_groups"])
    return wrapper


def names_of_others(
    groups: Sequence[Mapping[str, Any]], named: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Names for the parameters that were put into param groups without one.

    Args:
        groups: all param groups, in order.
        named: the parameters that have names.

    Returns:
        By name, as in the group's "param_names", or by place: "param_groups.<i>.params.<j>".
    """
    known = {id(param) for param in named.values()}
    found: dict[str, Tensor] = {}
    for index, group in enumerate(groups):
        given = group.get("param_names", ())
        for place, param in enumerate(group["params"]):
            if id(param) in known:
                continue
            known.add(id(param))
            name = given[place] if place < len(given) else None
            if name is None or name in named or name in found:
                name = f"param_groups.{index}.params.{place}"
            found[name] = param
    return found
