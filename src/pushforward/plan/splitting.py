r"""SSCS: the reverse diffusion split in two, the part that any data share solved exactly, and the network's part not.

Where one Gaussian N(0, S) is in equilibrium at all times, `F S + S F^T + G G^T = 0`, the reverse diffusion is, in a
time that runs backwards,

    du = -(F + G G^T S^-1) u dtau + G dw        A: what it would be if the data were N(0, S) too,
       + G G^T (score(u) + S^-1 u) dtau         B: the rest, with no noise (the paper's S).

A has a closed form. From t down to t' < t, by Bayes' rule with S as the covariance at both ends,

    u' = K u + N xi,        K = S Psi(t, t')^T S^-1,        N N^T = S - K S K^T.

A step is half of A, all of B, half of A (Strang), and B is frozen at the time between the halves:

    u <- u + h B(u),                          order 1: Euler, as in the paper; one call per step,
    u <- u + h B(u + h/2 B(u)),               order 2: the midpoint rule; two calls per step.

With data N(0, S) B is zero and every step is exact. With other data Strang's splitting is of weak order 2, but Euler's
step of B is of order 1, and so is the whole; the midpoint rule makes it 2. The authors' code asks at the time at which
the step begins. With data N(m, S), for which B does not depend on the state and Euler's step is no limitation, that was
measured to be of order 1, and the middle of order 2, so the middle it is. (With Gaussian data of variance 0.3 both are
of order 1, and neither is nearer to the truth everywhere.)

References:
    Score-Based Generative Modeling with Critically-Damped Langevin Diffusion, Dockhorn et al., arXiv 2112.07068,
    section 3.3 and appendix D.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.linear import Operator, Process
from pushforward.plan.plan import Builder, Handle, Plan, Terms


def sscs(process: Process, grid: Tensor, *, order: int = 1) -> Plan:
    """Make the symmetric splitting of the module's docstring, always with noise: two per step, one per half of A.

    In place of a step to time 0 stands the denoised state, as in the paper: B has no limit there.

    Args:
        process: a diffusion whose equilibrium is the same at all times.
        grid: decreasing times, `(steps + 1,)`; each step asks at its middle, the one to time 0 where it begins.
        order: 1 for one call per step, 2 for two.

    Raises:
        PushforwardError: the process has no such equilibrium, or the order is neither 1 nor 2.
    """
    if order not in (1, 2):
        raise PushforwardError(f"SSCS has order 1 (one network call per step) or 2 (two calls); got {order}.")
    stationary = equilibrium(process)
    builder = Builder(process, "sscs", grid)
    clean = float(builder.grid[-1]) == 0
    times = builder.grid[:-1] if clean else builder.grid
    middles = (times[:-1] + times[1:]) / 2
    before, noise_before = _reversed(process, stationary, times[:-1], middles)
    after, noise_after = _reversed(process, stationary, middles, times[1:])
    strength = process.diffusion(middles) * -times.diff()
    precision = process.covariance(middles).inverse()
    on_state = strength @ (stationary.inverse() - precision)
    on_answer = strength @ precision @ process.signal(middles)

    def push(k: int, at: Handle) -> Terms:
        return on_state[k] @ at.state + on_answer[k] @ at.answer

    current = builder.start()
    for k, (middle, end) in enumerate(zip(middles.tolist(), times[1:].tolist(), strict=True)):
        halfway = builder.node(middle, before[k] @ current.state, noise_before[k], stage=True)
        asked = halfway
        if order == 2:
            asked = builder.node(middle, halfway.state + 0.5 * push(k, halfway), stage=True)
        current = builder.node(end, after[k] @ (halfway.state + push(k, asked)), noise_after[k])
    if clean:
        builder.node(0.0, current.answer)
    return builder.build(order=order)


def equilibrium(process: Process) -> Operator:
    """Find the covariance S with `F S + S F^T + G G^T = 0` at all times.

    Raises:
        PushforwardError: there is none.
    """
    times = torch.linspace(process.t_min, process.t_max, 5, dtype=torch.float64, device="cpu")[
        :-1
    ]  # F may have no limit at t_max
    drift, diffusion = process.drift(times), process.diffusion(times)
    f, g, one = drift.coefficients, diffusion.coefficients, torch.eye(process.blocks, dtype=torch.float64, device="cpu")
    act = torch.einsum("...ij,kl->...ikjl", f, one) + torch.einsum("...kl,ij->...ikjl", f, one)  # S -> F S + S F^T
    solved, failed = torch.linalg.solve_ex(act.flatten(-2).flatten(-3, -2), -g.flatten(-2)[..., None])
    found = solved.view_as(g)
    constant = torch.allclose(found, found[:1].expand_as(found), rtol=1e-6, atol=1e-9)
    if failed.any() or not constant or torch.linalg.cholesky_ex(found).info.any():
        raise PushforwardError(
            f"SSCS splits off an equilibrium that is the same at all times, which vp and langevin have but process "
            f"{process.name!r} has not; use ddpm, or gddim with noise 1."
        )
    return Operator(found[0], diffusion.basis)


def _reversed(process: Process, stationary: Operator, t: Tensor, s: Tensor) -> tuple[Operator, Operator]:
    """K and N of A from `t` down to `s`."""
    gain = stationary @ process.transition(t, s).T @ stationary.inverse()
    return gain, (stationary - gain @ stationary @ gain.T).cholesky()
