"""Gradients through pipelines, and what is done with a pipeline's model: guiding, translating, editing.

Tiny random networks; gradients in float64, against central differences.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pushforward as pf
from pushforward.maps.spec import parse
from support.pipelines import flux, stable_diffusion

pytestmark = pytest.mark.usefixtures("one_thread")

CALL: dict[str, Any] = {"prompt": "a fox", "guidance_scale": 3.0, "height": 8, "width": 8}
WAYS = {"plain": None, "exact": pf.Exact(), "implicit": pf.Implicit(tolerance=1e-10)}
STEP = 1e-4


@pytest.fixture(params=[stable_diffusion, flux], ids=["unet", "transformer"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> pf.Model:
    return model_of(request.param, tmp_path)


def model_of(make: Callable[[Path], Any], folder: Path, dtype: torch.dtype = torch.float64) -> pf.Model:
    torch.manual_seed(3)
    pipe = make(folder).to(dtype)
    if make is flux:
        nn.init.normal_(pipe.transformer.proj_out.weight, std=0.1)
    return pf.from_pipeline(pipe, **CALL)


def slopes(function: Callable[[Tensor], Tensor], at: Tensor, directions: Tensor) -> Tensor:
    """Central differences of a number along directions."""
    return torch.stack([(function(at + STEP * one) - function(at - STEP * one)) / (2 * STEP) for one in directions])


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_finite_differences(model: pf.Model, way: str) -> None:
    """Of a number of images, by their code: to 1e-5 of the largest, as differences of steps of 1e-4 are."""
    sampler = pf.Diffusion(model, model.plan("ddim", 3), dtype=torch.float64)
    if WAYS[way] is not None:
        at_once = parse("ddim:parallel=preconditioned:within=1e-11").method(sampler.plan) if way == "implicit" else None
        sampler = sampler.run_by(parallel=at_once, gradient=WAYS[way])
    start = sampler.draw(1, seed=1).start
    weights = torch.randn((1, *model.image_shape), generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def number(code: Tensor) -> Tensor:
        return (weights * sampler.decode(pf.Code(code))).sum()

    leaf = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(number(leaf), leaf)
    directions = torch.randn((4, *start.shape), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        wanted = slopes(number, start, directions)
    found = (directions * gradient).flatten(1).sum(1)
    assert float(wanted.abs().min()) > 0
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_gradients_of_answers_in_batches(model: pf.Model) -> None:
    """Rows at times of their own: each row's gradient is that of a single call, to rounding in float64."""
    network: Any = model.module
    u = torch.randn(model.state_shape(3), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64) * model.process.t_max * model.denoiser.time_scale
    leaf = u.clone().requires_grad_()
    (whole,) = torch.autograd.grad(network(leaf, t).square().sum(), leaf)
    for k in range(3):
        leaf = u[k : k + 1].clone().requires_grad_()
        (single,) = torch.autograd.grad(network(leaf, t[k : k + 1]).square().sum(), leaf)
        torch.testing.assert_close(whole[k : k + 1], single, rtol=1e-6, atol=1e-9)


def test_weights_have_no_gradients_unless_asked(model: pf.Model) -> None:
    """They stay as they are: with gradients if they had them, which training a LoRA through images needs."""
    sampler = pf.Diffusion(model, model.plan("ddim", 2), dtype=torch.float64)
    sampler.decode(sampler.draw(1)).sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.module.parameters())


def test_moves_have_densities_whose_gradient_reaches_the_weights(model: pf.Model) -> None:
    """Of a stochastic plan: a central difference in one weight agrees, in float64 with steps of 1e-4."""
    plan = pf.solvers.ddim(model.process, model.plan("ddim", 3).times, eta=1.0)
    sampler = pf.Diffusion(model, plan, dtype=torch.float64)
    path = sampler.path(sampler.draw(2, seed=1))
    network: Any = model.module
    weight = next(p for name, p in network.call.pipe.components["unet" if hasattr(network.call.pipe, "unet") else
                  "transformer"].named_parameters() if name.endswith("weight") and p.ndim > 1)  # fmt: skip
    (slope,) = torch.autograd.grad(sampler.log_prob(path).sum(), weight)
    place = int(slope.abs().argmax())
    before = float(weight.data.flatten()[place])

    def value(at: Tensor) -> Tensor:
        weight.data.view(-1)[place] = float(at)
        return sampler.log_prob(path).sum().detach()

    wanted = slopes(value, torch.tensor(before, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    assert float(slope.flatten()[place]) == pytest.approx(float(wanted), rel=1e-5)


# -- what is done with models ---------------------------------------------------------------------------------------


def darkness(images: Tensor, code: Tensor | None = None) -> Tensor:
    return 2000 * images.mean((1, 2, 3))


def test_guiding_and_steering(tmp_path: Path) -> None:
    """Images get darker, each of its own code: steered in every step, and by a descent; chains go that way, too."""
    model = model_of(stable_diffusion, tmp_path, torch.float32)
    plain = darkness(model.sample(3, solver="ddim", steps=4))
    steered = model.steer(darkness).sample(3, solver="ddim", steps=4)
    assert bool((darkness(steered) < plain - 10).all())
    sampler = model.diffusion("ddim", 4)
    found = pf.best(sampler, darkness, steps=10, count=2)
    assert bool((darkness(found.images) < plain.min() - 10).all())
    chains = model.guide(darkness, pf.langevin(), pf.Schedule(15), solver="ddim", steps=4, chains=3)
    assert float(darkness(chains.images).mean()) < float(plain.mean()) - 10


@pytest.mark.parametrize("make", [stable_diffusion, flux], ids=["unet", "transformer"])
def test_translating_and_editing(make: Callable[[Path], Any], tmp_path: Path) -> None:
    """Between two prompts, and by the whole edit: images change with the target, and come back without one."""
    model = model_of(make, tmp_path, torch.float64)
    images = model.sample(2, solver="ddim", steps=3)
    there = model.translate(images, source="a fox", target="the sea", method="deterministic", steps=3).images
    assert there.shape == images.shape
    assert not torch.allclose(there, images, atol=1e-3)
    noisy = model.edit(images, "a fox", "the sea", steps=3, guidance=2.0).images
    assert bool(noisy.isfinite().all())
    assert not torch.allclose(noisy, images, atol=1e-3)


def test_latents_are_not_painted(model: pf.Model) -> None:
    """A mask of pixels is none of latents."""
    images = model.sample(1, solver="ddim", steps=2)
    with pytest.raises(pf.PushforwardError, match="latents"):
        model.inpaint(images, torch.ones(model.image_shape[1:], dtype=torch.bool), steps=2)
