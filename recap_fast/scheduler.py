"""The learning-rate scheduler: a schedule for every param group of a combined optimizer."""

from __future__ import annotations

from recap_fast import torchrec_checked  # noqa: F401 - first: says if torchrec is missing

# isort: split
import itertools
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchrec.optim import keyed

from recap_fast.config import LearningRate, as_learning_rate
from recap_fast.keyed import CombinedOptimizer, is_dense, leaves
from recap_fast.names import table_name
from recap_fast.schedules.compute import compute_lr


class RecapLRShim(LRScheduler):
    """Drives the rates of a `CombinedOptimizer`; used like any other torch scheduler.

    The param groups of torchrec's `FusedOptimizer`s inside, however deep, and those of
    `fused_optimizer` are fused embeddings. They follow the schedule of their tables in
    `table_learning_rates`, or else `emb_learning_rate`. All others are dense: they follow
    `lr_dict`, in order. If the optimizer has a method
    `sync_fused_learning_rates`, it is called after every change of the rates.

    A param group that is added to the optimizer later keeps the rate it was given, or is given.

    A rate depends on its schedule and the step alone, so the step is all that a resume restores.

    Args:
        optimizer: The optimizer; each of its param groups must have a schedule.
        lr_dict: Schedule by group name, one per dense param group, in the optimizer's order.
        emb_learning_rate: Schedule of all fused param groups without their own; None if there are
            none.
        last_epoch: The last finished step, to resume without a saved state: the first rates are
            those of step `last_epoch + 1`.
        device_schedule: Whether `optimizer.step()` itself moves the dense rates on, on the device
            of the parameters, so that a captured CUDA graph follows the schedules. Then the `lr` of
            the param groups only shows them; go on calling `step()` once after every optimizer
            step or replay, which costs no synchronisation. The optimizer must be a
            `FusedCombinedOptimizer` of capturable optimizers.
        table_learning_rates: Schedules of fused tables that have their own, by table name. Tables
            that share a param group share a table-batched module, so they must have the same one.
            A table that is not here may be on another process.
        fused_optimizer: What in the optimizer trains the embeddings, whatever its class. A
            `FusedOptimizer` is one without being named here.

    Schedules are `LearningRate`s, or what `recap_fast.config.as_learning_rate` takes.

    Raises:
        TypeError: If the optimizer is not a `CombinedOptimizer` or a schedule cannot be read.
        ValueError: If groups and schedules do not match, or `last_epoch` is less than -1.
    """

    def __init__(
        self,
        optimizer: keyed.CombinedOptimizer,
        lr_dict: Mapping[str, LearningRate],
        emb_learning_rate: LearningRate | None = None,
        last_epoch: int = -1,
        device_schedule: bool = False,
        table_learning_rates: Mapping[str, LearningRate] | None = None,
        fused_optimizer: keyed.KeyedOptimizer | None = None,
    ) -> None:
        if last_epoch < -1:
            raise ValueError(f"last_epoch must be -1 or greater, found {last_epoch}")
        if not isinstance(optimizer, keyed.CombinedOptimizer):
            raise TypeError(
                "optimizer must be a torchrec.optim.keyed.CombinedOptimizer, "
                f"found {type(optimizer).__name__}"
            )
        self.lr_dict = _schedules_of("lr_dict", lr_dict)
        self.table_learning_rates = _schedules_of(
            "table_learning_rates", table_learning_rates or {}
        )
        if emb_learning_rate is not None:
            emb_learning_rate = as_learning_rate(emb_learning_rate, "emb_learning_rate")
        schedules = iter(
            _schedule_per_param_group(
                optimizer,
                self.lr_dict,
                emb_learning_rate,
                self.table_learning_rates,
                fused_optimizer,
            )
        )
        self._schedules = [
            (leaf, list(itertools.islice(schedules, len(leaf.param_groups))))
            for leaf in leaves(optimizer)
        ]
        self.group_names = list(self.lr_dict)
        self.emb_learning_rate = emb_learning_rate
        self._device_schedule = device_schedule
        if device_schedule:
            if not hasattr(optimizer, "follow_on_device"):
                raise TypeError(
                    "device_schedule=True needs a recap_fast FusedCombinedOptimizer, found "
                    f"{type(optimizer).__name__}"
                )
            optimizer.follow_on_device(list(self.lr_dict.values()))
        # The base class would want each group's "initial_lr" with last_epoch; we need none.
        super().__init__(optimizer)
        # From which another scheduler of torch would go on, in place of what groups are made with.
        for group, schedule in self._groups_with_schedules():
            group["initial_lr"] = group["lr"] if schedule is None else compute_lr(schedule, 0)
        if last_epoch != -1:
            self._move_to(last_epoch + 1)

    def get_lr(self) -> list[float | Tensor]:
        """Returns the rate of every param group at the current step, `last_epoch`."""
        inside = self._leaves()
        if [len(leaf.param_groups) for leaf in inside] == [
            len(each) for _, each in self._schedules
        ]:
            schedules = [each for _, own in self._schedules for each in own]
            return [compute_lr(schedule, self.last_epoch) for schedule in schedules]
        return [
            group["lr"] if schedule is None else compute_lr(schedule, self.last_epoch)
            for group, schedule in self._groups_with_schedules()
        ]

    def _leaves(self) -> Sequence[Optimizer]:
        """Those of the optimizer, also if it has others now."""
        if isinstance(self.optimizer, CombinedOptimizer):
            return self.optimizer.leaves
        return list(leaves(self.optimizer))

    def _groups_with_schedules(self) -> Iterator[tuple[dict[str, Any], LearningRate | None]]:
        """All param groups, in order; those added later have no schedule."""
        schedules_of = {id(leaf): schedules for leaf, schedules in self._schedules}
        for leaf in self._leaves():
            groups, schedules = leaf.param_groups, schedules_of.get(id(leaf), ())
            if len(groups) < len(schedules) > 1:
                raise RuntimeError(
                    f"a {type(leaf).__name__} inside the optimizer had {len(schedules)} param "
                    f"groups, each with a schedule, but now has {len(groups)}; create another "
                    "RecapLRShim, which knows which are left"
                )
            for index, group in enumerate(groups):
                yield group, schedules[index] if index < len(schedules) else None

    def step(self, epoch: int | None = None) -> None:
        """Sets the rates of the next step; call it after `optimizer.step()`.

        Raises:
            RuntimeError: A CUDA graph captured a rate that changes now, or, with
                `device_schedule`, somebody changed the `lr` of a param group, which has no effect.
                One that is a tensor is not looked at: that would wait for its device.
        """
        if self._device_schedule and self._step_count > 0:
            self._check_rates_are_ours()
        super().step(epoch)
        if hasattr(self.optimizer, "check_captured_rates"):
            self.optimizer.check_captured_rates()
        sync = getattr(self.optimizer, "sync_fused_learning_rates", None)
        if sync is not None:
            sync()

    def state_dict(self) -> dict[str, Any]:
        """Returns the current step and what follows a schedule, as plain values."""
        return {
            "last_epoch": self.last_epoch,
            "group_names": list(self.group_names),
            "has_embedding_rate": self.emb_learning_rate is not None,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Moves to a saved step and sets its rates in the param groups at once.

        The schedules stay those that this object was made with: a run may resume with new ones.

        The state of another torch scheduler is taken too, such as that of the recap recommender's
        own shim, which has all attributes of the scheduler: only `last_epoch` is read from it.

        Raises:
            ValueError: If there is no step in it, or if it is the state of a `RecapLRShim` for
                other groups.
        """
        if "last_epoch" not in state_dict:
            raise ValueError(
                "not the state of a learning-rate scheduler: there is no last_epoch in it, only "
                f"{', '.join(map(str, state_dict)) or 'nothing'}"
            )
        step = state_dict["last_epoch"]
        if not isinstance(step, numbers.Integral) or isinstance(step, bool) or step < 0:
            raise ValueError(f"last_epoch in the state must be an int, 0 or more; found {step!r}")
        step = int(step)  # numpy has others
        own = RecapLRShim.state_dict(self)
        if own.keys() <= state_dict.keys():  # a derived class may save more
            self._check_groups(state_dict, own)
        self._move_to(step)

    def _check_groups(self, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Raises if the state of a `RecapLRShim` is for other groups."""
        saved_names = saved["group_names"]
        if sorted(saved_names) != sorted(self.group_names):  # schedules go by name, not by place
            raise ValueError(
                f"the state has {len(saved_names)} dense group(s): {', '.join(saved_names)}; this "
                f"scheduler has {len(self.group_names)}: {', '.join(self.group_names)}"
            )
        if saved["has_embedding_rate"] != own["has_embedding_rate"]:
            raise ValueError(
                f"has_embedding_rate is {saved['has_embedding_rate']} in the state, but "
                f"{own['has_embedding_rate']} here: only one of the two has fused embeddings"
            )

    def _move_to(self, step: int) -> None:
        """Sets the rates of `step` as construction sets those of step 0."""
        self.last_epoch = step - 1
        self._step_count = 0  # or the base class may warn of a call before optimizer.step()
        self.step()
        if self._device_schedule:
            on_device: Any = self.optimizer
            on_device.move_device_rates(step)

    def _check_rates_are_ours(self) -> None:
        for index, (group, schedule) in enumerate(self._groups_with_schedules()):
            if schedule is None or isinstance(group["lr"], Tensor):
                continue
            if group["lr"] != compute_lr(schedule, self.last_epoch):
                raise RuntimeError(
                    f"the lr of param group {index} was set to {group['lr']}, but with "
                    "device_schedule=True rates follow their schedules only; leave lr alone, or "
                    "create RecapLRShim without device_schedule"
                )


def _schedules_of(name: str, given: Mapping[str, Any]) -> dict[str, LearningRate]:
    return {key: as_learning_rate(rate, f"{name}[{key!r}]") for key, rate in given.items()}


def _schedule_per_param_group(
    optimizer: keyed.CombinedOptimizer,
    lr_dict: Mapping[str, LearningRate],
    emb_learning_rate: LearningRate | None,
    table_learning_rates: Mapping[str, LearningRate],
    fused_optimizer: keyed.KeyedOptimizer | None,
) -> list[LearningRate]:
    """Returns the schedules in the order of `optimizer.param_groups`, after all checks."""
    fused_ids = {id(leaf) for leaf in leaves(fused_optimizer)} if fused_optimizer else set()
    groups = [(leaf, group) for leaf in leaves(optimizer) for group in leaf.param_groups]
    group_is_dense = [is_dense(leaf) and id(leaf) not in fused_ids for leaf, _ in groups]
    num_dense, num_fused = group_is_dense.count(True), group_is_dense.count(False)
    names = ", ".join(lr_dict) or "none"
    if num_dense != len(lr_dict):
        raise ValueError(
            f"the optimizer has {num_dense} dense param group(s), but lr_dict has {len(lr_dict)} "
            f"learning rate(s): {names}. Give one per dense param group, in the optimizer's order"
        )
    rate_names = [f"table_learning_rates[{name!r}]" for name in table_learning_rates]
    if emb_learning_rate is not None:
        rate_names.append("emb_learning_rate")
    # A fused part without a param group is fine: under model parallel a rank may hold no table.
    inside = [*leaves(optimizer), *(part for _, part in optimizer.optimizers)]
    if rate_names and fused_optimizer is None and all(is_dense(part) for part in inside):
        raise ValueError(
            f"{rate_names[-1]} is set, but all {num_dense} param group(s) are dense: {names}. "
            "Leave it out, or add the fused optimizer of the embeddings to the optimizer"
        )
    # By identity: a sharded table cannot be compared.
    table_names = {id(param): table_name(name) for name, param in optimizer.params.items()}
    dense_schedules = iter(lr_dict.values())
    schedules = []
    for (_, group), dense in zip(groups, group_is_dense, strict=True):
        if dense:
            schedules.append(next(dense_schedules))
            continue
        tables = [table_names[id(p)] for p in group["params"] if id(p) in table_names]
        schedule = _schedule_of_tables(tables, emb_learning_rate, table_learning_rates)
        if schedule is None:
            raise ValueError(
                f"the optimizer has {num_fused} fused embedding param group(s) besides the "
                f"{num_dense} dense: {names}. Give them an emb_learning_rate; there is no other "
                f"for {', '.join(tables)}"
            )
        schedules.append(schedule)
    return schedules


def _schedule_of_tables(
    tables: Sequence[str],
    emb_learning_rate: LearningRate | None,
    table_learning_rates: Mapping[str, LearningRate],
) -> LearningRate | None:
    """Returns the schedule of a param group of these tables; None if there is none."""
    schedules = [table_learning_rates.get(table, emb_learning_rate) for table in tables]
    for table, schedule in zip(tables, schedules, strict=True):
        if schedule != schedules[0]:
            raise ValueError(
                f"the tables {tables[0]} and {table} share a param group of the fused optimizer, "
                "but have different learning rates: give them the same, or make them with "
                "fuse_embeddings, or set_table_optimizers and model parallel, from a configuration "
                "that has the rates in `tables`"
            )
    return schedules[0] if schedules else emb_learning_rate
