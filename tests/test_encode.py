"""Codes drawn for images (DPM-Encoder): they decode to the images, and are what they claim to be."""

import pytest
import torch
from torch import Tensor

from pushforward import Code, Diffusion, Gaussian, Model, PushforwardError
from pushforward.denoiser import Function
from pushforward.execute import encode, run
from pushforward.linear import VP, Process
from pushforward.plan import SOLVERS
from pushforward.plan.grid import angle
from support.helpers import FIELD, PROCESSES, RESTLESS, gaussian_denoiser, mixture_denoiser, times

CHANNELS = 2
SAMPLERS: dict[str, tuple[str, dict[str, object]]] = {
    "ddim 0.1": ("ddim", {"eta": 0.1}),
    "ddim 0.5": ("ddim", {"eta": 0.5}),
    "ddpm": ("ddpm", {}),
    "ddpm large": ("ddpm", {"variance": "large"}),
    "gddim 0.3": ("gddim", {"noise": 0.3}),
    "gddim 1": ("gddim", {"noise": 1.0}),
    "sde-dpm++": ("exponential", {"order": 1, "noise": 1.0}),
    "referenced": ("exponential", {"order": 1, "noise": 1.0, "reference": Gaussian(0.25)}),
    "euler-maruyama": ("euler-maruyama", {}),
    "sscs": ("sscs", {}),
    "sscs 2": ("sscs", {"order": 2}),
}
SINGULAR = ("langevin", "blurring-langevin")  # whose Euler-Maruyama moves the velocity alone


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, CHANNELS, *FIELD, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def diffusion(process: Process, sampler: str, steps: int = 12, end: float | None = None, **more: object) -> Diffusion:
    """A mixture's exact denoiser with a stochastic plan that ends at `t_min`, or where `end` says."""
    solver, settings = SAMPLERS[sampler]
    grid = angle(process, steps, start=0.9 * process.t_max, end=process.t_min if end is None else end)
    plan = SOLVERS[solver](process, grid, **{**settings, **more})
    model = Model("mixture", process, mixture_denoiser(process, images(5, seed=1), 0.2), (CHANNELS, *FIELD))
    return Diffusion(model, plan)


def fits(process: str, sampler: str) -> bool:
    return not (sampler.startswith("sscs") and process in RESTLESS)


CASES = [(p, s) for p in PROCESSES for s in SAMPLERS if fits(p, s)]


@pytest.mark.parametrize(("process", "sampler"), CASES)
@pytest.mark.parametrize("sequential", [False, True])
def test_codes_decode_to_the_images(process: str, sampler: str, sequential: bool):
    """With all calls in one round, rounding of float32 grows along the chain: 1e-3; step by step nothing adds
    up, and only the noise on the last state is divided by its own small root: 1e-5."""
    chain, x = diffusion(PROCESSES[process], sampler), images(3)
    found = chain.encode(x, seed=2, sequential=sequential)
    error = (chain.decode(found.code) - x).abs().max()
    assert error < (1e-5 if sequential else 1e-3)
    stages = 2 if sampler == "sscs 2" else 1
    assert found.rounds == (chain.plan.nfe if sequential else stages)
    assert found.nfe == chain.plan.nfe


@pytest.mark.parametrize("process", ["vp", "flow", "blurring", "discrete"])
@pytest.mark.parametrize("sampler", ["ddim 0.1", "ddpm"])
def test_a_plan_to_time_zero_keeps_the_residual_of_its_last_step(process: str, sampler: str):
    """The last step takes no noise: what it leaves out is in the code, and decoding is exact but for rounding."""
    chain, x = diffusion(PROCESSES[process], sampler, end=0.0), images(3)
    code = chain.encode(x, sequential=True).code
    assert code.residual is not None
    assert code.end is None
    assert code.residual.abs().max() > 1e-3
    assert (chain.decode(code) - x).abs().max() < 1e-6
    without = chain.decode(Code(code.start, code.noises))
    assert torch.allclose(without + chain.model.process.image(code.residual), x, atol=1e-6)


@pytest.mark.parametrize(("process", "sampler"), [(p, s) for p, s in CASES if not (p in SINGULAR and "euler" in s)])
def test_independent_states_decode_to_the_images(process: str, sampler: str):
    chain, x = diffusion(PROCESSES[process], sampler), images(3)
    path, apart = chain.encode(x).code, chain.encode(x, independent=True, sequential=True).code
    assert (chain.decode(apart) - x).abs().max() < 2e-6
    assert path.noises is not None
    assert apart.noises is not None
    assert not torch.allclose(path.noises, apart.noises)


def test_noise_that_moves_only_velocities_reaches_a_path_but_not_states_drawn_apart():
    chain = diffusion(PROCESSES["langevin"], "euler-maruyama")
    assert (chain.decode(chain.encode(images(2), sequential=True).code) - images(2)).abs().max() < 2e-6
    with pytest.raises(PushforwardError, match="does not reach all directions"):
        chain.encode(images(2), independent=True)


@pytest.mark.parametrize("process", ["vp", "blurring", "langevin"])
@pytest.mark.parametrize("sampler", ["ddim 0.5", "ddpm", "gddim 1"])
def test_codes_of_the_models_own_images_are_standard_normal(process: str, sampler: str):
    """Of images drawn from the model's own Gaussian, in the first of 30 steps: deviations within 4%.

    That is 2% for the steps' finite size and 3 standard errors of 2000 images x 12 numbers. Near the image a step's
    noise is small beside what the network does not know, and codes get wider, the more so the larger the steps.
    """
    chosen, data = PROCESSES[process], Gaussian(0.3)
    name, settings = SAMPLERS[sampler]
    plan = SOLVERS[name](chosen, angle(chosen, 30, start=chosen.t_max, end=chosen.t_min), **settings)
    model = Model("gaussian", chosen, gaussian_denoiser(chosen, data), (CHANNELS, *FIELD), reference=data)
    x = torch.randn(2000, CHANNELS, *FIELD, generator=torch.Generator().manual_seed(3)) * 0.3**0.5
    code = Diffusion(model, plan).encode(x, rows=10**6).code
    assert code.noises is not None
    for part in (code.start, *code.noises[:6]):
        assert abs(float(part.mean())) < 0.03
        assert abs(float(part.std()) - 1) < 0.04


def test_the_oracle_draws_its_path_from_the_forward_diffusion():
    """States of the path have the mean and covariance of q(u_t | x): 4000 draws, 4 standard errors."""
    process, seen = VP(), []
    grid = angle(process, 6, start=0.9, end=process.t_min)
    plan = SOLVERS["ddim"](process, grid, eta=0.4)

    def watch(u: Tensor, t: float) -> Tensor:
        seen.append((t, u.clone()))
        return torch.zeros_like(u)

    x = images(1).expand(4000, -1, -1, -1)
    model = Model("watched", process, Function(watch), (CHANNELS, *FIELD))
    Diffusion(model, plan).encode(x, rows=10**6)
    states = dict(seen)
    for t in grid[:-1].tolist():
        signal = float(process.transition(times(t), times(0))[0].entry(0, 0))
        deviation = float(process.covariance(times(t))[0].entry(0, 0)) ** 0.5
        assert (states[t].mean(0) - signal * x[0]).abs().max() < 4 * deviation / 4000**0.5 + 1e-6
        assert (states[t].std(0) / deviation - 1).abs().max() < 4 / (2 * 4000) ** 0.5 + 1e-3


@pytest.mark.parametrize("independent", [False, True])
def test_a_batch_is_its_images_one_by_one_in_any_batch_and_order(independent: bool):
    """The same numbers on the same rows, whatever else is in the batch: rounding only."""
    chain, x = diffusion(VP(), "ddim 0.5"), images(7)
    whole = chain.encode(x, seed=5, independent=independent).code
    order = [6, 2, 0]
    some = chain.encode(x[order], seed=5, first=order, independent=independent, rows=2).code
    for mine, theirs in ((some.start, whole[order].start), (some.noises, whole[order].noises)):
        assert mine is not None
        assert theirs is not None
        assert torch.allclose(mine, theirs, atol=1e-5)
    pairs = [chain.encode(x[i : i + 2], seed=5, first=i, independent=independent).code for i in range(0, 7, 2)]
    joined = Code.cat(pairs)
    assert joined.noises is not None
    assert whole.noises is not None
    assert torch.allclose(joined.noises, whole.noises, atol=1e-5)
    with pytest.raises(PushforwardError, match="as many numbers"):
        chain.encode(x, first=[1, 2])


def test_callbacks_count_every_state_the_network_sees():
    chain, counted = diffusion(VP(), "ddpm", steps=10), []
    chain.encode(images(3), rows=4, callback=counted.append)
    assert sum(counted) == 30
    assert max(counted) == 4


def test_seeds_draw_other_codes_of_the_same_images():
    chain, x = diffusion(VP(), "ddim 0.5"), images(2)
    one, other = chain.encode(x, seed=0).code, chain.encode(x, seed=1).code
    assert not torch.allclose(one.start, other.start)
    assert (chain.decode(one) - chain.decode(other)).abs().max() < 2e-3


def test_perturbed_codes_know_nothing_of_the_network():
    """SDEdit: the first state is q(u_0 | x), the noises are fresh."""
    chain, x = diffusion(VP(), "ddpm"), images(2)
    code = chain.perturb(x, seed=3)
    assert code.noises is not None
    assert len(code.noises) == len(chain.plan.noises)
    assert torch.equal(code.start, chain.encode(x, seed=3).code.start)


def test_deterministic_plans_are_refused():
    chain = diffusion(VP(), "ddim 0.1", eta=0.0)
    with pytest.raises(PushforwardError, match="is deterministic and has no noises to find"):
        chain.encode(images(1))


def test_images_of_another_shape_are_refused():
    with pytest.raises(PushforwardError, match="has images of shape"):
        diffusion(VP(), "ddpm").encode(torch.zeros(1, CHANNELS, 5, 5))


def test_the_executor_leads_the_plan_through_the_states_it_drew():
    """`run` with the noises found ends in the state that `encode` says, at 64 bits to 1e-10."""
    process = VP()
    plan = SOLVERS["ddpm"](process, angle(process, 8, start=0.9, end=process.t_min))
    denoiser, x = mixture_denoiser(process, images(5, seed=1), 0.2), images(2).double()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    found = encode(
        plan, denoiser, x, start=start, draw=lambda: torch.randn(x.shape, generator=generator, dtype=torch.float64)
    )
    noises = dict(zip(plan.noises, found.noises, strict=True))
    assert torch.allclose(run(plan, denoiser, start, noise=noises.__getitem__), found.last, atol=1e-10)
