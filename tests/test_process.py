"""Processes and roots satisfy the equations that define them."""

import json
import math
import time
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch

from pushforward.errors import PushforwardError
from pushforward.linear import (
    POINT,
    VP,
    Blurring,
    Discrete,
    Gaussian,
    Langevin,
    Process,
    process_from_config,
    root,
    unrooted,
    whitening_angle,
)
from pushforward.plan.grid import solve_for_time
from support.helpers import EVERY, FIELD, times

SPECTRUM = Gaussian(torch.linspace(0.5, 0.1, 6, dtype=torch.float64).view(FIELD))
REFERENCES = {"point": POINT, "scalar": Gaussian(0.3), "spectrum": SPECTRUM}
WITH_REFERENCE = pytest.mark.parametrize("reference", REFERENCES.values(), ids=REFERENCES)


def middle(process: Process) -> torch.Tensor:
    """Times between the knots of the discrete process, where it is smooth."""
    return times(0.1005, 0.4005, 0.8005) * process.t_max


def derivative(function, t, h):
    return (function(t + h).coefficients - function(t - h).coefficients) / (2 * h)


@EVERY
def test_transition_and_covariance_follow_the_diffusion(process):
    """`dPsi/dt = F Psi` and `dSigma/dt = F Sigma + Sigma F^T + G G^T`, by central differences (error ~ h^2)."""
    t, h = middle(process), 1e-5 * process.t_max
    zero = torch.zeros_like(t)
    psi, sigma, drift = process.transition(t, zero), process.covariance(t), process.drift(t)
    scale = max(1.0, float(drift.coefficients.abs().max()))
    close = {"rtol": 1e-6, "atol": 1e-6 * scale}
    torch.testing.assert_close(
        derivative(lambda s: process.transition(s, zero), t, h), (drift @ psi).coefficients, **close
    )
    rate = drift @ sigma + sigma @ drift.T + process.diffusion(t)
    torch.testing.assert_close(derivative(process.covariance, t, h), rate.coefficients, **close)


def test_langevin_noise_is_known_to_a_few_roundings():
    """The image's, to four of float64's, however early: against the sum `P(3, x)` in fifty digits."""
    process, exact = Langevin(gamma=1e-3), []
    t = torch.cat([torch.logspace(-8, -1, 40, dtype=torch.float64), torch.linspace(0.05, 1, 40, dtype=torch.float64)])
    with localcontext(prec=50):
        for x in (4.0 * process.clock(t)).tolist():
            x = Decimal(x)
            third, term = Decimal(0), x**2 / 2
            for n in range(3, 120):
                term *= x / n
                third += term
            exact.append(float((third + Decimal(process.gamma) / 4 * x**2) * (-x).exp()))
    image = process.covariance(t).entry(0, 0)
    assert (
        float((image / torch.tensor(exact, dtype=torch.float64) - 1).abs().max()) < 4 * torch.finfo(torch.float64).eps
    )


def test_times_that_change_in_place_are_other_times():
    process, t = Langevin(), times(0.2, 0.4)
    before = process.covariance(t), process.signal(t)
    t.mul_(0.5)
    after = process.covariance(t), process.signal(t)
    for old, new, right in zip(before, after, (process.covariance(t.clone()), process.signal(t.clone())), strict=True):
        assert torch.equal(new.coefficients, right.coefficients)
        assert not torch.equal(new.coefficients, old.coefficients)


@EVERY
def test_transitions_compose(process):
    t, s = middle(process)[:2], middle(process)[1:]
    zero = torch.zeros_like(t)
    both = process.transition(t, s) @ process.transition(s, zero)
    torch.testing.assert_close(both.coefficients, process.transition(t, zero).coefficients, rtol=1e-10, atol=1e-12)


@EVERY
def test_clean_at_time_zero(process):
    zero = times(0.0)
    one = torch.eye(process.blocks, dtype=torch.float64).expand_as(process.transition(zero, zero).coefficients)
    torch.testing.assert_close(process.transition(zero, zero).coefficients, one)
    assert process.covariance(zero).entry(0, 0).abs().max() < 1e-20


@EVERY
@WITH_REFERENCE
def test_root(process, reference):
    """`R R^T = Sigma` to rounding and `dR/dt = (F + 1/2 G G^T Sigma^-1) R` by central differences."""
    t, h = middle(process), 1e-5 * process.t_max
    r, sigma = root(process, t, reference), reference.covariance(process, t)
    scale = float(sigma.coefficients.abs().max())
    torch.testing.assert_close((r @ r.T).coefficients, sigma.coefficients, rtol=1e-12, atol=1e-13 * scale)
    right = (process.drift(t) + 0.5 * (process.diffusion(t) @ sigma.inverse())) @ r
    size = float(right.coefficients.abs().max())
    torch.testing.assert_close(
        derivative(lambda s: root(process, s, reference), t, h), right.coefficients, rtol=1e-5, atol=1e-6 * size
    )


@pytest.mark.parametrize("reference", [POINT, Gaussian(0.3)], ids=["point", "scalar"])
def test_the_root_of_blocks_does_not_depend_on_the_times_asked_with_it(reference):
    """Its angle is an integral from 0, to 1e-9 by whatever panels."""
    process, t = Langevin(), torch.linspace(1e-3, 1.0, 40, dtype=torch.float64)
    together = root(process, t, reference).coefficients
    alone = torch.stack([root(process, t[i : i + 1], reference).coefficients[0] for i in range(40)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("reference", [POINT, Gaussian(0.3)], ids=["point", "scalar"])
@EVERY
def test_the_root_is_taken_off_a_part_of_an_operator(process, reference):
    """`R R^-1 X = X`, in parts of its size, to rounding times what the root's condition makes of it."""
    t = middle(process)
    part = process.signal(t).part(columns=slice(1))
    back = root(process, t, reference) @ unrooted(process, t, reference, part)
    size = float(part.coefficients.abs().max())
    torch.testing.assert_close(
        back.coefficients, part.coefficients.expand_as(back.coefficients), rtol=0, atol=1e-10 * size
    )


@EVERY
def test_the_answer_enters_the_flow_through_the_noise(process):
    """Factors of `1/2 G G^T score`'s part in the answer: `-1/2 G G^T Sigma^-1 Psi`."""
    t = middle(process)
    into, seen = process.on_answer(t)
    expected = -0.5 * (process.diffusion(t) @ process.covariance(t).inverse() @ process.signal(t))
    assert into.coefficients.shape[-1] == 1  # noise enters the image, or its velocity alone
    size = float(expected.coefficients.abs().max())
    torch.testing.assert_close((into @ seen).coefficients, expected.coefficients, rtol=1e-12, atol=1e-13 * size)


@EVERY
def test_flow_moves_the_marginal_of_gaussian_data(process):
    """The flow with the exact answer is `du/dt = (F + 1/2 G G^T Sigma^-1) u` for centred Gaussian data."""
    data, t = Gaussian(0.3), middle(process)
    on_state, on_answer = process.flow(t)
    total = on_state + on_answer @ data.response(process, t)
    expected = process.drift(t) + 0.5 * (process.diffusion(t) @ data.covariance(process, t).inverse())
    scale = float(expected.coefficients.abs().max())
    torch.testing.assert_close(total.coefficients, expected.coefficients, rtol=1e-9, atol=1e-11 * scale)


@EVERY
def test_log_snr_and_its_rate(process):
    t, h = middle(process), 1e-6 * process.t_max
    difference = (process.log_snr(t + h) - process.log_snr(t - h)) / (2 * h)
    torch.testing.assert_close(process.log_snr_rate(t), difference, rtol=1e-5, atol=1e-6)
    found = solve_for_time(lambda s: -process.log_snr(s), -process.log_snr(t), times(process.t_max)[0], times(0.0)[0])
    torch.testing.assert_close(found, t, rtol=0, atol=1e-8 * process.t_max)


@EVERY
def test_clean_data_have_no_noise_to_compare_with(process):
    assert process.log_snr(times(0.0)).tolist() == [math.inf]
    assert whitening_angle(process, times(0.0), Gaussian(0.25)).tolist() == [0.0]


@EVERY
def test_posterior_covariance_is_the_conditional_one(process):
    """`Cov[u_t | u_s, x_0]` against the joint Gaussian's Schur complement, with the forward step's own covariance."""
    t, s = middle(process)[:1], middle(process)[1:2]
    psi = process.transition(s, t)
    step = process.covariance(s) - psi @ process.covariance(t) @ psi.T
    precision = process.covariance(t).inverse() + psi.T @ step.inverse() @ psi
    torch.testing.assert_close(
        process.posterior_covariance(t, s).coefficients, precision.inverse().coefficients, rtol=1e-6, atol=1e-9
    )


@EVERY
def test_config_round_trip(process):
    assert process_from_config(json.loads(json.dumps(process.config()))) == process


def test_discrete_hits_its_table():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    process = Discrete.from_betas(betas)
    table = torch.cumprod(1 - betas, 0)
    alpha, sigma = process.alpha_sigma((torch.arange(1000, dtype=torch.float64) + 1) / 1000)
    torch.testing.assert_close(alpha.square(), table, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(sigma.square(), 1 - table, rtol=1e-10, atol=0)


def test_blurring_takes_any_size_and_averages_in_the_limit():
    """The lowest frequency is a plain variance-preserving diffusion; high ones fade to `min_scale`."""
    process = Blurring((5, 8), blur_max=20.0)
    alpha, sigma = process.alpha_sigma(times(0.9))
    assert alpha.shape == (1, 5, 8)
    torch.testing.assert_close(alpha[:, 0, 0].square() + sigma[:, 0, 0].square(), times(1.0))
    torch.testing.assert_close(alpha[:, -1, -1], 1e-3 * alpha[:, 0, 0])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "vq"}, "Unknown process 'vq'"),
        ({"_class_name": "DDIMScheduler", "beta_start": 1e-4}, "The configuration of a diffusers scheduler is read by"),
        ({"name": "vp", "gamma": 1}, "does not take"),
        ({"name": "blurring", "field": []}, "image size"),
        ({"name": "discrete", "alphas_cumprod": [0.5, 0.6]}, "decreasing"),
    ],
)
def test_bad_processes_are_refused(config, message):
    with pytest.raises(PushforwardError, match=message):
        process_from_config(config)


def test_negative_reference_variance_is_refused():
    with pytest.raises(PushforwardError, match="variance"):
        Gaussian(-1.0)


BAD = [
    ("vp", {"beta_max": -1.0}), ("vp", {"beta_max": -0.01}), ("vp", {"beta_min": -1.0}), ("vp", {"beta_min": math.nan}),
    ("vp", {"beta_max": math.inf}), ("vp", {"beta_max": 3000.0}), ("vp", {"t_max": 10.0}), ("vp", {"t_min": 0.0}),
    ("vp", {"t_min": -1.0}), ("vp", {"t_min": 2.0}), ("vp", {"t_max": math.inf}), ("vp", {"beta_max": "many"}),
    ("vp", {"t_min": None}), ("cosine", {"offset": -0.5}), ("cosine", {"offset": -0.1}), ("flow", {"t_max": 2.0}),
    ("flow", {"t_max": math.nan}), ("ve", {"t_max": 1e300}), ("langevin", {"beta": -1.0}), ("langevin", {"beta": 0.0}),
    ("langevin", {"inverse_mass": 0.0}), ("langevin", {"inverse_mass": -1.0}), ("langevin", {"gamma": -0.04}),
    ("langevin", {"beta": 1e5}), ("blurring", {"min_scale": -1.0}), ("blurring", {"min_scale": 0.0}),
    ("blurring", {"blur_max": math.nan}), ("blurring-langevin", {"strength": -1.0}),
    ("blurring-langevin", {"strength": 1e4}), ("discrete", {"alphas_cumprod": [0.9, math.nan]}),
    ("discrete", {"alphas_cumprod": ["much", "little"]}), ("discrete", {"alphas_cumprod": [0.5, 0.9]}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings"), BAD)
def test_what_is_no_diffusion_is_refused_as_it_is_made(name: str, settings: dict[str, Any]) -> None:
    field = {"field": (16, 12)} if "blurring" in name else {}
    with pytest.raises(PushforwardError, match=name) as error:
        process_from_config({"name": name, **field, **settings})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("beta_min", [-0.5, -0.01, 0.01, 1.0, 30.0])
@pytest.mark.parametrize("beta_max", [-0.5, -0.01, 0.01, 1.0, 300.0])
def test_vp_is_refused_just_where_its_beta_is_negative(beta_min: float, beta_max: float) -> None:
    """beta runs linearly from one to the other over [0, 1]: it is negative at some times if it is at either end."""
    try:
        VP(beta_min, beta_max)
        refused = False
    except PushforwardError:
        refused = True
    assert refused == (min(beta_min + 1e-3 * (beta_max - beta_min), beta_max) < 0)  # from t_min on


@pytest.mark.parametrize("name", ["blurring", "blurring-langevin"])
def test_large_images_do_not_slow_the_check(name: str) -> None:
    started = time.perf_counter()
    process_from_config({"name": name, "field": (2048, 2048)})
    assert time.perf_counter() - started < 2
