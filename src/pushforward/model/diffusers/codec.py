"""Images of a pipeline's states and states of images, by the pipeline's own decoder and packing.

States come out as the pipeline brings its last one to images: it is called with its networks passed over. The way in is
the way out turned round: between the last state and what the autoencoder decodes, pipelines reorder numbers and shift
and scale each, which is learned by sending numbered states through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.model.diffusers.calls import Call, Stopped, detached, parts

__all__ = ["Decoder", "Encoder", "decoder_of", "encoder_of"]

DIGITS = 64  # numbers of states are sent in digits of this base, which every dtype holds


@dataclass(frozen=True, eq=False)
class Decoder:
    """Turns last states `(rows, ...)` into images in [-1, 1], one by one.

    Args:
        call: the pipeline's call.
        outputs: answers of the pipeline's networks for one state, which stand for the true ones on the way to images.
        time: a time of its scheduler.
    """

    call: Call
    outputs: Mapping[str, Sequence[Any]]
    time: float

    def __call__(self, states: Tensor) -> Tensor:
        return torch.cat([self._image(one) for one in states.split(1)]).to(states.dtype)

    def contents(self) -> Any:
        """Return nothing: it is made of the network's pipeline."""
        return None

    def _image(self, state: Tensor) -> Tensor:
        found: list[Tensor] = []

        def finish(*args: Any, **kwargs: Any) -> None:
            found.extend([x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)][:1])
            raise Stopped

        def decode(own: Callable[..., Any]) -> Callable[..., Any]:
            def decoded(*args: Any, **kwargs: Any) -> Any:
                result = own(*args, **kwargs)
                found.append(_first(result))
                return result

            return decoded

        pipe = self.call.pipe
        patches = [(part, "decode", decode(part.decode)) for part in decoders(pipe).values()]
        for holder in vars(pipe).values():
            if type(holder).__name__.endswith("Processor"):
                patches += [(holder, name, finish) for name in dir(holder) if name.startswith("postprocess")]
        self.leave(state, patches)
        if not found:
            raise PushforwardError(f"{type(pipe).__name__} makes no images of its last state that can be caught.")
        return found[-1]

    def leave(self, state: Tensor, patches: Sequence[tuple[Any, str, Any]]) -> Any:
        """Call the pipeline with its networks passed over, and let it go on from this last state `(1, ...)`."""
        given = [(part, "forward", _given(self.outputs[name])) for name, part in parts(self.call.pipe).items()
                 if name in self.outputs]  # fmt: skip
        more = {"output_type": "pt"} if "output_type" in self.call.signature.parameters else {}
        last: list[Tensor] = []

        def step(answer: Any) -> Tensor:
            rows = [state.to(answer.state)] * (len(answer.state) // len(state))
            last.append(torch.cat(rows))
            return last[-1]

        return self.call.run([self.time], state, more=more, step=step, patches=[*given, *patches])[1]


@dataclass(frozen=True, eq=False)
class Encoder:
    """Turns images in [-1, 1] into states `(rows, *shape)`: the modes of what the pipeline's encoder would draw.

    Args:
        autoencoder: the pipeline's.
        shape: shape of a state.
        form: shape of an image as the autoencoder takes it.
        order, scale, shift: `state.flatten() = ((latents.flatten() - shift) / scale)[order]`.
    """

    autoencoder: Any
    shape: tuple[int, ...]
    form: tuple[int, ...]
    order: Tensor
    scale: Tensor
    shift: Tensor

    def contents(self) -> Any:
        """Return what it is made of besides the network's pipeline."""
        return [self.shape, self.form]

    def __call__(self, images: Tensor) -> Tensor:
        own = next(self.autoencoder.parameters())
        found = []
        for one in images.to(own).split(1):
            result = self.autoencoder.encode(one.reshape(1, *self.form))
            drawn = getattr(result, "latent_dist", None)
            latents = _first(result) if drawn is None else drawn.mode()
            found.append(latents.flatten(1).to(images.dtype))
        latents = torch.cat(found)
        order, scale, shift = (x.to(latents.device) for x in (self.order, self.scale, self.shift))
        if latents.shape[1] != len(scale):
            raise PushforwardError(
                f"{type(self.autoencoder).__name__} makes {latents.shape[1]} numbers of an image, but the pipeline "
                f"decodes {len(scale)}; it has no way from images back."
            )
        whole = (latents - shift.to(latents)) / scale.to(latents)
        return whole[:, order].unflatten(1, self.shape)


def decoders(pipe: Any) -> dict[str, Any]:
    """List the pipeline's parts that decode."""
    return {name: part for name, part in parts(pipe).items() if callable(getattr(part, "decode", None))}


def decoder_of(call: Call, state: Tensor, time: float) -> Decoder:
    """Make the way from a pipeline's states to its images.

    Args:
        call: the pipeline's call, of one image.
        state: a state `(1, ...)`.
        time: a time of its scheduler.
    """
    outputs: dict[str, list[Any]] = {}
    handles = []
    for name, part in parts(call.pipe).items():
        if name in call.denoisers:
            keep = outputs.setdefault(name, [])
            handles.append(part.register_forward_hook(lambda _, __, output, keep=keep: keep.append(detached(output))))
    try:
        with torch.no_grad():
            call.run([time], state)
    finally:
        for handle in handles:
            handle.remove()
    return Decoder(call, outputs, time)


@torch.no_grad()
def encoder_of(decoder: Decoder, state: Tensor, image: Tensor) -> Encoder | None:
    """Make the way back from images to states; `None` if the pipeline reorders, shifts and scales no numbers only.

    Args:
        decoder: the way out.
        state: a state `(1, ...)`.
        image: an image `(1, ...)`.
    """
    zero, shift, name, form = _sent(decoder, torch.zeros_like(state), whole=True)
    del zero
    if name is None or not hasattr(decoder.call.pipe.components[name], "encode"):
        return None
    scale = _sent(decoder, torch.ones_like(state))[1] - shift
    numbers = torch.arange(state.numel(), device=state.device)
    if scale.numel() != state.numel() or not bool((scale.abs() > 0).all()):
        return None
    index = torch.zeros_like(numbers)
    for digit in range(math.ceil(math.log(max(state.numel(), 2), DIGITS))):
        sent = (numbers // DIGITS**digit % DIGITS).to(state).view_as(state)
        index += ((_sent(decoder, sent)[1] - shift) / scale).round().long().flatten() * DIGITS**digit
    if not torch.equal(index.sort().values, numbers):
        return None
    assert form is not None
    if math.prod(form) != image[0].numel():
        return None
    part = decoder.call.pipe.components[name]
    made = Encoder(part, tuple(state.shape[1:]), form, index.argsort(), scale.flatten(), shift.flatten())
    try:
        return made if made(image).shape == state.shape else None
    except Exception:  # of a part that was never run in this direction
        return None


def _sent(
    decoder: Decoder, state: Tensor, *, whole: bool = False
) -> tuple[Tensor, Tensor, str | None, tuple[int, ...] | None]:
    """Send a state out; return it, what is decoded of it, by which part, and the decoded image's shape if `whole`."""
    met: list[tuple[Tensor, str]] = []
    forms: list[tuple[int, ...]] = []

    def caught(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
            met.append((latents, name))
            if whole:
                forms.append(tuple(_first(own(latents, *args, **kwargs)).shape[1:]))
            raise Stopped

        return decode

    pipe = decoder.call.pipe
    decoder.leave(state, [(part, "decode", caught(name, part.decode)) for name, part in decoders(pipe).items()])
    if not met:
        return state, state, None, None
    latents, name = met[0]
    return state, latents.to(state.dtype), name, forms[0] if forms else None


def _given(outputs: Sequence[Any]) -> Callable[..., Any]:
    """A network's call that answers what it answered before."""
    rest = list(outputs)

    def forward(*_: Any, **__: Any) -> Any:
        rest.append(rest.pop(0))
        return rest[-1]

    return forward


def _first(result: Any) -> Tensor:
    """Return the tensor of a part's output."""
    tensor: Tensor = result if isinstance(result, Tensor) else result[0]
    return tensor
