"""Clipping by the global norm when gradients are sharded over processes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import (
    construct_module_sharding_plan,
    data_parallel,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.optim import keyed

from recap_fast import build_optimizer
from recap_fast.clipping import NormParts
from recap_fast.embeddings import set_table_optimizers
from recap_fast.keyed import CombinedOptimizer
from recap_fast.keyed.fused import FusedCombinedOptimizer
from recap_fast.optim import FusedAdam, FusedSGD
from tests.support.processes import device, mesh, run
from tests.support.table_reference import table
from tests.support.table_training import DENSE, Tables
from tests.support.tables import config_of

KINDS = {
    "fast": (FusedCombinedOptimizer, FusedAdam),
    "reference": (CombinedOptimizer, torch.optim.Adam),
    "plain": (None, FusedAdam),  # alone, over all parameters
}


def make_model():
    """The head stays as it is, like a small layer that is not worth sharding."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "body": nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3)),
            "head": nn.Linear(3, 1),
        }
    ).to(device())


def combine(model, kind, **options):
    _, adam = KINDS[kind]
    parts = [
        {f"{name}.{key}": param for key, param in module.named_parameters()}
        for name, module in model.items()
    ]
    return clipping(kind, parts, lambda params: adam(params, lr=0.05), **options)


def clipping(kind, parts, make, clip_grad_norm=None):
    """An optimizer of the kind over parts, which are parameters by name, each made by `make`."""
    combined, _ = KINDS[kind]
    if combined is None:
        optimizer = make([(name, param) for part in parts for name, param in part.items()])
        return type(optimizer)(optimizer.param_groups, clip_grad_norm=clip_grad_norm)
    wrapped = [keyed.KeyedOptimizerWrapper(part, make) for part in parts]
    return combined(wrapped, clip_grad_norm)


def backward(model, step, scale=1.0):
    """On the whole batch, so that plain gradients are equal on every rank, as DDP makes them."""
    inputs = torch.randn(16, 5, generator=torch.Generator().manual_seed(step)).to(device())
    (scale * model["head"](model["body"](inputs)).square().sum()).backward()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def train(kind, shard):
    """Norms and final parameters; without ``shard``, of the same model on one process."""
    model = make_model()
    if shard:
        fully_shard(model["body"], mesh=mesh())
    optimizer = combine(model, kind, clip_grad_norm=0.5)
    norms = []
    for step in range(5):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        norms.append(float(optimizer.grad_norm))
    return norms, [whole(param).detach().cpu() for param in model.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_model_is_clipped_by_the_norm_of_the_whole(kind, backend):
    expected_norms, expected = run(1, train, kind, False)[0]
    assert min(expected_norms) > 0.5
    ranks = run(2, train, kind, True, backend=backend)
    assert ranks[0][0] == ranks[1][0]  # the same bits, or replicas would part ways
    for norms, params in ranks:
        assert norms == pytest.approx(expected_norms, rel=1e-6)
        for param, other in zip(params, expected, strict=True):
            # Five steps of Adam, whose gradients are summed in another order.
            torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)


def skip(kind, bad_param, new_state):
    """Rank 1 alone gets a gradient with NaN; whether anything changed, and the norm, by rank."""
    model = make_model()
    fully_shard(model["body"], mesh=mesh())
    optimizer = combine(model, kind, clip_grad_norm=math.inf)
    if not new_state:
        backward(model, 0)
        optimizer.step()
    optimizer.zero_grad()
    backward(model, 1)
    if dist.get_rank() == 1:
        dict(model.named_parameters())[bad_param].grad.to_local()[0] = math.nan
    before = [whole(param).detach().clone() for param in model.parameters()]
    optimizer.step()
    skipped = math.isnan(float(optimizer.grad_norm))
    after = [whole(param).detach() for param in model.parameters()]
    unchanged = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    optimizer.zero_grad()
    backward(model, 2)
    optimizer.step()  # and all go on
    return unchanged, skipped, float(optimizer.grad_norm)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new_state", [True, False])
def test_nan_in_the_shard_of_one_rank_skips_the_step_on_all(kind, new_state, backend):
    ranks = run(2, skip, kind, "body.2.weight", new_state, backend=backend)
    for unchanged, skipped, next_norm in ranks:
        assert unchanged and skipped
        assert math.isfinite(next_norm)


def skip_by_found_inf():
    """Only rank 0 is told, as by a scaler that looked at its own shards alone."""
    model = make_model()
    fully_shard(model["body"], mesh=mesh())
    optimizer = combine(model, "fast", clip_grad_norm=1.0)
    backward(model, 0)
    optimizer.grad_scale = torch.tensor(4.0, device=device())
    optimizer.found_inf = torch.tensor(1.0 - dist.get_rank(), device=device())
    before = [whole(param).detach().clone() for param in model.parameters()]
    optimizer.step()
    unchanged = all(
        torch.equal(whole(param), old)
        for param, old in zip(model.parameters(), before, strict=True)
    )
    optimizer.found_inf = torch.tensor(0.0, device=device())
    optimizer.step()
    return unchanged, float(optimizer.grad_norm)


def test_found_inf_on_one_rank_skips_the_step_on_all(backend):
    ranks = run(2, skip_by_found_inf, backend=backend)
    assert all(unchanged for unchanged, _ in ranks)
    assert ranks[0][1] == ranks[1][1] > 0


def hybrid():
    """Sharded over one dimension of a mesh and replicated over the other: counts once."""
    grid = init_device_mesh(device().type, (2, 2))
    param = nn.Parameter(distribute_tensor(torch.ones(6), grid, [Replicate(), Shard(0)]))
    replica = nn.Parameter(distribute_tensor(torch.ones(3), grid, [Replicate(), Replicate()]))
    parts = NormParts([param, replica, nn.Parameter(torch.ones(2, device=device()))])
    param.grad = distribute_tensor(torch.full((6,), 2.0), grid, [Replicate(), Shard(0)])
    replica.grad = distribute_tensor(torch.full((3,), 2.0), grid, [Replicate(), Replicate()])
    combined = FusedCombinedOptimizer(
        [keyed.KeyedOptimizerWrapper({"a": param, "b": replica}, lambda p: FusedSGD(p, lr=0.1))],
        clip_grad_norm=3.0,
    )
    combined.step()
    return parts.part_of_param, float(combined.grad_norm), param.full_tensor().tolist()


@pytest.mark.long
def test_replicas_of_shards_count_once(backend):
    clipped = 1 - 0.1 * 2.0 * 3.0 / 6.0
    for parts, norm, values in run(4, hybrid, backend=backend):
        assert parts == [0, 1, 1]
        # Of nine twos; on a GPU, from the rounded norms of the parts.
        assert norm == (6.0 if backend == "gloo" else pytest.approx(6.0, rel=1e-6))
        assert values == pytest.approx([clipped] * 6, rel=1e-6)


def without_gradients_on_one_rank(kind):
    """Rank 1's head alone has gradients, as where a branch of the model was not taken."""
    model = make_model()
    fully_shard(model["body"], mesh=mesh())
    optimizer = combine(model, kind, clip_grad_norm=0.5)
    backward(model, 0)
    if dist.get_rank() == 1:
        model["body"].zero_grad()
    squares = {
        name: sum(
            float(local(param.grad).square().sum())
            for param in module.parameters()
            if param.grad is not None
        )
        for name, module in model.items()
    }
    optimizer.step()
    return squares, float(optimizer.grad_norm)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_need_not_have_gradients_of_the_same_params(kind, backend):
    """All wait for each other as often, or one would for ever."""
    ranks = run(2, without_gradients_on_one_rank, kind, backend=backend, timeout=90)
    (squares, norm), (other_squares, other_norm) = ranks
    assert other_squares["body"] == 0 < squares["body"]
    expected = math.sqrt(squares["body"] + squares["head"])
    assert norm == other_norm == pytest.approx(expected, rel=1e-6)


def pending(values):
    """A DTensor whose value is the sum of what the processes hold."""
    return DTensor.from_local(values.to(device()), mesh(), [Partial()])


def clip_param_of_pending_sums(kind, has_gradient):
    """The messages of two steps, and what became of the other parameter."""
    params = {
        "plain": nn.Parameter(torch.ones(3, device=device())),
        "sums": nn.Parameter(pending(torch.ones(3))),
    }
    _, adam = KINDS[kind]
    optimizer = clipping(kind, [params], lambda p: adam(p, lr=0.1), clip_grad_norm=0.5)
    params["plain"].grad = torch.ones_like(params["plain"])
    if has_gradient:
        params["sums"].grad = pending(torch.ones(3))
    messages = []
    for _ in range(2):
        with pytest.raises((ValueError, RuntimeError)) as error:
            optimizer.step()
        messages.append(str(error.value))
    return messages, params["plain"].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_gradient", [True, False])
def test_a_param_of_pending_sums_is_refused_at_every_step(kind, has_gradient, backend):
    ranks = run(2, clip_param_of_pending_sums, kind, has_gradient, backend=backend)
    for messages, plain in ranks:
        assert all("pending sums (Partial)" in message for message in messages)
        if kind == "fast":
            assert all("sums" in message.split("pending")[0] for message in messages)
        assert plain == [1.0] * 3


def clip_gradient_of_pending_sums(kind):
    params = {
        "replica": nn.Parameter(distribute_tensor(torch.ones(2), mesh(), [Replicate()])),
        "shards": nn.Parameter(distribute_tensor(torch.ones(6), mesh(), [Shard(0)])),
    }
    sgd = torch.optim.SGD if kind == "reference" else FusedSGD
    optimizer = clipping(kind, [params], lambda p: sgd(p, lr=1.0), clip_grad_norm=2.0)
    for param in params.values():
        param.grad = pending(torch.full(param.shape, 1.0 + 2 * dist.get_rank()))
    optimizer.step()
    return float(optimizer.grad_norm), [param.full_tensor().tolist() for param in params.values()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_of_pending_sums_counts_as_their_sum(kind, backend):
    norm = math.sqrt(8 * 4.0**2)
    clipped = 1 - 4.0 * 2.0 / norm
    for found, values in run(2, clip_gradient_of_pending_sums, kind, backend=backend):
        assert found == pytest.approx(norm, rel=1e-6)
        for value, size in zip(values, (2, 6), strict=True):
            assert value == pytest.approx([clipped] * size, rel=1e-5)


def build_with_table(kernel):
    """The message, if there is one, with a table on one process and another on all."""
    tables = [table("a", "user"), table("b", "item")]
    model = Tables(tables)
    layouts = {"a": table_wise(rank=1, compute_kernel=kernel), "b": data_parallel()}
    plan = construct_module_sharding_plan(
        model.ebc, layouts, local_size=2, world_size=2, device_type=device().type
    )
    config = config_of(sgd={})
    sharded = DistributedModelParallel(
        set_table_optimizers(model, config, device()),
        device=device(),
        plan=ShardingPlan({"ebc": plan}),
        sharders=[EmbeddingBagCollectionSharder()],
    )
    build_optimizer(sharded, DENSE, config)
    try:
        build_optimizer(sharded, DENSE, config, clip_grad_norm=1.0)
    except ValueError as error:
        return str(error)
    return None


def test_a_sharded_table_that_is_not_fused_has_no_global_norm(table_backend):
    assert run(2, build_with_table, "fused", backend=table_backend) == [None] * 2
    for message in run(2, build_with_table, "dense", backend=table_backend):
        assert "ebc.embedding_bags.a.weight is sharded table_wise and not fused" in message
