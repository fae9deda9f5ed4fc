"""Embedding tables on FBGEMM's kernels, which update them during the backward pass.

* `fuse_embeddings` puts the `EmbeddingBagCollection`s of a model on them, in one process;
* `set_table_optimizers` has torchrec's `DistributedModelParallel` do so, sharded over processes;
* `plan` says where it puts the tables, so that they train as configured;
* `find_fused_optimizer` finds what they update.

What follows from an update during the backward pass:

* the tables' gradients are not stored, so that clipping by norm does not reach them;
* each of several backward passes before a step is an update, and a `GradScaler` scales it with the
  loss, unless `emb_optimizer_config` has `several_backwards="accumulate"`: gradients of the pooled
  outputs are then held until `optimizer.step()`, and `optimizer.zero_grad()` drops them;
* DDP does not reduce the tables' gradients: to train across processes, shard the unfused model.
"""

from __future__ import annotations

from recap_fast import torchrec_checked  # noqa: F401 - first: says if torchrec is missing

# isort: split
from recap_fast.embeddings.find import find_fused_optimizer
from recap_fast.embeddings.fuse import fuse_embeddings
from recap_fast.embeddings.planning import plan
from recap_fast.embeddings.sharded import set_table_optimizers

__all__ = ["find_fused_optimizer", "fuse_embeddings", "plan", "set_table_optimizers"]
