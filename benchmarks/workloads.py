"""The workloads: sets of param groups, given by the shapes of their tensors.

The rankers are of the-algorithm-ml's kind, `demo` is the model of `make demo`; the others are
extremes.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final

Shape = tuple[int, ...]
Groups = tuple[tuple[Shape, ...], ...]
IN_ONE_GROUP: Final = " in one group"


@dataclass(frozen=True)
class Workload:
    """Param groups to step.

    Attributes:
        name: short and unique.
        description: one line, for a table.
        groups: for each param group, the shapes of its float32 tensors.
    """

    name: str
    description: str
    groups: Groups

    @property
    def tensors(self) -> int:
        return sum(len(group) for group in self.groups)

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for group in self.groups for shape in group)

    def in_one_group(self) -> Workload:
        """The same tensors, all in one param group."""
        merged = tuple(shape for group in self.groups for shape in group)
        return Workload(f"{self.name}{IN_ONE_GROUP}", self.description, (merged,))


def _linear(inputs: int, outputs: int) -> list[Shape]:
    return [(outputs, inputs), (outputs,)]


def _norm(features: int) -> list[Shape]:
    return [(features,), (features,)]


def _tower(inputs: int, affine_map: bool) -> tuple[Shape, ...]:
    """Linear layers 256/128/1 (batch normalisation without parameters), then an affine map."""
    shapes = _linear(inputs, 256) + _linear(256, 128) + _linear(128, 1)
    return tuple(shapes + (_linear(1, 1) if affine_map else []))


def _backbone(continuous: int, binary: int, embeddings: list[int], width: int) -> tuple[Shape, ...]:
    """Normalised inputs, four parallel mask blocks of 1024, a layer of `width` over all of them."""
    inputs = continuous + binary + sum(embeddings)
    shapes = _norm(continuous) + _norm(continuous + binary)
    for embedding in embeddings:
        shapes += _norm(embedding)
    for _ in range(4):
        shapes += _linear(inputs, 1024) + _linear(1024, inputs)  # the mask
        shapes += _linear(inputs, 1024) + _norm(1024)
    return tuple(shapes + _linear(4 * 1024, width))


def _recap_groups(
    towers: int, affine_map: bool, continuous: int, binary: int, embeddings: list[int]
) -> Groups:
    """One group per tower and one for the backbone, as `build_optimizer` makes them."""
    width = 2048
    backbone = _backbone(continuous, binary, embeddings, width)
    return (*[_tower(width, affine_map)] * towers, backbone)


def _mixed_sizes(groups: int, tensors: int) -> Groups:
    draw = random.Random(0)
    return tuple(tuple((draw.randint(64, 4096),) for _ in range(tensors)) for _ in range(groups))


# As the one of 48 M, with an eleventh task, affine maps after the towers, and the input cut to
# 1,746 features: 12 groups, 128 tensors, 36 M elements.
RANKER_36M: Final = Workload(
    "ranker-36M",
    "like the ranker of the-algorithm-ml: 11 towers 256/128/1, MaskNet backbone 4 x 1024 and 2048",
    _recap_groups(11, True, continuous=1487, binary=59, embeddings=[200]),
)
MIXED_SIZES: Final = Workload(
    "mixed-sizes", "tensors of 64 to 4,096 elements", _mixed_sizes(12, 40)
)
ONE_50M_TENSOR: Final = Workload(
    "one-50M-tensor", "one tensor of 50 M elements", (((50_000_000,),),)
)
MANY_GROUPS: Final = Workload(
    "many-groups", "tensors of 1,024 elements in many groups", (((1024,),) * 4,) * 100
)
SCALARS: Final = Workload("scalars", "one-element tensors", (((1,),) * 40,) * 12)
MANY_GROUPS_OF_SCALARS: Final = Workload(
    "many-groups-of-scalars", "one-element tensors in many groups", (((1,),) * 4,) * 100
)

# The configuration that the original ships: 10 tasks; 2,117 continuous features (normalised with an
# affine batch norm), 59 binary ones and three 200-dimensional embeddings.
RANKER_48M: Final = Workload(
    "ranker-48M",
    "the ranker of the-algorithm-ml: 10 towers 256/128/1, MaskNet backbone 4 x 1024 and 2048",
    _recap_groups(10, False, continuous=2117, binary=59, embeddings=[200, 200, 200]),
)

_SYNTHETIC: Final = {
    workload.name: workload
    for workload in (
        *(RANKER_36M, MIXED_SIZES, ONE_50M_TENSOR, MANY_GROUPS),
        *(SCALARS, MANY_GROUPS_OF_SCALARS, RANKER_48M),
    )
}
NAMES: Final = (*_SYNTHETIC, "demo")


def by_name(name: str) -> Workload:
    """Raises KeyError for an unknown name, ImportError for a demo that cannot be built here."""
    if name != "demo":
        return _SYNTHETIC[name]
    from examples.movielens.model import build_model, optimizer_configs
    from recap_fast.embeddings import find_fused_optimizer, fuse_embeddings
    from recap_fast.groups.assign import group_parameters

    dense_config, embedding_config = optimizer_configs(total_steps=100)
    model = fuse_embeddings(build_model(seed=0), embedding_config)
    fused = find_fused_optimizer(model)
    assert fused is not None
    groups = group_parameters(model, dense_config, embedding_config, fused.params)
    shapes = tuple(tuple(tuple(p.shape) for p in group.params.values()) for group in groups)
    return Workload("demo", "the dense groups of `make demo`", shapes)
