"""Names of parameters: what wrappers add to them, and which are embedding tables."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from recap_fast.config import EmbeddingOptimizerConfig

# Path segments of torch.compile, torchrec's model parallel, FSDP and activation checkpointing.
WRAPPER_SEGMENTS = frozenset(
    {"_orig_mod", "_dmp_wrapped_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)

# A table of a torchrec EmbeddingBagCollection is "<path>.embedding_bags.<table>.weight".
TABLES = "embedding_bags"


def without_wrappers(names: Iterable[str]) -> dict[str, str]:
    """Maps each name to the one that it would have if the model were not wrapped."""
    bare = {
        name: ".".join(part for part in name.split(".") if part not in WRAPPER_SEGMENTS)
        for name in names
    }
    # DDP and others hold all of the model as "module"; a module of the model may be called so too.
    while bare and all(name.startswith("module.") for name in bare.values()):
        bare = {full: name.removeprefix("module.") for full, name in bare.items()}
    return bare


def modules_by_name(params: Iterable[str]) -> dict[str, list[str]]:
    """Maps each parameter's name to those of the modules that it is in, from the outermost on."""
    return {full: name.split(".")[:-1] for full, name in without_wrappers(params).items()}


def is_table(param_name: str) -> bool:
    """Returns whether a parameter is the weights of a table of an `EmbeddingBagCollection`."""
    return param_name.split(".")[-3:-2] == [TABLES]


def tables_in(param_names: Iterable[str]) -> list[str]:
    """Returns the names of the tables of `EmbeddingBagCollection`s among parameters."""
    return [table_name(name) for name in param_names if is_table(name)]


def table_name(param_name: str) -> str:
    """Returns what an embedding table is called, given the name of its weights."""
    return param_name.removesuffix(".weight").rpartition(".")[2]


def check_table_names(
    emb_optimizer_config: EmbeddingOptimizerConfig, tables: Iterable[str]
) -> None:
    """Raises if the configuration's `tables` names one that is not among these."""
    known = dict.fromkeys(tables)
    for name in emb_optimizer_config.tables:
        if name in known:
            continue
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {some(close)}?" if close else f"there are {some(known, 20) or 'none'}"
        raise ValueError(f"emb_optimizer_config.tables: the model has no table {name!r}; {hint}")


def some(names: Iterable[str], limit: int = 5) -> str:
    """Returns the first names and how many more there are, for a message."""
    quoted = [repr(name) for name in names]
    more = f" and {len(quoted) - limit} more" if len(quoted) > limit else ""
    return ", ".join(quoted[:limit]) + more


def unused_name(name: str, taken: Iterable[str]) -> str:
    """Returns `name`, with underscores at its end if that is taken."""
    taken = set(taken)
    while name in taken:
        name += "_"
    return name
