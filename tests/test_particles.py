"""Particles and their evidence, against Gaussian posteriors in closed form."""

import math

import pytest
import torch
from torch import Tensor

from pushforward import Code, Diffusion, Model, Parallel, PushforwardError, load
from pushforward.denoiser import Function
from pushforward.guidance.dynamics import ess, langevin, mala, pcn
from pushforward.guidance.energies import Energy, gaussian, of
from pushforward.guidance.particles import Particles, fk, guide, psi
from pushforward.guidance.posterior import Guided
from pushforward.linear import VP, Gaussian
from pushforward.maps.generator import gan
from pushforward.maps.spec import SamplerSpec
from support.helpers import FIELD, PROCESSES, gaussian_denoiser

PIXELS = math.prod(FIELD)
KINDS = [("vp", "ddpm", {}), ("ve", "ddim", {"eta": 1.0}), ("blurring", "ddim", {"eta": 1.0}),
         ("langevin", "gddim", {"noise": 1.0}), ("flow", "exponential", {"noise": 0.7}),
         ("blurring-langevin", "gddim", {"noise": 0.5})]  # fmt: skip


def diffusion(kind: str = "vp", solver: str = "ddpm", settings: dict[str, object] | None = None, steps: int = 8):
    process, data = PROCESSES[kind], Gaussian(0.3, torch.tensor(0.2, dtype=torch.float64))
    model = Model("gaussian", process, gaussian_denoiser(process, data), (1, *FIELD), reference=data)
    plan = SamplerSpec(solver, steps, settings or {}, end=process.t_min).plan(model)
    return Diffusion(model, plan, dtype=torch.float64)


class Wish:
    """Two numbers of an image that are to have some values: `|A x - y|^2 / (2 s^2)`, without a gradient."""

    def __init__(self, deviation: float = 0.4) -> None:
        random = torch.Generator().manual_seed(3)
        self.seen = torch.randn(2, PIXELS, generator=random, dtype=torch.float64) / 2
        self.wanted, self.deviation = torch.tensor([0.5, -0.4], dtype=torch.float64), deviation

    def __call__(self, images: Tensor, code: Code) -> Tensor:
        gap = images.detach().double().flatten(1) @ self.seen.T - self.wanted
        return gap.square().sum(1) / (2 * self.deviation**2)

    def smooth(self, images: Tensor, code: Code) -> Tensor:
        gap = images.double().flatten(1) @ self.seen.T - self.wanted
        return gap.square().sum(1) / (2 * self.deviation**2)

    def truth(self, there: Diffusion) -> tuple[Tensor, Tensor, float]:
        """Mean and covariance of the images, and the logarithm of the evidence, by how a linear plan maps codes."""
        code = there.draw(1)

        def image(x: Tensor) -> Tensor:
            return there.decode(code.with_variables(x)).flatten()

        zero = torch.zeros_like(code.variables())
        matrix = torch.autograd.functional.jacobian(image, zero)[:, 0]  # type: ignore[no-untyped-call]
        mean, covariance = image(zero), matrix @ matrix.T
        noise = self.deviation**2 * torch.eye(2, dtype=torch.float64)
        inside = self.seen @ covariance @ self.seen.T + noise
        gain, gap = covariance @ self.seen.T @ inside.inverse(), self.wanted - self.seen @ mean
        log = 0.5 * float(noise.logdet() - inside.logdet() - gap @ inside.inverse() @ gap)
        return mean + gain @ gap, covariance - gain @ self.seen @ covariance, log


def check_moments(found: Guided, mean: Tensor, covariance: Tensor, count: float) -> None:
    """Bounds are four standard errors of so many independent draws."""
    x = found.images.double().flatten(1)
    weighted = found.weights @ x
    assert ((weighted - mean) / covariance.diagonal().sqrt()).abs().max() < 4 / math.sqrt(count)
    gap = x - weighted
    own = (found.weights[:, None] * gap).T @ gap
    assert (own - covariance).abs().max() < 4 * math.sqrt(2 / count) * covariance.diagonal().max()


@pytest.mark.parametrize(("kind", "solver", "settings"), KINDS)
@pytest.mark.parametrize("temper", ["increase", "constant", "adaptive"])
def test_particles_reach_the_posterior_and_its_evidence(kind: str, solver: str, settings: dict[str, object], temper):
    wish, there = Wish(), diffusion(kind, solver, settings)
    mean, covariance, log = wish.truth(there)
    found = guide(there, wish, fk(temper=temper), chains=3000, batch=3000)
    assert found.evidence is not None
    check_moments(found, mean, covariance, found.evidence.ancestors)
    assert abs(found.evidence.log - log) < min(0.1, 4 * found.evidence.error)
    assert found.evidence.error < 0.05
    again = there.decode(found.code.to(there.draw(1).start))
    assert (again - found.images).abs().max() < 1e-5  # which are float32
    assert torch.allclose(found.energy, wish(again, found.code))
    assert (found.nfe == there.plan.nfe).all()


@pytest.mark.parametrize("dynamics", [mala(0.3), pcn(0.7), ess()])
@pytest.mark.parametrize("kind", ["vp", "langevin"])
def test_chains_draw_the_first_particles(dynamics, kind: str):
    settings = {"noise": 1.0} if kind == "langevin" else {}
    wish, there = Wish(), diffusion(kind, "gddim" if settings else "ddpm", settings)
    mean, covariance, log = wish.truth(there)
    sampler = psi(dynamics=dynamics, moves=6, at=0.5)
    found = guide(there, wish.smooth, sampler, chains=2000, batch=2000)
    assert found.evidence is not None
    check_moments(found, mean, covariance, found.evidence.ancestors)
    assert abs(found.evidence.log - log) < min(0.1, 4 * found.evidence.error)
    again = there.decode(found.code.to(there.draw(1).start))
    assert (again - found.images).abs().max() < 1e-5
