"""Imports torchrec and FBGEMM, or says how to install them.

A module that needs them imports this one first. It raises ImportError if one of them is missing or
does not fit the torch that runs.
"""

from recap_fast.torchrec_releases import how_to_install

try:
    import fbgemm_gpu.split_table_batched_embeddings_ops_training  # noqa: F401
    import torchrec  # noqa: F401
except Exception as error:  # a build for another torch fails with OSError, RuntimeError, ...
    _message = (
        "build_optimizer, FusedCombinedOptimizer, RecapLRShim, reference, checkpoint, embeddings "
        "and keyed of recap_fast need torchrec and FBGEMM, in the releases that belong to your "
        f"torch ({type(error).__name__}: {error}).\n{how_to_install()}\n"
        "recap_fast.optim and recap_fast.fuse work without them."
    )
    if isinstance(error, ModuleNotFoundError):  # so that who can do without one can tell
        raise ModuleNotFoundError(_message, name=error.name) from error
    raise ImportError(_message) from error
