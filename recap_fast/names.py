"""Names of parameters: what wrappers add to them, and which are embedding tables."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

from torch import nn

from recap_fast.config import EmbeddingOptimizerConfig

# Path segments of torch.compile, torchrec's model parallel, FSDP and activation checkpointing.
_WRAPPER_SEGMENTS = frozenset(
    {"_orig_mod", "_dmp_wrapped_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)

# A table of a torchrec EmbeddingBagCollection is "<path>.embedding_bags.<table>.weight".
TABLES = "embedding_bags"


def is_wrapped(model: nn.Module) -> bool:
    """Returns whether ``model`` is a wrapper of torch's or torchrec's own."""
    names = dict(model.named_children())
    return isinstance(model, _PARALLEL) or any(name in _WRAPPER_SEGMENTS for name in names)


def wrapped_module(module: nn.Module) -> tuple[str, nn.Module] | None:
    """Returns what a wrapper (DDP, torch.compile, model parallel) wraps, and its name there.

    None for other modules. DDP, DeepSpeed and many more call it "module".
    """
    children = dict(module.named_children())
    if len(children) == 1:
        ((name, child),) = children.items()
        if name == "module" or name in _WRAPPER_SEGMENTS:
            return name, child
    return None


def bare_names(model: nn.Module) -> Callable[[str], str]:
    """Returns what maps the path of a parameter, buffer or module to that in the unwrapped model.

    A module of the model may be called "module" too: so is a wrapper's, if it is of torch's own
    data parallel, or if nothing but wrappers is around it.
    """
    # Paths are compared without the segments, which some wrappers hide from names themselves.
    holders = {
        _without_segments(path)
        for path, each in model.named_modules()
        if isinstance(each, _PARALLEL)
    }
    outer, owner = "", model
    while found := wrapped_module(owner):
        if any(True for _ in owner.parameters(recurse=False)):
            break  # a module of the model, with weights of its own
        name, owner = found
        if name == "module":
            holders.add(_without_segments(outer))
        outer = f"{outer}.{name}" if outer else name

    def bare(path: str) -> str:
        parts = _without_segments(path).split(".")
        kept = [
            part
            for place, part in enumerate(parts)
            if part != "module" or ".".join(parts[:place]) not in holders
        ]
        return ".".join(kept)

    return bare


def _without_segments(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _WRAPPER_SEGMENTS)


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
