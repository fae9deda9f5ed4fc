"""torchrec's `keyed.CombinedOptimizer` with the behaviour that a training loop expects of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torchrec.optim import keyed

from recap_fast.closure import evaluate
from recap_fast.state import new_state


class CombinedOptimizer(keyed.CombinedOptimizer):
    """Several keyed optimizers as one; its `state_dict` is keyed by FQN.

    The optimizers in `keyed.KeyedOptimizerWrapper`s are the dense ones, each over a `torch.optim`
    optimizer; all others are fused embedding optimizers, which update in the backward pass and to
    which a step only passes on the learning rate.

    Where torchrec's class does otherwise:

    * a closure is evaluated once for all optimizers, and its result returned;
    * `zero_grad` passes `set_to_none` on;
    * `init_state` makes state without counting a step;
    * `load_state_dict` checks names and shapes before it changes anything, and makes the state that
      it is about to load into;
    * it can be pickled and deep-copied while a scheduler is attached.
    """

    def dense_optimizers(self) -> Iterator[tuple[str, keyed.KeyedOptimizerWrapper]]:
        """The dense optimizers with their keys, in order."""
        for key, part in self._optims:
            if isinstance(part, keyed.KeyedOptimizerWrapper):
                yield key, part

    def fused_optimizers(self) -> Iterator[keyed.KeyedOptimizer]:
        """The fused embedding optimizers, in order."""
        for _, part in self._optims:
            if not isinstance(part, keyed.KeyedOptimizerWrapper):
                yield part

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every dense parameter that has a gradient; returns what `closure` returned."""
        loss = evaluate(closure)
        for _, part in self._optims:
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients: to None, or with `set_to_none=False` to zero."""
        for _, part in self.dense_optimizers():
            part._optimizer.zero_grad(set_to_none=set_to_none)
        for part in self.fused_optimizers():
            part.zero_grad(set_to_none=set_to_none)

    def sync_fused_learning_rates(self) -> None:
        """Passes the rates in the param groups of fused optimizers on to FBGEMM's kernels.

        The kernels update during the backward pass, at the rate that they were given last.
        """
        for part in self.fused_optimizers():
            part.step()

    def init_state(self, sparse_grad_parameter_names: set[str] | None = None) -> None:
        """Makes the state of every trainable dense parameter that has none yet.

        Parameters, gradients and step counts stay as they are. `sparse_grad_parameter_names` is
        part of torchrec's interface; nothing depends on it, since no step is taken.
        """
        self._make_state(lambda _, param: param.requires_grad)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what `state_dict` of this class, or of its fused counterpart, returned.

        Raises:
            ValueError: The state is of other parameters, or of another shape; nothing is changed.
        """
        saved = state_dict["state"]
        self._check(saved)
        self._make_state(lambda name, _: name in saved)
        super().load_state_dict(state_dict)

    def _make_state(self, wanted: Callable[[str, torch.Tensor], bool]) -> None:
        for key, part in self.dense_optimizers():
            optimizer = part._optimizer
            groups = {param: group for group in optimizer.param_groups for param in group["params"]}
            for name, param in part.params.items():
                if wanted(self.prepend_opt_key(name, key), param) and not optimizer.state.get(
                    param
                ):
                    state = new_state(optimizer, groups[param], param)
                    if state:
                        optimizer.state[param].update(state)

    def _check(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises if names of saved and own state differ, or their shapes."""
        params = self.params
        unknown = [name for name in saved if name not in params]
        if unknown:
            raise ValueError(
                f"the state dict has state of {len(unknown)} parameter(s) that this optimizer does "
                f"not have, such as {unknown[0]!r}; is it of another model?"
            )
        names = {param: name for name, param in params.items()}
        absent = [names[param] for param, state in self.state.items() if names[param] not in saved]
        if absent:
            raise ValueError(
                f"the state dict has no state of {len(absent)} parameter(s) that this optimizer "
                f"has state of, such as {absent[0]!r}; is it of another model?"
            )
        for name, state in saved.items():
            for key, value in state.items():
                param = params[name]
                if (
                    key == "step"
                    or type(value) is not torch.Tensor
                    or not isinstance(param, torch.Tensor)
                ):
                    continue
                own = self.state.get(param, {}).get(key, param)
                if isinstance(own, torch.Tensor) and value.shape != own.shape:
                    raise ValueError(
                        f"{key!r} of {name!r} has shape {tuple(value.shape)} in the state dict, "
                        f"but {tuple(own.shape)} here; is it of another model?"
                    )

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler puts a wrapper of `step`, bound to this object, in the way of the class's own.
        return {key: value for key, value in self.__dict__.items() if key != "step"}
