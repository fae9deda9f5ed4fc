"""Row-wise Adagrad's updates by counter and with CowClip, written out in float64 for one row.

`table` is a `ReferenceTable` that has counted the update already, but has the pass of the one
before. The greatest counter is always 1, as on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch


def update_by_counter(table: Any, row: int, gradient: torch.Tensor, rate: float) -> None:
    section, options = table.section, table.section.counter
    mode, decay = options.counter_weight_decay_mode, section.weight_decay
    denominator = _denominator(table, row, gradient, decay if mode == "l2" else 0.0)
    count = float(table.row_counter[row])
    step, kept = rate / denominator, 1.0
    if table.passes > options.adjustment_iter:
        if options.learning_rate_mode == "counter_sgd" and count > options.tail_id_threshold:
            step = rate / ((options.adjustment_ub * count) ** 0.5 + section.eps)
        strength = decay * options.counter_halflife / count
        if mode == "l2":
            kept = 1 - strength * rate / denominator
        if mode == "decouple":
            kept = 1 - strength * rate
        if mode == "adagradw":
            if options.counter_halflife == -1:
                step = rate * count**0.5 / denominator
            if options.counter_halflife == -2:
                step = min(rate * count, options.adjustment_ub) / denominator
            since = table.passes - max(options.adjustment_iter, 0)
            gap = min(table.gap(row), since)
            kept = (1 - decay * rate) ** gap
            step *= (1 - decay * rate) ** (gap - 1)
    table.weight[row] = kept * table.weight[row] - step * gradient


def update_cowclip(table: Any, row: int, gradient: torch.Tensor, rate: float) -> None:
    section, options = table.section, table.section.cowclip
    mode, decay = options.counter_weight_decay_mode, section.weight_decay
    weight, l2 = table.weight[row], decay if mode == "l2" else 0.0
    denominator = _denominator(table, row, gradient, l2)
    greatest = float(table.row_counter[row]) * max(
        options.weight_norm_coefficient * float(weight.norm()), options.lower_bound
    )
    step = min(1.0, greatest / float((gradient + l2 * weight).norm())) * rate / denominator
    kept = 1 - decay * {"none": 0.0, "l2": step, "decouple": rate}[mode]
    table.weight[row] = kept * weight - step * gradient


def _denominator(table: Any, row: int, gradient: torch.Tensor, l2: float) -> float:
    table.sum[row] += ((gradient + l2 * table.weight[row]) ** 2).mean()
    return float(table.sum[row].sqrt()) + table.section.eps
