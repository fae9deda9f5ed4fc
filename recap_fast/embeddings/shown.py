"""The parameters of a model that show the tables of a table-batched module."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torchrec.optim.fused import EmptyFusedOptimizer

from recap_fast.groups.fused_memory import memory_range

if TYPE_CHECKING:
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        SplitTableBatchedEmbeddingBagsCodegen,
    )

NONE_FROZEN: Final[frozenset[int]] = frozenset()
_WHAT_TO_DO: Final = (
    "move and cast a model before its embeddings are fused or sharded, or give the table back what "
    "it was"
)


class ShownTable:
    """A parameter that shows a table of a module, or several shards of one.

    Args:
        name: What to call it in a message.
        param: The parameter as it is now, in memory of the module.
        places: Those of the tables in the module.
    """

    def __init__(self, name: str, param: nn.Parameter, places: Iterable[int]) -> None:
        self.name = name
        self.param = param  # not weak: torch does not swap what has a weak reference
        self.places = frozenset(places)
        self.kind = type(param)
        self.is_marked = hasattr(param, "_in_backward_optimizers")
        with torch.no_grad():
            own = torch.Tensor.detach(param).as_subclass(Tensor)
        self.memory = own
        self.address = own.data_ptr()
        self.dtype = own.dtype
        self.shape = own.shape


class ShownTables:
    """All parameters that show tables of a module.

    What the user does to such a parameter is found here: an assigned state dict, a new parameter,
    `weight.data = ...` and conversions of the model give it another memory. The values in there
    are copied into the module, and the parameter shows the module's memory again.

    Args:
        holders: The modules that have them as "weight", by table: an `nn.ModuleDict`.
        tables: By table.
    """

    def __init__(self, holders: nn.ModuleDict, tables: Mapping[str, ShownTable]) -> None:
        self._holders = weakref.ref(holders)  # sharded, it leads back to the module
        self._tables = [
            (key, table, table.kind, table.dtype, (table.address, table.memory.numel()))
            for key, table in tables.items()
        ]

    def look(self, kernel: SplitTableBatchedEmbeddingBagsCodegen) -> frozenset[int]:
        """Brings what the parameters show into the module; returns the places of frozen tables.

        Raises:
            RuntimeError: A parameter is on another device, or of another dtype or shape; or it is
                none any longer. The tables that come before it have been brought in.
        """
        holders = self._holders()
        if holders is None:
            return NONE_FROZEN
        frozen = NONE_FROZEN
        modules = holders._modules
        for key, table, kind, dtype, where in self._tables:
            holder = modules.get(key)
            param: Any = None if holder is None else holder._parameters.get("weight")
            if not (  # one memory, however it is viewed
                type(param) is kind
                and (param.data_ptr(), param.numel()) == where
                and param.dtype is dtype
                and param.is_contiguous()
            ):
                _bring_in(table, param, kernel)
            if not param.requires_grad:
                frozen |= table.places
        return frozen

    def refuse_gradients(self) -> None:
        """Raises if a parameter has a gradient of its own, which nothing would use.

        Raises:
            RuntimeError: The message names the table.
        """
        for table, param in self._params():
            if param.grad is not None and param.requires_grad:
                raise RuntimeError(
                    f"the fused table {table.name} has a gradient that no step uses, since FBGEMM "
                    "updates it by the gradients of what is looked up: compute that part of the "
                    "loss (a penalty on the weights, say) of the pooled output, or leave the table "
                    "unfused"
                )

    def drop_gradients(self) -> None:
        """Sets the gradients of the parameters to None."""
        for _, param in self._params():
            param.grad = None

    def _params(self) -> Iterator[tuple[ShownTable, nn.Parameter]]:
        holders = self._holders()
        if holders is None:
            return
        for key, table, *_ in self._tables:
            holder = holders._modules.get(key)
            param = None if holder is None else holder._parameters.get("weight")
            if param is not None and param.is_leaf:
                yield table, param


def _keep_values(table: ShownTable) -> None:
    """Gives the parameter that showed a table until now its values, if somebody has it still.

    It may come back, as after `torch.func.functional_call`, or an evaluation with averaged weights.
    """
    if sys.getrefcount(table.param) > 2 and table.param.data_ptr() == table.address:
        table.param.data = table.param.detach().as_subclass(Tensor).clone()


def _bring_in(
    table: ShownTable, param: nn.Parameter | None, kernel: SplitTableBatchedEmbeddingBagsCodegen
) -> None:
    """Copies what a parameter shows into the memory of its table, and has it show that."""
    if param is None:
        raise RuntimeError(
            f"the fused table {table.name} has no parameter `weight` any longer, so FBGEMM would "
            "train what nothing shows: register it again, and apply parametrizations to unfused "
            "tables only"
        )
    if not isinstance(param, nn.Parameter) or type(param) not in (nn.Parameter, table.kind):
        raise RuntimeError(
            f"the weight of the fused table {table.name} is a {type(param).__name__} now, of which "
            "FBGEMM knows nothing: leave fused tables out of what makes them such (FSDP's "
            "ignored_params)"
        )
    for what, found, wanted in (
        ("on", param.device, table.memory.device),
        ("of", param.dtype, table.dtype),
        ("of shape", tuple(param.shape), tuple(table.shape)),
    ):
        if found != wanted:
            raise RuntimeError(
                f"the weight of the fused table {table.name} is {what} {found} now, but FBGEMM has "
                f"it {what} {wanted}, and would train that: {_WHAT_TO_DO}"
            )
    own, new = (table.memory.untyped_storage().data_ptr(), param.untyped_storage().data_ptr())
    if own == new and memory_range(param.detach().as_subclass(Tensor)) != memory_range(
        table.memory
    ):
        raise RuntimeError(
            f"the weight of the fused table {table.name} shows memory of another fused table: "
            "fused tables cannot share weights; give it a copy of them"
        )
    with torch.inference_mode(False), torch.no_grad():
        if param is not table.param:
            _keep_values(table)
            table.param = param
        kernel.flush()
        values = param.detach().as_subclass(Tensor)
        table.memory.copy_(values.clone() if own == new else values)
        kernel.reset_cache_states()
        param.data = table.memory.detach()
    if table.is_marked and not hasattr(param, "_in_backward_optimizers"):
        marked: Any = param
        marked._in_backward_optimizers = [EmptyFusedOptimizer()]  # as torchrec marks such
