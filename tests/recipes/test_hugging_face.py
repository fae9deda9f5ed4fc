"""The recipe "Hugging Face Trainer"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="needs transformers: make test-all")
pytest.importorskip("accelerate", reason="needs accelerate: make test-all")

from transformers import TrainerCallback, TrainingArguments

from tests.recipes.comparing import HALF, STEPS, Training, compare
from tests.recipes.page import Recipe
from tests.recipes.regression import BATCH_SIZE, RecordingLoss, make_data, make_model, params_of

MAKE, TRAIN = range(2)  # the blocks


class _Regressor(nn.Module):
    """As the Trainer calls models: with named inputs, for a dict that has the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.loss_fn = make_model(), RecordingLoss()

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.loss_fn(self.layers(features), labels)}


class _StopAfter(TrainerCallback):
    def __init__(self, last: int) -> None:
        self.last = last

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.last


def _dataset() -> list[dict[str, torch.Tensor]]:
    pairs = zip(*make_data(STEPS), strict=True)
    return [{"features": features, "labels": label} for features, label in pairs]


def test_hugging_face_trainer(tmp_path: Path) -> None:
    recipe = Recipe("Hugging Face Trainer")

    def train(side: str, first: int, last: int, load: Path | None, save: Path | None) -> Training:
        model = _Regressor()
        arguments = TrainingArguments(
            str(save or tmp_path / "unused"),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=1e-2,
            weight_decay=0.1,
            bf16=True,
            max_grad_norm=0.1,
            save_steps=HALF,
            use_cpu=not torch.cuda.is_available(),
        )
        names = {"model": model, "arguments": arguments, "dataset": _dataset()}
        recipe.run(MAKE, side, names)
        names["trainer"].add_callback(_StopAfter(last))
        checkpoint = load and str(load / f"checkpoint-{first}")
        recipe.run(TRAIN, side, names | {"checkpoint": checkpoint})
        return Training(model.loss_fn.losses, params_of(model))

    # The model runs in bfloat16; see the test of Lightning.
    compare(train, tmp_path, rtol=1e-3, atol=1e-4)
