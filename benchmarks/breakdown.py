"""Where the time of one small step goes: `python -m benchmarks.breakdown [WORKLOAD]`.

The parts cannot be timed apart from outside, so the same call is timed from further and further
inside, and without gradients; the differences are reported:

* `optimizer.step()`, the stepper's step, the native call alone: the Python around each;
* the native call over tensors without gradients: the checks that nothing has changed since the
  plan was made.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch

from benchmarks import peers, workloads
from benchmarks.interleave import interleave
from benchmarks.table import table
from benchmarks.workloads import IN_ONE_GROUP, Workload

_ROUNDS: Final = 100
_CALLS: Final = 10

_WHOLE: Final = "optimizer.step()"

_HOW: Final = """\
Warm Adam steps with one thread, ten in a row, by differences of medians, as
`python -m benchmarks.breakdown` prints them.
"""


def _build(workload: Workload) -> peers.Peer:
    return peers.build("recap_fast", peers.initial_values(workload), "adam")


def _native_call(peer: peers.Peer) -> Callable[[], Any]:
    """The one call into C++ that a step of `peer` makes."""
    return _stepper(peer)._plan.step_plainly


def _stepper(peer: peers.Peer) -> Any:
    peer.step()
    peer.step()
    return peer.step.__self__._stepper  # type: ignore[attr-defined]


def _ten_calls(call: Callable[[], Any]) -> tuple[float]:
    """The mean of ten calls in a row, after one."""
    call()
    begin = time.perf_counter_ns()
    for _ in range(_CALLS):
        call()
    return ((time.perf_counter_ns() - begin) / 1e3 / _CALLS,)


def _medians(**calls: Callable[[], Any]) -> dict[str, float]:
    """Microseconds of each call, taken in turn."""

    def clock(copies: Sequence[Callable[[], Any]]) -> Callable[[], tuple[float]]:
        return functools.partial(_ten_calls, *copies)

    each = {name: [call] for name, call in calls.items()}
    (timings,) = interleave(each, clock, seconds=0, least_rounds=_ROUNDS)
    return {name: timings.time(name).median for name in calls}


def parts(workload: Workload) -> dict[str, float]:
    """Microseconds of a warm step of `recap_fast` with Adam, in all and by part."""
    whole, still = _build(workload), _build(workload)
    stepper, checks = _stepper(whole), _native_call(still)
    for param in still.params:
        param.grad = None
    times = _medians(
        step=whole.step, stepper=stepper.step_plainly, native=_native_call(whole), checks=checks
    )
    return {
        _WHOLE: times["step"],
        "- torch's and our Python around it": times["step"] - times["stepper"],
        "- Python of the stepper": times["stepper"] - times["native"],
        "- checks that the plan holds": times["checks"],
        "- gradients, values and loops": times["native"] - times["checks"],
    }


def measure() -> Iterator[dict[str, Any]]:
    """The parts of steps of scalars with one thread."""
    torch.set_num_threads(1)
    many = workloads.MANY_GROUPS_OF_SCALARS
    for workload in (workloads.SCALARS, many, many.in_one_group()):
        groups = len(workload.groups)
        yield {"workload": workload.name, "groups": groups, "microseconds": parts(workload)}


def section(found: Sequence[Mapping[str, Any]]) -> str:
    """What the page says: a column per workload, and one of what each further param group costs."""
    times = {each["workload"]: each["microseconds"] for each in found}
    (many,) = [each for each in found if each["workload"] == "many-groups-of-scalars"]
    whole, single = many["microseconds"], times[many["workload"] + IN_ONE_GROUP]
    further = many["groups"] - 1
    each = {part: (whole[part] - single[part]) * 1e3 / further for part in whole}
    header = ["", *(f"{name}, µs" for name in times), "each further group, ns"]
    rows = (
        [part, *(f"{of[part]:.1f}" for of in times.values()), f"{each[part]:.0f}"] for part in whole
    )
    left = 0.3 * single[_WHOLE] * 1e3 / further
    explained = f"""\
For {many["groups"]} groups to take at most 1.3 times as long as one, {left:.0f} ns are left for
each further one: to compare its dict with that of the step before, any entry of which may have been
set, to read its learning rate, to compute its values, and to look up its optimizer's `state` and
`param_groups`.
"""
    heading = "## Where the time of a small step goes\n"
    return "\n".join([heading, _HOW, table(header, rows), explained])


def main(name: str = "scalars") -> None:
    torch.set_num_threads(1)
    workload = workloads.by_name(name)
    print(f"{name}: {len(workload.groups)} groups, {workload.tensors} tensors")
    for part, microseconds in parts(workload).items():
        each = microseconds * 1e3 / workload.tensors
        print(f"{part:36s}{microseconds:10.1f} µs {each:8.1f} ns per tensor")


if __name__ == "__main__":
    main(*sys.argv[1:])
