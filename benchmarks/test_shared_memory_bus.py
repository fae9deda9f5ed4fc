"""Whether steps are timed alone and while another process streams memory, which then ends."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from benchmarks import shared_memory_bus
from benchmarks.peers import ALGORITHMS


def test_every_algorithm_is_timed_alone_and_not() -> None:
    measured = list(shared_memory_bus.measure((1,), 0, "scalars"))
    cases = [(each["algorithm"], each["threads"], each["beside"]) for each in measured]
    assert cases == [(name, 1, beside) for name in ALGORITHMS for beside in (False, True)]
    assert shared_memory_bus.section(measured).count("beside a stream") == len(ALGORITHMS)


def test_the_other_process_ends_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def start(*args: Any, **options: Any) -> subprocess.Popen[str]:
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(KeyError), shared_memory_bus.streaming():
        assert started[0].poll() is None
        raise KeyError
    assert started[0].poll() is not None
