"""How a pipeline is asked about many states at once, each at its own time; found out by asking it.

A pipeline tells its network one time. A hook on the network puts each row's own in its place. Which arguments of which
parts are times, and what they are at a time of the scheduler, is learned: they are the arguments that change with it
and with nothing else, and they are affine in it. Then the answers are compared with those of single calls of the
pipeline as it is. Where they differ, as the pipeline refuses batches or reckons with the time itself, single calls are
mapped over the rows (`torch.vmap`); where that fails too, fewer rows are asked at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_map_with_path

from pushforward.errors import PushforwardError
from pushforward.model.diffusers.calls import Call, remembering
from pushforward.model.diffusers.patches import parts
from pushforward.model.diffusers.standin import Answer, Stopped

__all__ = ["BATCHES", "Clock", "Rows", "flat", "learn", "mixes"]

BATCHES = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt", "batch_size")
SEED = 271828  # other than any that pipelines draw noise from, which is blended in by some
AFFINE = 1e-5
CLOSE = {torch.float32: 2e-4, torch.float64: 1e-6}  # rounding of a batched network, of the largest value; else:
ROUGH = 5e-2
EXACT = 1e-6  # of the same answers of networks
THROUGH = 48  # times, of twice as many steps, more than those after which pipelines begin or end something; even

_Place = tuple[str, int, Any]  # a part, which of its calls, and where in its arguments


@dataclass(frozen=True)
class Clock:
    """What a part is told at times t of the scheduler: `offset + slope t`.

    Args:
        offset, slope: float64, `(copies, 1, *rest)`, where the rows of a call are that many copies of the states'.
    """

    offset: Tensor
    slope: Tensor

    def told(self, times: Tensor, like: Tensor) -> Tensor:
        """Return what rows at these times `(rows,)` are told, `(copies * rows, *rest)`."""
        t = times.to(torch.float64).cpu().view(1, -1, *[1] * (self.slope.ndim - 2))
        return (self.offset + self.slope * t).flatten(0, 1).to(like.device, like.dtype)

    def tells(self, time: Tensor, seen: Any) -> bool:
        """Say whether what a part is told in a call is this time, `(1,)`."""
        if not isinstance(seen, Tensor):
            return False
        told = self.told(time, seen).to(torch.float64).flatten()
        if seen.numel() not in (1, len(told)):
            return False
        off = (told - seen.flatten()).abs().max()
        return bool(off <= _rounding(seen.dtype) * told.abs().max())


@dataclass(frozen=True, eq=False)
class Rows:
    """How many states are asked about in a call.

    Args:
        call: the pipeline's.
        batch: the argument that says how many images are made; `None`: the other arguments are repeated.
        clocks: where the times are told that are replaced by each row's.
        together: `times`: states at any times in one call; `states`: those at one time; or one `state` per call.
        why: why not more.
        mapped: whether a call is of one state, and is mapped over the rows.
    """

    call: Call
    batch: str | None
    clocks: Mapping[_Place, Clock]
    together: str = "times"
    why: str = ""
    mapped: bool = False

    def ask(self, states: Tensor, times: Tensor, more: Mapping[str, Any], base: float | None = None) -> Tensor:
        """Return the pipeline's predictions for states `(rows, ...)` at times of its scheduler `(rows,)`, in one call.

        Args:
            states: the states, of which no more go `together`.
            times: the times.
            more: arguments of the call besides the usual.
            base: the time that the pipeline itself is told; by default that of the first row.
        """
        if self.mapped:
            return self._each(states, times, more)
        base = float(times[0]) if base is None else base
        hooks = _telling(self.clocks, times) if bool((times != base).any()) else {}
        return self.called(states, [base], more, hooks)[0]

    def _each(self, states: Tensor, times: Tensor, more: Mapping[str, Any]) -> Tensor:
        """Map a call of one state over states and their times."""

        def one(state: Tensor, time: Tensor) -> Tensor:
            answers, _ = self.call.run([time], state[None], more=more)
            return taken(answers[0], state[None])[0]

        found: Tensor = torch.vmap(one, randomness="same")(states, times.to(states.device, torch.float32))
        return found

    def apart(self, row: int, time: float) -> Any:
        """Return what is the same for rows that go together."""
        return {"times": None, "states": time, "state": row}[self.together]

    def called(
        self,
        states: Tensor,
        times: Sequence[float],
        more: Mapping[str, Any],
        hooks: Mapping[str, Any] | None = None,
        patches: Sequence[tuple[Any, str, Any]] = (),
    ) -> list[Tensor]:
        """Return the predictions for states at times that all rows are told; see `walk`."""
        found: list[Tensor] = []
        self.walk(states, times, more, found.append, hooks, patches)
        return found

    def walk(
        self,
        states: Tensor,
        times: Sequence[float],
        more: Mapping[str, Any],
        take: Callable[[Tensor], None],
        hooks: Mapping[str, Any] | None = None,
        patches: Sequence[tuple[Any, str, Any]] = (),
    ) -> None:
        """Hand on the predictions for states at times that all rows are told; of their negatives in odd steps.

        So states that are blended with others between steps, even with themselves as noise, are found out.
        """
        count, name, met = len(states), type(self.call.pipe).__name__, 0

        def turn(answer: Answer) -> Tensor:
            nonlocal met
            if answer.state.shape[1:] != states.shape[1:]:
                raise PushforwardError(
                    f"{name} takes several states through its steps side by side, such as pictures and their sound, "
                    "and a model here has one; sample with pushforward.PushforwardScheduler in the pipeline."
                )
            if not torch.equal(answer.state[:count], (-1) ** met * states.to(answer.state)):
                raise PushforwardError(
                    f"{name} changes its states before or between its steps, as it does to blend an image in or in a "
                    "callback; leave that out, or sample with pushforward.PushforwardScheduler in the pipeline."
                )
            take(taken(answer, states))
            met += 1
            if met == len(times):
                raise Stopped
            return -answer.state

        own = states.clone()  # some pipelines write the next state into it
        self.call.run(times, own, more=self.repeated(count, more), step=turn, hooks=hooks, patches=patches)
        if met < len(times):
            raise PushforwardError(
                f"{name} takes no step at time {times[met]:g} of its scheduler when called with these arguments; leave "
                "out what says that only some of the steps are taken."
            )

    def repeated(self, count: int, more: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call for so many states; lists in `more` have an entry for each."""
        if self.batch is not None and not any(isinstance(value, list) and len(value) > 1 for value in more.values()):
            return {**more, self.batch: count}
        if count == 1:
            return dict(more)
        known = self.call.signature.parameters
        words = {name for name, one in known.items() if "prompt" in name or "list[str]" in str(one.annotation).lower()}
        usual = {name: known[name].default for name in words if isinstance(known[name].default, str)}
        given = {**usual, **self.call.arguments, **more}
        return {name: _repeat(name, value, count, words) for name, value in given.items() if name != "generator"}


def taken(answer: Answer, states: Tensor) -> Tensor:
    """Return the part of a prediction that is about the states: their rows and channels, in their dtype.

    Pipelines may hand over the rows without guidance too, and a variance after the prediction.
    """
    found = answer.prediction[: len(states), : states.shape[1]]
    return found.to(states.dtype)


@torch.no_grad()
def learn(call: Call, like: Tensor, times: Sequence[float], span: Sequence[float]) -> Rows:
    """Find out how a pipeline can be asked about many states at once.

    Args:
        call: the pipeline's call.
        like: a state `(1, ...)`.
        times: three times of its scheduler, at which it asks the same networks.
        span: the first and the last time at which it is asked about states so.

    Raises:
        PushforwardError: the pipeline changes its states between its steps, or its answers depend on more than state
            and time.
    """
    generator = torch.Generator().manual_seed(SEED)
    states = torch.randn((len(times), *like.shape[1:]), generator=generator, dtype=torch.float32, device="cpu").to(like)
    close = _closeness(call, like)
    alone = Rows(call, None, {}, "state")
    single = torch.cat([alone.called(one, [t], {})[0] for one, t in zip(states.split(1), times, strict=True)])
    outside = _times_outside(alone, states[:1], times, span, single[:1], close)
    best, reasons = alone, []
    for batch in [*(name for name in BATCHES if name in call.signature.parameters), None]:
        try:
            found = _with_batch(Rows(call, batch, {}, "states"), states, times, single, close, outside)
        except (PushforwardError, torch.OutOfMemoryError) as error:
            reasons.append(str(error))
            continue
        if found.together == "times":
            return found
        best = found if best is alone else best
        reasons.append(found.why)
    try:
        mapped = replace(alone, together="times", mapped=True)
        if _near(mapped.ask(states, torch.tensor(list(times), dtype=torch.float64, device="cpu"), {}), single, close):
            return mapped
    except (PushforwardError, RuntimeError) as error:
        reasons.append(str(error).partition("\n")[0])
    return replace(best, why=best.why or " ".join(reasons))


@torch.no_grad()
def mixes(rows: Rows, like: Tensor, times: Sequence[float], subject: str, values: Sequence[Any]) -> bool:
    """Find out whether states of several subjects can be asked about together, as well as one subject's.

    Args:
        rows: how those of one subject are asked about.
        like: a state `(1, ...)`.
        times: times of its scheduler.
        subject: the argument that says what an image is to be of.
        values: two values of it.
    """
    if rows.together == "state" or rows.mapped:
        return False
    states = torch.cat([like, -like])
    ends = [times[0], times[-1] if rows.together == "times" else times[0]]
    at = torch.tensor(ends, dtype=torch.float64, device="cpu")
    try:
        single = [rows.ask(states[k : k + 1], at[k : k + 1], {subject: values[k]}) for k in range(2)]
        both = rows.ask(states, at, {subject: flat(values)})
    except (PushforwardError, torch.OutOfMemoryError):
        return False
    return _near(both, torch.cat(single), _closeness(rows.call, like))


def flat(values: Sequence[Any]) -> list[Any]:
    """List values of an argument, each of one image, that may be lists themselves."""
    return [one for value in values for one in (value if isinstance(value, list) else [value])]


def _with_batch(
    rows: Rows, states: Tensor, times: Sequence[float], single: Tensor, close: float, outside: bool
) -> Rows:
    """Find out whether states can be asked about together by one way of making several images in a call.

    Raises:
        PushforwardError: the pipeline raises an error, or a state's answer depends on the others.
    """
    seen: list[dict[_Place, Tensor]] = []
    for k, t in enumerate(times):
        answers = _recorded(rows, states, t, seen)
        if len(answers) != len(states) or not _near(answers[k], single[k], close):
            raise PushforwardError(f"With {rows.batch or 'repeated arguments'}, answers depend on the images beside.")
    why = "Not all that depends on the time is told to a network."
    if outside:
        return replace(rows, why=why)
    hooked = replace(rows, clocks=_clocks(seen, times, len(states)), together="times")
    try:
        at = torch.tensor(list(times), dtype=torch.float64, device="cpu")
        if all(_near(hooked.ask(states, at, {}, base), single, close) for base in times[:2]):
            return hooked
    except PushforwardError as error:
        why = str(error)
    return replace(rows, why=why)


def _times_outside(
    rows: Rows, states: Tensor, times: Sequence[float], span: Sequence[float], single: Tensor, close: float
) -> bool:
    """Find out whether a pipeline reckons with the time outside of its networks too, anywhere in its range.

    It takes many steps, through the range twice. Networks are asked in the first steps and in the last. Between these
    they answer as before, whatever time they are told, what they are told again, so that many steps cost few calls of
    them; the pipeline's prediction is then the first one wherever time and step count nowhere else.

    Raises:
        PushforwardError: the same state at the same time is answered otherwise in one of many steps than in another, or
            than in a single one.
    """
    seen: list[dict[_Place, Tensor]] = []
    for t in times:
        _recorded(rows, states, t, seen)
    clocks = _clocks(seen, times, len(states))
    through = torch.linspace(span[0], span[1], THROUGH, dtype=torch.float64, device="cpu").tolist()
    first = times[0]
    steps = [first, first, first, *through, *through, first, first]
    answers, between = [single], list[Tensor]()
    count, outside = 0, False

    def untimed(name: str, given: Any) -> Any:
        """Leave the times out of what a part is told."""
        now = torch.tensor([steps[count]], dtype=torch.float64, device="cpu")

        def left(path: Any, leaf: Any) -> Any:
            for (part, _, place), clock in clocks.items():
                if (part, place) == (name, path) and clock.tells(now, leaf):
                    return None
            return leaf

        return tree_map_with_path(left, given)

    def compare(answer: Tensor) -> None:
        nonlocal count, outside
        since = count - 3
        if count == 1:  # of the state's negative, as in every other step
            answers.append(answer)
        if 0 <= since < THROUGH:
            between.append(answer)
            outside |= not _near(answer, answers[count % 2], EXACT)
            same = True
        elif 0 <= since < 2 * THROUGH:
            same = _near(answer, between[since - THROUGH], EXACT)
        else:
            same = _near(answer, answers[count % 2], close)
        if count == 2:
            answers[0] = answer
        if not same:
            raise PushforwardError(
                f"{type(rows.call.pipe).__name__} answers the same state at the same time otherwise in a later step: "
                "some of its arguments or its parts act in some steps only (control_guidance_end, cfg_trunc_ratio, "
                "warm-up steps, skip layers, a guider, a cache); leave those out, or sample with "
                "pushforward.PushforwardScheduler in the pipeline."
            )
        count += 1

    own = parts(rows.call.pipe)
    patches = [
        remembering(own[name], lambda: count < 3 or count == len(steps) - 1, partial(untimed, name))
        for name in rows.call.denoisers
    ]
    rows.walk(states, steps, {}, compare, patches=patches)
    return outside


def _closeness(call: Call, like: Tensor) -> float:
    """Return the rounding of a batch, by the dtypes of the states and of the networks; some keep states in float32."""
    own = parts(call.pipe)
    dtypes = [like.dtype, *(getattr(own[name], "dtype", like.dtype) for name in call.denoisers)]
    return max(CLOSE.get(dtype, ROUGH) for dtype in dtypes)


def _near(one: Tensor, other: Tensor, close: float) -> bool:
    if one.shape != other.shape:
        return False
    return float((one - other).abs().max()) <= close * float(other.abs().max())


def _recorded(rows: Rows, states: Tensor, time: float, seen: list[dict[_Place, Tensor]]) -> Tensor:
    """Ask about states at one time, and note what all parts are told that is not an image."""
    noted: dict[_Place, Tensor] = {}
    calls: Counter[str] = Counter()

    def noting(name: str) -> Callable[..., None]:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            noted[name, calls[name], None] = torch.tensor(_copies((*args, *kwargs.values()), len(states)), device="cpu")
            for path, leaf in tree_flatten_with_path((args, kwargs))[0]:
                if isinstance(leaf, Tensor) and leaf.ndim < 3:
                    noted[name, calls[name], path] = leaf.detach().cpu().clone()
            calls[name] += 1

        return hook

    hooks = {name: noting(name) for name in parts(rows.call.pipe)}
    answer = rows.called(states, [time], {}, hooks)[0]
    seen.append(noted)
    return answer


def _copies(arguments: Sequence[Any], count: int) -> int:
    """Count the rows of a network's call by the first argument that is a batch of images, or a list of them."""
    for one in arguments:
        if isinstance(one, Tensor) and one.ndim > 2:
            return len(one)
        if isinstance(one, list) and one and isinstance(one[0], Tensor):
            return len(one)
    return count


def _clocks(seen: Sequence[Mapping[_Place, Tensor]], times: Sequence[float], count: int) -> dict[_Place, Clock]:
    """Find the arguments that are affine in the time, and what they are at time 0 and per unit of time."""
    clocks = {}
    first, second, third = seen
    for place, told in first.items():
        if place[2] is None or any(place not in other or other[place].shape != told.shape for other in (second, third)):
            continue
        one, two, three = (seen_then[place].to(torch.float64) for seen_then in seen)
        if torch.equal(one, two):
            continue
        rounding = _rounding(told.dtype) * float(one.abs().max())
        span = times[1] - times[0]
        slope = _plain((two - one) / span, (0.0, 1.0, -1.0, 1e-3, -1e-3), rounding / abs(span))
        offset = _plain(one - slope * times[0], (0.0, 1.0, -1.0), rounding)
        if (offset + slope * times[2] - three).abs().max() > rounding:
            continue
        rows = int(first[(place[0], place[1], None)])
        if rows % count:
            continue
        if one.ndim == 0 or len(one) == 1:
            rest = one.shape[1:]
            clock = Clock(*(x.reshape(1, 1, *rest).expand(rows // count, 1, *rest) for x in (offset, slope)))
        elif len(one) % count == 0:
            clock = Clock(*(x.unflatten(0, (-1, count))[:, :1] for x in (offset, slope)))
        else:
            continue
        clocks[place] = clock
    return clocks


def _rounding(dtype: torch.dtype) -> float:
    return max(AFFINE, 4 * torch.finfo(dtype).eps) if dtype.is_floating_point else AFFINE


def _plain(numbers: Tensor, plain: Sequence[float], rounding: float) -> Tensor:
    """Take numbers that are one of these but for rounding as it, as the nearest of those."""
    known = torch.tensor(plain, dtype=numbers.dtype, device="cpu")
    off, which = (numbers[..., None] - known).abs().min(-1)
    return torch.where(off <= rounding, known[which], numbers)


def _telling(clocks: Mapping[_Place, Clock], times: Tensor) -> dict[str, Callable[..., Any]]:
    """Make the hooks that tell each row its own time."""
    calls: Counter[str] = Counter()

    def telling(name: str) -> Callable[..., Any]:
        def hook(_: Any, args: Any, kwargs: Any) -> Any:
            number = calls[name]
            calls[name] += 1

            def told(path: Any, leaf: Any) -> Any:
                clock = clocks.get((name, number, path))
                return leaf if clock is None else clock.told(times, leaf)

            return tree_map_with_path(told, (args, kwargs))

        return hook

    return {name: telling(name) for name in {place[0] for place in clocks}}


def _repeat(name: str, value: Any, count: int, words: Container[str]) -> Any:
    """Repeat what an argument says of one image; `words` are those that take a text, or a list of one for each."""
    if isinstance(value, Tensor):
        if "image" in name and value.ndim == 3:
            value = value[None]
        return value.repeat_interleave(count, 0) if value.ndim and len(value) == 1 else value
    if isinstance(value, str) and name in words:
        return [value] * count
    if isinstance(value, list) and len(value) == 1:
        return value * count
    if hasattr(value, "getpixel") and "image" in name:
        return [value] * count
    return value
