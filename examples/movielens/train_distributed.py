r"""Trains the demo's ranker on several processes, with checkpoints that a restart goes on from.

    torchrun --nproc-per-node 2 -m examples.movielens.train_distributed
    torchrun --nproc-per-node 2 --max-restarts 3 -m examples.movielens.train_distributed \
        --checkpoint-dir run

Each process takes an equal part of every batch. torchrec's model parallel shards the embedding
tables, DDP or FSDP2 takes the rest; `recap_fast.build_optimizer` is called as for one process.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import deque
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from recap_fast import build_optimizer, checkpoint

from . import data, processes
from .arguments import whole
from .errors import DemoError
from .model import build_model, optimizer_configs
from .quiet import quiet_libraries
from .sharding import DENSE, SHARDINGS, local_tensors, shard
from .train import evaluate


def main() -> None:
    options = parse()
    quiet_libraries()
    try:
        device = processes.join(options.timeout)
        with processes.naming_lost_processes(options.timeout):
            train(options, device)
            dist.barrier()
    except BaseException as error:
        processes.fail(error)
    processes.leave()


def train(options: argparse.Namespace, device: torch.device) -> None:
    share = processes.share()
    if options.batch_size % share.processes:
        raise DemoError(
            f"--batch-size {options.batch_size} is not a multiple of the {share.processes}"
            " processes, which divide each batch evenly"
        )
    dataset = data.load(options.data)
    dense_config, embedding_config = optimizer_configs(options.steps)
    model = shard(
        build_model(options.seed, table_sizes=dataset.table_sizes),
        embedding_config,
        sharding=options.sharding,
        dense=options.dense,
        device=device,
    )
    optimizer, scheduler = build_optimizer(
        model, dense_config, embedding_config, clip_grad_norm=options.clip_grad_norm
    )

    # Batches and schedules follow from these, so a run that goes on must have the same.
    settings = {name: getattr(options, name) for name in ("seed", "batch_size", "steps")}
    start, skipped = 0, 0
    if options.checkpoint_dir is not None:
        loaded = checkpoint.load(options.checkpoint_dir, model, optimizer, scheduler)
        if loaded is not None:
            start, skipped = loaded.step, loaded.extra.pop("skipped")
            if loaded.extra != settings:
                raise DemoError(f"{loaded.path} is of another run: {loaded.extra}, not {settings}")
    recent: deque[torch.Tensor] = deque(maxlen=20)
    batches = dataset.batches(options.batch_size, options.seed, share=share, start=start)
    begin = time.perf_counter()
    progress = tqdm(
        range(start, options.steps),
        initial=start,
        total=options.steps,
        unit="step",
        disable=share.rank > 0,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,  # seconds; a log wants few lines
    )
    for step in progress:
        batch = next(batches).to(device)
        optimizer.zero_grad()
        losses = binary_cross_entropy_with_logits(model(batch), batch.labels, reduction="none")
        losses = losses.mean(dim=0)  # of each task
        # Before the backward pass, which trains the tables: afterwards it would be too late.
        if processes.all_finite(losses):
            losses.sum().backward()
            optimizer.step()
            recent.append(losses.detach())
        else:
            skipped += 1
        scheduler.step()  # counts batches, skipped ones too
        done = step + 1
        if done == options.steps or done % options.checkpoint_every == 0:
            if not processes.all_finite(*local_tensors(model)):
                raise DemoError(
                    f"gradients that are not finite have reached tables before step {done}: start"
                    " again, which goes on from the last checkpoint, if there is --checkpoint-dir"
                )
            if options.checkpoint_dir is not None:
                what = options.checkpoint_dir, done, model, optimizer, scheduler
                checkpoint.save(*what, extra={**settings, "skipped": skipped})
    seconds = time.perf_counter() - begin
    auc = evaluate(model, dataset, share=share, device=device)
    loss = processes.mean(torch.stack(list(recent)).mean(dim=0)).tolist() if recent else None
    if share.rank == 0:
        print(f"\n{'task':<32}{'loss of last batches':>22}{'test AUC':>10}")
        for column, task in enumerate(data.TASKS):
            print(f"{task:<32}{loss[column] if loss else '-':>22.4}{auc[task]:>10.4f}")
        rate = (options.steps - start) * options.batch_size / seconds
        print(f"{share.processes} processes, {rate:.0f} ratings/s, {skipped} batches skipped")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, text: str, **options) -> None:
        default = "" if options.get("default") is None else " (default: %(default)s)"
        parser.add_argument(name, help=text + default, **options)

    add("--steps", "batches to train on", type=whole(1), default=300)
    add("--batch-size", "ratings in each, of all processes together", type=whole(1), default=512)
    add("--seed", "of the weights and of the order of the batches", type=whole(0), default=0)
    add("--sharding", "how to lay out the tables", choices=SHARDINGS, default="planner")
    add("--dense", "what to do with all other parameters", choices=DENSE, default="ddp")
    text = "largest global norm of dense gradients; a step whose norm is not finite is skipped"
    add("--clip-grad-norm", text, type=float, default=math.inf, metavar="NORM")
    add("--checkpoint-dir", "where to save, and whose newest to go on from", type=Path)
    add("--checkpoint-every", "how many steps from one to the next", type=whole(1), default=100)
    add("--timeout", "seconds without an answer after which to give up", type=float, default=300.0)
    add("--data", "folder of the MovieLens files, instead of downloading them", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
