"""The one exception that the demo shows to its user as a plain message."""

from __future__ import annotations


class DemoError(RuntimeError):
    """The demo cannot go on; the message says why and what to do."""
