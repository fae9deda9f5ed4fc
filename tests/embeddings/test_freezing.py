"""Tables that are frozen and thawed in mid-training."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from recap_fast import build_optimizer
from recap_fast.config import EmbeddingOptimizerConfig
from recap_fast.embeddings import fuse_embeddings
from tests.support.live_tables import (
    ALGORITHMS,
    Towers,
    assert_same,
    batch,
    fused,
    loss_of,
    state_of,
    weight,
    weights,
)
from tests.support.tables import config_of

DENSE = {"sgd": {"lr": 0.1}}


class Training:
    """A fused model that is trained step by step, with known gradients."""

    def __init__(self, config: EmbeddingOptimizerConfig, model: nn.Module | None = None) -> None:
        self.model = fused(config) if model is None else model
        self.optimizer, self.scheduler = build_optimizer(self.model, DENSE, config)
        self.steps = 0

    def step(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        output = self.model(batch(self.steps))
        factors = torch.randn(output.shape, generator=torch.Generator().manual_seed(self.steps))
        (output * factors).sum().backward()
        self.optimizer.step()
        self.scheduler.step()
        self.steps += 1
        return output.detach()

    def of(self, *tables: str) -> dict[str, torch.Tensor]:
        """Weights and state of some tables."""
        everything = weights(self.model) | state_of(self.model)
        return {
            name: value
            for name, value in everything.items()
            if any(f".{table}." in name or name == table for table in tables)
        }


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("frozen", [["a"], ["b"], ["a", "b"], ["c"], ["a", "b", "c"]], ids="".join)
def test_frozen_tables_stand_still_and_others_do_not_notice(
    algorithm: str, frozen: list[str]
) -> None:
    config = config_of(**ALGORITHMS[algorithm])
    training, unfrozen = Training(config), Training(config)
    for each in (training, unfrozen):
        each.step()
    for table in frozen:
        weight(training.model, table).requires_grad_(False)
    still = training.of(*frozen)
    others = [table for table in "abc" if table not in frozen]
    for _ in range(3):
        shown = copy.deepcopy(unfrozen.model)
        with torch.no_grad():
            for table in frozen:
                weight(shown, table).copy_(weight(training.model, table))
        bias = training.model.bias.detach() - shown.bias.detach()
        outputs, _ = training.step(), unfrozen.step()
        if algorithm != "ema":  # which moves averages in the forward pass
            torch.testing.assert_close(outputs, shown(batch(training.steps - 1)) + bias)
        assert_same(training.of(*frozen), still)
    assert_same(training.of(*others), unfrozen.of(*others))
    for table in frozen:
        weight(training.model, table).requires_grad_(True)
    training.step()
    assert all(not weight(training.model, table).equal(still[table]) for table in frozen)


@pytest.mark.parametrize("algorithm", ["sgd", "adagrad", "rowwise_adagrad", "counter"])
def test_a_thawed_collection_goes_on_as_if_it_had_never_been_frozen(algorithm: str) -> None:
    """In between, nothing was counted either, neither in training nor in evaluation."""
    config = config_of(**ALGORITHMS[algorithm])
    training, unfrozen = Training(config), Training(config)
    training.step()
    training.model.ebc.requires_grad_(False)
    assert not training.model(batch(0)).grad_fn.next_functions[0][0]  # the bias alone
    for _ in range(2):
        training.step()
    with torch.no_grad():
        training.model(batch(0))
    training.model.ebc.requires_grad_(True)
    training.steps = 1
    for each in (training, unfrozen):
        while each.steps < 4:
            each.step()
    assert_same(training.of("a", "b", "c"), unfrozen.of("a", "b", "c"))
    counts = [
        [kernel.iter.item() for kernel in each.model.ebc._kernels] for each in (training, unfrozen)
    ]
    assert counts[0] == counts[1]


def test_a_table_that_is_frozen_before_the_backward_pass_stands_still() -> None:
    """As a parameter of torch's, which then accumulates no gradient."""
    config = config_of(adagrad={})
    model, expected = Training(config).model, Training(config).model
    loss = loss_of(model, batch(0), 0)
    weight(model, "a").requires_grad_(False)
    still = weights(model)["a"]
    loss.backward()
    loss_of(expected, batch(0), 0).backward()
    assert_same(weights(model), {**weights(expected), "a": still})


def test_a_table_that_is_thawed_after_the_forward_pass_stands_still() -> None:
    config = config_of(adagrad={})
    model = Training(config).model
    weight(model, "b").requires_grad_(False)
    loss = loss_of(model, batch(0), 0)
    weight(model, "b").requires_grad_(True)
    still = weights(model)["b"]
    loss.backward()
    assert weight(model, "b").equal(still)


def test_tables_that_are_frozen_when_they_are_fused() -> None:
    config = config_of(adagrad={})
    model = Towers()
    weight(model, "a").requires_grad_(False)
    training = Training(config, fuse_embeddings(model, config))
    assert not weight(training.model, "a").requires_grad
    still = training.of("a")
    training.step()
    assert_same(training.of("a"), still)
    weight(training.model, "a").requires_grad_(True)
    training.step()
    assert not weight(training.model, "a").equal(still["a"])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_rate_of_zero(algorithm: str) -> None:
    """Weights stand still from the next backward pass on; state goes on."""
    training = Training(config_of(**ALGORITHMS[algorithm]))
    training.step()
    for group in training.optimizer.param_groups[1:]:
        group["lr"] = 0.0
    still = weights(training.model)
    training.step()
    if algorithm == "ema":  # of which the second half is an average
        halves = {name: value.shape[1] // 2 for name, value in still.items()}
        for name, value in weights(training.model).items():
            assert value[:, : halves[name]].equal(still[name][:, : halves[name]])
    else:
        assert_same(weights(training.model), still)


@pytest.mark.parametrize(
    ("frozen", "late"), list(itertools.product([[], ["a"], ["a", "b", "c"]], [False, True]))
)
def test_weights_of_a_weighted_collection_get_their_gradients(
    frozen: list[str], late: bool
) -> None:
    """Whether tables are frozen, before the forward pass or after it, or none is."""
    config = config_of(adagrad={})
    model, plain = fused(config, is_weighted=True), Towers(is_weighted=True)
    build_optimizer(model, DENSE, config)
    found = []
    for each in (plain, model):
        features = batch(1, is_weighted=True, learns_weights=True)
        if late:
            loss = loss_of(each, features, 0)
        for table in frozen:
            weight(each, table).requires_grad_(False)
        if not late:
            loss = loss_of(each, features, 0)
        loss.backward()
        found.append(features.weights().grad)
    torch.testing.assert_close(*found)


def test_features_of_different_batch_sizes() -> None:
    """FBGEMM updates them as ever; what would take another lookup is refused."""
    config = config_of(rowwise_adagrad={})
    model = Training(config).model
    (kernel,) = model.ebc._kernels
    sizes = [[2], [1], [1], [1]]
    ids, bags = torch.tensor([1, 2, 3, 4, 5]), torch.arange(6)
    still = weights(model)

    def look_up() -> torch.Tensor:
        return kernel(ids, bags, batch_size_per_feature_per_rank=sizes)

    look_up().sum().backward()
    assert all(not value.equal(still[name]) for name, value in weights(model).items())
    output = look_up()
    weight(model, "a").requires_grad_(False)
    still = weights(model)
    with pytest.raises(RuntimeError, match="does not work with batches of different sizes"):
        output.sum().backward()
    with pytest.raises(RuntimeError, match="only 'a' are frozen, which does not work with batches"):
        look_up()
    assert_same(weights(model), still)
    model.ebc.requires_grad_(False)
    assert not look_up().requires_grad
