"""An `EmbeddingBagCollection` whose tables FBGEMM trains, each as it is configured."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    BoundsCheckMode,
    ComputeDevice,
    EmbeddingLocation,
)
from torch import nn
from torchrec.modules.embedding_configs import (
    EmbeddingBagConfig,
    data_type_to_sparse_type,
    pooling_type_to_pooling_mode,
)
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    get_embedding_names_by_table,
)
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from recap_fast.embeddings.fused_optimizer import KernelOptimizer
from recap_fast.embeddings.kernel_arguments import TableKernel
from recap_fast.embeddings.live import LiveKernel
from recap_fast.embeddings.shown import ShownTable, ShownTables


class FusedTableCollection(FusedEmbeddingBagCollection):
    """torchrec's `FusedEmbeddingBagCollection` with an optimizer and a schedule for each table.

    Tables that agree in these, in pooling and in dtype, share a table-batched module with one param
    group. Features come out in the order of the tables, whatever their pooling.

    Args:
        collection: What to replace; weights are copied.
        kernels: How to train each table, by its name.
        device: Where the tables go.
    """

    def __init__(
        self,
        collection: EmbeddingBagCollection,
        kernels: Mapping[str, TableKernel],
        device: torch.device,
    ) -> None:
        nn.Module.__init__(self)  # torchrec's own would make one kernel for all
        self._device = device
        self._is_weighted = collection.is_weighted()
        self._embedding_bag_configs = collection.embedding_bag_configs()
        configs = self._embedding_bag_configs
        self._embedding_names = [
            name for names in get_embedding_names_by_table(configs) for name in names
        ]
        self._length_per_key = [
            config.embedding_dim for config in configs for _ in config.feature_names
        ]
        groups = _group_tables(configs, kernels)
        self._feature_names = [
            name for tables, _ in groups for config in tables for name in config.feature_names
        ]
        self._widths_per_kernel = [
            [config.embedding_dim for config in tables for _ in config.feature_names]
            for tables, _ in groups
        ]
        self._features_per_kernel = [len(widths) for widths in self._widths_per_kernel]
        self._piece_order = _piece_order(configs, [tables for tables, _ in groups])
        self._permutations: dict[tuple[str, ...], tuple[list[int], torch.Tensor]] = {}

        # A list, or they would appear in the state dict besides the tables themselves.
        self._kernels = [_make_kernel(tables, kernel, device) for tables, kernel in groups]
        self.embedding_bags = nn.ModuleDict({config.name: nn.Module() for config in configs})
        for (tables, _), kernel in zip(groups, self._kernels, strict=True):
            for config, weight in zip(tables, kernel.split_embedding_weights(), strict=True):
                old = collection.embedding_bags[config.name].weight
                weight.copy_(old.detach())
                self._show(config.name, weight, old.requires_grad)
            self._follow_shown(kernel)
        optimizers = [
            KernelOptimizer([f"{config.name}.weight" for config in tables], kernel)
            for (tables, _), kernel in zip(groups, self._kernels, strict=True)
        ]
        self._optim = CombinedOptimizer(optimizers)
        self.train(collection.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedTableCollection:
        """A collection of its own kernels, whose optimizer is the copy of this one's."""
        made = memo[id(self)] = type(self).__new__(type(self))
        for old in self._kernels:
            old.look()  # or the kernel might have others than are shown
            new = copy.deepcopy(old, memo)
            shown: Any
            for name, weight in zip(new.tables, new.split_embedding_weights(), strict=True):
                shown = self.embedding_bags[name].weight
                memo[id(shown)] = nn.Parameter(weight, requires_grad=shown.requires_grad)
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for kernel in made._kernels:
            made._follow_shown(kernel)
        return made

    def _show(self, table: str, weight: torch.Tensor, requires_grad: bool) -> None:
        parameter = nn.Parameter(weight, requires_grad=requires_grad)
        self.embedding_bags[table].register_parameter("weight", parameter)

    def _follow_shown(self, kernel: LiveKernel) -> None:
        """Has a kernel look at the parameters of its tables."""
        bags: Any = self.embedding_bags
        tables = {
            name: ShownTable(name, bags[name].weight, [place])
            for place, name in enumerate(kernel.tables)
        }
        kernel.shown = ShownTables(bags, tables)

    def train(self, mode: bool = True) -> FusedTableCollection:
        """Sets the mode; in evaluation, the kernels do not move averages of the tables."""
        for kernel in self._kernels:
            kernel.train(mode)
        super().train(mode)
        return self

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Returns the pooled embeddings of every feature, in the order of the tables.

        Args:
            features: The features of all tables, and maybe others, for B examples.

        Returns:
            Float32 values of shape (B, sum of the features' widths).

        Raises:
            RuntimeError: An id is not a row of its table.
            ValueError: The features do not all have the same number of examples.
        """
        if features.variable_stride_per_key():
            raise ValueError("every feature must have the same number of examples")
        parts = self._in_kernel_order(features).split(self._features_per_kernel)
        pooled = [
            kernel(
                part.values(),
                part.offsets(),
                per_sample_weights=part.weights() if self._is_weighted else None,
            )
            for kernel, part in zip(self._kernels, parts, strict=True)
        ]
        return KeyedTensor(
            keys=self._embedding_names,
            values=self._in_table_order(pooled),
            length_per_key=self._length_per_key,
        )

    def _in_kernel_order(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        keys = tuple(features.keys())
        if list(keys) == self._feature_names:
            return features
        if keys not in self._permutations:
            index = {key: place for place, key in enumerate(keys)}
            missing = [name for name in self._feature_names if name not in index]
            if missing:
                raise ValueError(f"the features lack {', '.join(missing)}")
            order = [index[name] for name in self._feature_names]
            self._permutations[keys] = (
                order,
                torch.tensor(order, dtype=torch.int32, device=self._device),
            )
        return features.permute(*self._permutations[keys])

    def _in_table_order(self, pooled: list[torch.Tensor]) -> torch.Tensor:
        if len(pooled) == 1:
            return pooled[0]
        if self._piece_order is None:
            return torch.cat(pooled, dim=1)
        pieces = [
            piece
            for widths, values in zip(self._widths_per_kernel, pooled, strict=True)
            for piece in values.split(widths, dim=1)
        ]
        return torch.cat([pieces[index] for index in self._piece_order], dim=1)

    def optimizer_type(self) -> Any:
        """Raises: the tables have an optimizer each."""
        raise NotImplementedError("the tables have an optimizer each: see fused_optimizer()")

    def optimizer_kwargs(self) -> Any:
        """Raises: the tables have an optimizer each."""
        raise NotImplementedError("the tables have an optimizer each: see fused_optimizer()")


def _group_tables(
    configs: Iterable[EmbeddingBagConfig], kernels: Mapping[str, TableKernel]
) -> list[tuple[list[EmbeddingBagConfig], TableKernel]]:
    """Returns the tables that share a table-batched module, in order, with what they share."""
    groups: dict[Any, tuple[list[EmbeddingBagConfig], TableKernel]] = {}
    for config in configs:
        kernel = kernels[config.name]
        key = (config.pooling, config.data_type, kernel)
        groups.setdefault(key, ([], kernel))[0].append(config)
    return list(groups.values())


def _piece_order(
    configs: Iterable[EmbeddingBagConfig], groups: Iterable[Iterable[EmbeddingBagConfig]]
) -> list[int] | None:
    """Returns which of the features of all kernels come first, second...; None: they are sorted."""
    of_kernels = [
        (config.name, index)
        for tables in groups
        for config in tables
        for index, _ in enumerate(config.feature_names)
    ]
    place = {piece: index for index, piece in enumerate(of_kernels)}
    order = [
        place[config.name, index]
        for config in configs
        for index, _ in enumerate(config.feature_names)
    ]
    return None if order == sorted(order) else order


def _make_kernel(
    configs: Sequence[EmbeddingBagConfig], kernel: TableKernel, device: torch.device
) -> LiveKernel:
    on_cpu = device.type == "cpu"
    location = EmbeddingLocation.HOST if on_cpu else EmbeddingLocation.DEVICE
    compute_device = ComputeDevice.CPU if on_cpu else ComputeDevice.CUDA
    made = LiveKernel(
        [
            (config.num_embeddings, config.embedding_dim, location, compute_device)
            for config in configs
        ],
        feature_table_map=[
            index for index, config in enumerate(configs) for _ in config.feature_names
        ],
        pooling_mode=pooling_type_to_pooling_mode(configs[0].pooling),
        weights_precision=data_type_to_sparse_type(configs[0].data_type),
        device=device,
        # The default would train row 0 in place of a row that does not exist.
        bounds_check_mode=BoundsCheckMode.FATAL,
        table_names=[config.name for config in configs],
        **dict(kernel.arguments),
    )
    made.several_backwards.mode = kernel.several_backwards
    return made
