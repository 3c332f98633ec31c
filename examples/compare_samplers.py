"""Compare samplers on your model: how far each is from the converged result, by network calls.

    python examples/compare_samplers.py --model fashion-vp
    python examples/compare_samplers.py --model path/to/folder --calls 5 10 20 40 --count 16

The script prints a table, and writes a plot and a sheet of images. All samplers begin from the same codes, so errors
are compared image by image. Only deterministic samplers are compared, since a stochastic one has no converged image.
"""

# %% What is needed
import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from PIL import Image
from torch import Tensor

import pushforward as pf
from pushforward.data.pictures import save_image, sheet
from pushforward.data.plots import COLOURS, mark_plainly, name_lines
from pushforward.plan import auto

# %% The samplers
# Each makes a plan of about `n` network calls; add yours. `plan.nfe` is the exact number of calls.
SAMPLERS: dict[str, Callable[[pf.Model, int], pf.Plan]] = {
    "auto": lambda model, n: auto(model.process, n, model.reference),
    "ddim": lambda model, n: pf.SOLVERS["ddim"](model.process, pf.grid.power(model.process, n)),
    "gddim": lambda model, n: pf.SOLVERS["gddim"](model.process, pf.grid.power(model.process, n), order=2),
    "dpm++": lambda model, n: pf.SOLVERS["dpm++"](model.process, pf.grid.log_snr(model.process, n), order=2),
    "unipc": lambda model, n: pf.SOLVERS["unipc"](model.process, pf.grid.log_snr(model.process, n), order=2),
    "heun": lambda model, n: pf.SOLVERS["heun"](model.process, pf.grid.power(model.process, max(1, (n + 1) // 2))),
}


# %% Errors
# The converged result takes many calls of `auto`. A sampler of another family with as many calls shows how far that can
# be trusted: differences below this *doubt* mean nothing.
class Comparison(NamedTuple):
    """Errors of every image, `(count,)`, and the images, by (sampler, network calls)."""

    errors: dict[tuple[str, int], Tensor]
    images: dict[tuple[str, int], Tensor]
    converged: Tensor
    doubt: float


def distances(images: Tensor, truth: Tensor) -> Tensor:
    """Return the root mean square of the difference over that of the truth, per image."""
    return (images - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)


def compare(model: pf.Model, calls: Sequence[int], count: int, many: int, seed: int = 0) -> Comparison:
    """Run every sampler with every number of calls, on the same codes."""
    converged, other = (
        pf.Diffusion(model, SAMPLERS[name](model, many)).sample(count, seed=seed) for name in ("auto", "gddim")
    )
    images = {}
    for name, make in SAMPLERS.items():
        for plan in (make(model, n) for n in calls):
            images[name, plan.nfe] = pf.Diffusion(model, plan).sample(count, seed=seed)
    errors = {key: distances(value, converged) for key, value in images.items()}
    return Comparison(errors, images, converged, float(distances(other, converged).quantile(0.5)))


# %% Table and pictures
def table(found: Comparison) -> str:
    """Write a line per sampler and number of calls; the last column compares it with `ddim` at no more calls."""
    lines = [f"{'sampler':10}{'calls':>6}{'median error':>14}   nearer than ddim"]
    for (name, nfe), errors in found.errors.items():
        budgets = [n for other, n in found.errors if other == "ddim" and n <= nfe]
        better = int((errors < found.errors["ddim", max(budgets)]).sum()) if budgets else None
        pairs = "" if name == "ddim" or better is None else f"   {better} of {len(errors)} images"
        lines.append(f"{name:10}{nfe:6}{float(errors.quantile(0.5)):14.2g}{pairs}")
    return "\n".join([*lines, f"The converged result is known to about {found.doubt:.2g}."])


def plot(found: Comparison, path: Path) -> None:
    """Plot the median error against network calls, with the middle half of the images shaded."""
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    ends = []
    for name, colour in zip(SAMPLERS, COLOURS, strict=False):
        calls = [nfe for other, nfe in found.errors if other == name]
        errors = torch.stack([found.errors[name, nfe] for nfe in calls])
        low, middle, high = errors.quantile(torch.tensor([0.25, 0.5, 0.75]), dim=1).tolist()
        axes.plot(calls, middle, marker="o", color=colour)
        axes.fill_between(calls, low, high, alpha=0.15, color=colour, linewidth=0)
        ends.append((middle[-1], name, colour))
    axes.set(xscale="log", yscale="log", xlabel="network calls per image", ylabel="error to the converged image")
    for axis in (axes.xaxis, axes.yaxis):
        mark_plainly(axis)
    axes.axhline(found.doubt, color="0.6", linestyle=":")
    name_lines(axes, [*ends, (found.doubt, "doubt", "0.4")])
    figure.savefig(path, dpi=120)
    plt.close(figure)


def fewest(found: Comparison, columns: int = 8) -> Image.Image:
    """Draw each sampler's images at its fewest calls, one row per sampler, and the converged ones."""
    calls = {name: min(nfe for other, nfe in found.images if other == name) for name in SAMPLERS}
    every = [found.images[name, nfe][:columns] for name, nfe in calls.items()]
    names = [*(f"{name}, {nfe} calls" for name, nfe in calls.items()), "converged"]
    return sheet(torch.cat([*every, found.converged[:columns]]), columns=len(every[0]), rows=names)


# %% All of it
def main(
    model: str = "fashion-vp",
    calls: Sequence[int] = (5, 8, 12, 20, 30),
    count: int = 8,
    many: int = 100,
    out: str = "samplers",
) -> Comparison:
    """Compare on the model of that name or folder; the files' names begin with `out`."""
    found = compare(pf.load(model), calls, count, many)
    print(table(found))
    plot(found, Path(f"{out}.png"))
    save_image(fewest(found), Path(f"{out}-images.png"))
    return found


# %% Run
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-vp", help="an embedded model, a folder or a hub name")
    parser.add_argument("--calls", type=int, nargs="+", default=(5, 8, 12, 20, 30), help="numbers of network calls")
    parser.add_argument("--count", type=int, default=8, help="images")
    parser.add_argument("--many", type=int, default=100, help="network calls of the converged result")
    parser.add_argument("--out", default="samplers", help="beginning of the files' names")
    main(**vars(parser.parse_args()))
