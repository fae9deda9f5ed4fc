"""Random trainings, ours beside torch's: see `tests.optim.fuzz_round`."""

from __future__ import annotations

import pytest

from tests.optim.fuzz_round import Round

pytestmark = pytest.mark.cpu_engine  # what is drawn is for the CPU

CHUNK = 250


def _run(first: int) -> None:
    for seed in range(first, first + CHUNK):
        Round(seed).run()


@pytest.mark.parametrize("first", range(0, 2_000, CHUNK))
def test_every_operation_does_what_it_does_to_torchs(first: int) -> None:
    _run(first)


@pytest.mark.long
@pytest.mark.parametrize("first", range(2_000, 52_000, CHUNK))
def test_every_operation_does_what_it_does_to_torchs_at_length(first: int) -> None:
    _run(first)
