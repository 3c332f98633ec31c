r"""DDIM, DDPM and gDDIM: samplers that hold the *noise prediction in the root's form* constant or extrapolate it.

With `n = Sigma_0^-1 (u - Psi D)` (minus the score) and `eps = R^T n`, the probability flow of any linear diffusion is

    u' = Psi(t', t) u + int 1/2 Psi(t', tau) G G^T R^-T eps dtau.

Constant eps gives, for every reference N(m, C), in a form that is finite even where the signal vanishes,

    u' = Psi' D + (R' R^T - Psi' C Psi^T) n          (C = 0: Psi' D + R' R^-1 (u - Psi D), which is DDIM)

and polynomial extrapolation adds `sum_j B_j (eps_{i-j} - eps_i)`, `B_j = int 1/2 Psi(t', tau) G G^T R^-T l_j dtau`.
The root R (and no other factor of Sigma) makes eps constant along the flow of a data point; the Cholesky factor L in
its place is the ablation of the paper.

The stochastic members keep a data point's marginal with noise of their own: gDDIM follows the reverse diffusion of
level lambda; DDIM(eta) takes eta^2 of the posterior's covariance as noise and shrinks the rest of the deviation to fit.

| here | DDIM paper | gDDIM paper |
|---|---|---|
| `psi`, `R` | sqrt(alpha_t), sqrt(1 - alpha_t) | Psi(t, 0), R_t |
| `D` | predicted x_0 | - |
| `noise` | - | lambda |

References:
    DDIM, Song et al., arXiv 2010.02502, eq. 12 and 16; DDPM, Ho et al., arXiv 2006.11239, algorithm 2;
    gDDIM, Zhang et al., arXiv 2206.05564, eq. 17-22.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.linear import POINT, Gaussian, Operator, Process, root
from pushforward.plan.exponential import (
    Corrector,
    Variable,
    check_noise,
    check_order,
    exponential,
    interpolation_nodes,
    variable_at,
)
from pushforward.plan.plan import Builder, Handle, Plan, Register, Terms, total
from pushforward.plan.quadrature import integrals, point_table


def gddim(
    process: Process,
    grid: Tensor,
    *,
    order: int | None = None,
    noise: float = 0.0,
    corrector: Corrector | None = None,
    reference: Gaussian = POINT,
    factor: Literal["root", "cholesky"] = "root",
    variable: Variable = "time",
) -> Plan:
    """Make gDDIM: deterministic multistep in the noise prediction, or one-step stochastic.

    Args:
        process: the diffusion.
        grid: decreasing times, `(steps + 1,)`.
        order: degree of the extrapolation, 2 by default; the first steps use the answers there are. With noise, 0.
        noise: noise level lambda >= 0; 1 is ancestral sampling.
        corrector: redo each step with the answer at its end: `evaluate` (the paper's, one more evaluation per step) or
            `reuse` (UniPC's, none).
        reference: reference Gaussian N(m, C) of the root; C = 0 in the paper.
        factor: `root`, or `cholesky` for the paper's ablation.
        variable: variable of the polynomial; time in the paper.

    Raises:
        PushforwardError: noise together with a higher order, a corrector or another factor.
    """
    check_noise(noise)
    order = order if order is not None else 0 if noise else 2
    check_order(order)
    if noise:
        if corrector or order or factor != "root":
            raise PushforwardError("Stochastic gDDIM (noise > 0) needs order 0, no corrector and factor 'root'.")
        return exponential(process, grid, order=0, noise=noise, reference=reference, name="gddim")
    builder = Builder(process, "gddim", grid)
    times = builder.grid
    at = partial(variable_at, process, variable, reference=reference)
    x = at(times).tolist()
    psi = process.signal(times)
    ahead = process.transition(times[1:], times[:-1])
    score = process.covariance(times).inverse()
    make = root if factor == "root" else _cholesky
    factors = make(process, times, reference)
    constant = order == 0 and corrector is None and factor == "root"  # then all is known in closed form
    last = len(times) - 2
    ends = (0, 1) if corrector else (0,)
    sets = [[interpolation_nodes(x, k, range(max(0, k - order), min(k + end, last) + 1)) for end in ends]
            for k in range(last + 1)]  # fmt: skip
    if not constant:
        weights = integrals(times, factors.basis, at, partial(_kernel, process, reference, make), point_table(sets))

    def prediction(k: int, handle: Handle) -> Terms:
        return factors[k].T @ score[k] @ (handle.state - psi[k] @ handle.answer)

    def frozen(k: int, state: Terms) -> Terms:
        """Return the step with the prediction held, in closed form."""
        if k == 0:  # finite without any signal, where `ahead` is not
            moved = factors[1] @ factors[0].T - psi[1] @ reference.data_covariance(process.blocks) @ psi[0].T
            return psi[1] @ first.answer + moved @ score[0] @ (first.state - psi[0] @ first.answer)
        return ahead[k] @ state + (factors[k + 1] - ahead[k] @ factors[k]) @ predictions[k]

    def step(k: int, state: Terms, which: int = 0) -> Terms:
        through = sets[k][which]
        if factor == "root" and through == [k]:
            return frozen(k, state)
        by_point = [(j, weights[k][which][n]) for n, j in enumerate(through)]
        if factor == "cholesky":
            return total([b @ predictions[j] for j, b in by_point], ahead[k] @ state)
        return total([b @ (predictions[j] - predictions[k]) for j, b in by_point if j != k], frozen(k, state))

    current = first = builder.start()
    predictions: dict[int, Terms] = {}
    for k in range(last + 1):
        if k not in predictions:
            predictions[k] = prediction(k, current)
        terms = step(k, current.state)
        if corrector is None or k == last:
            current = builder.node(float(times[k + 1]), terms)
            continue
        predicted = builder.node(float(times[k + 1]), terms, stage=True)
        predictions[k + 1] = prediction(k + 1, predicted)
        current = builder.node(float(times[k + 1]), step(k, current.state, which=1))
        if corrector == "evaluate":
            del predictions[k + 1]
    return builder.build(order=order, corrector=corrector, factor=factor, variable=variable)


def _kernel(process: Process, reference: Gaussian, make: Callable[..., Operator], tau: Tensor, end: Tensor) -> Operator:
    """`1/2 Psi(end, tau) G G^T R_tau^-T`."""
    carried = process.transition(end, tau) @ process.diffusion(tau)
    return 0.5 * (carried @ make(process, tau, reference).inverse().T)


def _cholesky(process: Process, t: Tensor, reference: Gaussian) -> Operator:
    return reference.covariance(process, t).cholesky()


def ddim(
    process: Process, grid: Tensor, *, eta: float = 0.0, arrivals: Tensor | None = None, residuals: bool = False
) -> Plan:
    """Make DDIM(eta): `u' = Psi' D + S R^-1 (u - Psi D) + eta P^(1/2) xi`, with `S S^T = Sigma' - eta^2 P`.

    P is the posterior's covariance `Cov[u' | u, x_0]`. For images alone S is a square root of numbers; for blocks it is
    the root of that matrix which is R' at eta = 0 and the posterior's own at eta = 1. (gDDIM's `noise` selects from
    another family, that of the reverse diffusions; the two agree at both ends.)

    Args:
        process: the diffusion.
        grid: decreasing times, `(steps + 1,)`.
        eta: share of the posterior's noise, in [0, 1]; 0 is deterministic, 1 is DDPM.
        arrivals: times that the steps really go to, `(steps,)`, if they are not the next grid times: `diffusers` does
            so for spacings other than `leading`, and this reproduces it.
        residuals: add to every state a residual that is part of the code; see `with_residuals`.
    """
    plan = _posterior_family(process, grid, eta, "ddim", arrivals, large=False)
    return with_residuals(plan) if residuals else plan


def with_residuals(plan: Plan) -> Plan:
    """Add to every state but the first a variable of the code, as it is: what a given path has more than the plan's.

    Any states whatever are then a path of the plan, so that every image has a code that decodes to it exactly.

    Raises:
        PushforwardError: the plan takes noises already.
    """
    if plan.noises:
        raise PushforwardError(f"The plan of {plan.solver!r} takes noises; residuals are added to a deterministic one.")
    one = Operator.scalar(1.0, plan.process.blocks)
    first, *rest = plan.nodes
    nodes = (replace(node, terms={**node.terms, Register("noise", k): one}) for k, node in enumerate(rest, 1))
    return replace(plan, nodes=(first, *nodes), settings={**plan.settings, "residuals": True})


def ddpm(process: Process, grid: Tensor, *, variance: Literal["small", "large"] = "small") -> Plan:
    """Make ancestral sampling: DDIM(eta = 1), with the posterior's variance or the larger one of the forward step."""
    return _posterior_family(process, grid, 1.0, "ddpm", None, large=variance == "large")


def _posterior_family(
    process: Process, grid: Tensor, eta: float, name: str, arrivals: Tensor | None, *, large: bool
) -> Plan:
    if not 0 <= eta <= 1:
        raise PushforwardError(f"eta must lie in [0, 1]; got {eta}.")
    builder = Builder(process, name, grid)
    origin = builder.grid[:-1]
    arrivals = builder.grid[1:] if arrivals is None else torch.as_tensor(arrivals, dtype=torch.float64, device="cpu")
    zero = torch.zeros_like(origin)
    psi, psi_next = process.transition(origin, zero), process.transition(arrivals, zero)
    inverse_root, root_next = root(process, origin).inverse(), root(process, arrivals)
    sigma_next = process.covariance(arrivals)
    gain = sigma_next @ process.transition(origin, arrivals).T @ process.covariance(origin).inverse()
    posterior = process.posterior_covariance(arrivals, origin)
    shrunk = _shrunk_root(root_next, sigma_next, gain @ root(process, origin), eta)
    if large:
        step = process.transition(origin, arrivals)
        posterior = process.covariance(origin) - step @ sigma_next @ step.T
    noise = posterior.cholesky() * eta
    current = builder.start()
    for k, t in enumerate(builder.grid[1:]):
        deviation = inverse_root[k] @ (current.state - psi[k] @ current.answer)
        spread = noise[k] if eta and float(arrivals[k]) > 0 else None
        current = builder.node(float(t), psi_next[k] @ current.answer + shrunk[k] @ deviation, spread)
    return builder.build(eta=eta)


def _shrunk_root(root: Operator, sigma: Operator, gain: Operator, eta: float) -> Operator:
    """S with `S S^T = sigma - eta^2 P`, `P = sigma - gain gain^T`; `root` at eta = 0, `gain` at eta = 1.

    A root is a symmetric one times a rotation; the rotation turns from the first's to the second's with `eta^2`.
    """
    if eta == 0:
        return root
    if eta == 1:
        return gain
    symmetric = ((1 - eta**2) * sigma + eta**2 * (gain @ gain.T)).square_root()
    if root.blocks == 1:
        return symmetric
    first, last = _rotation(root), _rotation(gain)
    turn = first.T @ last
    angle = eta**2 * torch.atan2(turn.entry(1, 0), turn.entry(0, 0))
    return symmetric @ first @ Operator.block([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]], turn.basis)


def _rotation(factor: Operator) -> Operator:
    """Q of the polar decomposition `factor = S Q`; a rotation also where the factor is singular."""
    left, _, right = torch.linalg.svd(factor.coefficients)
    sign = torch.linalg.det(left @ right)[..., None, None]
    flip = torch.cat([torch.ones_like(sign), sign], -1)  # of the direction with the smaller singular value
    return Operator((left * flip) @ right, factor.basis)
