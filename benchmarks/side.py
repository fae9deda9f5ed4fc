"""A process of its own that steps a workload with the recap_fast of one folder.

Two versions of a package cannot live in one process. So a comparison has two processes, which take
turns: each waits for its next request while the other steps. Requests and replies are JSON, one a
line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, Final

import torch

_ROOT: Final = Path(__file__).parent.parent


class SideFailed(RuntimeError):
    """The process of a side has failed; the message holds its traceback."""


class Side:
    """The near end: starts the process and asks it.

    Args:
        folder: holds the package recap_fast to step with.
        threads: how many threads it steps with.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        paths = [str(folder), str(_ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.side", str(folder), str(threads)],
            cwd=folder,  # the first place that Python searches
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ask(self, request: str, *arguments: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([request, *arguments]) + "\n")
        self._process.stdin.flush()
        reply = self._process.stdout.readline()
        if not reply:
            raise SideFailed(f"the process ended with exit status {self._process.wait()}")
        kind, value = json.loads(reply)
        if kind == "error":
            raise SideFailed(value)
        return value

    def load(self, groups: Any, algorithm: str) -> None:
        """Makes the optimizer over tensors of these shapes, and takes its first two steps."""
        self._ask("load", groups, algorithm)

    def step(self, cache: str) -> float:
        """Takes a step, cold or warm; its microseconds."""
        return self._ask("step", cache)

    def parameters(self) -> list[torch.Tensor]:
        """All of them, by a file."""
        with tempfile.NamedTemporaryFile(suffix=".pt") as file:
            self._ask("save", file.name)
            return torch.load(file.name)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()  # which ends the process
        self._process.wait()
        self._process.stdout.close()


class _FarEnd:
    """What the process does, by the name of the request."""

    def __init__(self, folder: Path, threads: int) -> None:
        import recap_fast
        from benchmarks.clocks import HostClock

        used = Path(recap_fast.__file__).resolve()
        if folder.resolve() not in used.parents:
            raise ImportError(f"recap_fast comes from {used}, not from {folder}")
        if hasattr(os, "sched_setaffinity"):  # both sides on the same cores
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
        torch.set_num_threads(threads)
        self._clocks = {"cold": HostClock("cold"), "warm": HostClock("warm")}

    def load(self, groups: list[list[list[int]]], algorithm: str) -> None:
        from benchmarks import peers
        from benchmarks.workloads import Workload

        shapes = tuple(tuple(tuple(shape) for shape in group) for group in groups)
        initial = peers.initial_values(Workload("compared", "", shapes))
        self._peer = peers.build("recap_fast", initial, algorithm)
        self.step("warm")

    def step(self, cache: str) -> float:
        return self._clocks[cache].time_step(self._peer)

    def save(self, path: str) -> None:
        torch.save([param.detach() for param in self._peer.params], path)


def main() -> None:
    # What libraries print must not get among the replies.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    folder, threads = sys.argv[1:]
    far_end: _FarEnd | None = None
    for line in sys.stdin:
        request, *arguments = json.loads(line)
        try:
            far_end = far_end or _FarEnd(Path(folder), int(threads))
            reply = ["result", getattr(far_end, request)(*arguments)]
        except Exception:
            reply = ["error", traceback.format_exc()]
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
