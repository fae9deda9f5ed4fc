"""Steps of parameters that FSDP2 has sharded: DTensors, on one process and on several.

What a step costs the host on top of that of the local shards as plain tensors, and whether memory
grows over many steps.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from benchmarks.interleave import Timings, interleave
from benchmarks.memory import resident_megabytes
from benchmarks.table import number, table, with_quartiles
from recap_fast.optim import FusedAdam

LAYERS: Final = 24
WIDTH: Final = 64
PROCESSES: Final = (1, 2, 4)
STEPS: Final = 10_000  # of which memory is looked at; of torch's, as many as fit
_MOST_SECONDS: Final = 10.0

_WAYS: Final[dict[str, Callable[[Any], torch.optim.Optimizer]]] = {
    "recap_fast": FusedAdam,
    "torch foreach": lambda params: torch.optim.Adam(params, foreach=True),
    "torch fused": lambda params: torch.optim.Adam(params, fused=True),
}

_HOW: Final = f"""\
{LAYERS} linear layers of {WIDTH} x {WIDTH}, {2 * LAYERS} parameters, each layer sharded by
`torch.distributed.fsdp.fully_shard` over the processes of a gloo group, with one thread in each;
Adam. Warm times of one `optimizer.step()` on the first process, of the DTensors and of plain
tensors of the shards' sizes. A ratio is the median over rounds in which both were timed, in
brackets the quartiles. Memory growth is the mean over {STEPS:,} steps, or over as many as fit in
{_MOST_SECONDS:g} seconds, after 200 steps; the number of steps is in brackets. Four processes
share the cores of the machine.
"""


class _Stepped:
    """An optimizer of parameters with gradients."""

    def __init__(self, way: str, params: list[nn.Parameter]) -> None:
        for param in params:
            param.grad = torch.full_like(param, 1e-3)
        self._optimizer = _WAYS[way](params)

    def step(self) -> None:
        self._optimizer.step()


def _sharded() -> list[nn.Parameter]:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return [param for layer in layers for param in layer.parameters()]


def _local(params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    tensors = (p.to_local() if isinstance(p, DTensor) else p for p in params)
    return [nn.Parameter(tensor.detach().clone()) for tensor in tensors]


def _warm_step(copies: Any) -> Callable[[], tuple[float]]:
    (stepped,) = copies

    def sample() -> tuple[float]:
        stepped.step()
        begin = time.perf_counter_ns()
        stepped.step()
        return ((time.perf_counter_ns() - begin) / 1e3,)

    return sample


def _growth(stepped: _Stepped, most: int) -> tuple[int, float]:
    """How many steps were taken, and how many bytes each added."""
    for _ in range(200):
        stepped.step()
    before, end, steps = resident_megabytes(), time.monotonic() + _MOST_SECONDS, 0
    while steps < most and time.monotonic() < end:
        stepped.step()
        steps += 1
    return steps, round((resident_megabytes() - before) * 1e6 / steps, 1)


def measure_here(path: str, seconds: float, steps: int) -> None:
    """On each process of a group; the first writes its figures to `path`."""
    peers = {}
    for way in _WAYS:
        sharded = _sharded()
        peers[f"{way}, plain"] = [_Stepped(way, _local(sharded))]
        peers[way] = [_Stepped(way, sharded)]
    for (stepped,) in peers.values():
        stepped.step()  # makes the state
    (timings,) = interleave(peers, _warm_step, seconds=seconds)
    grown = {way: _growth(peers[way][0], steps) for way in _WAYS}
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps({"microseconds": timings.rounded(1), "growth": grown}))
    dist.barrier()


def measure(
    seconds: float, counts: Iterable[int] = PROCESSES, steps: int = STEPS
) -> Iterator[dict[str, Any]]:
    """Each number of processes for so long, and then so many steps."""
    from examples.movielens.launch import launch  # needs torchrec, and a report on a GPU does not

    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "figures.json")
            launch(count, 1, measure_here, str(path), seconds, steps)
            yield {"processes": count, **json.loads(path.read_text())}


def section(measured: Iterable[Mapping[str, Any]]) -> str:
    """What the page says."""
    rows = []
    for each in measured:
        timings = Timings(each["microseconds"])
        for way in _WAYS:
            steps, grown = each["growth"][way]
            times = (f"{number(timings.time(name).median)} µs" for name in (way, f"{way}, plain"))
            over = with_quartiles(timings.ratio(way, f"{way}, plain"), "x")
            memory = f"{grown:,.0f} bytes a step ({steps:,})"
            rows.append(
                [
                    f"{each['processes']} process{'es' * (each['processes'] > 1)}, {way}",
                    *times,
                    over,
                    memory,
                ]
            )
    header = ["step", "DTensors", "plain tensors", "ratio", "memory grows"]
    return "\n".join(["## Parameters that FSDP2 shards\n", _HOW, table(header, rows)])
