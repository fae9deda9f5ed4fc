"""A small regression for the recipes that bring no model of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BATCH_SIZE = 8


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))


def make_data(batches: int) -> tuple[Tensor, Tensor]:
    """Features and labels, the first batches the same however many there are."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(BATCH_SIZE, 7, generator=generator) for _ in range(batches)]
    both = torch.cat(rows)
    return both[:, :6], both[:, 6:]


def make_batches(first: int, last: int) -> list[tuple[Tensor, Tensor]]:
    """Those of the steps from `first` up to, without, `last`."""
    features, labels = make_data(last)
    pairs = zip(features.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True)
    return list(pairs)[first:]


def make_loader(batches: int) -> DataLoader:
    return DataLoader(TensorDataset(*make_data(batches)), BATCH_SIZE)


class RecordingLoss(nn.MSELoss):
    """Mean squared error that keeps what it returned, as `losses`."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def forward(self, predictions: Tensor, labels: Tensor) -> Tensor:
        loss = super().forward(predictions, labels)
        self.losses.append(loss.item())
        return loss


def params_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}
