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
from pushforward.plan.quadrature import integrals

pytestmark = pytest.mark.usefixtures("one_thread")
FIELD = (3, 4)


@pytest.mark.parametrize("steps", [2, 6, 40])
@pytest.mark.parametrize("process", [VP(), VE(), Blurring(FIELD), Langevin(), BlurringLangevin(field=FIELD)])
def test_integrals_are_those_of_adaptive_quadrature(process: Process, steps: int) -> None:
    """In the longest steps, of two, and in short ones, which take few nodes: to rounding, 1e-10 of the largest.

    Of the kernel times the squared angle, a polynomial through three points of the grid, and of the kernel itself, one
    through a single point. Langevin's roots are known to 1e-10 themselves.
    """
    reference = Gaussian(0.3)
    kernel = partial(_kernel, process, 0.0, reference)
    times = grid.power(process, steps, end=process.t_min)
    basis = reference.covariance(process, times).basis
    angle = partial(whitening_angle, process, reference=reference)
    firsts = [min(max(0, k - 1), steps - 2) for k in range(steps)]
    through = torch.tensor([[[a, a + 1, a + 2], [k, -1, -1]] for k, a in enumerate(firsts)])
    weights = integrals(times, basis, angle, kernel, through).coefficients
    assert not weights[:, 1, 1:].any()
    squares = torch.einsum("sn,sn...->s...", angle(times)[through[:, 0]].square(), weights[:, 0])
    found = torch.stack([squares, weights[:, 1, 0]], 1)
    for (start, end), integral in list(zip(itertools.pairwise(times), found, strict=True))[:: max(1, steps // 3)]:

        def integrand(y: float, end: torch.Tensor = end) -> np.ndarray:
            tau = torch.tensor([y * y], dtype=torch.float64)
            value = np.asarray(kernel(tau, end).coefficients[0] * 2 * y)
            return np.stack([value * float(angle(tau)) ** 2, value])

        true, _ = quad_vec(integrand, float(start.sqrt()), float(end.sqrt()), epsabs=1e-13, epsrel=1e-12)
        np.testing.assert_allclose(integral, true, rtol=0, atol=1e-10 * max(1.0, np.abs(true).max()))
