"""The command line of the demo: its options, and what is missing for it in one message."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from .arguments import whole

_MOST_STEPS = 10_000_000  # of which losses are kept
_MODULES = ("torch", "recap_fast", "fbgemm_gpu", "torchrec", "torchmetrics", "matplotlib", "tqdm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    options = _parser().parse_args(arguments)
    for module in _MODULES:
        try:
            importlib.import_module(module)
        except Exception as error:  # a build for another torch: OSError, RuntimeError
            return _fail(
                f"the demo needs {module}, which cannot be imported ({error}).\n{_remedy(module)}"
            )
    from .errors import DemoError

    try:
        from .run import run

        run(
            steps=options.steps,
            batch_size=options.batch_size,
            seed=options.seed,
            threads=options.threads,
            nproc=options.nproc,
            data_dir=options.data,
            out=options.out,
        )
    except (DemoError, ImportError) as error:
        # An ImportError says that the native extension is missing or does not fit torch.
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted", status=130)
    return 0


def _remedy(module: str) -> str:
    if module == "torch":
        return "Run `pip install torch`, and then build recap_fast."
    if module == "recap_fast":
        return "Run `pip install --no-build-isolation .` in its sources."
    if module in ("fbgemm_gpu", "torchrec"):
        from recap_fast.torchrec_releases import how_to_install

        return how_to_install()
    return "Run `pip install recap-fast[demo]`."


def _fail(message: str, status: int = 1) -> int:
    print(f"movielens: {message}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}",
        description=(
            "Trains a MaskNet ranker with a tower per task on MovieLens-100K, side by side with"
            " recap_fast.build_optimizer and with recap_fast.reference.build_optimizer, from the"
            " same weights on the same batches. Prints a table of both: AUC per task, how far the"
            " parameters are apart, time of an optimizer step."
        ),
        epilog=(
            "The data set is downloaded on first use (2 MB, from the wheel of recbole 1.2.1) and"
            " kept in $XDG_CACHE_HOME/recap_fast or ~/.cache/recap_fast."
        ),
    )
    parser.add_argument(
        "--steps",
        type=whole(1, _MOST_STEPS),
        default=300,
        metavar="N",
        help="training steps of each run (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=whole(1),
        default=512,
        metavar="B",
        help="ratings per step (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=whole(0),
        default=0,
        metavar="S",
        help="seed of the weights and of the order of the batches (default: %(default)s)",
    )
    parser.add_argument(
        "--nproc",
        type=whole(1),
        default=1,
        metavar="P",
        help=(
            "processes that train together on the CPU: they divide each batch, and the embedding"
            " tables between them; more than there are cores only take turns (default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--threads",
        type=whole(1),
        metavar="T",
        help=(
            "threads that torch uses in an operation, in each process (default: torch's own"
            " choice, or with --nproc an equal part of the cores)"
        ),
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with ml-100k.inter, ml-100k.user and ml-100k.item, instead of downloading",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("recap_fast_demo"),
        metavar="DIR",
        help="folder for demo.png and results.json (default: %(default)s)",
    )
    return parser
