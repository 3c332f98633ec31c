"""Denoising loops of Modular diffusers, asked as pipelines are.

A loop of blocks runs unchanged on a copy of the pipeline's state, with a stand-in for its scheduler (see
`model.diffusers.calls`). What the state says of each image is told for each row. How many rows can be asked about in a
call, each at its own time, is found out as it is for pipelines (`model.diffusers.rows`).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor

from pushforward.data.faults import reason
from pushforward.errors import PushforwardError
from pushforward.model.diffusers.calls import Call
from pushforward.model.diffusers.patches import alike, alone, guiders, hooked, parts, patched
from pushforward.model.diffusers.pipeline import Asked, refuse_caches
from pushforward.model.diffusers.standin import Answer, Stopped, recorded, stand_in

__all__ = ["AskedLoop", "LoopCall", "bare", "check_loop"]

ROWS = "batch_size"  # how many rows a loop is asked about; some loops read it of the state too
WHICH = "which"  # the image that each row is of


def check_loop(loop: Any) -> None:
    """Raise if a loop is none over noise levels with one state."""
    name, inputs = type(loop).__name__, {param.name for param in loop.inputs}
    if not {"timesteps", "latents"} <= inputs:
        raise PushforwardError(f"{name} takes no latents along timesteps, so no solver can take its place.")
    for other in sorted(str(param) for param in inputs | set(loop.component_names) if param != "scheduler"):
        if other.endswith("_scheduler"):
            kind = other.removesuffix("_scheduler")
            raise PushforwardError(f"{name} denoises {kind} beside the latents; a solver here has one state only.")


class LoopCall(Call):
    """A loop of blocks and the state of the pipeline that it begins with.

    Args:
        loop: the family's own, a `LoopSequentialPipelineBlocks`.
        pipe: the pipeline.
        state: its state. What a value says of each image has as many entries as there are `latents`.
    """

    _DERIVED = ("_bare", "_stand_in")

    def __init__(self, loop: Any, pipe: Any, state: Any) -> None:
        self.loop, self.pipe, self.state = loop, pipe, state
        self.arguments, self.entrance, self.kept = {}, None, OrderedDict()
        self.signature = Signature([Parameter(ROWS, Parameter.KEYWORD_ONLY)])
        self.scheduler = pipe.scheduler
        self._derive()
        self.images = len(state.get("latents"))
        named = {param.name for param in loop.inputs} | {param.kwargs_type for param in loop.inputs}
        more = [name for kind, names in state.kwargs_mapping.items() if kind in named for name in names]
        self._told = (named | set(more)) - {None, "latents", "timesteps", ROWS}
        self.denoisers = frozenset()
        _check_guiders(pipe)
        refuse_caches(pipe)

    def _derive(self) -> None:
        self._bare = bare(self.loop)
        self._bare._progress_bar_config = {**getattr(self.loop, "_progress_bar_config", {}), "disable": True}
        self._stand_in = stand_in(self.scheduler)

    @property
    def name(self) -> str:
        """Name for messages."""
        return type(self.loop).__name__

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
        told: Callable[[dict[str, Any]], None] | None = None,  # noqa: ARG002 - the steps are placed before the loop
    ) -> tuple[list[Answer], Any]:
        """Run the loop for steps at these times of its scheduler; see `Call.run`.

        Args:
            times: the times.
            states: states `(rows, ...)` to begin with; by default the pipeline's own.
            more: `which`: the number of each row's image, the first by default.
            step: what takes a step.
            hooks: pre-hooks of the pipeline's parts.
            patches: objects, names of their attributes and what to put in their place.
            told: not used.

        Raises:
            PushforwardError: a block raises an error.
        """
        answers, take = recorded(len(times), step)
        begun = self.begun(more or {})
        own: Tensor = begun.get("latents")
        which = list(range(len(own))) if states is None else [0] * len(states)
        which = [int(k) for k in (more or {}).get(WHICH, which)]
        result = None
        with ExitStack() as stack:
            self._stand_in.prepare(times, take, None)
            self._stand_in.set_timesteps(device=own.device)
            stack.enter_context(patched(self.pipe, "scheduler", self._stand_in))
            for guider in guiders(self.pipe).values():
                stack.callback(vars(guider).update, dict(vars(guider)))
            for patch in patches:
                stack.enter_context(patched(*patch))
            for name, hook in (hooks or {}).items():
                stack.enter_context(hooked(parts(self.pipe)[name], hook))
            try:
                given = self._with(begun, own if states is None else states, which, len(times))
                result = self._bare(self.pipe, given)
            except Stopped:
                pass
            except (PushforwardError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise PushforwardError(f"{type(self.loop).__name__} cannot be run so: {reason(error)}.") from error
        return answers, result

    @property
    def form(self) -> tuple[Any, ...]:
        """The parts of the pipeline and how it is guided, which decide how the loop can be asked."""
        found: list[Any] = [(name, type(part)) for name, part in parts(self.pipe).items()]
        for name, guider in guiders(self.pipe).items():
            said = [item for item in vars(guider).items() if item[0] == "_enabled" or not item[0].startswith("_")]
            found.append((name, type(guider), str(said)))
        return tuple(found)

    def begun(self, more: Mapping[str, Any]) -> Any:  # noqa: ARG002 - there are calls that look
        """Return the state that the loop begins with, where further arguments are given."""
        return self.state

    def _with(self, begun: Any, states: Tensor, which: Sequence[int], steps: int) -> Any:
        """Return a pipeline's state with these states in the place of its latents."""
        values = dict(begun.values)
        for name in self._told & values.keys():
            if name.endswith("_keep"):
                values[name] = _kept(name, values[name], steps)
            else:
                values[name] = _rows(values[name], self.images, which)
        if values.get(ROWS) == self.images:
            values[ROWS] = len(states)
        values |= {"latents": states, "timesteps": self._stand_in.timesteps, "num_inference_steps": steps}
        return type(begun)(values, begun.kwargs_mapping)

    def find_denoisers(self) -> None:
        """Find the parts that the loop calls, and those of the same classes.

        Raises:
            PushforwardError: the loop takes no step.
        """
        called: set[str] = set()

        def noting(name: str) -> Callable[..., None]:
            return lambda *_: called.add(name)

        time = float(self.state.get("timesteps")[0])
        with torch.no_grad():
            answers, _ = self.run([time], hooks={name: noting(name) for name in parts(self.pipe)})
        if not answers:
            raise PushforwardError(f"{type(self.loop).__name__} takes no step of the pipeline's scheduler.")
        self.denoisers = alike(self.pipe, called)


class AskedLoop(Asked):
    """`(u, t, images) -> prediction` of a loop of blocks, with t in its scheduler's units."""

    call: LoopCall

    def again(self, call: LoopCall) -> AskedLoop:
        """Return the same network of another call, that is asked in the same way."""
        made = copy.copy(self)
        made.call, call.denoisers = call, self.call.denoisers
        made._rows = {expert: replace(rows, call=call) for expert, rows in self._rows.items()}
        return made

    def _about(self, numbers: Sequence[int]) -> dict[str, Any]:
        return {WHICH: numbers}


def bare(block: Any) -> Any:
    """Return a block that does what a block does, and lets gradients through if they are wanted."""
    kind, made = type(block), copy.copy(block)
    own = getattr(kind.__call__, "__wrapped__", kind.__call__)  # without no_grad
    made.__class__ = type(kind.__name__, (kind,), {"__call__": own, "__module__": kind.__module__})
    made.sub_blocks = type(block.sub_blocks)((name, bare(one)) for name, one in block.sub_blocks.items())
    return made


def _rows(value: Any, images: int, which: Sequence[int]) -> Any:
    """Return for each row what a value says of its image; values that say nothing of single images stay."""
    if isinstance(value, Tensor):
        return value[list(which)] if value.ndim and len(value) == images else value
    if isinstance(value, dict):
        return {key: _rows(one, images, which) for key, one in value.items()}
    if isinstance(value, list | tuple):
        batches = [one for one in value if isinstance(one, Tensor) and one.ndim > 2 and len(one) == images]
        if batches and len(batches) == len(value):  # of control networks or image prompts
            return type(value)(_rows(one, images, which) for one in value)
        return [value[k] for k in which] if isinstance(value, list) and len(value) == images else value
    return value


def _kept(name: str, value: Any, steps: int) -> Any:
    """Return what is the same in every step for so many steps."""
    if any(one != value[0] for one in value):
        raise PushforwardError(f"The pipeline's {name} differs between steps; let control networks act in all of them.")
    return list(value[:1]) * steps


def _check_guiders(pipe: Any) -> None:
    """Raise if guidance acts in some steps only."""
    for name, guider in guiders(pipe).items():
        if (getattr(guider, "_start", 0.0), getattr(guider, "_stop", 1.0)) != (0.0, 1.0):
            raise PushforwardError(
                f"The {name} acts in a part of the steps only (start, stop), which a network has not; let it act in "
                "all of them."
            )
