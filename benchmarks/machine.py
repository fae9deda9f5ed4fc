"""What a reader needs to know of the machine that figures come from. No host names."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from recap_fast import build_info
from recap_fast.diagnostics.versions import cores, processor, version


def _caches() -> dict[str, str]:
    """Sizes of the caches of the first core, such as `{"L2": "512K"}`."""
    sizes = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = (cache / "type").read_text().strip()
        if kind != "Instruction":
            level = (cache / "level").read_text().strip()
            sizes[f"L{level}"] = (cache / "size").read_text().strip()
    return sizes


def _huge_pages() -> str:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", path.read_text()) if path.exists() else None
    return chosen.group(1) if chosen else "unknown"


def _revision() -> str | None:
    """What git calls the code that runs, with `-dirty` if it has not been committed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def describe() -> dict[str, Any]:
    """Facts that can be committed; `busy` is the load average before the run, per core."""
    info = build_info()
    return {
        "processor": processor(),
        "cores": cores(),
        "caches": _caches(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "transparent_huge_pages": _huge_pages(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "instruction_set": info["instruction_set"],
        "busy": round(os.getloadavg()[0] / cores(), 2),
        "revision": _revision(),
        "date": datetime.date.today().isoformat(),
    }


def name(facts: dict[str, Any]) -> str:
    """A file name for results: `amd-epyc-2core-avx512`."""
    processor = re.sub(r"\(.*?\)|CPU|@.*|\d+-Core|Processor", " ", facts["processor"])
    words = re.findall(r"[a-z0-9]+", processor.lower())
    return "-".join([*words, f"{facts['cores']}core", facts["instruction_set"]])
