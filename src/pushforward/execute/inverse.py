r"""Exact inversion: the first state behind a given last one, for any deterministic plan.

The equations are the plan's own, with the last state known in place of the first, so nothing here depends on the
solver: multistep, predictor-corrector, Runge-Kutta and collocation plans are inverted alike. All states are solved for
at once, as in `execute.parallel`, on from the path of the reference Gaussian that ends in the given state.

How near the states are to a solution says little of where running the plan from the first of them ends: that may be
thirty times as far off, and rounds of running all steps at once find out slowly. So the plan *is* run from what was
found, one step after another (as many network evaluations as one round), and the error of that is the one reported.
Images that it leaves above the tolerance go on from their states with a tighter one.

Where the steps are few and large, the states of all times together may find no solution. A plan whose rows are
`u_{n+1} = a u_n + b D(u_n)` is then solved row by row, from the last to the first. A denoiser that is a posterior mean
is the gradient of a convex function, so that with `a, b > 0` every row has exactly one solution, however long the step.

The plan must end at a time t > 0: a last step to zero noise projects onto the data and has no inverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pushforward.denoiser import Denoiser
from pushforward.errors import Diverged, PushforwardError
from pushforward.execute.anderson import Mixing
from pushforward.execute.backward import one_step_rows
from pushforward.execute.parallel import Parallel, Round, Subset, iterate, parallel, system_of
from pushforward.execute.sequential import check_start, run
from pushforward.linear import Gaussian, Operator, root
from pushforward.plan import Plan

INVERSE = Parallel(tolerance=1e-4, mixing=Mixing(history=5, below=None), max_rounds=40)
TIGHTER = (0.1, 0.03, 0.01)  # errors estimated of running the plan, in parts of the tolerance: at first, and going on
MORE = 4  # rounds before the plan is run again, of an image that goes on
LESS = 0.5  # an image goes on as long as its error falls to less than this part of what it was; else it is rounding
ROW = 0.003  # error of a row, in parts of that of all
PATIENCE = 8  # rounds without a smaller error after which a row is left
ROOM = 0.9  # part of the tolerance that is used: run in another batch, the plan ends elsewhere by rounding


@dataclass(frozen=True)
class Inverse:
    """First states found behind last ones.

    Args:
        first: the states, `(batch, k * channels, *field)`.
        residual: error of each when the plan is run from it, as measured, `(batch,)`.
        rounds: batched network calls on the critical path that found them.
        decoding: network calls, one after another, that measured the residuals.
        nfe: network evaluations of each image, both kinds together, `(batch,)`.
    """

    first: Tensor
    residual: Tensor
    rounds: int
    decoding: int
    nfe: Tensor


@torch.no_grad()
def invert(
    plan: Plan,
    denoiser: Denoiser,
    end: Tensor,
    *,
    clean: Tensor | None = None,
    method: Parallel = INVERSE,
    error: Callable[[Tensor], Tensor] | None = None,
    callback: Callable[[Round], None] | None = None,
) -> Inverse:
    """The first states of `plan` that lead to given last ones.

    What becomes of an image does not depend on the others, except that it may wait for them.

    Args:
        plan: deterministic, of any solver, ending at a time above 0.
        denoiser: the network.
        end: last state, `(batch, k * channels, *field)`.
        clean: the clean state of which `end` is a noisy one, shaped like it, if it is known: the states begin on the
            path that leads from this point to `end`, in place of the reference's.
        method: how; `tolerance` is the greatest error allowed when the plan is run again from the state found. The
            rounds that find states stop at `max_rounds` whatever the error, or at `MORE` where they go on.
        error: the size of a difference of last states, `(n, k * channels, *field) -> (n,)`; by default the greatest
            absolute value.
        callback: told after every round.

    Raises:
        PushforwardError: a stochastic plan, one that ends at time 0, or a state of the wrong shape.
    """
    check_start(plan, end)
    if plan.noises:
        raise PushforwardError(
            f"The plan of {plan.solver!r} is stochastic: it has no inverse. Use a deterministic one (eta or noise 0)."
        )
    if not plan.nodes[-1].time > 0:
        raise PushforwardError(
            f"The plan of {plan.solver!r} ends at time 0, and its last step has no inverse; end the grid at "
            f"t_min = {plan.process.t_min:g}."
        )
    system = system_of(plan, method.response, method.reference, end)
    constant = system.constant(None, len(end), end)
    last = system.pack(end[None])
    if clean is None:
        states, answers = system.linear_start(torch.zeros_like(last), constant, method.reference)
        moves = system.from_end((last - states[:, -1:])[:, 0])
        states, answers = states + moves, answers + system.respond(moves)
    else:
        states = system.pack(_path_of_a_point(plan, clean, end))
        answers = system.pack(clean.expand(system.size, *clean.shape)).clone()
    states[:, -1:] = last
    best = _Best(plan, denoiser, end, error or (lambda gap: gap.flatten(1).abs().amax(1)))
    rounds, some = 0, torch.arange(len(end), device=end.device)
    most = method.max_rounds or INVERSE.max_rounds
    for part in TIGHTER:
        inner = replace(method, tolerance=part * method.tolerance, max_rounds=most)
        found = iterate(system, Subset(denoiser, some), end[some], states, answers, constant, inner,
                        backwards=True, callback=callback)  # fmt: skip
        rounds, best.nfe[some] = rounds + found.rounds, best.nfe[some] + found.nfe
        before = best.residual[some]
        best.measure(some, found.first)
        left = (best.residual[some] > ROOM * method.tolerance) & (best.residual[some] < LESS * before)
        if not bool(left.any()):
            break
        most, some, states = MORE, some[left], system.pack(found.states[:, left])
        answers, constant = torch.zeros_like(states), system.constant(None, len(some), end)
    some, rows = (best.residual > ROOM * method.tolerance).nonzero()[:, 0], one_step_rows(plan)
    if rows is not None and len(some):
        first, calls, nfe = _row_by_row(plan, rows, Subset(denoiser, some), end[some],
                                        None if clean is None else clean[some], method, callback)  # fmt: skip
        rounds, best.nfe[some] = rounds + calls, best.nfe[some] + nfe
        best.measure(some, first)
    return Inverse(best.first, best.residual, rounds, best.calls, best.nfe)


class _Best:
    """For each image the first state that was found to end nearest, and what finding out has cost."""

    def __init__(self, plan: Plan, denoiser: Denoiser, end: Tensor, error: Callable[[Tensor], Tensor]):
        self._plan, self._denoiser, self._end, self._error = plan, denoiser, end, error
        self.first = end.clone()
        self.residual = end.new_full((len(end),), math.inf)
        self.nfe = torch.zeros(len(end), dtype=torch.long, device=end.device)
        self.calls = 0

    def measure(self, some: Tensor, found: Tensor) -> None:
        """Run the plan from first states of some images."""
        finite = found.flatten(1).isfinite().all(1)
        some, found = some[finite], found[finite]
        if not len(some):
            return
        denoiser = Subset(self._denoiser, some)
        if self._plan.implicit:
            solution = parallel(self._plan, denoiser, found, method=Parallel(tolerance=1e-5))
            last, calls, nfe = solution.last, solution.rounds, solution.nfe
        else:
            last, calls = _run(self._plan, denoiser, found), self._plan.nfe
            nfe = torch.full_like(some, calls)
        off = self._error(last - self._end[some]).nan_to_num(math.inf)
        better = off < self.residual[some]
        self.first[some[better]], self.residual[some[better]] = found[better], off[better]
        self.calls, self.nfe[some] = self.calls + calls, self.nfe[some] + nfe


def _run(plan: Plan, denoiser: Denoiser, first: Tensor) -> Tensor:
    """Last states; NaN for the images that are not finite, which the others do not suffer for."""
    try:
        return run(plan, denoiser, first)
    except Diverged:
        if len(first) == 1:
            return torch.full_like(first, math.nan)
    every = torch.arange(len(first), device=first.device)
    return torch.cat([_run(plan, Subset(denoiser, every[i : i + 1]), first[i : i + 1]) for i in range(len(first))])


def _row_by_row(
    plan: Plan,
    rows: list[tuple[Operator, Operator]],
    denoiser: Denoiser,
    end: Tensor,
    clean: Tensor | None,
    method: Parallel,
    callback: Callable[[Round], None] | None,
) -> tuple[Tensor, int, Tensor]:
    """First states from last ones, each row `a u + b D(u) = u_next` solved on its own, and calls and evaluations.

    The moves `(a + b L)^-1 (u_next - a u - b D(u))`, with the reference's response L, are mixed as Anderson's.
    """
    times = plan.node_times[:-1]
    response = (method.reference or Gaussian(0.25)).response(plan.process, times)
    ask = denoiser.at(plan.process, times, end)
    target, answer, calls = end, end if clean is None else clean, 0
    nfe = torch.zeros(len(end), dtype=torch.long, device=end.device)
    for n in reversed(range(len(rows))):
        a, b = rows[n]
        solve = (a + b @ response[n]).inverse()
        u = a.inverse()(target - b(answer))
        best, least = u.clone(), u.new_full((len(u),), math.inf)
        answer, stale = torch.zeros_like(u), torch.zeros_like(nfe)
        some = torch.arange(len(u), device=u.device)
        history: list[tuple[Tensor, Tensor]] = []
        while len(some):
            u_some = u[some]
            asked = ask(n, u_some, some)
            calls, nfe[some] = calls + 1, nfe[some] + 1
            gap = target[some] - a(u_some) - b(asked)
            size = gap.flatten(1).abs().amax(1).nan_to_num(math.inf)
            better = size < least[some]
            stale[some] = torch.where(size < 0.9 * least[some], 0, stale[some] + 1)
            least[some] = torch.minimum(size, least[some])
            best[some[better]], answer[some[better]] = u_some[better], asked[better]
            if callback is not None:
                callback(Round(calls, float(size.max()), len(some), len(some)))
            history = [*history[-5:], (u_some, solve(gap))]
            u[some] = _mixed(history)
            going = (least[some] > ROW * method.tolerance) & (stale[some] < PATIENCE) & size.isfinite()
            some, history = some[going], [(x[going], y[going]) for x, y in history]
        target = best
    return target, calls, nfe


def _mixed(history: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Anderson's next iterate of each image from its past ones and their moves (see `execute.anderson`)."""
    states, moves = (torch.stack(part, 1).flatten(2).double() for part in zip(*history, strict=True))
    total, result = states[:, -1] + moves[:, -1], history[-1][0]
    if len(history) > 1:
        change = moves.diff(dim=1)
        scale = change.norm(dim=2, keepdim=True).clamp_min(1e-30)
        unit = change / scale
        gram = unit @ unit.mT + 1e-8 * torch.eye(len(history) - 1).to(unit)
        weights = torch.linalg.solve(gram, unit @ moves[:, -1, :, None]) / scale
        total = total - ((states.diff(dim=1) + change) * weights).sum(1)
    return total.to(result).view_as(result)


def _path_of_a_point(plan: Plan, clean: Tensor, end: Tensor) -> Tensor:
    """`Psi_k x + R_k z` at every node, with the z that leads to `end`: `(nodes, batch, k * channels, *field)`."""
    times = plan.node_times
    psi, factor = plan.process.signal(times), root(plan.process, times)
    z = factor[-1].inverse()(end - psi[-1](clean))
    return torch.stack([psi[k](clean) + factor[k](z) for k in range(len(times))])
