r"""Run a plan with all its steps at once: a fixed point over the whole chain, a network call for many times together.

One *round* asks the network about all states that are not settled yet, in one batch, and moves all states as the
preconditioned system says (`execute.system`). The start is the path on which the reference Gaussian would flow; the
solution is the sequential sampler's, noise included, because the equations are its own.

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

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Literal

import torch
from torch import Tensor

from pushforward.denoiser import Ask, Denoiser
from pushforward.errors import PushforwardError
from pushforward.execute.anderson import Mixing, anderson_step
from pushforward.execute.remainder import LINEAR, Remainder, amplification, roundoff, tail
from pushforward.execute.sequential import Noise, check_start, run
from pushforward.execute.system import System
from pushforward.linear import Gaussian, Operator
from pushforward.plan import Plan

Response = Literal["gaussian", "noise", "data"]

SETTLED = 0.1  # steps are settled as long as what all of them leave is below this part of the tolerance
RELEVANT = 0.5  # what is left is not worth a round when it is below this part of the rounding
ROUNDS = 200  # at most, where no prefix settles exactly
MIXING = Mixing()
STALE = 15  # rounds without a smaller error after which an image is given up, where no prefix settles
FAR = 100.0  # deviations from zero at which a reference's path is no path of images
COARSE = 1.0  # deviations; moves as large are rounded in digits that matter
GROWTH = 1e3  # moves this many times above their least are divergence


@dataclass(frozen=True)
class Parallel:
    """How all steps are solved at once; the defaults are the best we know.

    Args:
        tolerance: error allowed in any state, in units of its marginal's deviation: for the image, about its relative
            error against the sequential result.
        response: how answers are expected to move with their states: as for `gaussian` data, or with the prediction of
            the `noise` or of the `data` held (Picard's iteration in either).
        reference: the Gaussian, N(0, 1/4) by default; its mean may be one for each image.
        mixing: how past rounds are used, or not.
        start: states begin on the `reference`'s flow, or as `copies` of the first one.
        window: most steps asked in a round, from the first that is not settled; all by default.
        max_rows: most states in one network call; a round may take several. All by default.
        max_rounds: stop there even if the tolerance is not met; by default the plan's calls, which suffice for explicit
            plans. An implicit plan may take more, and must meet the tolerance within 200.
    """

    tolerance: float = 1e-3
    response: Response = "gaussian"
    reference: Gaussian | None = None
    mixing: Mixing | None = MIXING
    start: Literal["reference", "copies"] = "reference"
    window: int | None = None
    max_rows: int | None = None
    max_rounds: int | None = None

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise PushforwardError(f"The tolerance of parallel sampling must be positive; got {self.tolerance}.")
        for name in ("window", "max_rows", "max_rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PushforwardError(f"{name} must be at least 1; got {value}.")


PARALLEL_METHODS: dict[str, Parallel] = {
    "preconditioned": Parallel(),
    "plain": Parallel(mixing=None),
    "picard": Parallel(response="noise", mixing=None, start="copies"),
    "anderson": Parallel(
        response="noise", mixing=Mixing("step", history=5, ridge=1e-3, relative=False, below=None), start="copies"
    ),
    "joint": Parallel(response="noise", mixing=Mixing("joint", history=5, below=None), start="copies"),
    "triangular": Parallel(response="noise", mixing=Mixing("triangular", history=4, below=None), start="copies"),
}


@dataclass(frozen=True)
class Round:
    """What a callback is told after every round.

    Args:
        done: rounds so far.
        residual: the greatest error estimated in any image.
        active: images that are not done.
        nfe: network evaluations of this round.
        last: the present last state, in pixels `(batch, k * channels, *field)`, where rounds move states.
    """

    done: int
    residual: float
    active: int
    nfe: int
    last: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Solution:
    """States of all nodes at once.

    Args:
        states: of every node, pixels `(nodes, batch, k * channels, *field)`.
        rounds: batched network calls on the critical path.
        nfe: network evaluations of each image, `(batch,)`.
        residual: error estimated to be left in each image, `(batch,)`; 0 where it ran to the exact end.
        diverged: images that were run sequentially because the fixed point diverged, `(batch,)`.
    """

    states: Tensor
    rounds: int
    nfe: Tensor
    residual: Tensor
    diverged: Tensor

    @property
    def first(self) -> Tensor:
        """The first state, `(batch, k * channels, *field)`."""
        return self.states[0]

    @property
    def last(self) -> Tensor:
        """The last state, `(batch, k * channels, *field)`."""
        return self.states[-1]


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
    """What `run` does, with all steps at once.

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
    if plan.noises and noise is None:
        raise PushforwardError(f"The plan of {plan.solver!r} is stochastic: give `noise`.")
    drawn = {k: noise(k) for k in plan.noises} if noise is not None else {}
    system = system_of(plan, method.response, method.reference, start)
    constant = system.constant(drawn.__getitem__, len(start), start)
    states, answers = system.linear_start(system.pack(start[None]), constant, method.reference)
    if method.reference is not None and not _sensible(system, states):
        return parallel(plan, denoiser, start, noise=drawn.__getitem__, method=replace(method, reference=None),
                        callback=callback)  # fmt: skip
    if method.start == "copies":
        known = system.asked[0] + 1  # what comes before any answer is not a guess
        copied = system.pack(start[None]).expand(-1, system.size - known, -1, -1)
        states = torch.cat([states[:, :known], copied], 1)
    solution = iterate(system, denoiser, start, states, answers, constant, method, callback=callback)
    bad = solution.diverged.nonzero()[:, 0]
    if plan.implicit and len(bad):
        raise PushforwardError(
            f"The implicit plan of {plan.solver!r} did not converge in {solution.rounds} rounds, and cannot be run "
            "step by step instead: use more steps, a lower order, or an explicit solver."
        )
    if len(bad):
        states = solution.states.clone()
        some = Subset(denoiser, bad)
        states[-1, bad] = run(plan, some, start[bad], noise=lambda k: drawn[k].to(start)[bad])
        nfe, residual = solution.nfe.clone(), solution.residual.clone()
        nfe[bad] += plan.nfe
        residual[bad] = roundoff(denoiser, start) * float(system.influence[-1].norm())
        return Solution(states, solution.rounds + plan.nfe, nfe, residual, solution.diverged)
    return solution


def _sensible(system: System, states: Tensor) -> bool:
    """Whether a reference's path is one that images could take, at most `FAR` deviations away."""
    return system.finite and bool(system.sizes(states).amax() < FAR)


def system_of(plan: Plan, kind: Response, reference: Gaussian | None, like: Tensor) -> System:
    """The linear system of a plan with a response, for states like this one, `(batch, k * channels, *field)`.

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
    """How the answers of `plan` are expected to move, at the nodes that ask."""
    times = plan.asked_times
    match kind:
        case "gaussian":
            return (Gaussian(0.25) if reference is None else reference).response(plan.process, times)
        case "noise":
            return plan.process.signal(times).inverse()
        case _:
            return None


def iterate(
    system: System,
    denoiser: Denoiser,
    like: Tensor,
    states: Tensor,
    answers: Tensor,
    constant: Tensor,
    method: Parallel,
    *,
    backwards: bool = False,
    callback: Callable[[Round], None] | None = None,
) -> Solution:
    """Rounds from the given states and answers until every image is done.

    Args:
        system: the plan's.
        denoiser: the network.
        like: a batch of states.
        states: a stack as in `System`.
        answers: likewise; changed in place.
        constant: likewise.
        method: how.
        backwards: the last state is given and the first sought; then there is no prefix that settles exactly, and
            errors are measured in the last state that running forwards would give.
        callback: told after every round.
    """
    batch, count = len(like), len(system.asked)
    times = system.plan.asked_times
    ask = denoiser.at(system.plan.process, times, like)
    nodes = torch.tensor(system.asked, device=like.device)
    place = torch.arange(count, device=like.device)
    every = torch.arange(system.size, device=like.device)[:, None]
    exact = torch.zeros(batch, dtype=torch.long, device=like.device)  # steps that are what they would be one by one
    frontier = exact  # first step that is not settled
    active = torch.ones(batch, dtype=torch.bool, device=like.device)
    diverged, finished = torch.zeros_like(active), torch.zeros_like(active)
    nfe = torch.zeros(batch, dtype=torch.long, device=like.device)
    residual = torch.full((batch,), math.inf, device=like.device)
    least, before = residual.clone(), residual.clone()
    history: list[tuple[Tensor, Tensor]] = []
    whole = backwards or system.plan.implicit  # no prefix settles before the rest
    limit = min(method.max_rounds or math.inf, ROUNDS if whole else count)
    window, enough = method.window or count, min(method.tolerance, LINEAR)
    remainder = None if backwards else Remainder(system, batch, roundoff(denoiser, like))
    shrinking: list[Tensor] = []
    stale, seen = torch.zeros_like(nfe), torch.zeros_like(active)
    rounds = 0
    while rounds < limit and bool(active.any()):
        wanted = (place[:, None] >= frontier) & active
        if not whole:
            wanted &= place[:, None] < frontier + window - (frontier > exact).long()
            wanted |= (place[:, None] == exact) & active
        expected = None if remainder is None else answers.clone()
        ask_network(system, ask, states, answers, nodes, wanted, method.max_rows)
        nfe += wanted.sum(0)
        seen |= wanted[-1]
        rounds += 1
        first = 1 if whole else 1 + int(nodes[int(exact[active].min())])
        gap = system.residual(states, answers, constant, first)
        moves = system.correct(gap, first)
        if backwards:  # how far off running forwards from the present first state would end
            largest = system.unpack(moves[:, -1:])[0].flatten(1).abs().amax(1)
            moves = system.hold_end(moves)
        sizes = system.sizes(moves)
        largest = largest if backwards else sizes.amax(0)
        grown = largest > GROWTH * least
        if method.window is not None:  # as a window moves on, the moves of new steps come in
            grown = torch.zeros_like(grown)
        lost = active & (~largest.isfinite() | grown)
        stale = torch.where(largest < 0.9 * least, 0, stale + 1)
        least = torch.minimum(least, largest.nan_to_num(math.inf))
        diverged |= lost
        floor, surprise = torch.zeros_like(sizes), torch.zeros_like(largest)
        if remainder is not None and expected is not None:
            off, own = system.sizes(answers - expected), system.sizes(answers)
            floor, surprise = (x.to(sizes) for x in remainder.asked(wanted, off, own))
        if remainder is not None and not whole:
            exact = exact + active.long()
            parts = remainder.reach(sizes).to(sizes) * system.relative(states)
            settled = (parts.cumsum(0) <= SETTLED * enough).long().cumprod(0).sum(0)
            reached = torch.minimum(settled, frontier + window) if window > 1 else exact
            frontier = torch.where(active, torch.maximum(reached.clamp_max(count - 1), exact), frontier)
        unexplained = moves
        if method.mixing is not None:
            if whole:
                free = (every < every[-1] if backwards else every > 0).expand(-1, batch)
            else:
                free = (every > nodes[frontier.clamp_max(count - 1)]) & (frontier < count)
            moves, unexplained = anderson_step(
                system, states, moves, sizes, history, method.mixing, free, backwards=backwards
            )
        keep = active & ~lost
        moves, unexplained = (system.by_image(x).mul(keep[:, None]).view_as(x) for x in (moves, unexplained))
        states = states + moves
        answers += system.respond(moves)
        if not whole and bool((largest > COARSE).any()):  # such a move has rounded the states that are final now
            final = system.correct(system.residual(states, answers, constant, first), first)
            final = torch.where(_final(every, nodes, exact)[None, :, None, :, None], system.by_image(final), 0.0)
            states = states + final.masked_fill_(~keep[:, None], 0.0).view_as(states)
        if remainder is None:
            rate = (largest / before).clamp(0.75, 0.9).nan_to_num(0.9)
            estimate, before = largest * rate / (1 - rate), largest
            done = estimate <= method.tolerance
        else:
            relative = system.relative(states)
            shrinking.append(_greatest((sizes - floor).clamp_min(0), relative))
            left, rounding = tail(shrinking, surprise * relative), floor[-1] * relative
            if not whole:
                chain = remainder.moved(system.sizes(moves), system.sizes(unexplained)).to(sizes) * relative
                left = torch.where(exact >= count, chain, torch.maximum(chain, left))
            estimate = left + rounding * amplification(shrinking, rounding)
            done = ((estimate <= enough) | (left <= RELEVANT * rounding)) & seen
            if not whole:
                done |= exact >= count
        residual = torch.where(active, estimate, residual)
        finished |= active & done
        active = keep & ~done
        if whole:  # rounding, or no solution: more rounds would not help
            active &= stale < STALE
        if callback is not None:
            last = partial(_last, system, states)
            callback(Round(rounds, float(residual.max()), int(active.sum()), int(wanted.sum()), last))
    if system.plan.implicit and not backwards and method.max_rounds is None:
        diverged |= ~finished
    return Solution(system.unpack(states), rounds, nfe, residual, diverged)


def _final(every: Tensor, nodes: Tensor, exact: Tensor) -> Tensor:
    """Nodes that move no more: up to the first one to ask that is not exact yet, `(nodes, batch)`."""
    last = torch.cat([nodes, every[-1]])
    return every <= last[exact]


def _greatest(sizes: Tensor, relative: Tensor) -> Tensor:
    """The greatest of the sizes in every state, `(nodes, batch)`, that of the last one as a relative error."""
    return torch.maximum(sizes[:-1].amax(0), sizes[-1] * relative)


def _last(system: System, states: Tensor) -> Tensor:
    return system.unpack(states[:, -1:])[0]


def ask_network(
    system: System, ask: Ask, states: Tensor, answers: Tensor, nodes: Tensor, wanted: Tensor, max_rows: int | None
) -> None:
    """Ask the network about the wanted states and put its answers into the stack.

    Args:
        system: the plan's.
        ask: the network at the times of the nodes that ask.
        states: a stack as in `System`.
        answers: likewise; changed in place.
        nodes: which those nodes are, `(count,)`.
        wanted: which of them for which image, `(count, batch)`.
        max_rows: most states in one call.
    """
    k, image = wanted.nonzero(as_tuple=True)
    by_image, into = system.by_image(states), system.by_image(answers)
    for some in torch.arange(len(k), device=k.device).split(max_rows or len(k)):
        at, of = nodes[k[some]], image[some]
        rows = by_image[:, at, :, of]  # advanced indices come first: (rows, frequencies, k, rest)
        u = system.unpack_rows(rows)
        into[:, at, :, of] = system.pack_rows(ask(k[some], u, of))


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
