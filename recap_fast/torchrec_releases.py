"""Which releases of torchrec and FBGEMM belong to which torch, and how to install them."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch


class Pair(NamedTuple):
    """Releases that belong together."""

    torchrec: str
    fbgemm: str


PAIRS: Final = {"2.13": Pair("1.8.0", "1.8.0"), "2.14": Pair("1.9.2", "1.9.0")}
"""By release of torch. torchrec itself asks for no particular release of FBGEMM or torch."""

REQUIREMENTS: Final = ("tensordict", "torchmetrics==1.0.3", "pyre-extensions", "tqdm", "numpy")
"""What torchrec needs beside FBGEMM. Without a GPU, torchrec is installed without dependencies, as
it asks for the CUDA build of FBGEMM."""


def how_to_install(torch_version: str = torch.__version__) -> str:
    """The commands that install torchrec and FBGEMM beside this torch, in lines of text."""
    release = ".".join(torch_version.split(".")[:2])
    if release not in PAIRS:
        return (
            f"No releases of them are known to belong to torch {torch_version}: first install a "
            f"torch {' or '.join(PAIRS)}, then build recap_fast anew; for each of them:\n"
            + "\n".join(_commands(each) for each in PAIRS)
        )
    return _commands(release)


def _commands(release: str) -> str:
    torchrec, fbgemm = PAIRS[release]
    return (
        f"For torch {release} with a GPU, run\n"
        f"    pip install torchrec=={torchrec} fbgemm-gpu=={fbgemm}\n"
        f"For torch {release} without a GPU, run\n"
        f"    pip install {' '.join(REQUIREMENTS)}\n"
        f"    pip install --no-deps torchrec=={torchrec} fbgemm-gpu-cpu=={fbgemm}"
    )
