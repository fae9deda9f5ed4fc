"""Row-wise Adagrad of embedding tables, and the algorithms that FBGEMM builds on it."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from recap_fast.config.base import BaseConfig, NonNegative, NumSteps, Positive, Share, Step
from recap_fast.config.row_decay import (
    EmbeddingCounterConfig,
    EmbeddingCowclipConfig,
    EmbeddingGlobalDecayConfig,
)

_SECTIONS = ("counter", "cowclip", "decouple_global")


class _RowwiseAdagradConfig(BaseConfig):
    """What all row-wise Adagrads have: one accumulator per table row.

    It sums the mean of the squared gradients of the row.

    Attributes:
        eps: Added to the denominator.
        weight_decay: Strength of the decay; needs `weight_decay_mode`, else FBGEMM would ignore it.
        weight_decay_mode: `l2` adds the decay to the gradient, `decouple` to the update. Only rows
            that get a gradient decay.
        max_norm: After an update, rows with a greater Euclidean norm are scaled down to this one.
    """

    decay_modes: ClassVar[str] = "l2 or decouple"

    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.0
    weight_decay_mode: Literal["l2", "decouple"] | None = None
    max_norm: Positive | None = None

    @model_validator(mode="after")
    def _check_weight_decay(self) -> _RowwiseAdagradConfig:
        if self.weight_decay > 0 and self.weight_decay_mode is None:
            raise ValueError(f"weight_decay needs a weight_decay_mode: {self.decay_modes}")
        return self


_DecayMode = Literal["l2", "decouple", "counter", "cowclip", "decouple_global"]


class EmbeddingRowwiseAdagradConfig(_RowwiseAdagradConfig):
    """Adagrad with one accumulator per table row: the mean of the squared gradients of the row.

    Attributes:
        eps: Added to the denominator.
        weight_decay: Strength of the decay; needs `weight_decay_mode`, else FBGEMM would ignore it.
        weight_decay_mode: `l2` adds the decay to the gradient, `decouple` to the update; only rows
            that get a gradient decay. `counter`, `cowclip` and `decouple_global` are described in
            the section of that name, which they need; `weight_decay` is the strength there.
        max_norm: After an update, rows with a greater Euclidean norm are scaled down to this one;
            not with `counter` or `cowclip`.
        counter: Decay and learning rate by how often a row was updated.
        cowclip: Clipping of gradients by the norm of their row.
        decouple_global: Decay of all rows.
    """

    decay_modes: ClassVar[str] = "l2, decouple, counter, cowclip or decouple_global"

    weight_decay_mode: _DecayMode | None = None  # type: ignore[assignment]  # more than the others
    counter: EmbeddingCounterConfig | None = None
    cowclip: EmbeddingCowclipConfig | None = None
    decouple_global: EmbeddingGlobalDecayConfig | None = None

    @model_validator(mode="after")
    def _check_sections(self) -> EmbeddingRowwiseAdagradConfig:
        mode = self.weight_decay_mode
        for name in _SECTIONS:
            if mode == name and getattr(self, name) is None:
                raise ValueError(f"weight_decay_mode {name} needs the section {name}")
            if mode != name and getattr(self, name) is not None:
                raise ValueError(
                    f"the section {name} needs the weight_decay_mode {name}; found {mode}"
                )
        section = self.counter or self.cowclip
        if section is None:
            return self
        if self.max_norm is not None:
            raise ValueError(
                f"max_norm is {self.max_norm}, which FBGEMM ignores in the weight_decay_mode {mode}"
            )
        if self.weight_decay > 0 and section.counter_weight_decay_mode == "none":
            raise ValueError(
                f"weight_decay needs a counter_weight_decay_mode other than none in the section "
                f"{mode}"
            )
        return self


class EmbeddingEmaRowwiseAdagradConfig(_RowwiseAdagradConfig):
    """Row-wise Adagrad whose rows have a fast first half and a slow second half.

    Every `step_ema` forward passes, all of a table's second half moves towards the first:
    slow += step_ema_coef * (fast - slow). FBGEMM counts the passes of evaluation too, but moves
    nothing then.

    Attributes:
        step_ema: How many forward passes from one move to the next.
        step_start: The first forward pass, counted from 1, that may move.
        step_ema_coef: How much of the way to move, 0 to 1.
    """

    step_ema: NumSteps = 10
    step_start: Step = 0
    step_ema_coef: Share = 0.6


class EmbeddingEnsembleRowwiseAdagradConfig(_RowwiseAdagradConfig):
    """Row-wise Adagrad with an average of each table, with which the table is replaced at times.

    Attributes:
        step_ema: Every how many forward passes the average moves towards the table.
        step_swap: Every how many forward passes the table becomes the average.
        step_start: Up to this forward pass, the average becomes the table where it would move.
        step_ema_coef: How much of the average stays when it moves, 0 to 1.
        step_mode: `use_iter` keeps the average, `none` sets it to zero after each move.
    """

    step_ema: NumSteps = 10000
    step_swap: NumSteps = 10000
    step_start: Step = 0
    step_ema_coef: Share = 0.6
    step_mode: Literal["use_iter", "none"] = "use_iter"
