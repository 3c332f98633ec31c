"""Energies of the code alone: how unlike Gaussian noise it is.

Chains that sample `N(z; 0, I) exp(-E)` include the Gaussian already, and need none of these. An optimiser that only
descends has no other reason to stay among the codes that the model knows.

A Gaussian code of `d` numbers nearly always has a norm near `sqrt(d)`, while its density is greatest at 0. `gaussian`
pulls to 0, `chi` to the usual norm, and `concentration` penalises other regularities that an optimiser puts into a
code.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.guidance.energies.energy import Energy, of
from pushforward.maps.code import Code

__all__ = ["chi", "concentration", "gaussian"]

_MOST = 10_000  # most shuffles, all of which are kept


def gaussian() -> Energy:
    """Make `||z||^2 / 2` of the code's variables, minus the logarithm of their density up to a constant."""
    return of(lambda _, code: code.variables().square().sum(1) / 2, "gaussian")


def chi() -> Energy:
    """Make minus the log density of the norm of a Gaussian code, 0 at its least, where `||z||^2 = d - 1`.

    It is `||z||^2 / 2 - (d - 1) log ||z||` less its minimum, that is `(d - 1) (q - 1 - log q) / 2` with `q = ||z||^2 /
    (d - 1)`: the norm follows the chi distribution with `d` degrees of freedom.

    Raises:
        PushforwardError: when called with codes of a single number, whose norm says nothing.

    References:
        The regulariser of ReNO, Eyring et al., arXiv 2406.04312, after Samuel et al., arXiv 2306.08687.
    """

    def energy(images: Tensor, code: Code) -> Tensor:  # noqa: ARG001 - of a code alone
        z = code.variables()
        rest = z.shape[1] - 1
        if rest < 1:
            raise PushforwardError("Energy 'chi' needs codes of at least 2 numbers; these have 1. Use 'gaussian'.")
        more = (z.square().sum(1) - rest) / rest
        return rest * (more - more.log1p()) / 2

    return of(energy, "chi")


def concentration(chunk: int = 4, shuffles: int = 100, *, seed: int = 0) -> Energy:
    """Make minus the logarithm of a bound on how probable a code is among Gaussian ones, by two of its statistics.

    The code is cut into `m = d // k` vectors `z_i` of `k` numbers. For Gaussian codes, the norm `M` of their mean and
    the spectral norm `S` of `sum z_i z_i^T / m - I` obey

        P(norm > M) <= min(1, 2 exp(-m M^2 / (2 k)))
        P(spectral norm > S) <= min(1, 2 exp(-m max(0, sqrt(1 + S) - 1 - sqrt(k / m))^2 / 2)),

    and the energy is minus the logarithms of both: little or nothing for Gaussian codes, much for constant, repeated or
    too large ones. The bounds hold for the numbers in any order, so the energy is that of the code as it is plus the
    mean over fixed random shuffles.

    Args:
        chunk: length `k` of the vectors; 4 in the authors' code.
        shuffles: number of shuffles; 100 in the authors' code. Time and memory grow with it.
        seed: seed of the shuffles.

    Raises:
        PushforwardError: the chunk is below 1, or there are no or too many shuffles; when called, codes have fewer than
            `chunk^2` numbers.

    References:
        The probability regularisation of Direct Noise Optimization, Tang et al., arXiv 2405.18881, and their released
        code; the bounds are in Wainwright, High-Dimensional Statistics, 2019.
    """
    if chunk < 1 or not 1 <= shuffles <= _MOST:
        raise PushforwardError(
            f"Energy 'concentration' needs a chunk of at least 1 and 1 to {_MOST} shuffles; got {chunk}, {shuffles}."
        )

    @cache
    def orders(numbers: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randperm(numbers, generator=generator, dtype=torch.int32, device="cpu") for _ in range(shuffles)]

    def energy(images: Tensor, code: Code) -> Tensor:  # noqa: ARG001 - of a code alone
        z = code.variables()
        numbers = z.shape[1]
        if numbers < chunk**2:
            raise PushforwardError(
                f"Energy 'concentration' with chunk {chunk} needs codes of {chunk**2} numbers; these have {numbers}."
            )
        improbable = _improbable([z, *(z.index_select(1, order.to(z.device)) for order in orders(numbers))], chunk)
        return improbable[0] + improbable[1:].mean(0)

    return of(energy, "concentration")


def _improbable(orders: list[Tensor], chunk: int) -> Tensor:
    """Return minus the logarithms of the two bounds, `(orders, count)`, for codes `(count, d)` in several orders."""
    many = orders[0].shape[1] // chunk
    means, covariances = [], []
    for z in orders:
        vectors = z[:, : many * chunk].reshape(len(z), many, chunk)
        means.append(vectors.mean(1))
        covariances.append(vectors.mT @ vectors / many)
    norm = torch.stack(means).square().sum(-1)
    spectral = (torch.linalg.eigvalsh(torch.stack(covariances)) - 1).abs().amax(-1)
    beyond = ((1 + spectral).sqrt() - 1 - math.sqrt(chunk / many)).relu()
    bounds = many * norm / (2 * chunk), many * beyond.square() / 2
    return sum(((bound - math.log(2)).relu() for bound in bounds), torch.zeros_like(norm))
