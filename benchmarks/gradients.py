r"""Ways to differentiate a decoding: their memory, their agreement, and how well codes are found by them.

    python benchmarks/gradients.py --data fashion.npz                    # made by examples/zoo_data.py
    python benchmarks/gradients.py --data fashion.npz --part memory --steps 10 100

- *memory*: the most resident memory that one gradient of one image adds to a process that has the model loaded and has
  decoded and differentiated two steps; a process of its own for each number. The states that a way must keep are
  subtracted: those the network was asked about, and for all steps at once the stacks beside them (cotangents, products
  and pulled cotangents, and the rounds kept for mixing).
- *agreement*: the gradient of the squared error at a random code, against the exact one.
- *inversion*: Adam on the squared error of test images, from random codes and from a plain forward pass of DDIM; beside
  it, L-BFGS, and the exact inversion by fixed point. An evaluation is one state through the network, or one
  vector-Jacobian product.

Every number is kept in `results/gradients.json` as soon as it is there, and is not measured again; `--again` does.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import environment, median, plot_lines, read_json, table, write_json, write_text
from torch import Tensor

from pushforward.data.pictures import from_bytes
from pushforward.execute import Exact, Gradient, Implicit, Phantom, Round, Skeleton, differentiable, run
from pushforward.guidance.invert import optimise
from pushforward.maps.diffusion import Diffusion
from pushforward.model import Model, load
from pushforward.plan import Plan, ddim, grid

NAME = "gradients"
PARTS = ("memory", "agreement", "inversion")
MEMORY: dict[str, Gradient | None] = {
    "autograd": None,
    "Exact": Exact(),
    "Implicit, 16 rows": Implicit(max_rows=16, max_rounds=6),
    "Phantom(1)": Phantom(1, max_rows=16),
    "Phantom(3), 16 rows": Phantom(3, max_rows=16),
}
STACKS = {"Implicit, 16 rows": 5 + 2 * 5, "Phantom(1)": 5, "Phantom(3), 16 rows": 5}  # of states, beside those kept
AGREEMENT: dict[str, Gradient] = {
    "Exact": Exact(),
    **{f"Implicit({tolerance:g})": Implicit(tolerance) for tolerance in (1e-1, 1e-2, 1e-4)},
    "Phantom(1)": Phantom(1),
    "Phantom(3)": Phantom(3),
    "Phantom(5)": Phantom(5),
    "Phantom(3, 0.5)": Phantom(3, 0.5),
    "Skeleton": Skeleton(),
}
INVERSION: dict[str, tuple[Gradient, str, float]] = {
    "Exact": (Exact(), "adam", 0.1),
    "Implicit(0.1)": (Implicit(1e-1), "adam", 0.1),
    "Phantom(1)": (Phantom(1), "adam", 0.1),
    "Phantom(3)": (Phantom(3), "adam", 0.1),
    "Skeleton": (Skeleton(), "adam", 0.1),
    "Exact, L-BFGS": (Exact(), "l-bfgs", 0.1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-vp")
    parser.add_argument("--data", type=Path, help="an .npz file with x_test and y_test")
    parser.add_argument("--part", choices=PARTS, action="append", help="all by default")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 100, 1000], help="of the memory's plans")
    parser.add_argument("--images", type=int, default=4, help="of the inversion")
    parser.add_argument("--iterations", type=int, default=30, help="of the inversion")
    parser.add_argument("--again", action="store_true", help="measure again what has been measured")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measured(options.model, options.measure[0], int(options.measure[1]))))
        return
    if options.data is None:
        parser.error("--data is needed: an .npz file with x_test and y_test")
    results = read_json(NAME)
    for part in options.part or PARTS:
        done = {} if options.again else results.get(part, {})
        results[part] = done

        def keep(key: str, value: dict[str, Any], done: dict[str, Any] = done) -> None:
            done[key] = value
            write_json(NAME, {k: v for k, v in results.items() if k != "environment"})
            print(key, *(f"{k} {v:.4g}" for k, v in value.items() if isinstance(v, float)), flush=True)

        {"memory": memory, "agreement": agreement, "inversion": inversion}[part](options, done, keep)
    write_text(NAME, report(results))
    draw(results)


Keep = Callable[[str, dict[str, Any]], None]


def plan_of(model: Model, steps: int) -> Plan:
    """DDIM on its quadratic grid to `t_min`, where it has an inverse."""
    return ddim(model.process, grid.power(model.process, steps, end=model.process.t_min))


def images_of(path: Path, count: int) -> tuple[Tensor, Tensor]:
    """The first test images, in [-1, 1], and their labels."""
    arrays = np.load(path)
    images = from_bytes(torch.from_numpy(arrays["x_test"][:count]).permute(0, 3, 1, 2))
    return images, torch.from_numpy(arrays["y_test"][:count]).long()


# -- memory ----------------------------------------------------------------------------------------------------------


def memory(options: argparse.Namespace, done: dict[str, Any], keep: Keep) -> None:
    """A process for each way and number of steps; plain autograd only where it surely fits."""
    for way in MEMORY:
        for steps in options.steps:
            key = f"{way}, T = {steps}"
            if key in done:
                continue
            if way == "autograd" and steps > 100:
                known = [cell for cell in done.values() if cell["way"] == way and not cell["extrapolated"]]
                if known:
                    most = max(known, key=lambda cell: cell["steps"])
                    grown = most["bytes"] * steps / most["steps"]
                    keep(key, {**most, "steps": steps, "bytes": grown, "seconds": None, "extrapolated": True})
                continue
            command = [sys.executable, __file__, "--model", options.model, "--measure", way, str(steps)]
            answer = subprocess.run(command, capture_output=True, text=True, check=True)
            keep(key, json.loads(answer.stdout.splitlines()[-1]))


def measured(name: str, way: str, steps: int) -> dict[str, Any]:
    """Bytes that one gradient of one image adds to this process's peak, and its seconds."""
    model = load(name)
    gradient, shape = MEMORY[way], model.state_shape(1)
    labelled = model.given(torch.zeros(1, dtype=torch.long) if model.classes else None)

    def differentiate(plan: Plan) -> None:
        start = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        if gradient is None:
            last = run(plan, labelled.denoiser, start)
        else:
            last = differentiable(plan, labelled.denoiser, start, gradient=gradient)
        last.square().sum().backward()

    plan = plan_of(model, steps)
    differentiate(plan_of(model, 2))
    before, began = peak(), time.perf_counter()
    differentiate(plan)
    seconds = time.perf_counter() - began
    state = 4 * torch.Size(shape).numel()
    kept = 0 if gradient is None else plan.nfe * state * (1 + STACKS.get(way, 0))
    return {
        "way": way, "steps": steps, "bytes": float(peak() - before), "states": float(kept), "seconds": seconds,
        "extrapolated": False,
    }  # fmt: skip


def peak() -> int:
    """The most resident memory of this process so far, in bytes (a child's `ru_maxrss` begins at its parent's)."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text(encoding="utf-8").splitlines() if x.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# -- agreement -------------------------------------------------------------------------------------------------------


def agreement(options: argparse.Namespace, done: dict[str, Any], keep: Keep, steps: int = 50, count: int = 2) -> None:
    """Every way's gradient in the first state against the exact one."""
    model = load(options.model)
    images, labels = images_of(options.data, count)
    plan = plan_of(model, steps)
    denoiser = model.given(labels if model.classes else None).denoiser
    reference = model.gaussian.tempered()
    begun = torch.randn(model.state_shape(count), generator=torch.Generator().manual_seed(0))
    exact: Tensor | None = None
    for way, gradient in AGREEMENT.items():
        if way in done and exact is not None:
            continue
        gradient = gradient.with_reference(reference)
        start, rounds = begun.clone().requires_grad_(), list[Round]()
        last = differentiable(plan, denoiser, start, gradient=gradient, backward=rounds.append)
        loss = (model.images(last) - images).square().sum()
        (found,) = torch.autograd.grad(loss, start)
        exact = found if exact is None else exact
        many = {
            Exact: plan.nfe, Implicit: len(rounds), Phantom: getattr(gradient, "steps", 1) - 1, Skeleton: 0
        }[type(gradient)]  # fmt: skip
        products = sum(r.nfe for r in rounds) / count if rounds else many * (1 if way == "Exact" else plan.nfe)
        flat = [x.double().flatten(1) for x in (found, exact)]
        keep(way, {
            "error": float(((flat[0] - flat[1]).norm(dim=1) / flat[1].norm(dim=1)).max()),
            "cosine": float(torch.cosine_similarity(*flat, dim=1).min()),
            "rounds": many, "products": float(products), "steps": steps,
        })  # fmt: skip


# -- inversion -------------------------------------------------------------------------------------------------------


def inversion(options: argparse.Namespace, done: dict[str, Any], keep: Keep, steps: int = 20) -> None:
    """Curves of loss against evaluations for each way and beginning, and the fixed point beside them."""
    model = load(options.model)
    images, labels = images_of(options.data, options.images)
    diffusion = Diffusion(model, plan_of(model, steps)).given(labels if model.classes else None)
    for noisy in (True, False):
        key = f"fixed point, {'noise of t_min' if noisy else 'clean'}"
        if key in done:
            continue
        found = diffusion.invert(images, noisy=noisy)
        with torch.no_grad():
            error = found.decode() - images
        losses = error.double().square().flatten(1).sum(1)
        keep(key, {
            "loss": float(median(losses)), "worst": float(losses.max()), "nfe": float(found.nfe.double().mean()),
            "max_abs_error": float(error.abs().max()), "rounds": found.rounds,
        })  # fmt: skip
    for begin in ("random", "forward"):
        for way, (gradient, optimiser, rate) in INVERSION.items():
            key = f"{way}, {begin}"
            if key in done or (begin == "random" and isinstance(gradient, Implicit)):  # Exact's curve, but dearer
                continue
            found = optimise(
                diffusion.run_by(gradient=gradient), images, optimiser=optimiser, begin=begin,
                steps=options.iterations, learning_rate=rate, tolerance=0.0,
            )  # fmt: skip
            best = torch.stack([record.loss for record in found.history]).cummin(0).values
            keep(key, {
                "loss": float(median(found.loss)), "worst": float(found.loss.max()),
                "nfe": float(found.nfe.double().mean()),
                "begun": float(median(best[0])),
                "curve": {
                    "loss": median(best, 1).tolist(),
                    "nfe": [float(record.nfe.double().mean()) for record in found.history],
                },
            })  # fmt: skip


# -- report ----------------------------------------------------------------------------------------------------------


def report(results: dict[str, Any]) -> str:
    """All parts that there are, as Markdown."""
    text = [f"# Gradients through decoding\n\nfashion-vp, DDIM to t_min; {environment()['machine']}."]
    if cells := results.get("memory"):
        steps = sorted({cell["steps"] for cell in cells.values()})
        rows = []
        for way in MEMORY:
            row: list[object] = [way]
            for count in steps:
                cell = cells.get(f"{way}, T = {count}")
                if cell is None:
                    row += [None, None]
                    continue
                mark = "~" if cell["extrapolated"] else ""
                row += [f"{mark}{(cell['bytes'] - cell['states']) / 2**20:.0f}", f"{cell['states'] / 2**20:.1f}"]
            rows.append(row)
        columns = ["way", *(f"{what} T={count}" for count in steps for what in ("MiB", "states"))]
        text.append(
            "## Peak memory of one gradient of one image\n\n" + table(columns, rows) + "\n\n"
            "MiB beyond the loaded model and a gradient through two steps; in a column of its own, and not in the "
            "first, what the states take: T of them for `Exact` and 6 T (`Phantom`) or 16 T (`Implicit`, with the "
            "rounds that mixing keeps) for all steps at once. ~: extrapolated from the largest T measured. "
            "`Implicit` is stopped after 6 rounds, when mixing holds all that it ever does. What else grows with T are "
            "the linear system's T x T coefficients, made in float64, and passing copies of the stacks."
        )
    if cells := results.get("agreement"):
        rows = [[way, *(cell[k] for k in ("error", "cosine", "rounds", "products"))]
                for way, cell in cells.items()]  # fmt: skip
        columns = ["way", "relative error", "cosine", "rounds", "products"]
        text.append(
            "## Agreement with the exact gradient\n\n" + table(columns, rows) + "\n\n"
            "T = 50, of the squared error of 2 images at random codes; error and cosine of the worse image, products "
            "an image."
        )
    if cells := results.get("inversion"):
        rows = [[way, cell.get("begun"), cell["loss"], cell["worst"], cell["nfe"]]
                for way, cell in cells.items()]  # fmt: skip
        columns = ["way, beginning", "first loss", "loss", "worst", "NFE"]
        text.append(
            "## Inversion of test images, T = 20\n\n" + table(columns, rows) + "\n\n"
            "Squared error summed over an image's values, median and worst of the images; NFE of an image: states "
            "through the network and vector-Jacobian products. Adam with rate 0.1, L-BFGS with a line search, from "
            "random codes or those of a plain forward pass of DDIM; the fixed point is `Diffusion.invert`."
        )
    return "\n\n".join(text)


def draw(results: dict[str, Any]) -> None:
    """Loss against evaluations, and memory against steps."""
    cells = results.get("inversion", {})
    panels: dict[str, dict[str, tuple[list[float], list[float], bool]]] = {}
    for begin in ("random", "forward"):
        curves = {way: cells[f"{way}, {begin}"]["curve"] for way in INVERSION if f"{way}, {begin}" in cells}
        if curves:
            panels[f"from a {begin} code"] = {
                way: (curve["nfe"], curve["loss"], "L-BFGS" in way) for way, curve in curves.items()
            }
            panels[f"from a {begin} code"] |= {
                key: ([cell["nfe"]], [cell["loss"]], True) for key, cell in cells.items() if key.startswith("fixed")
            }
    if panels:
        plot_lines(NAME, panels, "network evaluations an image", "squared error of an image")
    lines = {}
    for way in MEMORY:
        found = sorted((c["steps"], c["bytes"]) for c in results.get("memory", {}).values() if c["way"] == way)
        if len(found) > 1:
            lines[way] = ([x for x, _ in found], [max(y, 2.0**18) / 2**20 for _, y in found], way != "autograd")
    if lines:
        plot_lines(f"{NAME}-memory", {"one gradient of one image": lines}, "steps", "MiB, states included")


if __name__ == "__main__":
    main()
