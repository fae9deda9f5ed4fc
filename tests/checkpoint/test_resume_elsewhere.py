"""A training that was saved goes on as if nothing had happened, be it on other processes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.checkpoint.resume_cases import (
    BUILDERS,
    ELSEWHERE,
    LONG,
    LONG_REFUSED,
    LONG_SAME,
    REFUSED,
    SAME,
    Resumed,
)
from tests.checkpoint.resuming import STEPS, be_refused, load_and_train, on_all, train_and_save
from tests.checkpoint.snapshots import Snapshot, assemble_moments
from tests.distributed.test_equivalence import TOLERANCE
from tests.support.small_training import largest_difference

LAYOUTS = {
    (1, "fused"): "with whole rows",
    (1, "unfused"): "with whole rows",
    (2, "row_wise"): "with whole rows",
    (2, "column_wise"): "in 2 shards of columns 0 to 7, 8 to 15",
    (4, "column_wise"): "in 4 shards of columns 0 to 3, 4 to 7, 8 to 11, 12 to 15",
}


class Result(NamedTuple):
    """Moments of a training that was not disturbed, and of one that went on."""

    start: Snapshot
    saved: Snapshot
    end: Snapshot
    loaded: Snapshot
    resumed_end: Snapshot


class Refusal(NamedTuple):
    """What each process said, and the moments before and after."""

    messages: tuple[str, ...]
    before: Snapshot
    after: Snapshot


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train_all(
    cases: list[Resumed], refused: list[Resumed], directory: Path, backend: str
) -> tuple[dict[Resumed, Result], dict[Resumed, Refusal]]:
    setups = list(dict.fromkeys(case.first for case in [*cases, *refused]))
    folders = {setup: str(directory / str(setup)) for setup in setups}
    saved = on_all([(train_and_save, setup, folders[setup]) for setup in setups], backend)
    undisturbed = dict(zip(setups, map(assemble_moments, saved), strict=True))
    found = on_all(
        [(load_and_train, case.then, folders[case.first], case.steps_before) for case in cases]
        + [(be_refused, case.then, folders[case.first]) for case in refused],
        backend,
    )
    results = {
        case: Result(*undisturbed[case.first], *assemble_moments(ranks))
        for case, ranks in zip(cases, found[: len(cases)], strict=True)
    }
    refusals = {}
    for case, ranks in zip(refused, found[len(cases) :], strict=True):
        messages, moments = zip(*ranks, strict=True)
        refusals[case] = Refusal(messages, *assemble_moments(list(moments)))
    return results, refusals


@pytest.fixture(scope="module")
def found(tmp_path_factory, table_backend):
    """Of all that two processes can do: one case after the other, since processes start slowly."""
    cases, folder = [*SAME, *ELSEWHERE, *BUILDERS], tmp_path_factory.mktemp("saved")
    return train_all(cases, REFUSED, folder, table_backend)


@pytest.fixture(scope="module")
def long_found(tmp_path_factory, table_backend):
    return train_all(
        [*LONG_SAME, *LONG], LONG_REFUSED, tmp_path_factory.mktemp("saved_long"), table_backend
    )


def assert_equal(ours: Snapshot, expected: Snapshot) -> None:
    assert ours.values.keys() == expected.values.keys()
    for name, value in expected.values.items():
        assert torch.equal(ours.values[name], value), name
    assert ours.rates == expected.rates
    assert ours.step_counts == expected.step_counts


def check_resumed_elsewhere(result: Result) -> None:
    assert_equal(result.loaded, result.saved)
    ours, expected = result.resumed_end, result.end
    assert ours.rates == expected.rates
    assert ours.step_counts == expected.step_counts
    before = {name: result.start.values.get(name, 0.0) for name in expected.values}
    difference, name = largest_difference(ours.values, expected.values, before)
    assert difference < TOLERANCE, name


def check_refused(case: Resumed, refusal: Refusal) -> None:
    """By the name of the first table, for what it is and is to be."""
    for message in refusal.messages:
        assert "'sum' of 'embeddings.embedding_bags.user.weight'" in message
        said = message.partition("It was written ")[2].partition("; resume with")[0]
        layouts = [LAYOUTS[each.world_size, each.sharding] for each in (case.first, case.then)]
        assert said.split(", and here the table is ") == layouts
        assert message.endswith("Nothing was changed")
    assert_equal(refusal.after, refusal.before)


def check_same(result: Result, backend: str) -> None:
    """On the CPU; sums of a GPU may come in another order each time."""
    check_resumed_elsewhere(result)
    if backend == "gloo":
        assert_equal(result.resumed_end, result.end)


@pytest.mark.parametrize("case", SAME, ids=str)
def test_on_as_many_processes_every_bit_is_the_same(case: Resumed, found, table_backend) -> None:
    check_same(found[0][case], table_backend)


@pytest.mark.long
@pytest.mark.parametrize("case", LONG_SAME, ids=str)
def test_every_bit_is_the_same_of_all(case: Resumed, long_found, table_backend) -> None:
    check_same(long_found[0][case], table_backend)


@pytest.mark.parametrize("case", ELSEWHERE, ids=str)
def test_other_processes_and_shards_go_on(case: Resumed, found) -> None:
    check_resumed_elsewhere(found[0][case])


@pytest.mark.parametrize("case", BUILDERS, ids=str)
def test_the_reference_goes_on_where_the_native_step_was_and_back(case: Resumed, found) -> None:
    check_resumed_elsewhere(found[0][case])


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_sums_of_column_shards_are_for_the_same_shards_only(case: Resumed, found) -> None:
    check_refused(case, found[1][case])


@pytest.mark.long
@pytest.mark.parametrize("case", LONG, ids=str)
def test_many_processes_go_on_and_are_gone_on_from(case: Resumed, long_found) -> None:
    check_resumed_elsewhere(long_found[0][case])


@pytest.mark.long
@pytest.mark.parametrize("case", LONG_REFUSED, ids=str)
def test_sums_of_two_column_shards_are_not_for_four(case: Resumed, long_found) -> None:
    check_refused(case, long_found[1][case])


def test_what_is_compared_is_there_and_changes(found) -> None:
    """Or the tests above would pass with nothing trained."""
    for result in found[0].values():
        start, saved, end = result.start, result.saved, result.end
        assert all(count == STEPS for count in end.step_counts.values())
        assert saved.rates != start.rates and saved.rates != end.rates
        for name, value in end.values.items():
            assert not torch.equal(value, saved.values[name]), name
