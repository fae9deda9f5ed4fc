"""Fixtures of all tests; lets them run against another build; lists what is skipped.

``RECAP_FAST_TEST_EXTENSION`` is the path of the shared library, for example of the build in which
an emulated CUDA engine steps CPU tensors (``tests/csrc/bindings``).
"""

from __future__ import annotations

import gc
import importlib.util
import os
import re
import sys
from collections import Counter
from collections.abc import Generator

import pytest

# Threads that spin at the end of each loop take the cores from other tests' workers. To be read by
# the library of threads, which comes with torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # its libraries must be loaded before an extension that uses them


def _replace_extension(path: str) -> None:
    spec = importlib.util.spec_from_file_location("recap_fast._C", path)
    assert spec is not None and spec.loader is not None, f"{path} is not an extension module"
    module = importlib.util.module_from_spec(spec)
    sys.modules["recap_fast._C"] = module
    spec.loader.exec_module(module)


if path := os.environ.get("RECAP_FAST_TEST_EXTENSION"):
    _replace_extension(path)


@pytest.fixture(params=["gloo", "nccl"], scope="module")
def backend(request: pytest.FixtureRequest) -> str:
    """The process groups that a test of several processes runs on: one body for CPUs and GPUs.

    On gloo only is what is for CPUs (`make demo`), or has a process group of one process for
    the sake of a wrapper or of file names (tests/test_build.py, tests/groups/test_assign.py).
    """
    if request.param == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("nccl needs a CUDA device per process, and fbgemm-gpu with CUDA for tables")
    return request.param


@pytest.fixture(scope="module")
def table_backend(backend: str) -> str:
    """The same for models with tables."""
    import fbgemm_gpu  # which a machine may lack that tests the step only

    if backend == "nccl" and fbgemm_gpu.__variant__ != "cuda":
        pytest.skip("nccl needs fbgemm-gpu with CUDA")
    return backend


@pytest.fixture(scope="session", autouse=True)
def _processes_end_well() -> Generator[None]:
    """Ends the processes of all process groups; an error if one does not end as it should."""
    yield
    if processes := sys.modules.get("tests.support.processes"):
        processes.end_all()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Has process groups' imports made while more tests are collected."""
    processes = sys.modules.get("tests.support.processes")
    if processes and getattr(getattr(item, "module", None), "run", None) is processes.run:
        processes.start_server()


def pytest_collection_finish() -> None:
    """Lets the collector pass by what was imported."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for compilers and processes comes first: at the end, other workers would idle."""
    first = ("test_cuda.py", "test_gpu_suite.py", "test_csrc.py", "test_cuda_build.py")
    folders = {"distributed", "checkpoint", "examples"}

    def place(item: pytest.Item) -> int:
        if item.path.name in first:
            return first.index(item.path.name)
        return len(first) + folders.isdisjoint(item.nodeid.split("/"))

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skips the files that need torchrec where it, or FBGEMM, is not installed."""
    report = yield
    call = getattr(report, "call", None)
    error = None if call is None or call.excinfo is None else call.excinfo.value
    while error is not None:  # recap_fast raises one that says what to install
        if isinstance(error, ModuleNotFoundError) and error.name in ("torchrec", "fbgemm_gpu"):
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 0, f"Skipped: could not import {error.name!r}")
        error = error.__cause__
    return report


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
