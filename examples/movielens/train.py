"""One training loop for several optimizers side by side, on equal models and equal batches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torchmetrics.functional.classification import binary_auroc
from tqdm import tqdm

from recap_fast.config import EmbeddingOptimizerConfig, RecapOptimizerConfig
from recap_fast.embeddings import fuse_embeddings
from recap_fast.scheduler import RecapLRShim

from . import processes
from .data import TASKS, Batch, Dataset
from .model import build_model, optimizer_configs
from .share import WHOLE, Share

Builder = Callable[
    [nn.Module, RecapOptimizerConfig, EmbeddingOptimizerConfig],
    tuple[torch.optim.Optimizer, RecapLRShim],
]
"""What `recap_fast.build_optimizer` and `recap_fast.reference.build_optimizer` are."""

Placer = Callable[[nn.Module, EmbeddingOptimizerConfig], nn.Module]
"""Fuses the embeddings of a model: on this process, or in shards over several."""

EMBEDDINGS = "embeddings"
"""The name of the fused embeddings' param group in `Run.learning_rates`."""


@dataclass
class Run:
    """What one optimizer did.

    Attributes:
        model: the trained model.
        optimizer, scheduler: as the builder made them, after the last step.
        losses: binary cross-entropy of each task at each step, over all processes.
        learning_rates: rate of each param group that each step used.
        step_seconds: duration of each `optimizer.step()`, in this process.
        auc: area under the ROC curve of each task on the test split.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: RecapLRShim
    losses: dict[str, list[float]]
    learning_rates: dict[str, list[float]]
    step_seconds: list[float] = field(default_factory=list)
    auc: dict[str, float] = field(default_factory=dict)


def train(
    dataset: Dataset,
    builders: Mapping[str, Builder],
    *,
    steps: int,
    batch_size: int = 512,
    seed: int = 0,
    make_model: Callable[..., nn.Module] = build_model,
    place: Placer = fuse_embeddings,
    share: Share = WHOLE,
    show_progress: bool = False,
) -> dict[str, Run]:
    """Trains one model per builder, step by step in turn, and tests them.

    All models begin with the same weights and see the same batches. Who goes first changes from
    step to step, so that a drift of the machine's speed hits all alike. Equal arguments give equal
    results, bit for bit, at an equal number of threads and processes.

    Args:
        dataset: what to train and test on.
        builders: names of the runs and their `build_optimizer`.
        steps: number of batches, at least 1; the schedules stretch to it.
        batch_size: ratings per batch, of all processes together: at least 1 and at most the
            training split.
        seed: of the weights and of the order of the batches.
        make_model: called as `make_model(seed, table_sizes=...)`; gives a model whose embeddings
            are not fused yet.
        place: fuses them; `sharding.shard`, where several processes train.
        share: this process's; each process calls this with the same other arguments.
        show_progress: whether to show a progress bar on stderr.

    Returns:
        One `Run` per builder, under its name.

    Raises:
        ValueError: `steps` or `batch_size` is out of range, or a batch cannot be divided evenly.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    batches = dataset.batches(batch_size, seed, share=share)
    runs = {
        name: _prepare(make_model(seed, table_sizes=dataset.table_sizes), place, build, steps)
        for name, build in builders.items()
    }
    progress = tqdm(
        range(steps),
        desc=" and ".join(runs),
        unit="step",
        disable=not show_progress or share.rank > 0,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,  # seconds; a log wants few lines
    )
    for step in progress:
        batch = next(batches)
        in_turn = list(runs.values())
        for run in in_turn if step % 2 == 0 else reversed(in_turn):
            loss = _train_step(run, batch)
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
    for run in runs.values():
        if share.processes > 1:
            _average_losses(run)
        run.auc = evaluate(run.model, dataset, share=share)
    return runs


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    batch_size: int = 2048,
    share: Share = WHOLE,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Area under the ROC curve of each task on the test split; leaves the model in eval mode.

    Args:
        model: on `device`.
        dataset: whose test split to take.
        batch_size: ratings that this process computes at once.
        share: this process's; all processes must call this, and all get the same.
        device: where to compute.
    """
    model.eval()
    with torch.no_grad():
        outputs = [
            (model(batch), batch.labels)
            for batch in (part.to(device) for part in dataset.test_batches(batch_size, share))
        ]
    logits, labels = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    if share.processes > 1:
        # In the order of the ranks, the split comes first, and then what was repeated of it.
        logits, labels = (processes.gather(part)[: dataset.num_test] for part in (logits, labels))
    return {
        task: float(binary_auroc(logits[:, column], labels[:, column].long()))
        for column, task in enumerate(TASKS)
    }


def _average_losses(run: Run) -> None:
    local = torch.tensor(list(run.losses.values()), dtype=torch.float64)
    run.losses = dict(zip(run.losses, processes.mean(local).tolist(), strict=True))


def _prepare(model: nn.Module, place: Placer, build: Builder, steps: int) -> Run:
    dense_config, embedding_config = optimizer_configs(steps)
    model = place(model, embedding_config)
    optimizer, scheduler = build(model, dense_config, embedding_config)
    return Run(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        losses={task: [] for task in TASKS},
        learning_rates={name: [] for name in [*scheduler.group_names, EMBEDDINGS]},
    )


def _train_step(run: Run, batch: Batch) -> float:
    """One step of one run; returns the sum of the tasks' losses."""
    run.optimizer.zero_grad()
    losses = nn.functional.binary_cross_entropy_with_logits(
        run.model(batch), batch.labels, reduction="none"
    ).mean(dim=0)
    losses.sum().backward()
    rates = [group["lr"] for group in run.optimizer.param_groups]
    begin = time.perf_counter()
    run.optimizer.step()
    run.step_seconds.append(time.perf_counter() - begin)
    run.scheduler.step()

    for series, loss in zip(run.losses.values(), losses.tolist(), strict=True):
        series.append(loss)
    for series, rate in zip(run.learning_rates.values(), rates, strict=True):
        series.append(float(rate))
    return float(losses.detach().sum())
