"""White codes: those whose spectra have the norms that Gaussian noise has, band after band.

A part of a code (one channel of its start, or of one of its noises) is transformed by an orthonormal FFT over its
field, and its frequencies are sorted by wavelength into bands. `n` numbers of Gaussian noise lie in a band of `n`
frequencies, with a squared norm near `n`; a `white` part has exactly these norms. Such parts form a product of spheres,
and directions at one of them are made `tangent` by dropping, in each band, what changes its norm:

    field = bands((3, 64, 64))
    code = white(code - 0.1 * tangent(code, gradient, field), field)

Codes of no field, such as a GAN's, have one band, and so have those of fields too small for several.

References:
    Noise-preserving optimisation, Hwang & Sung, arXiv 2602.08646 (spectral blocks of white noise).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from pushforward.execute.system import root_mean_square

__all__ = ["bands", "evened", "norms", "tangent", "white"]

_LEAST = 16  # numbers of the first band, whose squared norm deviates by a third from its mean
_FAINT = 1e-3  # of the strongest band: what is weaker is not made as strong, lest rounding count


@lru_cache(maxsize=4)
def bands(shape: tuple[int, ...]) -> Tensor:
    """The band of each frequency, counted from 0 as wavelengths shorten.

    Args:
        shape: shape of a part of a code, `(channels, *field)`.

    Returns:
        Whole numbers, of the field's shape; zeros `(channels * field,)` if the field is too small for two bands.
    """
    field = shape[1:]
    if math.prod(field) < 3 * _LEAST or len(shape) < 2:
        return torch.zeros(math.prod(shape), dtype=torch.long, device="cpu")
    axes = torch.meshgrid(*(torch.fft.fftfreq(n, dtype=torch.float64, device="cpu") for n in field), indexing="ij")
    frequency = torch.stack(axes).square().sum(0).mul(1e9).round()  # the same for mirrored ones, which stay together
    _, ring, sizes = frequency.unique(return_inverse=True, return_counts=True)
    lower = torch.cat([sizes.cumsum(0) - sizes, sizes.sum()[None]])
    band = ((1 + 8 * lower / _LEAST).sqrt() / 2 - 0.5).floor().long()  # band k has about k + 1 times the least
    return band[:-1].clamp_max(band[-1] - 1)[ring]  # what is left of the last joins the one before


def norms(x: Tensor, field: Tensor) -> Tensor:
    """The root mean squares of variables `(count, numbers)` in their bands, `(count, parts, bands)`; 1 if white."""
    return _norms(_spectrum(x, field), field)


def white(x: Tensor, field: Tensor) -> Tensor:
    """The nearest white variables to `x (count, numbers)`, whose bands are those that `bands` gave."""
    spectrum = _spectrum(x, field)
    size = _norms(spectrum, field).clamp_min(torch.finfo(x.dtype).tiny)
    return _variables(spectrum / size[..., field], x)


def evened(direction: Tensor, field: Tensor, power: Tensor) -> Tensor:
    """Directions `(count, numbers)` of root mean square 1, in whose bands `r^(1 - power)` takes the place of r.

    Along minus such a direction a function of this gradient falls most, of all directions of one length, which is the
    sum of `r^((2 - power) / (1 - power))` over all numbers, each with the r of its band. With the power 0 that is
    Euclid's length; with 1, the greatest r; below 0, few strong bands cost less. What is mere rounding stays faint.

    Args:
        direction: directions, or gradients.
        field: bands of frequencies.
        power: `(count,)`.
    """
    spectrum = _spectrum(direction, field)
    size = _norms(spectrum, field)
    tiny = torch.finfo(direction.dtype).tiny
    size = torch.maximum(size, _FAINT * size.amax((1, 2), keepdim=True)).clamp_min(tiny)
    changed = _variables(spectrum / size.pow(power[:, None, None])[..., field], direction)
    return changed / root_mean_square(changed, 1).clamp_min(tiny)[:, None]


def tangent(x: Tensor, direction: Tensor, field: Tensor) -> Tensor:
    """The part of directions `(count, numbers)` that keeps the norms of all bands of `x`, to first order."""
    at, along = _spectrum(x, field), _spectrum(direction, field)
    radial = _sums(at, field, along) / _sums(at, field).clamp_min(torch.finfo(x.dtype).tiny)
    return _variables(along - radial[..., field] * at, x)


def _spectrum(x: Tensor, field: Tensor) -> Tensor:
    """The orthonormal spectrum, `(count, parts, *field)`."""
    return torch.fft.fftn(x.reshape(len(x), -1, *field.shape), dim=tuple(range(-field.ndim, 0)), norm="ortho")


def _variables(spectrum: Tensor, like: Tensor) -> Tensor:
    dims = tuple(range(2, spectrum.ndim))
    return torch.fft.ifftn(spectrum, dim=dims, norm="ortho").real.reshape(like.shape)


def _sums(a: Tensor, field: Tensor, b: Tensor | None = None) -> Tensor:
    """Inner products of spectra in every band, `(count, parts, bands)`."""
    b = a if b is None else b
    products = (a.real * b.real + a.imag * b.imag).flatten(2)
    sums = products.new_zeros(*products.shape[:2], int(field.max()) + 1)
    return sums.index_add_(2, field.flatten(), products)


def _norms(spectrum: Tensor, field: Tensor) -> Tensor:
    """The root mean square in every band, `(count, parts, bands)`."""
    return _sums(spectrum, field).div(field.flatten().bincount()).sqrt()
