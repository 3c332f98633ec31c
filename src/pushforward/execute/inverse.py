r"""Exact inversion: the first state behind a given last one, for any deterministic plan.

The equations are the plan's own, with the last state known in place of the first, so nothing here depends on the
solver: multistep, predictor-corrector, Runge-Kutta and collocation plans are inverted alike. All states are solved for
at once, as in `execute.parallel`, on from the path of the reference Gaussian that ends in the given state.

How near the states are to a solution says little of where running the plan from the first of them ends: that may be
thirty times as far off, and rounds of running all steps at once find out slowly. So the plan *is* run from what was
found, one step after another (as many network evaluations as one round), and the error of that is the one reported.
Images that it leaves above the tolerance go on from their states with a tighter one.

A plan whose rows are `u_{n+1} = a u_n + b D(u_n)` can be solved row by row, too, from the last to the first. Each row
begins near its solution and takes about three calls, which is a quarter of the evaluations in six times as many
rounds. It is also what is left where the steps are few and large, and all times together may find no solution. A
denoiser that is a posterior mean is the gradient of a convex function, so that with `a, b > 0` every row has exactly
one solution, however long the step.

The plan must end at a time t > 0: a last step to zero noise projects onto the data and has no inverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pushforward.denoiser import Denoiser
from pushforward.errors import Diverged, PushforwardError
from pushforward.execute.anderson import Mixing
from pushforward.execute.backward import one_step_rows
from pushforward.execute.parallel import Parallel, Round, Subset, iterate, parallel, system_of
from pushforward.execute.sequential import Progress, check_start, run
from pushforward.execute.states import Backwards
from pushforward.linear import WHITE, Operator, root
from pushforward.plan import Plan

INVERSE = Parallel(tolerance=1e-4, mixing=Mixing(history=5, shrink=None), max_rounds=40)
TIGHTER = (0.1, 0.02, 0.003)  # errors estimated, of running the plan or of a row, in parts of the tolerance, in turn
MORE = 4  # rounds before the plan is run again, of an image that goes on
LESS = 0.5  # an image goes on as long as its error falls to less than this part of what it was; else it is rounding
RATE = 0.2  # part of a row's error that a move leaves, at least
PATIENCE = 8  # calls without a smaller error after which a row is left
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
    begin: Tensor | None = None,
    method: Parallel = INVERSE,
    sequential: bool = False,
    error: Callable[[Tensor], Tensor] | None = None,
    callback: Callable[[Round], None] | None = None,
) -> Inverse:
    """Return the first states of `plan` that lead to given last ones.

    What becomes of an image does not depend on the others, except that it may wait for them.

    Args:
        plan: deterministic, of any solver, ending at a time above 0.
        denoiser: the network.
        end: last state, `(batch, k * channels, *field)`.
        clean: the clean state of which `end` is a noisy one, shaped like it, if it is known: the states begin on the
            path that leads from this point to `end`, in place of the reference's.
        begin: a first state, shaped like it, that the states begin on the path from instead: where there are several
            solutions, others may be found.
        method: how; `tolerance` is the greatest error allowed when the plan is run again from the state found. The
            rounds that find states stop at `max_rounds` whatever the error, or at `MORE` where they go on.
        sequential: solve plans with an answer per step row after row: a quarter of the network evaluations, in six
            times as many rounds. Images that miss the tolerance so are solved for at all times at once, and the other
            way about.
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
    best, rounds = _Best(plan, denoiser, end, error or (lambda gap: gap.flatten(1).abs().amax(1))), 0
    near = end if clean is None else clean
    path = None if begin is None else _path(plan, near, begin, 0)
    together = path if path is not None or clean is None else _path(plan, clean, end, -1)
    ways: list[Callable[[], _Way]] = [lambda: _Together(plan, denoiser, end, together, method, callback)]
    if (rows := one_step_rows(plan)) is not None:
        ways.insert(0 if sequential else 1,
                    lambda: _Rows(plan, rows, denoiser, end, near, path, method, best, callback))  # fmt: skip
    for make in ways:
        some = (~(best.residual <= ROOM * method.tolerance)).nonzero()[:, 0]
        if not len(some):
            break
        way = make()
        for part in TIGHTER:
            before = best.residual[some]
            first, calls, nfe = way.solve(some, part)
            rounds, best.nfe[some] = rounds + calls, best.nfe[some] + nfe
            best.measure(some, first)
            left = (best.residual[some] > ROOM * method.tolerance) & (best.residual[some] < LESS * before)
            some = some[left]
            if not len(some):
                break
    return Inverse(best.first, best.residual, rounds, best.calls, best.nfe)


class _Best:
    """For each image the first state that was found to end nearest, and what finding out has cost.

    `path` holds the states and answers of each image's latest run, a pair per network call.
    """

    def __init__(self, plan: Plan, denoiser: Denoiser, end: Tensor, error: Callable[[Tensor], Tensor]):
        self._plan, self._denoiser, self._end, self._error = plan, denoiser, end, error
        self.first = end.clone()
        self.residual = end.new_full((len(end),), math.inf)
        self.nfe = torch.zeros(len(end), dtype=torch.long, device=end.device)
        self.calls = 0
        self.path: list[tuple[Tensor, Tensor]] = []

    def measure(self, some: Tensor, found: Tensor) -> None:
        """Run the plan from first states of some images."""
        finite = found.flatten(1).isfinite().all(1)
        some, found = some[finite], found[finite]
        if not len(some):
            return
        if self._plan.implicit:
            denoiser = Subset(self._denoiser, some)
            solution = parallel(self._plan, denoiser, found, method=Parallel(tolerance=1e-5))
            last, calls, nfe = solution.last, solution.rounds, solution.nfe
        else:
            last, calls = self._run(some, found), self._plan.rounds
            nfe = torch.full_like(some, self._plan.nfe)
        off = self._error(last - self._end[some]).nan_to_num(math.inf)
        better = off < self.residual[some]
        self.first[some[better]], self.residual[some[better]] = found[better], off[better]
        self.calls, self.nfe[some] = self.calls + calls, self.nfe[some] + nfe

    def _run(self, some: Tensor, first: Tensor) -> Tensor:
        """Return the last states; NaN for the images that are not finite, which the others do not suffer for."""

        def keep(step: Progress) -> None:
            if len(self.path) < step.done:
                self.path.append((torch.zeros_like(self._end), torch.zeros_like(self._end)))
            state, answer = self.path[step.done - 1]
            state[some], answer[some] = step.state, step.denoised

        try:
            return run(self._plan, Subset(self._denoiser, some), first, callback=keep)
        except Diverged:
            if len(first) == 1:
                return torch.full_like(first, math.nan)
        return torch.cat([self._run(some[i : i + 1], first[i : i + 1]) for i in range(len(first))])


_Known = tuple[Tensor, Tensor, Tensor]  # a state, its answer, and the move that a row asks for


class _Way(Protocol):
    """A way to find first states."""

    def solve(self, some: Tensor, part: float) -> tuple[Tensor, int, Tensor]:
        """Return the first states of some images, network calls one after another, and evaluations of each image.

        Called again, it goes on from what it found before.

        Args:
            some: indices of the images.
            part: error to estimate, in parts of the tolerance.
        """


class _Together:
    """All states at once."""

    def __init__(
        self,
        plan: Plan,
        denoiser: Denoiser,
        end: Tensor,
        path: Tensor | None,
        method: Parallel,
        callback: Callable[[Round], None] | None,
    ):
        self._denoiser, self._end, self._method, self._callback = denoiser, end, method, callback
        self._system = system = system_of(plan, method.response, method.reference, end)
        self._most = method.max_rounds or INVERSE.max_rounds
        last = system.pack(end[None])
        if path is None:
            constant = system.constant(None, len(end), end)
            states, _ = system.linear_start(torch.zeros_like(last), constant, method.reference)
            states = states + system.from_end((last - states[:, -1:])[:, 0])
        else:
            states = system.pack(path)
        states[:, -1:] = last
        self._states = system.unpack(states)

    def solve(self, some: Tensor, part: float) -> tuple[Tensor, int, Tensor]:
        """See `_Way`."""
        system, end, method = self._system, self._end[some], replace(self._method, max_rounds=self._most)
        states, constant = system.pack(self._states[:, some]), system.constant(None, len(some), end)
        point = Backwards(system, Subset(self._denoiser, some), end, states, torch.zeros_like(states), constant,
                          part * method.tolerance, method.max_rows)  # fmt: skip
        del states  # which the point lets go after the first round
        found = iterate(point, method, callback=self._callback)
        self._states[:, some], self._most = found.states, MORE
        return found.first, found.rounds, found.nfe


class _Rows:
    """Each row `a u + b D(u) = u_next` on its own, from the last to the first.

    A row begins on the path given, or where the answers of the later rows, extrapolated in the logarithm of the
    signal-to-noise ratio, lead; or, once the plan has been run from what was found, at the state of that run. The moves
    `(a + b L)^-1 (u_next - a u - b D(u))`, with the reference's response L, are mixed as Anderson's.
    """

    def __init__(
        self,
        plan: Plan,
        rows: list[tuple[Operator, Operator]],
        denoiser: Denoiser,
        end: Tensor,
        clean: Tensor,
        path: Tensor | None,
        method: Parallel,
        best: _Best,
        callback: Callable[[Round], None] | None,
    ):
        self._rows, self._end, self._clean, self._path, self._best = rows, end, clean, path, best
        self._tolerance, self._callback, self._calls, self._again = method.tolerance, callback, 0, False
        times = plan.node_times
        self._response = (method.reference or WHITE).response(plan.process, times[:-1])
        self._log_snr = plan.process.log_snr(times).tolist()
        self._ask = denoiser.at(plan.process, times[:-1], end)

    def solve(self, some: Tensor, part: float) -> tuple[Tensor, int, Tensor]:
        """See `_Way`."""
        before, nfe = self._calls, torch.zeros_like(some)
        target, answers = self._end[some], [self._clean[some]]
        for n in reversed(range(len(self._rows))):
            a, b = self._rows[n]
            if self._again:
                state, answer = (kept[some] for kept in self._best.path[n])
                known = [(state, answer, self._move(n, target, state, answer)[0])]
                state = state + known[0][2]
            elif self._path is None:
                known, state = [], a.inverse()(target - b(self._extrapolated(n, answers)))
            else:
                known, state = [], self._path[n, some]
            target, answer, asked = self._row(n, target, state, known, some, part * self._tolerance)
            answers, nfe = [answer, *answers[:1]], nfe + asked
        self._again = True
        return target, self._calls - before, nfe

    def _extrapolated(self, n: int, answers: list[Tensor]) -> Tensor:
        """Return the answer of row n, on the line through those of the next two nodes."""
        if len(answers) == 1 or not math.isfinite(self._log_snr[n]):
            return answers[0]
        own, one, two = self._log_snr[n : n + 3]
        return torch.lerp(answers[1], answers[0], (own - two) / (one - two))

    def _move(self, n: int, target: Tensor, state: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
        """Return the move that a row asks for, and the size of its error."""
        a, b = self._rows[n]
        gap = target - a(state) - b(answer)
        move = (a + b @ self._response[n]).inverse()(gap)
        return move, gap.flatten(1).abs().amax(1).nan_to_num(math.inf)

    def _row(
        self, n: int, target: Tensor, state: Tensor, known: list[_Known], some: Tensor, tolerance: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Find the state before `target`, its answer, and each image's evaluations; the best that was if moves fail."""
        best, said, nfe, stale = state.clone(), torch.zeros_like(state), torch.zeros_like(some), torch.zeros_like(some)
        least = state.new_full((len(some),), math.inf)
        going = torch.arange(len(some), device=some.device)
        while len(going):
            answer = self._ask(n, state, some[going])
            self._calls, nfe[going] = self._calls + 1, nfe[going] + 1
            move, size = self._move(n, target[going], state, answer)
            if self._callback is not None:
                self._callback(Round(self._calls, float(size.max()), len(going), len(going)))
            known = [*known[-5:], (state, answer, move)]
            moved, expected = _mixed(known, self._response[n])
            met = size * (size / least[going]).clamp(RATE, 1.0) <= tolerance
            better = size < least[going]
            stale[going] = torch.where(size < 0.9 * least[going], 0, stale[going] + 1)
            least[going] = torch.minimum(size, least[going])
            best[going[better]], said[going[better]] = state[better], answer[better]
            best[going[met]], said[going[met]] = moved[met], expected[met]
            on = ~met & (stale[going] < PATIENCE) & size.isfinite()
            state, going, known = moved[on], going[on], [(x[on], y[on], z[on]) for x, y, z in known]
        return best, said, nfe


def _mixed(known: list[_Known], response: Operator) -> tuple[Tensor, Tensor]:
    """Return Anderson's next state of each image (see `execute.anderson`), and the answer expected there."""
    states, answers, moves = (torch.stack(part, 1).flatten(2).double() for part in zip(*known, strict=True))
    weights = torch.zeros_like(moves[:, :, 0])
    weights[:, -1] = 1
    if len(known) > 1:
        change = moves.diff(dim=1)
        scale = change.norm(dim=2, keepdim=True).clamp_min(1e-30)
        unit = change / scale
        gram = unit @ unit.mT + 1e-8 * torch.eye(len(known) - 1, device="cpu").to(unit)
        part = (torch.linalg.solve(gram, unit @ moves[:, -1, :, None]) / scale)[:, :, 0]
        weights[:, 1:] -= part
        weights[:, :-1] += part
    like = known[-1][0]
    state, answer, move = ((weights[:, None] @ part)[:, 0].to(like).view_as(like) for part in (states, answers, moves))
    return state + move, answer + response(move)


def _path(plan: Plan, clean: Tensor, state: Tensor, node: int) -> Tensor:
    """Compute `Psi_k x + R_k z` at all nodes k, with the z of one's state: `(nodes, batch, k * channels, *field)`."""
    times = plan.node_times
    psi, factor = plan.process.signal(times), root(plan.process, times)
    z = factor[node].inverse()(state - psi[node](clean))
    return torch.stack([psi[k](clean) + factor[k](z) for k in range(len(times))])
