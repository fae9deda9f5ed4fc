"""What formats of states and parameters cost in accuracy: `python -m benchmarks.format_accuracy`.

The better part of an hour on 2 cores, some minutes with `--steps 250`. Writes
`benchmarks/results/formats/`, and from it the figures and the picture of `docs/formats.md`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.table import table
from examples.movielens import data
from examples.movielens.data import TASKS
from examples.movielens.train import Builder, train
from recap_fast import build_optimizer
from recap_fast.optim import FusedAdam
from recap_fast.state.codes import FEWEST, NEVER_NEGATIVE, decoded, scale_name

ROOT: Final = Path(__file__).parent.parent
RESULTS: Final = ROOT / "benchmarks" / "results" / "formats"
PAGE: Final = ROOT / "docs" / "formats.md"
PICTURE: Final = ROOT / "docs" / "format-accuracy.png"
BEGIN: Final = "<!-- made by benchmarks/format_accuracy.py from "
END: Final = "<!-- end of what is made -->"

STATES: Final = ("float32", "bfloat16", "float16", "8bit")
"""What `state_dtype` is in turn; the first is what the others are compared with."""

_STATE_DTYPES: Final[Mapping[str, Any]] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "8bit": "8bit",
}
_ONCE: Final = "float16"  # trained with the first seed only: it does not learn

_BETA2: Final = 0.999
_BLOCKS: Final = (128, 256)
_SIGMAS: Final = (0.5, 1.5)


# --- training -------------------------------------------------------------------------------------


def _builder(state_dtype: str) -> Builder:
    def build(model: nn.Module, dense: Any, embeddings: Any) -> Any:
        algorithm, section = dense.algorithm
        chosen = section.model_copy(update={"state_dtype": state_dtype})
        return build_optimizer(model, dense.model_copy(update={algorithm: chosen}), embeddings)

    return build


def movielens(dataset: data.Dataset, steps: int, seeds: int, **sizes: Any) -> dict[str, Any]:
    """AUC of each task of the MovieLens example, on its test split, by format and seed.

    Args:
        dataset: what to train and test on.
        steps, seeds: of each format.
        sizes: arguments of `train`.
    """
    aucs: dict[str, list[dict[str, float]]] = {state: [] for state in STATES}
    coded = 0.0
    for seed in range(seeds):
        states = [each for each in STATES if seed == 0 or each != _ONCE]
        builders = {each: _builder(each) for each in states}
        runs = train(dataset, builders, steps=steps, seed=seed, **sizes)
        for state, run in runs.items():
            aucs[state].append(run.auc)
        params = [p for g in runs["8bit"].optimizer.param_groups for p in g["params"]]
        own = [param.numel() for param in params if isinstance(param, Tensor)]
        coded = sum(size for size in own if size >= FEWEST) / sum(own)
    return {"steps": steps, "auc": aucs, "share_with_codes": coded}


# --- averages and small steps ---------------------------------------------------------------------


def second_moment(steps: int, elements: int = 8192) -> dict[str, float]:
    """How far the mean of a second moment is from float64, by format, as a share of it.

    Gradients are standard normal numbers, and the decay is 0.999. "bfloat16, to nearest" is
    torch.optim.Adam over bfloat16 tensors.
    """
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.zeros(elements, dtype=torch.bfloat16))
    ours = {
        state: FusedAdam([("w", nn.Parameter(torch.zeros(elements)))], lr=0.0, state_dtype=dtype)
        for state, dtype in _STATE_DTYPES.items()
    }
    nearest = torch.optim.Adam([param], lr=0.0)
    exact = torch.zeros(elements, dtype=torch.float64)
    for _ in range(steps):
        grad = torch.randn(elements, generator=generator)
        exact.lerp_(grad.double().square(), 1 - _BETA2)
        param.grad = grad.bfloat16()
        nearest.step()
        for optimizer in ours.values():
            optimizer.param_groups[0]["params"][0].grad = grad
            optimizer.step()
    found = {"bfloat16, to nearest": nearest.state[param]["exp_avg_sq"]}
    for state, optimizer in ours.items():
        (entries,) = optimizer.state.values()
        found[state] = _values("exp_avg_sq", entries)
    mean = exact.mean().item()
    return {name: each.double().mean().item() / mean - 1 for name, each in found.items()}


def _values(name: str, entries: Mapping[str, Tensor]) -> Tensor:
    value = entries[name]
    return decoded(name, value, entries[scale_name(name)]) if value.dtype == torch.uint8 else value


def small_steps(steps: int = 100) -> dict[str, float]:
    """Where a weight of 1.0 is after steps of Adam, gradient 0.01 and rate 1e-4, in the mean."""
    count = 4096

    def run(make: Callable[[nn.Parameter], Any], dtype: torch.dtype) -> float:
        param = nn.Parameter(torch.ones(count, dtype=dtype))
        optimizer = make(param)
        for _ in range(steps):
            param.grad = torch.full_like(param, 0.01)
            optimizer.step()
        value = param.detach().float()
        if (rest := optimizer.state[param].get("param_remainder")) is not None:
            value = (value.view(torch.int32) + rest.int()).view(torch.float32)
        return value.double().mean().item()

    short = torch.bfloat16
    return {
        "float32": run(lambda p: torch.optim.Adam([p], lr=1e-4), torch.float32),
        "bfloat16, torch.optim.Adam": run(lambda p: torch.optim.Adam([p], lr=1e-4), short),
        "bfloat16, master_weights": run(
            lambda p: FusedAdam([p], lr=1e-4, master_weights=True), short
        ),
        "bfloat16, stochastic_rounding": run(
            lambda p: FusedAdam([p], lr=1e-4, stochastic_rounding=True), short
        ),
    }


# --- maps of 8 bits -------------------------------------------------------------------------------


def _minifloats(name: str) -> Tensor:
    codes = torch.arange(256 if name in NEVER_NEGATIVE else 128, dtype=torch.uint8)
    values = decoded(name, codes, torch.ones(2))
    return values / values[-1]


def _dynamic(is_signed: bool) -> Tensor:
    """The positive half of the dynamic map of Dettmers et al. (arXiv:2110.02861), as published.

    A unary exponent of base 10, and what is left of the bits linear between its powers.
    """
    values = [0.0]
    for exponent in range(7):
        count = 2**exponent if is_signed else 2 ** (exponent + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        values += ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (exponent - 6)).tolist()
    return torch.tensor(sorted([*values, 1.0]), dtype=torch.float32)


_MAPS: Final[Mapping[str, Callable[[bool], Tensor]]] = {
    "ours": lambda is_signed: _minifloats("exp_avg" if is_signed else "exp_avg_sq"),
    "dynamic": _dynamic,
    "linear": lambda is_signed: torch.linspace(0, 1, 128 if is_signed else 256),
}


def _stored(values: Tensor, sizes: Tensor, keeps: bool, generator: torch.Generator) -> Tensor:
    """Blocks, rounded stochastically to a map; `keeps`: what is not zero does not become zero."""
    scales = values.abs().amax(1, keepdim=True).clamp_(min=1e-30)
    shares = values.abs() / scales
    above = torch.bucketize(shares, sizes, right=True).clamp_(1, len(sizes) - 1)
    low, high = sizes[above - 1], sizes[above]
    part = (shares - low) / (high - low)
    is_up = torch.rand(shares.shape, generator=generator) < part
    if keeps:
        is_up |= (above == 1) & (shares > 0)
    return torch.where(is_up, high, low) * scales * values.sign()


def update_error(name: str, block: int, sigma: float, steps: int) -> float:
    """How far updates of Adam are from exact ones: the root of the mean square, over theirs.

    Both moments are kept in a map, rounded stochastically, for some steps; the error is that of the
    last 100.

    Args:
        name: of a map.
        block: elements with a scale.
        sigma: of the logarithm of the gradients' scales within a block.
        steps: of training.
    """
    generator = torch.Generator().manual_seed(1)
    shape = (8192 // block, block)
    scale = (sigma * torch.randn(shape, generator=generator)).exp()
    mean = 0.1 * scale * torch.randn(shape, generator=generator)
    exact, kept = ([torch.zeros(shape), torch.zeros(shape)] for _ in range(2))
    of_map = [_MAPS[name](True), _MAPS[name](False)]
    errors = sizes = 0.0
    for step in range(steps):
        grad = mean + scale * torch.randn(shape, generator=generator)
        for moments in (exact, kept):
            moments[0] = moments[0].lerp(grad, 0.1)
            moments[1] = moments[1].lerp(grad.square(), 1 - _BETA2)
        if step >= steps - 100:
            true, found = (m / (v.sqrt() + 1e-12) for m, v in (exact, kept))
            errors += (found - true).square().mean().item()
            sizes += true.square().mean().item()
        kept = [
            _stored(each, values, place == 1, generator)
            for place, (each, values) in enumerate(zip(kept, of_map, strict=True))
        ]
    return math.sqrt(errors / sizes)


# --- results and what shows them ------------------------------------------------------------------


def measure(dataset: data.Dataset, steps: int, seeds: int, scale: float = 1.0) -> dict[str, Any]:
    """Everything; `scale` shortens all but the training."""
    return {
        "machine": machine.describe(),
        "movielens": movielens(dataset, steps, seeds),
        "second_moment": second_moment(int(20_000 * scale)),
        "small_steps": small_steps(),
        "maps": [
            [name, block, sigma, update_error(name, block, sigma, int(2000 * scale))]
            for name in _MAPS
            for block in _BLOCKS
            for sigma in _SIGMAS
        ],
    }


def _differences(results: Mapping[str, Any], state: str, task: str) -> list[float]:
    aucs = results["movielens"]["auc"]
    pairs = zip(aucs[state], aucs[STATES[0]], strict=False)  # one was trained once
    return [own[task] - other[task] for own, other in pairs]


def render(results: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    training = results["movielens"]
    aucs = training["auc"]
    rows = []
    for state in STATES:
        row = [f"`{state}`"]
        for task in TASKS:
            values = [each[task] for each in aucs[state]]
            text = f"{sum(values) / len(values):.4f}"
            if state != STATES[0]:
                text += f" ({', '.join(f'{d:+.4f}' for d in _differences(results, state, task))})"
            row.append(text)
        rows.append(row)
    of_maps = {(n, b, s): error for n, b, s, error in results["maps"]}
    maps = [
        [name, *(f"{of_maps[name, b, s]:.3f}" for s in _SIGMAS for b in _BLOCKS)] for name in _MAPS
    ]
    parts = [
        f"**Training.** The MovieLens example, {training['steps']:,} steps with each of "
        f"{len(aucs[STATES[0]])} seeds, dense parameters by Adam in float32, of which "
        f"{100 * training['share_with_codes']:.0f} % are in tensors large enough for codes: AUC on "
        "the test split, and its difference from float32 states with the same seed.\n",
        table(["`state_dtype`", *TASKS], rows),
        "**A slow average.** The mean of `exp_avg_sq` at `beta2 = 0.999` after 20,000 steps, "
        "against float64.\n",
        table(
            ["stored as", "off by"],
            [[name, f"{100 * each:+.2f} %"] for name, each in results["second_moment"].items()],
        ),
        "**A small step.** Weights of 1.0 after 100 steps of Adam with gradient 0.01 and rate "
        "1e-4, in the mean.\n",
        table(
            ["parameter", "is then"],
            [[name, f"{each:.5f}"] for name, each in results["small_steps"].items()],
        ),
        "**Maps of 8 bits.** The error of an update of Adam, as a share of it, with both moments "
        "in a map and rounded stochastically. Within a block, the scale of gradients is "
        "log-normal.\n",
        table(
            ["map", *(f"sigma {s}, blocks of {b}" for s in _SIGMAS for b in _BLOCKS)],
            maps,
        ),
    ]  # fmt: skip
    return "\n".join(parts)


def page_with(page: str, results: Mapping[str, Any], source: str) -> str:
    """The page with its figures taken from results."""
    begin, end = page.index(BEGIN), page.index(END)
    return f"{page[:begin]}{BEGIN}{source} -->\n\n{render(results)}\n{page[end:]}"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Differences of AUC from float32 states: a panel for each task, a dot for each seed."""
    from benchmarks.pictures import load_pyplot

    plot = load_pyplot()
    figure, panels = plot.subplots(1, len(TASKS), figsize=(9, 2.6), sharey=True)
    for panel, task in zip(panels, TASKS, strict=True):
        for place, state in enumerate(STATES[1:]):
            values = _differences(results, state, task)
            panel.plot([place] * len(values), values, "o", color="#ee4c2c", alpha=0.7)
        panel.axhline(0, color="#7f8794", linewidth=1)
        panel.set_xticks(range(len(STATES) - 1), STATES[1:])
        panel.set_xlim(-0.5, len(STATES) - 1.5)
        panel.set_title(task)
        panel.set_ylim(-0.005, 0.005)
    panels[0].set_ylabel("AUC, less that of\nfloat32 states")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="of each training")
    parser.add_argument("--seeds", type=int, default=3, help="trainings in each format")
    arguments = parser.parse_args()
    results = measure(data.load(), arguments.steps, arguments.seeds)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{machine.name(results['machine'])}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    source = str(path.relative_to(ROOT))
    PAGE.write_text(page_with(PAGE.read_text(), results, source))
    draw(results, PICTURE)


if __name__ == "__main__":
    main()
