"""Has torchrec fuse tables whose in-backward optimizer is one of ours, as it does for torch's."""

from __future__ import annotations

import sys

import torch


def register(kind: type[torch.optim.Optimizer], torch_class: type[torch.optim.Optimizer]) -> None:
    """Gives a class the FBGEMM algorithm that torchrec has for the class of torch it replaces.

    ``apply_optimizer_in_backward`` makes an optimizer of the class for each table, and torchrec's
    model parallel looks the class up in a table of its own (``optimizer_type_to_emb_opt_type``),
    later. So it is enough to register when an optimizer is made; nothing is imported for it.
    Where torchrec has no such table, or not the class of torch (AdamW), it refuses ours as well.
    """
    utils = sys.modules.get("torchrec.distributed.utils")
    types = getattr(utils, "_OPTIMIZER_CLASS_TO_EMB_OPT_TYPE", None)
    if types is not None and torch_class in types:
        types.setdefault(kind, types[torch_class])
