"""Where the time of one small step goes: `python -m benchmarks.breakdown`.

The parts cannot be timed apart from outside, so the same call is timed from further and further
inside, and on workloads that lack one part after another; the differences are reported:

* `optimizer.step()`, the stepper's step, the native call alone: the Python around each;
* tensors that have a gradient but no elements: everything but the loops over elements;
* the same tensors without gradients: the checks that nothing has changed since the plan was made;
* the same again with further entries in each param group, which are compared and no more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch

from benchmarks import peers, workloads
from benchmarks.workloads import Workload

_ROUNDS: Final = 100
_CALLS: Final = 10
_FURTHER_ENTRIES: Final = 16

WHOLE: Final = "optimizer.step()"
VALUES: Final = "- gradients and values of the step"


def _without_elements(peer: peers.Peer) -> None:
    """Cuts parameters and gradients to no elements, before the first step makes the states."""
    for param in peer.params:
        assert param.grad is not None
        grad = param.grad
        param.grad = None
        # Views, since a tensor without memory would be a special case.
        param.data = param.data.flatten()[:0]
        param.grad = grad.flatten()[:0]


def _build(workload: Workload) -> peers.Peer:
    return peers.build("recap_fast", peers.initial_values(workload), "adam")


def _native_call(peer: peers.Peer) -> Callable[[], Any]:
    """The one call into C++ that a step of `peer` makes."""
    return _stepper(peer)._plan.step_plainly


def _stepper(peer: peers.Peer) -> Any:
    peer.step()
    peer.step()
    return peer.step.__self__._stepper  # type: ignore[attr-defined]


def _medians(calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Microseconds of each call: the median of the means of ten calls in a row, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            call()
            begin = time.perf_counter_ns()
            for _ in range(_CALLS):
                call()
            times[name].append((time.perf_counter_ns() - begin) / _CALLS)
    return {name: statistics.median(of_call) / 1e3 for name, of_call in times.items()}


def _still(workload: Workload) -> peers.Peer:
    """A step of it checks that the plan holds, and finds no gradient."""
    peer = _build(workload)
    _without_elements(peer)
    return peer


def parts(workload: Workload) -> dict[str, float]:
    """Microseconds of a warm step of `recap_fast` with Adam, in all and by part."""
    whole, empty, still = _build(workload), _build(workload), _still(workload)
    _without_elements(empty)
    stepper = _stepper(whole)
    calls = {
        "step": whole.step,
        "stepper": stepper.step_plainly,
        "native": _native_call(whole),
        "empty": _native_call(empty),
        "still": _native_call(still),
    }
    for param in still.params:
        param.grad = None
    times = _medians(calls)
    return {
        WHOLE: times["step"],
        "- torch's and our Python around it": times["step"] - times["stepper"],
        "- Python of the stepper": times["stepper"] - times["native"],
        "- checks that the plan holds": times["still"],
        VALUES: times["empty"] - times["still"],
        "- loops over elements": times["native"] - times["empty"],
    }


def nanoseconds_per_entry(workload: Workload) -> float:
    """What it takes to compare one entry of a param group with that of the step before."""
    few, many = _still(workload), _still(workload)
    for group in many.param_groups:
        group.update({f"entry {i}": i for i in range(_FURTHER_ENTRIES)})
    calls = {"few": _native_call(few), "many": _native_call(many)}
    for param in few.params + many.params:
        param.grad = None
    times = _medians(calls)
    further = _FURTHER_ENTRIES * len(workload.groups)
    return (times["many"] - times["few"]) * 1e3 / further


def measure() -> Iterator[dict[str, Any]]:
    """The parts of steps of scalars with one thread, and what an entry of a param group costs."""
    torch.set_num_threads(1)
    many = workloads.MANY_GROUPS_OF_SCALARS
    for workload in (workloads.SCALARS, many, many.in_one_group()):
        groups = len(workload.groups)
        found = {"workload": workload.name, "groups": groups, "microseconds": parts(workload)}
        if workload is many:
            found["nanoseconds_per_entry"] = nanoseconds_per_entry(many)
            found["entries"] = len(_build(many).param_groups[0])
        yield found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.breakdown",
        description="Where the time of one warm Adam step goes, by differences of medians.",
    )
    parser.add_argument("workload", nargs="?", default="scalars", choices=workloads.NAMES)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    workload = workloads.by_name(arguments.workload)
    print(
        f"{workload.name}: {len(workload.groups)} groups, {workload.tensors} tensors, "
        f"{workload.elements} elements; {arguments.threads} thread(s)"
    )
    for name, microseconds in parts(workload).items():
        each = microseconds * 1e3 / workload.tensors
        print(f"{name:36s}{microseconds:10.1f} µs {each:8.1f} ns per tensor")
    return 0


if __name__ == "__main__":
    sys.exit(main())
