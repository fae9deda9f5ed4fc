"""recap_fast against the reference on the demo's model: groups, rates, checkpoints, parameters."""

from __future__ import annotations

import copy

import pytest
import torch

import recap_fast
from examples.movielens import data
from examples.movielens.model import build_model, optimizer_configs
from recap_fast import reference
from recap_fast.embeddings import fuse_embeddings

STEPS = 80
BATCH_SIZE = 64


class Training:
    """One model with its optimizer, trained on the batches that it is given."""

    def __init__(self, build, dataset):
        dense, embeddings = optimizer_configs(STEPS)
        sizes = {"embedding_dim": 8, "num_blocks": 2, "block_features": 32}
        model = build_model(
            0,
            table_sizes=dataset.table_sizes,
            backbone_features=64,
            tower_features=(32, 16),
            **sizes,
        )
        self.model = fuse_embeddings(model, embeddings)
        self.optimizer, self.scheduler = build(self.model, dense, embeddings)

    def backward(self, batch):
        self.optimizer.zero_grad()
        logits = self.model(batch)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        loss.backward()

    def step(self):
        self.optimizer.step()
        self.scheduler.step()

    def train(self, batches):
        for batch in batches:
            self.backward(batch)
            self.step()

    def rates(self):
        return [group["lr"] for group in self.optimizer.param_groups]

    def dense_params(self):
        return {
            name: param
            for _, part in self.optimizer.dense_optimizers()
            for name, param in part.params.items()
        }

    def checkpoint(self):
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
            }
        )

    def load(self, checkpoint):
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scheduler.load_state_dict(checkpoint["scheduler"])


@pytest.fixture(autouse=True)
def one_thread():
    """The model is too small for more, which would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dataset():
    return data.synthetic(rows=2000, seed=0)


@pytest.fixture(scope="module")
def batches(dataset):
    stream = dataset.batches(BATCH_SIZE, seed=0)
    return [next(stream) for _ in range(STEPS)]


def norm_of_difference(first, second):
    """The distance of two models' parameters, as a fraction of their length."""
    a, b = (
        torch.cat([param.detach().double().flatten() for param in model.parameters()])
        for model in (first, second)
    )
    return float((a - b).norm() / b.norm())


def test_groups_rates_and_state_agree_at_every_step(dataset, batches):
    fast = Training(recap_fast.build_optimizer, dataset)
    slow = Training(reference.build_optimizer, dataset)
    assert list(fast.dense_params()) == list(slow.dense_params())
    assert fast.scheduler.group_names == slow.scheduler.group_names
    for batch in batches:
        assert fast.rates() == slow.rates()
        for training in (fast, slow):
            training.train([batch])
    ours, theirs = fast.optimizer.state_dict()["state"], slow.optimizer.state_dict()["state"]
    assert list(ours) == list(theirs)
    for name, state in theirs.items():
        assert list(ours[name]) == list(state), name
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                assert ours[name][key].shape == value.shape, (name, key)
                assert ours[name][key].dtype == value.dtype, (name, key)
    # Each model follows gradients of its own, so rounding differences feed back.
    assert norm_of_difference(fast.model, slow.model) < 1e-6


def test_equal_gradients_keep_every_parameter_within_one_in_a_million(dataset, batches):
    """The optimizers alone: both are given the gradients of the reference's training."""
    fast = Training(recap_fast.build_optimizer, dataset)
    slow = Training(reference.build_optimizer, dataset)
    for batch in batches:
        slow.backward(batch)
        for name, param in fast.dense_params().items():
            param.grad = slow.dense_params()[name].grad.clone()
        fast.step()
        slow.step()
    for name, param in fast.dense_params().items():
        expected = slow.dense_params()[name].detach()
        difference = float((param.detach() - expected).abs().max() / expected.abs().max())
        assert difference < 1e-6, name


@pytest.mark.parametrize("half_way", ["fast", "reference"])
def test_resuming_from_the_other_ones_checkpoint_changes_nothing(dataset, batches, half_way):
    builders = {"fast": recap_fast.build_optimizer, "reference": reference.build_optimizer}
    first = builders.pop(half_way)
    (second,) = builders.values()
    half = STEPS // 2
    begun = Training(first, dataset)
    begun.train(batches[:half])
    checkpoint = begun.checkpoint()

    undisturbed = Training(second, dataset)
    undisturbed.load(checkpoint)  # a fresh optimizer of the other kind
    resumed = Training(first, dataset)
    resumed.load(checkpoint)
    for training in (begun, resumed, undisturbed):
        assert training.scheduler.last_epoch == half
        training.train(batches[half:])

    # Its own checkpoint: the same bits. The other's: as far as rounding takes it.
    for name, param in begun.model.named_parameters():
        assert torch.equal(param, dict(resumed.model.named_parameters())[name]), name
    assert undisturbed.rates() == begun.rates()
    assert norm_of_difference(undisturbed.model, begun.model) < 1e-6
