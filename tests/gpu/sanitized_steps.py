"""Steps for compute-sanitizer to watch: `python -m tests.gpu.sanitized_steps`.

Every update and dtype, sizes and alignments around those that the kernels treat apart, values from
the host and from the device, with a scale, a rebuilt plan and a second stream.
"""

from __future__ import annotations

import torch
from torch import nn

from recap_fast.optim.stepper import Stepper
from tests.support.optimizers import DTYPES, FUSED, UPDATES, laid_out, numbers

SIZES = [0, 1, 7, 255, 1025, 4096, 4099, 9001]


def _run(capturable: bool) -> None:
    optimizers = []
    params = []
    for number, (algorithm, options) in enumerate(UPDATES.values()):
        own = []
        for dtype in DTYPES:
            for index, size in enumerate(SIZES[number % 3 :: 3]):
                layout = "misaligned" if (index + number) % 3 == 0 else "contiguous"
                param = nn.Parameter(laid_out(numbers((size,), index, dtype, "cuda"), layout))
                param.grad = numbers((size,), index + 1, dtype, "cuda")
                own.append(param)
        extra = {"capturable": True} if capturable else {}
        optimizers.append(FUSED[algorithm](own, lr=0.1, **options, **extra))
        params += own
    stepper = Stepper(optimizers)
    for _ in range(2):
        stepper.step(None, None)
    if capturable:
        one, zero = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
        stepper.step(one, zero)
        stepper.step(one, one)
    params[0].grad = None
    stepper.step(None, None)
    late = nn.Parameter(numbers((33,), 0, torch.float32, "cuda"))
    late.grad = numbers((33,), 1, torch.float32, "cuda")
    optimizers[0].add_param_group({"params": [late]})
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        stepper.step(None, None)
    torch.cuda.synchronize()


if __name__ == "__main__":
    for capturable in (False, True):
        _run(capturable)
    print("all steps taken")
