"""Solvers against truth: points, Gaussians, orders of convergence, marginals, published formulas."""

import math

import pytest
import torch

from pushforward.errors import PushforwardError
from pushforward.execute import run
from pushforward.linear import POINT, VE, VP, Flow, Gaussian, Langevin, Process, root
from pushforward.plan import (
    SOLVERS,
    Builder,
    Plan,
    auto,
    ddim,
    ddpm,
    dpm_solver_pp,
    euler_maruyama,
    exponential,
    gddim,
    grid,
    runge_kutta,
    unipc,
)
from support.helpers import (
    DETERMINISTIC,
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

SCALAR = ("vp", "cosine", "ve", "flow", "discrete")


# -- one step is exact ------------------------------------------------------------------------------------------------

ZEROTH = {
    "ddim": ddim,
    **{f"gddim-{q}": lambda p, t, q=q: gddim(p, t, order=q) for q in range(4)},
    **{f"exponential-{q}": lambda p, t, q=q: exponential(p, t, order=q) for q in range(4)},
    "dpm++": dpm_solver_pp,
    "unipc": unipc,
}


@EVERY
@pytest.mark.parametrize("solver", ZEROTH.values(), ids=ZEROTH)
def test_a_data_point_is_reached_exactly(process, solver):
    """Point data, C = 0: three steps along the flow `u_t = Psi x_0 + R z` err by rounding and quadrature alone."""
    image, z = normal(1, 1, *FIELD), normal(2, process.blocks, *FIELD, seed=1)
    ts = inner(process, 3)
    psi, r = process.transition(ts, torch.zeros_like(ts)), root(process, ts)
    path = [psi[k](process.lift(image)) + r[k](z) for k in (0, -1)]
    found = run(solver(process, ts), point_denoiser(process, image), path[0])
    torch.testing.assert_close(found, path[1], rtol=1e-6, atol=1e-7 * float(path[0].abs().max()))


@EVERY
@pytest.mark.parametrize("name", [name for name in DETERMINISTIC if name != "auto"])  # its reference is no point
def test_a_data_point_is_reached_at_the_clean_end(process, name):
    image, start = normal(1, 1, *FIELD), process.t_max * normal(2, process.blocks, *FIELD, seed=1)
    plan = SOLVERS[name](process, grid.uniform(process, 4))
    found = process.image(run(plan, point_denoiser(process, image), start))
    torch.testing.assert_close(found, image.expand_as(found), rtol=0, atol=1e-6)


MATCHING = {
    "gddim": lambda p, t, g: gddim(p, t, order=0, reference=g),
    "gddim-2": lambda p, t, g: gddim(p, t, order=2, reference=g),
    "exponential": lambda p, t, g: exponential(p, t, order=0, reference=g),
    "exponential-2": lambda p, t, g: exponential(p, t, order=2, reference=g, variable="angle"),
    "corrected": lambda p, t, g: exponential(p, t, order=1, reference=g, corrector="reuse"),
}


@EVERY
@pytest.mark.parametrize("solver", MATCHING.values(), ids=MATCHING)
@pytest.mark.parametrize("spectrum", [False, True], ids=["scalar", "spectrum"])
def test_gaussian_data_are_solved_exactly_in_their_own_coordinates(process, solver, spectrum):
    """With the matching reference the network deviates by nothing, so any step is exact."""
    variance = torch.linspace(0.5, 0.1, 6, dtype=torch.float64).view(FIELD) if spectrum else 0.3
    data, ts = Gaussian(variance, mean=0.2), inner(process, 2)
    u = normal(2, process.blocks, *FIELD)
    found = run(solver(process, ts, data), gaussian_denoiser(process, data), u)
    expected = exact_flow(process, data, float(ts[0]), float(ts[-1]), u)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@EVERY
@pytest.mark.parametrize("denoise", [False, True])
def test_gaussian_data_are_exact_at_the_clean_end(process: Process, denoise: bool) -> None:
    """Five steps of the matching reference, mean and all, on a grid that ends at 0: rounding alone."""
    data, u, ts = Gaussian(0.3, mean=0.2), normal(2, process.blocks, *FIELD), grid.uniform(process, 5)
    plan = exponential(process, ts, order=1, reference=data, corrector="reuse", denoise=denoise)
    denoiser = gaussian_denoiser(process, data)
    expected = exact_flow(process, data, process.t_max, float(ts[-2 if denoise else -1]), u)
    if denoise:
        expected = denoiser.at(process, ts[-2:-1], u)(0, expected)
    found = run(plan, denoiser, u)
    torch.testing.assert_close(process.image(found), process.image(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("process", [VP(), VE(), Flow()], ids=lambda p: p.name)
@pytest.mark.parametrize("deviation", [0.3, 0.8, 2.0])
def test_steps_of_auto_are_equal_in_its_angle(process: Process, deviation: float) -> None:
    """In `atan((sigma / (1.3 s alpha))^0.65)`, but for the last steps if the grid has them below `t_min`."""
    times = auto(process, 12, Gaussian(deviation**2)).times
    inner = times[1:-2]  # alpha may be 0 at the first time
    alpha, sigma = process.alpha_sigma(inner)
    angles = torch.atan((sigma / (1.3 * deviation * alpha)) ** 0.65)
    assert torch.allclose(angles.diff(), angles.diff().mean(), rtol=1e-6)


@pytest.mark.parametrize(("steps", "order"), [(1, 1), (7, 1), (8, 2), (30, 2)])
def test_few_calls_of_auto_take_polynomials_of_lower_degree(steps: int, order: int) -> None:
    assert auto(VP(), steps, Gaussian(0.5)).settings["order"] == order


def test_data_that_do_not_vary_have_a_plan() -> None:
    assert bool((auto(VP(), 10, POINT).times.diff() < 0).all())


@EVERY
def test_many_calls_of_auto_end_at_the_flow_and_not_at_the_denoised_state(process: Process) -> None:
    """Clean data of N(m, c) end at `m + sqrt(c) z`; the denoised state at t_min is some thousandths away."""
    reference, data = Gaussian(0.25), Gaussian(0.02, 0.3)
    u = normal(4, process.blocks, *FIELD) * (80 if process.name == "ve" else 1)
    exact = process.image(exact_flow(process, data, process.t_max, 0.0, u))
    final = process.image(run(auto(process, 64, reference), gaussian_denoiser(process, data), u))
    left = 1e-3 if process.name == "blurring" else 1e-4  # by 64 steps; VP's denoised state at t_min is 3e-3 away
    assert (final - exact).norm() < left * exact.norm()


# -- orders of convergence --------------------------------------------------------------------------------------------

# Multistep methods start with lower orders, so their first step's error, O(h^2) without and O(h^3) with a corrector,
# bounds what can be claimed for them: 2 and 3, reached from above or below (hence "at least", less .35).
ORDERS = {
    "ddim": (1, ddim),
    "gddim-0": (1, lambda p, t: gddim(p, t, order=0)),
    "gddim-1": (2, lambda p, t: gddim(p, t, order=1)),
    "gddim-3": (2, lambda p, t: gddim(p, t, order=3)),
    "gddim-1 cholesky": (2, lambda p, t: gddim(p, t, order=1, factor="cholesky")),
    "gddim-1 reuse": (3, lambda p, t: gddim(p, t, order=1, corrector="reuse")),
    "gddim-2 evaluate": (3, lambda p, t: gddim(p, t, order=2, corrector="evaluate")),
    "exponential-1": (2, lambda p, t: exponential(p, t, order=1)),
    "exponential-2 angle": (2, lambda p, t: exponential(p, t, order=2, reference=Gaussian(0.1), variable="angle")),
    "exponential-1 reuse": (
        3,
        lambda p, t: exponential(p, t, order=1, reference=Gaussian(0.1), variable="angle", corrector="reuse"),
    ),
    "dpm++ 2M": (2, lambda p, t: dpm_solver_pp(p, t, lower_final=False)),
    "unipc-2": (2, lambda p, t: unipc(p, t, lower_final=False)),
    "euler": (1, lambda p, t: runge_kutta(p, t, tableau="euler")),
    "heun": (2, runge_kutta),
    "kutta3": (3, lambda p, t: runge_kutta(p, t, tableau="kutta3")),
    "rk4": (4, lambda p, t: runge_kutta(p, t, tableau="rk4")),
    "euler-maruyama-0": (1, lambda p, t: euler_maruyama(p, t, noise=0.0)),
}
# The coarse grid is too coarse for the asymptotic regime of these: measured, and left out rather than loosened.
PRE_ASYMPTOTIC = {
    ("gddim-1 cholesky", "blurring-langevin"),
    ("gddim-1 cholesky", "langevin"),
    ("exponential-1 reuse", "ve"),  # 2.6, then 2.8 and 2.9 on finer grids
}


@pytest.mark.parametrize("process", [PROCESSES[name] for name in SMOOTH], ids=SMOOTH)
@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(process, name):
    """Gaussian data in foreign coordinates; errors of 24 and 48 steps against the exact flow."""
    if (name, process.name) in PRE_ASYMPTOTIC:
        pytest.skip("not yet asymptotic at 48 steps")
    order, solver = ORDERS[name]
    data, u = Gaussian(0.3), normal(2, process.blocks, *FIELD)
    errors = []
    for steps in (24, 48):
        ts = inner(process, steps)
        expected = exact_flow(process, data, float(ts[0]), float(ts[-1]), u)
        errors.append(float((run(solver(process, ts), gaussian_denoiser(process, data), u) - expected).norm()))
    assert math.log2(errors[0] / errors[1]) > order - 0.35
    assert errors[1] < 0.1 * float(expected.norm()) or order == 1


@EVERY
def test_solvers_agree_on_a_mixture(process):
    """A nonlinear truth without closed form: three unrelated solvers converge to the same image."""
    denoiser = mixture_denoiser(process, normal(4, 1, *FIELD), 0.05)
    data, u = Gaussian(1.0), normal(3, process.blocks, *FIELD, seed=2)
    start = root(process, times(0.9 * process.t_max), data)[0](u)
    plans = [
        runge_kutta(process, inner(process, 30), tableau="rk4"),
        exponential(
            process, inner(process, 100), order=2, reference=Gaussian(0.5), variable="angle", corrector="reuse"
        ),
        gddim(process, inner(process, 100), order=2, corrector="evaluate"),
    ]
    ends = [run(plan, denoiser, start) for plan in plans]
    for end in ends[1:]:
        assert float((end - ends[0]).norm() / ends[0].norm()) < 2e-3


# -- stochastic marginals ---------------------------------------------------------------------------------------------


def final_covariance(plan: Plan, process: Process, data: Gaussian, sigma: torch.Tensor) -> torch.Tensor:
    """Covariance of the last state for linear answers: the plan is linear in its start and in each noise."""
    size = process.blocks * FIELD[0] * FIELD[1]
    units = torch.eye(size, dtype=torch.float64).view(size, process.blocks, *FIELD)
    denoiser, none = gaussian_denoiser(process, data), torch.zeros_like(units)
    final = run(plan, denoiser, units, noise=lambda _: none).flatten(1).mT
    total = final @ sigma @ final.mT
    for chosen in plan.noises:
        moved = run(plan, denoiser, none, noise=lambda k, c=chosen: units if k == c else none).flatten(1).mT
        total = total + moved @ moved.mT
    return total


def marginal(process: Process, data: Gaussian, t: float) -> torch.Tensor:
    size = process.blocks * FIELD[0] * FIELD[1]
    units = torch.eye(size, dtype=torch.float64).view(size, process.blocks, *FIELD)
    return data.covariance(process, times(t))[0](units).flatten(1).mT


@EVERY
@pytest.mark.parametrize("noise", [0.0, 0.3, 0.7, 1.0, 1.4])
def test_stochastic_gddim_keeps_gaussian_marginals_at_every_noise(process, noise):
    data, ts = Gaussian(0.3), inner(process, 2)
    plan = gddim(process, ts, order=0, noise=noise, reference=data)
    found = final_covariance(plan, process, data, marginal(process, data, float(ts[0])))
    expected = marginal(process, data, float(ts[-1]))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7 * float(expected.abs().max()))


@EVERY
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_keeps_the_marginal_of_a_point(process, eta):
    """Point data: the deviation from the point has covariance Sigma_t after every step, whatever eta."""
    ts = inner(process, 2)
    plan = ddim(process, ts, eta=eta)
    nothing = Gaussian(0.0)
    found = final_covariance(plan, process, nothing, marginal(process, nothing, float(ts[0])))
    expected = marginal(process, nothing, float(ts[-1]))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8 * float(expected.abs().max()))


@pytest.mark.parametrize("process", [VP(), Langevin()], ids=["vp", "langevin"])
def test_limits_of_the_stochastic_families(process):
    """noise -> 0 is DDIM; noise = 1 and eta = 1 are the posterior."""
    ts, denoiser = inner(process, 3), gaussian_denoiser(process, Gaussian(0.3))
    u, xi = normal(2, process.blocks, *FIELD), normal(2, process.blocks, *FIELD, seed=3)

    def end(plan):
        return run(plan, denoiser, u, noise=lambda _: xi)

    torch.testing.assert_close(end(gddim(process, ts, noise=1e-6)), end(ddim(process, ts)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(end(gddim(process, ts, noise=1.0)), end(ddpm(process, ts)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(end(ddim(process, ts, eta=1.0)), end(ddpm(process, ts)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end(ddim(process, ts, eta=1e-6)), end(ddim(process, ts)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("noise", [0.1, 0.5, 0.7, 1.0])
def test_euler_maruyama_converges_to_the_right_variance_at_every_noise(noise):
    """By the recurrence of the variance, exactly; halving the step halves the error (weak order 1)."""
    process, data = VP(), Gaussian(0.25)
    errors = []
    for steps in (200, 400):
        ts = inner(process, steps)
        plan = euler_maruyama(process, ts, noise=noise)
        variance = float(data.covariance(process, ts[:1]).entry(0, 0))
        for k, node in enumerate(plan.nodes[1:]):
            by_kind = {register.kind: float(operator.coefficients) for register, operator in node.terms.items()}
            response = float(data.response(process, ts[k : k + 1]).entry(0, 0))
            variance = (by_kind["state"] + by_kind["answer"] * response) ** 2 * variance + by_kind["noise"] ** 2
        errors.append(variance - float(data.covariance(process, ts[-1:]).entry(0, 0)))
    assert abs(errors[1]) < 0.01
    assert 1.7 < errors[0] / errors[1] < 2.4


# -- formulas and settings --------------------------------------------------------------------------------------------


def test_ddim_is_the_textbook_formula():
    process = VP()
    t, s = inner(process, 1)
    (a, b), (c, d) = (process.alpha_sigma(t), process.alpha_sigma(s))
    plan = ddim(process, torch.stack([t, s]))
    by_kind = {register.kind: float(operator.coefficients) for register, operator in plan.nodes[1].terms.items()}
    assert by_kind["state"] == pytest.approx(float(d / b), rel=1e-12)
    assert by_kind["answer"] == pytest.approx(float(c - a * d / b), rel=1e-12)


def test_dpm_solver_2m_is_the_published_formula():
    process = VP()
    ts = inner(process, 3)
    alpha, sigma = process.alpha_sigma(ts)
    h = process.log_snr(ts).diff()
    plan = dpm_solver_pp(process, ts, lower_final=False)
    node = {(r.kind, r.node): float(o.coefficients) for r, o in plan.nodes[3].terms.items()}
    step, r = -float(alpha[3] * torch.expm1(-h[2])), float(h[1] / h[2])
    assert node["state", 2] == pytest.approx(float(sigma[3] / sigma[2]), rel=1e-10)
    assert node["answer", 2] == pytest.approx(step * (1 + 1 / (2 * r)), rel=1e-10)
    assert node["answer", 1] == pytest.approx(-step / (2 * r), rel=1e-10)


def test_flow_matching_euler_is_a_straight_step():
    """`u' = u + (t' - t) v` with `v = (u - D) / t`, from pure noise on."""
    ts = grid.uniform(Flow(), 4)
    plan = ddim(Flow(), ts)
    for k, node in enumerate(plan.nodes[1:]):
        by_kind = {register.kind: float(operator.coefficients) for register, operator in node.terms.items()}
        t, s = float(ts[k]), float(ts[k + 1])
        assert by_kind == pytest.approx({"state": s / t, "answer": 1 - s / t}, abs=1e-12)


def test_evaluations_are_counted():
    ts = inner(VP(), 10)
    counts = {name: SOLVERS[name](VP(), ts).nfe for name in SOLVERS}
    assert counts["ddim"] == counts["gddim"] == counts["unipc"] == counts["dpm++"] == 10
    assert counts["heun"] == 20
    assert counts["rk4"] == 40
    assert gddim(VP(), ts, corrector="reuse").nfe == 10
    assert gddim(VP(), ts, corrector="evaluate").nfe == 19


@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in ("auto", "collocation", "sscs")])
def test_zero_terminal_snr(name):
    """Flow matching starts without any signal; solvers start there or say why they cannot."""
    process = Flow()
    ts = grid.uniform(process, 6)
    if name == "euler-maruyama":
        with pytest.raises(PushforwardError, match="start the grid below"):
            SOLVERS[name](process, ts)
        return
    image, u = normal(1, 1, *FIELD), normal(2, 1, *FIELD, seed=1)
    found = run(SOLVERS[name](process, ts), point_denoiser(process, image), u, noise=lambda _: u)
    torch.testing.assert_close(found, image.expand_as(found), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda ts: gddim(VP(), ts, order=4), "The order must be 0"),
        (lambda ts: gddim(VP(), ts, noise=0.5, corrector="reuse"), "corrector"),
        (lambda ts: gddim(VP(), ts, noise=0.5, order=1), "order 0"),
        (lambda ts: exponential(VP(), ts, noise=-0.5), "negative"),
        (lambda ts: ddim(VP(), ts, eta=1.5), "eta"),
        (lambda ts: exponential(VP(), ts, noise=1.0, corrector="reuse"), "noise = 0"),
        (lambda ts: runge_kutta(VP(), ts, tableau="rk5"), "Unknown Runge"),
        (lambda ts: euler_maruyama(VP(), ts, noise=-1.0), "negative"),
        (lambda ts: unipc(VP(), ts, order=4), "orders 1, 2 and 3"),
        (lambda ts: ddim(VP(), ts.flip(0)), "decrease"),
        (lambda ts: ddim(VP(), ts + 1), "must lie in"),
        (lambda ts: ddim(VP(), ts[:1]), "at least two"),
        (lambda _: gddim(Langevin(), grid.uniform(Langevin(), 4), noise=0.5), "end the grid at t_min"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(PushforwardError, match=message):
        make(inner(VP(), 4))


def test_a_new_solver_is_a_few_lines():
    """The example of the module's docstring runs and is DDIM."""
    process, ts = Langevin(), inner(Langevin(), 4)
    builder = Builder(process, "mine", ts)
    psi, r = process.transition(ts, torch.zeros_like(ts)), root(process, ts, POINT)
    u = builder.start()
    for i, t in enumerate(ts[1:]):
        eps = r[i].inverse() @ (u.state - psi[i] @ u.answer)
        u = builder.node(float(t), psi[i + 1] @ u.answer + r[i + 1] @ eps)
    start, denoiser = normal(1, 2, *FIELD), gaussian_denoiser(process, Gaussian(0.3))
    torch.testing.assert_close(run(builder.build(), denoiser, start), run(ddim(process, ts), denoiser, start))
