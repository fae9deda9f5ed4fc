"""Lets all tests run against another build of the extension.

``RECAP_FAST_TEST_EXTENSION`` is the path of the shared library, for example of the build in which
an emulated CUDA engine steps CPU tensors (``tests/csrc/bindings``).
"""

from __future__ import annotations

import importlib.util
import os
import sys

import torch  # noqa: F401  (its libraries must be loaded before an extension that uses them)


def _replace_extension(path: str) -> None:
    spec = importlib.util.spec_from_file_location("recap_fast._C", path)
    assert spec is not None and spec.loader is not None, f"{path} is not an extension module"
    module = importlib.util.module_from_spec(spec)
    sys.modules["recap_fast._C"] = module
    spec.loader.exec_module(module)


if path := os.environ.get("RECAP_FAST_TEST_EXTENSION"):
    _replace_extension(path)
