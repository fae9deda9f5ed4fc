"""Steps of one large tensor, with parameter, gradient and states stored in several formats.

Such a step waits for memory, so one that moves fewer bytes can be faster: how much faster each is,
and what it keeps in memory.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.builders import Unavailable
from benchmarks.clocks import HostClock
from benchmarks.interleave import Timings, interleave
from benchmarks.memory import peak_of
from benchmarks.peers import Peer, initial_values
from benchmarks.table import milliseconds, number, plural, table, with_quartiles
from benchmarks.workloads import Workload
from recap_fast.optim import FusedAdagrad, FusedAdam, FusedSGD

ELEMENTS: Final = 20_000_000

OWN: Final = "float32"
TORCH: Final = "torch fused, float32"
"""The rows whose times are divided by those of every row."""

_MORE_STEPS: Final = 2  # of each row after the first, before any is timed

Make = Callable[..., Optimizer]
"""Makes an optimizer, of parameters and options."""


class _Algorithm(NamedTuple):
    ours: Make
    torch: Make
    options: Mapping[str, Any]


ALGORITHMS: Final = {
    "Adam": _Algorithm(FusedAdam, torch.optim.Adam, {}),
    "Adagrad": _Algorithm(FusedAdagrad, torch.optim.Adagrad, {}),
    "SGD with momentum": _Algorithm(FusedSGD, torch.optim.SGD, {"momentum": 0.9}),
}


def _ours(algorithm: str) -> Make:
    return ALGORITHMS[algorithm].ours


def _torch_fused(algorithm: str) -> Make:
    return functools.partial(ALGORITHMS[algorithm].torch, fused=True)


def _torchao(name: str, algorithm: str) -> Make:
    """torchao's class of that name, which is an AdamW: without decay, the update is Adam's."""
    if algorithm != "Adam":
        raise Unavailable(f"torchao has no {algorithm.split()[0]}")
    try:
        module = importlib.import_module("torchao.optim")
    except ImportError as error:
        raise Unavailable(f"torchao is not installed ({error})") from error
    if not hasattr(module, name):
        raise Unavailable(f"this torchao has no {name}")
    return functools.partial(getattr(module, name), weight_decay=0)


@dataclass(frozen=True)
class Format:
    """One way of storing, and of stepping what is stored.

    Attributes:
        param, grad: their dtypes.
        options: what the optimizer is given for it.
        of: by the name of an algorithm, what makes its optimizer; raises Unavailable where there is
            none.
        slow: several times slower than the others, so that it sits out most rounds.
    """

    param: torch.dtype = torch.float32
    grad: torch.dtype = torch.float32
    options: Mapping[str, Any] = field(default_factory=dict)
    of: Callable[[str], Make] = _ours
    slow: bool = False


_SHORT: Final = torch.bfloat16
_STATES: Final = {"state_dtype": _SHORT}
_CODES: Final = {"state_dtype": "8bit"}

FORMATS: Final[Mapping[str, Format]] = {
    OWN: Format(),
    "bfloat16 states": Format(options=_STATES),
    "bfloat16 states, bfloat16 gradients": Format(grad=_SHORT, options=_STATES),
    "bfloat16, master_weights": Format(_SHORT, _SHORT, _STATES | {"master_weights": True}),
    "bfloat16, stochastic_rounding": Format(
        _SHORT, _SHORT, _STATES | {"stochastic_rounding": True}
    ),
    "8-bit states": Format(options=_CODES),
    "bfloat16, master_weights, 8-bit states": Format(
        _SHORT, _SHORT, _CODES | {"master_weights": True}
    ),
    "float16 states": Format(options={"state_dtype": torch.float16}),
    TORCH: Format(of=_torch_fused),
    "torch fused, bfloat16": Format(_SHORT, _SHORT, of=_torch_fused),
    "torchao AdamW8bit": Format(of=functools.partial(_torchao, "AdamW8bit"), slow=True),
    "torchao _AdamW, bfloat16": Format(
        _SHORT,
        _SHORT,
        {"bf16_stochastic_round": True},
        of=functools.partial(_torchao, "_AdamW"),
        slow=True,
    ),
}
"""The rows, by what they are called. A further one needs nothing but its line here."""

_HOW: Final = f"""\
Cold steps of one tensor of {ELEMENTS:,} elements, by `FusedAdam`, `FusedAdagrad` and `FusedSGD`.
*bfloat16 states* and *float16 states*: `state_dtype`, beside a float32 parameter; with *bfloat16
gradients* `Parameter.grad_dtype`, too. In rows with *bfloat16,* parameter, gradient and states are
of that dtype. Our 16-bit states are rounded stochastically, those of torch to nearest. torchao's
are `AdamW8bit` of float32 parameters, and `_AdamW` with `bf16_stochastic_round=True`, both without
decay; they sit out most rounds.

Bytes are those of one element. *Moved*: the gradient read; parameter, states and what a master has
more read and written. *Would allow*: how many times as fast as our float32 step one would be that
waited for these bytes alone. *Kept*: between steps, without the gradient. *First step* and
*loading*: by how much the process grows from before an optimizer is made to its peak in its first
step, and to that in `load_state_dict` of a state dict that is in memory already, whose tensors are
taken as they are where their dtype fits. Speed-ups are over our float32 step and over torch's with
`fused=True`: the median over rounds in which both were timed, in brackets the quartiles; below 1, a
row is slower.
"""


@dataclass(frozen=True)
class Size:
    """Bytes for each element; None where the system does not tell.

    Attributes:
        moved: by a step.
        kept: between steps, without the gradient.
        first_step: by how much the process grows while an optimizer is made and steps once.
        loading: the same while one is made and loads the state of another.
    """

    moved: float
    kept: float
    first_step: float | None
    loading: float | None


def _bytes(tensor: Tensor) -> int:
    """Those of a tensor, or of the tensors that one of a subclass is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def _bytes_of_state(optimizer: Optimizer, param: Tensor) -> int:
    return sum(_bytes(value) for value in optimizer.state[param].values())


def _parameter(form: Format, value: Tensor, grad: Tensor) -> nn.Parameter:
    """With its gradient, copies of `value` and `grad`."""
    param = nn.Parameter(value.to(form.param, copy=True))
    if form.grad != form.param:
        if not hasattr(param, "grad_dtype"):
            raise Unavailable(f"torch {torch.__version__} has no Parameter.grad_dtype")
        param.grad_dtype = form.grad
    param.grad = grad.to(form.grad, copy=True)
    return param


def _stepped(make: Callable[[], Optimizer]) -> Optimizer:
    optimizer = make()
    optimizer.step()
    return optimizer


def _loaded(make: Callable[[], Optimizer], state_dict: dict[str, Any]) -> Optimizer:
    optimizer = make()
    optimizer.load_state_dict(state_dict)
    return optimizer


def _build(form: Format, algorithm: str, value: Tensor, grad: Tensor) -> tuple[Peer, Size]:
    """Makes and steps an optimizer of the format.

    Raises:
        Unavailable: it cannot run here; for one that is not ours, a refused step counts too.
    """
    kind = form.of(algorithm)
    options = {**ALGORITHMS[algorithm].options, **form.options}
    param = _parameter(form, value, grad)

    def make() -> Optimizer:
        return kind([param], lr=1e-4, **options)

    try:
        # Another one first: what is imported, compiled or found out once is no part of the peak.
        state_dict = _stepped(make).state_dict()
        optimizer, first_step = peak_of(_stepped, make)
        _, loading = peak_of(_loaded, make, state_dict)
        for _ in range(_MORE_STEPS):
            optimizer.step()
    except RuntimeError as error:
        if form.of is _ours:
            raise
        raise Unavailable(str(error).strip().split("\n")[0]) from error
    assert param.grad is not None
    kept = _bytes(param) + _bytes_of_state(optimizer, param)
    peaks = (
        None if p is None else round(p * 1e6 / param.numel(), 3) for p in (first_step, loading)
    )
    moved = _bytes(param.grad) + 2 * kept
    size = Size(round(moved / param.numel(), 3), round(kept / param.numel(), 3), *peaks)
    return Peer(optimizer.step, optimizer.param_groups, [param]), size


def _measure(
    algorithm: str, value: Tensor, grad: Tensor, threads: Iterable[int], seconds: float
) -> Iterator[dict[str, Any]]:
    """Every format with each number of threads, for so long each."""
    peers: dict[str, list[Peer]] = {}
    sizes: dict[str, Size] = {}
    skipped: dict[str, str] = {}
    for name, form in FORMATS.items():
        try:
            peer, sizes[name] = _build(form, algorithm, value, grad)
            peers[name] = [peer]
        except Unavailable as reason:
            skipped[name] = str(reason)
    slow = [name for name, form in FORMATS.items() if form.slow]
    in_bytes = {name: asdict(size) for name, size in sizes.items()}
    for count in threads:
        torch.set_num_threads(count)
        (timings,) = interleave(peers, HostClock("cold"), seconds=seconds, slow=slow)
        yield {
            "algorithm": algorithm,
            "elements": value.numel(),
            "threads": count,
            "bytes": in_bytes,
            "skipped": skipped,
            "microseconds": timings.rounded(1),
        }


def measure(
    threads: Sequence[int], seconds: float, elements: int = ELEMENTS
) -> Iterator[dict[str, Any]]:
    """Every algorithm with each number of threads, for so long each."""
    (((value, grad),),) = initial_values(Workload("state formats", "", (((elements,),),)))
    for algorithm in ALGORITHMS:
        yield from _measure(algorithm, value, grad, threads, seconds)


def _bytes_cell(value: float | None) -> str:
    return "-" if value is None else number(value)


def _speed_up(timings: Timings, other: str, name: str) -> str:
    if other not in timings.microseconds:
        return "-"
    return with_quartiles(timings.ratio(other, name), "x")


def _of_one_algorithm(measured: Sequence[Mapping[str, Any]]) -> str:
    """A row for each format; columns of its bytes, and three for each number of threads."""
    first = measured[0]
    sizes = {name: Size(**size) for name, size in first["bytes"].items()}
    header = [first["algorithm"], "bytes moved", "would allow"]
    header += ["bytes kept", "first step", "loading"]
    for threads in (plural(each["threads"], "thread") for each in measured):
        header += [threads, f"over our float32, {threads}", f"over torch's, {threads}"]
    rows = []
    for name, size in sizes.items():
        row = [name, number(size.moved), f"{number(sizes[OWN].moved / size.moved)}x"]
        row += map(_bytes_cell, (size.kept, size.first_step, size.loading))
        for timings in (Timings(each["microseconds"]) for each in measured):
            row.append(f"{milliseconds(timings.time(name).median)} ms")
            row += (_speed_up(timings, other, name) for other in (OWN, TORCH))
        rows.append(row)
    skipped: Mapping[str, str] = first["skipped"]
    lines = [
        f"{', '.join(name for name in skipped if skipped[name] == reason)}: {reason}.\n"
        for reason in dict.fromkeys(skipped.values())
    ]
    return "\n".join([table(header, rows), *lines])


def section(measured: Iterable[Mapping[str, Any]]) -> str:
    """What the page says: a table for each algorithm."""
    by_algorithm = groupby(measured, key=lambda each: each["algorithm"])
    tables = (_of_one_algorithm(list(some)) for _, some in by_algorithm)
    return "\n".join(["## Stored in fewer bytes\n", _HOW, *tables])
