"""What the processes of a group need: imported once, in the server that they are forked from.

What is imported is for ever: the collector of each process passes it by.
"""

import gc
from importlib import import_module

for name in (
    "torchrec.distributed",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "pytest",
    "tests.support.optimizers",
    "tests.support.small_training",
    "tests.support.table_training",
):
    import_module(name)
gc.collect()
gc.freeze()
