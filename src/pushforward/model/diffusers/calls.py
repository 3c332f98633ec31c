"""Calls of a `diffusers` pipeline that end where its scheduler would take a step.

The pipeline runs unchanged, with a stand-in for its scheduler that takes no steps: what reaches `step` is the state and
the pipeline's complete, guided prediction.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from hashlib import sha256
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from pushforward.data.faults import reason
from pushforward.errors import PushforwardError
from pushforward.model.diffusers.entrance import Entrance, numbered
from pushforward.model.diffusers.patches import (
    alike,
    alone,
    as_wide,
    callee,
    hooked,
    hooked_locally,
    offloading_known,
    parts,
    patched,
    restored,
)
from pushforward.model.diffusers.standin import Answer, Stopped, recorded, stand_in

__all__ = ["KEPT", "Call", "remembering"]

KEPT = 64  # answers of an encoder that are kept


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
        scheduler: the scheduler whose predictions these are; by default the one that the pipeline has now.
    """

    pipe: Any
    arguments: Mapping[str, Any]
    entrance: Entrance | None = None
    denoisers: frozenset[str] = frozenset()
    kept: OrderedDict[Any, Any] = field(default_factory=OrderedDict)
    fewest: int = 1
    scheduler: Any = None
    _DERIVED: ClassVar = ("_method", "_stand_in")

    def __post_init__(self) -> None:
        self.signature = inspect.signature(type(self.pipe).__call__)
        if self.scheduler is None:
            self.scheduler = self.pipe.scheduler
        generator = self.arguments.get("generator")
        self._noise, self._drawn = torch.Generator(), dict[int, Tensor]()
        self._generator = generator[0] if isinstance(generator, list | tuple) else generator
        self._derive()

    def _derive(self) -> None:
        """Make what is made of the rest, and is neither copied nor pickled."""
        method = type(self.pipe).__call__
        self._method = getattr(method, "__wrapped__", method)  # without no_grad
        self._stand_in = stand_in(self.scheduler)

    def _state(self) -> dict[str, Any]:
        """Return what a copy is made of."""
        return {**vars(self), "kept": OrderedDict(), "_drawn": {}, **dict.fromkeys(self._DERIVED)}

    def __getstate__(self) -> dict[str, Any]:
        if name := next((name for name, part in parts(self.pipe).items() if hooked_locally(part)), None):
            raise PushforwardError(
                f"The {name} of {self.name} cannot be pickled, as another library has put hooks on it; copy the model "
                "by copy.deepcopy, or make it in the other process."
            )
        return self._state()

    def __copy__(self) -> Call:
        made = object.__new__(type(self))
        made.__setstate__(self._state())
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Call:
        memo[id(self)] = made = object.__new__(type(self))
        made.__setstate__(copy.deepcopy(self._state(), memo))
        return made

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._derive()

    @property
    def name(self) -> str:
        """Name for messages."""
        return type(self.pipe).__name__

    @alone
    def run(
        self,
        times: Sequence[float | Tensor],
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
            step: what takes a step, from an answer to the next state, and keeps the answer if it is needed; by default
                states stay, and the call ends at the last one, without a result.
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
        with restored(self.pipe), offloading_known(), ExitStack() as stack:
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
                assert self.entrance is not None
                arguments |= self.entrance.enter(self.pipe, states, stack)
            if callable(getattr(self.pipe, "add_noise", None)):  # to an image, as its scheduler does for others
                stack.enter_context(patched(self.pipe, "add_noise", lambda _, noise, *__: noise))
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
        """Let `diffusers` say what it has to of a prompt, such as cut words, in the first call with it only.

        Its handlers are filtered: another level would have every logger of the program look its own up again.
        """
        prompts = tree_flatten([arguments.get(name) for name in ("prompt", "negative_prompt")])[0]
        said = {("said", str(prompt)): None for prompt in prompts}
        handlers = logging.getLogger("diffusers").handlers if said.keys() <= self.kept.keys() else []
        for handler in handlers:
            handler.addFilter(_grave)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(_grave)
            self.kept.update(said)

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

    def _once(self, name: str, part: Any, method: str) -> Callable[..., Any]:
        """A part's method that is run once for the same input, and draws the same noise for equal rows.

        Rows of a batch are inputs of their own where what is made of them can be put together again.
        """
        own = getattr(part, method)

        def once(given: tuple[Any, Any]) -> Any:
            leaves, form = tree_flatten(given)
            key = (name, method, str(form), *map(_key, leaves))
            if key not in self.kept:
                with torch.no_grad():
                    found = own(*given[0], **given[1])
                if (drawn := getattr(found, "latent_dist", None)) is not None and hasattr(drawn, "std"):
                    drawn.sample = partial(self._draw, drawn)
                self.kept[key] = found
                if len(self.kept) > KEPT:
                    self.kept.popitem(last=False)
            self.kept.move_to_end(key)
            return self.kept[key]

        @wraps(own)
        def asked(*args: Any, **kwargs: Any) -> Any:
            tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
            if any(x.requires_grad for x in tensors):
                return own(*args, **kwargs)
            counts = {len(x) if x.ndim else 0 for x in tensors}
            if not self.denoisers or len(counts) > 1 or max(counts, default=0) < 2:
                return once((args, kwargs))
            found: list[Any] = []
            for k in range(counts.pop()):
                try:
                    found.append(once(_row((args, kwargs), k)))
                except torch.OutOfMemoryError:
                    raise
                except (IndexError, RuntimeError, ValueError):  # it is told of which row something is, by number
                    return once((args, kwargs))
                if not all(isinstance(x, Tensor) and x.ndim and len(x) == 1 for x in tree_flatten(found[-1])[0]):
                    return once((args, kwargs))
            return tree_map(lambda *rows: torch.cat(rows), *found)

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


def remembering(
    part: Any, asking: Callable[[], bool], known_by: Callable[[Any], Any] = lambda given: given
) -> tuple[Any, str, Any]:
    """Patch a part so that it is asked once for the same input, and again while `asking`; see `Call.run`.

    Args:
        part: the part.
        asking: says whether it is asked even so.
        known_by: what an input `(args, kwargs)` is known by.
    """
    own = getattr(part, callee(part))
    known: dict[Any, Any] = {}

    @wraps(own)
    def asked(*args: Any, **kwargs: Any) -> Any:
        leaves, form = tree_flatten(known_by((args, kwargs)))
        key = str(form), *map(_key, leaves)
        if asking() or key not in known:
            known[key] = own(*args, **kwargs), leaves  # which, kept, share no id with later ones
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, known[key][0])

    return part, callee(part), asked


def _row(given: Any, k: int) -> Any:
    """Return a row of a batch of inputs."""
    return tree_map(lambda x: x[k : k + 1] if isinstance(x, Tensor) else x, given)


def _key(leaf: object) -> Any:
    if isinstance(leaf, Tensor):
        plain = torch.empty(leaf.shape or (1,), dtype=leaf.dtype, device="cpu").copy_(leaf.detach())
        seen = plain.view(torch.uint8)
        return str(leaf.dtype), str(leaf.device), tuple(leaf.shape), sha256(seen.numpy().tobytes()).digest()
    try:
        hash(leaf)
    except TypeError:
        return id(leaf)
    return leaf


def _grave(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
