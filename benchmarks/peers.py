"""The peers: every way of stepping a workload that is compared, each on tensors of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks.builders import BUILDERS, STATES, Unavailable
from benchmarks.workloads import Workload

ALGORITHMS: Final = {"adam": "Adam", "adagrad": "Adagrad", "sgd": "SGD"}
"""What they are called."""

PEERS: Final = (
    *("recap_fast", "recap_fast, one optimizer", "reference", "torch for-loop", "torch foreach"),
    *("torch fused", "torch fused per group", "DeepSpeed", "ceiling"),
)
"""Those on a CPU."""

CLIPPING_PEERS: Final = ("recap_fast, clipping", "torch fused, clipping")
CLEARING_PEERS: Final = (
    *("recap_fast, clearing", "recap_fast, then zeros", "torch fused, then zeros"),
    *("recap_fast, then None", "torch fused, then None"),
)

GPU_PEERS: Final = (
    *("recap_fast, one optimizer", "recap_fast", "recap_fast, graph replay", "torch per group"),
    *("torch for-loop", "torch foreach", "torch fused", "torch fused per group"),
    *("torch fused, graph replay", "apex", "copy"),
)

SLOW_PEERS: Final = ("reference", "torch per group", "torch for-loop", "torch foreach")
"""Several times slower than the others on every workload: they sit out most rounds."""

DESCRIPTIONS: Final[Mapping[str, str]] = {
    "recap_fast": "`FusedCombinedOptimizer` over one keyed optimizer per group, as "
    "`recap_fast.build_optimizer` makes it",
    "recap_fast, one optimizer": "`recap_fast.optim.FusedAdam` (`FusedAdagrad`, `FusedSGD`) with "
    "param groups",
    "reference": "torch, an optimizer per group, each with torch's default implementation: "
    "`CombinedOptimizer` over `torch.optim` optimizers, as "
    "`recap_fast.reference.build_optimizer` makes it",
    "torch for-loop": "one `torch.optim` optimizer with param groups, `foreach=False, fused=False`",
    "torch foreach": "the same with `foreach=True`",
    "torch fused": "the same with `fused=True`",
    "torch fused per group": "one `torch.optim` optimizer per group, `fused=True`",
    "DeepSpeed": "`DeepSpeedCPUAdam` or `DeepSpeedCPUAdagrad` with param groups; the latter "
    "overwrites gradients, which are put back between steps",
    "ceiling": "a trivial C++ loop that reads and writes the same memory, `benchmarks/ceiling.cpp`",
    "recap_fast, clipping": "`recap_fast` with `clip_grad_norm`",
    "torch fused, clipping": "`torch.nn.utils.clip_grad_norm_`, then `torch fused`",
    "recap_fast, clearing": "`recap_fast` with `clear_grads=True`",
    "recap_fast, then zeros": "`recap_fast`, then its `zero_grad(set_to_none=False)`",
    "torch fused, then zeros": "`torch fused`, then its `zero_grad(set_to_none=False)`",
    "recap_fast, then None": "`recap_fast`, then its `zero_grad()`",
    "torch fused, then None": "`torch fused`, then its `zero_grad()`",
    "recap_fast, graph replay": "a CUDA graph of one step of `recap_fast, one optimizer` with "
    "`capturable=True`, replayed",
    "torch per group": "the reference: one default `torch.optim` optimizer per group",
    "torch fused, graph replay": "a CUDA graph of one step with `fused=True`, replayed",
    "apex": "`apex.optimizers.FusedAdam` (`FusedAdagrad`, `FusedSGD`) with param groups",
    "copy": "the ceiling: one copy on the device that moves as many bytes as the step",
}

# A second step over what these leave in `.grad` would be one of vanishing, then subnormal numbers.
_OVERWRITE_GRADIENTS: Final = (
    ("DeepSpeed", "adagrad"),
    *(
        (name, algorithm)
        for name in ("torch fused, clipping", *CLEARING_PEERS)
        for algorithm in ALGORITHMS
    ),
)

_NEED_TORCHREC: Final = (
    *("recap_fast", "recap_fast, clipping", "recap_fast, clearing"),
    *("recap_fast, then zeros", "recap_fast, then None"),
    "reference",
)


@dataclass
class Peer:
    """One optimizer over tensors of its own, all of which have gradients and state.

    Attributes:
        step: takes one step.
        param_groups: those whose `lr` a scheduler would set; empty for the ceiling.
        params: every parameter.
        original_grads: the gradients of `params` if a step overwrites them, else empty.
    """

    step: Callable[[], Any]
    param_groups: list[dict[str, Any]]
    params: list[nn.Parameter]
    original_grads: list[Tensor] = field(default_factory=list)

    def set_learning_rates(self) -> None:
        """What a scheduler does between steps: another float object in each group."""
        for group in self.param_groups:
            group["lr"] = group["lr"] * 1.0

    def restore_gradients(self) -> None:
        """Puts back the values that a step has overwritten, and what it has dropped."""
        if self.original_grads:
            for param, grad in zip(self.params, self.original_grads, strict=True):
                if param.grad is None:
                    param.grad = torch.empty_like(grad)
            torch._foreach_copy_([param.grad for param in self.params], self.original_grads)

    def renew_gradients(self) -> None:
        """What `zero_grad` and a backward pass do: another tensor object for each gradient."""
        self.restore_gradients()
        for param in self.params:
            assert param.grad is not None
            param.grad = param.grad.detach()


Values = list[list[tuple[Tensor, Tensor]]]
"""A parameter and its gradient for each tensor of each group; each peer starts from copies."""


def bytes_per_step(workload: Workload, algorithm: str) -> int:
    """What a step must move: read parameter, gradient and states; write all but the gradient."""
    streams = 3 + 2 * STATES[algorithm]
    return 4 * streams * workload.elements


def working_set(workload: Workload, algorithm: str) -> int:
    """Bytes of parameters, gradients and states."""
    return 4 * (2 + STATES[algorithm]) * workload.elements


def initial_values(workload: Workload, device: torch.device | str = "cpu") -> Values:
    """Normally distributed, the same at each call; gradients of size 0.01."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...], scale: float) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(scale).to(device)

    return [[(draw(shape, 1.0), draw(shape, 0.01)) for shape in group] for group in workload.groups]


def build(name: str, initial: Values, algorithm: str) -> Peer:
    """Makes a peer on copies of `initial`, before its first step.

    Raises:
        Unavailable: it cannot run here.
    """
    groups = [[nn.Parameter(param.clone()) for param, _ in group] for group in initial]
    params = [param for group in groups for param in group]
    grads = [grad for group in initial for _, grad in group]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    step, param_groups = BUILDERS[name](groups, algorithm)
    overwrites = (name, algorithm) in _OVERWRITE_GRADIENTS
    return Peer(step, param_groups, params, grads if overwrites else [])


def build_and_step(name: str, initial: Values, algorithm: str) -> Peer:
    """As `build`, and takes two steps, which make states and plans.

    Raises:
        Unavailable: it cannot run here; for a peer other than ours, a refused step counts too.
    """
    try:
        peer = build(name, initial, algorithm)
        peer.step()
        peer.restore_gradients()
        peer.step()
    except ImportError as error:
        if name not in _NEED_TORCHREC:
            raise
        reason = str(error).strip().split("\n")[0]
        raise Unavailable(f"needs torchrec and pydantic ({reason})") from error
    except RuntimeError as error:
        if name.startswith("recap_fast"):
            raise
        raise Unavailable(str(error).strip().split("\n")[0]) from error
    return peer
