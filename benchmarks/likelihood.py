r"""How probable held-out images are under the embedded models, and how near the figure is to a closed form.

    python benchmarks/likelihood.py                                                # the closed form
    python benchmarks/likelihood.py --fashion fashion.npz --emoji emoji.npz        # made by examples/zoo_data.py

- *closed form*: a mixture of three Gaussians of deviation .22 in six dimensions, under each diffusion, with the trace
  summed exactly; the largest error in bits per dimension over eight images, beside what half the steps change. Of
  Langevin's diffusions, whose velocities are drawn, the error is that of the mean over 16 draws.
- *models*: bits per dimension of test images of 8 bits, dequantised by uniform noise, without a label; a bound from
  above. Errors are standard errors: over the images, and of the draws of noise and probes alone. The density is that of
  images with the noise of the time `t_min`: figures of models with unlike noise there do not compare.

Models that the file in `results/` has and this run has not stay in it.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import read_json, table, write_json, write_text
from _mixture import Mixture
from torch import Tensor

from pushforward.data.pictures import from_bytes
from pushforward.linear import VE, VP, Blurring, Flow, Gaussian, Langevin, Operator, Process
from pushforward.model import Model, load
from pushforward.model.zoo import names
from pushforward.verbs import log_likelihood

STEPS = (10, 20, 40, 80)
VARIANCE, SHAPE = 0.05, (1, 3, 2)
PROCESSES: dict[str, Process] = {
    "vp": VP(), "ve": VE(), "flow": Flow(), "blurring": Blurring(SHAPE[1:], blur_max=2.0), "langevin": Langevin(),
}  # fmt: skip


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normals, float64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def log_density(process: Process, x: Tensor, centres: Tensor) -> Tensor:
    """The mixture's density of `Psi x` at `t_min`, per unit of x."""
    t = torch.tensor(process.t_min, dtype=torch.float64)
    psi, covariance = process.signal(t), Gaussian(VARIANCE).covariance(process, t)
    kept = Operator.scalar(psi.entry(0, 0), basis=psi.basis)
    white = Operator.scalar(covariance.entry(0, 0), basis=covariance.basis).cholesky().inverse() @ kept
    sizes = white.entry(0, 0).log()
    offset = float(sizes.mean() - 0.5 * math.log(2 * math.pi)) * x[0].numel()
    distances = white((x[:, None] - centres).flatten(0, 1)).view(len(x), len(centres), -1).square().sum(-1)
    return (-0.5 * distances).logsumexp(1) - math.log(len(centres)) + offset


def closed_form(name: str) -> list[dict[str, Any]]:
    """Largest errors over the images, for every number of steps."""
    process, centres = PROCESSES[name], normal(3, *SHAPE, seed=1) / 2
    data = Mixture(centres, VARIANCE**0.5)
    model = Model("mixture", process, data, SHAPE, data.reference())
    x = centres[torch.arange(8) % 3] + VARIANCE**0.5 * normal(8, *SHAPE, seed=3)
    expected, unit, rows = log_density(process, x, centres), x[0].numel() * math.log(2), []
    draws = 16 if process.blocks > 1 else 1
    for steps in STEPS:
        found = log_likelihood(model, x.repeat(draws, 1, 1, 1), steps=steps, draws=1, exact=True, batch=8 * draws)
        nats = found.nats.view(draws, -1)
        rows.append({
            "process": name, "steps": steps, "calls": found.nfe // (1 + x[0].numel()),
            "error": float((nats.mean(0) - expected).abs().max()) / unit,
            "halved": float(found.bits_halved.max()),
            "drawn": float(nats.std(0).max()) / unit / draws**0.5 if draws > 1 else None,
        })  # fmt: skip
    return rows


def held_out(name: str, data: Path, count: int, steps: int, draws: int) -> dict[str, Any]:
    """Bits per dimension of test images that a model was made for, evenly at most `count`."""
    model = load(name)
    with np.load(data) as arrays:
        images = from_bytes(torch.from_numpy(arrays["x_test"]).permute(0, 3, 1, 2))
    images = images[:: max(1, len(images) // count)][:count]
    began = time.perf_counter()
    found = log_likelihood(model, images, steps=steps, draws=draws, dequantise=True, labels=None)
    t = torch.tensor(model.process.t_min, dtype=torch.float64)
    bits = found.bits
    return {
        "model": name, "images": len(images), "bits": float(bits.mean()),
        "images_error": float(bits.std()) / len(images) ** 0.5,
        "draws_error": float(found.bits_error.square().sum().sqrt()) / len(images),
        "halved": float(found.bits_halved.mean()), "noise": math.exp(-float(model.process.log_snr(t))),
        "nfe": found.nfe, "seconds": (time.perf_counter() - began) / len(images),
    }  # fmt: skip


def report(results: dict[str, Any]) -> str:
    """Both tables."""
    parts = [
        "# Likelihoods", __doc__.partition("\n- ")[2].partition("\n\nModels")[0].join(["- ", ""]), "## Closed form",
        table(
            ["process", "steps", "network calls", "error, bits", "half the steps change", "error of the draws"],
            [[row[k] for k in ("process", "steps", "calls", "error", "halved", "drawn")] for row in results["closed"]],
        ),
    ]  # fmt: skip
    if results.get("models"):
        columns = ("model", "images", "bits", "images_error", "draws_error", "halved", "noise", "nfe", "seconds")
        heads = ["model", "images", "bits per dimension", "error", "error of the draws", "half the steps change",
                 "noise at t_min", "evaluations per image", "seconds per image"]  # fmt: skip
        parts += ["## Models", table(heads, [[row[k] for k in columns] for row in results["models"].values()])]
    return "\n\n".join(parts)


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", type=Path, help="fashion.npz, as examples/zoo_data.py makes it")
    parser.add_argument("--emoji", type=Path, help="emoji.npz, likewise; emoji-noto.npz and so on beside it")
    parser.add_argument("--count", type=int, default=16, help="test images of each model")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--models", nargs="*", default=names())
    arguments = parser.parse_args()
    results = read_json("likelihood")
    results.pop("environment", None)
    results["closed"] = [row for name in PROCESSES for row in closed_form(name)]
    print(report({"closed": results["closed"]}))
    for name in arguments.models:
        place = arguments.fashion if name.startswith("fashion") else arguments.emoji
        if place is None:
            continue
        data = place if name.startswith("fashion") else place.with_name(f"{name}.npz")
        row = held_out(name, data, arguments.count, arguments.steps, arguments.draws)
        results["models"] = {**results.get("models", {}), name: row}
        print(row, flush=True)
        write_json("likelihood", results)
    write_json("likelihood", results)
    write_text("likelihood", report(results))


if __name__ == "__main__":
    main()
