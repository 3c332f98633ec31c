"""Energies: one number per image, low where the image is as wanted.

An energy is any function `(images, code) -> (count,)`, or `(images) -> (count,)`, that PyTorch differentiates (the
samplers `ess` and `pcn` ask for its values alone); the images are in [-1, 1], `(count, channels, height, width)`, and
the `Code` is what they were decoded from. An `Energy` is a weighted sum of such functions that knows the name of each:

    energy = 5 * classifier(network, label=7) + near(image) + of(lambda images, code: images.mean((1, 2, 3)), "dark")

The value of an image must not depend on the others of its batch, nor change from call to call: a sampler of codes
asks for the same energy again and again, and the energy defines what it samples. Random views of an image are drawn
once, when the energy is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from pushforward.denoiser import at_least_float32
from pushforward.errors import PushforwardError
from pushforward.maps.code import Code

__all__ = ["Energy", "Function", "Term", "check_finite", "of", "total", "values_of"]

Function = Callable[[Tensor, Code], Tensor]


@dataclass(frozen=True, eq=False)
class Term:
    """One part of an energy.

    Args:
        name: name for reports and messages.
        function: function `(images, code) -> (count,)`.
        weight: factor of its values.
    """

    name: str
    function: Function
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Energy:
    """A weighted sum of named functions of images and codes; `+` joins sums, a number times one weights it."""

    terms: tuple[Term, ...]

    def __call__(self, images: Tensor, code: Code) -> Tensor:
        """Return the sum, `(count,)`; see `parts`."""
        return sum(self.parts(images, code).values(), images.new_zeros(len(images)))

    def parts(self, images: Tensor, code: Code, *, gradient: bool = True) -> dict[str, Tensor]:
        """Return the value of each term times its weight, `(count,)`, by the term's name.

        Args:
            images: images in [-1, 1], `(count, channels, height, width)`; terms see them in float32 at least.
            code: the code that they were decoded from.
            gradient: whether every term must have one, where images or codes do.

        Raises:
            PushforwardError: a term gives a shape other than `(count,)`, or no gradient where one is needed.
        """
        wanted = gradient and torch.is_grad_enabled() and (images.requires_grad or code.start.requires_grad)
        images, found = images.to(at_least_float32(images.dtype)), {}  # sums of 16 bits are no energies
        for term in self.terms:
            value: object = term.function(images, code)
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            if not isinstance(value, Tensor) or shape != (len(images),):
                raise PushforwardError(
                    f"Energy {term.name!r} must give one number per image, shape ({len(images)},); it gave {shape}."
                )
            if wanted and not value.requires_grad:
                raise PushforwardError(
                    f"Energy {term.name!r} has no gradient; compute it from the images or the code with PyTorch's "
                    "differentiable functions, without detach(), no_grad() or numpy; or sample by ess or pcn, which "
                    "need none."
                )
            if value.is_meta or value.is_complex():
                raise PushforwardError(
                    f"Energy {term.name!r} must give real numbers; it gave {value.dtype} on {value.device}."
                )
            found[term.name] = term.weight * value.to(images.device, at_least_float32(value.dtype))
        return found

    def __add__(self, other: Energy | Function) -> Energy:
        terms = self.terms
        for term in of(other).terms:
            names = {known.name for known in terms}
            name = next(n for k in range(1, len(names) + 2) if (n := term.name + f" {k}" * (k > 1)) not in names)
            terms = (*terms, replace(term, name=name))
        return Energy(terms)

    def __radd__(self, other: Function | Literal[0]) -> Energy:
        """Add a function and an energy, or 0 and an energy, as `sum` does."""
        return self if other == 0 else of(other) + self

    def __mul__(self, weight: float) -> Energy:
        return Energy(tuple(replace(term, weight=weight * term.weight) for term in self.terms))

    __rmul__ = __mul__


def of(function: Function | Callable[[Tensor], Tensor] | Energy, name: str | None = None) -> Energy:
    """Make an energy of a function; an energy is returned as it is.

    Args:
        function: function `(images, code) -> (count,)`, or of the images alone.
        name: name for reports; by default the function's own.

    Raises:
        PushforwardError: it is neither.
    """
    if isinstance(function, Energy):
        return function
    if not callable(function):
        raise PushforwardError(f"An energy is a function of images, one number for each; got {function!r}.")
    own = str(getattr(function, "__name__", type(function).__name__))
    if not _takes_code(function):
        return Energy((Term(name or own, _of_images(cast(Callable[[Tensor], Tensor], function))),))
    return Energy((Term(name or own, cast(Function, function)),))


def total(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of all terms, `(count,)`, from their values by name."""
    return torch.stack([*parts.values()]).sum(0)


def values_of(energy: Energy, images: Tensor, code: Code, batch: int) -> dict[str, Tensor]:
    """Return the values of each term for images, `(count,)` by name, float64 on the CPU, so many at a time."""
    parts = []
    for some in torch.arange(len(images), device="cpu").split(batch):
        with torch.enable_grad():  # which energies may take themselves
            shown = images[some].to(code.start.device).requires_grad_()
            found = energy.parts(shown, code[some], gradient=False)
        parts.append({name: value.detach().double().cpu() for name, value in found.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def check_finite(parts: Mapping[str, Tensor], where: str, first: int = 0) -> None:
    """Raise unless all values are finite, by the energy's name; images are counted from `first`.

    Args:
        parts: values `(count,)` by name.
        where: what the images are and when, with `{}` for the number.
        first: number of the first one.

    Raises:
        PushforwardError: a value is not finite.
    """
    for name, value in parts.items():
        bad = (~value.isfinite()).nonzero()
        if len(bad):
            place = where.format(first + int(bad[0]))
            raise PushforwardError(
                f"Energy {name!r} is {value[bad[0]].item()} for {place}; it must be finite for any image."
            )


def _takes_code(function: Callable[..., Tensor]) -> bool:
    """Say whether a function takes the code: a second argument with a default is a setting, unless called `code`."""
    called = function.forward if isinstance(function, nn.Module) else function
    if isinstance(called, torch.ScriptMethod):
        return len(called.schema.arguments) > 2  # itself and the images
    try:
        own = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):  # of one that is built in
        return True
    placed = [one for one in own if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    several = any(one.kind is one.VAR_POSITIONAL for one in own)
    return several or any(one.default is one.empty or one.name == "code" for one in placed[1:])


def _of_images(function: Callable[[Tensor], Tensor]) -> Function:
    return lambda images, _: function(images)
