"""Seconds of an image and of its gradient on a GPU, step by step and all steps at once.

    python benchmarks/walltime.py              # needs a GPU; elsewhere rounds are what counts (parallel.py)

Every figure is the median over `--repeats` runs after a first one, in which the matrices of a plan are made (.3 s for
100 steps, once a plan), with the device idle before and after. Networks are in float32 as PyTorch runs it by default
(TF32 convolutions). *error* is the relative difference of the images from those made step by step, or of the gradient
from the exact one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from _common import environment, relative_errors, table, write_json, write_text
from torch import Tensor

from pushforward import Diffusion, Exact, Implicit, Parallel, load
from pushforward.execute import run
from pushforward.maps.spec import SamplerSpec, parse
from pushforward.plan import Plan

MODELS = ("fashion-vp", "fashion-langevin", "emoji")


def median(work: Callable[[], Tensor], repeats: int) -> tuple[float, Tensor]:
    """Seconds, and the last result."""
    found, seconds = work(), []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        found = work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), found


def made(name: str, steps: int, eta: float = 0.0) -> tuple[Diffusion, Plan, Parallel]:
    """DDIM with a model, and our way to take its steps at once."""
    model = load(name, device="cuda")
    plan = SamplerSpec("ddim", steps, {"eta": eta}).plan(model)
    method = parse("ddim:parallel=preconditioned").method(plan)
    assert isinstance(method, Parallel)
    return Diffusion(model, plan), plan, method


def image(name: str, steps: int, count: int, eta: float, repeats: int) -> dict[str, Any]:
    """Sampling."""
    sampler, _, method = made(name, steps, eta)
    sampler = sampler.given(torch.arange(count) % len(sampler.model.classes) if sampler.model.classes else None)
    together, rounds = sampler.run_by(parallel=method), [0]
    one, exact = median(lambda: sampler.sample(count), repeats)
    together.sample(count, callback=lambda step: rounds.append(step.done))
    other, found = median(lambda: together.sample(count), repeats)
    return {
        "model": name, "steps": steps, "eta": eta, "images": count, "step by step (s)": one, "at once (s)": other,
        "ratio": other / one, "rounds": max(rounds), "error": float(relative_errors(found, exact).max()),
    }  # fmt: skip


def gradient(steps: int, count: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Image and gradient in its code: what a step of a Langevin chain costs."""
    sampler, plan, method = made("fashion-vp", steps)
    code, network = sampler.draw(count), sampler.model.given(None).denoiser
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "autograd, step by step": lambda z: run(plan, network, sampler.start(z)),
        "exact, step by step": lambda z: sampler.run_by(gradient=Exact()).decode(replace(code, start=z)),
        "implicit, at once": lambda z: sampler.run_by(parallel=method, gradient=Implicit(tolerance=1e-2)).decode(
            replace(code, start=z)
        ),
    }

    def slope(make: Callable[[Tensor], Tensor]) -> Tensor:
        start = code.start.clone().requires_grad_()
        return torch.autograd.grad(make(start).square().sum(), start)[0]

    first: tuple[float, Tensor] | None = None
    for way, make in ways.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds, found = median(partial(slope, make), repeats)
        first = first or (seconds, found)
        yield {
            "steps": steps, "images": count, "way": way, "seconds": seconds, "ratio": seconds / first[0],
            "error": float(relative_errors(found, first[1]).max()),
            "MiB": (torch.cuda.max_memory_allocated() - before) / 2**20,
        }  # fmt: skip


def main() -> None:
    """Measure, and write `results/walltime`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU here: wall times are measured on one alone.")
        return
    found: dict[str, list[dict[str, Any]]] = {"gradients": [], "images": []}
    for steps, count in ((50, 1), (50, 4), (50, 16), (100, 1)):
        found["gradients"] += gradient(steps, count, options.repeats)
    for name, (steps, count, eta) in product(MODELS, ((50, 1, 0.0), (100, 1, 0.0), (100, 1, 1.0), (100, 4, 0.0))):
        found["images"].append(image(name, steps, count, eta, options.repeats))
        print(found["images"][-1], flush=True)
    cells = {name: table(list(rows[0]), [list(row.values()) for row in rows]) for name, rows in found.items()}
    write_text(
        "walltime",
        f"# Seconds on a GPU\n\n{environment()['machine']}; medians of {options.repeats}, after a first run, in which "
        f"a plan's matrices are made.\n\n## Images, DDIM\n\n{cells['images']}\n\n"
        f"## Image and gradient, fashion-vp, DDIM\n\nThe ratio is to autograd.\n\n{cells['gradients']}",
    )
    write_json("walltime", {"repeats": options.repeats, **found})


if __name__ == "__main__":
    main()
