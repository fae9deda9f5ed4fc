"""The command line: `recap-fast demo`, the same as `python -m recap_fast demo`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

_MOST_STEPS = 10_000_000  # of which losses are kept
_DEMO_MODULES = ("torch", "fbgemm_gpu", "torchrec", "torchmetrics", "matplotlib", "tqdm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    options = _parser().parse_args(arguments)
    for module in _DEMO_MODULES:
        try:
            importlib.import_module(module)
        except Exception as error:  # a build for another torch: OSError, RuntimeError
            return _fail(
                f"the demo needs {module}, which cannot be imported ({error}).\n{_remedy(module)}"
            )
    from recap_fast.demo.errors import DemoError

    try:
        from recap_fast.demo.run import run

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
    if module in ("fbgemm_gpu", "torchrec"):
        from recap_fast.torchrec_releases import how_to_install

        return how_to_install()
    return "Run `pip install recap-fast[demo]`."


def _fail(message: str, status: int = 1) -> int:
    print(f"recap-fast: {message}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="recap-fast",
        description="Fused multi-task optimizers for PyTorch recommenders.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="train a multi-task ranker on MovieLens-100K, with recap_fast and with the reference",
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
    demo.add_argument(
        "--steps",
        type=whole(1, _MOST_STEPS),
        default=300,
        metavar="N",
        help="training steps of each run (default: %(default)s)",
    )
    demo.add_argument(
        "--batch-size",
        type=whole(1),
        default=512,
        metavar="B",
        help="ratings per step (default: %(default)s)",
    )
    demo.add_argument(
        "--seed",
        type=whole(0),
        default=0,
        metavar="S",
        help="seed of the weights and of the order of the batches (default: %(default)s)",
    )
    demo.add_argument(
        "--nproc",
        type=whole(1),
        default=1,
        metavar="P",
        help=(
            "processes that train together on the CPU: they divide each batch, and the embedding"
            " tables between them; more than there are cores only take turns (default: %(default)s)"
        ),
    )
    demo.add_argument(
        "--threads",
        type=whole(1),
        metavar="T",
        help=(
            "threads that torch uses in an operation, in each process (default: torch's own"
            " choice, or with --nproc an equal part of the cores)"
        ),
    )
    demo.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with ml-100k.inter, ml-100k.user and ml-100k.item, instead of downloading",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("recap_fast_demo"),
        metavar="DIR",
        help="folder for demo.png and results.json (default: %(default)s)",
    )
    return parser


def whole(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """A type for argparse: a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            shown = text if len(text) <= 40 else f"{text[:40]}..."
            wanted = f"a whole number >= {least}"
            if value is not None and value > most:
                wanted = f"a whole number from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{shown!r} is not {wanted}")
        return value

    return parse
