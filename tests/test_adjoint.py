"""Gradients through plans: all ways agree with automatic differentiation of the sequential run, in less memory."""

import weakref
from itertools import pairwise

import pytest
import torch

from pushforward.denoiser import Function
from pushforward.errors import PushforwardError
from pushforward.execute import Parallel, bands, run, system
from pushforward.execute.adjoint import Exact, Implicit, Phantom, Skeleton, differentiable
from pushforward.linear import VP, Blurring, BlurringLangevin, Flow, Gaussian, Langevin, products
from pushforward.model import Network
from pushforward.plan import SOLVERS, Register, ddim, exponential, gddim, grid
from pushforward.plan.collocation import collocation
from support.helpers import FIELD, PROCESSES, RESTLESS, gaussian_denoiser, mixture_denoiser, normal, point_denoiser

SETTINGS = [
    *((name, {}) for name in SOLVERS if name != "collocation"),
    ("ddim", {"eta": 0.6}),
    ("gddim", {"noise": 0.5, "order": 0}),
]
SOME = pytest.mark.parametrize(
    "process",
    [p for n, p in PROCESSES.items() if n not in ("cosine", "discrete", "ve", "langevin")],
    ids=lambda p: p.name,
)
EVERY_SOLVER = pytest.mark.parametrize(
    ("name", "settings"), SETTINGS, ids=lambda x: x if isinstance(x, str) else str(x)
)
FEW = pytest.mark.parametrize(
    "process", [VP(), Flow(), Blurring(FIELD), Langevin(), BlurringLangevin(field=FIELD)], ids=lambda p: p.name
)
CALIBRATED = Gaussian(0.25)


def toy(process, seed=0):
    """A network with weights and a condition, both to be differentiated, that answers differently at each time."""
    weight, condition = (
        (0.5 * normal(2, 2, seed=seed + 5)).requires_grad_(),
        normal(2, 1, seed=seed + 6).requires_grad_(),
    )
    blocks = process.blocks

    def module(u, t, c):
        mixed = torch.einsum("oi,bi...->bo...", weight[:1, :blocks], u) + weight[1, 0] * u[:, :1].flip(-1)
        c = c.view(-1, 1, 1, 1)
        return torch.tanh(mixed / (1 + t.to(u).view(-1, 1, 1, 1)) + c) * (1 + 0.1 * c)

    return Network(module, "sample", condition=condition), [weight, condition]


def inputs(plan, seed=1):
    process = plan.process
    shape = (2, process.blocks, *FIELD)
    start = (process.t_max * normal(*shape, seed=seed)).requires_grad_()
    noise = normal(len(plan.noises), *shape, seed=seed + 1).requires_grad_()
    return start, noise


def drawn(plan, noise):
    return dict(zip(plan.noises, noise, strict=True)).__getitem__


def gradients(last, of, seed=9):
    return torch.autograd.grad((last * normal(*last.shape, seed=seed)).sum(), of, allow_unused=True)


def both(plan, gradient, seed=0, **options):
    """Gradients in start, noises, weight and condition: of the run, and as asked for."""
    denoiser, parameters = toy(plan.process, seed)
    start, noise = inputs(plan)
    of = [start, noise, *parameters]
    last = run(plan, denoiser, start, noise=drawn(plan, noise))
    found = differentiable(plan, denoiser, start, noise=noise, gradient=gradient, parameters=parameters, **options)
    torch.testing.assert_close(found, last, rtol=1e-8, atol=1e-8)
    return gradients(last, of), gradients(found, of)


def relative(found, expected):
    """The greatest relative error of any of the gradients."""
    pairs = [(f, e) for f, e in zip(found, expected, strict=True) if f is not None and f.numel()]
    return max(float((f - e).norm() / e.norm().clamp_min(1e-300)) for f, e in pairs)


# -- transposes ----------------------------------------------------------------------------------------------------


@FEW
@pytest.mark.parametrize(("name", "settings"), [("ddim", {"eta": 0.5}), ("unipc", {}), ("rk4", {})])
def test_the_systems_transposes_are_transposes(process, name, settings, monkeypatch):
    """<M y, x> = <y, M^T x> in float64, the system in several blocks of rows where it is solved by blocks."""
    monkeypatch.setattr(bands, "_BLOCK", 5)
    plan = SOLVERS[name](process, grid.uniform(process, 12), **settings)
    times = torch.tensor([node.time for node in plan.nodes if node.asks], dtype=torch.float64)
    stacked = system.System(plan, CALIBRATED.response(process, times), torch.empty(2, process.blocks, *FIELD).double())
    states, answers, residual, cotangent = (
        stacked.pack(normal(stacked.size, 2, process.blocks, *FIELD, seed=i)) for i in range(4)
    )
    residual[:, 0] = 0
    answers[:, [n for n, node in enumerate(plan.nodes) if not node.asks]] = 0

    def close(a, b):
        torch.testing.assert_close((a[0] * a[1]).sum(), (b[0] * b[1]).sum(), rtol=1e-9, atol=1e-9)

    close((stacked.correct(residual), cotangent), (residual, stacked.transposed(cotangent)))
    on_states, on_answers = stacked.pulled(cotangent)
    moved = stacked.residual(states, answers, torch.zeros_like(states)) + states
    moved[:, 0] = 0
    torch.testing.assert_close(
        (moved * cotangent).sum(), (states * on_states + answers * on_answers).sum(), rtol=1e-9, atol=1e-9
    )
    solved = stacked.transposed(cotangent)  # with the start's row
    on_states, on_answers = stacked.pulled(solved)
    torch.testing.assert_close(
        solved - on_states - products(stacked.response.mT, on_answers), cotangent, rtol=1e-9, atol=1e-9
    )
    if plan.noises:
        xi = normal(len(plan.noises), 2, process.blocks, *FIELD, seed=5)
        constant = stacked.constant(drawn(plan, xi), 2, xi)
        close((constant, cotangent), (stacked.pack(xi), stacked.noise_cotangent(cotangent)))


# -- exact ---------------------------------------------------------------------------------------------------------


@SOME
@EVERY_SOLVER
def test_every_gradient_is_that_of_automatic_differentiation(process, name, settings):
    """In start, noises, weights and condition, float64.

    `Exact` and an undamped `Phantom` of one step more than calls (its map is nilpotent around the solution) differ from
    it by the order of summation. `Implicit`'s tolerance holds for cotangents, and its error is an estimate: the bound
    leaves a factor of ten for both.
    """
    if name == "sscs" and process.name in RESTLESS:
        pytest.skip("refused (test_splitting.py)")
    stiff = name == "euler-maruyama" or "noise" in settings  # needs a grid within (0, t_max)
    start, end = (0.9 * process.t_max, process.t_min) if stiff else (None, 0.0)
    plan = SOLVERS[name](process, grid.uniform(process, 3, start=start, end=end), **settings)
    denoiser, parameters = toy(process)
    start, noise = inputs(plan)
    of = [start, noise, *parameters]
    last = run(plan, denoiser, start, noise=drawn(plan, noise))
    expected = gradients(last, of)
    rounds = []
    for gradient, bound in ((Exact(), 1e-9), (Phantom(plan.nfe + 1), 1e-9), (Implicit(1e-5), 1e-4)):
        found = differentiable(
            plan, denoiser, start, noise=noise, gradient=gradient, parameters=parameters, backward=rounds.append
        )
        torch.testing.assert_close(found, last, rtol=1e-9, atol=1e-9)
        assert relative(gradients(found, of), expected) < bound
    assert 1 <= rounds[-1].done <= plan.nfe
    assert all(later.nfe < earlier.nfe for earlier, later in pairwise(rounds))


@pytest.mark.parametrize("process", [VP(), BlurringLangevin(field=FIELD)], ids=lambda p: p.name)
@pytest.mark.parametrize("gradient", [Exact(), Implicit(1e-9), Phantom(5)], ids=lambda g: type(g).__name__)
def test_gradients_are_finite_differences(process, gradient):
    """Central differences in float64: error h^2, rounding 1e-16 / h."""
    plan = ddim(process, grid.uniform(process, 4), eta=0.5)
    denoiser = mixture_denoiser(process, normal(3, 1, *FIELD), 0.1)
    start, noise = inputs(plan)

    def value(start, noise):
        return differentiable(plan, denoiser, start, noise=noise, gradient=gradient).square().sum()

    on_start, on_noise = torch.autograd.grad(value(start, noise), [start, noise])
    a, b = normal(*start.shape, seed=7), normal(*noise.shape, seed=8)
    h = 1e-5
    with torch.no_grad():
        difference = (value(start + h * a, noise + h * b) - value(start - h * a, noise - h * b)) / (2 * h)
    torch.testing.assert_close((on_start * a).sum() + (on_noise * b).sum(), difference, rtol=1e-6, atol=1e-7)


def test_a_reference_mean_has_no_part_in_the_gradient():
    data = Gaussian(0.3, torch.full((1, *FIELD), 0.3))
    plan = exponential(VP(), torch.linspace(0.9, 0.01, 5).double(), reference=data, order=2)
    assert any(register.kind == "mean" for node in plan.nodes for register in node.terms)
    for gradient in (Exact(), Implicit(1e-9, reference=data)):
        assert relative(*reversed(both(plan, gradient))) < 1e-7


# -- implicit ------------------------------------------------------------------------------------------------------


@FEW
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("response", ["gaussian", "data"])
def test_implicit_is_exact_after_as_many_rounds_as_calls(process, mixed, response):
    """The products settle one after another from the data end, whatever the response; float64 rounding."""
    plan = gddim(process, grid.uniform(process, 6), order=2)
    mixing = Implicit.mixing if mixed else None
    expected, found = both(plan, Implicit(1e-300, response=response, mixing=mixing))
    assert relative(found, expected) < 1e-9
    _, early = both(plan, Implicit(1e-300, response=response, mixing=mixing, max_rounds=2))
    assert relative(early, expected) > 1e-7


@pytest.mark.parametrize("process", [VP(), BlurringLangevin(field=FIELD)], ids=lambda p: p.name)
def test_rounds_are_few_on_long_chains(process):
    """40 calls in no more than 16 rounds (12 and 15 when written), of a network far from the response's Gaussian."""
    plan = ddim(process, grid.power(process, 40))
    rounds = []
    expected, found = both(plan, Implicit(1e-4), method=Parallel(tolerance=1e-10), backward=rounds.append)
    assert relative(found, expected) < 1e-3
    assert rounds[-1].done <= 16
    assert rounds[-1].residual <= 1e-4


def test_images_stop_for_themselves_and_do_not_mix():
    """One image has no loss, another needs more rounds: the batch gives each what it gets alone."""
    plan = ddim(VP(), grid.uniform(VP(), 8))
    denoiser = mixture_denoiser(VP(), normal(3, 1, *FIELD), 0.1)
    start = normal(3, 1, *FIELD, seed=3).requires_grad_()
    weights = torch.tensor([0.0, 1.0, 1e-6]).double().view(-1, 1, 1, 1)
    last = differentiable(plan, denoiser, start, gradient=Implicit())
    (found,) = torch.autograd.grad((weights * last).square().sum(), start)
    (expected,) = torch.autograd.grad((weights * run(plan, denoiser, start)).square().sum(), start)
    assert found[0].eq(0).all()
    for i in (1, 2):
        assert relative([found[i]], [expected[i]]) < 1e-3


@FEW
def test_products_are_split_into_calls_of_the_largest_size(process):
    plan = ddim(process, grid.uniform(process, 5), eta=0.5)
    sizes = []
    network, (weight, condition) = toy(process)

    def module(u, t, c):
        sizes.append(len(u))
        return network.module(u, t, c)

    start, noise = inputs(plan)
    of = [start, noise, weight, condition]
    counted = Network(module, "sample", condition=condition)
    for gradient in (Implicit(1e-9, max_rows=3), Phantom(8, max_rows=3)):
        last = differentiable(plan, counted, start, noise=noise, gradient=gradient, parameters=of[2:])
        sizes.clear()
        found = gradients(last, of)
        assert max(sizes) == 3
        assert relative(found, gradients(run(plan, network, start, noise=drawn(plan, noise)), of)) < 1e-6


def test_an_image_whose_rounds_diverge_is_swept_instead():
    """A response far too strong for a stiff network makes moves explode; only for the image that has one."""
    process = VP()
    plan = gddim(process, grid.uniform(process, 30))
    stiffness = torch.tensor([-60.0, 0.2]).double().requires_grad_()
    network = Network(lambda u, _, c: c.view(-1, 1, 1, 1) * u, "sample", condition=stiffness)
    start = normal(2, 1, *FIELD).requires_grad_()
    seen = []
    asked = Network(lambda u, t, c: (seen.append(len(u)), network.module(u, t, c))[1], "sample", condition=stiffness)
    last = differentiable(plan, asked, start, gradient=Implicit(mixing=None, response="data"), parameters=[stiffness])
    seen.clear()
    found = gradients(last, [start, stiffness])
    assert seen.count(1) >= plan.nfe
    expected = gradients(run(plan, network, start), [start, stiffness])
    for f, e in zip(found, expected, strict=True):
        for i in range(2):
            assert relative([f[i]], [e[i]]) < 1e-3


@pytest.mark.parametrize("end", [0.0, 0.05])
def test_implicit_plans_have_implicit_gradients(end):
    """Central differences of the converged solve in float64, in start and a weight; there is no order to sweep in.

    A plan that ends above 0 asks at its last node too.
    """
    process = VP()
    plan = collocation(process, grid.power(process, 6, end=end), order=2, reference=CALIBRATED)
    assert plan.nodes[-1].asks == (end > 0)
    assert plan.implicit
    scale = torch.tensor(1.0).double().requires_grad_()
    mixture = mixture_denoiser(process, 0.5 * normal(3, 1, *FIELD), 0.2)
    denoiser = Function(lambda u, t: scale * mixture.denoise(u, t))
    start, _ = inputs(plan)
    method = Parallel(tolerance=1e-12, mixing=None)
    rounds = []

    def value(start, gradient):
        last = differentiable(
            plan, denoiser, start, gradient=gradient, method=method, parameters=[scale], backward=rounds.append
        )
        return last.sin().sum()

    on_start, on_scale = torch.autograd.grad(value(start, Implicit(1e-9)), [start, scale])
    assert rounds[-1].residual <= 1e-9
    direction, h, values = normal(*start.shape, seed=7), 1e-5, []
    with torch.no_grad():
        for sign in (1, -1):
            scale += sign * h
            values.append(value(start + sign * h * direction, Implicit()))
            scale -= sign * h
    difference = (values[0] - values[1]) / (2 * h)
    torch.testing.assert_close((on_start * direction).sum() + on_scale, difference, rtol=1e-6, atol=1e-7)
    with pytest.raises(PushforwardError, match="is implicit"):
        value(start, Exact())


# -- phantom and skeleton --------------------------------------------------------------------------------------------


@FEW
@pytest.mark.parametrize("tau", [1.0, 0.4])
@pytest.mark.parametrize("steps", [1, 3])
def test_phantom_is_backpropagation_through_damped_steps(process, steps, tau):
    """Against automatic differentiation of the steps written out, for all inputs."""
    plan = ddim(process, grid.uniform(process, 4), eta=0.5)
    denoiser, parameters = toy(process)
    start, noise = inputs(plan)
    of = [start, noise, *parameters]
    times = torch.tensor([node.time for node in plan.nodes if node.asks], dtype=torch.float64)
    held = CALIBRATED.response(process, times)
    stacked = system.System(plan, held, start)
    ask = denoiser.at(process, times, start)

    def sequential():
        """All node states, as the plan's own recurrence gives them."""
        values, xi = {Register("state", 0): start.detach()}, drawn(plan, noise.detach())
        for n, node in enumerate(plan.nodes):
            if n:
                values[Register("noise", n)] = xi(n) if n in plan.noises else None
                values[Register("state", n)] = sum(o(values[r]) for r, o in node.terms.items())
            if node.asks:
                values[Register("answer", n)] = ask(n, values[Register("state", n)])
        return torch.stack([values[Register("state", n)] for n in range(len(plan.nodes))])

    with torch.no_grad():
        states = stacked.pack(sequential())
    constant = torch.zeros_like(states)
    nodes = list(plan.noises)
    constant = constant.index_copy(1, torch.tensor(nodes), products(stacked._noise[:, nodes], stacked.pack(noise)))
    for _ in range(steps):
        pixels = stacked.unpack(states)
        answers = torch.stack(
            [ask(n, pixels[n]) if node.asks else torch.zeros_like(pixels[n]) for n, node in enumerate(plan.nodes)]
        )
        gap = stacked.residual(states, stacked.pack(answers), constant)
        first = stacked.pack(start[None]) - states[:, :1]
        states = states + tau * (stacked.correct(gap) + products(stacked._from_start[0], first))
    expected = gradients(stacked.unpack(states)[-1], of)
    _, found = both(plan, Phantom(steps, tau))
    assert relative(found, expected) < 1e-9


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_phantom_asks_for_one_round_less_than_its_steps(steps):
    calls = []

    def denoise(u, _):
        calls.append(len(u))
        return torch.tanh(u)

    plan = ddim(VP(), grid.uniform(VP(), 4))
    start, _ = inputs(plan)
    last = differentiable(plan, Function(denoise), start, gradient=Phantom(steps))
    calls.clear()
    gradients(last, [start])
    assert len(calls) == (steps - 1) * plan.nfe  # a formula is asked time by time


LINEAR = ["ddim", "ddpm", "gddim", "exponential", "dpm++", "unipc"]  # exact for the linear part of any process


@pytest.mark.parametrize(
    ("process", "name"), [*((VP(), n) for n in (*LINEAR, "euler", "rk4")), *((Blurring(FIELD), n) for n in LINEAR)],
    ids=lambda x: x if isinstance(x, str) else x.name,
)  # fmt: skip
def test_skeleton_is_the_transition_from_start_to_end(process, name):
    """tau Psi(t_end, t_0)^T g, sqrt(alpha-bar) ratios for VP, and no network call; the state ends above t_min."""
    plan = SOLVERS[name](process, torch.linspace(0.8, 0.1, 6).double())
    calls = []
    denoiser = mixture_denoiser(process, normal(3, 1, *FIELD), 0.1)
    counted = Function(lambda u, t: (calls.append(t), denoiser.denoise(u, t))[1])
    start, noise = inputs(plan)
    last = differentiable(plan, counted, start, noise=noise, gradient=Skeleton(0.3))
    calls.clear()
    (found,) = gradients(last, [start])
    assert not calls
    g = normal(*start.shape, seed=9)
    ends = torch.tensor([plan.nodes[-1].time, 0.8]).double()
    psi = process.transition(ends, torch.zeros(2).double())
    torch.testing.assert_close(found, 0.3 * (psi[0] @ psi[1].inverse()).T(g), rtol=1e-8, atol=1e-8)
    if process.name == "vp":
        alpha = process.rates(ends)[0]
        torch.testing.assert_close(found, 0.3 * alpha[0] / alpha[1] * g, rtol=1e-8, atol=1e-8)


def test_skeleton_is_a_phantom_step_with_the_noise_held():
    plan = ddim(VP(), grid.uniform(VP(), 5), eta=0.4)
    _, phantom = both(plan, Phantom(1, 0.1, response="noise"))
    _, skeleton = both(plan, Skeleton(0.1))
    assert relative(skeleton[:2], phantom[:2]) < 1e-12
    assert skeleton[2:] == (None, None)
    assert phantom[2].norm() > 0


def test_skeleton_says_where_the_noise_cannot_be_held():
    start = normal(1, 1, *FIELD).requires_grad_()
    plan = SOLVERS["ddim"](Flow(), torch.tensor([1.0, 0.5]).double())
    last = differentiable(plan, Function(lambda u, _: 0.5 * u), start, gradient=Skeleton())
    with pytest.raises(PushforwardError, match="below t_max"):
        last.sum().backward()


# -- the function ----------------------------------------------------------------------------------------------------


@FEW
@pytest.mark.parametrize("gradient", [Exact(), Implicit(1e-9)], ids=["exact", "implicit"])
def test_forward_and_backward_may_both_be_parallel(process, gradient):
    """The parallel forward pass to 1e-10 gives the same states, hence gradients, to about that."""
    plan = ddim(process, grid.uniform(process, 8), eta=0.3)
    expected, found = both(plan, gradient, method=Parallel(tolerance=1e-10))
    assert relative(found, expected) < 1e-6


@pytest.mark.parametrize("gradient", [Exact(), Implicit(), Phantom(3), Skeleton()], ids=lambda g: type(g).__name__)
@pytest.mark.parametrize("method", [None, Parallel()], ids=["sequential", "parallel"])
def test_single_precision_stays(gradient, method):
    plan = ddim(VP(), grid.uniform(VP(), 5), eta=0.5)
    denoiser = mixture_denoiser(VP(), normal(3, 1, *FIELD), 0.1)
    start, noise = (x.detach().float().requires_grad_() for x in inputs(plan))
    double = noise.detach().double().requires_grad_()
    last = differentiable(plan, denoiser, start, noise=double, gradient=gradient, method=method)
    assert last.dtype == torch.float32
    on_start, on_noise = torch.autograd.grad(last.sum(), [start, double])
    assert (on_start.dtype, on_noise.dtype) == (torch.float32, torch.float64)
    reference = differentiable(plan, denoiser, start.double(), noise=double, gradient=gradient, method=method)
    torch.testing.assert_close(
        on_start.double(), torch.autograd.grad(reference.sum(), start)[0].double(), rtol=1e-3, atol=1e-3
    )


def test_leaves_get_their_gradients_by_backward():
    plan = ddim(VP(), grid.uniform(VP(), 4))
    denoiser, (weight, condition) = toy(VP())
    start, _ = inputs(plan)
    unused = torch.ones(2).requires_grad_()
    fixed = torch.ones(2)
    last = differentiable(plan, denoiser, start, parameters=[weight, condition, weight, unused, fixed])
    last.square().sum().backward()
    found = [x.grad.clone() for x in (start, weight, condition)]
    run(plan, denoiser, start).square().sum().backward()
    for f, x in zip(found, (start, weight, condition), strict=True):
        torch.testing.assert_close(f, x.grad - f)
    assert unused.grad is None
    assert fixed.grad is None


@pytest.mark.parametrize("gradient", [Exact(), Implicit(1e-10)], ids=["exact", "implicit"])
def test_gradients_go_on_behind_conditions_and_starts(gradient):
    """A condition made by an embedding, a start made from a code: neither is a leaf."""
    plan = ddim(VP(), grid.uniform(VP(), 4))
    network, (weight, _) = toy(VP())
    embedding, code = torch.nn.Embedding(3, 1).double(), normal(2, 1, *FIELD).requires_grad_()
    labels = torch.tensor([2, 0])

    def value(function):
        condition = embedding(labels)
        return function(network.given(condition), code.tanh(), condition)

    of = [weight, embedding.weight, code]
    plain = value(lambda denoiser, start, _: run(plan, denoiser, start))
    made = value(
        lambda denoiser, start, condition: differentiable(
            plan, denoiser, start, gradient=gradient, parameters=[weight, condition]
        )
    )
    behind = value(
        lambda denoiser, start, _: differentiable(
            plan, denoiser, start, gradient=gradient, parameters=[weight, embedding.weight]
        )
    )
    expected = gradients(plain, of)
    assert relative(gradients(made, of), expected) < 1e-7
    assert relative(gradients(behind, of), expected) < 1e-7


def test_a_parameter_computed_from_another_is_refused():
    plan = ddim(VP(), grid.uniform(VP(), 2))
    weight = torch.ones(2, 1).double().requires_grad_()
    condition = (2 * weight).tanh()
    network = Network(lambda u, _, c: c.view(-1, 1, 1, 1) * u, "sample", condition=condition)
    with pytest.raises(PushforwardError, match="Parameter 1 is computed from parameter 0"):
        differentiable(plan, network, normal(2, 1, *FIELD), parameters=[weight, condition])
    first, second = (2 * weight).unbind(0)  # made together, but not of one another
    differentiable(plan, network, normal(2, 1, *FIELD), parameters=[first, second])


def test_nothing_is_recorded_where_nothing_is_asked_for():
    plan = ddim(VP(), grid.uniform(VP(), 3))
    denoiser, parameters = toy(VP())
    start, _ = inputs(plan)
    with torch.no_grad():
        assert not differentiable(plan, denoiser, start, parameters=parameters).requires_grad
    assert not differentiable(plan, denoiser, start.detach()).requires_grad
    last = differentiable(plan, denoiser, start.detach(), parameters=parameters)
    last.sum().backward()
    assert start.grad is None
    assert all(p.grad is not None for p in parameters)


def test_what_must_not_change_is_watched():
    """States are our own copies; weights that change between the passes are noticed; no second derivatives."""
    plan = ddim(VP(), grid.uniform(VP(), 3))
    denoiser, (weight, _) = toy(VP())
    start, _ = inputs(plan)
    first = start * 1
    last = differentiable(plan, denoiser, first, parameters=[weight])
    expected = gradients(run(plan, denoiser, start), [start])
    with torch.no_grad():
        first.zero_()
        other = last.detach().clone()
        last.detach().zero_()
    assert relative(gradients(last, [start]), expected) < 1e-9
    assert other.norm() > 0
    last = differentiable(plan, denoiser, start, parameters=[weight])
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        last.sum().backward()
    last = differentiable(plan, denoiser, start)
    (once,) = torch.autograd.grad(last.square().sum(), start, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()


def test_a_network_that_ignores_its_input_has_a_gradient():
    plan = ddim(VP(), grid.uniform(VP(), 3))
    denoiser = point_denoiser(VP(), normal(1, 1, *FIELD))
    start, _ = inputs(plan)
    expected = gradients(run(plan, denoiser, start), [start])
    for gradient in (Exact(), Implicit(1e-9)):
        found = gradients(differentiable(plan, denoiser, start, gradient=gradient), [start])
        assert relative(found, expected) < 1e-9


def test_noise_is_stacked_or_gets_no_gradient():
    plan = ddim(VP(), grid.uniform(VP(), 3), eta=1.0)
    denoiser = gaussian_denoiser(VP(), Gaussian(0.3))
    start, noise = inputs(plan)
    with pytest.raises(PushforwardError, match="noises of this plan"):
        differentiable(plan, denoiser, start, noise=noise[:1])
    with pytest.raises(PushforwardError, match="stochastic"):
        differentiable(plan, denoiser, start)
    with pytest.raises(PushforwardError, match="as one tensor"):
        differentiable(plan, denoiser, start, noise=lambda n: 2 * noise[n - 1])
    found = differentiable(plan, denoiser, start, noise=drawn(plan, noise.detach()))
    torch.testing.assert_close(found, run(plan, denoiser, start, noise=drawn(plan, noise)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Implicit(0.0), lambda: Implicit(max_rounds=0), lambda: Implicit(max_rows=0), lambda: Phantom(0),
        lambda: Phantom(1, 0.0), lambda: Phantom(1, max_rows=0), lambda: Skeleton(-1.0),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(PushforwardError, match=r"has a wrong '\w+': it should be greater than (0|or equal to 1); got"):
        make()


@pytest.mark.parametrize("method", [None, Parallel()], ids=["sequential", "parallel"])
def test_autocast_of_the_forward_pass_holds_in_the_backward_pass(method):
    kinds = []

    def denoise(u, _):
        kinds.append(torch.is_autocast_enabled("cpu"))
        return torch.tanh(u)

    plan = ddim(VP(), grid.uniform(VP(), 2))
    start, _ = inputs(plan)
    with torch.autocast("cpu", torch.bfloat16):
        last = differentiable(plan, Function(denoise), start, method=method)
    last.sum().backward()
    assert len(kinds) > 2
    assert all(kinds)


def test_memory_is_one_call_and_the_states():
    """At 100 steps never two calls' graphs are alive; what is saved between the passes are the asked states."""
    graphs, alive, saved = [], [], []

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u):
            ctx.save_for_backward(u)
            graphs.append(weakref.ref(ctx))
            return torch.tanh(u)

        @staticmethod
        def backward(ctx, g):
            (u,) = ctx.saved_tensors
            alive.append(sum(graph() is not None for graph in graphs))
            return g * (1 - torch.tanh(u).square())

    plan = gddim(VP(), grid.uniform(VP(), 100), order=2)
    start, _ = inputs(plan)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        last = differentiable(plan, Function(lambda u, _: Marked.apply(u)), start)
    assert sum(graph() is not None for graph in graphs) == 0
    assert sum(saved) == plan.nfe * start.numel()
    last.sum().backward()
    assert len(alive) == 100
    assert max(alive) == 1
    del last
    alive.clear()
    run(plan, Function(lambda u, _: Marked.apply(u)), start).sum().backward()
    assert max(alive) == 100  # as counted for automatic differentiation
