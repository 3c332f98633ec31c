"""Calls of a `diffusers` pipeline that end where its scheduler would take a step.

The pipeline runs unchanged, with a stand-in for its scheduler that takes no steps: what reaches `step` is the state and
the pipeline's complete, guided prediction. The stand-in has the scheduler's class and configuration, since pipelines
look at both. Everything that is changed for a call is put back after it, however it ends.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from hashlib import sha256
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from pushforward.errors import PushforwardError
from pushforward.model.diffusers.package import reason

__all__ = [
    "LOCK",
    "Answer",
    "Call",
    "Stopped",
    "alike",
    "alone",
    "as_wide",
    "callee",
    "hooked",
    "numbered",
    "parts",
    "patched",
    "recorded",
    "stand_in",
]

DIGITS = 8  # numbers are sent in digits of this base, which bfloat16 holds when scaled and shifted, too
KEPT = 64  # answers of an encoder that are kept
LOCK = threading.RLock()  # one call at a time: pipelines share parts, and functions of their modules
_P = ParamSpec("_P")
_R = TypeVar("_R")


def alone(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let one thread at a time call this function and the others that are marked so."""

    @wraps(function)
    def waiting(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with LOCK:
            return function(*args, **kwargs)

    return waiting


class Stopped(BaseException):
    """Ends a call of a pipeline; no handler of errors in it takes this for one."""


@dataclass(frozen=True)
class Answer:
    """What a step of the scheduler would be made of.

    Args:
        state: the state, `(rows, ...)`.
        prediction: what the pipeline predicts for it.
    """

    state: Tensor
    prediction: Tensor


@dataclass(frozen=True)
class Entrance:
    """Where a pipeline takes its first state from.

    Args:
        kind: `method` of the pipeline, whose result it is or is in; the argument `latents`; or `noise` that it draws.
        name: name of the method.
        place: place in the method's result, if that is a tuple.
        numbers: where in the result's rows the state's numbers are, if it holds more than them.
    """

    kind: str
    name: str = ""
    place: int | None = None
    numbers: Tensor | None = None

    def put(self, states: Tensor, result: Any) -> Any:
        """Return the method's result with these states in it."""
        if self.place is not None:
            several = list(result)
            several[self.place] = replace(self, place=None).put(states, several[self.place])
            return tuple(several)
        if self.numbers is None:
            return states.to(result)
        numbers = self.numbers.to(result.device).expand(len(result), -1)
        whole: Tensor = result.flatten(1).scatter(1, numbers, states.flatten(1).to(result))
        return whole.view_as(result)


@dataclass(eq=False, repr=False)
class Call:
    """A pipeline and the arguments that it is called with.

    Args:
        pipe: the pipeline.
        arguments: arguments of its call.
        entrance: where its first state comes from; see `find_entrance`.
        denoisers: names of the parts that are called in every step; all others are asked once for the same input.
        kept: answers of the other parts.
        fewest: least number of steps that it can be called for.
    """

    pipe: Any
    arguments: Mapping[str, Any]
    entrance: Entrance | None = None
    denoisers: frozenset[str] = frozenset()
    kept: OrderedDict[Any, Any] = field(default_factory=OrderedDict)
    fewest: int = 1

    def __post_init__(self) -> None:
        method = type(self.pipe).__call__
        self.signature = inspect.signature(method)
        self._method = getattr(method, "__wrapped__", method)  # without no_grad
        self.scheduler = self.pipe.scheduler
        self._stand_in = stand_in(self.scheduler)
        generator = self.arguments.get("generator")
        self._noise, self._drawn = torch.Generator(), dict[int, Tensor]()
        self._generator = generator[0] if isinstance(generator, list | tuple) else generator

    @property
    def name(self) -> str:
        """Name for messages."""
        return type(self.pipe).__name__

    @alone
    def run(
        self,
        times: Sequence[float],
        states: Tensor | None = None,
        *,
        more: Mapping[str, Any] | None = None,
        step: Callable[[Answer], Tensor] | None = None,
        hooks: Mapping[str, Callable[..., Any]] | None = None,
        patches: Sequence[tuple[Any, str, Any]] = (),
        told: Callable[[dict[str, Any]], None] | None = None,
    ) -> tuple[list[Answer], Any]:
        """Call the pipeline for steps at these times of its scheduler; return what reaches them, and its result.

        Args:
            times: the times.
            states: states `(rows, ...)` to begin with; by default the pipeline's own.
            more: further arguments.
            step: what takes a step, from an answer to the next state; by default states stay, and the call ends at the
                last one, without a result.
            hooks: pre-hooks of the pipeline's parts, which may change their arguments.
            patches: objects, names of their attributes and what to put in their place.
            told: told what the pipeline tells its scheduler of its time steps.

        Raises:
            PushforwardError: the pipeline raises an error, or takes no step.
        """
        answers, take = recorded(len(times), step)
        known = self.signature.parameters
        usual = {
            "num_inference_steps": max(len(times), self.fewest),
            "strength": 1.0,
            "generator": self._fresh_generator(),
        }
        arguments = {**self.arguments, **{k: v for k, v in usual.items() if k in known}, **(more or {})}
        result = None
        with restored(self.pipe), ExitStack() as stack:
            self._stand_in.prepare(times, take, told)
            self._noise, self._drawn = self._fresh_generator(), {}
            quiet = {**getattr(self.pipe, "_progress_bar_config", {}), "disable": True}
            vars(self.pipe).update(scheduler=self._stand_in, _progress_bar_config=quiet)
            own = parts(self.pipe)
            for name, part in own.items():
                if name not in self.denoisers:
                    stack.enter_context(as_wide(part))
                    for method in (callee(part), "encode"):
                        if callable(getattr(part, method, None)):
                            stack.enter_context(patched(part, method, self._once(name, part, method)))
            if states is not None:
                arguments |= self._enter(states, stack)
            for patch in patches:
                stack.enter_context(patched(*patch))
            for name, hook in (hooks or {}).items():
                stack.enter_context(hooked(own[name], hook))
            stack.enter_context(self._said_once(arguments))
            try:
                result = self._method(self.pipe, **arguments)
            except Stopped:
                pass
            except (PushforwardError, torch.OutOfMemoryError):  # who asks for many rows may ask for fewer
                raise
            except Exception as error:
                raise PushforwardError(
                    f"{type(self.pipe).__name__} cannot be called with these arguments: {reason(error)}."
                ) from error
        return answers, result

    @contextmanager
    def _said_once(self, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Let `diffusers` say what it has to of a prompt, such as cut words, in the first call with it only."""
        from diffusers.utils import logging

        key = ("said", *(str(arguments.get(name)) for name in ("prompt", "negative_prompt")))
        before = logging.get_verbosity()
        if key in self.kept:
            logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(before)
            self.kept[key] = None

    def asks_for(self, steps: int) -> dict[str, Any]:
        """Return what the pipeline tells its scheduler's `set_timesteps` for so many steps."""
        found: dict[str, Any] = {}

        def told(settings: dict[str, Any]) -> None:
            found.update(settings)
            raise Stopped

        self.run([0.0], more={"num_inference_steps": steps}, told=told)
        return found

    def _fresh_generator(self) -> torch.Generator:
        """A generator in the state of the caller's: what a pipeline draws for its conditions is the same each time."""
        fresh = torch.Generator(device="cpu" if self._generator is None else self._generator.device)
        if self._generator is None:
            return fresh.manual_seed(0)
        fresh.set_state(self._generator.get_state())
        return fresh

    def _enter(self, states: Tensor, stack: ExitStack) -> dict[str, Any]:
        """Put states in place of the pipeline's own; return further arguments."""
        entrance = self.entrance
        assert entrance is not None
        if entrance.kind == "latents":
            return {"latents": states.to(self.pipe.dtype)}
        if entrance.kind == "method":
            own = getattr(self.pipe, entrance.name)

            def prepare(*args: Any, **kwargs: Any) -> Any:
                return entrance.put(states, own(*args, **kwargs))

            stack.enter_context(patched(self.pipe, entrance.name, prepare))
            return {}

        def draw(shape: Any, *args: Any, **kwargs: Any) -> Tensor:
            drawn: Tensor = own_draw(shape, *args, **kwargs)
            return states.to(drawn) if tuple(shape) == tuple(states.shape) else drawn

        for cls in type(self.pipe).__mro__:
            module = sys.modules.get(cls.__module__)
            own_draw: Any = getattr(module, "randn_tensor", None)
            if own_draw is not None:
                stack.enter_context(patched(module, "randn_tensor", draw))
                break
        return {}

    def _once(self, name: str, part: Any, method: str) -> Callable[..., Any]:
        """A part's method that is run once for the same input, and draws the same noise for equal rows."""
        own = getattr(part, method)

        @wraps(own)
        def asked(*args: Any, **kwargs: Any) -> Any:
            leaves, form = tree_flatten((args, kwargs))
            if any(isinstance(x, Tensor) and x.requires_grad for x in leaves):
                return own(*args, **kwargs)
            key = (name, method, str(form), *map(_key, leaves))
            if key not in self.kept:
                with torch.no_grad():
                    found = own(*args, **kwargs)
                if (drawn := getattr(found, "latent_dist", None)) is not None and hasattr(drawn, "std"):
                    drawn.sample = partial(self._draw, drawn)
                self.kept[key] = found
                if len(self.kept) > KEPT:
                    self.kept.popitem(last=False)
            self.kept.move_to_end(key)
            return self.kept[key]

        return asked

    def _draw(self, drawn: Any, generator: torch.Generator | None = None) -> Tensor:  # noqa: ARG002
        """Draw from a Gaussian per row, with the same noise for equal images, and in every call of the pipeline."""
        mean, own = drawn.mean, self._noise
        if id(drawn) not in self._drawn:
            noise = torch.randn((1, *mean.shape[1:]), generator=own, dtype=mean.dtype, device=own.device)
            self._drawn[id(drawn)] = noise.to(mean.device)
        sample: Tensor = mean + drawn.std * self._drawn[id(drawn)]
        return sample

    def find_entrance(self, time: float) -> Answer:
        """Find the pipeline's networks and where its first state comes from; return the answer for its own first state.

        Raises:
            PushforwardError: the pipeline takes no step, or takes its state from nowhere that is known.
        """
        made: list[tuple[str, Any]] = []

        def watched(name: str) -> Callable[..., Any]:
            own = getattr(self.pipe, name)

            def prepare(*args: Any, **kwargs: Any) -> Any:
                made.append((name, own(*args, **kwargs)))
                return made[-1][1]

            return prepare

        names = [name for name in dir(type(self.pipe)) if name.startswith("prepare")]
        called: set[str] = set()

        def noting(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                if self._stand_in.begun:
                    called.add(name)

            return hook

        patches = [(self.pipe, name, watched(name)) for name in names]
        hooks = {name: noting(name) for name in parts(self.pipe)}
        try:
            answers, _ = self.run([time], patches=patches, hooks=hooks)
        except PushforwardError:
            self.fewest = 2  # some divide by the number of steps after the first
            answers, _ = self.run([time], patches=patches, hooks=hooks)
        self.denoisers = alike(self.pipe, called)
        if not answers:
            raise PushforwardError(
                f"{type(self.pipe).__name__} takes no step of its own scheduler when called with these arguments; "
                "of several pipelines in one, give one."
            )
        state = answers[0].state
        for name, result in reversed(made):
            several = isinstance(result, tuple | list)
            for place, one in enumerate(result if several else [result]):
                if isinstance(one, Tensor) and one.shape == state.shape and torch.equal(one, state):
                    self.entrance = Entrance("method", name, place if several else None)
                    return answers[0]
        if self._find_numbers(time, state, made):
            return answers[0]
        for kind in ("latents", "noise") if "latents" in self.signature.parameters else ("noise",):
            self.entrance = Entrance(kind)
            try:
                again = self.run([time], 0.5 * state[:1])[0]
            except PushforwardError:
                continue
            if torch.equal(again[0].state[:1], 0.5 * state[:1]):
                return answers[0]
        raise PushforwardError(
            f"{type(self.pipe).__name__} makes its first state in a way that is not known here; sample with "
            "pushforward.PushforwardScheduler in the pipeline instead."
        )

    def _find_numbers(self, time: float, state: Tensor, made: Sequence[tuple[str, Any]]) -> bool:
        """Find a method's result that holds the first state's numbers among others, by numbering them."""
        for name, result in made:
            several = isinstance(result, tuple | list)
            for place, one in enumerate(result if several else [result]):
                if not (isinstance(one, Tensor) and one.is_floating_point() and one.numel() > state.numel()):
                    continue
                self.entrance = Entrance("method", name, place if several else None)
                numbers = numbered(one, lambda digits: self.run([time], digits)[0][0].state)
                if numbers is not None:
                    self.entrance = replace(self.entrance, numbers=numbers)
                    return True
        return False


def recorded(
    count: int, step: Callable[[Answer], Tensor] | None
) -> tuple[list[Answer], Callable[[Tensor, Tensor], Tensor]]:
    """Make a list of answers and what takes the steps that fill it; see `Call.run`.

    Args:
        count: how many steps there are.
        step: what takes a step; by default states stay, and the call ends at the last step.
    """
    answers: list[Answer] = []

    def take(prediction: Tensor, state: Tensor) -> Tensor:
        answers.append(Answer(state, prediction))
        if step is not None:
            return step(answers[-1])
        if len(answers) == count:
            raise Stopped
        return state

    return answers, take


def numbered(like: Tensor, send: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Find which number of a tensor each one is that comes out; `None` if one comes twice, or is not among them."""
    numbers = torch.arange(like.numel(), device=like.device)
    index: Tensor | None = None
    for digit in range(math.ceil(math.log(max(like.numel(), 2), DIGITS))):
        came = send((numbers // DIGITS**digit % DIGITS).to(like).view_as(like)).flatten().to(torch.float64)
        if not bool(((came - came.round()).abs() < 0.1).all()):
            return None
        part = came.round().long().to(like.device) * DIGITS**digit
        index = part if index is None else index + part
    assert index is not None
    within = bool(((index >= 0) & (index < like.numel())).all())
    return index if within and len(index.unique()) == len(index) else None


def stand_in(scheduler: Any) -> Any:
    """Make a scheduler of the same class and settings that takes the times and the step that it is given."""
    kind = type(scheduler)
    form = inspect.signature(kind.step)

    def prepare(self: Any, times: Sequence[float], take: Any, told: Any) -> None:
        self._times, self._take, self._told, self.begun = list(times), take, told, False

    def set_timesteps(
        self: Any,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,  # pipelines look for these names
        sigmas: Any = None,
        mu: Any = None,
        **more: Any,
    ) -> None:
        if self._told is not None:
            said = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas, "mu": mu}
            self._told({name: value for name, value in {**said, **more}.items() if value is not None})
        self.timesteps = torch.tensor(self._times, dtype=torch.float32, device=device)
        count = getattr(self.config, "num_train_timesteps", 1000)
        self.sigmas = torch.tensor([*(t / count for t in self._times), 0.0], dtype=torch.float32, device=device)
        self.num_inference_steps = len(self._times)
        self._step_index = self._begin_index = None
        self.begun = True

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = form.bind(self, *args, **kwargs).arguments
        following = self._take(given["model_output"], given["sample"])
        if given.get("return_dict", True):
            from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

            return DDIMSchedulerOutput(prev_sample=following, pred_original_sample=following)
        return following, following

    own = {
        "prepare": prepare,
        "set_timesteps": set_timesteps,
        "step": step,
        "scale_model_input": lambda _, sample, *__, **___: sample,
        "add_noise": lambda _, __, noise, *___: noise,
        "scale_noise": lambda _, sample, *args, **kwargs: kwargs.get("noise", args[-1] if args else sample),
        "init_noise_sigma": property(lambda _: 1.0),
        "order": 1,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    made = copy.copy(scheduler)
    made.__class__ = type(kind.__name__, (kind,), own)
    return made


def parts(pipe: Any) -> dict[str, nn.Module]:
    """List the pipeline's modules by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def alike(pipe: Any, names: Collection[str]) -> frozenset[str]:
    """Name the parts of a pipeline of the same classes as these."""
    own = parts(pipe)
    classes = {type(own[name]) for name in names}
    return frozenset(name for name, part in own.items() if type(part) in classes)


def callee(part: nn.Module) -> str:
    """Name the method through which a module is called: what comes before it is not compiled with it."""
    return "forward" if getattr(part, "_compiled_call_impl", None) is None else "_compiled_call_impl"


def hooked(part: nn.Module, hook: Callable[..., Any]) -> AbstractContextManager[None]:
    """Put a hook before a module's calls, which may change their arguments."""
    own = getattr(part, callee(part))

    @wraps(own)  # some pipelines look at its signature
    def called(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = hook(part, args, kwargs) or (args, kwargs)
        return own(*args, **kwargs)

    return patched(part, callee(part), called)


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put something in an object's attribute, past whatever watches its assignment, and put the old back at the end."""
    had, old = name in vars(owner), vars(owner).get(name)
    vars(owner)[name] = value
    try:
        yield
    finally:
        if had:
            vars(owner)[name] = old
        else:
            del vars(owner)[name]


@contextmanager
def restored(owner: Any) -> Iterator[None]:
    """Have an object hold at the end what it holds now, and nothing else."""
    before = dict(vars(owner))
    try:
        yield
    finally:
        for name in vars(owner).keys() - before.keys():
            del vars(owner)[name]
        vars(owner).update(before)


@contextmanager
def as_wide(part: Any) -> Iterator[None]:
    """Have a part at the end in the dtype that it is in now: pipelines widen decoders for a while."""
    before = getattr(part, "dtype", None)
    try:
        yield
    finally:
        if getattr(part, "dtype", None) != before:
            part.to(before)


def _key(leaf: object) -> Any:
    if isinstance(leaf, Tensor):
        plain = torch.empty(leaf.shape or (1,), dtype=leaf.dtype).copy_(leaf.detach())
        seen = plain.view(torch.uint8)
        return str(leaf.dtype), str(leaf.device), tuple(leaf.shape), sha256(seen.numpy().tobytes()).digest()
    try:
        hash(leaf)
    except TypeError:
        return id(leaf)
    return leaf


def detached(value: Any) -> Any:
    """The same structure with tensors cut from their graph."""
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, value)
