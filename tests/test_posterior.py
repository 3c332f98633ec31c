"""Codes drawn by an energy, against posteriors in closed form."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pushforward import Diffusion, Exact, Implicit, Model, Phantom, PushforwardError, load
from pushforward.guidance.chains import Chains
from pushforward.guidance.checkpoints import load_chains, load_descents, save_checkpoint
from pushforward.guidance.diagnostics import diagnose
from pushforward.guidance.dynamics import Dynamics, Schedule, ess, hmc, langevin, mala, pcn
from pushforward.guidance.energies import Energy, of
from pushforward.guidance.posterior import Descents, Guided, best, guide
from pushforward.guidance.tempering import Ladder
from pushforward.linear import VP, Gaussian, Process
from pushforward.maps.adaptive import AdaptiveDiffusion
from pushforward.maps.code import Code, GaussianStream, derive_seed
from pushforward.maps.spec import SamplerSpec
from support.helpers import PROCESSES, gaussian_denoiser

NUMBERS, PIXELS = 6, 4
WEIGHT = torch.ones((), requires_grad=True)


class Linear:
    """A map from codes to images that is linear, so that a quadratic energy leaves codes Gaussian."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(1)
        self.matrix = torch.randn(NUMBERS, PIXELS, generator=random, dtype=torch.float64) / 2
        self.wanted = torch.randn(PIXELS, generator=random, dtype=torch.float64)

    def draw(self, count: int, *, seed: int = 0, first: int = 0) -> Code:
        return Code(GaussianStream(seed, range(first, first + count), (NUMBERS,)).draw().double())

    def decode(self, code: Code) -> Tensor:
        return (code.start @ self.matrix).view(-1, 1, 2, 2)

    def sample(self, count: int, *, seed: int = 0, first: int = 0) -> Tensor:
        return self.decode(self.draw(count, seed=seed, first=first))

    def some(self, which: slice | Tensor) -> "Linear":
        return self

    def energy(self, images: Tensor, code: Code) -> Tensor:
        return 2 * (images.flatten(1) - self.wanted).square().sum(1)

    def posterior(self) -> tuple[Tensor, Tensor]:
        precision = torch.eye(NUMBERS, dtype=torch.float64) + 4 * self.matrix @ self.matrix.T
        covariance = torch.linalg.inv(precision)
        return covariance @ self.matrix @ self.wanted * 4, covariance


@pytest.mark.parametrize("sampler", [mala(), mala(preconditioned=False), hmc(leaps=4)])
def test_adjusted_chains_reach_the_posterior_of_a_linear_map(sampler: Dynamics):
    """Moments of 700 chains after 90 steps: standard errors are 4% of a deviation in a mean, 5% of a variance.

    Bounds are four of these.
    """
    toy = Linear()
    mean, covariance = toy.posterior()
    found = guide(toy, toy.energy, sampler, Schedule(90, 60), chains=700, batch=700)
    z = found.code.start
    deviation = covariance.diagonal().sqrt()
    assert ((z.mean(0) - mean) / deviation).abs().max() < 4 / math.sqrt(700)
    assert (torch.cov(z.T) - covariance).abs().max() < 4 * math.sqrt(2 / 700) * covariance.diagonal().max()
    rate = torch.stack([record.acceptance for record in found.history[61:]]).mean()
    assert rate == pytest.approx(sampler.acceptance, abs=0.16)  # adapted in 60 steps alone


@pytest.mark.parametrize("sampler", [pcn(), ess()])
def test_chains_without_a_gradient_reach_the_posterior_of_a_linear_map(sampler: Dynamics):
    """As above, of an energy whose gradient is nothing to go by: it has steps. Bounds are four standard errors.

    Steps of a tenth move the posterior's moments by less than the bounds.
    """
    toy = Linear()
    mean, covariance = toy.posterior()

    def stepped(images: Tensor, code: Code) -> Tensor:
        return (10 * toy.energy(images, code)).round().detach() / 10

    count, moves = 400, 50 if sampler.sliced else 110
    found = guide(toy, stepped, sampler, Schedule(moves, moves - 30), chains=count, batch=count)
    z = found.code.start
    deviation = covariance.diagonal().sqrt()
    assert ((z.mean(0) - mean) / deviation).abs().max() < 4 / math.sqrt(count)
    assert (torch.cov(z.T) - covariance).abs().max() < 4 * math.sqrt(2 / count) * covariance.diagonal().max()
    rate = torch.stack([record.acceptance for record in found.history[-30:]]).mean()
    if not sampler.sliced:
        assert rate == pytest.approx(sampler.acceptance, abs=0.16)
    assert (found.nfe < 10 * moves).all()


def test_slices_find_both_sides_of_a_wall():
    """A bimodal posterior in closed form: z_0^2 near 4. Half of the chains end on each side, whatever the start."""
    toy = Linear()

    def sides(images: Tensor, code: Code) -> Tensor:
        return 20 * (code.start[:, 0].abs() - 2).square().detach()

    begin = Code(toy.draw(600).start.abs())  # all on one side
    found = guide(toy, sides, ess(), Schedule(20, 19), chains=600, batch=600, begin=begin)
    z = found.code.start[:, 0]
    assert abs(float((z > 0).double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(600)
    assert float(z.abs().mean()) == pytest.approx(80 / 41, abs=4 * (1 / math.sqrt(41 * 600)))  # N(80/41, 1/41)


# -- ladders -----------------------------------------------------------------------------------------------------------


class Two:
    """Codes whose posterior is a mixture of two narrow modes, far apart, by the energy of `N(z; c_k, s^2 I)`."""

    spread, share = 0.5, 0.3
    centres = torch.tensor([[1.9, 0.5, 0, 0, 0, 0], [-1.9, 0, 0.5, 0, 0, 0]], dtype=torch.float64)

    def energy(self, images: Tensor, code: Code) -> Tensor:
        far = (code.start[:, None] - self.centres).square().sum(2)
        return -(self.odds().log() - far / (2 * self.spread**2)).logsumexp(1)

    def odds(self) -> Tensor:
        """Weights of the energy's modes by which the posterior's are `1 - share` and `share`."""
        prior = (-self.centres.square().sum(1) / (2 * (1 + self.spread**2))).exp()
        return torch.tensor([1 - self.share, self.share]) / prior

    def truth(self, count: int) -> tuple[Tensor, Tensor]:
        """Codes of the posterior, and the mode of each."""
        random = torch.Generator().manual_seed(9)
        which = (torch.rand(count, generator=random) < self.share).long()
        width = 1 / (1 + 1 / self.spread**2)
        noise = torch.randn(count, NUMBERS, generator=random, dtype=torch.float64)
        return self.centres[which] / (1 + self.spread**2) + width**0.5 * noise, which

    def found(self, sampler: Dynamics, rungs: int, energy: Any = None, count: int = 400) -> Guided:
        """Chains that all begin in the first mode."""
        begin = Code(self.centres[:1].repeat(count, 1))
        schedule = Schedule(90, 45, draws=15, rungs=rungs)
        return guide(Linear(), energy or self.energy, sampler, schedule, chains=count, batch=4000, begin=begin)


def sliced_distance(x: Tensor, y: Tensor) -> float:
    """Sliced 2-Wasserstein distance by the quantiles along fixed directions, in a deviation's root of dimensions."""
    random = torch.Generator().manual_seed(5)
    directions = torch.nn.functional.normalize(torch.randn(NUMBERS, 50, generator=random, dtype=x.dtype), dim=0)
    at = torch.linspace(0.001, 0.999, 999, dtype=x.dtype)
    gap = torch.quantile(x @ directions, at, 0) - torch.quantile(y @ directions, at, 0)
    return float(gap.square().mean().sqrt() / y.var(0).sum().sqrt() * NUMBERS**0.5)


@pytest.mark.parametrize("sampler", [pcn(), ess(), mala()])
def test_ladders_leave_the_mode_that_they_began_in(sampler: Dynamics):
    """To the other's share within 3 points, in a tenth of a deviation of sliced W2; without a gradient, with steps."""
    two = Two()
    truth, _ = two.truth(20000)
    stepped = None if sampler.gradient else (lambda images, code: (50 * two.energy(images, code)).round().detach() / 50)
    found = two.found(sampler, 5, stepped)
    assert float((found.code.start[:, 0] < 0).double().mean()) == pytest.approx(two.share, abs=0.03)
    assert sliced_distance(found.code.start, truth) < 0.1
    said = diagnose(found.history, 45)
    assert min(said.swaps) > 0.75 * max(said.swaps)  # neighbours refuse alike
    assert said.round_trips is not None
    assert said.round_trips > 3


def test_a_single_rung_stays_in_the_mode_that_it_began_in():
    two = Two()
    truth, _ = two.truth(20000)
    found = two.found(pcn(), 1)
    assert float((found.code.start[:, 0] < 0).double().mean()) < 0.1
    assert sliced_distance(found.code.start, truth) > 0.3
    said = diagnose(found.history, 45)
    assert (said.swaps, said.round_trips) == ((), None)


def test_all_rungs_are_evaluated_and_none_but_the_first_is_kept():
    two = Two()
    found = two.found(pcn(), 4, count=6)
    assert torch.equal(found.nfe, torch.full((6,), 4 * 91))
    assert len(found.images) == 90
    assert torch.allclose(found.energy, two.energy(found.images, found.code))
    assert found.history[-1].prior.shape == (6,)


def test_swaps_and_spacings_are_those_of_the_rule():
    """By hand: two rungs; and gaps that refuse .8 and .2 become gaps of equal shares."""
    ladder = Ladder.begun(3, torch.zeros(1, dtype=torch.float64))
    energies, luck = torch.tensor([[5.0], [1.0], [2.0]], dtype=torch.float64), torch.tensor([[0.9], [0.9]])
    after, order, chances, arrived = ladder.swapped(energies, luck.double())
    middle = float(ladder.betas[1])
    assert order[:, 0].tolist() == [2, 0, 1] or chances[1] < 0.9  # the prior's state comes to the middle, then down
    assert float(chances[1]) == pytest.approx(math.exp(-middle))
    assert float(chances[0]) == 1  # lower energy goes to the greater weight
    assert (float(arrived), float(after.fresh[0])) == (1, 0)
    spaced = ladder.spaced(torch.tensor([[[0.2], [0.8]]] * 50, dtype=torch.float64))
    assert 1 > float(spaced.betas[1]) > middle
    assert [float(spaced.betas[k]) for k in (0, 2)] == [1, 0]


def test_states_of_infinite_energy_are_never_swapped_down():
    ladder = Ladder.begun(2, torch.zeros(3, dtype=torch.float64))
    energies = torch.tensor([[0.0, math.inf, math.inf], [math.inf, 1, math.inf]], dtype=torch.float64)
    _, order, chances, _ = ladder.swapped(energies, torch.full((1, 3), 0.5, dtype=torch.float64))
    assert chances.tolist() == [[0, 1, 0]]
    assert order[0].tolist() == [0, 1, 0]


def test_an_energy_that_changes_from_call_to_call_ends_a_slice_all_the_same():
    toy, calls = Linear(), [0]

    def worse(images: Tensor, code: Code) -> Tensor:
        calls[0] += 1
        return torch.full((len(images),), 1000.0 * calls[0])

    found = guide(toy, worse, ess(), Schedule(2, 0), chains=3)
    assert torch.equal(found.code.start, toy.draw(3).start)


def test_unadjusted_langevin_has_the_bias_of_its_step():
    """`x <- (1 - s / 2) x + sqrt(s) xi` has variance `1 / (1 - s / 4)`, here +14% for s = 0.5.

    The standard error of the variance of 6 x 1000 values is 1.8%.
    """
    toy = Linear()

    def nothing(images: Tensor, code: Code) -> Tensor:
        return 0 * images.flatten(1).sum(1)

    found = guide(toy, nothing, langevin(0.5), Schedule(20, 0), chains=1000, batch=1000)
    assert found.code.start.var() == pytest.approx(1 / (1 - 0.5 / 4), rel=0.06)
    exact = guide(toy, nothing, langevin(0.5, preconditioned=True), Schedule(20, 0), chains=1000, batch=1000)
    assert exact.code.start.var() == pytest.approx(1, rel=0.06)  # the prior is kept at any step size


def test_annealed_chains_carry_weights_that_make_up_for_haste():
    """10 annealed steps do not arrive; weighted, they have the posterior's mean to 4 standard errors of their draws."""
    toy = Linear()
    mean, covariance = toy.posterior()
    sampler = Dynamics(0.3)
    schedule = Schedule(11, 10, anneal=10)
    found = guide(toy, toy.energy, sampler, schedule, chains=2000, batch=2000)
    effective = float(1 / found.weights.square().sum())
    assert 100 < effective < 1990  # neither one draw nor all alike
    weighted = (found.weights[:, None] * found.code.start).sum(0)
    assert ((weighted - mean) / covariance.diagonal().sqrt()).abs().max() < 4 / math.sqrt(effective)
    plain = found.code.start.mean(0)
    assert (weighted - mean).norm() < (plain - mean).norm()
    assert float(found.weights.sum()) == pytest.approx(1)


@pytest.mark.parametrize("optimiser", ["adam", "l-bfgs"])
def test_best_finds_the_peak(optimiser: str):
    """With the Gaussian prior the least energy is at the posterior's mean; L-BFGS to rounding, Adam to its step."""
    toy = Linear()
    mean, _ = toy.posterior()
    found = best(toy, toy.energy, optimiser=optimiser, prior="gaussian", count=3, steps=150, learning_rate=0.05)
    assert (found.code.start - mean).abs().max() < (1e-6 if optimiser == "l-bfgs" else 0.05)
    assert set(found.energies) == {"energy", "gaussian"}
    records = torch.stack([record.energy for record in found.history])
    assert torch.equal(found.energy, records.amin(0))


def test_the_chi_prior_keeps_codes_as_long_as_codes_are():
    toy = Linear()
    found = best(toy, of(toy.energy, "quadratic"), count=4, steps=200)
    free = best(toy, of(toy.energy, "quadratic"), prior="gaussian", count=4, steps=200)
    assert found.code.start.norm(dim=1).mean() > 1.2 * free.code.start.norm(dim=1).mean()


# -- diffusions --------------------------------------------------------------------------------------------------------


def gaussian_diffusion(process: Process, solver: str, dtype: torch.dtype = torch.float64) -> Diffusion:
    data = Gaussian(0.3)
    model = Model("gaussian", process, gaussian_denoiser(process, data), (1, 3, 2), reference=data)
    settings = {"eta": 0.7} if solver == "ddim" else {"noise": 0.8}
    plan = SamplerSpec(solver, 6, settings, end=process.t_min).plan(model)
    return Diffusion(model, plan, dtype=dtype)


def rk45() -> AdaptiveDiffusion:
    return AdaptiveDiffusion(gaussian_diffusion(VP(), "ddim").model)


def fashion(labels: list[str]) -> Diffusion:
    model = load("fashion-vp")
    return Diffusion(model, SamplerSpec("ddim", 2).plan(model)).given(labels)


def brightness(images: Tensor, code: Code) -> Tensor:
    return 8 * (images.mean((1, 2, 3)) - 0.5).square() * images[0].numel()


@pytest.mark.parametrize("name", ["vp", "blurring", "langevin"])
def test_codes_with_noises_of_a_diffusion_reach_their_posterior(name: str):
    """Gaussian data are decoded linearly, `x = J z + c`, from start and noises; so the posterior is Gaussian.

    300 chains: a standard error of 6% of a deviation; the bound is four and a half.
    """
    process = PROCESSES[name]
    diffusion = gaussian_diffusion(process, "gddim")
    zero = diffusion.draw(1)
    origin = torch.zeros_like(zero.variables())

    def decoded(x: Tensor) -> Tensor:
        return diffusion.decode(zero.with_variables(x[None])).flatten()

    jacobian = torch.autograd.functional.jacobian(decoded, origin[0])
    assert isinstance(jacobian, Tensor)
    offset, row = decoded(origin[0]).mean(), jacobian.mean(0)
    strength = 16 * 6
    gain = strength * row / (1 + strength * row @ row)
    mean = gain * (0.5 - offset)
    variance = 1 - gain * row
    found = guide(diffusion, brightness, hmc(leaps=3), Schedule(40, 30), chains=300, batch=300)
    z = found.code.variables()
    assert z.shape[1] == origin.numel() > 6 * process.blocks  # the noises are among them
    assert ((z.mean(0) - mean) / variance.sqrt()).abs().max() < 4.5 / math.sqrt(300)
    assert (z.var(0) - variance).abs().max() < 5 * math.sqrt(2 / 300)
    assert torch.allclose(found.images, diffusion.decode(found.code).float(), atol=1e-6)  # what the energy saw
    assert torch.allclose(found.energy, brightness(diffusion.decode(found.code), found.code), atol=1e-9)


@pytest.mark.parametrize("gradient", [Implicit(tolerance=1e-7), Phantom(steps=7)])
def test_other_gradients_walk_the_same_way(gradient):
    """Exact to 1e-6 or by construction, they lead chains of 5 steps to the same codes within its accumulated error."""
    diffusion = gaussian_diffusion(VP(), "ddim")
    exact, other = (
        guide(diffusion.run_by(gradient=g), brightness, langevin(), Schedule(5), chains=2) for g in (Exact(), gradient)
    )
    assert torch.allclose(exact.code.variables(), other.code.variables(), atol=1e-4)
    assert not torch.allclose(exact.code.variables(), diffusion.draw(2).variables(), atol=0.1)


@pytest.mark.parametrize("rungs", [1, 3])
@pytest.mark.parametrize("sampler", [hmc(), pcn(), ess()])
def test_chains_do_not_know_of_one_another(sampler: Dynamics, rungs: int):
    """Chain i is the same in any batch, to the rounding of float64 sums over other shapes."""
    diffusion = gaussian_diffusion(VP(), "ddim")
    schedule = Schedule(6, 4, draws=2, rungs=rungs)
    together = guide(diffusion, brightness, sampler, schedule, chains=5, seed=3)
    pieces = guide(diffusion, brightness, sampler, schedule, chains=5, seed=3, batch=2)
    alone = guide(diffusion, brightness, sampler, schedule, chains=1, seed=3, first=4)
    assert torch.allclose(together.code.variables(), pieces.code.variables(), atol=1e-10)
    assert torch.allclose(together.code[[4, 9]].variables(), alone.code.variables(), atol=1e-10)
    assert together.chain.tolist() == [0, 1, 2, 3, 4] * 2
    assert alone.chain.tolist() == [4, 4]
    assert torch.equal(together.nfe, pieces.nfe)
    if sampler.gradient:  # forward and backward, 6 calls each; the prior's rung takes no leaps
        gradients = rungs + 6 * (max(1, rungs - 1) * 5 + (rungs > 1))
        assert torch.equal(together.nfe, torch.full((5,), gradients * 2 * 6))
    elif not sampler.sliced:
        assert torch.equal(together.nfe, torch.full((5,), 7 * rungs * 6))
    elif rungs == 1:  # a decoding of 6 calls for the beginning, and for each point that was tried
        tries = sum(1 / record.acceptance for record in together.history)
        assert torch.allclose(together.nfe.double(), 6 * tries)


class Interrupted(Exception):
    pass


def stopping(step: int, folder: Path) -> Callable[[Chains | Descents], None]:
    """A callback that keeps the state after a step, and breaks off."""

    def stop(state: Chains | Descents) -> None:
        if state.step == step:
            save_checkpoint(folder / "state.safetensors", state, {"so": "far"})
            raise Interrupted

    return stop


@pytest.mark.parametrize("more", [{"anneal": 4}, {"rungs": 3}])
@pytest.mark.parametrize("sampler", [langevin(), mala(), hmc(), pcn(), ess()])
def test_chains_that_went_on_are_those_that_never_stopped(sampler: Dynamics, more: dict[str, int], tmp_path):
    """Bit for bit, through a file."""
    diffusion = gaussian_diffusion(VP(), "ddim", torch.float32)
    schedule = Schedule(8, 5, draws=3, **more)
    whole = guide(diffusion, brightness, sampler, schedule, chains=3, seed=1)

    with pytest.raises(Interrupted):  # after the first draw
        guide(diffusion, brightness, sampler, schedule, chains=3, seed=1, callback=stopping(6, tmp_path))
    chains, info = load_chains(tmp_path / "state.safetensors")
    rest = guide(diffusion, brightness, sampler, schedule, chains=3, seed=1, resume=chains)
    assert info == {"so": "far"}
    assert torch.equal(rest.code.variables(), whole.code.variables())
    assert torch.equal(rest.images, whole.images)
    assert torch.equal(rest.weights, whole.weights)
    assert torch.equal(rest.nfe, whole.nfe)
    assert len(rest.history) == 9
    for one, other in zip(rest.history, whole.history, strict=True):
        assert all(torch.equal(one.energies[name], other.energies[name]) for name in other.energies)
        assert torch.equal(one.acceptance, other.acceptance)
        assert (one.swaps is None and other.swaps is None) or torch.equal(one.swaps, other.swaps)


@pytest.mark.parametrize("optimiser", ["adam", "l-bfgs", "white"])
def test_descents_that_went_on_are_those_that_never_stopped(optimiser: str, tmp_path):
    """Bit for bit, through a file; and a longer descent begins with a shorter one."""
    diffusion = gaussian_diffusion(VP(), "ddim", torch.float32)

    def descend(steps: int, **options: Any) -> Guided:
        return best(diffusion, brightness, optimiser=optimiser, steps=steps, count=3, seed=1, **options)

    whole = descend(8)
    with pytest.raises(Interrupted):
        descend(8, callback=stopping(5, tmp_path))
    state, _ = load_descents(tmp_path / "state.safetensors")
    rest = descend(8, resume=state)
    assert torch.equal(rest.code.variables(), whole.code.variables())
    assert torch.equal(rest.images, whole.images)
    assert torch.equal(rest.energy, whole.energy)
    assert torch.equal(rest.nfe, whole.nfe)
    assert len(rest.history) == 9
    assert torch.equal(descend(5).code.variables(), descend(5, resume=state).code.variables())
    with pytest.raises(PushforwardError, match="descents to go on with have 3 x"):
        best(diffusion, brightness, optimiser=optimiser, steps=8, count=2, resume=state)


@pytest.mark.parametrize("optimiser", ["adam", "l-bfgs", "white"])
def test_descents_begin_at_the_best_of_their_candidates(optimiser: str):
    """Those are the codes of the seed, and as many others; each is drawn and decoded once, whatever the batch."""
    diffusion, asked = gaussian_diffusion(VP(), "ddim"), {"steps": 1, "count": 3, "seed": 5, "prior": None}
    codes = [diffusion.draw(3, seed=seed) for seed in (5, *(derive_seed(5, k) for k in range(1, 4)))]
    free = torch.stack([brightness(diffusion.decode(code), code) for code in codes])
    assert (free.argmin(0) > 0).any()
    found = best(diffusion, brightness, optimiser=optimiser, candidates=4, batch=2, **asked)
    assert torch.allclose(found.history[0].energy, free.amin(0).double())
    assert found.nfe.tolist() == [(4 + 2 * 2) * diffusion.plan.nfe] * 3
    alone = best(diffusion, brightness, optimiser=optimiser, candidates=4, **{**asked, "count": 1, "first": 2})
    assert torch.allclose(alone.code.variables(), found.code.variables()[2:])
    one, plain = (best(diffusion, brightness, optimiser=optimiser, **asked, **more) for more in ({"candidates": 1}, {}))
    assert torch.equal(one.code.variables(), plain.code.variables())


# -- energies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("energy", "said"),
    [
        (of(lambda images, code: images.mean(), "one for all"), "'one for all' must give one number per image"),
        (of(lambda images, code: 3.0, "three"), "'three' must give one number per image.*float"),
        (of(lambda images, code: images.detach().sum((1, 2, 3)), "frozen"), "'frozen' has no gradient"),
        (of(lambda images, code: (images - 9).log().sum((1, 2, 3)), "log"), "'log' is nan for chain 0"),
        (of(lambda images, code: (0 * images.sum((1, 2, 3))).sqrt(), "root"), "gradient of energy, root is not finite"),
    ],
)
def test_what_is_wrong_with_an_energy_is_said_by_name(energy: Energy, said: str):
    toy = Linear()
    with pytest.raises(PushforwardError, match=said):
        guide(toy, of(toy.energy) + energy, schedule=Schedule(2), chains=3)


def test_a_sum_of_energies_shows_its_parts():
    toy = Linear()
    parts = [2 * of(toy.energy, "near"), of(lambda images, code: code.start.sum(1), "code"), of(toy.energy, "near")]
    whole = sum(parts)
    assert isinstance(whole, Energy)
    found = guide(toy, 0.5 * whole, schedule=Schedule(2), chains=3)
    near = toy.energy(toy.decode(found.code), found.code)
    assert list(found.energies) == ["near", "code", "near 2"]
    assert torch.allclose(found.energies["near"], near)
    assert torch.allclose(found.energies["near 2"], near / 2)
    assert torch.allclose(found.energies["code"], found.code.start.sum(1) / 2)
    assert torch.allclose(found.energy, 1.5 * near + found.code.start.sum(1) / 2)


def test_a_step_into_infinity_is_refused_by_adjusted_chains_and_named_by_others():
    """An energy that is infinite beyond 1: adjusted chains stay inside."""
    toy = Linear()

    def wall(images: Tensor, code: Code) -> Tensor:
        x = code.start[:, 0]
        return torch.where(x.abs() < 1, 0 * x, torch.inf)

    begin = Code(torch.zeros(50, NUMBERS, dtype=torch.float64))
    found = guide(toy, wall, Dynamics(1.0), Schedule(30, 0), chains=50, begin=begin)
    assert found.code.start[:, 0].abs().max() < 1
    assert found.code.start[:, 0].var() == pytest.approx(0.2911, rel=0.5)  # of a normal cut at 1; 50 draws: 20%
    with pytest.raises(PushforwardError, match="diverged in move"):
        guide(toy, wall, langevin(1.0), Schedule(30, 0), chains=50, begin=begin)


def test_a_diagnosis_tells_arrived_chains_from_stuck_ones():
    toy = Linear()
    schedule = Schedule(200, 100)
    good = diagnose(guide(toy, toy.energy, hmc(), schedule, chains=4).history, 100)
    assert good.worst is not None
    assert good.worst < 1.1  # of a hundred independent draws; which ones they are, rounding decides
    assert all(value is not None and value > 50 for value in good.ess.values())
    stuck = diagnose(guide(toy, toy.energy, langevin(1e-5), schedule, chains=4).history, 100)
    assert stuck.worst is not None
    assert stuck.worst > 1.5
    assert diagnose(guide(toy, toy.energy, schedule=Schedule(3), chains=2).history, 1).worst is None


@pytest.mark.parametrize(("moves", "told"), [(4, False), (9, False), (10, True)])
def test_effective_sizes_are_told_where_they_tell_stuck_chains_from_free_ones(moves: int, told: bool):
    toy = Linear()
    sizes = []
    for way in (langevin(1e-5), hmc()):
        said = diagnose(guide(toy, toy.energy, way, Schedule(moves, 0), chains=4).history, 0)
        assert said.worst is not None
        sizes += [said.ess["energy"]]
    stuck, free = sizes
    assert (stuck is not None and free is not None and stuck < free) is told
    assert (stuck is None and free is None) is not told


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda toy: guide(toy, toy.energy, chains=0), "1 chain or more"),
        (lambda toy: guide(toy, toy.energy, langevin(0.0)), "positive number"),
        (lambda toy: guide(toy, toy.energy, schedule=Schedule(5, 5)), "a warm-up of fewer"),
        (lambda toy: guide(toy, toy.energy, schedule=Schedule(5, 2, draws=4)), "at most as many draws"),
        (lambda toy: guide(toy, toy.energy, schedule=Schedule(5, rungs=0)), "1 rung or more"),
        (lambda toy: guide(toy, toy.energy, schedule=Schedule(5, rungs=12)), "reach the top of 12 in 5 moves"),
        (lambda toy: guide(toy, toy.energy, schedule=Schedule(10**11, rungs=10**11)), "rungs of 16 chains would take"),
        (lambda toy: guide(toy, toy.energy, schedule=Schedule(5, 2, anneal=1, rungs=2)), "in the place of annealing"),
        (lambda toy: guide(toy, toy.energy, begin=Code(torch.zeros(2, 9)), chains=2), r"a start of shape \(2, 6\)"),
        (lambda toy: guide(toy, Energy(()), chains=2), "without terms"),
        (
            lambda toy: guide(fashion(["bag"] * 3), brightness, chains=2),
            "For 2 images give as many labels or prompts, or one; got 3",
        ),
        (lambda toy: guide(rk45(), brightness, chains=2), "Adaptive steps have no gradient"),
        (
            lambda toy: guide(toy, lambda images, code: WEIGHT * images.detach().mean((1, 2, 3))),
            "no gradient in the code",
        ),
        (lambda toy: best(toy, toy.energy, steps=0), "1 step or more"),
        (lambda toy: best(toy, toy.energy, learning_rate=math.inf), "positive learning rate"),
        (lambda toy: best(toy, toy.energy, candidates=0), "1 candidate or more"),
        (lambda toy: best(toy, toy.energy, candidates=2, begin=toy.draw(1)), "and codes to begin at"),
        (
            lambda toy: guide(toy, toy.energy, schedule=Schedule(4, 2, anneal=2), begin=toy.draw(16)),
            "draws of the prior",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call, said: str):
    with pytest.raises(PushforwardError, match=said):
        call(Linear())


def test_a_proposal_that_cannot_be_decoded_is_refused_and_no_other():
    """A network that has no answer far away: its chains stay where they were, the others are what they are alone."""
    plain = gaussian_diffusion(VP(), "ddim")  # of noises

    class Short:
        def at(self, process: Process, times: Tensor, like: Tensor) -> Callable[..., Tensor]:
            ask = plain.model.denoiser.at(process, times, like)

            def answer(k: int | Tensor, u: Tensor, of: Tensor | None = None) -> Tensor:
                far = (u.flatten(1).norm(dim=1) > 3.5).view(-1, 1, 1, 1)
                return torch.where(far, math.nan, ask(k, u, of))

            return answer

    short = Diffusion(replace(plain.model, denoiser=Short()), plain.plan, dtype=torch.float64)
    drawn = short.draw(6, seed=2)
    begin = replace(drawn, start=0.3 * drawn.start)
    asked: dict[str, Any] = {"dynamics": mala(0.8), "schedule": Schedule(12, 6), "begin": begin, "chains": 6}
    kept: list[Chains] = []
    found = guide(short, brightness, callback=kept.append, **asked)
    for chains in kept[:-1]:  # wherever it is interrupted
        assert torch.equal(guide(short, brightness, resume=chains, **asked).code.start, found.code.start)
    accepted = torch.stack([record.acceptance for record in found.history[1:]])
    assert (accepted == 0).any()
    assert (accepted.sum(0) > 0).all()
    assert found.code.start.flatten(1).norm(dim=1).max() < 3.5
    assert found.energy.isfinite().all()
    free = guide(plain, brightness, **asked)
    same = (accepted > 0).all(0)
    assert torch.allclose(found.code.start[same], free.code.start[same], atol=1e-9)
    with pytest.raises(PushforwardError, match="diverged"):
        guide(short, brightness, chains=1, begin=replace(begin[:1], start=9 + begin.start[:1]))


def test_descents_that_end_do_so_for_good_whatever_the_others_do():
    """A gradient that points up for some of the codes: these are given up where they began, and asked no more."""
    toy = Linear()

    def lying(images: Tensor, code: Code) -> Tensor:
        value = images.square().flatten(1).sum(1)
        sign = torch.where(code.start[:, 0].detach() > 0.5, -1, 1)
        return value.detach() + sign * (value - value.detach())

    begin = toy.draw(6)
    begin.start[:, 0] = torch.tensor([-1.0, 1, -1, 1, -1, -1])
    asked: dict[str, Any] = {"optimiser": "l-bfgs", "steps": 40, "prior": None}
    together = best(toy, lying, count=6, begin=begin, **asked)
    ends = begin.start[:, 0] > 0.5
    assert (together.nfe[ends] < 20).all()
    assert (together.nfe[~ends] > 20).all()
    assert torch.equal(together.code.start[ends], begin.start[ends])
    for i in range(6):
        alone = best(toy, lying, count=1, begin=begin[i : i + 1], **asked)
        assert torch.allclose(alone.code.start[0], together.code.start[i], atol=1e-6)  # of sums of other shapes
        assert not ends[i] or int(alone.nfe) == int(together.nfe[i])


def test_prompts_are_encoded_once_a_batch():
    """The negative one too, where there is no other; by lists and tuples."""
    model = load("emoji")
    assert model.text is not None
    calls: list[Any] = []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return model.text(*args, **options)

    diffusion = Diffusion(replace(model, text=counted), SamplerSpec("ddim", 2).plan(model))
    for labels in (None, ["noto"], ("noto",)):
        calls.clear()
        guide(diffusion.given(labels), brightness, schedule=Schedule(3), chains=1)
        assert len(calls) == 1


def test_energies_of_16_bits_are_weighted_in_32():
    toy = Linear()
    half = of(lambda images, code: images.half().mean((1, 2, 3)) + 30, "half")
    found = guide(toy, 2500 * half, mala(), Schedule(2), chains=2)  # 75000: above float16's greatest number
    assert found.energy.isfinite().all()


def test_chains_go_on_only_with_what_they_began_with():
    toy = Linear()
    kept: list[Chains] = []
    guide(toy, toy.energy, schedule=Schedule(2), chains=2, callback=kept.append)
    with pytest.raises(PushforwardError, match="energies energy; these are 2 x 6, and other"):
        guide(toy, of(toy.energy, "other"), chains=2, resume=kept[-1])
    with pytest.raises(PushforwardError, match="to go on with have 1 rung, not 3"):
        guide(toy, toy.energy, schedule=Schedule(2, rungs=3), chains=2, resume=kept[-1])
    with pytest.raises(PushforwardError, match="kept no draw"):
        guide(toy, toy.energy, schedule=Schedule(1, 0), chains=2, resume=kept[1])


@pytest.mark.parametrize("prompts", [None, ["noto", "twemoji"]])
def test_a_model_that_reads_is_guided(prompts):
    model = load("emoji")
    plan = SamplerSpec("ddim", 1).plan(model)
    found = guide(Diffusion(model, plan).given(prompts), brightness, schedule=Schedule(1, 0), chains=2)
    assert found.images.shape == (2, 3, 32, 32)
