"""The parameters that an optimizer updates, and their state, under the names of a checkpoint.

A parameter has the name that it would have if the model were not wrapped. State has torch's names;
that of fused tables has those of `recap_fast.embeddings`, whoever made the tables.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.optim import Optimizer
from torchrec.optim.fused import FusedOptimizer
from torchrec.optim.warmup import WarmupOptimizer

from recap_fast.embeddings.algorithms import algorithm_of
from recap_fast.embeddings.fused_optimizer import counts_forward_passes
from recap_fast.embeddings.live_step import LiveStep
from recap_fast.keyed import leaves, walk
from recap_fast.keyed.new_state import new_state_of
from recap_fast.names import bare_names
from recap_fast.state.formats import added_states
from recap_fast.state.memory import StateMemory
from recap_fast.state.new import counts_steps

# Where the classes are whose names say what is trained, and by which engine does not.
_OF_ALGORITHMS = ("torch.optim.", "recap_fast.torch_classes")


class TrainedParam(NamedTuple):
    """A parameter, and the optimizer that updates it.

    Attributes:
        name: its FQN.
        param: a whole tensor, a DTensor, or a ShardedTensor of a fused table.
        owner: has its state.
        group: its param group; empty for the parameter that torchrec's warm-up pretends to have.
    """

    name: str
    param: Tensor
    owner: Optimizer
    group: MutableMapping[str, Any]

    @property
    def is_fused(self) -> bool:
        """Whether it is updated in the backward pass; its state is then there from the start."""
        return isinstance(self.owner, FusedOptimizer)

    @property
    def kernel(self) -> Any:
        """The table-batched module that updates a fused table; else None."""
        return getattr(self.owner, "_emb_module", None)

    @property
    def algorithm(self) -> str:
        """What updates it, such as "Adam" for torch's and our own, or "exact_adagrad"."""
        if self.kernel is not None:
            # Without momentum, the plain SGD of a table that is not fused is the same.
            is_sgd = self.kernel.optimizer == EmbOptimType.EXACT_SGD
            return "SGD" if is_sgd else str(self.kernel.optimizer)
        for kind in type(self.owner).__mro__:
            if kind.__module__.startswith(_OF_ALGORITHMS) and kind is not Optimizer:
                return kind.__name__
        return type(self.owner).__name__

    @property
    def added_states(self) -> frozenset[str]:
        """Names of what may be in its state for the sake of formats alone."""
        return frozenset() if self.is_fused else added_states(counts_steps(self.owner))

    @property
    def counts_forward_passes(self) -> bool:
        """Whether its updates depend on how many forward passes its kernel has seen."""
        return self.kernel is not None and counts_forward_passes(self.kernel)

    def state(self) -> dict[str, Any]:
        """The state that there is, by name; a step count of a kernel is not part of it."""
        own = self.owner.state.get(self.param) or {}
        if self.kernel is None:
            return dict(own)
        # torchrec calls them "<table>.momentum1" or "<table>.weight.momentum_1".
        found = {key.rpartition(".")[2]: value for key, value in own.items()}
        found = {key: value for key, value in found.items() if key not in ("step", "iter")}
        names = algorithm_of(self.kernel.optimizer).states
        return {
            names[place] if place < len(names) else key: value
            for place, (key, value) in enumerate(found.items())
        }

    def new_state(self, memory: StateMemory) -> dict[str, Tensor]:
        """Makes the state before the first step.

        Args:
            memory: where it goes; one for all parameters.

        Raises:
            TypeError: The optimizer is of a class whose state is not known.
        """
        return new_state_of(self.owner, self.group, self.param, memory)

    def state_to_be(self) -> dict[str, Tensor] | None:
        """The shapes and dtypes of the state that there is or will be, as tensors.

        None if there is none and the optimizer is of a class whose state is not known.
        """
        state = {key: value for key, value in self.state().items() if isinstance(value, Tensor)}
        if self.is_fused:
            return state
        like = torch.empty(self.param.shape, dtype=self.param.dtype, device="meta")
        try:
            return {**new_state_of(self.owner, self.group, like, StateMemory()), **state}
        except TypeError:
            return state or None

    def column_shards(self, state: Tensor) -> list[list[int]] | None:
        """How a table is cut, if each of its column shards has an entry of `state` for every row.

        Returns:
            First row, first column, rows and columns of each shard, in their order in `state`; None
            if rows are whole, or their columns have entries of their own.
        """
        if not isinstance(self.param, ShardedTensor) or len(state.shape) != 1:
            return None
        shards = [
            [*shard.shard_offsets, *shard.shard_sizes]
            for shard in self.param.metadata().shards_metadata
        ]
        if len({column for _, column, _, _ in shards}) == 1:
            return None
        if len({row for row, _, _, _ in shards}) == 1:
            shards.sort(key=lambda shard: shard[1])
        return shards


def trained_params(model: nn.Module, optimizer: Optimizer) -> list[TrainedParam]:
    """Returns what an optimizer updates on this process, in the order of its param groups.

    Args:
        model: wrapped or not.
        optimizer: of torchrec's keyed ones, or any of torch's.

    Raises:
        ValueError: A parameter of the optimizer is not one of the model.
        RuntimeError: A fused table is shown as what its kernel cannot follow.
    """
    for leaf in leaves(optimizer):
        if isinstance(leaf, LiveStep):
            leaf.look()  # or the kernel might have others than are shown
    bare = bare_names(model)
    names: dict[int, str] = {}
    for name, param in model.named_parameters():
        names.setdefault(id(param), bare(name))
    # A fused table is not always shown as the same tensor; of others, a name alone proves nothing.
    keyed = {id(param): bare(name) for name, param in getattr(optimizer, "params", {}).items()}
    found = []
    for inner in walk(optimizer):
        if isinstance(inner, WarmupOptimizer):
            param = inner._warmup_param
            found.append(TrainedParam(keyed[id(param)], param, inner, {}))
    for leaf in leaves(optimizer):
        own_names = {**keyed, **names} if isinstance(leaf, FusedOptimizer) else names
        for index, group in enumerate(leaf.param_groups):
            for place, param in enumerate(group["params"]):
                if id(param) not in own_names:
                    raise ValueError(
                        f"parameter {place} of param group {index} of the optimizer, of shape "
                        f"{tuple(param.shape)}, is not a parameter of the model: was the optimizer "
                        "made for another, or before the model was moved or sharded?"
                    )
                found.append(TrainedParam(own_names[id(param)], param, leaf, group))
    return found
