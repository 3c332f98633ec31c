"""Any pipeline of Modular diffusers in memory as a model.

The blocks before the loop run once for a prompt, the loop is the network (`model.diffusers.blocks`), and the blocks
after it make images of states.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor

from pushforward.data.faults import reason
from pushforward.errors import PushforwardError
from pushforward.linear import Flow
from pushforward.model.diffusers.arguments import given_to
from pushforward.model.diffusers.blocks import ROWS, LoopCall, bare, check_loop
from pushforward.model.diffusers.calls import KEPT
from pushforward.model.diffusers.codec import Decoder, decoders
from pushforward.model.diffusers.patches import LOCK, patched
from pushforward.model.diffusers.pipeline import Asked, made_of, probes
from pushforward.model.diffusers.schedules import Schedule, schedule_of
from pushforward.model.diffusers.standin import Stopped
from pushforward.model.diffusers.steps import flow_times, settings_of
from pushforward.model.model import Model

__all__ = ["from_blocks"]


def from_blocks(pipe: Any, *, name: str | None = None, **call: Any) -> Model:
    """Make a model of a pipeline of Modular diffusers as it is in memory.

    Args:
        pipe: the pipeline.
        name: name for reports; by default that of its class.
        **call: inputs that the pipeline would be given, besides those that are a sampler's: prompts, images, sizes.
            Guidance is what its guider says.

    Raises:
        PushforwardError: the pipeline takes no such input, or has no loop that can be asked about single states and
            times; the sentence names what is in the way.
    """
    if getattr(pipe, "scheduler", None) is None:
        raise PushforwardError(f"{type(pipe).__name__} has no scheduler; load its components first.")
    schedule = schedule_of(pipe)
    with torch.no_grad():
        asked = PipelineCall(pipe, _arguments(pipe, call))
        asked.find_denoisers()
    network = Asked(asked, asked.state.get("latents"), probes(schedule), schedule.gain)
    return _model(network, asked, schedule, name or type(pipe).__name__)


class PipelineCall(LoopCall):
    """The loop that a pipeline of blocks comes to with some inputs, and the state that it has there.

    Args:
        pipe: the pipeline.
        arguments: its inputs.
    """

    def __init__(self, pipe: Any, arguments: Mapping[str, Any]) -> None:
        loop, self.path, state = _until_loop(pipe, arguments)
        check_loop(loop)
        if len(state.get("latents")) != 1:
            raise PushforwardError("Give one prompt for all images here; give those of single images to `sample`.")
        super().__init__(loop, pipe, state)
        self.arguments = dict(arguments)
        names = [ROWS, *(name for name in ("prompt",) if name in arguments)]
        self.signature = Signature([Parameter(name, Parameter.KEYWORD_ONLY) for name in names])

    def begun(self, more: Mapping[str, Any]) -> Any:
        """Return the state that the loop begins with for a prompt."""
        prompt = more.get("prompt")
        prompt = prompt[0] if isinstance(prompt, list) else prompt
        if prompt is None or prompt == self.arguments.get("prompt"):
            return self.state
        if prompt not in self.kept:
            with torch.no_grad():
                self.kept[prompt] = _until_loop(self.pipe, {**self.arguments, "prompt": prompt})[2]
            if len(self.kept) > KEPT:
                self.kept.popitem(last=False)
        return self.kept[prompt]

    @property
    def rest(self) -> Iterator[Any]:
        """The blocks that follow on the loop."""
        return _after(self.pipe._blocks, self.path)


@dataclass(frozen=True, eq=False)
class BlocksDecoder(Decoder):
    """Turns last states into images by the blocks after the loop."""

    call: PipelineCall

    def leave(self, state: Tensor, patches: Sequence[tuple[Any, str, Any]]) -> Any:
        """Let the pipeline go on from this last state `(1, ...)`."""
        pipe, begun = self.call.pipe, self.call.state
        values = {**begun.values, "latents": state.to(begun.get("latents")), "output_type": "pt"}
        going = type(begun)(values, begun.kwargs_mapping)
        with LOCK, ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patched(*patch))
            try:
                for block in self.call.rest:
                    bare(block)(pipe, going)
            except Stopped:
                pass
            except Exception as error:
                raise PushforwardError(f"{type(pipe).__name__} makes no image: {reason(error)}.") from error


@dataclass(frozen=True, eq=False)
class FlowSteps:
    """`steps -> times`: where a flow's scheduler takes its steps, told what the pipeline tells it."""

    call: PipelineCall

    def __call__(self, steps: int) -> Tensor:
        pipe, scheduler = self.call.pipe, copy.deepcopy(self.call.scheduler)
        with LOCK, patched(pipe, "scheduler", scheduler), torch.no_grad():
            _until_loop(pipe, {**self.call.arguments, "num_inference_steps": steps})
        times = torch.unique_consecutive(flow_times(scheduler))
        if len(times) != steps + 1:
            raise PushforwardError(f"The pipeline takes {len(times) - 1} steps with these inputs, not {steps}.")
        return times

    def contents(self) -> Any:
        """Return what it is made of, see `model.contents`."""
        return settings_of(self.call.scheduler)


def _model(network: Asked, call: PipelineCall, schedule: Schedule, name: str) -> Model:
    decoder = None
    if decoders(call.pipe) and any(True for _ in call.rest):
        decoder = BlocksDecoder(call, {}, network.times[-2])
    own = isinstance(schedule.process, Flow) or not schedule.grid
    grid = {"name": "own", "times": FlowSteps(call)} if own else schedule.grid
    return made_of(network, schedule, name, decoder, grid)


def _arguments(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """Check the inputs of a pipeline, and add an empty prompt where one is needed."""
    return given_to(pipe, call, [param.name for param in pipe._blocks.inputs if param.name], "input")


def _until_loop(pipe: Any, arguments: Mapping[str, Any]) -> tuple[Any, tuple[str, ...], Any]:
    """Run a pipeline until it comes to a loop; return that, the names of the blocks that it is in, and the state."""
    found: list[tuple[Any, tuple[str, ...], Any]] = []
    with LOCK, ExitStack() as stack:
        for block, name, path in _loops(pipe._blocks):
            loop = block.sub_blocks[name]
            stack.callback(block.sub_blocks.__setitem__, name, loop)
            block.sub_blocks[name] = _Caught(getattr(loop, "loop", loop), path, found)
        try:
            pipe(**arguments)
        except Stopped:
            pass
        except Exception as error:
            raise PushforwardError(
                f"{type(pipe).__name__} cannot be called with these inputs: {reason(error)}."
            ) from error
    if not found:
        raise PushforwardError(f"{type(pipe).__name__} comes to no denoising loop with these inputs.")
    return found[0]


class _Caught:
    """Stands for a loop where a pipeline is to stop."""

    def __init__(self, loop: Any, path: tuple[str, ...], found: list[tuple[Any, tuple[str, ...], Any]]) -> None:
        self._loop, self._path, self._found = loop, path, found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def __call__(self, _: Any, state: Any) -> None:
        self._found.append((self._loop, self._path, state))
        raise Stopped


def _loops(block: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[Any, str, tuple[str, ...]]]:
    """List the loops below a block: what they are in, by which name, and the names on the way there."""
    for name, one in list(block.sub_blocks.items()):
        if hasattr(one, "loop_step"):
            yield block, name, (*path, name)
        else:
            yield from _loops(one, (*path, name))


def _after(block: Any, path: tuple[str, ...]) -> Iterator[Any]:
    """List the blocks that follow on one, given the names on the way to it."""
    name, *deeper = path
    if deeper:
        yield from _after(block.sub_blocks[name], tuple(deeper))
    if not hasattr(block, "select_block"):  # of which only one runs
        names = list(block.sub_blocks)
        yield from (block.sub_blocks[other] for other in names[names.index(name) + 1 :])
