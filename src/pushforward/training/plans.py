r"""Plans learned for a model: the best image in a few rounds, by linear regression.

A plan for R rounds on N times has a state `u_k^r` for every time t_k and round r, made of the given first state and of
all answers of the rounds before:

    u_k^r = a u_0 + sum_{j, q <= r} b_jq D_j^q .

Its coefficients are those that bring such states nearest to where the flow itself is at t_k, over images that the model
makes: least squares, solved exactly, time by time and round by round, with nothing differentiated. What is learned of a
round are its states; the next round's answers are those of the network about them. Answers about noise say what
answers about data will be, those of earlier rounds which way answers move: all this the regression finds by itself.

Coefficients are one number (a k x k block where states have velocities) for all pixels; where the process tells
frequencies apart, one for each of a few bands of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pushforward.data.memory import check_memory
from pushforward.data.words import many
from pushforward.denoiser import Denoiser, Watched
from pushforward.errors import PushforwardError
from pushforward.execute import Parallel, parallel, run
from pushforward.execute.budget import nodes_in, spent
from pushforward.execute.parallel import asks_mean_first
from pushforward.execute.system import relative_errors
from pushforward.linear import IDENTITY, Basis, Operator
from pushforward.maps.code import batches
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.labels import UNSAID, Condition, Unsaid, is_guided
from pushforward.model import Model
from pushforward.plan import Node, Plan, Register, auto, in_rounds
from pushforward.plan.auto import auto_at

__all__ = ["HELD_OUT", "Learned", "evaluations", "flow_states", "images_within", "learn_plan", "refined"]

FINE = 6  # steps of the flow between two times of the plan
RIDGE = 1e-5  # of the least squares, in parts of each feature's mean square
BANDS = 8  # of frequencies, where a process tells them apart
HELD_OUT = 48  # images by which plans are compared
LEAST = 8  # images to learn from
_TIMED = 16  # images of a call whose time is taken


@dataclass(frozen=True, eq=False)
class Learned:
    """A learned plan, and how near the images of samplers come to the flow's, on images that it did not learn from.

    Args:
        plan: the plan.
        errors: relative error of each held-out image, `(held_out,)`, by sampler: `learned`; `all at once`, in as many
            rounds and evaluations without learning (`Parallel(rounds=R)`); `step by step`, `auto` in as many calls.
        images: how many were learned from.
        nfe: network evaluations that learning and comparing took.
    """

    plan: Plan
    errors: dict[str, Tensor] = field(repr=False)
    images: int
    nfe: int

    @property
    def summary(self) -> dict[str, tuple[float, float]]:
        """Median and root mean square of the errors, by sampler."""
        return {name: (float(x.quantile(0.5)), float(x.square().mean().sqrt())) for name, x in self.errors.items()}


def evaluations(rounds: int, images: int, max_evaluations: int | None = None) -> int:
    """Return the most network evaluations that learning from so many images, and comparing, take."""
    count = nodes_in(rounds, max_evaluations)
    once, flow = spent(count, rounds), FINE * count
    return images * (flow + once) + HELD_OUT * (flow + 2 * once + rounds)


@torch.no_grad()
def images_within(
    model: Model,
    rounds: int,
    seconds: float,
    max_evaluations: int | None = None,
    *,
    labels: Condition | Unsaid = UNSAID,
    guidance: float | None = None,
) -> int:
    """Estimate from how many images a plan is learned in so many seconds; `LEAST` at least.

    Raises:
        PushforwardError: that is no time.
    """
    if not 0 < seconds < math.inf:
        raise PushforwardError(f"A plan is learned in a positive number of minutes; got {seconds / 60:g}.")
    there = Diffusion(model, in_rounds(model.process, rounds, model.reference)).given(labels, guidance)
    there = there.in_turn(_TIMED)
    start = there.start(there.draw(_TIMED).start)
    ask = there.model_for(_TIMED).denoiser.at(model.process, there.times[:1], start)
    ask(0, start)  # the first call prepares
    began = time.perf_counter()
    ask(0, start)
    each = (time.perf_counter() - began) / _TIMED
    fixed = evaluations(rounds, 0, max_evaluations)
    one = evaluations(rounds, 1, max_evaluations) - fixed
    return max(LEAST, int((seconds / max(each, 1e-9) - fixed) / one))


@torch.no_grad()
def learn_plan(
    model: Model,
    rounds: int = 5,
    *,
    max_evaluations: int | None = None,
    images: int = 64,
    labels: Condition | Unsaid = UNSAID,
    guidance: float | None = None,
    seed: int = 0,
    end: float = 0.0,
    batch: int = 64,
    callback: Callable[[int], None] | None = None,
) -> Learned:
    """Learn a plan that makes the best image of a model in so many rounds of network calls.

        learned = pushforward.learn_plan(model, rounds=5)
        images = model.sample(16, solver=learned.plan)

    Args:
        model: the model; states are float32, where its network is.
        rounds: batched network calls, one after another, 2 or more.
        max_evaluations: network evaluations of an image, at most; by default as for `Parallel(rounds=rounds)`.
        images: how many of the model's own images to learn from, 8 or more.
        labels: classes or prompts of the images, one for all; by default all that the model knows, in turn.
        guidance: weight of classifier-free guidance, by default 1, or a pipeline's own.
        seed: seeds the codes of the images.
        end: time of the last state; above 0 images can be inverted by the plan.
        batch: images in a network call.
        callback: told at every network call how many states it sees.

    Raises:
        PushforwardError: too few rounds, images or evaluations; or a plan that is no better on held-out images than
            as many rounds without learning.
    """
    if rounds < 2 or images < LEAST:
        raise PushforwardError(f"Learning a plan takes 2 rounds and {LEAST} images or more; got {rounds} and {images}.")
    count = nodes_in(rounds, max_evaluations)
    if count <= rounds:
        raise PushforwardError(
            f"A plan of {many(rounds, 'round')} cannot be learned in {many(max_evaluations or 0, 'evaluation')}: allow "
            "more, or take fewer rounds."
        )
    unlearned = in_rounds(model.process, count, model.reference, end)
    task = _Task(model, unlearned, rounds, callback or (lambda _: None))
    there = Diffusion(model, task.teacher).given(labels, guidance)
    plan = task.fitted(task.taught(there, images, seed, 0, batch))
    compared = task.taught(there, HELD_OUT, seed, images, batch)
    steps = auto(model.process, rounds, model.reference, end, guided=is_guided(model, guidance))
    errors = {
        "learned": task.errors(compared, lambda part: run(plan, part.denoiser, part.start)),
        "all at once": task.errors(compared, task.without),
        "step by step": task.errors(compared, lambda part: run(steps, part.denoiser, part.start)),
    }
    learned = Learned(plan, errors, images, task.nfe)
    (median, square), (before, before_square) = (learned.summary[name] for name in ("learned", "all at once"))
    if not (median <= before and square <= before_square):
        raise PushforwardError(
            f"The learned plan is no better than {rounds} rounds without learning: on {HELD_OUT} images that it did "
            f"not learn from its errors are {median:.3g} in the median and {square:.3g} in root mean square, against "
            f"{before:.3g} and {before_square:.3g}; learn from more than {images} images."
        )
    return learned


def refined(times: Tensor) -> Tensor:
    """Return decreasing times with `FINE - 1` more in each step, equally apart in the square root."""
    root = times.sqrt()
    part = torch.arange(FINE, dtype=torch.float64, device="cpu") / FINE
    inner = (root[:-1, None] + root.diff()[:, None] * part).square()
    inner[:, 0] = times[:-1]
    return torch.cat([inner.flatten(), times[-1:]])


def flow_states(plan: Plan, denoiser: Denoiser, start: Tensor) -> list[Tensor]:
    """Return the flow's states at times, by a plan on these times `refined`."""
    seen: list[Tensor] = []
    last = run(plan, denoiser, start, callback=lambda told: seen.append(told.state))
    return [*seen[::FINE], last]


@dataclass(eq=False)
class _Part:
    """Some images: where the flow is at every time, and what a plan knows of it so far.

    Args:
        denoiser: the network under the images' conditions, whose calls are told of.
        model: the model under the same conditions.
        targets: the flow's states in pixels, one a time.
        features: the first state, then the answers, in the order of the rounds, each as `_Task._packed` has it.
        states: the plan's latest states in pixels, one a time.
    """

    denoiser: Denoiser
    model: Model
    targets: list[Tensor]
    features: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    states: list[Tensor] = field(default_factory=list)

    @property
    def start(self) -> Tensor:
        """The first state, `(images, k * channels, *field)`."""
        return self.targets[0]


class _Task:
    """What is learned, for a model: a plan on the times of another in so many rounds, the first as without learning."""

    def __init__(self, model: Model, unlearned: Plan, rounds: int, callback: Callable[[int], None]):
        self.process, self.times, self.rounds, self._callback = model.process, unlearned.times, rounds, callback
        self.calls, self.nfe = len(self.times) - 1, 0
        self.teacher = auto_at(model.process, refined(self.times), reference=model.reference)
        self._unlearned, self._method = unlearned, Parallel(rounds=rounds, reference=model.gaussian.tempered())
        self._mean_first = asks_mean_first(unlearned, self._method)
        self._k, self._basis = model.process.blocks, model.process.basis
        self._band = _bands(self._basis)
        self._numbers = math.prod(model.state_shape(1))

    def taught(self, there: Diffusion, count: int, seed: int, first: int, batch: int) -> list[_Part]:
        """The flow of `count` images, in parts of a batch."""
        check_memory(4 * self._numbers * count * (2 * self.calls + spent(self.calls, self.rounds)),
                     f"The answers about {count:,} images to learn from")  # fmt: skip
        there = there.in_turn(count, first)
        parts = []
        for some in batches(count, batch):
            model = there.some(some).model_for(some.stop - some.start)
            code = there.draw(some.stop - some.start, seed=seed, first=first + some.start)
            denoiser = Watched(model.denoiser, self._count)
            parts.append(_Part(denoiser, model, flow_states(self.teacher, denoiser, there.start(code.start))))
        return parts

    def _count(self, u: Tensor, *_: Any, **__: Any) -> None:
        self.nfe += len(u)
        self._callback(len(u))

    def errors(self, parts: Sequence[_Part], sample: Callable[[_Part], Tensor]) -> Tensor:
        """Relative errors of images by a sampler, `(images,)`."""
        found = []
        for part in parts:
            image, wanted = (self.process.image(u) for u in (sample(part), part.targets[-1]))
            found.append(relative_errors(image, wanted).cpu())
        return torch.cat(found)

    def without(self, part: _Part) -> Tensor:
        """The last state in as many rounds without learning."""
        method = replace(self._method, reference=part.model.gaussian.tempered())
        return parallel(self._unlearned, part.denoiser, part.start, method=method).last

    def fitted(self, parts: list[_Part]) -> Plan:
        """The plan that brings its states nearest to the flow's, round by round."""
        nodes = [Node(float(self.times[0]), {}, asks=True)]
        registers, latest = [Register("state", 0)], [0] * (self.calls + 1)
        asked: list[int] = []  # places of the answers so far
        for part in parts:
            part.states, part.features = [part.start] * (self.calls + 1), self._packed(part.start)[None]
        asks = [part.denoiser.at(self.process, self.times[:-1], part.start) for part in parts]
        for done in range(self.rounds + 1):
            ending = done == self.rounds
            first = self._mean_first and not done  # then there are no other states yet
            places = [self.calls] if ending else [] if first else list(range(max(done, 1), self.calls))
            for place in places:
                coefficients = self._least_squares(parts, place, asked)
                latest[place] = len(nodes)
                terms = dict(zip(registers, self._operators(coefficients), strict=True))
                nodes.append(Node(float(self.times[place]), terms, asks=not ending))
                for part in parts:
                    part.states[place] = self._combined(coefficients, part)
            asking = [] if ending else [0] if first else list(range(done, self.calls))
            registers += [Register("answer", latest[place]) for place in asking]
            asked += asking
            for part, ask in zip(parts, asks, strict=True):
                answers = [self._packed(ask(place, part.states[place]))[None] for place in asking]
                part.features = torch.cat([part.features, *answers])
        return Plan(self.process, "learned", tuple(nodes), tuple(latest), settings={"rounds": self.rounds})

    def _combined(self, coefficients: Tensor, part: _Part) -> Tensor:
        """The features' combination, in pixels."""
        state = torch.einsum("fiqj,qnjcf->nicf", coefficients.to(part.start), part.features)
        return self._basis.inverse(state.reshape(part.start.shape))

    def _operators(self, coefficients: Tensor) -> list[Operator]:
        """One for each feature."""
        values = coefficients.movedim(2, 0)
        shape = (len(values), *self._basis.shape, self._k, self._k)
        return [Operator(one, self._basis) for one in values.reshape(shape)]

    def _least_squares(self, parts: list[_Part], place: int, asked: list[int]) -> Tensor:
        """`(frequencies, k, features, k)`, float64; every image counts alike, whatever its size."""
        forms = self._forms(place, asked)
        features, many = forms.shape[:2]
        count, found = features * many * self._k, []
        for band in range(int(self._band.max()) + 1):
            inside = self._band == band
            gram = torch.zeros(count, count, dtype=torch.float64, device="cpu")
            right = torch.zeros(count, self._k, dtype=torch.float64, device="cpu")
            for part in parts:
                norm = self.process.image(part.targets[-1]).flatten(1).norm(dim=1)[:, None, None, None]
                known, wanted = (
                    (stack[..., inside] / norm).transpose(-4, -3).flatten(-3)
                    for stack in (part.features, self._packed(part.targets[place]))
                )
                form = forms[..., inside].to(known).repeat(1, 1, known.shape[-1] // int(inside.sum()))
                rows = (known[:, None] * form[:, :, None]).flatten(0, 2).double()
                gram += (rows @ rows.T).cpu()
                right += (rows @ wanted.double().T).cpu()
            size = gram.diagonal()
            used = size > torch.finfo(torch.float32).eps ** 2 * size.max()  # answers have no velocity
            ridge = torch.diag(RIDGE * size + (~used).double())
            found.append(torch.linalg.solve(gram + ridge, right * used[:, None]).view(features, many, self._k, self._k))
        each = torch.stack(found)[self._band]
        return torch.einsum("qmf,fqmji->fiqj", forms, each)

    def _forms(self, place: int, asked: list[int]) -> Tensor:
        """How coefficients may go with the frequency in a band, `(features, forms, frequencies)`.

        Where frequencies fade each at its own rate, as solvers have it: as the signal, and as noise once it is taken
        from a state, `sigma' / sigma alpha`.
        """
        if self._basis == IDENTITY or self._k > 1:
            return torch.ones(1 + len(asked), 1, len(self._band), dtype=torch.float64, device="cpu")
        alpha = self.process.signal(self.times).entry(0, 0).flatten(1)
        sigma = self.process.covariance(self.times).entry(0, 0).flatten(1).sqrt()
        ratio = sigma[place] / sigma[asked]
        first = torch.stack([alpha[place], sigma[place] / sigma[0]])
        return torch.stack([first, *torch.stack([alpha[place].expand_as(ratio), ratio * alpha[asked]], 1)])

    def _packed(self, u: Tensor) -> Tensor:
        """`(images, k, channels, frequencies)`; pixels are as good where the process does not tell them apart."""
        return self._basis.forward(u).reshape(len(u), self._k, -1, len(self._band))


def _bands(basis: Basis) -> Tensor:
    """The number of each frequency's band, of equal widths in the logarithm of its eigenvalue, the lowest apart."""
    if basis == IDENTITY:
        return torch.zeros(1, dtype=torch.long, device="cpu")
    values = basis.eigenvalues().flatten()
    low, high = values[values > 0].min().log(), values.max().log()
    scaled = (values.log() - low) / (high - low).clamp_min(1e-12)
    return (scaled * (BANDS - 1)).clamp(0, BANDS - 2).floor().long().add(1).where(values > 0, 0)
