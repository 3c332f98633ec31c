"""Integrals over steps against SciPy's adaptive quadrature."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from scipy.integrate import quad_vec

from pushforward.linear import VE, VP, Blurring, BlurringLangevin, Gaussian, Langevin, Process, whitening_angle
from pushforward.plan import grid
from pushforward.plan.exponential import _kernel
from pushforward.plan.quadrature import kernels, weighted

pytestmark = pytest.mark.usefixtures("one_thread")
FIELD = (3, 4)


@pytest.mark.parametrize("steps", [2, 6, 40])
@pytest.mark.parametrize("process", [VP(), VE(), Blurring(FIELD), Langevin(), BlurringLangevin(field=FIELD)])
def test_integrals_are_those_of_adaptive_quadrature(process: Process, steps: int) -> None:
    """In the longest steps, of two, and in short ones, which take few nodes: to rounding, 1e-10 of the largest.

    Langevin's roots are known to 1e-10 themselves.
    """
    reference = Gaussian(0.3)
    kernel = partial(_kernel, process, 0.0, reference)
    times = grid.power(process, steps, end=process.t_min)
    basis = reference.covariance(process, times).basis
    angle = partial(whitening_angle, process, reference=reference)
    found = [weighted(v, w * x.square()) for x, w, v in kernels(times, basis, angle, kernel)]
    assert len(found) == steps
    for (start, end), integral in list(zip(itertools.pairwise(times), found, strict=True))[:: max(1, steps // 3)]:

        def integrand(y: float, end: torch.Tensor = end) -> np.ndarray:
            tau = torch.tensor([y * y], dtype=torch.float64)
            value = kernel(tau, end).coefficients[0] * angle(tau).square() * 2 * y
            return np.asarray(value)

        true, _ = quad_vec(integrand, float(start.sqrt()), float(end.sqrt()), epsabs=1e-13, epsrel=1e-12)
        np.testing.assert_allclose(integral.coefficients, true, rtol=0, atol=1e-10 * max(1.0, np.abs(true).max()))
