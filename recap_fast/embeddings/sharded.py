"""The optimizers of embedding tables under torchrec's `DistributedModelParallel`."""

from __future__ import annotations

import torch
from torch import nn
from torchrec.distributed.utils import emb_opt_type_to_optimizer_class
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recap_fast.config import EmbeddingOptimizerConfig
from recap_fast.embeddings.kernels import table_kernel


def set_table_optimizers(
    model: nn.Module,
    emb_optimizer_config: EmbeddingOptimizerConfig,
    device: torch.device | str,
) -> nn.Module:
    """Tells torchrec how to train the tables of a model that is about to be sharded.

    Args:
        model: The model, not wrapped; its `EmbeddingBagCollection`s may be on the meta device.
        emb_optimizer_config: Algorithm, hyperparameters and schedule of each table.
        device: Where the shards will be.

    Returns:
        The model.

    Raises:
        ValueError: Something cannot be honoured; the message names it, and nothing was changed.
    """
    device = torch.device(device)
    kernels = [
        (bag.weight, table_kernel(emb_optimizer_config, table, device))
        for module in model.modules()
        if type(module) is EmbeddingBagCollection
        for table, bag in zip(
            module.embedding_bag_configs(), module.embedding_bags.values(), strict=True
        )
    ]
    for weight, kernel in kernels:
        arguments = dict(kernel.arguments)
        # The class is for torchrec's planner, which estimates memory by it; "optimizer" decides.
        weight._optimizer_classes = [emb_opt_type_to_optimizer_class(arguments["optimizer"])]
        # torchrec puts tables into one kernel if all of this is equal; it drops "_batch_key" then.
        weight._optimizer_kwargs = [{**arguments, "_batch_key": kernel.schedule}]
        # Its presence has torchrec's hand-made plans choose a fused kernel.
        weight._in_backward_optimizers = []
    return model
