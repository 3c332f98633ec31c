"""Densities of paths: against Gaussians in closed form, their integrals, and the gradient of a policy."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

import pushforward as pf
from pushforward.errors import PushforwardError
from pushforward.execute.density import Path, log_densities, walk
from pushforward.linear import VP, Blurring, BlurringLangevin, Langevin
from pushforward.plan.registry import plan_of
from support.helpers import gaussian_denoiser, mixture_denoiser, normal

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (2, 3, 2)  # channels and sides
PROCESSES = {
    "vp": VP(), "langevin": Langevin(), "blurring": Blurring(field=(3, 2), blur_max=2.0),
    "blurring-langevin": BlurringLangevin(field=(3, 2), blur_max=2.0),
}  # fmt: skip
SOLVERS = {
    "ddpm": {}, "ddim": {"eta": 0.7}, "gddim": {"noise": 1.0}, "exponential": {"order": 2, "noise": 1.0},
    "dpm++": {"noise": 1.0}, "euler-maruyama": {}, "sscs": {"order": 2},
}  # fmt: skip
CASES = [(name, solver) for name in PROCESSES for solver in SOLVERS]


def plan_for(name, solver, steps=3):
    process = PROCESSES[name]
    if solver == "sscs" and name.startswith("blurring"):
        pytest.skip("sscs is for VP and Langevin")
    return plan_of(process, solver, pf.grid.uniform(process, steps), dict(SOLVERS[solver]))


def start_of(process, count=3):
    channels, *field = SHAPE
    return normal(count, channels * process.blocks, *field, seed=5)


def noises_of(plan, start, seed=6):
    random = torch.Generator().manual_seed(seed)
    return {k: torch.randn(start.shape, generator=random, dtype=start.dtype) for k in plan.noises}


def denoiser_of(process):
    images = normal(2, *SHAPE, seed=1) / 2
    return mixture_denoiser(process, images, 0.1)


@pytest.mark.parametrize(("name", "solver"), CASES)
def test_each_move_has_the_density_of_its_gaussian(name, solver):
    """By dense matrices: the mean where the move's noise is 0, the covariance of its Jacobian, on what that reaches.

    float64; singular values below 1e-9 of the largest are rounding.
    """
    plan = plan_for(name, solver)
    process = plan.process
    start, denoiser = start_of(process), denoiser_of(process)
    noises = noises_of(plan, start)
    path = walk(plan, denoiser, start, noises.__getitem__)
    found = log_densities(plan, denoiser, path)
    assert found.shape == (len(plan.noises), len(start))
    for i, k in enumerate(plan.noises):

        def state(noise: Tensor, i: int = i, k: int = k) -> Tensor:
            return walk(plan, denoiser, start, lambda n: noise if n == k else noises[n]).states[i]

        mean = state(torch.zeros_like(start))
        jacobian = torch.autograd.functional.jacobian(lambda x: state(x).flatten(1).sum(0), noises[k])
        for image in range(len(start)):
            matrix = jacobian[:, image].flatten(1)
            left, sizes, _ = torch.linalg.svd(matrix)
            rank = int((sizes > 1e-9 * sizes[0]).sum())
            there = left[:, :rank].T @ (path.states[i, image] - mean[image]).flatten() / sizes[:rank]
            expected = -0.5 * there.square().sum() - sizes[:rank].log().sum() - 0.5 * rank * math.log(2 * math.pi)
            assert float(found[i, image]) == pytest.approx(float(expected), rel=1e-7)


def test_a_path_has_the_joint_density_of_its_states():
    """Gaussian data make all states of a path jointly Gaussian; its matrix comes of the Jacobian in all noises."""
    process = VP()
    plan = plan_of(process, "ddpm", pf.grid.uniform(process, 3), {})
    denoiser = gaussian_denoiser(process, pf.Gaussian(0.3))
    start = normal(1, 1, 2, seed=1)
    noises = torch.stack([*noises_of(plan, start).values()])

    def states(noises: Tensor) -> Tensor:
        drawn = iter(noises)
        return walk(plan, denoiser, start, lambda _: next(drawn)).states.flatten()

    jacobian = torch.autograd.functional.jacobian(states, noises).flatten(1)
    joint = MultivariateNormal(states(torch.zeros_like(noises)), jacobian @ jacobian.T)
    drawn = iter(noises)
    path = walk(plan, denoiser, start, lambda _: next(drawn))
    expected = float(joint.log_prob(path.states.flatten()))
    assert float(log_densities(plan, denoiser, path).sum()) == pytest.approx(expected, rel=1e-9)


def test_the_density_integrates_to_one():
    """Over one number, by the trapezium rule: its error is far below 1e-6 for a Gaussian that ends inside the range."""
    process = VP()
    plan = plan_of(process, "ddpm", pf.grid.uniform(process, 3), {})
    denoiser = mixture_denoiser(process, torch.tensor([[[0.5]], [[-0.7]]], dtype=torch.float64), 0.05)
    values = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    start, last = torch.full((4001, 1, 1), 0.4, dtype=torch.float64), torch.zeros(4001, 1, 1, dtype=torch.float64)
    before = normal(1, 1, 1, seed=3).expand(4001, 1, 1)
    path = Path(start, torch.stack([before, values.view(-1, 1, 1)]), last)
    found = log_densities(plan, denoiser, path, moves=[1])[0].exp()
    assert float(torch.trapezoid(found, values)) == pytest.approx(1, abs=1e-6)


def test_a_move_of_ddpm_is_the_textbook_s():
    """The posterior of u_s given u_t and x: mean and variance of Ho et al., equation 7, with the network's x."""
    process = VP()
    times = pf.grid.uniform(process, 4)
    plan = plan_of(process, "ddpm", times, {})
    denoiser = denoiser_of(process)
    start = start_of(process)
    path = walk(plan, denoiser, start, noises_of(plan, start).__getitem__)
    alpha, sigma = process.alpha_sigma(times)
    x = denoiser.at(process, times[:1], start)(0, start)
    step = alpha[0] / alpha[1]
    variance = sigma[1] ** 2 / sigma[0] ** 2 * (sigma[0] ** 2 - step**2 * sigma[1] ** 2)
    mean = step * sigma[1] ** 2 / sigma[0] ** 2 * start + alpha[1] * (1 - step**2 * sigma[1] ** 2 / sigma[0] ** 2) * x
    expected = Normal(mean, variance.sqrt()).log_prob(path.states[0]).flatten(1).sum(1)
    assert torch.allclose(log_densities(plan, denoiser, path)[0], expected, rtol=1e-9)


class Asked:
    """A denoiser with a parameter, that counts the states it sees."""

    def __init__(self, inner, shift):
        self.inner, self.shift, self.count = inner, shift, 0

    def at(self, process, times, like):
        ask = self.inner.at(process, times, like)

        def answer(k, u, of=None):
            self.count += len(u)
            return ask(k, u, of) + self.shift * u.tanh()

        return answer


@pytest.mark.parametrize(("name", "solver"), [("vp", "ddpm"), ("blurring", "dpm++"), ("langevin", "euler-maruyama")])
def test_the_gradient_in_parameters_is_the_difference(name, solver):
    """A central difference of 1e-5 in float64 errs by about 1e-9 of the value."""
    plan = plan_for(name, solver)
    start = start_of(plan.process)
    network = Asked(denoiser_of(plan.process), torch.zeros((), dtype=torch.float64))
    path = walk(plan, network, start, noises_of(plan, start).__getitem__)

    def value(shift: float) -> Tensor:
        network.shift = torch.tensor(shift, dtype=torch.float64, requires_grad=True)
        return log_densities(plan, network, path).sum()

    (slope,) = torch.autograd.grad(value(0.01), network.shift)
    with torch.no_grad():
        expected = (value(0.01 + 1e-5) - value(0.01 - 1e-5)) / 2e-5
    assert float(slope) == pytest.approx(float(expected), rel=1e-6)


def test_single_moves_ask_about_single_states():
    plan = plan_for("vp", "ddpm")
    start = start_of(plan.process)
    network = Asked(denoiser_of(plan.process), 0.1)
    path = walk(plan, network, start, noises_of(plan, start).__getitem__)
    whole = log_densities(plan, network, path)
    for move in range(len(plan.noises)):
        network.count = 0
        assert torch.allclose(log_densities(plan, network, path, moves=[move])[0], whole[move], rtol=1e-12)
        assert network.count == len(start)
    for image in range(len(start)):
        alone = log_densities(plan, network, path[image : image + 1])
        assert torch.allclose(alone, whole[:, image : image + 1], rtol=1e-12)


def test_what_noise_does_not_reach_has_no_density():
    """The last step of gDDIM on Langevin's diffusion to time 0 has noise in the velocity alone."""
    process = Langevin()
    plan = plan_of(process, "gddim", pf.grid.uniform(process, 3), {"noise": 1.0})
    start, denoiser = start_of(process), denoiser_of(process)
    path = walk(plan, denoiser, start, noises_of(plan, start).__getitem__)
    assert bool(log_densities(plan, denoiser, path).isfinite().all())
    path.states[-1, 1, 0] += 0.1  # the picture
    found = log_densities(plan, denoiser, path)
    assert float(found[-1, 1]) == -math.inf
    assert bool(found[-1, [0, 2]].isfinite().all())


# -- a model's ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampler():
    model = pf.load("fashion-vp")
    plan = plan_of(model.process, "ddim", pf.grid.uniform(model.process, 4), {"eta": 1.0})
    return pf.Diffusion(model, plan).given(["bag", "coat"], 2)


def test_a_model_s_paths_lead_to_the_images_of_their_codes(sampler):
    code = sampler.draw(2, seed=1)
    path = sampler.path(code)
    assert torch.equal(sampler.images(path), sampler.decode(code))
    found = sampler.log_prob(path)
    expected = -0.5 * code.noises.flatten(2).square().sum(2)
    sizes = (found - expected).std(1)  # what is left is of the noise's size alone, the same for both images
    assert float(sizes.max()) < 1e-3 * float(expected.abs().max())  # float32: noises found again by differences


def test_a_policy_gradient_makes_images_brighter(sampler):
    """One step along the gradient of the mean reward, in one parameter of the network, raises the reward."""
    model = pf.load("fashion-vp")
    free = pf.Diffusion(model, sampler.plan)
    path = free.path(free.draw(24, seed=2))
    reward = free.images(path).flatten(1).mean(1)
    advantage = (reward - reward.mean()) / reward.std()
    bias = [value for name, value in model.module.named_parameters() if name.endswith("bias")][-1]
    bias.requires_grad_(True)
    loss = -(advantage * free.log_prob(path).sum(0)).mean()
    (slope,) = torch.autograd.grad(loss, bias)
    with torch.no_grad():
        bias -= 0.05 * slope / slope.norm()
        brighter = free.images(free.path(free.draw(24, seed=2))).flatten(1).mean(1)
    assert float((brighter - reward).mean()) > 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s, p: pf.Diffusion(s.model, pf.solvers.ddim(s.model.process, s.times)).log_prob(p), "is deterministic"),
        (lambda s, p: s.log_prob(Path(p.start, p.states[:2], p.last)), "has states of shape"),
        (lambda s, p: s.log_prob(p, moves=[3]), "moves of this plan of 'ddim' are 0 to 2; got [3]"),
    ],
)
def test_what_does_not_fit_is_said(sampler, call, said):
    path = sampler.path(sampler.draw(2))
    with pytest.raises(PushforwardError) as error:
        call(sampler, path)
    assert said in str(error.value)
