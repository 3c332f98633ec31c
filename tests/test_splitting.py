"""SSCS: exact in equilibrium, orders of weak convergence, where it asks, and what it refuses."""

import math

import pytest
import torch
from typer.testing import CliRunner

from pushforward.cli import app
from pushforward.errors import PushforwardError
from pushforward.execute import run
from pushforward.linear import VP, BlurringLangevin, Gaussian, Langevin, Operator, Process
from pushforward.plan import Plan, euler_maruyama, grid, sscs
from pushforward.plan.splitting import equilibrium
from support.helpers import FIELD, PROCESSES, RESTLESS, gaussian_denoiser, inner, normal, point_denoiser

RESTING = {name: process for name, process in PROCESSES.items() if name not in RESTLESS}
CONTINUOUS = pytest.mark.parametrize(
    "process", [process for name, process in RESTING.items() if name != "discrete"], ids=lambda p: p.name
)


def law(plan: Plan, data: Gaussian) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of the last state by the plan's coefficients, for the answers of Gaussian data.

    `(*frequencies, k, 1)` and `(*frequencies, k, k)`, from a start that has the law of the data at its time. The data's
    mean is taken to be the same number at every frequency.
    """
    process, k = plan.process, plan.process.blocks
    ts = torch.tensor([node.time for node in plan.nodes], dtype=torch.float64)
    response = data.response(process, ts).coefficients
    psi = process.transition(ts, torch.zeros_like(ts)).coefficients
    clean = float(data.mean) * torch.eye(k, dtype=torch.float64)[:, :1]
    source = {node: k * i for i, node in enumerate((0, *plan.noises))}  # columns of the start and of each noise
    means, moves = [psi[0] @ clean], [torch.zeros(*psi.shape[1:-1], k * len(source), dtype=torch.float64)]
    moves[0][..., :k] = data.covariance(process, ts[:1])[0].cholesky().coefficients
    for node in plan.nodes[1:]:
        mean, move = torch.zeros_like(means[0]), torch.zeros_like(moves[0])
        for register, operator in node.terms.items():
            c, j = operator.coefficients, register.node
            if register.kind == "noise":
                move[..., source[j] : source[j] + k] += c
                continue
            if register.kind == "answer":
                mean, c = mean + c @ (clean - response[j] @ psi[j] @ clean), c @ response[j]
            mean, move = mean + c @ means[j], move + c @ moves[j]
        means.append(mean)
        moves.append(move)
    return means[-1], moves[-1] @ moves[-1].mT


def errors(plan: Plan, data: Gaussian) -> tuple[float, float]:
    """Relative errors of the last state's mean and covariance."""
    end = torch.tensor(plan.nodes[-1].time, dtype=torch.float64)
    psi = plan.process.transition(end, torch.zeros_like(end)).coefficients
    expected = float(data.mean) * psi[..., :1], data.covariance(plan.process, end).coefficients
    pairs = zip(law(plan, data), expected, strict=True)
    return tuple(float((f - e).norm() / e.norm().clamp_min(1e-12)) for f, e in pairs)


def orders(make, process: Process, data: Gaussian) -> tuple[float, float]:
    """Orders of convergence of mean and covariance, from 36 and 72 steps."""
    coarse, fine = (errors(make(process, inner(process, steps)), data) for steps in (36, 72))
    return math.log2(coarse[0] / fine[0]), math.log2(coarse[1] / fine[1])


def shared(process: Process) -> Process:
    """The process whose initial velocity is in equilibrium too."""
    if isinstance(process, BlurringLangevin):
        return BlurringLangevin(field=FIELD, blur_max=2.0, gamma=1.0)
    return Langevin(gamma=1.0) if isinstance(process, Langevin) else process


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("process", RESTING.values(), ids=RESTING)
def test_data_in_equilibrium_are_sampled_exactly(process, steps, order):
    """However long the steps; to rounding."""
    process = shared(process)
    plan = sscs(process, inner(process, steps), order=order)
    assert errors(plan, Gaussian(1.0))[1] < 1e-12


@CONTINUOUS
def test_the_midpoint_rule_is_of_weak_order_two(process):
    """Errors of mean and covariance fall 4 times when the steps are halved, to 0.15 of the order."""
    assert orders(lambda p, t: sscs(p, t, order=2), process, Gaussian(0.3, mean=0.5)) == pytest.approx((2, 2), abs=0.15)


@CONTINUOUS
def test_one_call_a_step_is_of_weak_order_one(process):
    """Limited by Euler's step of B, as the docstring says."""
    assert orders(sscs, process, Gaussian(0.3, mean=0.5)) == pytest.approx((1, 1), abs=0.15)


@CONTINUOUS
def test_one_call_in_the_middle_of_a_step_is_of_order_two_where_the_score_is_shifted_only(process):
    """Data N(m, S): B does not depend on the state. Asked at a step's start or end this would be of order 1."""
    found, _ = orders(sscs, shared(process), Gaussian(1.0, mean=0.5))
    assert found == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("steps", [12, 24, 48])
@pytest.mark.parametrize("variance", [0.3, 1.0])
def test_it_is_nearer_to_the_truth_than_euler_maruyama_on_langevin(steps, variance):
    """By the worse of the errors of mean and covariance: with one call a step at least twice, with two calls (and half
    the steps) at least four times. Measured: 5.8 to 23 times, and 7 to 21.
    """
    process, data = Langevin(), Gaussian(variance, mean=0.5)
    worst = max(errors(euler_maruyama(process, inner(process, steps)), data))
    assert max(errors(sscs(process, inner(process, steps)), data)) < worst / 2
    assert max(errors(sscs(process, inner(process, steps // 2), order=2), data)) < worst / 4


@pytest.mark.parametrize("process", [VP(), Langevin(), BlurringLangevin(field=FIELD)], ids=lambda p: p.name)
def test_samples_have_the_law_of_the_coefficients(process):
    """5000 samples run with the network of Gaussian data; five standard errors of each entry."""
    data, count = Gaussian(0.3), 5000
    plan = sscs(process, inner(process, 6))
    generator = torch.Generator().manual_seed(0)
    shape = (count, process.blocks, *FIELD)

    def draw(_: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    start = data.covariance(process, plan.times[:1])[0].cholesky()(draw(0))
    last = process.basis.forward(run(plan, gaussian_denoiser(process, data), start, noise=draw))
    found = torch.einsum("bi...,bj...->...ij", last, last) / count
    expected = law(plan, data)[1].broadcast_to(found.shape)
    variance = expected.diagonal(dim1=-2, dim2=-1)
    spread = ((expected.square() + variance[..., :, None] * variance[..., None, :]) / count).sqrt()
    assert float(((found - expected) / spread).abs().max()) < 5


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("process", RESTING.values(), ids=RESTING)
def test_a_grid_that_ends_at_zero_ends_with_the_denoised_state(process, steps, order):
    """A data point is reached exactly; one call in the last step, which has no noise."""
    image, u = normal(1, 1, *FIELD), normal(2, process.blocks, *FIELD, seed=1)
    plan = sscs(process, grid.uniform(process, steps), order=order)
    assert plan.nfe == order * (steps - 1) + 1
    assert len(plan.noises) == 2 * (steps - 1)
    found = process.image(run(plan, point_denoiser(process, image), u, noise=lambda _: u))
    torch.testing.assert_close(found, image.expand_as(found), rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2])
def test_the_network_is_asked_at_the_middle_of_each_step(order):
    ts = inner(Langevin(), 5)
    plan = sscs(Langevin(), ts, order=order)
    middles = ((ts[1:] + ts[:-1]) / 2).repeat_interleave(order)
    assert [node.time for node in plan.nodes if node.asks] == pytest.approx(middles.tolist(), abs=1e-15)
    torch.testing.assert_close(plan.times, ts, rtol=0, atol=0)
    assert not plan.implicit


@pytest.mark.parametrize("process", RESTING.values(), ids=RESTING)
def test_the_equilibrium_is_where_forgotten_data_end(process):
    """N(0, S) of the equation is what the process itself keeps: `Psi S Psi^T + Cov[u_t | u_0] = S`."""
    found, t = equilibrium(process), torch.tensor(0.6, dtype=torch.float64)
    zero = torch.zeros_like(t)
    psi = process.transition(t, zero)
    kept: Operator = process.covariance(t) + psi @ (found - process.covariance(zero)) @ psi.T
    torch.testing.assert_close(*torch.broadcast_tensors(kept.coefficients, found.coefficients), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", RESTLESS)
@pytest.mark.parametrize("steps", [1, 5])
def test_processes_without_one_equilibrium_are_refused(name, steps):
    with pytest.raises(PushforwardError, match=rf"'{name}' has not; use ddpm, or gddim with noise 1\.$"):
        sscs(PROCESSES[name], inner(PROCESSES[name], steps))


def test_other_orders_are_refused():
    with pytest.raises(PushforwardError, match=r"order 1 .* or 2 .*; got 3"):
        sscs(VP(), inner(VP(), 3), order=3)


@pytest.mark.parametrize("options", [[], ["--order", "2"]], ids=["order 1", "order 2"])
def test_the_command_line_has_it(tmp_path, options):
    out = tmp_path / "images.png"
    arguments = ["sample", "fashion-langevin", "--solver", "sscs", "--steps", "20", "--count", "2", "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    assert out.exists()
