"""The best image in a number of rounds: what is chosen, what it costs, and that it is nearer than step by step."""

import pytest
import torch

from pushforward.denoiser import Watched
from pushforward.errors import PushforwardError
from pushforward.execute import Parallel, parallel, run
from pushforward.execute.budget import nodes_in, spent, window_in
from pushforward.linear import VP, Blurring, Gaussian, Langevin, root
from pushforward.maps.spec import parse
from pushforward.model import Model
from pushforward.plan import auto, collocation, ddim, grid
from pushforward.verbs.samplers import diffusion as model_diffusion
from support.helpers import FIELD, mixture_denoiser, normal


@pytest.mark.parametrize("rounds", range(1, 13))
@pytest.mark.parametrize("allowed", [None, 1, 7, 30, 100])
def test_the_plan_that_is_chosen_can_be_paid(rounds, allowed):
    nodes = nodes_in(rounds, allowed)
    assert nodes >= 1
    if allowed is not None:
        window = window_in(nodes, rounds, allowed)
        assert (min(nodes, rounds) if window == 1 else spent(nodes, rounds)) <= allowed


def test_what_any_rounds_cost_is_known_at_once():
    """Counted round by round, or call by call, these would never be: 3 + 2 + 1, and the sum of 1 to 10^15."""
    assert spent(3, 10**15) == 6
    assert 2 * spent(10**15, 10**15) == 10**15 * (10**15 + 1)
    assert nodes_in(10**15, 10**18) == 10**15


def start_of(plan, count=8):
    return root(plan.process, plan.times[:1], Gaussian(1.0))[0](normal(count, 1, *FIELD, seed=3))


@pytest.mark.parametrize("allowed", [None, 20, 3])
def test_a_budget_is_kept(allowed):
    process = VP()
    denoiser = mixture_denoiser(process, normal(4, 1, *FIELD), 0.1)
    plan = auto(process, nodes_in(4, allowed), Gaussian(1.0))
    found = parallel(plan, denoiser, start_of(plan), method=Parallel(1e-12, rounds=4, max_evaluations=allowed))
    assert found.rounds <= 4
    if allowed is not None:
        assert int(found.nfe.max()) <= allowed


def test_five_rounds_are_nearer_than_five_calls():
    """To the converged image, with four clusters in six by six pixels, in the median of 32 starts."""
    process = VP()
    denoiser, reference = mixture_denoiser(process, normal(4, 1, *FIELD), 0.1), Gaussian(1.0)
    fine, few, many = (auto(process, n, reference) for n in (200, 5, nodes_in(5)))
    start = start_of(fine, 32)
    exact = run(fine, denoiser, start)
    method = Parallel(rounds=5, reference=reference)
    one_by_one, at_once = run(few, denoiser, start), parallel(many, denoiser, start, method=method).last
    errors = [(image - exact).flatten(1).norm(dim=1).median() for image in (one_by_one, at_once)]
    assert errors[1] < 0.5 * errors[0]


def test_a_mean_that_is_not_known_is_asked_for_first():
    """Of pure noise the answer is the data's mean: so five rounds come twice as near as where it is taken for 0."""
    process, centres = VP(), 2 * normal(1, 1, *FIELD) + 0.5 * normal(4, 1, *FIELD, seed=1)
    asked = []

    def watch(u, *_, **__):
        asked.append(len(u))

    denoiser = Watched(mixture_denoiser(process, centres, 0.1), watch)
    fine, plan = (auto(process, n, Gaussian(1.0)) for n in (200, nodes_in(5)))
    start = start_of(fine, 32)
    exact = run(fine, denoiser, start)
    errors = []
    for mean in (0.0, torch.zeros(1, *FIELD)):
        asked.clear()
        found = parallel(plan, denoiser, start, method=Parallel(rounds=5, reference=Gaussian(1.0, mean)))
        errors.append((found.last - exact).flatten(1).norm(dim=1).median())
        assert found.rounds == 5
        assert int(found.nfe.sum()) == sum(asked)
        assert asked[0] == 32 * (plan.nfe if isinstance(mean, torch.Tensor) else 1)
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("max_rows", [None, 3])
def test_asked_for_the_mean_first_all_rounds_are_exact_in_the_end(max_rows):
    process = VP()
    denoiser = mixture_denoiser(process, 1.0 + normal(4, 1, *FIELD), 0.1)
    plan, told = auto(process, 12, Gaussian(1.0)), []
    method = Parallel(1e-12, rounds=12, reference=Gaussian(1.0), max_rows=max_rows)
    found = parallel(plan, denoiser, start_of(plan), method=method, callback=told.append)
    torch.testing.assert_close(found.last, run(plan, denoiser, start_of(plan)), rtol=0, atol=1e-5)  # float32
    assert [one.done for one in told] == list(range(1, found.rounds + 1))
    assert sum(one.nfe for one in told) == int(found.nfe.sum())


def test_a_stochastic_plan_has_its_own_steps_and_noise():
    process = VP()
    denoiser = mixture_denoiser(process, normal(4, 1, *FIELD), 0.1)
    plan = ddim(process, grid.uniform(process, 12), eta=1.0)
    noises = {k: normal(8, 1, *FIELD, seed=100 + k) for k in plan.noises}
    found = parallel(plan, denoiser, start_of(plan), noise=noises.__getitem__, method=Parallel(rounds=12))
    expected = run(plan, denoiser, start_of(plan), noise=noises.__getitem__)
    torch.testing.assert_close(found.last, expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("plan", [ddim(VP(), grid.power(VP(), 20)), collocation(VP(), grid.power(VP(), 8))])
def test_too_small_a_budget_is_refused(plan):
    denoiser = mixture_denoiser(plan.process, normal(4, 1, *FIELD), 0.1)
    with pytest.raises(PushforwardError, match="more than the 20 allowed"):
        parallel(plan, denoiser, start_of(plan), method=Parallel(rounds=5, max_evaluations=20))


def test_rounds_choose_steps_that_are_not_said():
    assert parse("auto:rounds=5").steps == nodes_in(5)
    assert parse("auto:rounds=5:max_evaluations=30").steps == nodes_in(5, 30)
    assert parse("auto:rounds=5", {}, {"steps": 20}).steps == nodes_in(5)
    assert parse("ddim:rounds=5:steps=50").steps == 50
    assert parse("auto:rounds=5").label == "auto:rounds=5:within=0.001"


@pytest.mark.parametrize(
    ("process", "solver"), [(VP(), "auto"), (Langevin(), "gddim"), (Blurring(field=FIELD), "auto")]
)
def test_rounds_choose_a_solver_that_is_not_said(process, solver):
    """Said in words and in Python, they make the same plan."""
    network = mixture_denoiser(process, normal(4, 1, *FIELD), 0.1)
    model = Model("mixture", process, network, (1, *FIELD), Gaussian(1.0))
    said, given = parse("auto:rounds=5").plan(model), model_diffusion(model, parallel=Parallel(rounds=5)).plan
    assert said.solver == given.solver == solver
    assert said.nfe == given.nfe == nodes_in(5)
    assert model_diffusion(model, "ddim", parallel=Parallel(rounds=5)).plan.solver == "ddim"
    assert model_diffusion(model, parallel=Parallel()).plan.solver == "auto"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rounds": 0}, "rounds must"), ({"rounds": 3, "max_rounds": 3}, "one of them"), ({"max_evaluations": 9}, "say")],
)
def test_senseless_budgets_are_refused(settings, message):
    with pytest.raises(PushforwardError, match=message):
        Parallel(**settings)


@pytest.mark.parametrize("text", ["auto:rounds=0", "auto:rounds=2.5", "auto:max_evaluations=9", "rk45:rounds=5"])
def test_senseless_words_are_refused(text):
    with pytest.raises(PushforwardError):
        parse(text)
