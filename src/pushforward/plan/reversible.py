r"""O-BELM and BDIA: two-step samplers that can be run backwards exactly, with one network call per step either way.

Both correct DDIM's step by what DDIM's step *back*, from the same state and answer, gets wrong about the state before:

    u_{k+1} = S_{k,k+1} + Gamma_k (u_{k-1} - S_{k,k-1}),      S_{k,j} = Psi_j D_k + R_j R_k^-1 (u_k - Psi_k D_k).

The network is asked about u_k alone, so with an invertible Gamma the row is solved for u_{k-1} as well as for u_{k+1}
(`execute.backward`). For a data point both of DDIM's steps are exact and the correction is zero, whatever Gamma.

Both steps err by the same derivative of the noise prediction, in proportion to the squares of their lengths to leading
order; so any `Gamma_k = (h_k / h_{k-1})^2 (I + O(h))` cancels it, and the method is of second order. O-BELM takes

    Gamma_k = (h_k / h_{k-1})^2 Z_{k+1} Z_{k-1}^-1,      Z = R / s,      h_k = s_k - s_{k+1},      s = snr^{-1/2},

s one number per frequency: the leapfrog (explicit two-step) rule with variable steps for `y = s R^-1 u`. For scalars
s = sigma / alpha and y = u / alpha, with dy/ds = eps: exact where eps is linear in s, and the published formula. For
blocks s is that of the image's signal-to-noise ratio. In the row to time 0, where R is singular for blocks,
Psi(0, t_{k-1}) takes the place of Z_{k+1} Z_{k-1}^-1; for scalars the two are one. BDIA takes one number,
`Gamma_k = gamma`.

| here | papers |
|---|---|
| k - 1, k, k + 1 | i + 1, i, i - 1 |
| h_{k-1}, h_k | h_{i+1}, h_i |

References:
    BELM: Bidirectional Explicit Linear Multi-step Sampler for Exact Inversion in Diffusion Models, Wang et al.,
    arXiv 2410.07273; Exact Diffusion Inversion via Bi-directional Integration Approximation, Zhang et al.,
    arXiv 2307.10829.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.linear import Operator, Process, root
from pushforward.plan.plan import Builder, Plan


def o_belm(process: Process, grid: Tensor) -> Plan:
    """Make O-BELM, the module's two-step method of second order; the first step is DDIM.

    Args:
        process: the diffusion.
        grid: decreasing times, `(steps + 1,)`. If there is no signal at the first time (s infinite), the published
            Gamma of the row that has it is 0, which cannot be run backwards: the same method in `atan s` takes its
            place, with `y = u / sqrt(alpha^2 + sigma^2)`.
    """
    return _two_step(process, grid, "o-belm", _leapfrog)


def bdia(process: Process, grid: Tensor, *, gamma: float = 0.5) -> Plan:
    """Make BDIA-DDIM, of first order, or second for gamma = 1 and slowly changing steps; the first step is DDIM.

    Run backwards, rounding in the states grows by `1 / gamma` per step (`execute.backward` says what to do).

    Args:
        process: the diffusion.
        grid: decreasing times, `(steps + 1,)`.
        gamma: weight of the correction, in (0, 1].

    Raises:
        PushforwardError: gamma is not in (0, 1].
    """
    if not 0 < gamma <= 1:
        raise PushforwardError(
            f"BDIA needs gamma in (0, 1]; got {gamma}. (At 0 it is DDIM, and cannot be run backwards.)"
        )

    def constant(process: Process, times: Tensor) -> Operator:
        return Operator.scalar(torch.full_like(times[2:], gamma), process.blocks)

    return _two_step(process, grid, "bdia", constant, gamma=gamma)


def _two_step(
    process: Process, grid: Tensor, name: str, gains: Callable[[Process, Tensor], Operator], **settings: object
) -> Plan:
    """The module's row, with `gains` giving Gamma for k = 1 … steps - 1."""
    builder = Builder(process, name, grid)
    times = builder.grid
    psi, factor = process.signal(times), root(process, times)
    inverse, gain = factor[:-1].inverse(), gains(process, times)
    before, current = None, builder.start()
    for k, t in enumerate(times[1:]):
        eps = inverse[k] @ (current.state - psi[k] @ current.answer)
        terms = psi[k + 1] @ current.answer + factor[k + 1] @ eps
        if before is not None:
            back = psi[k - 1] @ current.answer + factor[k - 1] @ eps
            terms = terms + gain[k - 1] @ (before.state - back)
        before, current = current, builder.node(float(t), terms)
    return builder.build(**settings)


def _leapfrog(process: Process, times: Tensor) -> Operator:
    """O-BELM's Gamma."""
    s = process.snr(times).rsqrt()
    x = torch.stack([s[:-2], s[1:-1], s[2:]])
    lost = s[:-2] > 1e15  # the signal is less than the noise's rounding
    x = torch.where(lost, x.atan(), x)
    length = torch.where(lost, x.sin(), x)
    ratio = ((x[1] - x[2]) / (x[0] - x[1])).square()
    factor = root(process, times)
    inverse = factor[:-2].inverse()
    gain = _scaled(process, ratio * length[0] / length[2], factor[2:] @ inverse)
    if len(times) == 2 or float(times[-1]) > 0:
        return gain
    fade = process.transition(times[-1], times[-3]).lift(process.basis).coefficients
    fade = torch.where(lost[-1, ..., None, None], inverse[-1].lift(process.basis).coefficients, fade)
    clean = _scaled(process, ratio[-1], Operator(fade, process.basis))
    return Operator(torch.cat([gain.coefficients[:-1], clean.coefficients[None]]), process.basis)


def _scaled(process: Process, factor: Tensor, operator: Operator) -> Operator:
    """Multiply operators by one number each per frequency."""
    return Operator.scalar(factor, process.blocks, process.basis) @ operator
