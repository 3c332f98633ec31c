"""What a pipeline of `diffusers` is called with: which of its arguments are the user's, and which the sampler's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from inspect import signature
from typing import Any

from pushforward.errors import PushforwardError
from pushforward.model.diffusers.calls import Call
from pushforward.model.diffusers.rows import BATCHES

__all__ = ["SUBJECTS", "arguments_of", "given_to", "guidance_of"]

NOTHING_SAID = {"strength": 1.0, "eta": 0.0, **dict.fromkeys(BATCHES, 1)}
SUBJECTS = ("prompt", "class_labels")  # arguments that say what an image is to be of
ACTING = ("callback", "callback_on_step_end")
OURS = {  # arguments that the sampler decides about
    "num_inference_steps": "say `steps` where you sample",
    "latents": "decode a code instead",
    "output_type": "images are tensors in [-1, 1]",
    "return_dict": "images are tensors in [-1, 1]",
    "strength": "say `start`, the share of the steps that is taken, where you translate or edit",
    "denoising_start": "say `start`, the share of the steps that is taken, where you translate or edit",
    "denoising_end": "say `end` of the solver, as in ddim:end=0.2",
    "eta": "say it of the solver, as in ddim:eta=1",
    **dict.fromkeys(BATCHES, "say how many images where you sample"),
}


def arguments_of(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """Check the arguments of a call, and add an empty prompt or the first class where one is needed.

    Raises:
        PushforwardError: the pipeline takes no such argument, or the sampler decides about it.
    """
    for argument in ACTING:
        if call.get(argument) is not None:
            raise PushforwardError(
                f"Leave {argument} out of the pipeline's call: it would act in the pipeline's own steps only."
            )
    known = [name for name in signature(type(pipe).__call__).parameters if name != "self"]
    given = given_to(pipe, call, known, "argument")
    if "class_labels" in known and given.get("class_labels") is None:
        given["class_labels"] = [0]
    for subject in SUBJECTS:
        value = given.get(subject)
        if isinstance(value, list | tuple) and len(value) > 1:
            raise PushforwardError(f"Give one {subject} for all images here; give those of single images to `sample`.")
    if isinstance(given.get("prompt"), list | tuple):
        given["prompt"] = given["prompt"][0]
    return given


def given_to(pipe: Any, call: Mapping[str, Any], known: Sequence[str], what: str) -> dict[str, Any]:
    """Return what a pipeline is given, with an empty prompt where one is needed.

    What a sampler decides about is left out, with a warning if it says anything.

    Args:
        pipe: the pipeline.
        call: what the user would call it with.
        known: names of what it takes.
        what: they are, for messages.

    Raises:
        PushforwardError: it takes no such thing.
    """
    for name in OURS:
        if name in call and call[name] != NOTHING_SAID.get(name):
            warnings.warn(f"{name} is left out of the pipeline's call: {OURS[name]}.", stacklevel=6)
    given = {name: value for name, value in call.items() if name not in OURS}
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; do you mean {near[0]}?" if near else f"; it takes {', '.join(known)}."
            raise PushforwardError(f"{type(pipe).__name__} takes no {what} {name!r}{hint}")
    embedded = any("embeds" in name and value is not None for name, value in given.items())
    if "prompt" in known and given.get("prompt") is None and not embedded:
        given["prompt"] = ""
    return given


def guidance_of(call: Call) -> str | None:
    """Name the argument by which the pipeline weighs its guidance."""
    known = call.signature.parameters
    true = known.get("true_cfg_scale")
    if true is not None and isinstance(true.default, int | float) and true.default > 1:
        return "true_cfg_scale"
    return next((name for name in ("guidance_scale", "true_cfg_scale") if name in known), None)
