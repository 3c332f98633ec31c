"""Collocation against truth: points, Gaussians, order, the exact flow; and what an implicit plan asks of executors."""

import math
from functools import partial

import pytest
import torch

from pushforward.denoiser import Function
from pushforward.errors import PushforwardError
from pushforward.execute import Parallel, parallel, run
from pushforward.execute.system import System
from pushforward.linear import POINT, VP, Flow, Gaussian, Langevin, Operator, root
from pushforward.plan import Builder, collocation, exponential, grid
from support.helpers import (
    EVERY,
    FIELD,
    PROCESSES,
    SMOOTH,
    exact_flow,
    gaussian_denoiser,
    inner,
    mixture_denoiser,
    normal,
    point_denoiser,
    times,
)  # fmt: skip

POINTLIKE = Parallel(tolerance=1e-11, response="data", mixing=None)


def gaussian(data):
    """A method whose linear response is that of Gaussian data, so that one round solves their equations."""
    return Parallel(tolerance=1e-11, reference=data, mixing=None)


def pick(operators, k):
    return Operator(operators.coefficients[k], operators.basis)


class Mixture:
    """`helpers.mixture_denoiser` for rows of many times together; told apart from it in a test below."""

    def __init__(self, images, variance):
        self.images, self.data, self.asked = images, Gaussian(variance), []

    def at(self, process, ts, like):
        none, centres = torch.zeros_like(ts), process.lift(self.images.to(like))
        psi, response = process.transition(ts, none), self.data.response(process, ts)
        white = self.data.covariance(process, ts).cholesky().inverse()
        seen = torch.stack([white[k](psi[k](centres)) for k in range(len(ts))]).flatten(2)

        def ask(k, u, of=None):
            k = torch.as_tensor(k).expand(len(u))
            self.asked += ts[k].tolist()
            distance = pick(white, k)(u).flatten(1)[:, None] - seen[k]
            mean = torch.tensordot(torch.softmax(-0.5 * distance.square().sum(-1), 1), centres, dims=1)
            return mean + pick(response, k)(u - pick(psi, k)(mean))

        return ask


def mixture(process, begin=0.9):
    """A mixture, and starts of its flow."""
    start = root(process, times(begin * process.t_max), Gaussian(1.0))[0](normal(3, process.blocks, *FIELD, seed=2))
    return Mixture(normal(4, 1, *FIELD), 0.05), start


# -- truth ------------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_data_point_is_reached_exactly(process, order):
    """Point data, C = 0: along the flow `u_t = Psi x_0 + R z`, rounding and quadrature err alone."""
    image, z = normal(1, 1, *FIELD), normal(2, process.blocks, *FIELD, seed=1)
    ts = inner(process, 4)
    psi, r = process.transition(ts, torch.zeros_like(ts)), root(process, ts)
    path = [psi[k](process.lift(image)) + r[k](z) for k in range(len(ts))]
    plan = collocation(process, ts, order=order)
    found = parallel(plan, point_denoiser(process, image), path[0], method=POINTLIKE).states
    for state, expected in zip(found, path, strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-6, atol=1e-7 * float(path[0].abs().max()))


@EVERY
@pytest.mark.parametrize("spectrum", [False, True], ids=["scalar", "spectrum"])
def test_gaussian_data_are_solved_exactly_in_their_own_coordinates(process, spectrum):
    """With the matching reference the network deviates by nothing, so any step is exact (rounding, quadrature)."""
    variance = torch.linspace(0.5, 0.1, 6, dtype=torch.float64).view(FIELD) if spectrum else 0.3
    data, ts, u = Gaussian(variance, mean=0.2), inner(process, 3), normal(2, process.blocks, *FIELD)
    plan = collocation(process, ts, reference=data)
    found = parallel(plan, gaussian_denoiser(process, data), u, method=gaussian(data)).last
    expected = exact_flow(process, data, float(ts[0]), float(ts[-1]), u)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("process", [PROCESSES[name] for name in SMOOTH], ids=SMOOTH)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_convergence(process, order):
    """Gaussian data in foreign coordinates, 12 and 48 steps against the exact flow: order + 1, less .35."""
    data, u = Gaussian(0.3), normal(2, process.blocks, *FIELD)
    errors = []
    for steps in (12, 48):
        ts = inner(process, steps)
        plan = collocation(process, ts, order=order, reference=Gaussian(0.1))
        solution = parallel(plan, gaussian_denoiser(process, data), u, method=gaussian(data))
        expected = exact_flow(process, data, float(ts[0]), float(ts[-1]), u)
        errors.append(float((solution.last - expected).norm() / expected.norm()))
    assert math.log2(errors[0] / errors[1]) / 2 > order + 1 - 0.35
    assert errors[1] < 2 * 10.0 ** (-2 - order)


@EVERY
def test_the_exact_flow_of_a_mixture(process):
    """A nonlinear truth: an explicit solver with 100 steps, which is right to 1e-4.

    Langevin diffusions, rougher in the variable, get twice the steps: 24 err by 2e-3 there.
    """
    denoiser, start = mixture(process)
    reference = Gaussian(0.5)
    truth = run(
        exponential(process, inner(process, 100), order=2, reference=reference, variable="angle", corrector="reuse"),
        denoiser,
        start,
    )
    plan = collocation(process, inner(process, 24 * process.blocks), reference=reference)
    found = parallel(plan, denoiser, start, method=Parallel(1e-6)).last
    assert float((found - truth).norm() / truth.norm()) < 1e-3


@EVERY
def test_every_process_through_to_clean_images(process):
    """From t_max to the image, asking nothing below t_min; an explicit solver with 64 steps that ends with the same
    call knows it to about 1e-3."""
    denoiser, start = mixture(process, begin=1.0)
    solver = partial(exponential, order=2, reference=Gaussian(0.5), variable="angle", corrector="reuse", denoise=True)
    ts = grid.angle(process, 24 * process.blocks)
    fine = torch.cat([grid.angle(process, 64, end=float(ts[-2])), ts[-1:]])
    truth = run(solver(process, fine), denoiser, start)
    plan = collocation(process, ts, reference=Gaussian(0.5))
    denoiser.asked.clear()
    found = parallel(plan, denoiser, start).last
    assert min(denoiser.asked) >= process.t_min * (1 - 1e-9)
    error = process.image(found - truth).norm() / process.image(truth).norm()
    assert float(error) < 5e-3


def test_the_mixture_of_these_tests_is_the_one_of_the_others():
    process, u = Langevin(), normal(3, 2, *FIELD)
    denoiser, ts = mixture_denoiser(process, normal(4, 1, *FIELD), 0.05), times(0.7, 0.2)
    found = Mixture(normal(4, 1, *FIELD), 0.05).at(process, ts, u)(torch.tensor([0, 1, 1]), u)
    expected = torch.cat([denoiser.denoise(u[:1], 0.7), denoiser.denoise(u[1:], 0.2)])
    torch.testing.assert_close(found, expected)


# -- implicit plans ---------------------------------------------------------------------------------------------------


def test_later_answers_are_used_and_counted():
    ts = inner(VP(), 6)
    plan = collocation(VP(), ts)
    assert plan.implicit
    assert plan.nfe == 7
    uses = [sorted(r.node for r in node.terms if r.kind == "answer") for node in plan.nodes]
    assert uses == [[], [0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6], [3, 4, 5, 6]]
    assert not exponential(VP(), ts, order=3).implicit


def test_the_end_is_the_answer_at_the_last_time_that_can_be_asked():
    ts = grid.explicit(VP(), [0.9, 0.5, 0.2, VP().t_min, 0.5 * VP().t_min, 0.0])
    plan = collocation(VP(), ts)
    assert [node.time for node in plan.nodes] == [0.9, 0.5, 0.2, VP().t_min, 0.0]
    (register,) = plan.nodes[-1].terms
    assert register == ("answer", 3)
    stepped = collocation(VP(), ts, denoise=False)
    assert [node.asks for node in stepped.nodes] == [True] * 4 + [False] * 2


def test_a_step_to_clean_images_without_denoising():
    """Flow matching from pure noise to clean data, the last step extrapolated: Gaussian data in foreign coordinates,
    fourth order, so that 24 steps err by less than 1e-4."""
    process, data, u = Flow(), Gaussian(0.3), normal(2, 1, *FIELD)
    plan = collocation(process, grid.angle(process, 24), reference=Gaussian(0.1), denoise=False)
    found = parallel(plan, gaussian_denoiser(process, data), u, method=gaussian(data)).last
    torch.testing.assert_close(found, exact_flow(process, data, 1.0, 0.0, u), rtol=0, atol=1e-4)


@EVERY
def test_the_solution_satisfies_the_plan(process):
    """Every node's state is the combination of registers that the plan says, term by term; solved to 1e-10."""
    denoiser, start = mixture(process)
    plan = collocation(process, inner(process, 24), reference=Gaussian(0.5))
    states = parallel(plan, denoiser, start, method=Parallel(1e-10)).states
    ask = denoiser.at(process, times(*(node.time for node in plan.nodes)), start)
    answers = [ask(k, u) for k, u in enumerate(states)]
    for k, node in enumerate(plan.nodes[1:], 1):
        values = {"state": states, "answer": answers}
        combined = sum(operator(values[register.kind][register.node]) for register, operator in node.terms.items())
        torch.testing.assert_close(combined, states[k], rtol=1e-8, atol=1e-9 * float(start.abs().max()))


@EVERY
@pytest.mark.parametrize("first", [1, 4])
def test_corrections_of_a_held_prefix_solve_the_rest(process, first):
    """With rows before `first` held, the others' linearised equations hold after one correction (float64 rounding)."""
    plan = collocation(process, inner(process, 6), reference=Gaussian(0.5))
    like, asked = normal(2, process.blocks, *FIELD), times(*(node.time for node in plan.nodes))
    system = System(plan, Gaussian(0.25).response(process, asked), like)
    states = system.pack(normal(7, 2, process.blocks, *FIELD, seed=1))
    answers, constant = (torch.zeros_like(states) for _ in range(2))
    system.respond(states, answers)
    moves = system.correct(system.residual(states, answers, constant, first), first)
    assert bool((moves[:, :first] == 0).all())
    left = system.residual(states + moves, system.respond(moves, answers.clone()), constant, first)
    assert float(left.abs().max()) < 1e-9 * float(states.abs().max())


def test_running_it_step_by_step_is_refused():
    with pytest.raises(PushforwardError, match="run it with parallel="):
        run(collocation(VP(), inner(VP(), 4)), point_denoiser(VP(), normal(1, 1, *FIELD)), normal(1, 1, *FIELD))


def test_what_does_not_converge_is_refused():
    """Answers a hundred times too strong: no preconditioner expects them."""
    plan = collocation(VP(), inner(VP(), 6))
    wild = Function(lambda u, _: 100 * u.sin())
    with pytest.raises(PushforwardError, match="did not converge"):
        parallel(plan, wild, normal(1, 1, *FIELD))


def test_rounds_may_exceed_the_calls_and_may_be_limited():
    """No prefix settles exactly, so the plan's calls are no bound; asked to stop early, it says what error is left."""
    denoiser, start = mixture(VP())
    plan = collocation(VP(), inner(VP(), 12), reference=Gaussian(0.5))
    patient = parallel(plan, denoiser, start, method=Parallel(1e-13, mixing=None, window=2))
    assert patient.rounds > plan.nfe
    assert float(patient.residual.max()) <= 1e-13
    hasty = parallel(plan, denoiser, start, method=Parallel(1e-13, mixing=None, max_rounds=3))
    assert hasty.rounds == 3
    assert float(hasty.residual.max()) > 1e-13
    assert hasty.nfe.tolist() == [3 * plan.nfe] * 3
    assert plan.calls == f"{plan.nfe} network evaluations per round"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: collocation(VP(), inner(VP(), 4), order=0), "at least 1"),
        (lambda: collocation(VP(), times(0.5, 1e-4, 0.0)), "two grid times at or above"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(PushforwardError, match=message):
        make()


def test_a_plan_refers_to_nodes_that_are_built():
    builder = Builder(VP(), "odd", inner(VP(), 2))
    first = builder.start()
    builder.node(0.1, first.state + builder.handle(7, 0.05).answer)
    with pytest.raises(PushforwardError, match="node 7, which was never built"):
        builder.build()


def test_the_reference_may_be_a_point():
    """C = 0 converges to the same image as C = s^2: both are of fourth order on the same flow."""
    denoiser, start = mixture(VP())
    ends = [
        parallel(collocation(VP(), inner(VP(), 48), reference=g), denoiser, start, method=Parallel(1e-7)).last
        for g in (POINT, Gaussian(0.5))
    ]
    assert float((ends[0] - ends[1]).norm() / ends[1].norm()) < 1e-3
