"""Lets all tests run against another build of the extension, and lists what is skipped.

``RECAP_FAST_TEST_EXTENSION`` is the path of the shared library, for example of the build in which
an emulated CUDA engine steps CPU tensors (``tests/csrc/bindings``).
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections import Counter

import pytest
import torch  # noqa: F401  (its libraries must be loaded before an extension that uses them)


def _replace_extension(path: str) -> None:
    spec = importlib.util.spec_from_file_location("recap_fast._C", path)
    assert spec is not None and spec.loader is not None, f"{path} is not an extension module"
    module = importlib.util.module_from_spec(spec)
    sys.modules["recap_fast._C"] = module
    spec.loader.exec_module(module)


if path := os.environ.get("RECAP_FAST_TEST_EXTENSION"):
    _replace_extension(path)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says what was skipped and why, a line for each reason, which ``-q`` leaves out."""
    reasons = Counter(
        (
            "GPU suite: " * _is_of_gpu_suite(report.nodeid),
            report.longrepr[2].removeprefix("Skipped: "),
        )
        for report in terminalreporter.stats.get("skipped", ())
    )
    for (suite, reason), count in sorted(reasons.items()):
        terminalreporter.write_line(f"{suite}{count} skipped: {reason}")


def _is_of_gpu_suite(test: str) -> bool:
    """``tests/gpu``, and what runs on the fixture ``device``."""
    return test.startswith("tests/gpu/") or re.search(r"[[-]cuda[]-]", test) is not None
