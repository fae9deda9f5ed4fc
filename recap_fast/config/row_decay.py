"""What FBGEMM's row-wise Adagrad can make of how often a row is looked up, and when it was last.

Names, values and defaults are those of `fbgemm_gpu/tbe/config/optimizer_config.py`; formulas are
those of `fbgemm_gpu/codegen/genscript/optimizers.py`. A field that would have no effect beside the
others is an error. FBGEMM's `grad_sum_decay` is left out: no kernel reads it.

A pass is a forward pass of the table's kernel, and its counter is `row_counter` of the row, after
this update. A row is updated, and counted, once in a pass, however often it is in the batch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from recap_fast.config.base import (
    BaseConfig,
    Flag,
    NonNegative,
    NumSteps,
    Positive,
    Share,
    Step,
    Whole,
)


class EmbeddingCounterConfig(BaseConfig):
    """Decay and learning rate that depend on how often a row was updated.

    Attributes:
        counter_weight_decay_mode: `none`; `l2` and `decouple`, for which the decay is multiplied by
            `counter_halflife` / counter, so that rare rows decay more; or `adagradw`, which
            decays a row once for every pass since its last update, and its step for all but one of
            them.
        counter_halflife: After how many passes half of a counter is forgotten; 0 makes every
            counter 1, -1 forgets nothing. With `adagradw`, -1 multiplies the step by
            sqrt(counter); -2 is the same counter, but makes the rate the lesser of learning rate *
            counter and `adjustment_ub`.
        adjustment_iter: Up to this pass, there are neither decay nor adjusted rates, and
            `adagradw` does not make up for it; -1 or 0: they are there from the start.
        adjustment_ub: Depends on the others: see `learning_rate_mode` and `counter_halflife`.
        learning_rate_mode: What happens to the rate of rows whose counter is greater than
            `tail_id_threshold`: nothing (`equal`); a factor (max_counter / (counter + 1)) **
            adjustment_ub, within 1 and 10 (`tail_id_lr_increase`); the inverse, within 0.1 and 1
            (`tail_id_lr_decrease`); or the sum of squares of their denominator becomes
            adjustment_ub * counter (`counter_sgd`).
        tail_id_threshold: A counter, or a share of max_counter.
        tail_id_threshold_is_ratio: Whether it is a share.
        max_counter_update_freq: Every how many passes max_counter becomes the greatest counter of
            all tables that share the kernel, plus 1; it is 1 before.
    """

    counter_weight_decay_mode: Literal["none", "l2", "decouple", "adagradw"] = "none"
    counter_halflife: Annotated[Whole, Field(ge=-2)] = -1
    adjustment_iter: Annotated[Whole, Field(ge=-1)] = -1
    adjustment_ub: Positive = 1.0
    learning_rate_mode: Literal[
        "equal", "tail_id_lr_increase", "tail_id_lr_decrease", "counter_sgd"
    ] = "equal"
    tail_id_threshold: NonNegative = 0.0
    tail_id_threshold_is_ratio: Flag = False
    max_counter_update_freq: NumSteps = 1000

    @model_validator(mode="after")
    def _check_effects(self) -> EmbeddingCounterConfig:
        mode, halflife = self.counter_weight_decay_mode, self.counter_halflife
        if mode in ("l2", "decouple") and halflife < 1:
            raise ValueError(
                f"counter_weight_decay_mode {mode} needs a counter_halflife of at least 1; found "
                f"{halflife}, with which rows would grow or not decay"
            )
        if mode != "adagradw" and halflife == -2:
            raise ValueError("counter_halflife -2 needs the counter_weight_decay_mode adagradw")
        own_rate = mode == "adagradw" and halflife < 0
        adjusts = self.learning_rate_mode != "equal"
        if own_rate and adjusts:
            raise ValueError(
                f"learning_rate_mode {self.learning_rate_mode} has no effect with the "
                f"counter_weight_decay_mode adagradw and counter_halflife {halflife}"
            )
        self._refuse_without(
            adjusts, "a learning_rate_mode", "tail_id_threshold", "tail_id_threshold_is_ratio"
        )
        self._refuse_without(
            adjusts or (own_rate and halflife == -2),
            "a learning_rate_mode or counter_halflife -2",
            "adjustment_ub",
        )
        self._refuse_without(
            adjusts or mode != "none",
            "a learning_rate_mode or a counter_weight_decay_mode",
            "counter_halflife",
            "adjustment_iter",
        )
        self._refuse_without(
            self.reads_max_counter,
            "a learning_rate_mode tail_id_lr_increase or tail_id_lr_decrease, or "
            "tail_id_threshold_is_ratio",
            "max_counter_update_freq",
        )
        return self

    @property
    def reads_max_counter(self) -> bool:
        """Whether updates depend on the greatest counter of the kernel."""
        return self.tail_id_threshold_is_ratio or self.learning_rate_mode.startswith("tail_id")

    def _refuse_without(self, has_effect: bool, what: str, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not has_effect and value != type(self).model_fields[name].default:
                raise ValueError(f"{name} is {value}, which has no effect without {what}")


class EmbeddingCowclipConfig(BaseConfig):
    """CowClip: the gradient of a row is clipped to a norm that grows with the norm of the row.

    The greatest norm is counter * max(weight_norm_coefficient * norm of the row, lower_bound).

    Attributes:
        counter_weight_decay_mode: `none`, `l2` or `decouple`; `l2` adds the decay to the gradient
            before its norm is taken.
        counter_halflife: After how many passes half of a counter is forgotten; 0 makes every
            counter 1, -1 forgets nothing.
        weight_norm_coefficient: The greatest norm, as a multiple of the norm of the row.
        lower_bound: The least of the greatest norms. It or `weight_norm_coefficient` is above 0, or
            no gradient would move a row.
    """

    counter_weight_decay_mode: Literal["none", "l2", "decouple"] = "none"
    counter_halflife: Annotated[Whole, Field(ge=-1)] = -1
    weight_norm_coefficient: NonNegative = 0.0
    lower_bound: NonNegative = 0.0

    @model_validator(mode="after")
    def _check_bounds(self) -> EmbeddingCowclipConfig:
        if self.weight_norm_coefficient == self.lower_bound == 0:
            raise ValueError(
                "weight_norm_coefficient and lower_bound are both 0, which clips every gradient to "
                "0: set one of them"
            )
        return self


class EmbeddingGlobalDecayConfig(BaseConfig):
    """Decoupled decay of all rows, of which those of a batch catch up on what they missed.

    In a forward pass of training, a row is multiplied by (1 - learning rate * weight_decay) ** (the
    number of passes since the last one that updated it, less one), and the update then decays it
    once more. Rows that were never updated do not decay.

    Attributes:
        start_iter: The first forward pass, counted from 1, that catches up; before it, the mode is
            `decouple`.
        lower_bound: The least factor of what a row catches up on, 0 to 1.
    """

    start_iter: Step = 0
    lower_bound: Share = 0.0
