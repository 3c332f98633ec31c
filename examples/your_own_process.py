"""Add a diffusion of your own: every solver works on it, and `train` trains it.

    python examples/your_own_process.py

The process here is sub-VP of "Score-Based Generative Modeling through SDEs" (Song et al., arXiv 2011.13456, eq. 12),
which the package does not have. Training needs `pip install '.[train]'`.
"""

# %% What is needed
import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

import pushforward as pf
from pushforward.data.datasets import ImageData
from pushforward.data.pictures import save_image, sheet
from pushforward.linear import PROCESSES, ScaledProcess
from pushforward.training.trainer import Report, TrainConfig, train


# %% The process
# For `u_t = alpha_t x_0 + sigma_t noise`, the two scales say everything: the library derives drift, diffusion,
# transition and covariance from them (by automatic differentiation, so write torch functions). The process is a frozen
# dataclass, because processes are compared and stored in `config.json` by their parameters.
@dataclass(frozen=True)
class SubVP(ScaledProcess):
    """`alpha_t = exp(-B_t / 2)`, `sigma_t = 1 - exp(-B_t)`, `B_t = beta_min t + (beta_max - beta_min) t^2 / 2`."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 0.025  # no network is asked below this time; sigma is a hundredth there
    t_max: float = 1.0
    name: ClassVar[str] = "sub-vp"

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = -0.25 * t.square() * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min
        return log_alpha.exp(), -torch.expm1(2 * log_alpha)


# `train`, `load` and the command line find a process by its name, so register the name. Every program must do this
# before it loads a model of the process.
PROCESSES[SubVP.name] = SubVP


# %% Is it right?
# The paper states the stochastic differential equation, the class only its marginals, so the two can be compared.
def diffusion_error(process: SubVP) -> float:
    """Return the greatest difference of `G_t^2` from the paper's `beta_t (1 - exp(-2 B_t))`."""
    t = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    beta = process.beta_min + t * (process.beta_max - process.beta_min)
    integral = process.beta_min * t + 0.5 * t.square() * (process.beta_max - process.beta_min)
    paper = -beta * torch.expm1(-2 * integral)
    return float((process.diffusion(t).entry(0, 0) - paper).abs().max())


# %% Every solver, against a closed form
# If the data are Gaussian, N(m, s^2) in every pixel, the best denoiser is known, and so is the image behind a code z:
# the probability flow moves z to m + s z. With more steps, errors fall to that of the last step: it goes from `t_min`
# to clean data in one, and is off by sigma^2 z / 2s.
def gaussian_model(process: ScaledProcess, mean: float, deviation: float) -> pf.Model:
    """Make a model without a network: `E[x_0 | u_t] = m + s^2 alpha (u - alpha m) / (sigma^2 + s^2 alpha^2)`."""

    def denoise(u: Tensor, t: float) -> Tensor:
        alpha, sigma = (float(x) for x in process.alpha_sigma(torch.tensor(t, dtype=torch.float64)))
        gain = deviation**2 * alpha / (sigma**2 + deviation**2 * alpha**2)
        return mean + gain * (u - alpha * mean)

    data = pf.Gaussian(deviation**2, mean)
    return pf.Model("gaussian", process, pf.Function(denoise), shape=(1, 16, 16), reference=data)


def solver_errors(process: ScaledProcess, steps: int) -> dict[str, float]:
    """Return each solver's greatest error of an image, or of the images' deviation if it is stochastic."""
    mean, deviation = 0.2, 0.5
    model, errors = gaussian_model(process, mean, deviation), {}
    z = torch.randn(64, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name, solver in pf.SOLVERS.items():
        try:
            plan = solver(process, pf.grid.power(process, steps))
        except pf.PushforwardError as reason:  # sscs needs an equilibrium, which sub-VP has not
            print(f"{name}: {reason}")
            continue
        sampler = pf.Diffusion(model, plan, dtype=torch.float64)
        together = pf.Parallel(tolerance=1e-8) if plan.implicit else None  # collocation has no step-by-step form
        if plan.noises:
            errors[name] = abs(float(sampler.sample(64).std()) - deviation)
        else:
            images = sampler.run_by(parallel=together).decode(pf.Code(z))
            errors[name] = float((images - (mean + deviation * z)).abs().max())
    return errors


# %% A network for it
def discs(count: int = 256, size: int = 16) -> ImageData:
    """Draw white discs on black, anywhere."""
    generator = torch.Generator().manual_seed(0)
    centre = size * (0.3 + 0.4 * torch.rand(count, 2, 1, 1, generator=generator))
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    distance = torch.hypot(x - centre[:, 0], y - centre[:, 1])
    return ImageData((255 * (0.2 * size + 0.5 - distance).clamp(0, 1)).byte()[:, None])


def learn(folder: str, steps: int) -> tuple[Report, Tensor]:
    """Train a small network on discs, load it from its folder, and sample."""
    config = TrainConfig(process="sub-vp", network="tiny", steps=steps, batch=32, sample_every=0)
    report = train(config, discs(), folder)
    model = pf.load(folder)
    plan = pf.SOLVERS["gddim"](model.process, pf.grid.power(model.process, 20), order=2)
    return report, pf.Diffusion(model, plan).sample(16)


# %% All of it
def main(steps: int = 1000, model: str = "my-sub-vp", out: str = "sub-vp.png") -> tuple[dict[str, float], Report]:
    """Check the process, then train on it; return errors by solver, and the report of the training."""
    process = SubVP()
    print(f"G^2 differs from the paper's by {diffusion_error(process):.0e}.")
    few, errors = (solver_errors(process, n) for n in (20, 40))
    for name, error in errors.items():
        print(f"{name:16} error with 20 steps {few[name]:.1e}, with 40 steps {error:.1e}")
    report, images = learn(model, steps)
    save_image(sheet(images), Path(out))
    print(f"Trained to a loss of {report.loss:.3f}; samples in {out}.")
    return errors, report


# %% Run
# With `from pushforward.cli import main` in place of this main, your file is the command `pushforward` with your
# process in it: `python your_file.py train my-model --process sub-vp --data path/to/images`.
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    parser.add_argument("--model", default="my-sub-vp", help="folder for the model")
    parser.add_argument("--out", default="sub-vp.png")
    main(**vars(parser.parse_args()))
