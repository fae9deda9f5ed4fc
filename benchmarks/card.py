"""What a reader needs to know of the device that figures come from. No host names."""

from __future__ import annotations

import re
import subprocess
from typing import Any, Final

import torch

from recap_fast import build_info

_QUERY: Final = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "celsius": "temperature.gpu",
    "watts": "power.draw",
}


def why_not() -> str | None:
    """Why nothing can be measured here; None if it can."""
    if not torch.cuda.is_available():
        return "this machine has no CUDA device"
    if "cuda" not in build_info()["engines"]:
        return "this build of recap_fast has no CUDA engine"
    return None


def describe() -> dict[str, Any]:
    """Facts that can be committed."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "card_memory_gb": round(properties.total_memory / 1e9),
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
    }


def read_state(text: str) -> dict[str, str]:
    """Reads the answer of `state`'s query: the values of one device, separated by commas."""
    values = [value.strip() for value in text.strip().split("\n")[0].split(",")]
    return dict(zip(_QUERY, values, strict=True)) if len(values) == len(_QUERY) else {}


def state() -> dict[str, str]:
    """Driver, clocks, temperature and power now; empty where nvidia-smi does not tell."""
    query = ",".join(_QUERY.values())
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    command.append(f"--id={torch.cuda.current_device()}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return read_state(done.stdout) if done.returncode == 0 else {}


def file_name(card: str) -> str:
    """A name for results: `NVIDIA H100 80GB HBM3` becomes `nvidia-h100`."""
    words = re.findall(r"[a-z0-9]+", card.lower())
    return "-".join(word for word in words if not re.fullmatch(r"\d+gb|hbm\d\w?", word))
