"""torchrec's `keyed.CombinedOptimizer` with the behaviour that a training loop expects of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torchrec.optim import keyed
from torchrec.optim.fused import FusedOptimizer
from torchrec.optim.warmup import WarmupOptimizer

from recap_fast.clipping import check_max_norm, clip_grad_norm_
from recap_fast.closure import evaluate
from recap_fast.state import has_state, new_state
from recap_fast.state_memory import StateMemory

logger = logging.getLogger("recap_fast")

_WRAPPERS = (keyed.KeyedOptimizerWrapper, keyed.OptimizerWrapper)


def walk(optimizer: Optimizer) -> Iterator[Optimizer]:
    """`optimizer` and all that it wraps or combines, however deep: in order, the outer first."""
    yield optimizer
    if isinstance(optimizer, keyed.CombinedOptimizer):
        for _, part in optimizer.optimizers:
            yield from walk(part)
    elif isinstance(optimizer, _WRAPPERS):
        yield from walk(optimizer._optimizer)


def leaves(optimizer: Optimizer) -> Iterator[Optimizer]:
    """The optimizers inside `optimizer` that wrap and combine no others, in order.

    They own param groups and state: `torch.optim` optimizers, fused embedding optimizers, and keyed
    optimizers of classes unknown here.
    """
    for inner in walk(optimizer):
        if not isinstance(inner, (*_WRAPPERS, keyed.CombinedOptimizer)):
            yield inner


def is_dense(optimizer: Optimizer) -> bool:
    """Whether a step of `optimizer` may update parameters.

    One made of fused embedding optimizers only does not: they update in the backward pass, and a
    step passes the learning rate on.
    """
    return not all(isinstance(leaf, FusedOptimizer) for leaf in leaves(optimizer))


class _NewState(NamedTuple):
    """A parameter without state, and the state to give it."""

    states: MutableMapping[Tensor, Any]  # the optimizer's, in which it belongs
    group: Mapping[str, Any]
    param: Tensor
    entries: dict[str, Tensor]


class CombinedOptimizer(keyed.CombinedOptimizer):
    """Several keyed optimizers as one; its `state_dict` is keyed by FQN.

    The optimizers inside may be wrapped (`keyed.KeyedOptimizerWrapper`, torchrec's clipping and
    warm-up) and combined in turn. Those that are `torchrec.optim.fused.FusedOptimizer`s update
    embeddings in the backward pass, and a step only passes on their learning rate; all others are
    dense.

    Where torchrec's class does otherwise:

    * a closure is evaluated once for all optimizers, and its result returned;
    * `zero_grad` passes `set_to_none` on;
    * `init_state` makes state without counting a step;
    * `load_state_dict` checks names, entries and shapes before it changes anything, and makes the
      state that it is about to load into;
    * `state` and `param_groups` are those in use, where a wrapper still has earlier ones;
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

    def __init__(
        self,
        optims: Sequence[keyed.KeyedOptimizer | tuple[str, keyed.KeyedOptimizer]],
        clip_grad_norm: float | None = None,
    ) -> None:
        super().__init__(list(optims))
        self.clip_grad_norm = None if clip_grad_norm is None else check_max_norm(clip_grad_norm)
        self._grad_norm: float | None = None
        # Which optimizers are inside does not change, while their groups and state may be replaced.
        # A scheduler asks for them at every step, and a walk takes microseconds for each.
        self._leaves = list(leaves(self))
        self._fused_leaves = [leaf for leaf in self._leaves if not is_dense(leaf)]

    @property
    def state(self) -> Mapping[Tensor, Any]:
        """The state of every parameter that has any."""
        composed = (keyed.KeyedOptimizerWrapper, keyed.CombinedOptimizer)
        owners = [inner for inner in walk(self) if not isinstance(inner, composed)]
        return {param: state for owner in owners for param, state in owner.state.items()}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The param groups of all optimizers inside, in order."""
        return [group for leaf in self._leaves for group in leaf.param_groups]

    def dense_optimizers(self) -> list[tuple[str, keyed.KeyedOptimizer]]:
        """Those of `optimizers` that are dense, at least in part, with their keys, in order."""
        return [(key, part) for key, part in self._optims if is_dense(part)]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every dense parameter that has a gradient; returns what `closure` returned."""
        loss = evaluate(closure)
        if self.clip_grad_norm is not None:
            dense = [leaf for leaf in self._leaves if is_dense(leaf)]
            groups = [group for leaf in dense for group in leaf.param_groups]
            params = [param for group in groups for param in group["params"]]
            self._grad_norm = clip_grad_norm_(params, self.clip_grad_norm)
            if not math.isfinite(self._grad_norm):
                logger.warning(
                    "the norm of the gradients is %s: no parameter was updated", self._grad_norm
                )
                return loss
        for _, part in self._optims:
            part.step()
        return loss

    @property
    def grad_norm(self) -> Any:
        """The global norm that the last step found, before clipping; None if there was none."""
        return self._grad_norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients: to None, or with `set_to_none=False` to zero."""
        for leaf in self._leaves:
            leaf.zero_grad(set_to_none=set_to_none)

    def sync_fused_learning_rates(self) -> None:
        """Passes the rates in the param groups of fused optimizers on to FBGEMM's kernels.

        The kernels update during the backward pass, at the rate that they were given last.
        """
        for leaf in self._fused_leaves:
            leaf.step()

    def init_state(self, sparse_grad_parameter_names: set[str] | None = None) -> None:
        """Makes the state of every trainable dense parameter that has none yet.

        Parameters, gradients, step counts and all later steps stay as they are. Therefore the
        momentum buffer of SGD with dampening is None, torch's word for a buffer that the first
        gradient is yet to fill; it cannot be loaded into in place, only by `load_state_dict`.

        Args:
            sparse_grad_parameter_names: part of torchrec's interface; nothing depends on it, since
                no step is taken.

        Raises:
            TypeError: An optimizer inside is of a class whose state is not known; no state is made.
        """
        for new in self._new_states(lambda param: param.requires_grad):
            entries = dict.fromkeys(new.entries) if new.group.get("dampening") else new.entries
            if entries:
                new.states.setdefault(new.param, {}).update(entries)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what `state_dict` of this class, or of its fused counterpart, returned.

        Raises:
            ValueError: The state is of other parameters, of another algorithm or of another shape,
                or its param groups are others; nothing is changed.
            TypeError: An optimizer inside has no state yet, and is of a class whose state is not
                known; nothing is changed.
        """
        saved, params = state_dict["state"], self.params
        wanted = {param for name, param in params.items() if name in saved}
        new_states = self._new_states(lambda param: param in wanted)
        self._check(saved, {new.param: new.entries for new in new_states})
        if self.defaults["_save_param_groups"]:
            self._check_param_groups(state_dict.get("param_groups", ()))

        for new in new_states:
            new.states.setdefault(new.param, {}).update(new.entries)
        state = self.state
        for name, entries in saved.items():
            for key, value in entries.items():
                if value is None:  # or torchrec would copy it into the tensor
                    state[params[name]][key] = None
        super().load_state_dict(state_dict)

    def _new_states(self, wanted: Callable[[Tensor], bool]) -> list[_NewState]:
        """The state to give to each wanted dense parameter that has none; nothing is changed."""
        new_states, memory = [], StateMemory()
        for wrapper in walk(self):
            if isinstance(wrapper, WarmupOptimizer):
                param = wrapper._warmup_param
                if wanted(param) and not has_state(wrapper.state.get(param)):
                    # Iteration and stage.
                    start = {"warmup": torch.zeros(2, dtype=torch.long, device="cpu")}
                    new_states.append(_NewState(wrapper.state, {}, param, start))
        for leaf in filter(is_dense, self._leaves):
            for group in leaf.param_groups:
                for param in group["params"]:
                    if wanted(param) and not has_state(leaf.state.get(param)):
                        entries = new_state(leaf, group, param, memory)
                        new_states.append(_NewState(leaf.state, group, param, entries))
        return new_states

    def _check(
        self,
        saved: Mapping[str, Mapping[str, Any]],
        new_states: Mapping[Tensor, Mapping[str, Tensor]],
    ) -> None:
        """Raises if names of saved and own state differ, or their entries, or the shapes."""
        params, state = self.params, self.state
        unknown = [name for name in saved if name not in params]
        if unknown:
            raise ValueError(
                f"the state dict has state of {len(unknown)} parameter(s) that this optimizer does "
                f"not have, such as {unknown[0]!r}; is it of another model?"
            )
        names = {param: name for name, param in params.items()}
        absent = [names[param] for param in state if names[param] not in saved]
        if absent:
            raise ValueError(
                f"the state dict has no state of {len(absent)} parameter(s) that this optimizer "
                f"has state of, such as {absent[0]!r}; is it of another model?"
            )
        for name, entries in saved.items():
            param = params[name]
            own_entries = {**state.get(param, {}), **new_states.get(param, {})}
            if entries.keys() != own_entries.keys():
                missing = ", ".join(key for key in own_entries if key not in entries) or "none"
                surplus = ", ".join(key for key in entries if key not in own_entries) or "none"
                raise ValueError(
                    f"the state dict has other entries for {name!r} than this optimizer: missing "
                    f"{missing}, unknown {surplus}; is it of another algorithm or option?"
                )
            for key, value in entries.items():
                own = own_entries[key]
                if not isinstance(own, Tensor) or (value is None and key == "momentum_buffer"):
                    continue
                if not isinstance(value, Tensor):
                    raise ValueError(
                        f"{key!r} of {name!r} is a {type(value).__name__} in the state dict, but a "
                        "tensor here"
                    )
                if type(value) is type(own) is Tensor and value.shape != own.shape:
                    raise ValueError(
                        f"{key!r} of {name!r} has shape {tuple(value.shape)} in the state dict, "
                        f"but {tuple(own.shape)} here; is it of another model?"
                    )

    def _check_param_groups(self, saved: Iterable[Mapping[str, Any]]) -> None:
        """Raises if the groups are of other parameters than the own, or have other options."""
        own_options, saved_options = (
            {tuple(sorted(group["params"])): sorted(group) for group in groups}
            for groups in (self.state_dict()["param_groups"], saved)
        )
        for names in {**own_options, **saved_options}:
            own, found = own_options.get(names), saved_options.get(names)
            if own != found:
                raise ValueError(
                    f"the param group of {', '.join(names)} has the options {found} in the state "
                    f"dict, but {own} here; is it of another model or algorithm?"
                )

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler puts a wrapper of `step`, bound to this object, in the way of the class's own.
        return {key: value for key, value in self.__dict__.items() if key != "step"}
