"""Runs the example on made-up data and a small model, with a fault if asked for.

As a script, it finds these in the environment:

* FAULT="<kind> <rank> <step>": see `break_down`;
* ONCE: a file; the fault does not happen if it is there, and makes it;
* FINAL: a file for the state dict after the training, with whole tensors.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from examples.movielens import data, model, sharding, train
from examples.movielens.data import Batch, Dataset
from tests.support.processes import device
from tests.support.small_training import BATCH_SIZE, RATINGS, SIZES, STEPS, table_sizes

EXAMPLE = "examples.movielens.train_distributed"
ARGUMENTS = ("--steps", str(STEPS), "--batch-size", str(BATCH_SIZE), "--sharding", "table_wise")
NAN = float("nan")


def main() -> None:
    make_small()
    if "FAULT" in os.environ:
        kind, rank, step = os.environ["FAULT"].split()
        if rank == os.environ["RANK"]:
            break_down(kind, int(step))
    if "FINAL" in os.environ:
        path = os.environ["FINAL"]
        before_the_test(lambda state: os.environ["RANK"] == "0" and torch.save(state, path))
    sys.argv[1:1] = ARGUMENTS
    runpy.run_module(EXAMPLE, run_name="__main__", alter_sys=True)


def train_with_fault(
    fault: tuple[str, int, int] | None, *arguments: str
) -> tuple[dict[str, torch.Tensor], str]:
    """The same in a process that has joined the others; returns the state dict and the output."""
    final: dict[str, torch.Tensor] = {}
    with as_before(), contextlib.redirect_stdout(io.StringIO()) as output:
        make_small()
        if fault is not None:
            kind, rank, step = fault
            if rank == torch.distributed.get_rank():
                break_down(kind, step)
        before_the_test(final.update)
        sys.argv = ["train_distributed.py", *ARGUMENTS, *arguments]
        example = runpy.run_module(EXAMPLE)
        example["train"](example["parse"](), device())
    return final, output.getvalue()


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """Takes back what the functions below replace."""
    places = ((data, "load"), (model, "build_model"), (Dataset, "batches"), (train, "evaluate"))
    before = [(owner, name, getattr(owner, name)) for owner, name in (*places, (sys, "argv"))]
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def make_small() -> None:
    dataset = data.synthetic(RATINGS, seed=0)
    build_model = model.build_model
    data.load = lambda directory: dataset
    model.build_model = lambda seed, **_: build_model(
        seed, table_sizes=table_sizes(dataset), **SIZES
    )


def break_down(kind: str, at: int) -> None:
    """Has this process break down when it asks for the batch with the number `at`.

    Args:
        kind: `kill` or `stop`, signals to itself; `nan-batch`: the dense features are not numbers;
            `nan-gradient`: the gradient of one weight of a tower is not, before it is reduced;
            `nan-tables`: the gradients of the pooled embeddings are not.
        at: from 0.
    """
    batches = Dataset.batches
    is_at_fault = False

    def faulty(self: Dataset, *args, start: int = 0, **options):
        nonlocal is_at_fault
        for step, batch in enumerate(batches(self, *args, start=start, **options), start):
            is_at_fault = step == at
            yield break_batch(kind, batch) if step == at else batch

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * NAN if is_at_fault else gradient

    def before_tower(layer: torch.nn.Module, _) -> None:
        if is_at_fault:
            layer.weight.register_hook(spoil)

    def after_embeddings(norm: torch.nn.Module, arguments: tuple[torch.Tensor]) -> None:
        if arguments[0].requires_grad:
            arguments[0].register_hook(spoil)

    Dataset.batches = faulty
    build_model = model.build_model

    def build_faulty(*args, **options):
        built = build_model(*args, **options)
        if kind == "nan-gradient":
            # FSDP2 puts another weight in place for each forward pass.
            tower = built.towers["recap__engagement__is_loved"]
            tower[0].register_forward_pre_hook(before_tower)
        if kind == "nan-tables":
            built.embedding_norm.register_forward_pre_hook(after_embeddings)
        return built

    model.build_model = build_faulty


def break_batch(kind: str, batch: Batch) -> Batch:
    if kind == "nan-batch":
        return Batch(batch.dense * NAN, batch.sparse, batch.labels)
    if kind in ("kill", "stop"):
        once = os.environ.get("ONCE")
        if once is None or not Path(once).exists():
            if once is not None:
                Path(once).touch()
            os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    return batch


def before_the_test(see) -> None:
    """Has `see` called with the state dict of the trained model."""
    evaluate = train.evaluate

    def see_and_evaluate(trained, *args, **options):
        see({name: value.cpu() for name, value in sharding.whole_state(trained).items()})
        return evaluate(trained, *args, **options)

    train.evaluate = see_and_evaluate


if __name__ == "__main__":
    main()
