"""Images whose codes carry a keyed pattern, and the pattern read from images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.execute import Progress
from pushforward.execute.host import undisturbed
from pushforward.maps.code import Code, batches, whole_numbers
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.guesses import guesses
from pushforward.maps.labels import UNSAID
from pushforward.maps.watermark import Bits, Found, Ring, longest, read
from pushforward.model import Model
from pushforward.verbs.codes import decode_in_batches
from pushforward.verbs.samplers import AtOnce, Given, Solver, as_batch, diffusion_of
from pushforward.verbs.samplers import read as read_solver

__all__ = ["Marked", "read_watermark", "watermark"]

_LENGTHS = 8  # of messages that are tried


@dataclass(frozen=True, eq=False)
class Marked:
    """Images that carry a watermark.

    Args:
        images: in [-1, 1], `(count, channels, height, width)`, float32 on the CPU.
        code: their codes.
        pushforward: the map that makes the images of them.
    """

    images: Tensor = field(repr=False)
    code: Code
    pushforward: Diffusion


@undisturbed
@torch.no_grad()
def watermark(
    model: Model,
    count: int = 16,
    *,
    key: bytes | str,
    message: bytes | str | None = None,
    solver: Solver = "auto",
    steps: int | None = None,
    labels: Given = UNSAID,
    guidance: float | None = None,
    parallel: AtOnce | None = None,
    seed: int = 0,
    first: int = 0,
    batch: int = 64,
    callback: Callable[[Any], None] | None = None,
) -> Marked:
    """Draw images whose codes carry a keyed pattern. Over keys, they are distributed exactly as those of `sample`.

        marked = model.watermark(16, key="my secret", message=b"me", seed=0)
        model.read_watermark(marked.images, key="my secret", message=b"me").correct

    Args:
        model: the model to draw from.
        count: how many images.
        key: the secret; it is kept nowhere.
        message: bytes that the images carry in the signs of their codes (Gaussian Shading); without one they carry a
            ring of keyed low frequencies (Tree-Ring). Every 64 numbers of a code hold a byte at most; the fewer bytes,
            the more is survived.
        solver: a deterministic one, as in `sample`.
        steps: 20 by default.
        labels: classes or prompts, as in `sample`.
        guidance: weight of classifier-free guidance, by default 1, or a pipeline's own.
        parallel: take all steps at once, as in `sample`.
        seed: image i depends on the key, the message, the seed and `first + i` alone.
        first: number of the first image.
        batch: images at a time.
        callback: told after every network call or round.

    Raises:
        PushforwardError: no key, a message too long for the code, a stochastic solver, or as `sample`.
    """
    _check_model(model)
    sampler = read_solver(solver, steps=steps, parallel=parallel)
    there = diffusion_of(model, sampler, labels=labels, guidance=guidance, parallel=parallel)
    if there.noises:
        raise PushforwardError(
            f"The solver {there.plan.solver!r} with these settings draws noises that hide the mark; take a "
            "deterministic one, e.g. ddim or dpm++."
        )
    there = there.in_turn(count, first)
    there.model_for(count)
    code = there.draw(count, seed=seed, first=first)
    if message is None:
        start = Ring(_bytes(key)).embed(code.start, first)
    else:
        told = _bytes(message)
        start = Bits(_bytes(key), len(told)).embed(code.start, told, first)
    code = replace(code, start=start)
    return Marked(decode_in_batches(there, code, batch, callback), code, there)


@undisturbed
@torch.no_grad()
def read_watermark(
    model: Model,
    images: Tensor,
    *,
    key: bytes | str,
    message: bytes | str | None = None,
    length: int | None = None,
    ring: bool = False,
    steps: int = 12,
    labels: Given = UNSAID,
    guidance: float | None = None,
    crops: int = 0,
    shifts: int = 0,
    batch: int = 64,
    callback: Callable[[Progress], None] | None = None,
) -> Found:
    """Read the watermark of a key from images.

    Codes are found by one pass from the image to noise, which begins as if the image had more noise than it has, at
    several levels: so noise, compression and resizing leave more of the code than by plain inversion, and the numbers
    of the code are small where the image says nothing of them. The codes of colours are read without their colour, too,
    which compression keeps little of. Which solver made the image does not matter.

    Args:
        model: the model that made the images.
        images: in [-1, 1], `(count, channels, height, width)`, or a single one without `count`.
        key: the secret that they were marked with.
        message: the message, if it is known: the share of its bits that is right is told, and less is needed to be
            sure that an image is marked.
        length: bytes of the message; else 1 to 8 are tried.
        ring: whether to look for a ring, which is what images carry that were marked without a message.
        steps: network calls of a pass.
        labels: what the images show, as in `sample`; by default what the model was given, or nothing.
        guidance: weight of classifier-free guidance, by default 1, or a pipeline's own.
        crops: try all crops that took up to so many pixels of each side, and were brought to the model's size again.
            Whatever is tried, the p-values are corrected for.
        shifts: try all shifts by up to so many pixels each way, of every crop that is tried.
        batch: images at a time.
        callback: told after every network call.

    Raises:
        PushforwardError: no key, a message too long for the code, or images that do not fit the model.
    """
    _check_model(model)
    if ring and (message is not None or length is not None):
        raise PushforwardError("A ring carries no message; leave message and length out.")
    images, told = as_batch(images, model), None if message is None else _bytes(message)
    crops, shifts = whole_numbers("Pixels of crops and shifts", crops, shifts)
    side = min(images.shape[2:]) if images.ndim == 4 else 1  # of sound and video, neither is sought
    for change, most in (("crop takes", crops), ("shift goes by", shifts)):
        if not 0 <= most < side:
            raise PushforwardError(f"A {change} at most {side - 1} pixels of a side of {side}; got {most}.")
    shape = model.state_shape(1)[1:]
    most = max(1, min(_LENGTHS, longest(shape)))
    if told is not None:
        length = len(told)
    lengths = range(1, most + 1) if length is None else whole_numbers("Lengths", length)
    bits = [] if ring else [Bits(_bytes(key), bytes_) for bytes_ in lengths]
    for one in bits:
        one.check(shape)  # what is wrong is said before all work
    pattern = bits or Ring(_bytes(key))
    there = diffusion_of(model, read_solver("ddim", steps=steps), labels=labels, guidance=guidance)
    there.model_for(len(images))
    found = []
    for some in batches(len(images), batch):
        codes = guesses(there.some(some), images[some], crops=crops, shifts=shifts, callback=callback)
        found.append(read(pattern, codes, told))
    return Found(
        [one for piece in found for one in piece.message],
        torch.cat([piece.p_value for piece in found]),
        torch.cat([piece.evidence for piece in found]),
        None if told is None else torch.cat([piece.correct for piece in found if piece.correct is not None]),
        torch.cat([piece.view for piece in found]),
    )


def _check_model(model: object) -> None:
    if not isinstance(model, Model):
        raise PushforwardError(
            "Watermarks are read by inversion, so they need a diffusion model, as `pushforward.load` gives it; other "
            "maps have no Gaussian code that an image leads back to."
        )


def _bytes(text: object) -> bytes:
    if not isinstance(text, str | bytes | bytearray):
        raise PushforwardError(f"Keys and messages are text or bytes; got a {type(text).__name__}.")
    return text.encode() if isinstance(text, str) else bytes(text)
