"""FBGEMM's table-batched module, looking at what the user set whenever it is used.

FBGEMM knows a learning rate, and tables, as they were when it was told last. Here a module looks
for itself, on the way into every forward and every backward pass: at the rate in the param group,
at the parameters of the model that show its tables, and at whether these are frozen.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim import Optimizer

from recap_fast.embeddings.counted import CountedKernel
from recap_fast.embeddings.passes import Pass, gradient_of_weights, joined, without_tables
from recap_fast.embeddings.several_backwards import SeveralBackwards
from recap_fast.embeddings.shown import NONE_FROZEN, ShownTables
from recap_fast.names import some

# Has the output of a lookup require a gradient.
_ANCHOR: Final = torch.zeros(0, requires_grad=True)


class LiveKernel(CountedKernel):
    """A table-batched module that follows its param group and the parameters that show its tables.

    The rate is the one that the group has at the backward pass. A frozen table is looked up, but
    neither it nor its state changes. `inference_mode` works.

    Attributes:
        shown: The parameters of the model that show the tables; None if they are not known.
        several_backwards: What becomes of several backward passes before a step.
        joins_backward: Whether frozen tables take part in the backward pass too, since others wait
            for that in a collective.
    """

    shown: ShownTables | None
    several_backwards: SeveralBackwards

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._begin()

    def _begin(self) -> None:
        self.shown = None
        self.joins_backward = False
        self.several_backwards = SeveralBackwards()
        self._optimizer: weakref.ref[Optimizer] | None = None
        # The last rate that was passed on, and what it is in float32.
        self._passed: tuple[float, float] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveKernel:
        """A module with memory of its own, which follows nobody yet and holds no gradients."""
        made = memo[id(self)] = type(self).__new__(type(self))
        ours = {"shown", "several_backwards", "_optimizer"}
        state = {name: value for name, value in self.__dict__.items() if name not in ours}
        made.__dict__.update(copy.deepcopy(state, memo))
        made._begin()
        made.several_backwards.mode = self.several_backwards.mode
        return made

    @property
    def tables(self) -> list[str]:
        """The names of the tables, for a message."""
        return list(self.table_names or [f"number {i}" for i in range(len(self.embedding_specs))])

    @property
    def version(self) -> int:
        """What changes whenever torch knows that somebody has written to the weights."""
        weights = (self.weights_host, self.weights_dev, self.weights_uvm)
        return sum(each._version for each in weights)

    def follow_group_of(self, optimizer: Optimizer) -> None:
        """Has the rate be that of the one param group of an optimizer, which must outlive this."""
        self._optimizer = weakref.ref(optimizer)

    def pass_rate(self) -> float:
        """Tells FBGEMM the rate that the param group has now; returns it."""
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is None:
            return float(self.learning_rate_tensor.item())
        rate = float(optimizer.param_groups[0]["lr"])
        if self._passed != (rate, self.learning_rate_tensor.item()):
            self.set_learning_rate(rate)
            self._passed = rate, self.learning_rate_tensor.item()
        return rate

    def look(self) -> frozenset[int]:
        """Brings in what the parameters of the model show; returns the places of frozen tables.

        Raises:
            RuntimeError: A parameter shows what cannot be brought in; the message names the table.
        """
        return NONE_FROZEN if self.shown is None else self.shown.look(self)

    # A compiled frame would take rates and parameters for constants, and FBGEMM's ends one anyway.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None = None,
        feature_requires_grad: Tensor | None = None,
        batch_size_per_feature_per_rank: list[list[int]] | None = None,
        **others: Any,
    ) -> Tensor:
        """Returns the pooled embeddings; arguments are those of FBGEMM's module."""
        pooled: Tensor
        if torch.is_inference_mode_enabled():  # in which FBGEMM has no lookup
            with torch.inference_mode(False), torch.no_grad():
                pooled = self.forward(
                    *(indices, offsets, per_sample_weights, feature_requires_grad),
                    *(batch_size_per_feature_per_rank,),
                    **others,
                )
                return pooled
        others["feature_requires_grad"] = feature_requires_grad
        others["batch_size_per_feature_per_rank"] = batch_size_per_feature_per_rank
        others = {name: value for name, value in others.items() if value is not None}
        frozen = self.look()
        used = Pass(indices, offsets, per_sample_weights, others, self.pass_rate(), frozen)
        self._check_possible(used)
        joins = self.joins_backward or not self._all(frozen)
        if per_sample_weights is not None:
            joins |= per_sample_weights.requires_grad
        if torch.is_grad_enabled() and joins:
            if "vbe_output" in others:  # which must be an output of FBGEMM's own node
                pooled = super().forward(indices, offsets, per_sample_weights, **others)
                return pooled
            anchor = self.placeholder_autograd_tensor if self.shown is None else _ANCHOR
            pooled = _Lookup.apply(anchor, per_sample_weights, self, used)  # type: ignore[no-untyped-call]
            return pooled
        return self._look_up_only(used)

    def _all(self, frozen: frozenset[int]) -> bool:
        return len(frozen) == len(self.embedding_specs)

    def _check_possible(self, used: Pass) -> None:
        """Raises if the update of a pass would have to be another than FBGEMM's, and cannot."""
        names = [self.tables[place] for place in sorted(used.frozen)]
        several = self.several_backwards
        why = f"several_backwards is accumulate for {some(self.tables)}"
        if not several.accumulates:
            if not names or self._all(used.frozen):
                return
            why = f"of the tables of one FBGEMM module, only {some(names)} are frozen"
            if self._used_rowwise_adagrad_with_global_weight_decay:
                raise RuntimeError(
                    f"{why}, but decouple_global decays the rows of all of them: freeze all, or "
                    "choose another weight_decay_mode"
                )
        if used.varies or self.prefetch_pipeline:
            what = "batches of different sizes" if used.varies else "prefetching"
            raise RuntimeError(f"{why}, which does not work with {what}: do without one of the two")

    def _look_up_only(self, used: Pass) -> Tensor:
        """Looks up what nothing is to be learnt from."""
        with torch.no_grad():
            if not self._all(used.frozen):
                return self.look_up(used)
            with self.as_counted():
                return self.look_up(used)

    def look_up_to_train(self, used: Pass) -> Tensor:
        """Looks up; the pass gets FBGEMM's node if that can be used."""
        several = self.several_backwards
        if (several.accumulates and several.counted) or self._all(used.frozen):
            with self.as_counted():
                return self.look_up(used)
        if several.accumulates or used.frozen:
            output = self.look_up(used)
            several.counted = True
            return output
        self.placeholder_autograd_tensor.requires_grad_()  # which a frozen model's may not do
        given = used.weights
        if given is not None:  # in float32, as FBGEMM would have them, or they were no leaf there
            used.weights = given.detach().float().requires_grad_(given.requires_grad)
        with torch.enable_grad():
            output = self.look_up(used)
        several.counted = True
        used.weights, used.node, used.version = given, output.grad_fn, self.version
        return output.detach()

    def update(self, used: Pass, gradient: Tensor, learns_weights: bool) -> Tensor | None:
        """Takes the backward pass of a lookup; returns the gradient of per-sample weights."""
        frozen = used.frozen | self.look()
        several = self.several_backwards
        if self._all(frozen) and not learns_weights:
            return None
        if not (several.accumulates or self._all(frozen)):
            several.count_update(self.tables)
            # The node has kept the rate, and errs if the weights were written to.
            as_it_was = self.pass_rate() == used.rate and self.version == used.version
            if used.node is not None and as_it_was and not frozen:
                gradients = used.node(gradient)
                if not learns_weights or used.weights is None:
                    return None
                return _gradient_of_weights_in(gradients, used.node).to(used.weights.dtype)
        if used.varies or self.prefetch_pipeline:
            what = "batches of different sizes" if used.varies else "prefetching"
            raise RuntimeError(
                f"the rate or the weights of {some(self.tables)}, or which of them are frozen, "
                f"have changed since the forward pass, which does not work with {what}: change "
                "them between optimizer.step() and the next forward pass"
            )
        of_weights = gradient_of_weights(self, used, gradient) if learns_weights else None
        if self._all(frozen):
            return of_weights
        if several.accumulates:
            several.held.append(used.copied(gradient, frozen))
        else:
            self._replay([replace(used, gradient=gradient, frozen=frozen)])
        return of_weights

    def check_step(self) -> None:
        """Raises if a step could not be taken, or would use a gradient that no step uses.

        Raises:
            RuntimeError: The message names the table.
        """
        if self.shown is not None:
            self.shown.refuse_gradients()
        if self.several_backwards.held:
            self.look()

    def take_step(self) -> None:
        """Updates by the sum of the gradients that are held, if there are; a new step begins."""
        several = self.several_backwards
        self.pass_rate()
        if several.held:
            frozen = self.look()
            self._replay([replace(each, frozen=each.frozen | frozen) for each in several.held])
        several.held = []
        several.begin_step()

    def _replay(self, passes: Sequence[Pass]) -> None:
        """Makes one update of several passes, at the present rate; none is counted once more."""
        self.pass_rate()
        features = self.feature_table_map
        one = joined(
            [without_tables(each, features, each.frozen) for each in passes], len(features)
        )
        if one.indices.numel() == 0:
            return
        self.placeholder_autograd_tensor.requires_grad_()
        if one.weights is not None:
            one = replace(one, weights=one.weights.detach())
        with self.as_counted(), torch.enable_grad():
            output = self.look_up(one)
        node: Any = output.grad_fn
        node(one.gradient)


def _gradient_of_weights_in(gradients: Any, node: Any) -> Tensor:
    """Finds the gradient of the per-sample weights, which are a leaf, in what a node returned."""
    found: list[Tensor] = [
        gradient
        for gradient, (function, _) in zip(gradients, node.next_functions, strict=True)
        if gradient is not None and isinstance(getattr(function, "variable", None), Tensor)
    ]
    return found[0]


class _Lookup(torch.autograd.Function):
    """A lookup whose backward pass updates the tables."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, weights: Tensor | None, kernel: LiveKernel, used: Pass
    ) -> Tensor:
        output = kernel.look_up_to_train(used)
        ctx.kernel, ctx.used = kernel, used
        # Or nobody would notice that they were changed, or that the graph was freed.
        ctx.save_for_backward(used.indices, used.offsets, weights)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, None, None]:
        _ = ctx.saved_tensors
        of_weights = ctx.kernel.update(ctx.used, gradient, ctx.needs_input_grad[1])
        return None, of_weights, None, None


def make_live(kernel: nn.Module) -> LiveKernel | None:
    """Makes a table-batched module a `LiveKernel`, in place; None if it is of another class."""
    if type(kernel) is SplitTableBatchedEmbeddingBagsCodegen:
        kernel.__class__ = LiveKernel
        live: Any = kernel
        live._begin()
    return kernel if isinstance(kernel, LiveKernel) else None
