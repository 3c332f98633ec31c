r"""DPM-Solver++ and UniPC with the coefficients they were published with.

Both take a step that holds a *combination of answers* constant, `u' = Psi' D + R' R^-1 (u - Psi D)` (for scalars,
`sigma'/sigma u - alpha' (e^-h - 1) D`, h the step in log-SNR), and differ in the combination. Written so, they run on
blurring and Langevin diffusions too; log-SNR is then that of the lowest frequency.

References:
    DPM-Solver++, Lu et al., arXiv 2211.01095, algorithm 2 (2M) and eq. 14 (SDE-2M);
    UniPC, Zhao et al., arXiv 2302.04867, algorithms 5-8 with B(h) = e^h - 1 ("bh2").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.linear import POINT, Process, root
from pushforward.plan.exponential import check_noise, exponential, interpolation_nodes
from pushforward.plan.plan import Builder, Plan, Terms, total
from pushforward.plan.quadrature import reverse_transition


def dpm_solver_pp(
    process: Process, grid: Tensor, *, order: int = 2, noise: float = 0.0, lower_final: bool = True
) -> Plan:
    """Make DPM-Solver++(2M), (3M) or SDE-2M.

    2M holds `D_i + (D_i - D_{i-1}) / (2 r)`, `r = h_{i-1} / h_i`. 3M integrates the quadratic through three answers
    exactly, which is `exponential(order=2)` for point data (the published 3M halves its last term and so loses an
    order of accuracy).

    Args:
        process: the diffusion.
        grid: decreasing times, `(steps + 1,)`.
        order: 1, 2 or 3 in the paper's counting.
        noise: 0, or 1 for the stochastic solver.
        lower_final: first order in the last step when there are fewer than 15, or when it goes to zero noise.

    Raises:
        PushforwardError: another order.
    """
    if order not in (1, 2, 3):
        raise PushforwardError(f"DPM-Solver++ has orders 1, 2 and 3; got {order}.")
    check_noise(noise)
    if order == 3:
        return exponential(process, grid, order=2, noise=noise, name="dpm++")
    builder = Builder(process, "dpm++", grid)
    times = builder.grid
    log_snr = process.log_snr(times)
    psi = process.signal(times)
    sigma = process.covariance(times)
    backs = reverse_transition(process, times[1:], times[:-1], noise, POINT, builder.one)
    last = len(times) - 2
    current, before = builder.start(), None
    for k in range(last + 1):
        answer = current.answer
        steps = log_snr[k - 1 : k + 2].diff() if k else log_snr[:0]
        first_order = order == 1 or not k or (lower_final and k == last and last < 14) or not steps.isfinite().all()
        if not first_order and before is not None:
            answer = answer + float(0.5 * steps[1] / steps[0]) * (answer - before)
        before = current.answer
        back = backs[k]
        spread = (sigma[k + 1] - back @ sigma[k] @ back.T).cholesky() if noise else None
        terms = psi[k + 1] @ answer + back @ (current.state - psi[k] @ answer)
        current = builder.node(float(times[k + 1]), terms, spread)
    return builder.build(order=order, noise=noise)


def unipc(process: Process, grid: Tensor, *, order: int = 2, lower_final: bool = True) -> Plan:
    """Make UniPC-p (bh2, data prediction): each answer first corrects the step that led to it, then predicts the next.

    Args:
        process: the diffusion.
        grid: decreasing times, `(steps + 1,)`.
        order: 1, 2 or 3 in the paper's counting.
        lower_final: lower the order over the last steps, as published.

    Raises:
        PushforwardError: another order.
    """
    if order not in (1, 2, 3):
        raise PushforwardError(f"UniPC has orders 1, 2 and 3; got {order}.")
    builder = Builder(process, "unipc", grid)
    times = builder.grid
    x = process.log_snr(times)
    places = x.tolist()
    psi = process.signal(times)
    factor = root(process, times)
    last = len(times) - 2
    current = builder.start()
    answers = {0: current.answer}

    def step(k: int, state: Terms, answer: Terms) -> Terms:
        return psi[k + 1] @ answer + factor[k + 1] @ factor[k].inverse() @ (state - psi[k] @ answer)

    def combined(k: int, others: list[int]) -> Terms:
        """`D_k + sum rho_j (D_j - D_k) / r_j`, r_j the place of answer j in units of the step."""
        ratios = (x[others] - x[k]) / (x[k + 1] - x[k])
        rho = _weights(ratios, float(x[k + 1] - x[k]))
        differences = (float(w / r) * (answers[j] - answers[k]) for w, r, j in zip(rho, ratios, others, strict=True))
        return total(differences, answers[k])

    for k in range(last + 1):
        p = min(order, last + 1 - k) if lower_final else order
        others = interpolation_nodes(places, k, range(max(0, k - p + 1), k))
        others = [j for j in reversed(others) if j != k]
        terms = step(k, current.state, combined(k, others))
        if k == last:
            current = builder.node(float(times[k + 1]), terms)
            break
        predicted = builder.node(float(times[k + 1]), terms, stage=True)
        answers[k + 1] = predicted.answer
        usable = math.isfinite(x[k])
        corrected = step(k, current.state, combined(k, [*others, k + 1])) if usable else terms
        current = builder.node(float(times[k + 1]), corrected)
    return builder.build(order=order)


def _weights(ratios: Tensor, h: float) -> Tensor:
    """UniPC's `rho`: `sum_j rho_j r_j^(n-1) = n! phi_{n+1}(-h) (-h) / B`, n = 1 …; a lone one is 1/2, as published."""
    count = len(ratios)
    if count == 0:
        return ratios
    if count == 1:
        return torch.tensor([0.5], dtype=torch.float64, device="cpu")
    hh, right = -h, []
    scale = math.expm1(hh)
    phi, factorial = math.expm1(hh) / hh - 1, 1
    for n in range(1, count + 1):
        right.append(phi * factorial / scale)
        factorial *= n + 1
        phi = phi / hh - 1 / factorial
    matrix = torch.stack([ratios**n for n in range(count)])
    rho: Tensor = torch.linalg.solve(matrix, torch.tensor(right, dtype=torch.float64, device="cpu"))
    return rho
