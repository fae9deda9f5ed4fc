"""The demo from end to end: data, training, table, picture."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import torch

import recap_fast
from recap_fast import reference
from recap_fast.demo import data, picture, report
from recap_fast.demo.errors import DemoError
from recap_fast.demo.train import train


def run(
    *,
    steps: int,
    batch_size: int,
    seed: int,
    out: Path,
    data_dir: Path | None = None,
    threads: int | None = None,
) -> None:
    """Trains with `recap_fast` and with the reference, prints the table, writes the files.

    Args:
        steps, batch_size, seed: see `recap_fast.demo.train.train`.
        out: folder for `demo.png` and `results.json`, made if need be.
        data_dir: folder of the MovieLens files; None means the user's cache, filled if need be.
        threads: torch's intra-op threads; None leaves them as they are.

    Raises:
        DemoError: something that the user can mend is missing or wrong.
    """
    # torchrec calls a function of torch.fx that warns about its own name.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    if threads is not None:
        torch.set_num_threads(threads)
    builders = {"recap_fast": recap_fast.build_optimizer, "reference": reference.build_optimizer}
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # better now than after the training
            pass
    except OSError as error:
        raise DemoError(f"cannot write to the folder {out} (--out): {error}") from error
    dataset = data.load(data_dir)
    if batch_size > dataset.num_train:
        raise DemoError(f"--batch-size {batch_size} is more than {dataset.num_train} ratings")
    print(
        f"MovieLens-100K: {dataset.num_train} ratings to train on, the {dataset.num_test} latest to"
        f" test on; {steps} steps of {batch_size} ratings, {torch.get_num_threads()} threads."
    )
    runs = train(
        dataset,
        builders,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        show_progress=True,
    )
    comparison = report.compare(runs)
    print("\n" + report.table(comparison) + "\n")
    picture_path, results_path = out / "demo.png", out / "results.json"
    settings = {"steps": steps, "batch_size": batch_size, "seed": seed}
    report.write_results(results_path, comparison, runs, settings)
    picture.draw(picture_path, runs, f"MovieLens-100K, {steps} steps of {batch_size} ratings")
    print(f"Wrote {picture_path} and {results_path}.")
