"""Steering: against exact conditional denoisers, published formulas and known conditional Gaussians."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from pushforward.denoiser import Function
from pushforward.errors import PushforwardError
from pushforward.execute import Parallel, run
from pushforward.guidance.energies.energy import of
from pushforward.guidance.inpaint import inpainted
from pushforward.guidance.steering import STEERINGS, Steering, classified, steered
from pushforward.linear import VP, Flow, Gaussian, Process
from pushforward.maps.code import Code
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.spec import parse
from pushforward.model import Model, Network
from pushforward.plan import SOLVERS, grid
from pushforward.plan.recurrence import repeated
from support.helpers import FIELD, PROCESSES, gaussian_denoiser, mixture_denoiser, normal, times

NAMES = ("vp", "flow", "blurring", "langevin", "blurring-langevin")
EXACT = Steering(through=1, floor=0)


def states(process: Process, time: float, count: int = 3) -> Tensor:
    """Noised images of the time."""
    clean = process.lift(0.5 * normal(count, 1, *FIELD))
    t, zero = times(time), times(0)
    noise = process.covariance(t).cholesky()[0](normal(*clean.shape, seed=1))
    return process.transition(t, zero)[0](clean) + noise


def answers(model: Model, time: float, u: Tensor) -> Tensor:
    return model.denoiser.at(model.process, times(time), u)(0, u)


def near(target: Tensor, weight: float = 1.0) -> Callable[[Tensor, Code], Tensor]:
    return lambda images, code: weight / 2 * (images - target.to(images)).flatten(1).square().sum(1)


class Net(nn.Module):
    """A nonlinear network whose label adds to what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(1, 1, 3, padding=1, dtype=torch.float64)
        self.calls = 0

    def forward(self, u: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        self.calls += 1
        shift = 0 if label is None else 0.1 * label.view(-1, 1, 1, 1)
        return torch.tanh(self.mix.to(u.dtype)(u) + t.to(u.dtype).view(-1, 1, 1, 1)) + shift


def network_model(**settings: object) -> Model:
    network = Network(Net().requires_grad_(False), "epsilon", **settings)  # type: ignore[arg-type]
    return Model("net", VP(), network, (1, *FIELD), classes=("a", "b", "none"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("time", [0.2, 0.7])
def test_a_weak_energy_moves_the_answer_as_bayes_rule_does(name: str, time: float) -> None:
    """The exact answer for data N(m, c) tilted by w / 2 |x - y|^2 is that of another Gaussian.

    The change is of first order in w c = 2.5e-5, which is the relative error of what is left out; 1e-4 allows for that
    and for 2 x 2 blocks near the end of the noise.
    """
    process, weight, variance, mean, target = PROCESSES[name], 1e-4, 0.25, 0.2, -0.5
    precision = 1 / variance + weight
    tilted = Gaussian(1 / precision, (mean / variance + weight * target) / precision)
    plain = Model("gaussian", process, gaussian_denoiser(process, Gaussian(variance, mean)), (1, *FIELD))
    guided = steered(plain, near(torch.tensor(target), weight), EXACT)
    exact = replace(plain, denoiser=gaussian_denoiser(process, tilted))
    u = states(process, time)
    before, found, truth = (answers(model, time, u) for model in (plain, guided, exact))
    assert (truth - before).norm() > 1e-6
    assert ((found - truth).norm() / (truth - before).norm()) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_an_exact_classifier_gives_the_exact_conditional_model(name: str) -> None:
    """With log p(y | u) of a mixture's classes the answers are those of the class's own mixture, to rounding."""
    process, variance = PROCESSES[name], 0.05
    centres, chosen = normal(3, 1, *FIELD, seed=5), slice(0, 2)
    data = Gaussian(variance)

    def energy(u: Tensor, t: Tensor) -> Tensor:
        time = t[0].double()
        psi = process.transition(time, torch.zeros_like(time))
        white = data.covariance(process, time).cholesky().inverse()
        far = (white(u).flatten(1)[:, None] - white(psi(process.lift(centres))).flatten(1)).square().sum(-1)
        return -torch.log_softmax(-far / 2, 1)[:, chosen].logsumexp(1)

    plain = Model("mixture", process, mixture_denoiser(process, centres, variance), (1, *FIELD))
    guided = classified(plain, energy, floor=0)
    exact = replace(plain, denoiser=mixture_denoiser(process, centres[chosen], variance))
    for time in (0.2, 0.7):
        u = states(process, time)
        assert not torch.allclose(answers(plain, time, u), answers(exact, time, u), atol=1e-4)
        torch.testing.assert_close(answers(guided, time, u), answers(exact, time, u), rtol=1e-6, atol=1e-7)


def test_classifiers_of_states_of_16_bits_are_told_times_as_networks_are() -> None:
    """bfloat16 has .5 in the place of .501; networks are told times of float32."""
    process, told = VP(), []

    def energy(u: Tensor, t: Tensor) -> Tensor:
        told.append(t)
        return u.sum((1, 2, 3))

    model = Model("gaussian", process, gaussian_denoiser(process, Gaussian(1.0)), (1, *FIELD))
    answers(classified(model, energy), 0.501, normal(2, 1, *FIELD).bfloat16())
    assert told[0].tolist() == pytest.approx([0.501] * 2, rel=1e-6)


def test_classifier_guidance_draws_the_classes_components_in_their_frequencies() -> None:
    """Two of three components are wanted: half each. 400 images have a standard error of .025; .1 are four."""
    process, centres = VP(), torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64).view(3, 1, 1, 1)

    def energy(u: Tensor, t: Tensor) -> Tensor:
        psi = process.transition(t.double(), torch.zeros_like(t.double())).coefficients.view(-1, 1).to(u)
        spread = 1 - psi.square() * (1 - 0.01)
        return -torch.log_softmax(-(u.flatten(1) - psi * centres.view(1, 3).to(u)).square() / spread / 2, 1)[
            :, [0, 2]
        ].logsumexp(1)

    model = classified(Model("three", process, mixture_denoiser(process, centres, 0.01), (1, 1, 1)), energy)
    plan = SOLVERS["ddim"](process, grid.power(process, 30))
    drawn = Diffusion(model, plan).sample(400, batch=400).flatten()
    assert (drawn.abs() > 0.5).float().mean() > 0.99
    assert abs(float((drawn > 0).float().mean()) - 0.5) < 0.1


def test_lgd_is_exact_for_data_of_variance_one() -> None:
    """Its noise then has the posterior's deviation, and a quadratic energy of any weight is followed exactly.

    1024 samples of one number leave 1 / sqrt(1024) = .03 of the change, times a few for the weights; without them
    (spread 0) the change is too large by the weight times the posterior variance, here of 1.
    """
    process, weight = VP(), 2.0
    plain = Model("gaussian", process, gaussian_denoiser(process, Gaussian(1.0)), (1, 1, 1))
    exact = replace(plain, denoiser=gaussian_denoiser(process, Gaussian(1 / (1 + weight), weight / (1 + weight))))
    u, time = torch.tensor([-0.3, 0.2, 0.9], dtype=torch.float64).view(3, 1, 1, 1), 0.3
    energy = near(torch.tensor(1.0), weight)
    change = answers(exact, time, u) - answers(plain, time, u)
    for settings, low, high in ((replace(EXACT, spread=1, samples=1024), 0, 0.12), (EXACT, 0.3, 10)):
        error = answers(steered(plain, energy, settings), time, u) - answers(exact, time, u)
        assert low <= error.norm() / change.norm() < high


def test_universal_guidance_is_as_published() -> None:
    """Algorithm 1 of arXiv 2302.07121 in its own terms: a change of the noise prediction, forward and backward."""
    model, time, strength, rate = network_model(), 0.4, 0.7, 0.05
    steering = Steering(through=strength, direct=rate, inner=3, floor=0)
    energy, u = near(torch.tensor(0.3)), states(VP(), time).requires_grad_()
    alpha = VP().transition(times(time), times(0)).coefficients.flatten()
    sigma = VP().covariance(times(time)).coefficients.flatten().sqrt()
    noise = model.denoiser.module(u, torch.full((3,), time), None)
    clean = (u - sigma * noise) / alpha
    noise = noise + strength * sigma * torch.autograd.grad(energy(clean, Code(u)).sum(), u)[0]
    delta = torch.zeros_like(clean)
    for _ in range(3):
        delta = delta - rate * (clean.detach() + delta - 0.3)
    noise = noise - alpha / sigma * delta
    with torch.no_grad():
        found = answers(steered(model, energy, steering), time, u)
    torch.testing.assert_close(found, ((u - sigma * noise) / alpha).detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*STEERINGS, "size"])
def test_rows_do_not_depend_on_their_batch_and_no_weight_is_no_guidance(name: str) -> None:
    """Rows at times of their own are as each alone, to float32's rounding; with weight 0 all bits are the model's."""
    steering = STEERINGS.get(name, Steering(through=0.1, normalise="size"))
    model, u = network_model(clip=4.0, unconditional=torch.tensor([2])), normal(4, 1, *FIELD).float()
    model = model.given(torch.tensor([0, 1, 1, 0]), guidance=2.0)
    energy, moments = of(near(torch.tensor(0.5))), times(0.4, 0.2)
    k, rows = torch.tensor([0, 1, 1, 0]), torch.tensor([3, 1, 0, 2])
    with torch.no_grad():
        plain, guided, none = (
            one.denoiser.at(model.process, moments, u)
            for one in (model, steered(model, energy, steering), steered(model, 0 * energy, steering))
        )
        found = guided(k, u, rows)
        assert not torch.allclose(found, plain(k, u, rows), atol=1e-3)
        assert torch.equal(none(k, u, rows), plain(k, u, rows))
        alone = torch.cat([guided(int(k[i]), u[i : i + 1], rows[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
    if name == "size":
        sizes = (found - plain(k, u, rows)).square().flatten(1).mean(1).sqrt()
        torch.testing.assert_close(sizes, torch.full((4,), 0.1), rtol=1e-3, atol=0)


def test_direct_guidance_asks_the_network_once_and_needs_no_gradient_of_it() -> None:
    calls: list[float] = []

    def denoise(u: Tensor, t: float) -> Tensor:
        calls.append(t)
        return torch.tanh(u.detach())

    blind, u = Model("blind", VP(), Function(denoise), (1, *FIELD)), states(VP(), 0.5)
    found = answers(steered(blind, near(torch.tensor(1.0)), STEERINGS["mpgd"]), 0.5, u)
    assert calls == [0.5]
    torch.testing.assert_close(found, torch.ones_like(found))  # a step of 1 along (D - 1) ends at 1
    with pytest.raises(PushforwardError, match="through=0"):
        answers(steered(blind, near(torch.tensor(1.0)), STEERINGS["dps"]), 0.5, u)


def test_gradients_pass_through_a_steered_answer() -> None:
    """Against finite differences, in float64."""
    steering = Steering(through=0.5, direct=0.2, inner=2, spread=0.3, samples=2, normalise="residual")
    model = steered(network_model(), near(torch.tensor(0.4)), steering)
    u = states(VP(), 0.5, 1).requires_grad_()
    assert torch.autograd.gradcheck(partial(answers, model, 0.5), (u,))
    assert not answers(model, 0.5, u.detach()).requires_grad


def test_labels_reach_the_network_within() -> None:
    """`Model.given` tells the network that is steered, in either order."""
    model = network_model(unconditional=torch.tensor([2]))
    labels, energy = torch.tensor([0, 1, 1]), near(torch.tensor(0.5))
    u = states(VP(), 0.5)
    after = steered(model, energy, STEERINGS["tfg"]).given(labels, 2.0)
    before = steered(model.given(labels, 2.0), energy, STEERINGS["tfg"])
    assert torch.equal(answers(after, 0.5, u), answers(before, 0.5, u))
    assert not torch.allclose(answers(after, 0.5, u), answers(steered(model, energy, STEERINGS["tfg"]), 0.5, u))


def test_energies_of_a_latent_model_see_decoded_images() -> None:
    model = replace(network_model(), decoder=lambda latents: 2 * latents, image_shape=(1, *FIELD))
    found = answers(steered(model, near(torch.tensor(1.0)), Steering(direct=0.25)), 0.5, states(VP(), 0.5))
    torch.testing.assert_close(found, torch.full_like(found, 0.5))  # D - (2 D - 1) 2 / 4


def mixture(process: Process) -> Model:
    return Model("mixture", process, mixture_denoiser(process, normal(3, 1, *FIELD, seed=5), 0.05), (1, *FIELD))


@pytest.mark.parametrize(("name", "solver"), [("vp", "ddpm"), ("flow", "dpm++"), ("langevin", "gddim")])
def test_a_steered_plan_runs_all_at_once_as_step_by_step(name: str, solver: str) -> None:
    """To the parallel run's tolerance of 1e-5, times ten for what is left of the plan."""
    process = PROCESSES[name]
    model = steered(mixture(process), near(torch.tensor(0.5), 0.5), STEERINGS["lgd"])
    plan = SOLVERS[solver](process, grid.power(process, 6))
    sampler = Diffusion(model, plan, dtype=torch.float64)
    images = sampler.sample(2)
    assert not torch.allclose(images, Diffusion(mixture(process), plan, dtype=torch.float64).sample(2), atol=1e-2)
    torch.testing.assert_close(sampler.run_by(parallel=Parallel(tolerance=1e-5)).sample(2), images, rtol=0, atol=1e-4)


def pair(share: float = 0.9) -> Model:
    """Two pixels of variance 1 and correlation `share`."""
    frequencies = torch.tensor([[1 + share, 1 - share]], dtype=torch.float64)
    return Model("pair", VP(), gaussian_denoiser(VP(), Gaussian(frequencies)), (1, 1, 2))


def test_inpainting_keeps_known_pixels_and_repeats_tell_the_others() -> None:
    """Given one pixel is 1, the other is N(.9, .19): 1500 draws have a standard error of .011 in the mean.

    Five turns of each step halve the error of one turn at least, and leave less than .1.
    """
    model = inpainted(pair(), torch.ones(1, 1, 2), torch.tensor([True, False]))
    errors = []
    for repeats in (1, 5):
        plan = repeated(SOLVERS["ddpm"], VP(), grid.power(VP(), 10), repeats)
        drawn = Diffusion(model, plan).sample(1500, batch=1500)[:, 0, 0]
        assert torch.equal(drawn[:, 0], torch.ones(1500))
        errors.append((abs(float(drawn[:, 1].mean()) - 0.9), abs(float(drawn[:, 1].var()) - 0.19)))
    assert errors[1][0] < min(0.1, errors[0][0] / 2)
    assert errors[1][1] < 0.1


def test_known_pixels_may_differ_from_image_to_image() -> None:
    images, mask = normal(3, 1, *FIELD), torch.rand(1, *FIELD) > 0.5
    process, rows = PROCESSES["langevin"], torch.tensor([2, 0])
    model = inpainted(mixture(process), images, mask)
    u = states(process, 0.5, 2)
    found = process.image(model.denoiser.at(process, times(0.5), u)(0, u, rows))
    plain = process.image(answers(mixture(process), 0.5, u))
    assert torch.equal(found, torch.where(mask, images[rows], plain))
    with pytest.raises(PushforwardError, match="3 images with known pixels do not fit a batch of 2"):
        answers(model, 0.5, u)
    with pytest.raises(PushforwardError, match="inpaints images of shape"):
        inpainted(model, images, torch.ones(7, 7))


@pytest.mark.parametrize("name", ["flow", "blurring-langevin"])
def test_a_repeated_plan_keeps_the_marginals(name: str) -> None:
    """Steps that are exact for Gaussian data, and exact noise, end at those data whatever the number of turns.

    Checked on the mean and variance of 12000 numbers: standard errors .0046 and .0032; four of them are allowed.
    """
    process, data = PROCESSES[name], Gaussian(0.25, 0.3)
    make = partial(SOLVERS["gddim"], reference=data)
    plan = repeated(make, process, grid.power(process, 3), 3)
    assert plan.nfe == 9
    assert len(plan.times) == 4
    model = Model("gaussian", process, gaussian_denoiser(process, data), (1, *FIELD), reference=data)
    drawn = Diffusion(model, plan, dtype=torch.float64).sample(2000, batch=2000)
    assert abs(float(drawn.mean()) - 0.3) < 4 * 0.0046
    assert abs(float(drawn.var()) - 0.25) < 4 * 0.0032


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "heun"])
def test_one_turn_is_the_solvers_own_plan(solver: str) -> None:
    """To rounding, which few steps of a stiff process amplify."""
    process = PROCESSES["langevin"]
    steps = grid.power(process, 4, end=process.t_min)
    own, same = SOLVERS[solver](process, steps), repeated(SOLVERS[solver], process, steps, 1)
    assert (same.nfe, same.noises, same.steps) == (own.nfe, own.noises, own.steps)
    start = process.lift(normal(2, 1, *FIELD))
    first, second = (
        run(plan, mixture(process).denoiser, start, noise=lambda k: normal(*start.shape, seed=k))
        for plan in (own, same)
    )
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


def test_a_repeated_plan_encodes_and_runs_all_at_once() -> None:
    """Codes give the images back to rounding that adds up over 12 steps; parallel runs to ten times 1e-5."""
    process = VP()
    plan = repeated(SOLVERS["ddpm"], process, grid.power(process, 6, end=process.t_min), 2)
    model = steered(mixture(process), near(torch.tensor(0.5), 0.5), STEERINGS["dps"])
    sampler = Diffusion(model, plan, dtype=torch.float64)
    images = sampler.sample(2)
    code = sampler.encode(images.double()).code
    torch.testing.assert_close(sampler.decode(code), images.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sampler.run_by(parallel=Parallel(tolerance=1e-5)).sample(2), images, rtol=0, atol=1e-4)


def test_a_sampler_in_words_repeats_its_steps() -> None:
    plan = replace(parse("ddim:repeats=3"), steps=4).plan(mixture(VP()))
    assert (plan.nfe, len(plan.noises), plan.settings["repeats"]) == (12, 8, 3)
    with pytest.raises(PushforwardError, match="whole number"):
        replace(parse("ddim:repeats=2.5"), steps=4).plan(mixture(VP()))


@pytest.mark.parametrize("strengths", [{"direct": 0.1}, {"through": 1.0, "direct": 0.1}])
def test_energies_in_float64_leave_states_in_their_own_type(strengths: dict[str, float]) -> None:
    """The network of a steered model is asked in the type of its weights, whatever the energy computes in."""
    model = steered(mixture(VP()), near(torch.tensor(0.5), 0.5), Steering(normalise="residual", **strengths))
    u = states(VP(), 0.5, 2).float()
    assert answers(model, 0.5, u).dtype == torch.float32


def test_what_cannot_be_is_refused() -> None:
    for settings in ({"inner": 0}, {"samples": 2}, {"spread": -1.0}, {"floor": float("nan")}):
        with pytest.raises(PushforwardError, match=r"Steering|spread"):
            Steering(through=1, **settings)  # type: ignore[arg-type]
    with pytest.raises(PushforwardError, match="repeats = 0"):
        repeated(SOLVERS["ddim"], VP(), grid.power(VP(), 3), 0)
    with pytest.raises(PushforwardError, match="implicit"):
        repeated(SOLVERS["collocation"], VP(), grid.power(VP(), 3), 2)
    flow = Model("flow", Flow(), gaussian_denoiser(Flow(), Gaussian(0.25)), (1, *FIELD))
    with pytest.raises(PushforwardError, match="no signal"):
        answers(steered(flow, near(torch.tensor(1.0)), EXACT), 1.0, normal(1, 1, *FIELD))
    assert answers(steered(flow, near(torch.tensor(1.0))), 1.0, normal(1, 1, *FIELD)).isfinite().all()
    with pytest.raises(PushforwardError, match="samples of noise to steer by would take"):
        many = Steering(through=1, spread=1, samples=10**12)
        answers(steered(flow, near(torch.tensor(1.0)), many), 0.5, normal(1, 1, *FIELD))
    with pytest.raises(PushforwardError, match="one number per state"):
        answers(classified(flow, lambda u, t: u.sum()), 0.5, normal(1, 1, *FIELD))
    with pytest.raises(PushforwardError, match="latents"):
        inpainted(replace(flow, decoder=lambda x: x), torch.ones(1, *FIELD), torch.ones(FIELD))
