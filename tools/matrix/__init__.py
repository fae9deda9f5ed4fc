"""Builds and tests recap_fast on chosen releases, and writes `docs/compatibility.md`."""
