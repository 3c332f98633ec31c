"""Codes as vectors: between two of them, in the middle of many, how alike they are.

Standard normal vectors of many numbers lie near a sphere. On the straight line between two of them the norm sinks, and
such codes decode to washed-out images; the great circle keeps it.

References:
    Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985 (slerp).
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pushforward.errors import PushforwardError
from pushforward.maps.code import Code

__all__ = ["average", "interpolate", "similarity"]


def interpolate(first: Code, second: Code, weight: float | Tensor) -> Code:
    """Codes on the great circle from `first` (weight 0) to `second` (weight 1), part by part (slerp).

    Residuals, which are images, are mixed on the straight line.

    Args:
        first: codes at weight 0.
        second: codes at weight 1, of as many images, with the same parts.
        weight: one for all, or one for each image, `(count,)`.

    Raises:
        PushforwardError: the codes' parts differ.
    """
    one, other = _parts(first), _parts(second)
    _check_alike(one, other)
    w = torch.as_tensor(weight, dtype=torch.float64, device=getattr(weight, "device", "cpu")).expand(len(first))
    return _code({name: _between(a, other[name], w, straight=name == "residual") for name, a in one.items()})


def average(code: Code) -> Code:
    """One code in the middle of all images': their mean, part by part, with the norm that theirs have on average."""

    def middle(name: str, a: Tensor) -> Tensor:
        mean = a.mean(0, keepdim=True)
        norm = a.flatten(1).norm(dim=1).mean()
        return mean if name == "residual" else mean * (norm / mean.norm().clamp_min(torch.finfo(a.dtype).tiny))

    return _code({name: middle(name, a) for name, a in _parts(code).items()})


def similarity(first: Code, second: Code) -> dict[str, Tensor]:
    """Cosine similarity of each image's two codes, `(count,)`, of each part and of all of them together (`code`).

    That of codes drawn independently is 0, with a standard deviation of one over the root of the number of values.

    Raises:
        PushforwardError: the codes' parts differ.
    """
    one, other = _parts(first), _parts(second)
    _check_alike(one, other)
    a, b = (torch.cat([x.flatten(1) for x in parts.values()], 1) for parts in (one, other))
    alike = {name: cosine_similarity(x.flatten(1), other[name].flatten(1), dim=1) for name, x in one.items()}
    return {**alike, "code": cosine_similarity(a, b, dim=1)}


def _between(a: Tensor, b: Tensor, w: Tensor, *, straight: bool) -> Tensor:
    x, y = a.double().flatten(1), b.double().flatten(1)
    angle = torch.acos(cosine_similarity(x, y, dim=1).clamp(-1, 1))
    flat = (angle.sin() < 1e-6) | straight  # the same direction or opposite ones: no circle of its own
    left = torch.where(flat, 1 - w, ((1 - w) * angle).sin() / angle.sin())
    right = torch.where(flat, w, (w * angle).sin() / angle.sin())
    return (left[:, None] * x + right[:, None] * y).view_as(a).to(a)


def _parts(code: Code) -> dict[str, Tensor]:
    """What a code has, each `(count, ...)`."""
    parts = {field.name: getattr(code, field.name) for field in fields(code)}
    return {name: x.movedim(1, 0) if name == "noises" else x for name, x in parts.items() if x is not None}


def _code(parts: dict[str, Tensor]) -> Code:
    return Code(**{name: x.movedim(0, 1) if name == "noises" else x for name, x in parts.items()})


def _check_alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    shapes = [", ".join(f"{name} {tuple(x.shape)}" for name, x in parts.items()) for parts in (one, other)]
    if shapes[0] != shapes[1]:
        raise PushforwardError(
            f"Only codes of as many images, made by plans of one shape, can be compared: {shapes[0]}; {shapes[1]}."
        )
