from __future__ import annotations

from itertools import islice

import torch

from examples.movielens import data
from examples.movielens.model import build_model, optimizer_configs
from recap_fast.config import LearningRate

SMALL = {
    "embedding_dim": 4,
    "num_blocks": 2,
    "block_features": 8,
    "backbone_features": 8,
    "tower_features": (8, 4),
}


def test_logits_have_a_column_per_task_and_every_parameter_matters() -> None:
    dataset = data.synthetic(300, seed=0)
    model = build_model(0, table_sizes=dataset.table_sizes, **SMALL)
    logits = model(next(dataset.batches(16, seed=0)))
    assert logits.shape == (16, len(data.TASKS)) and logits.dtype == torch.float32
    torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.ones(16, 3)).backward()
    without_gradient = {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    }
    assert without_gradient == set()


def test_a_tower_sees_only_its_own_parameters() -> None:
    dataset = data.synthetic(300, seed=0)
    model = build_model(0, table_sizes=dataset.table_sizes, **SMALL)
    model(next(dataset.batches(16, seed=0)))[:, 1].sum().backward()
    touched = {name for name, p in model.towers.named_parameters() if p.grad.any()}
    assert touched
    assert all(name.startswith("recap__engagement__is_loved.") for name in touched)


def test_logits_do_not_depend_on_the_rest_of_the_batch() -> None:
    dataset = data.synthetic(300, seed=0)
    model = build_model(0, table_sizes=dataset.table_sizes, **SMALL)
    whole = next(dataset.test_batches(20))
    alone = [model(rating) for rating in islice(dataset.test_batches(1), 20)]
    # Rounding of the matrix products only: a sum's order depends on the batch's size.
    torch.testing.assert_close(torch.cat(alone), model(whole), rtol=0, atol=1e-6)


def test_equal_seeds_give_equal_weights_and_leave_the_random_state() -> None:
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    first, again, other = (build_model(seed, **SMALL).state_dict() for seed in (7, 7, 8))
    assert torch.equal(torch.rand(3), expected)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "embeddings.embedding_bags.user.weight"
    assert not torch.equal(first[name], other[name])


def test_task_names_are_in_the_parameter_names() -> None:
    names = [name for name, _ in build_model(0, **SMALL).named_parameters()]
    for task in data.TASKS:
        assert "." in task
        of_task = [name for name in names if f".{task.replace('.', '__')}." in name]
        assert len(of_task) == 4  # three weights and a bias


def test_schedules_are_valid_for_any_number_of_steps_and_of_all_kinds() -> None:
    for steps in [*range(1, 60), 1000, 12345]:
        dense, embeddings = optimizer_configs(steps)
        rates = dense.multi_task_learning_rates
        assert list(rates.tower_learning_rates) == list(data.TASKS)
        schedules = [
            *rates.tower_learning_rates.values(),
            rates.backbone_learning_rate,
            embeddings.learning_rate,
        ]
        kinds = {kind for schedule in schedules for kind in schedule.model_fields_set}
        assert kinds == set(LearningRate.model_fields)
