"""FusedSparseAdam."""

from __future__ import annotations

from torch import Tensor, optim
from torch.optim.optimizer import ParamsT

from recap_fast.optim.native_step import FusedOptimizer


class FusedSparseAdam(FusedOptimizer, optim.SparseAdam):
    """`torch.optim.SparseAdam`, stepped over all param groups in one native call.

    Arguments, param groups and state (``step``, ``exp_avg``, ``exp_avg_sq``) are those of
    `torch.optim.SparseAdam`, and checkpoints load in both directions; ``step`` is a tensor, where
    torch's is an int. Parameters: contiguous float32, float64, bfloat16 or float16 tensors on the
    CPU, whose gradients are sparse in the first dimension, coalesced or not, as
    `torch.nn.Embedding` and `torch.nn.EmbeddingBag` with ``sparse=True`` make them. What several
    lookups add to a row is summed in the type of the update, float32 for 16-bit parameters.

    `FusedAdam` takes such gradients too, with the same result, and dense ones besides.

    Args:
        params: parameters, named parameters or param groups.
        lr: learning rate, a float or a one-element tensor.
        betas: decay of the averages of the gradient and of its square, each in [0, 1).
        eps: added to the root of ``exp_avg_sq``, before the bias correction.
        maximize: ascend instead of descend.
        clip_grad_norm: clip gradients by their global norm, see `FusedOptimizer`; None does not.
        step_supports_amp_scaling, unscale_grads, clear_grads: as in `FusedAdam`; torch's class does
            not have them.

    Raises:
        ValueError: an argument is out of range, or a parameter is sparse or complex.
    """

    algorithm = "sparse_adam"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
        *,
        clip_grad_norm: float | None = None,
        step_supports_amp_scaling: bool | None = None,
        unscale_grads: bool = True,
        clear_grads: bool = False,
    ) -> None:
        self._take_options(
            None,
            None,
            False,
            False,
            clip_grad_norm,
            step_supports_amp_scaling,
            unscale_grads,
            clear_grads,
        )
        super().__init__(params, lr, betas, eps, maximize)
