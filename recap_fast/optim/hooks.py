"""Step hooks and profiler ranges at no cost where nobody uses them."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch.autograd import profiler
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


def observed(step: Callable[..., Any]) -> Callable[..., Any]:
    """Gives an optimizer's `step` torch's hooks and its range in a profile.

    `torch.optim.Optimizer` wraps every class's `step` for that. Its wrapper opens a profiler range
    around each call, which takes as long as stepping hundreds of small parameters; here the call
    goes through it only if a hook is registered or a profiler runs.
    """
    in_range = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or profiler._is_profiler_enabled  # to ask the profiler itself takes longer
        ):
            return in_range(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    wrapper.hooked = True  # type: ignore[attr-defined]  # or torch would wrap it again
    return wrapper


def unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """A class's `step` without the wrapper by which torch runs hooks and profiles."""
    return getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step


def steps_as_its_class(optimizer: Optimizer) -> bool:
    """Whether nobody has put another `step` in the object.

    torch's schedulers do, to see that one was taken, and libraries may put back what they found.
    """
    own = optimizer.__dict__.get("step")
    if own is None:
        return True
    if isinstance(own, types.MethodType):
        step = own.__func__
    elif hasattr(own, "_wrapped_by_lr_sched"):
        step = own.__wrapped__
    else:
        return False
    return unhooked(step) is unhooked(type(optimizer).step)
