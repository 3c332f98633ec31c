"""Reversible solvers and their algebraic inverse; the plain inversion that is not one."""

import math

import pytest
import torch

from pushforward.denoiser import Function
from pushforward.errors import PushforwardError
from pushforward.execute import run
from pushforward.execute.backward import (
    backward,
    end_pair,
    forward,
    naive_inversion,
    predicted_inversion,
    residual_inversion,
)
from pushforward.linear import VP, Blurring, Flow, Gaussian, Process, root
from pushforward.model import Network
from pushforward.plan import Plan, ddim, ddpm, exponential, gddim, grid, runge_kutta, unipc
from pushforward.plan.reversible import bdia, o_belm
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

REVERSIBLE = {"o-belm": o_belm, "bdia": bdia, "bdia-1": lambda p, t: bdia(p, t, gamma=1.0)}
SOLVER = pytest.mark.parametrize("name", REVERSIBLE)


def data_of(process: Process) -> Function:
    """A nonlinear network: the answers to a mixture of Gaussians."""
    return mixture_denoiser(process, normal(3, 1, *FIELD), 0.05)


def start_of(process: Process, ts: torch.Tensor) -> torch.Tensor:
    return root(process, ts[:1], Gaussian(1.0))[0](normal(2, process.blocks, *FIELD, seed=2))


# -- the solvers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [PROCESSES[name] for name in SMOOTH], ids=SMOOTH)
@pytest.mark.parametrize(("name", "order"), [("o-belm", 2), ("bdia", 1), ("bdia-1", 2)])
def test_order_of_convergence(process, name, order):
    """Gaussian data against the exact flow; 12 and 24 steps show the order to 0.35, and are not far off it."""
    data, u, errors = Gaussian(0.3), normal(2, process.blocks, *FIELD), []
    for steps in (12, 24):
        ts = inner(process, steps)
        expected = exact_flow(process, data, float(ts[0]), float(ts[-1]), u)
        errors.append(
            float((run(REVERSIBLE[name](process, ts), gaussian_denoiser(process, data), u) - expected).norm())
        )
    assert math.log2(errors[0] / errors[1]) > order - 0.35
    assert errors[1] < 0.08 * float(expected.norm())


@EVERY
@SOLVER
def test_a_data_point_is_reached_exactly(process, name):
    """Along the flow `u_t = Psi x_0 + R z`, and from the noisiest time to clean data: rounding and quadrature alone."""
    image, z = normal(1, 1, *FIELD), normal(2, process.blocks, *FIELD, seed=1)
    ts, denoiser = inner(process, 3), point_denoiser(process, image)
    psi, r = process.transition(ts, torch.zeros_like(ts)), root(process, ts)
    path = [psi[k](process.lift(image)) + r[k](z) for k in (0, -1)]
    found = run(REVERSIBLE[name](process, ts), denoiser, path[0])
    torch.testing.assert_close(found, path[1], rtol=1e-6, atol=1e-7 * float(path[0].abs().max()))
    found = process.image(run(REVERSIBLE[name](process, grid.uniform(process, 3)), denoiser, process.t_max * z))
    torch.testing.assert_close(found, image.expand_as(found), rtol=0, atol=1e-6)


def by_noise(plan: Plan, n: int, alpha: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What node n + 1 of a plan makes of states n - 1 and n, and of the noise prediction `(u_n - alpha D) / sigma`."""
    c = {(r.kind, r.node): o.coefficients[..., 0, 0] for r, o in plan.nodes[n + 1].terms.items()}
    eps = -c["answer", n] * sigma[n] / alpha[n]
    return c["state", n - 1], c["state", n] - eps / sigma[n], eps


@pytest.mark.parametrize("process", [*(PROCESSES[n] for n in ("vp", "cosine", "ve", "flow", "discrete")),
                                     Blurring(FIELD, blur_max=2.0)], ids=lambda p: p.name)  # fmt: skip
def test_o_belm_and_bdia_are_the_published_formulas(process):
    """In every row, the last to clean data included; for blurring in each frequency."""
    ts = torch.cat([inner(process, 5), times(0.0)])
    alpha, sigma = process.alpha_sigma(ts)
    s = sigma / alpha
    belm, bi = o_belm(process, ts), bdia(process, ts, gamma=0.7)
    for n in range(1, len(ts) - 1):
        h, before = s[n] - s[n + 1], s[n - 1] - s[n]
        published = (
            (h / before).square() * alpha[n + 1] / alpha[n - 1],
            (before**2 - h**2) / before**2 * alpha[n + 1] / alpha[n],
            -h * (h + before) / before * alpha[n + 1],
        )
        for found, expected in zip(by_noise(belm, n, alpha, sigma), published, strict=True):
            torch.testing.assert_close(found.expand_as(expected), expected, rtol=1e-10, atol=1e-10)
        a, back = alpha[n + 1] / alpha[n], alpha[n - 1] / alpha[n]
        eps = (sigma[n + 1] - a * sigma[n]) - 0.7 * (sigma[n - 1] - back * sigma[n])
        for found, expected in zip(
            by_noise(bi, n, alpha, sigma), (0.7 * torch.ones_like(a), a - 0.7 * back, eps), strict=True
        ):
            torch.testing.assert_close(found.expand_as(expected), expected, rtol=1e-10, atol=1e-10)


@SOLVER
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_grids_may_start_without_signal(name, steps):
    """Flow matching from t = 1 to 0: the first step is DDIM, and rows can be solved backwards from the second on."""
    process = Flow()
    ts = grid.uniform(process, steps)
    plan, denoiser, u = REVERSIBLE[name](process, ts), data_of(process), normal(2, 1, *FIELD)
    first = run(ddim(process, ts[:2]), denoiser, u)
    before_last, last = forward(plan, denoiser, u, first)
    torch.testing.assert_close(last, run(plan, denoiser, u), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(backward(plan, denoiser, last, before_last), (u, first), rtol=0, atol=1e-9)


def test_gamma_of_bdia():
    for gamma in (0.0, -0.5, 1.1, math.nan):
        with pytest.raises(PushforwardError, match="gamma in"):
            bdia(VP(), inner(VP(), 3), gamma=gamma)
    assert bdia(VP(), inner(VP(), 3)).settings["gamma"] == 0.5


# -- the inverse ------------------------------------------------------------------------------------------------------


@EVERY
@SOLVER
def test_backward_undoes_forward(process, name):
    """To clean data and back, to 1e-9 of the greatest value in float64; eight steps let rounding grow 1e4 times."""
    ts, denoiser = inner(process, 8, end=0.0), data_of(process)
    plan, first = REVERSIBLE[name](process, ts), start_of(process, ts)
    second = run(ddim(process, ts[:2]), denoiser, first)
    before_last, last = forward(plan, denoiser, first, second)
    torch.testing.assert_close(last, run(plan, denoiser, first), rtol=1e-9, atol=1e-9)
    scale = float(first.abs().max())
    found = backward(plan, denoiser, last, before_last)
    torch.testing.assert_close(found, (first, second), rtol=0, atol=1e-9 * scale)


FLOAT32 = {"o-belm": 1.4e-3, "bdia": 9e-4, "bdia-1": 7e-6}


@EVERY
@SOLVER
def test_float32(process, name):
    """Float32 all through errs by what rounding grows to; float64 states around a float32 network by next to nothing.

    In units of the first state, with 10 steps, at most 1.4e-4 was measured for O-BELM (blurring), 9e-5 for BDIA and
    7e-7 for gamma = 1; the bounds are ten times that. With float64 states, 2e-13. The network sees float32 alone.
    """
    ts, truth = inner(process, 10), data_of(process)

    def seen(u, t):
        assert u.dtype == torch.float32
        return truth.denoise(u, t)

    plan, denoiser, first = REVERSIBLE[name](process, ts), Function(seen), start_of(process, ts).float()
    second = run(ddim(process, ts[:2]), denoiser, first)
    scale = float(first.abs().max())
    before_last, last = forward(plan, denoiser, first, second)
    found = backward(plan, denoiser, last, before_last)
    assert found[0].dtype == last.dtype == torch.float32
    torch.testing.assert_close(found[0], first, rtol=0, atol=FLOAT32[name] * scale)
    first, second = first.double(), second.double()
    before_last, last = forward(plan, denoiser, first, second, network_dtype=torch.float32)
    found = backward(plan, denoiser, last, before_last, network_dtype=torch.float32)
    torch.testing.assert_close(found[0], first, rtol=0, atol=1e-11 * scale)


@EVERY
@pytest.mark.parametrize("name", ["o-belm", "bdia"])
def test_an_image_comes_back(process, name):
    """Whatever its pair: from the image, back to noise, and forward to the image again, in float64 to 1e-8."""
    ts, denoiser = inner(process, 5, end=0.0), data_of(process)
    plan, image = REVERSIBLE[name](process, ts), process.lift(normal(2, 1, *FIELD, seed=5))
    last, before_last = end_pair(plan, denoiser, image)
    assert last is image
    found = forward(plan, denoiser, *backward(plan, denoiser, last, before_last))
    torch.testing.assert_close(found, (before_last, last), rtol=0, atol=1e-8)


def test_calls_are_counted():
    asked, ts = [], inner(VP(), 6)

    def denoise(u, t):
        asked.append(t)
        return 0.5 * u

    u = normal(2, 1, *FIELD)
    backward(o_belm(VP(), ts), Function(denoise), u, u)
    assert asked == pytest.approx(ts[1:-1].flip(0).tolist())
    asked.clear()
    naive_inversion(ddim(VP(), ts), Function(denoise), u)
    assert asked == pytest.approx(ts[1:].flip(0).tolist())
    asked.clear()
    naive_inversion(ddim(VP(), ts), Function(denoise), u, asked="target")
    assert asked == pytest.approx(ts[:-1].flip(0).tolist())
    asked.clear()
    end_pair(o_belm(VP(), grid.uniform(VP(), 4)), Function(denoise), u)
    assert asked == pytest.approx([0.25])  # a network is not asked at time 0


def test_networks_are_asked_in_their_own_dtype():
    ts, module = inner(VP(), 4), torch.nn.Conv2d(1, 1, 3, padding=1)
    network = Network(lambda u, t, _: module(u), prediction="epsilon")
    first = normal(2, 1, *FIELD)
    plan = bdia(VP(), ts)
    with torch.no_grad():
        end = forward(plan, network, first, 0.9 * first, network_dtype=torch.float32)
        found = backward(plan, network, end[1], end[0], network_dtype=torch.float32)
    torch.testing.assert_close(found[0], first, rtol=0, atol=1e-9)


# -- the baseline -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("process", "asked"),
    [(p, "own") for p in PROCESSES.values()] + [(p, "target") for p in PROCESSES.values() if p.blocks == 1],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_naive_inversion_is_of_first_order_and_inexact(process, asked):
    """From an end with noise, its error halves with the step and is not zero.

    (At the target's time, Langevin diffusions take hundreds of steps to show it: left out.)
    """
    denoiser = gaussian_denoiser(process, Gaussian(0.3))
    errors = []
    for steps in (16, 32):
        ts = inner(process, steps)
        plan, first = ddim(process, ts), start_of(process, ts)
        found = naive_inversion(plan, denoiser, run(plan, denoiser, first), asked=asked)
        errors.append(float((found - first).norm() / first.norm()))
    assert 0.6 < math.log2(errors[0] / errors[1]) < 1.6
    assert 1e-4 < errors[1] < 0.5


@pytest.mark.parametrize("process", [PROCESSES[n] for n in ("vp", "flow")], ids=lambda p: p.name)
def test_naive_inversion_starts_from_clean_data(process):
    """Whose last step has no inverse: finer grids still bring the first state nearer."""
    denoiser, errors = gaussian_denoiser(process, Gaussian(0.3)), []
    for steps in (12, 48):
        ts = inner(process, steps, end=0.0)
        plan, first = ddim(process, ts), start_of(process, ts)
        found = naive_inversion(plan, denoiser, run(plan, denoiser, first))
        errors.append(float((found - first).norm() / first.norm()))
    assert errors[1] < 0.5 * errors[0]
    assert errors[1] < 0.2


def test_naive_inversion_of_a_data_point_is_exact():
    """One answer is as good as another there, and so is one row: Euler's as DDIM's."""
    process = PROCESSES["langevin"]
    ts, image = inner(process, 5), normal(1, 1, *FIELD)
    plan, denoiser = ddim(process, ts), point_denoiser(process, image)
    first = start_of(process, ts)
    found = naive_inversion(plan, denoiser, run(plan, denoiser, first))
    torch.testing.assert_close(found, first, rtol=0, atol=1e-9)
    plan, denoiser = runge_kutta(VP(), inner(VP(), 5), tableau="euler"), point_denoiser(VP(), image)
    first = normal(2, 1, *FIELD)
    found = naive_inversion(plan, denoiser, run(plan, denoiser, first))
    torch.testing.assert_close(found, first, rtol=0, atol=1e-9)


def test_naive_inversion_is_that_of_diffusers():
    """`asked="target"` on the leading timesteps is DDIMInverseScheduler, in its float32."""
    diffusers = pytest.importorskip("diffusers")
    steps, process = 10, PROCESSES["discrete"]
    scheduler = diffusers.DDIMInverseScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(steps)
    alpha, sigma = process.alpha_sigma(process.t_min * torch.arange(1, 1001, dtype=torch.float64))

    def eps(u, t):
        return torch.tanh(u) + 0.1 * t

    def denoise(u, t):
        k = round(t / process.t_min) - 1
        return (u - sigma[k] * eps(u, k / 1000)) / alpha[k]

    found = image = normal(2, 1, *FIELD)
    for t in scheduler.timesteps:
        found = scheduler.step(eps(found, int(t) / 1000), t, found).prev_sample
    ts = (torch.cat([scheduler.timesteps.flip(0), torch.tensor([-1])]) + 1) * process.t_min
    expected = naive_inversion(ddim(process, ts.double()), Function(denoise), image, asked="target")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("process", [PROCESSES[n] for n in ("vp", "flow", "langevin")], ids=lambda p: p.name)
def test_a_predicted_row_is_of_third_order(process):
    """The error of one step back, on a mixture, falls by eight as the step halves; the plain inversion's by four."""
    denoiser, middle = mixture_denoiser(process, 0.5 * normal(3, 1, *FIELD), 0.1), 0.5 * process.t_max
    errors = {predicted_inversion: [], naive_inversion: []}
    for step in (0.005, 0.0025):
        plan = ddim(process, times(middle + step * process.t_max, middle))
        first = start_of(process, plan.times)
        last = run(plan, denoiser, first)
        for way, found in errors.items():
            found.append(float((way(plan, denoiser, last) - first).norm()))
    assert 2.7 < math.log2(errors[predicted_inversion][0] / errors[predicted_inversion][1]) < 3.4
    assert 1.7 < math.log2(errors[naive_inversion][0] / errors[naive_inversion][1]) < 2.4


def test_predicted_rows_are_those_of_the_paper():
    """Uni-Inv in its own notation: the velocity at the guess moves the state, and makes the next guess."""
    process = PROCESSES["flow"]
    denoiser = mixture_denoiser(process, 0.5 * normal(3, 1, *FIELD), 0.1)
    ts, x = times(0.9, 0.6, 0.3, 0.1), normal(2, 1, *FIELD)

    def velocity(u, t):
        return (u - denoiser.denoise(u, t)) / t

    expected, v = x, velocity(x, 0.1)
    for t, after in ((0.1, 0.3), (0.3, 0.6), (0.6, 0.9)):
        v = velocity(expected + (after - t) * v, after)
        expected = expected + (after - t) * v
    found = predicted_inversion(ddim(process, ts), denoiser, x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("end", [None, 0.0])
@pytest.mark.parametrize("process", [PROCESSES[n] for n in ("vp", "flow", "langevin")], ids=lambda p: p.name)
def test_residuals_lead_back_exactly_at_one_call_more(process, end):
    calls = []

    def denoise(u, t):
        calls.append(t)
        return known.denoise(u, t)

    known = mixture_denoiser(process, 0.5 * normal(3, 1, *FIELD), 0.1)
    ts = inner(process, 6) if end is None else inner(process, 6, end=end)
    plan, last = ddim(process, ts), process.lift(normal(2, 1, *FIELD))
    first, residuals = residual_inversion(plan, Function(denoise), last)
    assert len(calls) <= 8
    again = run(ddim(process, ts, residuals=True), known, first, noise=lambda n: residuals[n - 1])
    torch.testing.assert_close(again, last, rtol=0, atol=1e-12 if last.dtype == torch.float64 else 1e-5)
    torch.testing.assert_close(first, naive_inversion(plan, known, last), rtol=0, atol=0)


# -- refusals ---------------------------------------------------------------------------------------------------------

TWO_STEP = "not made of the two states before it and the last answer alone.*use o-belm or bdia"
ONE_STEP = "not made of the state before it and its answer alone.*use ddim"


@pytest.mark.parametrize(
    "solver",
    [ddim, gddim, unipc, ddpm, runge_kutta, lambda p, t: exponential(p, t, reference=Gaussian(0.3, mean=0.1))],
)
def test_other_plans_are_refused(solver):
    u, plan, denoiser = normal(2, 1, *FIELD), solver(VP(), inner(VP(), 4)), data_of(VP())
    for function in (forward, backward):
        with pytest.raises(PushforwardError, match=TWO_STEP):
            function(plan, denoiser, u, u)
    if solver is not ddim:
        with pytest.raises(PushforwardError, match=ONE_STEP):
            naive_inversion(plan, denoiser, u)


def test_other_states_are_refused():
    u, plan, denoiser = normal(2, 1, *FIELD), o_belm(VP(), inner(VP(), 4)), data_of(VP())
    with pytest.raises(PushforwardError, match="one shape and dtype"):
        backward(plan, denoiser, u, u[:1])
    with pytest.raises(PushforwardError, match="one shape and dtype"):
        backward(plan, denoiser, u, u.float())
    blurred = o_belm(Blurring(FIELD), inner(Blurring(FIELD), 4))
    with pytest.raises(PushforwardError, match="has shape"):
        backward(blurred, denoiser, normal(2, 1, 5, 5), normal(2, 1, 5, 5))
    with pytest.raises(PushforwardError, match="not finite"):
        backward(plan, Function(lambda v, _: v * math.nan), u, u)
