r"""Run a plan with all its steps at once: a fixed point over the whole chain, a network call for many times together.

One *round* asks the network about all states that are not settled yet, in one batch, and moves all states as the
preconditioned system says (`execute.system`). The start is the path on which the reference Gaussian would flow; the
solution is the sequential sampler's, noise included, because the equations are its own.

- The first rounds ask few of many steps, and infer the answers of the rest (`execute.coarse`).
- Where rounds are few and the reference knows no mean image, the first asks the first step alone: of pure noise the
  network tells the mean of its data (under its condition), and on that path the other answers are worth more.
- A prefix of steps is *exact*, one more each round, and is not asked again. So after as many rounds as the plan has
  calls, the result *is* the sequential one, but for rounding.
- Steps after it are *settled* as long as what they leave behind, all together, is far below the tolerance. They are not
  asked until the exact prefix comes to them, or later steps turn out to amplify more of it.
- An image stops when what is left of the error is below the tolerance. `execute.remainder` says how that is estimated;
  where the network's precision does not allow the tolerance, the rounds end there, and the solution says so.
- Mixing (Anderson's, from the last few rounds) speeds the end up: each step takes the combination of past rounds that
  is best for the steps before it (*triangular*), for itself (*step*), or one for the whole chain (*joint*).
- An image whose moves grow or are not finite is run sequentially instead, and the solution says so.
- In an implicit plan (collocation) no step settles before the later ones: all are asked in every round, `window` has no
  effect, and there is no sequential sampler to fall back on.

References:
    Deep Equilibrium Approaches to Diffusion Models, Pokle et al., arXiv 2210.12867 (`picard`, `anderson`);
    Parallel Sampling of Diffusion Models, Shih et al., arXiv 2305.16317 (windows);
    Accelerating Parallel Sampling of Diffusion Models, Tang et al., arXiv 2402.09970 (`triangular` mixing).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Literal

import torch
from torch import Tensor

from pushforward.data import schema
from pushforward.data.words import many
from pushforward.denoiser import Ask, Denoiser
from pushforward.errors import PushforwardError
from pushforward.execute.anderson import Mixing
from pushforward.execute.budget import window_in
from pushforward.execute.coarse import coarse_of
from pushforward.execute.convergence import Convergence, converge
from pushforward.execute.remainder import roundoff
from pushforward.execute.sequential import Noise, check_start, run
from pushforward.execute.states import Backwards, Forwards
from pushforward.execute.system import System
from pushforward.linear import WHITE, Gaussian, Operator
from pushforward.plan import Plan

Response = Literal["gaussian", "noise", "data"]

MIXING = Mixing()
NEAR = 1.0  # deviations by which a solution moves and still says more than the reference
FAR = 100.0  # deviations from zero at which a reference's path is no path of images
NOISE = 0.01  # signal-to-noise ratio of data below which their mean is all that a network can tell


@dataclass(frozen=True)
class Parallel:
    """How all steps are solved at once; the defaults are the best we know.

    Args:
        tolerance: error allowed in any state, in units of its marginal's deviation: for the image, about its relative
            error against the sequential result.
        response: how answers are expected to move with their states: as for `gaussian` data, or with the prediction of
            the `noise` or of the `data` held (Picard's iteration in either).
        reference: the Gaussian, N(0, 1/4) by default; its mean may be one for each image. With `rounds`, a mean that is
            a number counts as unknown.
        mixing: how past rounds are used, or not.
        start: states begin on the `reference`'s flow, or as `copies` of the first one; or at a `Solution` of other
            codes (or noises, or condition), moved by the linear response to what changed. Its images are these, in
            order; those that had diverged begin on the reference's flow.
        coarse: steps that the first rounds ask, of a deterministic plan with more than twice as many; answers of the
            rest follow theirs. `None`, a `window`, or a `Solution` to start at: every round asks all.
        window: most steps asked in a round, from the first that is not settled; all by default.
        max_rows: most states in one network call; a round may take several. All by default.
        max_rounds: stop there even if the tolerance is not met; by default the plan's calls, which suffice for explicit
            plans. An implicit plan may take more, and must meet the tolerance within 200.
        rounds: the best image in this many rounds is wanted, to whatever error. A solver of which no steps are said
            then makes as many calls as serve that best (see `execute.budget`).
        max_evaluations: most network evaluations of an image in these `rounds`; as many as they take by default.
    """

    tolerance: float = 1e-3
    response: Response = "gaussian"
    reference: Gaussian | None = None
    mixing: Mixing | None = MIXING
    start: Literal["reference", "copies"] | Solution = "reference"
    coarse: int | None = 17
    window: int | None = None
    max_rows: int | None = None
    max_rounds: int | None = None
    rounds: int | None = None
    max_evaluations: int | None = None

    def __post_init__(self) -> None:
        schema.check_fields(self)
        if not self.tolerance > 0:
            raise PushforwardError(f"The tolerance of parallel sampling must be positive; got {self.tolerance}.")
        if self.coarse is not None and self.coarse < 4:
            raise PushforwardError(f"A spline needs at least 4 coarse steps; got {self.coarse}.")
        for name in ("window", "max_rows", "max_rounds", "rounds", "max_evaluations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PushforwardError(f"{name} must be at least 1; got {value}.")
        if self.rounds is not None and self.max_rounds is not None:
            raise PushforwardError("rounds and max_rounds both end the rounds; give one of them.")
        if self.max_evaluations is not None and self.rounds is None:
            raise PushforwardError("A bound on evaluations goes with a number of rounds; say how many rounds.")

    def bounded(self, plan: Plan) -> Parallel:
        """Return the same with its budget, if it has one, as a window and a number of rounds for a plan.

        Raises:
            PushforwardError: the budget is too small for the plan.
        """
        if self.rounds is None:
            return self
        window = window_in(plan.nfe, self.rounds, self.max_evaluations, implicit=plan.implicit)
        return replace(self, window=window or self.window, max_rounds=self.rounds, rounds=None, max_evaluations=None)


@dataclass(frozen=True)
class Round:
    """What a callback is told after every round.

    Args:
        done: rounds so far.
        residual: the greatest error estimated in any image.
        active: images that are not done.
        nfe: network evaluations of this round.
        last: the last state while the callback runs, in pixels `(batch, k * channels, *field)`, where states move.
        states: those of all nodes, in pixels `(nodes, batch, k * channels, *field)`, likewise.
    """

    done: int
    residual: float
    active: int
    nfe: int
    last: Callable[[], Tensor] | None = None
    states: Callable[[], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Solution:
    """States of all nodes at once.

    Args:
        states: of every node, pixels `(nodes, batch, k * channels, *field)`.
        rounds: batched network calls on the critical path.
        nfe: network evaluations of each image, `(batch,)`.
        residual: error estimated to be left in each image, `(batch,)`; 0 where it ran to the exact end.
        diverged: images that were run sequentially because the fixed point diverged, `(batch,)`.
        answers: expected of the network about the states that are asked, `(nfe, batch, k * channels, *field)`.
    """

    states: Tensor
    rounds: int
    nfe: Tensor
    residual: Tensor
    diverged: Tensor
    answers: Tensor

    @property
    def first(self) -> Tensor:
        """The first state, `(batch, k * channels, *field)`."""
        return self.states[0]

    @property
    def last(self) -> Tensor:
        """The last state, `(batch, k * channels, *field)`."""
        return self.states[-1]

    def some(self, images: Tensor) -> Solution:
        """Return the solution of some of its images, by their numbers `(n,)`."""
        return Solution(self.states[:, images], self.rounds, self.nfe[images], self.residual[images],
                        self.diverged[images], self.answers[:, images])  # fmt: skip


_PUBLISHED = Parallel(response="noise", mixing=None, start="copies", coarse=None)
PARALLEL_METHODS: dict[str, Parallel] = {
    "preconditioned": Parallel(),
    "plain": Parallel(mixing=None),
    "picard": _PUBLISHED,
    "anderson": replace(_PUBLISHED, mixing=Mixing("step", history=5, ridge=1e-3, relative=False, shrink=None)),
    "joint": replace(_PUBLISHED, mixing=Mixing("joint", history=5, shrink=None)),
    "triangular": replace(_PUBLISHED, mixing=Mixing("triangular", history=4, shrink=None)),
}


@torch.no_grad()
def parallel(
    plan: Plan,
    denoiser: Denoiser,
    start: Tensor,
    *,
    noise: Noise | None = None,
    method: Parallel = PARALLEL_METHODS["preconditioned"],
    callback: Callable[[Round], None] | None = None,
) -> Solution:
    """Return what `run` does, with all steps at once.

    Args:
        plan: coefficients, of any solver.
        denoiser: the network.
        start: first state, `(batch, k * channels, *field)`.
        noise: `n -> xi_n` for each node of `plan.noises`, asked in order, as in `run`.
        method: how.
        callback: told after every round.

    Raises:
        PushforwardError: no noise for a stochastic plan, a start of the wrong shape, a result that is not finite even
            sequentially, or an implicit plan that did not converge.
    """
    check_start(plan, start)
    told, method = asks_mean_first(plan, method), method.bounded(plan)
    if plan.noises and noise is None:
        raise PushforwardError(f"The plan of {plan.solver!r} is stochastic: give `noise`.")
    drawn = {k: noise(k) for k in plan.noises} if noise is not None else {}
    system = system_of(plan, method.response, method.reference, start)
    constant = system.constant(drawn.__getitem__, len(start), start)
    states, answers = system.linear_start(system.pack(start[None]), constant, method.reference)
    if method.reference is not None and not _sensible(system, states):
        return parallel(plan, denoiser, start, noise=drawn.__getitem__, method=replace(method, reference=None),
                        callback=callback)  # fmt: skip
    if told:
        states, answers = _from_the_mean(system, denoiser, start, constant, method)
    if method.start == "copies":
        known = system.asked[0] + 1  # what comes before any answer is not a guess
        copied = system.pack(start[None]).expand(-1, system.size - known, -1, -1)
        states = torch.cat([states[:, :known], copied], 1)
    elif isinstance(method.start, Solution):
        states, answers = _moved(system, method.start, start, constant, (states, answers))
    known = method.window is not None or isinstance(method.start, Solution)
    coarse = None if known else coarse_of(plan, method.coarse)
    point = Forwards(system, denoiser, start, states, answers, constant, method.tolerance, method.max_rows,
                     coarse and coarse.to(start))  # fmt: skip
    del states, answers  # which the point lets go after the first round
    solution = iterate(point, method, callback=callback, begun=told)
    bad = solution.diverged.nonzero()[:, 0]
    if plan.implicit and len(bad):
        raise PushforwardError(
            f"The implicit plan of {plan.solver!r} did not converge in {many(solution.rounds, 'round')}, and cannot be "
            "run step by step instead: use more steps, a lower order, or an explicit solver."
        )
    if len(bad):
        states = solution.states.clone()
        some = Subset(denoiser, bad)
        states[-1, bad] = run(plan, some, start[bad], noise=lambda k: drawn[k].to(start)[bad])
        nfe, residual = solution.nfe.clone(), solution.residual.clone()
        nfe[bad] += plan.nfe
        steps = system if system.finite else system_of(plan, "data", None, start)  # a response without signal is none
        residual[bad] = roundoff(denoiser, start) * float(steps.influence[-1].norm())
        return replace(solution, states=states, rounds=solution.rounds + plan.rounds, nfe=nfe, residual=residual)
    return solution


def _moved(
    system: System, solution: Solution, start: Tensor, constant: Tensor, other: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return states and answers of a solution, moved to another start and to the noises in the constant.

    Images whose solution diverged, or moves far, have the others, those of the reference.

    Raises:
        PushforwardError: the solution is of another plan, or of other images.
    """
    shape = (system.size, *start.shape)
    if tuple(solution.states.shape) != shape:
        raise PushforwardError(
            f"Parallel sampling of {system.plan.solver!r} begins at a solution with states of shape {shape}; got "
            f"{tuple(solution.states.shape)}: give the solution of the same plan for the same images."
        )
    states, answers = system.pack(solution.states.to(start)), system.zeros(constant.shape[3], constant)
    answers[:, system.asked] = system.pack(solution.answers.to(start))
    moves = system.moves_to(system.pack(start[None]), states, answers, constant)
    near = (system.sizes(moves).amax(0) < NEAR) & ~solution.diverged.to(start.device)
    found = states + moves, system.respond(moves, answers)
    states, answers = (
        torch.where(near[:, None], system.by_image(own), system.by_image(else_)).view_as(own)
        for own, else_ in zip(found, other, strict=True)
    )
    return states, answers


def asks_mean_first(plan: Plan, method: Parallel) -> bool:
    """Whether a budget's first round asks about pure noise alone, as the mean of the data is not known.

    With velocities, or frequencies that fade unevenly, that costs more than it gives.
    """
    reference, process = method.reference or WHITE, plan.process
    if method.rounds in (None, 1) or method.start != "reference" or method.response != "gaussian":
        return False
    if reference.mean.ndim or process.blocks > 1 or process.basis.shape or plan.implicit or plan.asked[0]:
        return False
    pure = bool((reference.snr(process, plan.asked_times[:1]) < NOISE).all())
    return pure and method.bounded(plan).window != 1


def _from_the_mean(
    system: System, denoiser: Denoiser, start: Tensor, constant: Tensor, method: Parallel
) -> tuple[Tensor, Tensor]:
    """Ask the first call, and return states and answers of the reference with the mean that its answer is."""
    plan, every = system.plan, torch.arange(len(start), device=start.device)
    ask, rows = denoiser.at(plan.process, plan.asked_times[:1], start), method.max_rows or len(start)
    answer = torch.cat([ask(0, start[some], some) for some in every.split(rows)])
    told = Gaussian(mean=plan.process.image(answer))  # of which the variance is in the system's response
    first = system.pack(start[None])
    states, answers = system.linear_start(first, constant, told)
    answers[:, :1] = system.pack(answer[None])
    moves = system.moves_to(first, states, answers, constant)
    return states + moves, system.respond(moves, answers)


def _sensible(system: System, states: Tensor) -> bool:
    """Whether a reference's path is one that images could take, at most `FAR` deviations away."""
    return system.finite and bool(system.sizes(states).amax() < FAR)


def system_of(plan: Plan, kind: Response, reference: Gaussian | None, like: Tensor) -> System:
    """Return the linear system of a plan with a response, for states like this one, `(batch, k * channels, *field)`.

    The latest two are kept: chains and optimisers of codes ask for the same one, forwards and backwards, at every step,
    and on a GPU building it takes longer than solving it.
    """
    variance = None if reference is None else reference.variance
    numbers = None if variance is None else (variance.shape, variance.numpy(force=True).tobytes())
    return _kept(_Asked(plan, kind, numbers, like.shape[1:], like.dtype, like.device, reference))


@dataclass(frozen=True)
class _Asked:
    """What a system depends on; of a reference, that is its variance, whichever `Gaussian` holds it."""

    plan: Plan
    kind: Response
    variance: tuple[torch.Size, bytes] | None
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    reference: Gaussian | None = field(compare=False)


@lru_cache(maxsize=2)
@torch.inference_mode(mode=False)
def _kept(asked: _Asked) -> System:
    like = torch.empty(1, *asked.shape, dtype=asked.dtype, device=asked.device)
    return System(asked.plan, _response(asked.plan, asked.kind, asked.reference), like)


def _response(plan: Plan, kind: Response, reference: Gaussian | None) -> Operator | None:
    """Return how the answers of `plan` are expected to move, at the nodes that ask."""
    times = plan.asked_times
    match kind:
        case "gaussian":
            return (WHITE if reference is None else reference).response(plan.process, times)
        case "noise":
            return plan.process.signal(times).inverse()
        case _:
            return None


def iterate(
    point: Forwards | Backwards,
    method: Parallel,
    *,
    callback: Callable[[Round], None] | None = None,
    begun: bool = False,
) -> Solution:
    """Take rounds until every image is done.

    Args:
        point: states and answers to begin with.
        method: how.
        callback: told after every round.
        begun: whether a round has asked the first call already.
    """
    system, like = point.system, point.like
    rank = torch.arange(len(system.asked), device=like.device)
    active = torch.ones(len(like), dtype=torch.bool, device=like.device)
    state = Convergence.begin(rank, active, like, whole=point.backwards or system.plan.implicit, window=method.window)
    if point.coarse is not None:
        state.coarse = point.coarse.member()

    def tell(nfe: int) -> None:
        assert callback is not None
        last, states = partial(_last, system, point.values), partial(system.unpack, point.values)
        callback(Round(state.rounds, float(state.residual.max()), int(state.active.sum()), nfe, last, states))

    if begun:
        state.rounds, state.nfe = 1, state.nfe + 1
        state.advance(torch.zeros_like(state.exact))
        if callback is not None:
            tell(len(like))
    converge(point, state, max_rounds=method.max_rounds, mixing=method.mixing, callback=callback and tell)
    answers = system.unpack(point.answers[:, system.asked])
    return Solution(system.unpack(point.values), state.rounds, state.nfe, state.residual, state.lost, answers)


def _last(system: System, states: Tensor) -> Tensor:
    return system.unpack(states[:, -1:])[0]


@dataclass(frozen=True)
class Subset:
    """A denoiser for some images of its batch."""

    denoiser: Denoiser
    images: Tensor

    def at(self, process: object, times: Tensor, like: Tensor) -> Ask:
        """See `Denoiser`."""
        ask = self.denoiser.at(process, times, like)  # type: ignore[arg-type]
        return lambda k, u, of=None: ask(
            torch.as_tensor(k, device=u.device).expand(len(u)), u, self.images if of is None else self.images[of]
        )
