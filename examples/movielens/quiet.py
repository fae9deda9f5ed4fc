"""Keeps what torch and torchrec say about their own code from between the lines of a training."""

from __future__ import annotations

import logging
import warnings

_LOGGERS = (
    "torch.fx._symbolic_trace",  # a function that torchrec calls warns about its own name
    "torchrec.distributed.utils",  # tables that are not cached have no use for a cache's settings
    "torchrec.distributed.planner",
)
_DEPRECATED = ("`broadcast_buffers` is", "Please use DTensor", "`torch.distributed.[a-z_]*` is")


def quiet_libraries() -> None:
    """Silences warnings that no user can act on: torchrec's use of what torch deprecates."""
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in _DEPRECATED:
        warnings.filterwarnings("ignore", message, category=FutureWarning)
