"""Translation between models, against closed forms: Gaussians and points, whose flows and codes are known."""

import math

import pytest
import torch

from pushforward.errors import PushforwardError
from pushforward.linear import VE, VP, Blurring, Flow, Gaussian, Langevin
from pushforward.maps.code import Code
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.spec import SamplerSpec
from pushforward.model import Model
from pushforward.plan import exponential, grid
from pushforward.translation.translate import TRANSLATIONS, code_of, refined, sampler_for, translate
from support.helpers import (
    DETERMINISTIC,
    FIELD,
    PROCESSES,
    exact_flow,
    gaussian_denoiser,
    mixture_denoiser,
    normal,
    point_denoiser,
)

KINDS = {p.name: p for p in (VP(), Blurring(FIELD, blur_max=2.0), Langevin())}
EVERY = pytest.mark.parametrize("process", KINDS.values(), ids=KINDS)
SHAPE = (1, *FIELD)
INVERSION = 1e-4  # the greatest error that inversion allows itself, by default
ONE, TWO = Gaussian(0.3, 0.4), Gaussian(0.05, -0.2)


def gaussian(process, data):
    return Model("gaussian", process, gaussian_denoiser(process, data), SHAPE)


def mixture(process, seed=0, variance=0.01):
    return Model("mixture", process, mixture_denoiser(process, normal(3, *SHAPE, seed=seed), variance), SHAPE)


def end(model, plan):
    return Diffusion(model, plan, dtype=torch.float64)


def made(model, method, *, steps=6, start=1.0, solver="ddim", **settings):
    """A model with the plan that the method needs, as `sampler_for` makes it."""
    sampler = SamplerSpec(solver, steps, settings, start=start)
    return end(model, sampler_for(model, sampler, method).plan(model))


def images(count=4, seed=7):
    return 0.3 * normal(count, *SHAPE, seed=seed) + 0.1


# -- the one code of a deterministic plan


@EVERY
def test_between_gaussians_it_is_the_exact_flow_there_and_back(process):
    """`m2 + R2 R1^-1 (x - m1)`: the state at t_min is carried to t_max by one flow, and back by the other's.

    Each end's plan knows its own Gaussian, so that its steps are exact, however few; error of the inversion.
    """
    times = grid.uniform(process, 4, end=process.t_min)
    source, target = (end(gaussian(process, data), exponential(process, times, reference=data)) for data in (ONE, TWO))
    found = translate(images(), source, target, method="deterministic")
    last = torch.tensor([process.t_min], dtype=torch.float64)
    psi, spread = process.transition(last, 0 * last)[0], process.covariance(last).cholesky()[0]
    noise = spread(found.code.end.double())
    state = psi(process.lift(images())) + noise
    top = exact_flow(process, ONE, process.t_min, process.t_max, state)
    back = exact_flow(process, TWO, process.t_max, process.t_min, top)
    expected = process.image(psi.inverse()(back - noise))
    torch.testing.assert_close(found.images, expected.float(), rtol=0, atol=10 * INVERSION)
    assert float((found.images - images()).abs().mean()) > 0.2  # it is no identity


def test_between_images_of_two_gaussians_it_is_the_optimal_map():
    """With all signal gone at t_max, `m2 + (C2 / C1)^1/2 (x - m1)`, by an ordinary sampler.

    What is left of the signal at t_max (alpha = .0066) and the noise at t_min (sigma = .01) make errors of some
    hundredths at most; 40 steps of second order make less.
    """
    process = VP()
    source, target = (made(gaussian(process, d), "deterministic", steps=40, solver="gddim") for d in (ONE, TWO))
    found = translate(images(), source, target, method="deterministic")
    expected = TWO.mean + math.sqrt(TWO.variance / ONE.variance) * (images() - ONE.mean)
    torch.testing.assert_close(found.images, expected.float(), rtol=0, atol=0.04)


def test_ddim_comes_to_the_exact_flow_with_its_order():
    """Twice the steps, half of the error (first order; 1.6 to leave room for the higher ones)."""
    process = VP()
    times = grid.uniform(process, 1, end=process.t_min)
    exact = [end(gaussian(process, d), exponential(process, times, reference=d)) for d in (ONE, TWO)]
    expected = translate(images(), *exact, method="deterministic").images
    errors = []
    for steps in (10, 20, 40):
        ends = [made(gaussian(process, data), "deterministic", steps=steps) for data in (ONE, TWO)]
        errors.append(float((translate(images(), *ends, method="deterministic").images - expected).abs().mean()))
    assert errors[0] > 1.6 * errors[1] > 1.6**2 * errors[2]
    assert errors[2] > INVERSION


@EVERY
@pytest.mark.parametrize("solver", [name for name in DETERMINISTIC if name != "auto"])  # which ends at time 0
def test_from_a_model_to_itself_a_deterministic_plan_leads_back(process, solver):
    """Every solver's inverse is exact, whatever its steps; error of the inversion, some times over."""
    there = made(gaussian(process, ONE), "deterministic", solver=solver, steps=3)
    found = translate(images(), there, there, method="deterministic")
    torch.testing.assert_close(found.images, images().float(), rtol=0, atol=10 * INVERSION)
    assert found.nfe > there.plan.nfe
    assert found.rounds > there.plan.nfe


# -- codes of a stochastic plan


@EVERY
@pytest.mark.parametrize("method", ["stochastic", "independent"])
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "gddim", "exponential"])
def test_from_a_model_to_itself_codes_give_the_image_back(process, method, solver):
    """With a plan that ends at t_min, where the code holds all there is; rounding of float64, and float32 at last."""
    sampler = sampler_for(mixture(process), SamplerSpec(solver, 6, end=process.t_min), method)
    there = end(mixture(process), sampler.plan(mixture(process)))
    found = translate(images(), there, there, method=method)
    torch.testing.assert_close(found.images, images().float(), rtol=0, atol=1e-4)
    assert found.code.noises.shape == (6, 4, process.blocks, *FIELD)
    assert (found.rounds, found.nfe) == (1 + 6, 6 + 6)


@pytest.mark.parametrize("solver", ["gddim", "exponential"])
def test_a_plan_ends_where_its_last_noise_still_reaches_all_of_a_state(solver):
    """Into time 0 the noise of a Langevin process's integrator reaches velocities alone, and there is no code."""
    model = mixture(PROCESSES["langevin"])
    there = made(model, "stochastic", solver=solver)
    assert there.plan.times[-1] == model.process.t_min
    torch.testing.assert_close(translate(images(), there, there).images, images().float(), rtol=0, atol=1e-4)


def test_the_residual_of_a_last_step_without_noise_is_the_sources_and_not_kept():
    """A plan that ends at 0 leaves out of the code what the source's last answer lacks of the image."""
    there = made(mixture(VP()), "stochastic")
    whole = there.encode(images()).code
    assert whole.residual is not None
    found = translate(images(), there, there)
    assert found.code.residual is None
    rest = images() - found.images
    torch.testing.assert_close(rest, whole.residual, rtol=0, atol=1e-4)  # the images are float32, the codes' noises are
    assert float(rest.abs().max()) > 1e-3  # divided by small numbers


@EVERY
def test_codes_of_data_decode_to_the_targets_data(process):
    """Images of the source's Gaussian become images of the target's: its mean, and with more steps its variance.

    6000 numbers: the mean is known to 0.003, the deviation to one percent (one sigma). Ancestral steps of 1/80 make an
    error of 3 to 6 percent in the deviation; four times longer ones, one of two to four times as much.
    """
    shape = (500, *FIELD)
    data = ONE.mean + math.sqrt(ONE.variance) * normal(2, *shape, seed=3)
    errors = []
    for steps in (20, 80):
        models = [Model("gaussian", process, gaussian_denoiser(process, d), shape) for d in (ONE, TWO)]
        ends = [made(model, "stochastic", solver="ddpm", steps=steps) for model in models]
        found = translate(data, *ends, seed=1, rows=1000).images
        assert float(found.mean()) == pytest.approx(float(TWO.mean), abs=0.015)
        errors.append(abs(float(found.std()) / math.sqrt(TWO.variance) - 1))
    assert errors[1] < 0.09
    assert errors[1] < 0.7 * errors[0]


def test_the_less_noise_the_more_of_the_source_is_kept():
    """Mean square distance to the source grows with the share of the steps, for every method."""
    for method in TRANSLATIONS:
        distances = []
        for start in (0.2, 0.5, 0.8):
            ends = [made(gaussian(VP(), d), method, steps=10, start=start) for d in (ONE, TWO)]
            found = translate(images(8), *ends, method=method).images
            distances.append(float((found - images(8)).square().mean()))
        assert distances[0] < distances[1] < distances[2], method


# -- SDEdit


@EVERY
@pytest.mark.parametrize("start", [0.1, 0.5, 1.0])
def test_sdedit_keeps_what_the_exact_flow_keeps(process, start):
    """The difference of two images noised alike goes through the target's flow; nothing is left of it at the end.

    The plan knows the Gaussian, so that its steps are exact; error of float32 images.
    """
    whole = grid.uniform(process, 10, end=process.t_min)
    times = whole[10 - round(10 * start) :]
    target = end(gaussian(process, TWO), exponential(process, times, reference=TWO))
    pair = [translate(x, target, target, method="sdedit", seed=5) for x in (images(), images(seed=8))]
    apart = process.lift(images() - images(seed=8))
    first, last = times[:1], times[-1:]
    psi = process.transition(first, 0 * first)[0]
    expected = exact_flow(process, Gaussian(TWO.variance), float(first), float(last), psi(apart))
    torch.testing.assert_close(pair[0].images - pair[1].images, process.image(expected).float(), rtol=0, atol=1e-5)
    assert (pair[0].rounds, pair[0].nfe) == (target.plan.nfe,) * 2


def test_sdedit_at_little_noise_is_near_the_image_and_at_all_noise_knows_nothing_of_it():
    """On VP sigma is .17 a step of twenty from the image (3.5 of it, for the greatest of 24), alpha .0066 at t_max."""
    model = gaussian(VP(), Gaussian(1.0))
    near = made(model, "sdedit", steps=20, start=0.05)
    found = translate(images(), near, near, method="sdedit").images
    assert float((found - images()).abs().max()) < 0.6
    far = made(model, "sdedit", steps=20)
    pair = [translate(x, far, far, method="sdedit").images for x in (images(), 1 - images(seed=8))]
    torch.testing.assert_close(*pair, rtol=0, atol=0.03)
    assert float((pair[0] - images()).abs().max()) > 1


def test_sdedit_does_not_use_the_source_model():
    target = made(gaussian(VP(), TWO), "sdedit")
    other = made(mixture(Langevin()), "sdedit", steps=3)
    pair = [translate(images(), source, target, method="sdedit").images for source in (target, other)]
    assert torch.equal(*pair)


@EVERY
def test_refinement_is_sdedit_by_the_target(process):
    """Images of nothing in particular come to the target's; a single point is reached exactly."""
    point = normal(1, *SHAPE, seed=1)
    single = made(Model("point", process, point_denoiser(process, point), SHAPE), "sdedit", steps=10, start=0.2)
    found = refined(images(), single)
    torch.testing.assert_close(found, point.expand_as(found).float(), rtol=0, atol=1e-5)
    target = made(mixture(process), "sdedit", steps=20, start=0.15)
    same = translate(images(), target, target, method="sdedit", seed=3).images
    assert torch.equal(refined(images(), target, seed=3), same)
    centres = normal(3, *SHAPE)
    near = centres[:1] + 0.3 * normal(4, *SHAPE, seed=5)
    before, after = ((x - centres[:1]).square().mean() for x in (near, refined(near, target)))
    assert float(after) < 0.5 * float(before)  # 0.09 before, and the target's own variance of 0.01 after


# -- batches


@EVERY
@pytest.mark.parametrize("method", TRANSLATIONS)
def test_a_batch_is_a_loop_in_any_order(process, method):
    """In float64 only the order of summation differs; inversion stops when the worst of a batch is within its error."""
    ends = [made(mixture(process, seed, 0.3), method, start=0.8, steps=4) for seed in (0, 1)]
    given, numbers = images(7), [11, 3, 2**31, 5, 0, 8, 1]
    whole = translate(given, *ends, method=method, seed=2, first=numbers)
    tolerance = 20 * INVERSION if method == "deterministic" else 1e-6
    for some in ([6], [1, 0], [5, 2, 4, 3]):
        first = [numbers[i] for i in some]
        part = translate(given[some], *ends, method=method, seed=2, first=first, rows=len(some))
        torch.testing.assert_close(part.images, whole.images[some], rtol=0, atol=tolerance)
    assert not torch.allclose(whole.images, given.float(), atol=100 * tolerance)


@pytest.mark.parametrize("method", [m for m in TRANSLATIONS if m not in ("uni-inv", "direct")])
def test_what_is_drawn_depends_on_the_seed_and_the_number(method):
    """The draws of a deterministic code are the noise of t_min alone, and change little."""
    ends = [made(mixture(VP(), seed, 0.3), method, start=0.8, steps=4) for seed in (0, 1)]
    twice = images(1).expand(2, *SHAPE)
    one = translate(twice, *ends, method=method, seed=2, first=[4, 9])
    other = translate(twice, *ends, method=method, seed=3, first=[4, 4])
    little = 1e-5 if method == "deterministic" else 1e-2
    assert float((one.images[0] - one.images[1]).abs().max()) > little
    assert float((one.images[0] - other.images[0]).abs().max()) > little
    torch.testing.assert_close(other.images[0], other.images[1], rtol=0, atol=INVERSION)


def test_numbers_in_a_row_are_counted_from_the_first():
    ends = [made(mixture(VP(), seed), "stochastic") for seed in (0, 1)]
    pair = [translate(images(), *ends, first=first).images for first in (5, [5, 6, 7, 8])]
    assert torch.equal(*pair)
    with pytest.raises(PushforwardError, match="For 4 images give as many numbers; got 2"):
        translate(images(), *ends, first=[1, 2])


def test_the_code_alone_is_the_first_half():
    ends = [made(mixture(VP(), seed), "stochastic") for seed in (0, 1)]
    found, whole = code_of(images(), *ends, seed=4), translate(images(), *ends, seed=4)
    assert isinstance(found.code, Code)
    assert torch.equal(found.code.start, whole.code.start)
    assert torch.equal(found.code.noises, whole.code.noises)
    again = ends[1].decode(found.code).float()
    assert torch.equal(again, whole.images)
    assert (found.rounds, found.nfe) == (1, 6)


# -- what is chosen, and what is refused


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("method", TRANSLATIONS)
def test_a_sampler_is_completed_for_a_method(process, method):
    model = gaussian(process, ONE)
    plan = sampler_for(model, SamplerSpec("ddim", 10), method).plan(model)
    assert plan.solver == "ddim"
    assert (len(plan.noises) > 0) is (method in ("stochastic", "independent", "sdedit"))
    assert float(plan.times[-1]) == (process.t_min if method in ("deterministic", "uni-inv", "direct") else 0)
    if process.time_is_noise:
        return
    steps = plan.times.diff()[:-2]  # the last ones do not go below t_min
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=1e-6, atol=0)


@pytest.mark.parametrize("process", [VP(), Flow(), VE()], ids=lambda p: p.name)
def test_the_usual_steps_translate_on_every_time(process):
    """`m2 + R2 R1^-1 (x - m1)`; equal steps in VE's time, the noise level, are off by .4."""
    wide = Gaussian(1.0)
    ends = [made(gaussian(process, data), "deterministic", steps=100) for data in (ONE, wide)]
    expected = exact_flow(process, wide, process.t_max, 0.0, exact_flow(process, ONE, 0.0, process.t_max, images()))
    error = translate(images(), *ends, method="deterministic").images - expected
    assert float(error.norm() / expected.norm()) <= 0.1


@pytest.mark.parametrize(
    ("given", "method", "settings", "grid_name", "stop"),
    [
        (SamplerSpec("ddim"), "stochastic", {"eta": 0.1}, "uniform", None),
        (SamplerSpec("ddim", settings={"eta": 1.0}), "stochastic", {"eta": 1.0}, "uniform", None),
        (SamplerSpec("gddim"), "independent", {"noise": 1.0}, "uniform", None),
        (SamplerSpec("exponential", settings={"noise": 0.3}), "sdedit", {"noise": 0.3}, "uniform", None),
        (SamplerSpec("ddpm", grid="karras"), "stochastic", {}, "karras", None),
        (SamplerSpec("unipc"), "deterministic", {}, "uniform", 1e-3),
        (SamplerSpec("ddim", end=0.05), "deterministic", {}, "uniform", 0.05),
        (SamplerSpec("ddim", end=0.05), "stochastic", {"eta": 0.1}, "uniform", 0.05),
    ],
    ids=lambda x: x.label if isinstance(x, SamplerSpec) else None,
)
def test_what_a_sampler_leaves_open_is_chosen_and_nothing_else(given, method, settings, grid_name, stop):
    found = sampler_for(gaussian(VP(), ONE), given, method)
    assert (dict(found.settings), found.grid, found.end) == (settings, grid_name, stop)
    assert (found.solver, found.steps, found.start) == (given.solver, given.steps, given.start)


def test_a_models_own_grid_is_kept():
    model = Model("own", VP(), gaussian_denoiser(VP(), ONE), SHAPE, grid={"name": "karras"})
    found = sampler_for(model, SamplerSpec("ddim", 5), "stochastic")
    assert found.grid is None
    torch.testing.assert_close(found.plan(model).times, grid.karras(VP(), 5))


@pytest.mark.parametrize(
    ("source", "target", "method", "message"),
    [
        (("vp", 5, "ddpm"), ("vp", 6, "ddpm"), "stochastic", r"takes 4 noises and the target's 5; give both"),
        (("vp", 5, "ddim"), ("vp", 5, "ddpm"), "deterministic", r"takes 0 noises and the target's 4; give both"),
        (("vp", 5, "ddpm"), ("langevin", 5, "ddpm"), "independent", r"\(1, 3, 2\), those of .* \(2, 3, 2\)"),
        (("vp", 5, "ddim"), ("vp", 5, "ddim"), "stochastic", "is deterministic and has no noises to find"),
        (("vp", 5, "ddpm"), ("vp", 5, "ddpm"), "deterministic", "is stochastic: it has no inverse"),
        (("vp", 5, "ddim"), ("vp", 5, "ddim"), "deterministic", "ends at time 0"),
    ],
)
def test_plans_that_do_not_fit_are_refused_in_a_sentence(source, target, method, message):
    ends = []
    for process, steps, solver in (source, target):
        model = gaussian(KINDS[process], ONE)
        ends.append(end(model, SamplerSpec(solver, steps, grid="uniform").plan(model)))
    with pytest.raises(PushforwardError, match=message) as caught:
        translate(images(), *ends, method=method)
    assert "\n" not in str(caught.value)


def test_images_of_another_shape_are_refused():
    for method in TRANSLATIONS:
        ends = [made(gaussian(VP(), d), method) for d in (ONE, TWO)]
        with pytest.raises(PushforwardError, match=r"has images of shape \(1, 3, 2\); got \(1, 4, 4\)"):
            translate(torch.zeros(2, 1, 4, 4), *ends, method=method)
