"""Particles and their evidence, against Gaussian posteriors in closed form."""

import gc
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import pushforward as pf
from pushforward import Code, Diffusion, Model, Parallel, PushforwardError
from pushforward.guidance.chains import Chains
from pushforward.guidance.dynamics import Dynamics, ess, langevin, mala, pcn
from pushforward.guidance.energies import of
from pushforward.guidance.particles import Particles, Temper, fk, guide, psi
from pushforward.guidance.posterior import Guided
from pushforward.guidance.samplers import parse_sampler
from pushforward.linear import Gaussian
from pushforward.maps.generator import gan
from pushforward.maps.spec import SamplerSpec
from support.helpers import FIELD, PROCESSES, gaussian_denoiser, mixture_denoiser, normal

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


def check_codes(there: Diffusion, found: Guided, wish: Wish) -> None:
    """Codes decode to the images, which are in float32."""
    again = there.decode(found.code.to(there.draw(1).start))
    assert (again - found.images).abs().max() < 1e-5
    assert torch.allclose(found.energy, wish(again, found.code), rtol=1e-4)


def check_moments(found: Guided, mean: Tensor, covariance: Tensor) -> None:
    """Bounds are four standard errors of as many independent draws as the evidence's error says."""
    assert found.evidence is not None
    count = 1 / (found.evidence.error**2 + 1 / len(found.images))
    x = found.images.double().flatten(1)
    weighted = found.weights @ x
    assert ((weighted - mean) / covariance.diagonal().sqrt()).abs().max() < 4 / math.sqrt(count)
    gap = x - weighted
    own = (found.weights[:, None] * gap).T @ gap
    assert (own - covariance).abs().max() < 4 * math.sqrt(2 / count) * covariance.diagonal().max()


@pytest.mark.parametrize(("kind", "solver", "settings"), KINDS)
@pytest.mark.parametrize("temper", ["increase", "constant", "adaptive"])
def test_particles_reach_the_posterior_and_its_evidence(
    kind: str, solver: str, settings: dict[str, object], temper: Temper
):
    wish, there = Wish(), diffusion(kind, solver, settings)
    mean, covariance, log = wish.truth(there)
    found = guide(there, wish, fk(share=0.5, temper=temper), chains=2000, batch=2000)
    assert found.evidence is not None
    check_moments(found, mean, covariance)
    assert abs(found.evidence.log - log) < 4 * found.evidence.error < 0.4
    check_codes(there, found, wish)
    assert (found.nfe == there.plan.nfe).all()


@pytest.mark.parametrize("dynamics", [mala(0.3), pcn(0.7), ess()])
@pytest.mark.parametrize("kind", ["vp", "langevin"])
def test_chains_draw_the_first_particles(dynamics: Dynamics, kind: str):
    """They see the denoised image half-way; their weights keep the evidence right, whatever they see."""
    there = diffusion(kind, "gddim", {"noise": 1.0}) if kind == "langevin" else diffusion(kind)
    wish = Wish()
    mean, covariance, log = wish.truth(there)
    found = guide(there, wish.smooth, psi(share=0.5, dynamics=dynamics, moves=6, at=0.5), chains=1500, batch=1500)
    assert found.evidence is not None
    check_moments(found, mean, covariance)
    assert abs(found.evidence.log - log) < 4 * found.evidence.error < 0.4
    check_codes(there, found, wish)
    assert (found.nfe > there.plan.nfe).all()


def test_chains_that_lead_keep_no_state_that_they_have_left() -> None:
    """However many moves they make: the present state, the next, and the one that is passed on."""
    living = []

    def energy(images: Tensor, code: Code) -> Tensor:
        living.append(sum(isinstance(one, Chains) for one in gc.get_objects()))
        return images.double().square().sum((1, 2, 3))

    guide(diffusion(), energy, psi(moves=9, dynamics=pcn()), chains=2)
    assert max(living) <= 3


@pytest.mark.parametrize("sampler", [fk(share=0.7), fk(temper="increase"), psi(at=0.3, moves=3)])
def test_small_populations_have_the_evidence_on_average(sampler: Particles):
    """100 of 8 particles: 4 standard errors, as their spread measures them."""
    wish, there = Wish(), diffusion(steps=5)
    number = 100 if sampler.lead is None else 25
    found = guide(there, wish.smooth, replace(sampler, populations=number), chains=8 * number).evidence
    assert found is not None
    assert found.populations == number
    assert math.exp(found.log - wish.truth(there)[2]) == pytest.approx(1, abs=4 * found.error)
    assert found.error < 0.2


def test_the_error_of_one_population_is_like_that_of_many():
    wish, there = Wish(), diffusion(steps=5)
    measured, estimated = (guide(there, wish, fk(populations=k), chains=4000, batch=4000).evidence for k in (40, 1))
    assert measured is not None
    assert estimated is not None
    assert estimated.error == pytest.approx(measured.error, rel=0.5)


def test_adaptive_temperatures_keep_ancestors_where_the_energy_is_steep():
    wish, there = Wish(0.05), diffusion(steps=20)
    log = wish.truth(there)[2]
    steady, adapted = (guide(there, wish, fk(share=0.8, temper=temper), chains=2000, batch=2000).evidence
                       for temper in ("constant", "adaptive"))  # fmt: skip
    assert steady is not None
    assert adapted is not None
    assert adapted.ancestors > 5 * steady.ancestors
    assert abs(adapted.log - log) < 0.5 < abs(steady.log - log)


def test_no_energy_changes_nothing():
    there = diffusion()
    found = guide(there, lambda images, code: 0 * images.sum((1, 2, 3)), fk(), chains=6, seed=4)
    assert found.evidence is not None
    assert (found.evidence.log, found.evidence.error, found.evidence.resampled) == (0, 0, 0)
    assert torch.equal(found.images, there.sample(6, seed=4))
    assert torch.equal(found.weights, torch.full((6,), 1 / 6, dtype=torch.float64))


def test_particles_are_weighed_and_never_resampled_with_share_0():
    wish, there = Wish(), diffusion()
    found = guide(there, wish, fk(share=0), chains=50)
    plain = there.sample(50)
    assert torch.equal(found.images, plain)
    energy = wish(plain, found.code)
    assert torch.allclose(found.weights, (-energy).softmax(0))
    assert found.evidence is not None
    assert found.evidence.log == pytest.approx(float((-energy).exp().mean().log()), abs=1e-6)
    assert found.evidence.ancestors == 50


@pytest.mark.parametrize("sampler", [fk(share=0.7), fk(3, populations=2, share=1), psi(moves=3, at=0.4)])
def test_batches_and_numbers_change_nothing(sampler: Particles):
    wish, there = Wish(0.2), diffusion()
    whole = guide(there, wish.smooth, sampler, chains=12, seed=2)
    split = guide(there, wish.smooth, sampler, chains=12, seed=2, batch=5)
    assert torch.allclose(whole.images, split.images)
    assert torch.allclose(whole.weights, split.weights)
    assert whole.evidence is not None
    assert split.evidence is not None
    assert whole.evidence.log == pytest.approx(split.evidence.log)
    if sampler.populations > 1:  # each of which may be drawn alone
        other = guide(there, wish.smooth, replace(sampler, populations=1), chains=6, seed=2, first=6)
        assert torch.equal(other.images, whole.images[6:])


def test_several_particles_per_image_leave_those_of_equal_weight():
    wish, there = Wish(), diffusion()
    mean, covariance, _ = wish.truth(there)
    found = guide(there, wish, fk(5, share=0.5), chains=400, batch=2000)
    assert torch.equal(found.weights, torch.full((400,), 1 / 400, dtype=torch.float64))
    check_moments(found, mean, covariance)
    check_codes(there, found, wish)
    assert (found.nfe == 5 * there.plan.nfe).all()


def test_few_checks_weigh_as_often_as_is_said():
    there, seen = diffusion(), list[int]()

    def counted(images: Tensor) -> Tensor:
        seen.append(len(images))
        return images.sum((1, 2, 3))

    guide(there, counted, fk(checks=2), chains=3)
    assert seen == [3, 3, 3]  # the last of the images themselves
    seen.clear()
    guide(there, counted, fk(), chains=3)
    assert len(seen) == there.plan.nfe + 1


def test_children_of_a_plan_with_memory_have_their_parents_past():
    """A multistep plan refers to answers of earlier steps, which a child takes over with the code."""
    process = PROCESSES["vp"]
    model = Model("clothes", process, mixture_denoiser(process, normal(4, 1, *FIELD), 0.1), (1, *FIELD))
    there = Diffusion(model, SamplerSpec("exponential", 8, {"order": 2, "noise": 1.0}).plan(model), dtype=torch.float64)
    found = guide(there, Wish(0.1), fk(share=1), chains=40)
    assert found.evidence is not None
    assert found.evidence.resampled > 3
    check_codes(there, found, Wish(0.1))


def test_populations_have_one_condition_each():
    model = pf.load("fashion-vp")
    there = Diffusion(model, SamplerSpec("ddpm", 2).plan(model))
    dark = lambda images, code: 3 * images.mean((1, 2, 3))  # noqa: E731
    with pytest.raises(PushforwardError, match="one label or prompt"):
        guide(there.given(["bag", "coat"]), dark, fk(), chains=2)
    same = guide(there.given(["bag", "bag"]), dark, fk(share=0), chains=2)
    one = guide(there.given("bag"), dark, fk(share=0), chains=2)
    assert torch.equal(same.images, one.images)
    each = guide(there.given(["bag", "bag", "coat", "coat"]), dark, fk(populations=2), chains=4)
    alone = guide(there.given("coat"), dark, fk(), chains=2, first=2)
    assert torch.allclose(each.images[2:], alone.images, atol=1e-5)


def test_what_particles_cannot_do_is_said():
    there, wish = diffusion(), Wish()
    silent = Diffusion(there.model, SamplerSpec("dpm++", 4).plan(there.model))
    with pytest.raises(PushforwardError, match=r"a plan with noise.*take dpm"):
        guide(silent, wish, fk())
    with pytest.raises(PushforwardError, match="a Generator has none"):
        guide(gan(torch.nn.Unflatten(1, (1, 2, 2)), 4), wish, fk())
    with pytest.raises(PushforwardError, match="all at once"):
        guide(there.run_by(parallel=Parallel()), wish, fk())
    with pytest.raises(PushforwardError, match="equal part"):
        guide(there, wish, fk(populations=3), chains=4)
    with pytest.raises(PushforwardError, match="'bad' is nan for particle 0;"):
        guide(there, of(lambda images: images.sum((1, 2, 3)) * math.nan, "bad"), fk())
    with pytest.raises(PushforwardError, match="no gradient"):
        guide(there, wish, psi())
    with pytest.raises(PushforwardError, match="no weights"):
        psi(dynamics=langevin())
    with pytest.raises(PushforwardError, match="2 moves"):
        psi(moves=1)
    with pytest.raises(PushforwardError, match="share from 0 to 1"):
        fk(share=2)
    with pytest.raises(PushforwardError, match="leave schedule"):
        pf.guide(there, wish, fk(), pf.Schedule(4))


def test_particles_in_words():
    assert parse_sampler("fk:particles=8:share=0.5:temper=increase") == fk(8, share=0.5, temper="increase")
    assert parse_sampler("psi:dynamics=mala:step-size=0.1:moves=4:at=0.5") == psi(dynamics=mala(0.1), moves=4, at=0.5)
    for wrong in ("fk:particles=0.5", "fk:moves=3", "psi:dynamics=slow", "psi:leaps=2"):
        with pytest.raises(PushforwardError, match=r"does not take these settings|wrong 'particles'.*got 0\.5"):
            parse_sampler(wrong)


@pytest.mark.parametrize("said", ["hmc:leaps", "mpgd:inner", "psi:moves", "fk:checks", "adam:candidates"])
def test_counts_that_would_run_for_days_are_refused(said):
    with pytest.raises(PushforwardError, match=f"says {said.partition(':')[2]}=100,000,000; take 100,000 at most"):
        parse_sampler(f"{said}=100000000")
    assert parse_sampler("mpgd:seed=100000000").seed == 100_000_000  # which is no count


def test_the_verb_takes_a_noisy_solver_by_itself():
    found = diffusion().model.guide(Wish(), pf.fk(2), chains=3, seed=1)
    assert (found.nfe == 40).all()
    assert found.evidence is not None
