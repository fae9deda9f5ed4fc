"""What a step means to optimizers of fused tables."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torchrec.distributed import batched_embedding_kernel
from torchrec.modules import fused_embedding_modules

from recap_fast.closure import evaluate
from recap_fast.embeddings.live import LiveKernel, make_live


class LiveStep:
    """The step of an optimizer around a `LiveKernel`, `_emb_module`.

    Tables train in the backward pass, so that a step updates only what `several_backwards` has held
    until then.
    """

    _emb_module: LiveKernel

    def step(self, closure: Any = None) -> Any:
        """Makes the update of what is held, and begins another step."""
        loss = evaluate(closure)
        self._emb_module.take_step()
        return loss

    def check_step(self) -> None:
        """Raises if a step would leave something out, before it or another changes anything."""
        self._emb_module.check_step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops what is held, and gradients of the tables themselves."""
        self._emb_module.several_backwards.clear()
        if self._emb_module.shown is not None:
            self._emb_module.shown.drop_gradients()
        self._emb_module.pass_rate()

    def pass_rate(self) -> None:
        """Has the kernel's rate be that of the param group, as it is on every use."""
        self._emb_module.pass_rate()

    def look(self) -> None:
        """Has the tables be those that the model shows; see `LiveKernel.look`."""
        self._emb_module.look()


class LiveUnshardedOptimizer(LiveStep, fused_embedding_modules.EmbeddingFusedOptimizer):
    """That of torchrec's unsharded fused collections."""


class LiveShardedOptimizer(LiveStep, batched_embedding_kernel.EmbeddingFusedOptimizer):
    """That of a kernel under torchrec's model parallel."""


_LIVE: dict[type[Optimizer], type[Any]] = {
    base: kind for kind in LiveStep.__subclasses__() for base in kind.__bases__[1:]
}


def follow_kernel(optimizer: Optimizer) -> LiveKernel | None:
    """Has the kernel of an optimizer of fused tables follow its param group from now on.

    Returns:
        The kernel; None if it is of a class that cannot.
    """
    module = getattr(optimizer, "_emb_module", None)
    kernel = None if module is None else make_live(module)
    if kernel is None:
        return None
    optimizer.__class__ = _LIVE.get(type(optimizer), type(optimizer))
    kernel.follow_group_of(optimizer)
    return kernel


def pass_rate(optimizer: Optimizer) -> None:
    """Passes the rate of fused tables on to their kernel, and does nothing else."""
    if isinstance(optimizer, LiveStep):
        optimizer.pass_rate()
    else:
        optimizer.step()
