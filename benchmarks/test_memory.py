"""Whether peak memory is that of the call."""

from __future__ import annotations

import pytest
import torch

from benchmarks.memory import peak_of

_ELEMENTS = 10_000_000  # 40 MB


def _zeros_after_more(more: int) -> torch.Tensor:
    torch.ones(more)
    return torch.ones(_ELEMENTS)


def test_the_peak_counts_what_was_given_back() -> None:
    kept, plain = peak_of(_zeros_after_more, 0)
    if plain is None:
        pytest.skip("this system does not tell")
    assert kept.numel() == _ELEMENTS
    assert plain == pytest.approx(40, abs=4)
    _, higher = peak_of(_zeros_after_more, 3 * _ELEMENTS)
    assert higher == pytest.approx(120, abs=4)
