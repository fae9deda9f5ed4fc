"""What other processes do on the machine while something is measured."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

_STAT: Final = Path("/proc/stat")


def _busy_seconds() -> float:
    """Of all cores, of all processes, since the machine started; interrupts are nobody's."""
    user, nice, system = _STAT.read_text().split("\n", 1)[0].split()[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Of this process and those that it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def watch(function: Callable[[], Any]) -> tuple[Any, float | None]:
    """Calls a function; returns its result, and how many cores others kept busy meanwhile.

    None where the system does not tell. Processes that the function starts are not others, if it
    waits for them.
    """
    if not _STAT.exists():
        return function(), None
    begin, busy, own = time.monotonic(), _busy_seconds(), _own_seconds()
    result = function()
    seconds = time.monotonic() - begin
    others = (_busy_seconds() - busy) - (_own_seconds() - own)
    return result, max(0.0, others / seconds)
