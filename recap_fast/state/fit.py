"""Whether the saved state of a parameter fits the optimizer that it is to be loaded into."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple


class Misfits(NamedTuple):
    """The entries of a parameter's state that do not fit, in the order in which they are there.

    Attributes:
        missing: those that the optimizer has and the saved state lacks.
        unexpected: those that only the saved state has.
        changed: those that both have, but otherwise.
    """

    missing: list[str]
    unexpected: list[str]
    changed: list[str]


def misfits(
    saved: Mapping[str, Any], own: Mapping[str, Any], optional: Collection[str] = ()
) -> Misfits:
    """Compares the saved state of a parameter with the optimizer's.

    Args:
        saved: what is compared of each entry, such as its shape; None fits whatever there is.
        own: the same of the optimizer's, or of those that it will have.
        optional: entries that either may have without the other.
    """
    return Misfits(
        missing=[key for key in own if key not in saved and key not in optional],
        unexpected=[key for key in saved if key not in own and key not in optional],
        changed=[
            key
            for key, value in saved.items()
            if key in own and key not in optional and value is not None and value != own[key]
        ],
    )
