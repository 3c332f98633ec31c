"""Nodes that do not depend on one another's answers are asked in one call, to the same result."""

import itertools

import pytest
import torch

from pushforward.denoiser import Function
from pushforward.execute import differentiable, parallel, run, steps
from pushforward.linear import VP, Operator
from pushforward.plan import SOLVERS, Builder, grid
from support.helpers import FIELD, mixture_denoiser, normal

PROCESS = VP()
TIMES = grid.power(PROCESS, 3, exponent=2.0, start=0.9, end=PROCESS.t_min)


def staged(*, noisy: bool = False):
    """Steps of DDIM with the mean of two answers about stages on either side of the step's middle, as EPD's are."""
    psi, factor = PROCESS.signal, lambda t: PROCESS.covariance(t).cholesky()
    builder = Builder(PROCESS, "staged", TIMES)
    u = builder.start()
    for t, later in itertools.pairwise(TIMES):

        def moved(answer, to, t=t, u=u):
            return psi(to) @ answer + factor(to) @ factor(t).inverse() @ (u.state - psi(t) @ answer)

        stages = [builder.node(float(s), moved(u.answer, s), 0.1 * Operator.scalar(1.0) if noisy else None, stage=True)
                  for s in (torch.lerp(t, later, w) for w in (0.3, 0.7))]  # fmt: skip
        noise = 0.1 * Operator.scalar(1.0) if noisy else None
        u = builder.node(float(later), moved(0.5 * stages[0].answer + 0.5 * stages[1].answer, later), noise)
    return builder.build()


class Counting:
    """A denoiser that keeps the rows of each of its calls."""

    def __init__(self):
        self.inner, self.rows = mixture_denoiser(PROCESS, normal(4, 1, *FIELD), 0.1), []

    def at(self, process, times, like):
        ask = self.inner.at(process, times, like)

        def counted(k, u, of=None):
            self.rows.append(len(u))
            return ask(k, u, of)

        return counted


def one_by_one(plan, denoiser, start, noise=None):
    """The last state by a call for each node."""
    walk = steps(plan, start, noise=noise)
    ask, state = denoiser.at(plan.process, plan.asked_times, start), next(walk)
    for i in range(plan.nfe):
        state = walk.send((state, ask(i, state)))
    return state


@pytest.mark.parametrize("noisy", [False, True])
def test_independent_nodes_are_asked_in_one_call(noisy):
    plan, start = staged(noisy=noisy), normal(2, 1, *FIELD, seed=5)
    assert (plan.nfe, plan.rounds, plan.calls) == (9, 6, "9 network evaluations in 6 rounds")
    assert "rounds=6" in repr(plan)
    asked = []

    def noise(k):
        asked.append(k)
        return normal(2, 1, *FIELD, seed=100 + k)

    denoiser, told = Counting(), []
    found = run(plan, denoiser, start, noise=noise, callback=told.append)
    assert denoiser.rows == [2, 4] * 3
    assert asked == list(plan.noises)
    assert [(p.done, p.total, p.nfe, p.call) for p in told] == [(k + 1, 9, 2, k) for k in range(9)]
    assert [p.time for p in told] == plan.asked_times.tolist()
    torch.testing.assert_close(found, one_by_one(plan, denoiser, start, noise), rtol=0, atol=1e-12)
    at_once = parallel(plan, denoiser, start, noise=noise)
    torch.testing.assert_close(found, at_once.last, rtol=0, atol=1e-2)


def test_a_batch_is_a_loop():
    plan, denoiser, start = staged(), Counting(), normal(3, 1, *FIELD, seed=5)
    together = run(plan, denoiser, start)
    for k in range(3):
        torch.testing.assert_close(run(plan, denoiser, start[k : k + 1]), together[k : k + 1], rtol=0, atol=1e-12)


def test_a_node_may_be_asked_before_earlier_ones():
    """The third node needs no answer, so that it is asked with the first; noises are drawn in the nodes' order."""
    one = Operator.scalar(1.0)
    builder = Builder(PROCESS, "crossed", TIMES)
    u = builder.start()
    middle = builder.node(float(TIMES[1]), 0.5 * u.answer + 0.5 * u.state, 0.2 * one)
    early = builder.node(float(TIMES[2]), 0.9 * u.state, 0.3 * one, stage=True)
    builder.node(float(TIMES[2]), 0.5 * middle.answer + 0.5 * early.answer)
    plan, asked = builder.build(), []
    assert plan.waves == ((0, 2), (1,), (3,))
    assert (plan.nfe, plan.rounds) == (3, 2)

    def noise(k):
        asked.append(k)
        return normal(2, 1, *FIELD, seed=100 + k)

    denoiser, start = Counting(), normal(2, 1, *FIELD, seed=5)
    found = run(plan, denoiser, start, noise=noise)
    assert asked == [1, 2]
    assert denoiser.rows == [4, 2]
    torch.testing.assert_close(found, one_by_one(plan, denoiser, start, noise), rtol=0, atol=1e-12)
    wanted = start.requires_grad_()
    exact = differentiable(plan, Counting(), wanted, noise=noise)
    (slope,) = torch.autograd.grad(exact.square().sum(), wanted)
    (expected,) = torch.autograd.grad(run(plan, denoiser, wanted, noise=noise).square().sum(), wanted)
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "sscs"])
def test_no_solver_has_more_rounds_than_calls(name):
    plan = SOLVERS[name](PROCESS, TIMES)
    assert 0 < plan.rounds <= plan.nfe
    if name in ("ddim", "heun", "auto"):
        assert plan.rounds == plan.nfe


def test_each_image_has_its_own_condition_in_a_call_of_several_nodes():
    labels = torch.tensor([0.5, -0.5])

    class Conditional:
        def at(self, process, times, like):
            def ask(k, u, of=None):
                own = labels if of is None else labels[of]
                return own.to(u).view(-1, 1, 1, 1).expand_as(u)

            return ask

    plan, start = staged(), normal(2, 1, *FIELD, seed=5)
    found = run(plan, Conditional(), start)
    for k in range(2):
        alone = run(plan, Function(lambda u, _, k=k: torch.full_like(u, float(labels[k]))), start[k : k + 1])
        torch.testing.assert_close(found[k : k + 1], alone, rtol=0, atol=1e-12)
