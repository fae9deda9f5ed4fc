"""`fuse` and `unfuse`: makes optimizers that a program already has step natively, in place."""

from __future__ import annotations

import functools
import logging
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from torch import nn
from torch.optim import Optimizer

from recap_fast.optim import BY_TORCH_CLASS, FusedOptimizer
from recap_fast.optim.hooks import steps_as_its_class, unhooked
from recap_fast.optim.left_to_torch import LeftToTorch, why_formats_not_native
from recap_fast.optim.torch_step import make_counts_torchs
from recap_fast.state.formats import (
    FORMAT_OPTIONS,
    StateDtype,
    check_formats,
    format_options,
    has_formats,
)

if TYPE_CHECKING:
    from recap_fast.keyed.fused import FusedCombinedOptimizer

logger = logging.getLogger("recap_fast")

T = TypeVar("T", bound=Optimizer | Sequence[Optimizer])

_WITHOUT_FORMATS = ("sparse_adam", "rowwise_adagrad")  # algorithms


def fuse(
    optimizer: T,
    *,
    state_dtype: StateDtype | None = None,
    master_weights: bool = False,
    stochastic_rounding: bool = False,
    rounding_seed: int = 0,
) -> T:
    """Makes the optimizers that a program has step natively, in place, at any moment of training.

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=1000)
        recap_fast.fuse(optimizer)

    It stays the same object: state, param groups, hooks, attached schedulers and `GradScaler`s go
    on as before, and so do checkpoints and pickles. Its class becomes `FusedAdam`, `FusedAdamW`,
    `FusedSparseAdam`, `FusedAdagrad`, `FusedRMSprop` or `FusedSGD`, each derived from the class of
    `torch.optim` that it was.

    What cannot step natively goes on stepping in its own way: other optimizers, classes with a
    ``step`` of their own, optimizers whose ``step`` was replaced on the object, and, param group by
    param group, complex parameters, tensor subclasses other than DTensor, devices without an
    engine, ``differentiable=True``. Sparse gradients (`torch.nn.Embedding` with ``sparse=True``)
    step natively on the CPU; with the momentum of SGD, and on other devices, they are left to
    torch, with all of their group. A group whose gradients turn out to be such at a step is left to
    torch from that step on, which is logged.

    One line at level INFO of the logger ``recap_fast`` says what steps natively, and what does not
    and why: ``fuse: 9 of 12 param groups are native; group 3: complex64 parameters``. Where none is
    native, it is a WARNING, which Python shows by default.

    Each optimizer takes a native call of its own. To have one call for several, make one optimizer
    with a param group for each, or a torchrec ``keyed.CombinedOptimizer``.

    Args:
        optimizer: a `torch.optim` Adam, AdamW, SparseAdam, Adagrad, RMSprop or SGD; a list or tuple
            of optimizers; or a torchrec ``CombinedOptimizer``, ``KeyedOptimizerWrapper``,
            ``GradientClippingOptimizer`` or ``WarmupOptimizer`` with such inside, however deep. A
            ``CombinedOptimizer`` becomes a `recap_fast.FusedCombinedOptimizer`, which steps all of
            them in one call.
        state_dtype, master_weights, stochastic_rounding, rounding_seed: as in
            `recap_fast.optim.FusedAdam`, for every param group but those that have a key of that
            name. State that there is already is converted: to 16 bits by rounding to nearest.
            Fused tables stay as they are.

    Returns:
        ``optimizer``, the same object.

    Raises:
        TypeError: it is not an optimizer, or one in the list is not, or an argument is of another
            type; nothing is changed.
        ValueError: an optimizer or param group cannot have the formats that are asked for, or one
            that is native already has others; nothing is changed.
    """
    optimizers = _check(optimizer, "fuse")
    formats = format_options(state_dtype, master_weights, stochastic_rounding, rounding_seed)
    for number, outer in enumerate(optimizers):
        _check_formats(outer, _where(number, optimizers), formats)
    reports = []
    for number, outer in enumerate(optimizers):
        where = _where(number, optimizers)
        reasons = {id(inner): _fuse(inner, formats) for inner in list(_walk(outer))[::-1]}
        reports.append(_Report(outer, where, reasons))
    native = sum(report.native for report in reports)
    total = sum(report.total for report in reports)
    others = "".join(f"; {text}" for report in reports for text in report.others)
    level = logging.WARNING if total and not native else logging.INFO  # it changed nothing
    logger.log(level, "fuse: %d of %d param groups are native%s", native, total, others)
    return optimizer


def unfuse(optimizer: T) -> T:
    """Gives optimizers the classes of `torch.optim` and torchrec back, in place.

    The reverse of `fuse`, at any moment of training; also for optimizers that were made as
    `recap_fast.optim` classes. ``foreach`` and ``fused`` of the param groups are what they were.
    CUDA graphs that captured a step cannot be replayed after it.

    Args:
        optimizer: as for `fuse`.

    Returns:
        ``optimizer``, the same object.

    Raises:
        TypeError: it is not an optimizer, or one inside is of a class derived from one of
            `recap_fast.optim`; nothing is changed.
        ValueError: one inside has a ``clip_grad_norm``, ``lazy``, a ``state_dtype`` and the like,
            or schedules on the device, of which its former class knows nothing; nothing is changed.
    """
    inside = [inner for outer in _check(optimizer, "unfuse") for inner in _walk(outer)]
    for inner in inside:
        if isinstance(inner, FusedOptimizer):
            _check_can_unfuse(inner)
        elif _is_fused_combined(inner) and inner._device_rates:
            raise ValueError(
                "unfuse: the rates of this optimizer follow their schedules on the device "
                "(device_schedule=True), which no other optimizer does; make a new one"
            )
    for inner in inside:
        if isinstance(inner, FusedOptimizer):
            _unfuse(inner)
        elif _is_fused_combined(inner):
            _uncombine(inner)
    return optimizer


# --- what is inside ------------------------------------------------------------------------------


def _where(number: int, optimizers: Sequence[Optimizer]) -> str:
    return f" of optimizer {number}" if len(optimizers) > 1 else ""


def _check(optimizer: Any, function: str) -> list[Optimizer]:
    optimizers = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    for found in optimizers:
        if not isinstance(found, Optimizer):
            raise TypeError(
                f"{function} takes a torch.optim.Optimizer or a list of them, found "
                f"{_found_instead(found, function)}"
            )
    return optimizers


def _found_instead(found: Any, function: str) -> str:
    """What is no optimizer, and what to pass in its place."""
    if found is None:
        return "None: pass the optimizer"
    kind = found if isinstance(found, type) else type(found)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(found, type):
        return f"the class {name}: make an instance of it"
    if isinstance(found, nn.Module):
        if hasattr(found, "configure_optimizers"):
            return (
                f"a {name}: call {function} on the optimizer in configure_optimizers, before you "
                "return it"
            )
        return f"a {name}: pass the optimizer of the model"
    if isinstance(getattr(found, "optimizer", None), Optimizer):
        return f"a {name}: pass its attribute `optimizer`"
    return f"a {name}; pass the optimizer inside it"


def _is_keyed(optimizer: Optimizer) -> bool:
    """Whether it is one of torchrec's, which is not imported to find out."""
    keyed = sys.modules.get("torchrec.optim.keyed")
    return keyed is not None and isinstance(optimizer, keyed.KeyedOptimizer)


def _walk(optimizer: Optimizer) -> Iterator[Optimizer]:
    if not _is_keyed(optimizer):
        return iter((optimizer,))
    from recap_fast.keyed import walk

    return walk(optimizer)


class _Report:
    """How many param groups of an optimizer are native, and in words what the others are."""

    def __init__(self, outer: Optimizer, where: str, reasons: dict[int, str | None]) -> None:
        self.native = self.total = 0
        self.others: list[str] = []
        by_reason: dict[str, list[int]] = {}
        for leaf in _leaves(outer):
            left = getattr(leaf, "_left_to_torch", None)
            for index, group in enumerate(leaf.param_groups):
                reason = reasons[id(leaf)] if left is None else left.reason(group)
                if left is not None and reason is not None:
                    left.is_news(index, reason)  # which is said here, and not at the next step
                if reason is None:
                    self.native += 1
                else:
                    by_reason.setdefault(reason, []).append(self.total)
                self.total += 1
        for reason, numbers in by_reason.items():
            groups = "group" if len(numbers) == 1 else "groups"
            self.others.append(f"{groups} {', '.join(map(str, numbers))}{where}: {reason}")


def _leaves(optimizer: Optimizer) -> Iterator[Optimizer]:
    if not _is_keyed(optimizer):
        return iter((optimizer,))
    from recap_fast.keyed import leaves

    return leaves(optimizer)


def _fuse(optimizer: Any, formats: dict[str, Any]) -> str | None:
    """Makes one optimizer native, if it can be; else says why it cannot."""
    if _is_keyed(optimizer):
        return _fuse_keyed(optimizer)
    if not isinstance(optimizer, FusedOptimizer):
        if (reason := _why_not(optimizer)) is not None:
            return reason
        kind: Any = type(optimizer)
        fused = _fused_class(kind)
        assert fused is not None, "there was no reason against it"
        _set_class(optimizer, fused)
        optimizer._left_to_torch = LeftToTorch()
    if formats or any(map(has_formats, optimizer.param_groups)):
        optimizer._take_formats(formats)
        optimizer._place_state()
    return None


def _why_not(optimizer: Any) -> str | None:
    """Why an optimizer that is none of torchrec's cannot be made native; None: it can."""
    kind: Any = type(optimizer)
    if _fused_class(kind) is None:
        inside = getattr(optimizer, "optimizer", None)
        if isinstance(inside, Optimizer):
            return (
                f"{kind.__name__} wraps another optimizer: pass `optimizer.optimizer`, or call "
                "`fuse` before the library wraps it"
            )
        return f"{kind.__name__} has a step of its own"
    if not steps_as_its_class(optimizer):
        return f"the step of this {kind.__name__} was replaced on the object"
    return None


def _check_formats(optimizer: Optimizer, where: str, formats: dict[str, Any]) -> None:
    """Raises if param groups cannot have the formats that are asked for, here or in them."""
    index = 0
    for leaf in _leaves(optimizer):
        native = _native_class(leaf)
        if native is None and formats and not _is_of_tables(leaf):
            said = "it is torchrec's own" if _is_keyed(leaf) else _why_not(leaf)
            raise ValueError(
                f"fuse: {_given(formats)} cannot be had where torch steps, and the "
                f"{type(leaf).__name__}{where} cannot become native: {said}; fuse it by itself, "
                "without"
            )
        for group in leaf.param_groups:
            if native is not None:
                try:
                    _check_group(leaf, native, group, formats)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"fuse: param group {index}{where}: {error}") from None
            index += 1


def _native_class(optimizer: Any) -> type[FusedOptimizer] | None:
    """That which an optimizer has or would get."""
    if isinstance(optimizer, FusedOptimizer):
        return type(optimizer)
    if _is_keyed(optimizer) or _why_not(optimizer) is not None:
        return None
    kind: Any = type(optimizer)
    return _fused_class(kind)


def _check_group(
    optimizer: Optimizer, native: type[FusedOptimizer], group: dict[str, Any], formats: Any
) -> None:
    wanted = {**formats, **group}
    changed = [key for key in formats if group.get(key, formats[key]) != formats[key]]
    if changed and isinstance(optimizer, FusedOptimizer):
        raise ValueError(
            f"it has {changed[0]}={group[changed[0]]!r} already, and not {formats[changed[0]]!r}; "
            "set that in the group, and call fuse without it"
        )
    if not formats and not has_formats(wanted):
        return
    check_formats(wanted)
    if not has_formats(wanted):
        return
    if native.algorithm in _WITHOUT_FORMATS:
        raise ValueError(
            f"{_given(wanted)} cannot be had with {native.__name__}; fuse that by itself, without"
        )
    if (reason := why_formats_not_native(wanted)) is not None:
        raise ValueError(
            f"{_given(wanted)} cannot be had with {reason}; put these parameters into an optimizer "
            "of their own"
        )


def _given(options: dict[str, Any]) -> str:
    """The format options that are asked for, for a message."""
    return ", ".join(f"{key}={options[key]!r}" for key in FORMAT_OPTIONS if options.get(key))


def _check_can_unfuse(optimizer: FusedOptimizer) -> None:
    kind = type(optimizer)
    torch_class: Any = kind.torch_class()
    if _fused_class(torch_class) is not kind:
        raise TypeError(
            f"unfuse: {kind.__name__} is derived from a class of recap_fast.optim, and has no "
            "class of torch.optim to go back to"
        )
    if optimizer.clip_grad_norm is not None:
        raise ValueError(
            f"unfuse: this {kind.__name__} has clip_grad_norm={optimizer.clip_grad_norm}, and "
            f"{kind.torch_class().__name__} does not clip; make a new one, and call "
            "torch.nn.utils.clip_grad_norm_ before its step"
        )
    if optimizer.clear_grads:
        raise ValueError(
            f"unfuse: this {kind.__name__} has clear_grads=True, and {kind.torch_class().__name__} "
            "leaves gradients as they are; make a new one, and call zero_grad after its step"
        )
    if any(group.get("lazy") for group in optimizer.param_groups):
        raise ValueError(
            f"unfuse: this {kind.__name__} has lazy=True, of which {kind.torch_class().__name__} "
            "knows nothing: it would decay all rows; set it to False in the param groups first"
        )
    for group in filter(has_formats, optimizer.param_groups):
        raise ValueError(
            f"unfuse: this {kind.__name__} has {_given(group)}, of which "
            f"{kind.torch_class().__name__} knows nothing; make a new one, and load into it what "
            "recap_fast.optim.float32_state returns"
        )


def _unfuse(optimizer: FusedOptimizer) -> None:
    make_counts_torchs(optimizer, optimizer.param_groups)
    of_torch = set()
    if all(group.get("fused") for group in optimizer.param_groups):
        of_torch.add("_step_supports_amp_scaling")  # which torch's fused step sets, and needs
    own = {"_stepper", "_has_large_state_to_place", *optimizer._OWN_OPTIONS}
    for name in own - of_torch:
        optimizer.__dict__.pop(name, None)
    _set_class(optimizer, type(optimizer).torch_class())


# --- classes -------------------------------------------------------------------------------------


@functools.cache
def _fused_class(kind: type[Optimizer]) -> type[FusedOptimizer] | None:
    """The fused class in place of one of torch's, or of one that has its step; else None.

    Of a class derived from torch's, a further class is derived, so that what it adds is kept.
    """
    if kind in BY_TORCH_CLASS:
        return BY_TORCH_CLASS[kind]
    bases: list[type[Optimizer]] = [found for found in kind.__mro__ if found in BY_TORCH_CLASS]
    base = bases[0] if bases else None
    if base is None or issubclass(kind, FusedOptimizer):
        return None
    if unhooked(kind.step) is not unhooked(base.step):
        return None
    if getattr(kind, "_init_group", None) is not getattr(base, "_init_group", None):
        return None
    body = {
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "__reduce__": lambda self: (_blank, (kind,), self.__getstate__()),
        "algorithm": BY_TORCH_CLASS[base].algorithm,
    }
    return types.new_class(
        f"Fused{kind.__name__}", (FusedOptimizer, kind), exec_body=lambda ns: ns.update(body)
    )


def _blank(kind: Any) -> Optimizer:
    """An object of a class made by `_fused_class`, which pickle would not find, to be filled."""
    fused = _fused_class(kind)
    assert fused is not None, "it has pickled an object of this class"
    return object.__new__(fused)


def _set_class(optimizer: Any, kind: type[Optimizer]) -> None:
    """Changes the class; a scheduler that watches for steps watches those of the new one."""
    watched = hasattr(optimizer.__dict__.get("step"), "_wrapped_by_lr_sched")
    optimizer.__dict__.pop("step", None)
    optimizer.__class__ = kind
    optimizer._patch_step_function()  # names in profiles, and torch's hooks around the step
    if watched:
        optimizer.step = _watched(optimizer)


def _watched(optimizer: Any) -> Callable[..., Any]:
    """The wrapper of `step` by which torch's schedulers see that one was taken.

    torch's own is bound to the class that the optimizer had when the scheduler was made.
    """
    reference = weakref.ref(optimizer)

    @functools.wraps(type(optimizer).step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        found: Any = reference()
        found._opt_called = True
        return type(found).step(found, *args, **kwargs)

    wrapper._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return wrapper


# --- torchrec ------------------------------------------------------------------------------------


def _fuse_keyed(optimizer: Any) -> str | None:
    """As `_fuse`, of an optimizer of torchrec, whose members are fused already."""
    from torchrec.optim import keyed
    from torchrec.optim.fused import FusedOptimizer as EmbeddingOptimizer

    from recap_fast.keyed import CombinedOptimizer

    if isinstance(optimizer, EmbeddingOptimizer):
        return "tables, updated in the backward pass"
    kind = type(optimizer)
    if kind in (keyed.CombinedOptimizer, CombinedOptimizer):
        if steps_as_its_class(optimizer) and not _clips_what_is_not_native(optimizer):
            _combine(optimizer)
    elif _is_fused_combined(optimizer):
        optimizer._prepare()  # its members may have become native
    return f"{kind.__name__} has a step of its own"


def _is_of_tables(optimizer: Optimizer) -> bool:
    """Whether it updates tables in the backward pass."""
    if not _is_keyed(optimizer):
        return False
    from torchrec.optim.fused import FusedOptimizer as EmbeddingOptimizer

    return isinstance(optimizer, EmbeddingOptimizer)


def _clips_what_is_not_native(optimizer: Any) -> bool:
    """Whether a native call cannot find the norm that the optimizer clips by."""
    from recap_fast.keyed import is_dense, leaves

    if getattr(optimizer, "clip_grad_norm", None) is None:
        return False
    for leaf in filter(is_dense, leaves(optimizer)):
        if not isinstance(leaf, FusedOptimizer):
            return True
        left = leaf._left_to_torch
        if left is not None and any(left.reason(group) for group in leaf.param_groups):
            return True
    return False


def _combine(optimizer: Any) -> None:
    from recap_fast.keyed.fused import FusedCombinedOptimizer

    before = dict(optimizer.__dict__)
    for _, part in optimizer.optimizers:
        # Of a wrapper, torchrec's `save_param_groups` sets that inside only.
        part.defaults["_save_param_groups"] = optimizer.defaults["_save_param_groups"]
    kind = type(optimizer)
    _set_class(optimizer, FusedCombinedOptimizer)
    clip_grad_norm = before.get("clip_grad_norm")
    FusedCombinedOptimizer.__init__(
        optimizer,
        optimizer.optimizers,
        clip_grad_norm,
        step_supports_amp_scaling=False,  # a GradScaler goes on doing it itself
    )
    before.pop("step", None)
    optimizer.__dict__.update(before)  # those who registered a hook hold on to these very dicts
    optimizer._class_before = kind


def _is_fused_combined(optimizer: Optimizer) -> TypeGuard[FusedCombinedOptimizer]:
    module = sys.modules.get("recap_fast.keyed.fused")
    return module is not None and type(optimizer) is module.FusedCombinedOptimizer


def _uncombine(optimizer: Any) -> None:
    from recap_fast.keyed import CombinedOptimizer

    kind = optimizer.__dict__.pop("_class_before", CombinedOptimizer)
    # What a pickle leaves out is derived from the rest, and not that of another class; or a method
    # that others, such as schedulers, have put in the object.
    derived = optimizer.__dict__.keys() - optimizer.__getstate__().keys()
    if kind is CombinedOptimizer:
        derived &= CombinedOptimizer.__getstate__(optimizer).keys()
    for name in derived.union(optimizer._OWN_OPTIONS) & optimizer.__dict__.keys():
        if not callable(getattr(type(optimizer), name, None)):
            del optimizer.__dict__[name]
    _set_class(optimizer, kind)
