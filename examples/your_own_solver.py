"""Add a solver of your own: run it step by step, all steps at once, backwards, and by its name.

    python examples/your_own_solver.py --model fashion-langevin

The solver is the two-step Adams-Bashforth method in the noise prediction, for steps of any length.
"""

# %% What is needed
import argparse
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import pushforward as pf
from pushforward.data.pictures import save_image, sheet
from pushforward.execute import run
from pushforward.linear import Process, root
from pushforward.maps.spec import parse
from pushforward.maps.storage import header, load_codes, save_codes
from pushforward.plan import Builder, plan_of


# %% The solver
# Let `R` be the root of the covariance and `eps = R^-1 (u - Psi D)` the noise prediction. Holding the prediction
# constant gives DDIM's step, `u' = Psi' D + R' eps`. Adams-Bashforth instead takes the prediction in the middle of the
# step, on the straight line through the last two. Written with operators, this works for images, for frequencies, and
# for image and velocity alike.
def ab2(process: Process, grid: Tensor, *, share: float = 1.0) -> pf.Plan:
    """Make the two-step Adams-Bashforth method.

    Args:
        process: any diffusion.
        grid: decreasing times, `(steps + 1,)`.
        share: share of the extrapolation to take; 0 is DDIM.
    """
    plan = Builder(process, "ab2", grid)
    t = plan.grid
    psi, R = process.transition(t, torch.zeros_like(t)), root(process, t)
    ahead = process.transition(t[1:], t[:-1])
    u, before = plan.start(), None
    for i in range(len(t) - 1):
        eps = R[i].inverse() @ (u.state - psi[i] @ u.answer)
        step = psi[i + 1] @ u.answer + R[i + 1] @ eps
        if before is not None:  # the first step has no past, so it is DDIM's
            middle = share * float((t[i] - t[i + 1]) / (t[i - 1] - t[i])) / 2
            step += (R[i + 1] - ahead[i] @ R[i]) @ (middle * (eps - before))
        u, before = plan.node(float(t[i + 1]), step), eps
    return plan.build(share=share)


# From here on it is in the library's list, which the command line, codes on disk and `pf.SOLVERS` use.
pf.SOLVERS["ab2"] = ab2


# %% Its order
# Gaussian data have a known denoiser and a known flow: u keeps its code `R^-1 u`, where R is the root for these data.
def order(process: Process, solver: str, coarse: int = 40, **settings: float) -> float:
    """Return the power of the step length by which the error falls, from `coarse` steps to twice as many."""
    data, field = pf.Gaussian(0.3), process.basis.shape or (4, 4)

    def denoise(u: Tensor, t: float) -> Tensor:
        return data.response(process, torch.tensor(t, dtype=torch.float64))(u)

    u = torch.randn(4, process.blocks, *field, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (coarse, 2 * coarse):
        grid = pf.grid.power(process, steps, start=0.9 * process.t_max, end=0.05 * process.t_max)
        R = root(process, grid[[0, -1]], data)
        truth = R[1](R[0].inverse()(u))
        found = run(pf.SOLVERS[solver](process, grid, **settings), pf.Function(denoise), u)
        errors.append(float((found - truth).abs().max()))
    return math.log2(errors[0] / errors[1])


# %% On a model
class Found(NamedTuple):
    """What `use` found.

    Args:
        images: images sampled step by step.
        together: images sampled with all steps at once.
        rounds: network rounds that this took.
        given: images that were inverted.
        residual: error per image that the inversion expects; large where it found no code.
        again: images decoded from the codes on disk.
    """

    images: Tensor
    together: Tensor
    rounds: int
    given: Tensor
    residual: Tensor
    again: Tensor


def use(model: pf.Model, name: str, steps: int, count: int, codes: Path) -> Found:
    """Sample, sample with all steps at once, and put images through their codes."""
    sampler = pf.Diffusion(model, pf.SOLVERS["ab2"](model.process, pf.grid.power(model.process, steps)))
    images = sampler.sample(count)
    together, solution = next(sampler.run_by(parallel=pf.Parallel(tolerance=1e-3)).solved(count))

    # A plan has an inverse if it ends a little above time 0. With very few steps it may not be found; `residual` says
    # so. Codes are stored with the solver's name and settings.
    grid = pf.grid.power(model.process, steps, end=model.process.t_min)
    backwards = pf.Diffusion(model, ab2(model.process, grid, share=0.5))
    given = images.clamp(-1, 1)
    inversion = backwards.invert(given)
    save_codes(codes, inversion.code, header(name, parse("ab2:share=0.5"), backwards, count))

    code, head = load_codes(codes)
    plan = plan_of(model.process, head["solver"], head["times"], head["settings"])
    with torch.no_grad():
        again = pf.Diffusion(model, plan).decode(code)
    return Found(images, together, solution.rounds, given, inversion.residual, again)


# %% All of it
def main(
    model: str = "fashion-vp", steps: int = 30, count: int = 4, out: str = "ab2.png", codes: str = "ab2.safetensors"
) -> Found:
    """Measure the order on the model's process, then use the solver on the model."""
    loaded = pf.load(model)
    for solver in ("ab2", "ddim"):
        print(f"Order of {solver} on {loaded.process.name}: {order(loaded.process, solver):.2f}")
    found = use(loaded, model, steps, count, Path(codes))
    difference = (found.together - found.images).square().mean().sqrt()
    print(f"All steps at once: {found.rounds} rounds instead of {steps} calls, difference {difference:.1e} (RMS)")
    for k, (given, again) in enumerate(zip(found.given, found.again, strict=True)):
        expected = float(found.residual[k])
        print(f"Image {k} to its code and back: error {(again - given).abs().max():.1e}, expected {expected:.1e}")
    rows = ["step by step", "all at once", "inverted, decoded"]
    save_image(sheet(torch.cat([found.images, found.together, found.again]), columns=count, rows=rows), Path(out))
    print(f"Codes: {codes}")
    return found


# %% Run
# With `from pushforward.cli import main` in place of this main, your file is the command `pushforward` with your
# solver in it: `python your_file.py sample fashion-vp --solver ab2`.
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-vp", help="an embedded model, a folder or a hub name")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--count", type=int, default=4, help="images")
    parser.add_argument("--out", default="ab2.png")
    parser.add_argument("--codes", default="ab2.safetensors")
    main(**vars(parser.parse_args()))
