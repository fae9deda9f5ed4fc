"""Runs tests with the extension and the core in it built with sanitizers, as `make sanitize` does.

    python -m tests.support.under_sanitizers address,undefined tests/optim/test_sparse.py ...
    python -m tests.support.under_sanitizers thread tests/optim/test_threads.py

Python and torch are as ever: what they do is seen where they call malloc, memcpy or a lock.
"""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.native_build import ROOT, SOURCES, build_extension

SUPPRESSIONS = SOURCES / "bindings" / "tsan_suppressions.txt"
LIBRARIES = {
    "address,undefined": ("libasan.so", "libubsan.so", "libstdc++.so.6"),
    "thread": ("libtsan.so",),
}


def _path_of(library: str) -> str:
    command = [os.environ.get("CXX", "c++"), f"-print-file-name={library}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main(sanitizers: str, *arguments: str) -> int:
    extension = build_extension("without_cuda", sanitizers)
    variables = {
        "RECAP_FAST_TEST_EXTENSION": str(extension),
        "LD_PRELOAD": " ".join(map(_path_of, LIBRARIES[sanitizers])),
        # Python keeps much until its end, so that nothing can be said of leaks.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Of what torch locks and unlocks, it sees one without the other.
        "TSAN_OPTIONS": f"report_mutex_bugs=0:suppressions={SUPPRESSIONS}",
    }
    # -s: pytest would keep the reports of a process that is ended by one.
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
