"""Parallel sampling that begins at the solution of other codes: the same images in fewer rounds."""

from dataclasses import replace

import pytest
import torch

from pushforward import Diffusion, load
from pushforward.errors import PushforwardError
from pushforward.execute import Parallel, Solution, parallel, run
from pushforward.guidance.decoding import Trails
from pushforward.guidance.dynamics import Schedule, mala
from pushforward.guidance.posterior import best, guide
from pushforward.linear import Gaussian, root
from pushforward.maps.spec import SamplerSpec
from pushforward.plan import SOLVERS, grid
from support.helpers import EVERY, FIELD, PROCESSES, gaussian_denoiser, mixture_denoiser, normal

WAY = Parallel(tolerance=1e-4, reference=Gaussian(1.0))


def problem(process, solver="ddim", count=3, steps=12, **settings):
    """A plan, a denoiser with several modes, and the function from a seed to starts and noises."""
    exponent = 4.0 if process.name == "ve" else 2.0
    ts = grid.power(process, steps, exponent=exponent, start=0.95 * process.t_max, end=process.t_min)
    plan = SOLVERS[solver](process, ts, **settings)
    denoiser = mixture_denoiser(process, normal(4, 1, *FIELD), 0.1)
    factor = root(process, ts[:1], Gaussian(1.0))[0]

    def code(near=0.0):
        """Codes at an angle to those of 0."""
        angle = torch.tensor(near, dtype=torch.float64)

        def turned(seed):
            a, b = (normal(count, process.blocks, *FIELD, seed=seed + k) for k in (0, 1000))
            return a * angle.cos() + b * angle.sin()

        return factor(turned(3)), {k: turned(100 + k) for k in plan.noises}.__getitem__

    return plan, denoiser, code


@EVERY
@pytest.mark.parametrize(("solver", "settings"), [("ddim", {}), ("ddim", {"eta": 1.0}), ("unipc", {})])
def test_a_solution_of_other_codes_leads_to_the_same_images(process, solver, settings):
    plan, denoiser, code = problem(process, solver, **settings)
    start, noise = code()
    begun = parallel(plan, denoiser, start, noise=noise, method=WAY)
    start, noise = code(0.05)
    expected = run(plan, denoiser, start, noise=noise)
    warm = parallel(plan, denoiser, start, noise=noise, method=replace(WAY, start=begun))
    error = (warm.last - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.max() < 3e-4  # the error left is estimated to be at most a third of that
    assert warm.rounds <= plan.nfe
    assert not warm.diverged.any()


def test_the_same_codes_take_the_rounds_that_it_takes_to_see_it():
    plan, denoiser, code = problem(PROCESSES["vp"])
    start, noise = code()
    begun = parallel(plan, denoiser, start, noise=noise, method=replace(WAY, tolerance=1e-9))
    again = parallel(plan, denoiser, start, noise=noise, method=replace(WAY, start=begun))
    assert again.rounds == 1
    torch.testing.assert_close(again.last, begun.last, rtol=0, atol=1e-6)


@EVERY
def test_gaussian_data_need_no_more_than_a_round(process):
    """The linear response to what changed is exact."""
    plan, _, code = problem(process)
    denoiser, way = gaussian_denoiser(process, Gaussian(0.3)), replace(WAY, reference=Gaussian(0.3))
    begun = parallel(plan, denoiser, code()[0], method=way)
    assert parallel(plan, denoiser, code(0.3)[0], method=replace(way, start=begun)).rounds == 1


def test_images_begin_each_for_itself():
    """A batch is a loop, and an image that had diverged begins as it would have without a solution."""
    plan, denoiser, code = problem(PROCESSES["vp"])
    begun = parallel(plan, denoiser, code()[0], method=WAY)
    lost = torch.tensor([False, True, False])
    begun = replace(begun, states=begun.states.masked_fill(lost.view(1, -1, 1, 1, 1), torch.nan), diverged=lost)
    start = code(0.05)[0]
    together = parallel(plan, denoiser, start, method=replace(WAY, start=begun))
    assert together.last.isfinite().all()
    for k in range(3):
        own = begun.some(torch.tensor([k]))
        way = replace(WAY, start="reference" if lost[k] else own)
        alone = parallel(plan, denoiser, start[k : k + 1], method=way)
        assert alone.nfe == together.nfe[k]
        torch.testing.assert_close(together.last[k : k + 1], alone.last, rtol=0, atol=1e-6)


def test_a_far_solution_is_worth_nothing_and_is_left_alone():
    plan, denoiser, code = problem(PROCESSES["vp"])
    begun = parallel(plan, denoiser, 100 * code()[0], method=WAY)
    start = code()[0]
    warm, cold = (parallel(plan, denoiser, start, method=way) for way in (replace(WAY, start=begun), WAY))
    torch.testing.assert_close(warm.last, cold.last, rtol=0, atol=1e-6)
    assert torch.equal(warm.nfe, cold.nfe)


def test_a_solution_of_another_plan_is_refused():
    plan, denoiser, code = problem(PROCESSES["vp"])
    begun = parallel(plan, denoiser, code()[0], method=WAY)
    other, _, code = problem(PROCESSES["vp"], steps=10)
    with pytest.raises(PushforwardError, match="the same plan for the same images"):
        parallel(other, denoiser, code()[0], method=replace(WAY, start=begun))


# -- chains and descents -----------------------------------------------------------------------------------------------


def half(images, code):
    return 20 * (images - 0.5).square().flatten(1).mean(1)


@pytest.fixture(scope="module")
def diffusion():
    plan = SamplerSpec("ddim", 12).plan(load("fashion-vp"))
    return Diffusion(load("fashion-vp"), plan, parallel=Parallel(tolerance=1e-5))


def test_chains_and_descents_begin_at_their_last_trajectories(diffusion):
    """They find what they find anyway, in fewer evaluations."""
    cold = diffusion.run_by(parallel=replace(diffusion.parallel, start="copies"))
    for found, other in (
        [best(d, half, count=1, steps=2) for d in (diffusion, cold)],
        [guide(d, half, mala(1e-3), Schedule(2), chains=1) for d in (diffusion, cold)],
    ):
        torch.testing.assert_close(found.images, other.images, rtol=0, atol=1e-3)
        assert int(found.nfe.sum()) < int(other.nfe.sum())


def test_a_resumed_run_ends_where_the_whole_one_does(diffusion):
    seen = []
    whole = guide(diffusion, half, mala(1e-3), Schedule(2), chains=2, callback=seen.append)
    rest = guide(diffusion, half, mala(1e-3), Schedule(2), chains=2, resume=seen[1])
    torch.testing.assert_close(rest.images, whole.images, rtol=0, atol=1e-3)


def test_trails_keep_what_is_nearest():
    """Of each image the last trajectory and the one it began at; on the line through both a next one begins."""
    trails, which = Trails(3), torch.tensor([2, 0])

    def solution(x, diverged=(False, False)):
        states = x[None, :, :1].expand(3, -1, -1)
        none = torch.zeros(2)
        return Solution(states, 1, none, none, torch.tensor(diverged), 2 * states[:2])

    x = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    assert trails.near(x, which) == "reference"
    trails.keep(x, which, solution(x))
    assert trails.near(torch.zeros(1, 2), torch.tensor([1])).diverged.tolist() == [True]
    trails.keep(x + 1, which, solution(x + 1, (False, True)))  # what diverged is not kept
    begun = trails.near(x + 1.25, which)
    assert begun.diverged.tolist() == [False, False]
    torch.testing.assert_close(begun.states[0, :, 0], torch.tensor([1.25, 10.0]))
    torch.testing.assert_close(begun.answers[1, :, 0], torch.tensor([2.5, 20.0]))
    trails.keep(x + 3, which, solution(x + 3))
    assert trails.codes[:, 2, 0].sort().values.tolist() == [1.0, 3.0]
