"""What is not there, what it would be good for, and how to get it: a line each."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from recap_fast.diagnostics.versions import (
    FBGEMM_PACKAGES,
    gpus,
    has_nvidia_driver,
    version,
)
from recap_fast.torchrec_releases import PAIRS, REQUIREMENTS

_NEED_TORCHREC = "build_optimizer, RecapLRShim, reference, checkpoint and embeddings need it"
# Dependencies of the package, which an installation with --no-deps leaves out.
_DEPENDENCIES = {"pydantic": ("pydantic", "pydantic>=2.7,<3"), "PyYAML": ("yaml", "PyYAML>=6")}


def missing(info: dict[str, Any]) -> Iterator[str]:
    """Yields lines.

    Args:
        info: what `recap_fast.build_info` returns.
    """
    yield from _cuda(info["engines"])
    for package, (module, requirement) in _DEPENDENCIES.items():
        if why := _why_not(module):
            yield f"{package} {why}; configurations need it: `pip install '{requirement}'`"
    yield from _torchrec()


def _cuda(engines: list[str]) -> Iterator[str]:
    if torch.version.cuda is None:
        if has_nvidia_driver():
            yield (
                "CUDA: there is an NVIDIA GPU, but this torch is for CPUs only: install a torch"
                " with CUDA, then recap_fast anew"
            )
        elif "cuda" in engines:
            yield "GPU: the CUDA engine is built, but this torch is for CPUs; it was not run here"
    elif gpus() and "cuda" not in engines:
        yield (
            f"CUDA engine: not built, though there is a GPU: install nvcc 12.8 or newer of CUDA"
            f" {torch.version.cuda.split('.')[0]}, then in the sources run `RECAP_CUDA=ON pip"
            " install --force-reinstall --no-deps --no-build-isolation .`"
        )
    elif "cuda" in engines and not gpus():
        yield "GPU: the CUDA engine is built, but torch finds no GPU; it was not run here"


def _torchrec() -> Iterator[str]:
    command = _how_to_install()
    reasons = {name: _why_not(name) for name in ("torchrec", "fbgemm_gpu")}
    reasons["torchrec"] = reasons["torchrec"] if version("torchrec") else "is not installed"
    if not any(version(package) for package in FBGEMM_PACKAGES) and reasons["fbgemm_gpu"]:
        reasons["fbgemm_gpu"] = "is not installed"
    lacking = [f"{name} {why}" for name, why in reasons.items() if why]
    if lacking:
        yield f"{' and '.join(lacking)}; {_NEED_TORCHREC}: {command}"
        return
    fbgemm = importlib.import_module("fbgemm_gpu")
    if gpus() and getattr(fbgemm, "__variant__", "cuda") != "cuda":
        yield f"FBGEMM is the build for CPUs, so tables cannot be fused on the GPU: {command}"
    pair = PAIRS.get(_release())
    found = (version("torchrec"), next(filter(None, map(version, FBGEMM_PACKAGES)), None))
    bare = tuple(release and release.split("+")[0] for release in found)
    if pair is None or bare != tuple(pair):
        yield (
            f"torchrec {found[0]} and FBGEMM {found[1]} are not the releases that were tested with"
            f" torch {_release()}: {command}"
        )


def _why_not(module: str) -> str | None:
    """Why a module cannot be imported; None if it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        return "is not installed" if error.name == module else f"lacks {error.name}"
    except Exception as error:  # a build for another torch: OSError, RuntimeError
        return f"cannot be imported ({' '.join(str(error).split())[:160]})"
    return None


def _release() -> str:
    return ".".join(torch.__version__.split(".")[:2])


def _how_to_install() -> str:
    pair = PAIRS.get(_release())
    if pair is None:
        known = " or ".join(PAIRS)
        return f"none is known for torch {_release()}: install torch {known}, then recap_fast anew"
    if torch.version.cuda and gpus():
        return f"`pip install torchrec=={pair.torchrec} fbgemm-gpu=={pair.fbgemm}`"
    return (
        f"`pip install {' '.join(REQUIREMENTS)} && pip install --no-deps"
        f" torchrec=={pair.torchrec} fbgemm-gpu-cpu=={pair.fbgemm}`"
    )
