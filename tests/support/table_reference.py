"""FBGEMM's optimizers written out in float64, slowly, one row after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from recap_fast.config import EmbeddingOptimizerConfig
from tests.support.decay_reference import update_by_counter, update_cowclip


def table(
    name: str,
    *feature_names: str,
    dim: int = 8,
    rows: int = 6,
    pooling: PoolingType = PoolingType.SUM,
    data_type: DataType = DataType.FP32,
) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=name,
        num_embeddings=rows,
        embedding_dim=dim,
        feature_names=list(feature_names),
        pooling=pooling,
        data_type=data_type,
    )


def row_gradients(
    config: EmbeddingBagConfig,
    features: KeyedJaggedTensor,
    output_gradients: Sequence[torch.Tensor],
    clipping: float | None,
) -> dict[int, torch.Tensor]:
    """The gradient of every row of a table that is looked up, in float64.

    Args:
        config: the table.
        features: ids, and maybe weights.
        output_gradients: with respect to the pooled output of each of its features, (B, width).
        clipping: bound of each element of these.
    """
    gradients: dict[int, torch.Tensor] = {}
    for name, gradient in zip(config.feature_names, output_gradients, strict=True):
        jagged, gradient = features[name], gradient.double()
        if clipping is not None:
            gradient = gradient.clamp(-clipping, clipping)
        weights = jagged.weights_or_none()
        offsets = jagged.offsets().tolist()
        for example, (begin, end) in enumerate(pairwise(offsets)):
            for place in range(begin, end):
                row = int(jagged.values()[place])
                share = gradient[example].clone()
                if weights is not None:
                    share *= weights[place].double()
                if config.pooling == PoolingType.MEAN:
                    share /= end - begin
                gradients[row] = gradients.get(row, 0) + share
    return gradients


class ReferenceTable:
    """A table in float64, with its optimizer.

    Args:
        config: the table.
        weight: where it starts.
        optimizer: what holds for all tables.
    """

    def __init__(
        self,
        config: EmbeddingBagConfig,
        weight: torch.Tensor,
        optimizer: EmbeddingOptimizerConfig,
    ) -> None:
        self.config = config
        self.weight = weight.detach().double().clone()
        self.optimizer = optimizer.for_table(config.name)
        self.algorithm, self.section = self.optimizer.algorithm
        per_element = self.algorithm == "adagrad"
        self.sum = torch.zeros_like(self.weight if per_element else self.weight[:, 0])
        self.exp_avg = torch.zeros_like(self.weight)
        self.exp_avg_sq = torch.zeros_like(self.weight)
        self.passes = 0
        self.prev_iter = torch.zeros_like(self.weight[:, 0])
        self.row_counter = torch.zeros_like(self.weight[:, 0])
        self.max_gap = 0  # the most passes between two updates of a row

    def forward(self, training: bool = True) -> None:
        """What a forward pass does to the table."""
        self.passes += 1
        if self.algorithm != "ema_rowwise_adagrad" or not training:
            return
        section, half = self.section, self.weight.shape[1] // 2
        if self.passes % section.step_ema == 0 and self.passes >= section.step_start:
            fast, slow = self.weight[:, :half], self.weight[:, half:]
            slow += section.step_ema_coef * (fast - slow)
            self._round()

    def update(
        self,
        features: KeyedJaggedTensor,
        output_gradients: Sequence[torch.Tensor],
        rate: float,
    ) -> None:
        """What a backward pass does to the table and its state."""
        clipping = self.optimizer.gradient_clipping
        gradients = row_gradients(self.config, features, output_gradients, clipping)
        for row, gradient in gradients.items():
            getattr(self, f"_{self.algorithm}")(row, gradient, rate)
        self._round()

    def _sgd(self, row: int, gradient: torch.Tensor, rate: float) -> None:
        self.weight[row] -= rate * gradient

    def _adagrad(self, row: int, gradient: torch.Tensor, rate: float) -> None:
        self.sum[row] += gradient**2
        self.weight[row] -= rate * gradient / (self.sum[row].sqrt() + self.section.eps)

    def _rowwise_adagrad(self, row: int, gradient: torch.Tensor, rate: float) -> None:
        decay, mode = self.section.weight_decay, self.section.weight_decay_mode
        if mode in ("counter", "cowclip"):
            self._count(row, getattr(self.section, mode).counter_halflife)
            update_row = update_by_counter if mode == "counter" else update_cowclip
            update_row(self, row, gradient, rate)
            self.prev_iter[row] = self.passes
            return
        if mode == "l2":
            gradient = gradient + decay * self.weight[row]
        self.sum[row] += (gradient**2).mean()
        if mode == "decouple":
            self.weight[row] *= 1 - rate * decay
        self.weight[row] -= rate * gradient / (self.sum[row].sqrt() + self.section.eps)

    _ema_rowwise_adagrad = _rowwise_adagrad

    def _adam(self, row: int, gradient: torch.Tensor, rate: float) -> None:
        section = self.section
        self.exp_avg[row] += (1 - section.beta_1) * (gradient - self.exp_avg[row])
        self.exp_avg_sq[row] += (1 - section.beta_2) * (gradient**2 - self.exp_avg_sq[row])
        mean = self.exp_avg[row] / (1 - section.beta_1**self.passes)
        square = self.exp_avg_sq[row] / (1 - section.beta_2**self.passes)
        step = mean / (square.sqrt() + section.eps) + section.weight_decay * self.weight[row]
        self.weight[row] -= rate * step

    def _rowwise_rmsprop_ar(self, row: int, gradient: torch.Tensor, rate: float) -> None:
        section = self.section
        self.sum[row] *= section.ema_beta
        self.sum[row] += (1 - section.ema_beta) * (gradient**2).mean()
        kept = 1 - rate * section.ar_alpha * self.gap(row)
        self.weight[row] *= max(section.min_shrinkage, kept)
        self.weight[row] -= rate * gradient / (self.sum[row].sqrt() + section.eps)
        self.prev_iter[row] = self.passes

    def _count(self, row: int, halflife: int) -> None:
        gap = self.gap(row)
        self.max_gap = max(self.max_gap, gap)
        kept = {0: 0.0}.get(halflife, 1.0) if halflife <= 0 else 2 ** (-gap / halflife)
        self.row_counter[row] = 1 + kept * self.row_counter[row]

    def gap(self, row: int) -> int:
        """How many passes ago a row was updated, this one included; 1 if it never was."""
        last = int(self.prev_iter[row])
        return self.passes - last if last else 1

    def _round(self) -> None:
        if self.config.data_type == DataType.FP16:
            self.weight = self.weight.half().double()


def random_gradients(
    configs: Sequence[EmbeddingBagConfig], batch: int, seed: int
) -> dict[str, list[torch.Tensor]]:
    """A gradient for the pooled output of every feature of every table, by table."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return {
        config.name: [
            torch.randn(batch, config.embedding_dim, generator=generator)
            for _ in config.feature_names
        ]
        for config in configs
    }


def loss_with_gradients(
    pooled: KeyedTensor, gradients: Mapping[str, Sequence[torch.Tensor]]
) -> torch.Tensor:
    """A loss with these gradients, of pooled features in the order of their tables."""
    flat = torch.cat([gradient for of_table in gradients.values() for gradient in of_table], dim=1)
    return (pooled.values() * flat).sum()
