r"""Euler–Maruyama on the reverse diffusion with any noise level.

    du = [F u - (1 + lambda^2) / 2 G G^T score] dt + lambda G dw,     score = -Sigma^-1 (u - Psi D),

backwards in time. The factor is `(1 + lambda^2) / 2`, for which the marginals are those of the forward process at
every lambda. (With `(1 + lambda) / 2` in its place they are not, however small the steps.)

References:
    Score-Based Generative Modeling through SDEs, Song et al., arXiv 2011.13456, eq. 6 and 13;
    gDDIM, Zhang et al., arXiv 2206.05564, eq. 6.
"""

from __future__ import annotations

from torch import Tensor

from pushforward.linear import Process
from pushforward.plan.exponential import check_noise
from pushforward.plan.plan import Builder, Plan


def euler_maruyama(process: Process, grid: Tensor, *, noise: float = 1.0) -> Plan:
    """Make plain Euler–Maruyama, the baseline.

        u' = u + h [F u - (1 + noise^2) / 2 G G^T score] + noise sqrt|h| G xi

    Args:
        process: the diffusion.
        grid: decreasing times, `(steps + 1,)`.
        noise: noise level lambda >= 0; 0 is Euler's method on the probability flow.
    """
    check_noise(noise)
    builder = Builder(process, "euler-maruyama", grid)
    times, h = builder.grid, builder.grid.diff()
    drift, diffusion = process.drift(times), process.diffusion(times)
    pull = 0.5 * (1 + noise**2) * (diffusion @ process.covariance(times).inverse())
    psi, factor = process.signal(times), diffusion.cholesky()
    current = builder.start()
    for k in range(len(times) - 1):
        slope = drift[k] @ current.state + pull[k] @ (current.state - psi[k] @ current.answer)
        spread = factor[k] * float(noise * (-h[k]).sqrt()) if noise else None
        current = builder.node(float(times[k + 1]), current.state + float(h[k]) * slope, spread)
    return builder.build(noise=noise)
