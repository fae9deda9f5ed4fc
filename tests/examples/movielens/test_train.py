from __future__ import annotations

from functools import partial

import pytest
import torch

from examples.movielens import data
from examples.movielens.model import build_model, optimizer_configs
from examples.movielens.report import parameter_difference
from examples.movielens.train import EMBEDDINGS, evaluate, train
from recap_fast import reference
from recap_fast.schedules.compute import compute_lr

make_small_model = partial(
    build_model,
    embedding_dim=8,
    num_blocks=2,
    block_features=16,
    backbone_features=16,
    tower_features=(16, 8),
)


@pytest.fixture(scope="module")
def dataset() -> data.Dataset:
    return data.synthetic(1500, seed=0)


def train_small(dataset: data.Dataset, builders: dict, **options):
    settings = {"steps": 10, "batch_size": 64, "seed": 3, "make_model": make_small_model}
    return train(dataset, builders, **{**settings, **options})


def test_equal_builders_give_equal_runs_bit_for_bit(dataset: data.Dataset) -> None:
    runs = train_small(
        dataset, {"a": reference.build_optimizer, "b": reference.build_optimizer}, steps=21
    )
    (alone,) = train_small(dataset, {"a": reference.build_optimizer}, steps=21).values()
    for other in (runs["b"], alone):
        assert parameter_difference(runs["a"].model, other.model).absolute == 0.0
        assert runs["a"].losses == other.losses
        assert runs["a"].auc == other.auc
    states = [run.model.state_dict() for run in (runs["a"], runs["b"])]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_seed_changes_the_run(dataset: data.Dataset) -> None:
    (first,) = train_small(dataset, {"a": reference.build_optimizer}, seed=1).values()
    (other,) = train_small(dataset, {"a": reference.build_optimizer}, seed=2).values()
    assert parameter_difference(first.model, other.model).relative > 1e-3


def test_every_step_is_recorded_with_the_rates_that_it_used(dataset: data.Dataset) -> None:
    steps = 13
    (run,) = train_small(dataset, {"a": reference.build_optimizer}, steps=steps).values()
    dense, embeddings = optimizer_configs(steps)
    rates = dense.multi_task_learning_rates
    schedules = {
        **rates.tower_learning_rates,
        "backbone": rates.backbone_learning_rate,
        EMBEDDINGS: embeddings.learning_rate,
    }
    assert run.learning_rates == {
        name: [compute_lr(schedule, step) for step in range(steps)]
        for name, schedule in schedules.items()
    }
    assert len(run.step_seconds) == steps and min(run.step_seconds) > 0.0
    assert {task: len(losses) for task, losses in run.losses.items()} == dict.fromkeys(
        data.TASKS, steps
    )


def test_first_loss_is_that_of_the_untrained_model(dataset: data.Dataset) -> None:
    (run,) = train_small(dataset, {"a": reference.build_optimizer}, steps=1).values()
    model = make_small_model(3, table_sizes=dataset.table_sizes)
    batch = next(dataset.batches(64, seed=3))
    probability = torch.sigmoid(model(batch).double())
    likelihood = torch.where(batch.labels == 1, probability, 1 - probability)
    expected = -likelihood.log().mean(dim=0)
    assert [losses[0] for losses in run.losses.values()] == pytest.approx(expected.tolist(), 1e-5)


def test_training_learns_and_moves_every_group(dataset: data.Dataset) -> None:
    (run,) = train_small(dataset, {"a": reference.build_optimizer}, steps=250).values()
    untrained = make_small_model(3, table_sizes=dataset.table_sizes)
    moved = {
        name.split(".")[0]
        for (name, before), after in zip(
            untrained.named_parameters(), run.model.parameters(), strict=True
        )
        if not torch.equal(before, after)
    }
    assert moved == {"embeddings", "embedding_norm", "backbone", "towers"}
    for task, losses in run.losses.items():
        assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
        assert run.auc[task] > 0.6


def test_auc_is_the_share_of_pairs_in_the_right_order(dataset: data.Dataset) -> None:
    model = make_small_model(0, table_sizes=dataset.table_sizes)
    (batch,) = dataset.test_batches(dataset.num_test)
    logits = model.eval()(batch).detach()
    for column, (task, auc) in enumerate(evaluate(model, dataset, batch_size=50).items()):
        positive = logits[batch.labels[:, column] == 1, column]
        negative = logits[batch.labels[:, column] == 0, column]
        right = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative)
        assert auc == pytest.approx(right.mean().item(), abs=1e-4), task


def test_first_runner_alternates(dataset: data.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def recording(name: str):
        def build(*arguments):
            optimizer, scheduler = reference.build_optimizer(*arguments)
            step = optimizer.step

            def recorded(*args, **kwargs):
                order.append(name)
                return step(*args, **kwargs)

            optimizer.step = recorded
            return optimizer, scheduler

        return build

    train_small(dataset, {"a": recording("a"), "b": recording("b")}, steps=4)
    assert "".join(order) == "abbaabba"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be within"),
        ({"batch_size": 10_000}, "batch_size=10000 must be within"),
    ],
)
def test_refuses_impossible_settings(dataset: data.Dataset, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_small(dataset, {"a": reference.build_optimizer}, **options)
