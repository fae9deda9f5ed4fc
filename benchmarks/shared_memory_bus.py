"""Large steps while another process streams memory.

So a core gets fewer bytes a second, as on a server whose cores share few channels.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from benchmarks.clocks import HostClock
from benchmarks.interleave import Timings
from benchmarks.measurement import measure as measure_case
from benchmarks.peers import ALGORITHMS
from benchmarks.plan import Case
from benchmarks.table import number, plural, table, with_quartiles

WORKLOAD: Final = "one-50M-tensor"
PEERS: Final = ("recap_fast", "torch fused", "ceiling")

# Copies 256 MB from one place to another, with one thread, until it is ended.
_STREAM: Final = """\
import torch
torch.set_num_threads(1)
source, target = torch.ones(64_000_000), torch.ones(64_000_000)
print("ready", flush=True)
while True:
    target.copy_(source)
"""

_HOW: Final = f"""\
Cold steps of `{WORKLOAD}` alone, and while a process with one thread copies 256 MB again and again.
With as many threads as cores, that process also takes time from one of the cores. Speed-up over
torch's `fused=True`: the median over rounds in which both were timed, in brackets the quartiles.
Memory is not as fast in every part of a run: compare within a table.
"""


@contextlib.contextmanager
def streaming() -> Iterator[None]:
    """Another process streams memory meanwhile."""
    command = [sys.executable, "-c", _STREAM]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("the process that streams memory did not start")
            time.sleep(0.2)
            yield
        finally:
            process.kill()


def measure(
    threads: Sequence[int], seconds: float, workload: str = WORKLOAD
) -> Iterator[dict[str, Any]]:
    """Every algorithm with each number of threads, alone and not, for so long each."""
    for algorithm in ALGORITHMS:
        for beside in (False, True):
            case = Case(workload, algorithm, ("cold",), PEERS, seconds)
            with streaming() if beside else contextlib.nullcontext():
                for m in measure_case(case, {"cold": HostClock("cold")}, threads):
                    own = {"algorithm": algorithm, "threads": m.threads, "beside": beside}
                    yield own | {"microseconds": m.timings.rounded(1)}


def section(measured: Iterable[Mapping[str, Any]]) -> str:
    """What the page says."""
    rows = []
    for each in measured:
        timings = Timings(each["microseconds"])
        what = "beside a stream" if each["beside"] else "alone"
        name = f"{ALGORITHMS[each['algorithm']]}, {plural(each['threads'], 'thread')}, {what}"
        times = (f"{number(timings.time(peer).median / 1e3)} ms" for peer in PEERS[:2])
        ratio = with_quartiles(timings.ratio("torch fused", "recap_fast"), "x")
        rows.append([name, *times, ratio])
    header = ["step", "recap_fast", "torch fused", "speed-up"]
    return "\n".join(["## While memory is busy\n", _HOW, table(header, rows)])
