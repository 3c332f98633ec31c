"""Images of a pipeline's states and states of images, by the pipeline's own decoder and packing.

States come out as the pipeline brings its last one to images: it is called with its networks passed over. The way in is
the way out turned round: between the last state and what the autoencoder decodes, pipelines reorder numbers and shift
and scale each, which is learned by sending numbered states through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pushforward.data.faults import FAULTS, reason
from pushforward.errors import PushforwardError
from pushforward.model.diffusers.calls import Call
from pushforward.model.diffusers.entrance import numbered
from pushforward.model.diffusers.patches import alone, as_wide, callee, parts
from pushforward.model.diffusers.standin import Answer, Stopped

__all__ = ["Decoder", "Encoder", "decoder_of", "encoder_of"]


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

    @alone
    def __call__(self, states: Tensor) -> Tensor:
        return torch.cat([self.caught(one) for one in states.split(1)]).to(states.dtype)

    def contents(self) -> Any:
        """Return nothing: it is made of the network's pipeline."""
        return None

    def caught(self, state: Tensor, patches: Sequence[tuple[Any, str, Any]] = ()) -> Tensor:
        """Return the image of a last state `(1, ...)`, with other decoders if `patches` put them in their place."""
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
        own = {id(part): value for part, _, value in patches}
        replaced = [(part, "decode", decode(own.get(id(part), part.decode))) for part in decoders(pipe).values()]
        for holder in vars(pipe).values():
            if "Processor" in type(holder).__name__:
                replaced += [(holder, name, finish) for name in dir(holder) if name.startswith("postprocess")]
        self.leave(state, replaced)
        if not found:
            raise PushforwardError(f"{type(pipe).__name__} makes no images of its last state that can be caught.")
        return found[-1]

    def leave(self, state: Tensor, patches: Sequence[tuple[Any, str, Any]]) -> Any:
        """Call the pipeline with its networks passed over, and let it go on from this last state `(1, ...)`."""
        given = [(part, callee(part), _given(part, self.outputs[name])) for name, part in parts(self.call.pipe).items()
                 if name in self.outputs]  # fmt: skip
        more = {"output_type": "pt"} if "output_type" in self.call.signature.parameters else {}

        def step(answer: Answer) -> Tensor:
            return torch.cat([state.to(answer.state)] * (len(answer.state) // len(state)))

        return self.call.run([self.time], state, more=more, step=step, patches=[*given, *patches])[1]


@dataclass(frozen=True, eq=False)
class Encoder:
    """Turns images in [-1, 1] into states `(rows, *shape)`: the modes of what the pipeline's encoder would draw.

    Args:
        pipe, name: the pipeline, and its autoencoder's name in it.
        shape: shape of a state.
        forms: shapes of what it decodes an image's latents to, one per call.
        pixels: `decoded.flatten() = image.flatten()[pixels]`.
        numbers, scale, shift: `state.flatten() = ((latents.flatten() - shift) / scale)[numbers]`.
    """

    pipe: Any
    name: str
    shape: tuple[int, ...]
    forms: tuple[tuple[int, ...], ...]
    pixels: Tensor
    numbers: Tensor
    scale: Tensor
    shift: Tensor

    def contents(self) -> Any:
        """Return what it is made of besides the network's pipeline."""
        return [self.shape, self.forms]

    @alone
    def __call__(self, images: Tensor) -> Tensor:
        part = getattr(self.pipe, self.name)
        with as_wide(part):
            if part.dtype == torch.float16 and part.config.get("force_upcast"):  # pipelines widen it for images, too
                part.to(torch.float32)
            states = torch.stack([self._state(part, one) for one in images])
        if callable(free := getattr(self.pipe, "maybe_free_model_hooks", None)):
            free()
        return states

    def _state(self, autoencoder: Any, image: Tensor) -> Tensor:
        decoded = image.flatten()[self.pixels.to(image.device)].to(self.pipe._execution_device, autoencoder.dtype)
        latents = []
        for part, form in zip(decoded.split([math.prod(form) for form in self.forms]), self.forms, strict=True):
            result = autoencoder.encode(part.view(form))
            drawn = getattr(result, "latent_dist", None)
            latents.append((_first(result) if drawn is None else drawn.mode()).flatten())
        whole = torch.cat(latents).to(image)
        if len(whole) != len(self.scale):
            raise PushforwardError(
                f"{type(autoencoder).__name__} makes {len(whole)} numbers of an image, but decodes "
                f"{len(self.scale)}; the pipeline has no way back from images."
            )
        numbers, scale, shift = (x.to(whole.device) for x in (self.numbers, self.scale, self.shift))
        return ((whole - shift) / scale)[numbers].view(self.shape)


def decoders(pipe: Any) -> dict[str, Any]:
    """List the pipeline's parts that decode."""
    return {name: part for name, part in parts(pipe).items() if callable(getattr(part, "decode", None))}


@alone
def decoder_of(call: Call, state: Tensor, time: float) -> Decoder:
    """Make the way from a pipeline's states to its images.

    Args:
        call: the pipeline's call, of one image.
        state: a state `(1, ...)`.
        time: a time of its scheduler.
    """
    outputs: dict[str, list[Any]] = {}

    def kept(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        outputs[name] = []

        @wraps(own)
        def called(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            outputs[name].append(detached(output))
            return output

        return called

    asked = {name: part for name, part in parts(call.pipe).items() if name in call.denoisers}
    with torch.no_grad():
        call.run([time], state, patches=[(part, callee(part), kept(name, getattr(part, callee(part))))
                                         for name, part in asked.items()])  # fmt: skip
    return Decoder(call, outputs, time)


@alone
@torch.no_grad()
def encoder_of(decoder: Decoder, state: Tensor, image: Tensor) -> Encoder:
    """Make the way back from images to states.

    Args:
        decoder: the way out.
        state: a state `(1, ...)`.
        image: its image `(1, ...)`.

    Raises:
        PushforwardError: the pipeline has no encoder, or one that cannot be run, or does more with the numbers of a
            state than to reorder, shift and scale each.
    """
    made: list[tuple[str, Any]] = []
    pipe = decoder.call.pipe

    def kept(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def decode(*args: Any, **kwargs: Any) -> Any:
            made.append((name, own(*args, **kwargs)))
            return made[-1][1]

        return decode

    decoder.caught(state, [(part, "decode", kept(name, part.decode)) for name, part in decoders(pipe).items()])
    names = {name for name, _ in made}
    name = next(iter(names), "")
    if len(names) != 1 or not callable(getattr(pipe.components[name], "encode", None)):
        raise PushforwardError(f"{type(pipe).__name__} has no encoder beside what decodes its states.")
    results = [result for _, result in made]
    shift = _sent(decoder, torch.zeros_like(state), results)[0]
    scale = _sent(decoder, torch.ones_like(state), results)[0] - shift
    used = scale != 0
    scale = torch.where(used, scale, 1)
    numbers = numbered(state, lambda digits: ((_sent(decoder, digits, results)[0] - shift) / scale)[used])
    forms = tuple(tuple(_first(result).shape) for result in results)
    whole = torch.zeros(sum(map(math.prod, forms)), device=image.device)
    pixels = numbered(whole, lambda digits: _sent(decoder, state, results, digits)[1].flatten())
    if numbers is None or pixels is None or len(numbers) != state.numel() or len(pixels) != len(whole):
        raise PushforwardError(
            f"{type(pipe).__name__} does more between states and images than decode, reorder, shift and scale."
        )
    found = used.nonzero()[:, 0][numbers.argsort()]
    back = Encoder(pipe, name, tuple(state.shape[1:]), forms, pixels.argsort(), found, scale, shift)
    try:
        back(image)
    except PushforwardError:
        raise
    except (*FAULTS, AssertionError) as error:  # of a part that was never run in this direction
        raise PushforwardError(f"The encoder of {type(pipe).__name__} cannot be run: {reason(error)}.") from error
    return back


def _sent(
    decoder: Decoder, state: Tensor, results: Sequence[Any], digits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Send a state out past the autoencoder; return what it would decode, flat, and the image.

    Args:
        decoder: the way out.
        state: the state.
        results: what the autoencoder returns, one per call.
        digits: numbers to put into these in turn.
    """
    met: list[Tensor] = []
    rest = list(results)
    values = list(() if digits is None else digits.split([_first(result).numel() for result in results]))

    def decode(latents: Tensor, *_: Any, **__: Any) -> Any:
        met.append(latents.flatten())
        result = rest.pop(0)
        if not values:
            return result
        filled = values.pop(0).view_as(_first(result)).to(_first(result))
        if isinstance(result, Tensor):
            return filled
        return (filled,) if isinstance(result, tuple) else type(result)(filled)

    patches = [(part, "decode", decode) for part in decoders(decoder.call.pipe).values()]
    image = decoder.caught(state, patches)
    return torch.cat(met).to(state.dtype), image


def _given(part: Any, outputs: Sequence[Any]) -> Callable[..., Any]:
    """A network's call that answers what it answered before."""
    rest = list(outputs)

    @wraps(part.forward)
    def forward(*_: Any, **__: Any) -> Any:
        rest.append(rest.pop(0))
        return rest[-1]

    return forward


def _first(result: Any) -> Tensor:
    """Return the tensor of a part's output."""
    tensor: Tensor = result if isinstance(result, Tensor) else result[0]
    return tensor


def detached(value: Any) -> Any:
    """The same structure with tensors cut from their graph."""
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, value)
