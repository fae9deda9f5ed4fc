"""Brings an optimizer and a scheduler to what a checkpoint says, but for tensors."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.optim import Optimizer
from torchrec.optim import keyed

from recap_fast.checkpoint.contents import Description, describe
from recap_fast.checkpoint.errors import CheckpointMismatchError
from recap_fast.checkpoint.match import groups_by_param
from recap_fast.checkpoint.params import TrainedParam
from recap_fast.checkpoint.plain import option_to_plain
from recap_fast.embeddings.fused_optimizer import set_forward_passes
from recap_fast.embeddings.live_step import pass_rate
from recap_fast.names import is_table
from recap_fast.scheduler import RecapLRShim
from recap_fast.state.formats import renew
from recap_fast.state.memory import StateMemory
from recap_fast.state.options import option_like

logger = logging.getLogger("recap_fast")


def scheduler_state(scheduler: Any) -> dict[str, Any] | None:
    """Returns what a checkpoint says of a scheduler; None if there is none."""
    if scheduler is None:
        return None
    return {"class": type(scheduler).__name__, "state": scheduler.state_dict()}


class Restoration:
    """What is to be done to an optimizer and a scheduler; made before anything is changed.

    Args:
        where: what errors call the checkpoint.
        saved: what is in it.
        saved_step: how many steps were taken.
        saved_scheduler: as `scheduler_state` returned it.
        optimizer, scheduler: to load into.
        trained: what the optimizer updates on this process.

    Raises:
        CheckpointMismatchError: They cannot be brought to what the checkpoint says.
        TypeError: State is to be made for an optimizer of a class whose state is not known.
    """

    def __init__(
        self,
        where: str,
        saved: Description,
        saved_step: int,
        saved_scheduler: Mapping[str, Any] | None,
        optimizer: Optimizer,
        scheduler: Any,
        trained: Sequence[TrainedParam],
    ) -> None:
        self._where = where
        self._saved = saved
        self._saved_step = saved_step
        self._saved_groups = groups_by_param(saved)
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._trained = trained
        self._scheduler_state = self._check_scheduler(saved_scheduler)
        self._options = self._find_options()
        self._passes = self._find_passes()
        memory = StateMemory()
        self._new_state = {
            item.name: item.new_state(memory) for item in trained if self._lacks_state(item)
        }

    def _lacks_state(self, item: TrainedParam) -> bool:
        state, entries = item.state(), self._saved.entries.get(item.name, {})
        return not item.is_fused and any(
            entry == "tensor" and not isinstance(state.get(name), Tensor)
            for name, entry in entries.items()
        )

    def _not_saved(self, item: TrainedParam) -> frozenset[str]:
        """What the formats here ask for and those of the checkpoint did not."""
        return item.added_states - self._saved.entries.get(item.name, {}).keys()

    def _was_fused(self, item: TrainedParam) -> bool:
        return bool(self._saved_groups[item.name]["is_fused"])

    def make_state(self) -> None:
        """Gives each parameter the state that it had, if with other values; takes away the rest."""
        for item in self._trained:
            if item.is_fused:
                for name, value in item.state().items():
                    # An unfused table that took no step had none.
                    if name not in self._saved.entries.get(item.name, {}):
                        _fill_zeros(value)
                continue
            entries = self._saved.entries.get(item.name)
            own = item.state()
            new = self._new_state.get(item.name, {})
            if entries is None:
                item.owner.state.pop(item.param, None)
                continue
            state = {}
            for name, entry in entries.items():
                if entry != "tensor":
                    state[name] = entry["value"]
                elif isinstance(own.get(name), Tensor):
                    state[name] = own[name]
                elif name in new or name not in item.added_states:
                    state[name] = new[name]
            # To be what they are at first, once the parameter has been loaded.
            state |= {
                name: {**new, **own}[name] for name in self._not_saved(item) & {**new, **own}.keys()
            }
            if self._was_fused(item) and "step" in {**own, **new}:
                # Of a kernel that counts nothing, a pass for each step of the training.
                passes = self._saved.forward_passes.get(item.name, self._saved_step)
                state["step"] = {**new, **own}["step"].fill_(passes)
            item.owner.state[item.param] = state

    def finish(self) -> None:
        """Sets options, counts and rates, when all tensors have been loaded."""
        for group, name, value in self._options:
            own = option_to_plain(group[name], name)
            if name != "lr" and own != value:
                logger.warning(
                    "%s: the option %s of a param group is now %r, as it was when the checkpoint "
                    "was written; it was made with %r",
                    self._where,
                    name,
                    value,
                    own,
                )
            group[name] = option_like(group[name], value)
        for item in self._trained:
            state = item.state()
            for name in self._not_saved(item) & state.keys():
                renew(name, state[name], item.param)
            if item.name in self._passes:
                set_forward_passes(item.kernel, self._passes[item.name])
        for owner in {
            id(item.owner): item.owner for item in self._trained if item.is_fused
        }.values():
            pass_rate(owner)
        if isinstance(self._optimizer, keyed.KeyedOptimizer):
            self._optimizer.post_load_state_dict()
        if self._scheduler is not None:
            self._scheduler.load_state_dict(self._scheduler_state)

    def _find_options(self) -> list[tuple[MutableMapping[str, Any], str, Any]]:
        """The options to set, with their groups."""
        saved_groups = self._saved_groups
        own_groups: dict[int, tuple[MutableMapping[str, Any], list[str]]] = {}
        for item in self._trained:
            own_groups.setdefault(id(item.group), (item.group, []))[1].append(item.name)
        found = []
        for group, names in own_groups.values():
            for option in group:
                values = {
                    json.dumps(saved_groups[name]["options"][option]): name
                    for name in names
                    if option in saved_groups[name]["options"]
                }
                if len(values) == 1:
                    found.append((group, option, json.loads(next(iter(values)))))
                elif values and not (option == "lr" and isinstance(self._scheduler, RecapLRShim)):
                    (one, first), (other, second), *_ = values.items()
                    raise CheckpointMismatchError(
                        f"{self._where} has {option}={one} for {first!r} and {option}={other} for "
                        f"{second!r}, which are in one param group here; nothing was changed"
                    )
        return found

    def _find_passes(self) -> dict[str, int]:
        """How many forward passes the kernels of tables on this process have seen."""
        passes: dict[str, int] = {}
        first: dict[int, str] = {}
        for item in self._trained:
            if not item.counts_forward_passes:
                continue
            passes[item.name] = count = self._saved.forward_passes.get(item.name, 0)
            other = first.setdefault(id(item.kernel), item.name)
            if passes[other] != count:
                raise CheckpointMismatchError(
                    f"{self._where} has {count} forward passes of {item.name!r} and "
                    f"{passes[other]} of {other!r}, which share a kernel here; nothing was changed"
                )
        return passes

    def _check_scheduler(self, saved: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """The state to load into the scheduler."""
        own = scheduler_state(self._scheduler)
        names = [each["class"] if each else "no scheduler" for each in (saved, own)]
        if names[0] != names[1]:
            raise CheckpointMismatchError(
                f"{self._where} was written with {names[0]}, but is to be loaded with {names[1]}: "
                "pass to load what was passed to save; nothing was changed"
            )
        if saved is None or own is None or not isinstance(self._scheduler, RecapLRShim):
            return None if saved is None else saved["state"]
        # Whether tables have dense groups depends on their sharding; the step is all that counts.
        groups = [
            _without_tables(each.groups, state["group_names"])
            for each, state in (
                (self._saved, saved["state"]),
                (describe(self._trained), own["state"]),
            )
        ]
        if sorted(groups[0]) != sorted(groups[1]):
            raise CheckpointMismatchError(
                f"{self._where} has rates for the groups {', '.join(groups[0])}, but here they are "
                f"{', '.join(groups[1])}; nothing was changed"
            )
        return {**own["state"], "last_epoch": saved["state"]["last_epoch"]}


def _fill_zeros(state: Any) -> None:
    """Sets what this process has of a state to zero."""
    parts = [state]
    if isinstance(state, ShardedTensor):
        parts = [shard.tensor for shard in state.local_shards()]
    for part in parts:
        part.zero_()


def _without_tables(groups: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """The names of the dense groups that have other parameters than embedding tables."""
    dense = [group for group in groups if not group["is_fused"] and group["options"]]
    if len(dense) != len(names):
        return list(names)
    return [
        name
        for name, group in zip(names, dense, strict=True)
        if not all(is_table(param) for param in group["params"])
    ]
