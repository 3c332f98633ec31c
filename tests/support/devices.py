"""Everything on a device of its own, the fake device: run by `tests/test_devices.py`, in a process of its own.

A network of random weights, states of some numbers; what is made there is what the CPU makes.
"""

import copy

import pytest
import torch

import pushforward as pf
from pushforward.guidance import energies
from pushforward.guidance.inpaint import inpaint
from pushforward.guidance.steering import STEERINGS
from pushforward.linear import VP, Blurring, Gaussian, Langevin
from pushforward.maps.spec import SamplerSpec, parse
from pushforward.model import Network
from pushforward.plan import SOLVERS, grid
from support.fake_device import NAME, Elsewhere
from support.pipelines import flux, stable_diffusion

SIDE = 4
PROCESSES = {"vp": VP(), "blurring": Blurring((SIDE, SIDE), blur_max=2.0), "langevin": Langevin()}
WAYS = {
    "exact": pf.Exact(),
    "implicit": pf.Implicit(tolerance=1e-5),
    "phantom": pf.Phantom(2),
    "skeleton": pf.Skeleton(),
}


class Net(torch.nn.Module):
    """Some convolutions to an image; the time and a class shift them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Conv2d(channels, 8, 3, 1, 1), torch.nn.Conv2d(8, 1, 3, 1, 1)
        self.told = torch.nn.Embedding(4, 8)

    def forward(self, u, t, label=None):
        label = torch.full((len(u),), 3, device=u.device) if label is None else label
        shift = self.told(label) + t[:, None].to(u.dtype)
        return 0.3 * self.last(torch.tanh(self.first(u) + shift[..., None, None]))


@pytest.fixture(autouse=True)
def fake_device():
    with Elsewhere():
        yield


@pytest.fixture(params=PROCESSES)
def models(request):
    """The same model here and there."""
    torch.manual_seed(0)
    process = PROCESSES[request.param]
    net = Net(process.blocks).double()
    made = []
    for device in ("cpu", NAME):
        network = Network(copy.deepcopy(net).to(device), "sample", unconditional=torch.tensor(3))
        made.append(pf.Model("net", process, network, (1, SIDE, SIDE), Gaussian(0.25), classes=("a", "b", "c")))
    return made


def there_as_here(models, make):
    """What `make(model)` makes is the same, in float64."""
    here, there = (make(model) for model in models)
    torch.testing.assert_close(there.cpu(), here, rtol=1e-6, atol=1e-8)


def diffusion(model, sampler="ddim", steps=4, **settings):
    return pf.Diffusion(model, SamplerSpec(sampler, steps, settings).plan(model), dtype=torch.float64)


def test_tensors_of_two_devices_are_refused():
    """Else nothing here says anything."""
    with pytest.raises(RuntimeError, match="on the CPU"):
        torch.zeros(3, device=NAME) + torch.zeros(3)


@pytest.mark.parametrize("sampler", ["auto", "ddpm", "heun"])
def test_samples(models, sampler):
    labels = torch.tensor([0, 1])
    there_as_here(models, lambda model: diffusion(model, sampler).given(labels, 2.0).sample(2))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_all_steps_at_once(models, eta):
    method = parse("ddim:parallel=preconditioned").method(diffusion(models[0]).plan)
    there_as_here(models, lambda model: diffusion(model, eta=eta).run_by(parallel=method).sample(2))


def test_codes(models):
    images = torch.rand(2, 1, SIDE, SIDE, dtype=torch.float64)
    there_as_here(models, lambda model: diffusion(model, "ddpm").encode(images).code.variables())

    def inverted(model):
        plan = SOLVERS["ddim"](model.process, grid.power(model.process, 4, end=model.process.t_min))
        return pf.Diffusion(model, plan, dtype=torch.float64).invert(images).code.start

    there_as_here(models, inverted)


@pytest.mark.parametrize("way", WAYS)
def test_gradients(models, way):
    def slope(model):
        sampler = diffusion(model)
        start = sampler.draw(2).start.requires_grad_()
        method = None if way == "exact" else parse("ddim:parallel=preconditioned").method(sampler.plan)
        images = sampler.run_by(parallel=method, gradient=WAYS[way]).decode(pf.Code(start))
        return torch.autograd.grad(images.square().sum(), start)[0]

    there_as_here(models, slope)


def energy(images, code):
    return 5 * (images.mean((1, 2, 3)) - 0.3).square()


@pytest.mark.parametrize("chain", [pf.langevin(), pf.mala(), pf.hmc(leaps=2)], ids=["langevin", "mala", "hmc"])
def test_chains_go_on(models, chain):
    def guided(model):
        states, few = [], diffusion(model, steps=3)
        pf.guide(few, energy, chain, pf.Schedule(4), chains=2, callback=states.append)
        return pf.guide(few, energy, chain, pf.Schedule(4), chains=2, resume=states[2]).images

    there_as_here(models, guided)


@pytest.mark.parametrize("optimiser", ["adam", "l-bfgs", "white"])
def test_descents(models, optimiser):
    there_as_here(
        models, lambda m: pf.best(diffusion(m, steps=3), energy, steps=3, count=2, optimiser=optimiser).images
    )


@pytest.mark.parametrize("method", ["dps", "lgd", "tfg"])
def test_steering(models, method):
    def steered(model):
        return diffusion(pf.steered(model, energies.of(energy), STEERINGS[method]), steps=3, eta=1.0).sample(2)

    there_as_here(models, steered)


def test_inpainting(models):
    images, known = torch.rand(2, 1, SIDE, SIDE), torch.rand(1, SIDE, SIDE) < 0.5
    there_as_here(models, lambda model: inpaint(diffusion(model, "ddpm", repeats=2), images, known, draws=2))


@pytest.mark.parametrize("offload", [False, True], ids=["whole", "offloaded"])
def test_pipelines(offload, tmp_path):
    """Moved there whole, or part by part as they are needed; to rounding in float32."""
    pipe = (stable_diffusion if offload else flux)(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    found = []
    for place in ("cpu", NAME):
        if place == NAME and offload:
            pipe.enable_model_cpu_offload(device=NAME)
        elif place == NAME:
            pipe.to(NAME)
        model = pf.from_pipeline(pipe, prompt="a fox", guidance_scale=3.0, height=8, width=8)
        assert model.device.type == place
        assert model.module.rows.together == "times"
        images = model.sample(1, solver="ddim", steps=2)
        start = torch.zeros(model.state_shape(1), device=place, requires_grad=True)
        slope = torch.autograd.grad(model.module(start, torch.full((1,), 0.5, device=place)).sum(), start)[0]
        found.append([x.cpu() for x in (images, model.latents(images.to(place)), slope)])
        if place == NAME and offload:
            assert {part.device.type for part in (pipe.vae, pipe.text_encoder)} == {"cpu"}
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)
