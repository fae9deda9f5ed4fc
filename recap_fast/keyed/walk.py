"""The optimizers that a keyed optimizer is made of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from torch.optim import Optimizer
from torchrec.optim import keyed
from torchrec.optim.fused import FusedOptimizer

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


def plain_leaves(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Those of `leaves` that step as they are: nothing around them clips or sets their rates."""
    if isinstance(optimizer, keyed.CombinedOptimizer):
        for _, part in optimizer.optimizers:
            yield from plain_leaves(part)
    elif (
        isinstance(optimizer, keyed.KeyedOptimizerWrapper)
        and type(optimizer) is keyed.KeyedOptimizerWrapper
    ):
        inner = optimizer._optimizer
        clips = getattr(inner, "clip_grad_norm", None) is not None
        if not isinstance(inner, keyed.KeyedOptimizer) and not clips:
            yield inner


def _give_hooks(wrapper: keyed.OptimizerWrapper) -> None:
    """Gives a wrapper what its step needs once one of its class was copied or unpickled.

    torch then has the class look for hooks, in objects too that torchrec made without.
    """
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        if not hasattr(wrapper, name):
            setattr(wrapper, name, OrderedDict())


class Inside:
    """The optimizers inside a combined one, as they are now.

    Attributes:
        leaves: as the function of this name.
        fused_leaves: those of them that update embeddings in the backward pass.
        state_owners: the leaves, and after them the wrappers around some. A wrapper's state may be
            a copy of what its leaves once had.
    """

    def __init__(self, optimizer: keyed.CombinedOptimizer) -> None:
        inside = list(walk(optimizer))
        wrappers = [each for each in inside if isinstance(each, keyed.OptimizerWrapper)]
        for wrapper in wrappers:
            _give_hooks(wrapper)
        # Without itself, which would be a cycle.
        self._nested = [e for e in inside[1:] if isinstance(e, keyed.CombinedOptimizer)]
        self._count = self._count_now(optimizer)
        self.leaves = list(leaves(optimizer))
        self.fused_leaves = [leaf for leaf in self.leaves if isinstance(leaf, FusedOptimizer)]
        if self.fused_leaves:
            from recap_fast.embeddings.live_step import follow_kernel  # which imports this package

            for leaf in self.fused_leaves:
                follow_kernel(leaf)
        self.state_owners = [*self.leaves, *wrappers]

    def is_current(self, optimizer: keyed.CombinedOptimizer) -> bool:
        """Whether none was added to the optimizer, or taken away, since."""
        return self._count == self._count_now(optimizer)

    def _count_now(self, optimizer: keyed.CombinedOptimizer) -> int:
        count = len(optimizer.optimizers)
        for nested in self._nested:
            count += len(nested.optimizers)
        return count


def is_dense(optimizer: Optimizer) -> bool:
    """Whether a step of `optimizer` may update parameters.

    One made of fused embedding optimizers only does not: they update in the backward pass, and a
    step passes the learning rate on.
    """
    return not all(isinstance(leaf, FusedOptimizer) for leaf in leaves(optimizer))
