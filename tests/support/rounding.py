"""What the rounding of one step may amount to, against the same step of torch in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_EPS = torch.finfo(torch.float32).eps


def _lost_by_cancelling(size: Tensor, sum_of_squares: Tensor) -> Tensor:
    """By how much a root of `sum_of_squares` is less exact than its terms, of that `size`."""
    return torch.where(sum_of_squares > 0, size / sum_of_squares, 1.0).clamp_min(1.0)


def magnitudes(
    algorithm: str, group: dict[str, Any], before: dict[str, Tensor], after: dict[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """The sizes of the terms that a step adds up: those of each state entry, and of the update.

    `before` and `after` are float64: parameter, gradient and state. A rounding error is relative to
    these sizes, not to sums in which terms of opposite sign cancel.
    """
    l2 = 0.0 if decays_apart(algorithm, group) else group["weight_decay"]
    lr = float(group["lr"])
    grad = before["grad"].abs()
    if l2 != 0:  # of an infinite parameter, 0 would make NaN
        grad = grad + l2 * before["param"].abs()
    if algorithm in ("adam", "adamw"):
        beta1, beta2 = group["betas"]
        step = after["step"].item()
        mean = beta1 * before["exp_avg"].abs() + (1 - beta1) * grad
        square = beta2 * before["exp_avg_sq"] + (1 - beta2) * grad**2
        largest = after["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        root = (largest / (1 - beta2**step)).sqrt() + group["eps"]
        sizes = {"exp_avg": mean, "exp_avg_sq": square}
        if group["amsgrad"]:
            sizes["max_exp_avg_sq"] = torch.maximum(square, before["max_exp_avg_sq"])
        lost = _lost_by_cancelling(square, largest)
        return sizes, lr / (1 - beta1**step) * mean / root * lost
    if algorithm == "adagrad":
        rate = lr / (1 + (after["step"].item() - 1) * group["lr_decay"])
        size = before["sum"] + grad**2
        lost = _lost_by_cancelling(size, after["sum"])
        return {"sum": size}, rate * grad / (after["sum"].sqrt() + group["eps"]) * lost
    if algorithm == "lion":
        beta1, beta2 = group["betas"]
        old, now = before["exp_avg"], before["grad"]
        now = -now if group["maximize"] else now
        size = old.abs() + now.abs()
        unsure = (old.lerp(now, 1 - beta1)).abs() <= 16 * _EPS * size  # of which sign it is
        sizes = {"exp_avg": beta2 * old.abs() + (1 - beta2) * now.abs()}
        return sizes, torch.where(unsure, 2 * lr / _EPS, lr)
    if algorithm == "rmsprop":
        alpha = group["alpha"]
        square = alpha * before["square_avg"] + (1 - alpha) * grad**2
        sizes, variance = {"square_avg": square}, after["square_avg"]
        if group["centered"]:
            sizes["grad_avg"] = alpha * before["grad_avg"].abs() + (1 - alpha) * grad
            variance = variance - after["grad_avg"] ** 2
        update = grad / (variance.clamp_min(0).sqrt() + group["eps"])
        update = update * _lost_by_cancelling(square, variance).clamp_max(2.0)
        if group["centered"]:
            # A difference: within its error it is of any sign, and torch's root of it may be NaN.
            error = ROUNDINGS * _EPS * square
            least = (variance - error).clamp_min(0).sqrt() + group["eps"]
            greatest = (variance + error).sqrt() + group["eps"]
            update = update + (grad / least - grad / greatest) / (ROUNDINGS * _EPS)
            update = torch.where(variance > error, update, math.inf)
        if group["momentum"] > 0:
            update = group["momentum"] * before["momentum_buffer"].abs() + update
            sizes["momentum_buffer"] = update
        return sizes, torch.where(update.isinf(), math.inf, lr * update)
    if group["momentum"] == 0:
        return {}, lr * grad
    old = before.get("momentum_buffer")
    buffer = grad if old is None else group["momentum"] * old.abs() + grad
    update = grad + group["momentum"] * buffer if group["nesterov"] else buffer
    return {"momentum_buffer": buffer}, lr * update


def decays_apart(algorithm: str, group: dict[str, Any]) -> bool:
    """Whether the parameter itself decays, which rounds it once more."""
    decoupled = algorithm == "lion" or bool(group.get("decoupled_weight_decay"))
    return decoupled and group["weight_decay"] != 0


# Operations that round on the way to one result, their operands' roundings included. The longest
# way is Adam's: scaled gradient, two averages, root, correction, sum, quotient, product.
ROUNDINGS = 12


def assert_rounded(
    name: str, actual: Tensor, truth: Tensor, size: Tensor, param: Tensor | float
) -> None:
    """`actual` is `truth`, rounded to its dtype, plus rounding errors of the arithmetic.

    Args:
        size: how large the terms are that were added up to it; infinite where nothing can be said.
        param: the terms that are rounded once more (a parameter that decays), or 0.
    """
    stored = torch.finfo(actual.dtype)
    is_double = actual.dtype == torch.float64
    arithmetic = torch.finfo(torch.float64 if is_double else torch.float32)
    # In float64 the truth has been rounded too.
    unit = truth.abs().clamp_min_(stored.smallest_normal).mul_(stored.eps)
    tolerance = unit.mul_(1.0 if is_double else 0.5).add_(size, alpha=arithmetic.eps * ROUNDINGS)
    tolerance.add_(arithmetic.eps * param)
    error = torch.sub(actual, truth).abs_()
    within = (error <= tolerance) | size.isinf()
    if not within.all():
        infinite = actual == truth.to(actual.dtype)  # beyond the largest float16
        within = within | infinite | (actual.isnan() & truth.isnan())
    assert bool(within.all()), (
        f"{name} ({actual.dtype}): error {error.max():.3e}, tolerance {tolerance.min():.3e} and up"
    )


def double(tensor: Tensor) -> Tensor:
    """A copy in float64."""
    return tensor.detach().to(torch.float64, copy=True)
