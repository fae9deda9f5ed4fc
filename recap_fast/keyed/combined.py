"""torchrec's `keyed.CombinedOptimizer` with the behaviour that a training loop expects of it."""

from __future__ import annotations

import copy
import logging
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torchrec.optim import keyed
from torchrec.optim.fused import FusedOptimizer

from recap_fast.clipping import check_max_norm, clip_grad_norm_
from recap_fast.closure import evaluate
from recap_fast.keyed.load import (
    as_formats_have_it,
    as_tables_have_it,
    check_state,
    load_options,
    match_param_groups,
    new_states,
)
from recap_fast.keyed.param_groups import (
    ParamGroups,
    add_param_group,
    names_of_others,
    set_param_groups,
)
from recap_fast.keyed.scaled_tables import unscale_tables
from recap_fast.keyed.state_view import StateView
from recap_fast.keyed.torch_format import (
    asked_for_torch_format,
    from_torch_format,
    to_torch_format,
)
from recap_fast.keyed.walk import Inside, is_dense
from recap_fast.state.new import has_state, strays

logger = logging.getLogger("recap_fast")


class _Params(dict[str, Tensor]):
    """Parameters by name; what a wrapper adds to them, it adds to the optimizer.

    So does torchrec's warm-up, with one of its own, whose state then has a name in there.
    """

    def __init__(self, params: Mapping[str, Tensor], added: dict[str, Tensor]) -> None:
        super().__init__(params)
        self._added = added

    def __setitem__(self, name: str, param: Tensor) -> None:
        super().__setitem__(name, param)
        self._added[name] = param

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self), self._added)


class CombinedOptimizer(keyed.CombinedOptimizer):
    """Several keyed optimizers as one; its `state_dict` is keyed by FQN.

    The optimizers inside may be wrapped (`keyed.KeyedOptimizerWrapper`, torchrec's clipping and
    warm-up) and combined in turn. Those that are `torchrec.optim.fused.FusedOptimizer`s update
    embeddings in the backward pass, and a step only passes on their learning rate; all others are
    dense.

    Where torchrec's class does otherwise:

    * a closure is evaluated once for all optimizers, and its result returned;
    * `zero_grad` passes `set_to_none` on;
    * `init_state` can make state without counting a step;
    * `load_state_dict` checks names, entries and shapes before it changes anything, and makes the
      state that it is about to load into;
    * `state` and `param_groups` are those in use, where a wrapper still has earlier ones, and can
      be edited and set like those of a torch optimizer; groups can be added;
    * `get_optimizer_state_dict` and `set_optimizer_state_dict` of
      `torch.distributed.checkpoint.state_dict` work on it;
    * it can be pickled and deep-copied while a scheduler is attached;
    * it can clip gradients by their global norm.

    Args:
        optims: keyed optimizers, or pairs of a key and one.
        clip_grad_norm: before a step, the gradients of all dense parameters are scaled down so that
            their global 2-norm is at most this, as `torch.nn.utils.clip_grad_norm_` does, over the
            shards of DTensors on all processes too. If it is not finite, the step is skipped and
            a warning logged; infinity only does that. None: no norm is computed.

    Raises:
        ValueError: `clip_grad_norm` is not greater than 0.
    """

    _warned_of_scaled_tables = False

    def __init__(
        self,
        optims: Sequence[keyed.KeyedOptimizer | tuple[str, keyed.KeyedOptimizer]],
        clip_grad_norm: float | None = None,
    ) -> None:
        super().__init__(list(optims))
        self.clip_grad_norm = None if clip_grad_norm is None else check_max_norm(clip_grad_norm)
        self._grad_norm: float | None = None
        self._inside = Inside(self)
        self._added_params: dict[str, Tensor] = {}
        self._places: list[list[int]] = []

    def _look_inside(self) -> Inside:
        """Which optimizers are inside, also after one was added here or to one combined in here."""
        # A scheduler asks at every step, and a walk takes microseconds for each.
        if not self._inside.is_current(self):
            self._inside = Inside(self)
        return self._inside

    @property
    def leaves(self) -> list[Optimizer]:
        """The optimizers that own param groups and state, in order."""
        return self._look_inside().leaves

    @property
    def fused_leaves(self) -> list[FusedOptimizer]:
        """Those of `leaves` that update embeddings in the backward pass."""
        return self._look_inside().fused_leaves

    @property
    def state_owners(self) -> list[Optimizer]:
        """`leaves`, and after them the wrappers around some, of which a few have state too."""
        return self._look_inside().state_owners

    @property
    def params(self) -> Mapping[str, Tensor]:
        """All parameters by FQN.

        One that was put into a param group has the name that the group gives it in "param_names",
        as torch's `add_param_group` sets that, or "param_groups.<group>.params.<place>".
        """
        named = dict(super().params)
        others = names_of_others(self.param_groups, named)
        return _Params({**named, **others, **self._added_params}, self._added_params)

    def name_of(self, param: Tensor) -> str:
        """The FQN of a parameter, or what it is otherwise, for a message."""
        found = (name for name, each in self.params.items() if each is param)
        return next(found, f"a parameter of shape {tuple(param.shape)}")

    @property
    def state(self) -> StateView:
        """The state of every parameter that has any; editing it edits the optimizers inside."""
        return StateView(self)

    @state.setter
    def state(self, state: Mapping[Tensor, Any]) -> None:
        self.state.replace(state)

    @property
    def param_groups(self) -> ParamGroups:
        """All param groups, in order; editing the list edits the optimizers inside."""
        if fused := self.fused_leaves:
            self._warned_of_scaled_tables = unscale_tables(
                fused, sys._getframe(1), self._warned_of_scaled_tables
            )
        return ParamGroups([group for leaf in self.leaves for group in leaf.param_groups], self)

    @param_groups.setter
    def param_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        set_param_groups(self, list(groups))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group behind all others, as torch does.

        It is updated like the first optimizer inside that has all options which the group names,
        with the defaults of that one, by an optimizer of its own at the end of `optimizers`. No
        `RecapLRShim` that exists already sets its rate.

        Args:
            param_group: "params", parameters or pairs of a name and one, and options. State is
                saved under these names; see `params`.

        Raises:
            TypeError, ValueError: as in torch; also, it has no "lr" where all rates are those of
                schedules, there is no optimizer with these options, or all are wrapped, as by
                torchrec's clipping.
        """
        add_param_group(self, param_group)

    def check_groups_may_go(self) -> None:
        """Raises if no param group can be taken away or replaced."""

    def dense_optimizers(self) -> list[tuple[str, keyed.KeyedOptimizer]]:
        """Those of `optimizers` that are dense, at least in part, with their keys, in order."""
        return [(key, part) for key, part in self._optims if is_dense(part)]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every dense parameter that has a gradient; returns what `closure` returned."""
        loss = evaluate(closure)
        self.check_tables()
        if self.clip_grad_norm is not None:
            self._grad_norm = clip_grad_norm_(self._dense_params(), self.clip_grad_norm)
            if not math.isfinite(self._grad_norm):
                logger.warning(
                    "the norm of the gradients is %s: no parameter was updated", self._grad_norm
                )
                return loss
        self._bring_state_along()
        for _, part in self._optims:
            part.step()
        return loss

    def check_tables(self) -> None:
        """Raises if the step of fused tables could not be taken, before anything is changed.

        Raises:
            RuntimeError: The message names the table.
        """
        for leaf in self.fused_leaves:
            if hasattr(leaf, "check_step"):  # those of kernels that can be read
                leaf.check_step()

    def _bring_state_along(self) -> None:
        """Moves the state of parameters that went to a group of another optimizer like theirs."""
        dense = [leaf for leaf in self.leaves if not isinstance(leaf, keyed.KeyedOptimizer)]
        places = [
            [id(param) for group in leaf.param_groups for param in group["params"]]
            for leaf in dense
        ]
        if places == self._places:
            return
        self._places = places
        owners = strays(dense)
        for leaf in dense:
            for param in [p for group in leaf.param_groups for p in group["params"]]:
                if param in owners and not has_state(leaf.state.get(param)):
                    entries = owners[param].state.pop(param)
                    if type(owners[param]) is type(leaf):
                        leaf.state[param] = entries

    @property
    def grad_norm(self) -> Any:
        """The global norm that the last step found, before clipping; None if there was none."""
        return self._grad_norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients: to None, or with `set_to_none=False` to zero."""
        for leaf in self.leaves:
            leaf.zero_grad(set_to_none=set_to_none)

    def sync_fused_learning_rates(self) -> None:
        """Passes the rates in the param groups of fused optimizers on to FBGEMM's kernels.

        Those that `recap_fast.embeddings` knows look at it by themselves whenever they are used.
        """
        if self.fused_leaves:
            from recap_fast.embeddings.live_step import pass_rate  # which imports this package

            for leaf in self.fused_leaves:
                pass_rate(leaf)

    def _dense_params(self) -> list[Tensor]:
        dense = [leaf for leaf in self.leaves if is_dense(leaf)]
        return [p for leaf in dense for group in leaf.param_groups for p in group["params"]]

    def init_state(
        self, sparse_grad_parameter_names: set[str] | None = None, count_step: bool = True
    ) -> None:
        """Makes the state of every trainable dense parameter.

        As torchrec's, by a step with gradients of zero, which are left in `.grad`. So it counts:
        Adam's bias corrections go on from the second step, weight decay is applied at the present
        rate, the momentum buffer of SGD is zero, a warm-up moves on, hooks are called. Rates that
        schedules set, on the device too, do not move. Fused tables have no gradient here, and do
        not change.

        With `count_step=False`, state is made for those parameters that have none yet, and nothing
        else changes: neither parameters, gradients and step counts nor any later step. Therefore
        the momentum buffer of SGD with dampening is None, torch's word for a buffer that the first
        gradient is yet to fill; it cannot be loaded into in place, only by `load_state_dict`.

        Args:
            sparse_grad_parameter_names: parameters whose gradient of zero is a sparse tensor.
            count_step: whether to take a step.

        Raises:
            TypeError: With `count_step=False`, an optimizer inside is of a class whose state is not
                known; no state is made.
        """
        if not count_step:
            self._make_state()
            return
        names = {id(param): name for name, param in self.params.items()}
        sparse = sparse_grad_parameter_names or ()
        for param in self._dense_params():
            if param.requires_grad:
                zero = torch.zeros_like(param)
                param.grad = zero.to_sparse() if names[id(param)] in sparse else zero
        self.step(closure=None)

    def _make_state(self) -> None:
        """Gives state to every trainable dense parameter without; nothing else changes."""
        self._bring_state_along()
        for new in new_states(self, lambda param: param.requires_grad):
            entries: dict[str, Any] = new.entries
            if new.group.get("dampening") and "momentum_buffer" in entries:
                entries = {**entries, "momentum_buffer": None}
            if entries:
                new.states.setdefault(new.param, {}).update(entries)

    def state_dict(self) -> dict[str, Any]:
        """Returns state, and param groups after `save_param_groups(True)`, by FQN (see `params`).

        To torch's `get_optimizer_state_dict` it is what torch's optimizers return.
        """
        if asked_for_torch_format():
            self._check_torch_format()
            return to_torch_format(self.param_groups, self.state)
        names = {id(param): name for name, param in self.params.items()}
        state: dict[str, Any] = {}
        for param, entries in self.state.items():
            if isinstance(param, str):
                state[param] = entries
            elif id(param) in names:
                state[names[id(param)]] = self._extract_state_dict_content(entries)
            else:
                raise ValueError(
                    f"there is state of {self.name_of(param)} that is in no param group and has no "
                    "name to save it under: delete it from the state"
                )
        saved: dict[str, Any] = {"state": state}
        if self.defaults["_save_param_groups"]:
            saved["param_groups"] = [
                {
                    "params": sorted(names[id(param)] for param in group["params"]),
                    **{key: copy.deepcopy(group[key]) for key in group if key != "params"},
                }
                for group in self.param_groups
            ]
        return saved

    def prepare_for_torch_format(self) -> None:
        """Makes all state that torch's helpers expect, for which they would take a step.

        Raises:
            ValueError: There is state that they cannot read; the message says what to do.
        """
        self._check_torch_format()
        self._make_state()

    def _check_torch_format(self) -> None:
        """Raises if there are parameters that torch's helpers could not find in the model."""
        fused = {id(param) for leaf in self.fused_leaves for param in leaf.params.values()}
        in_groups = {id(param) for param in self._dense_params()}
        state = self.state
        table = next((name for name, param in self.params.items() if id(param) in fused), None)
        others = [n for n, p in self.params.items() if id(p) not in in_groups and p in state]
        keys: Iterable[object] = state  # the user's are of any kind
        others += [key for key in keys if isinstance(key, str)]
        name = next(iter(others), None) if table is None else table
        if name is not None:
            what = "is in no param group" if table is None else "is a fused table"
            raise ValueError(
                f"torch's get_optimizer_state_dict and set_optimizer_state_dict know parameters of "
                f"the model in param groups only, but {name} {what}; use the optimizer's own "
                "state_dict and load_state_dict, or recap_fast.checkpoint"
            )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what `state_dict` of this class, or of its fused counterpart, returned.

        Also what torch's `set_optimizer_state_dict` makes of what its `get_optimizer_state_dict`
        returned, for this optimizer or torch's; its param groups are loaded too. How parameters and
        states are stored (`state_dtype` and the like) stays as it is here, and state is converted.

        Raises:
            ValueError: The state is of other parameters, of another algorithm or of another shape,
                or its param groups are others; nothing is changed.
            TypeError: An optimizer inside has no state yet, and is of a class whose state is not
                known; nothing is changed.
        """
        self._bring_state_along()  # or it would be loaded to where it was
        params, state = self.params, self.state
        names = {id(param): name for name, param in params.items()}
        dropped: list[Tensor] = []
        options: list[tuple[dict[str, Any], Mapping[str, Any]]] = []
        if asked_for_torch_format():
            state_dict = from_torch_format(state_dict, self.param_groups, names)
            options = list(zip(self.param_groups, state_dict["param_groups"], strict=True))
            # As in torch, what is not in there has no state.
            dropped = [param for param in state if names[id(param)] not in state_dict["state"]]
        # What is kept in the state by name, and of no parameter, is the user's, as in torch.
        notes = {
            name: value
            for name, value in state_dict["state"].items()
            if name not in params and not isinstance(value, Mapping)
        }
        saved = {name: each for name, each in state_dict["state"].items() if name not in notes}
        wanted = {params[name] for name in saved if name in params}
        made = new_states(self, lambda param: param in wanted)
        gone = set(dropped)
        own = {
            param: entries
            for param, entries in state.items()
            if isinstance(param, Tensor) and param not in gone
        }
        grouped = {id(param) for group in self.param_groups for param in group["params"]}
        kept = {  # until it is in a group again
            param: copy.deepcopy(dict(saved[names[id(param)]]))
            for param in wanted
            if id(param) not in grouped and param not in own
        }
        new = {param: entries for _, _, param, entries in made}
        here = {names[id(param)]: {**own.get(param, {}), **new.get(param, {})} for param in wanted}
        saved = as_formats_have_it(self, names, as_tables_have_it(saved, here), {**own, **new})
        check_state(params, own, saved, {**kept, **new})
        if self.defaults["_save_param_groups"] and not options:
            saved_groups = state_dict.get("param_groups", ())
            options = match_param_groups(self.param_groups, saved_groups, names)

        for param in dropped:
            del state[param]
        for each in made:
            each.states.setdefault(each.param, {}).update(each.entries)
        for param in kept.keys() - new.keys():
            state[param] = kept[param]
        state.update(copy.deepcopy(notes))
        for name, entries in saved.items():
            if not entries:
                continue
            current = state[params[name]]
            for key, value in entries.items():
                if value is None:  # or torchrec would copy it into the tensor
                    current[key] = None
            self._update_param_state_dict_object(current, entries, [name])
        for group, saved_group in options:
            load_options(group, saved_group)
        self.post_load_state_dict()

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler puts a wrapper of `step`, bound to this object, in the way of the class's own;
        # torch.distributed.checkpoint does so with the other two.
        others = ("step", "state_dict", "load_state_dict")
        return {key: value for key, value in self.__dict__.items() if key not in others}
