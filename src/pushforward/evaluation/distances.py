r"""Distances between two sets of images, from their features.

- The **Fréchet distance** of the Gaussians fitted to the features, `|m - m'|^2 + tr(C + C' - 2 (C C')^1/2)` (Heusel et
  al., arXiv 1706.08500). Its estimate from n images is too large by about `c / n`; `extrapolated` removes that by a
  straight line in `1 / n` (Chong & Forsyth, arXiv 1911.07023).
- The **kernel distance**, the unbiased estimate of the squared maximum mean discrepancy for the kernel
  `(x . y / d + 1)^3` (Bińkowski et al., arXiv 1801.01401). It may come out below zero.
- **Precision, recall** (Kynkäänniemi et al., arXiv 1904.06991), **density, coverage** (Naeem et al., arXiv 2002.09797):
  shares of images near the other set, a ball around each image reaching to its k-th neighbour.

Standard errors are those of a bootstrap over the generated images; the same `rows` for two samplers that began at the
same codes give the error of their ratio. (`torchmetrics` has the first two, for one set at a time and without
resampling, at thirty times the time; the tests compare with it.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pushforward.data.memory import check_memory
from pushforward.errors import PushforwardError

__all__ = [
    "FEWEST", "Reference", "Sample", "distances", "extrapolated", "neighbourhoods", "resamples", "standard_error",
]  # fmt: skip

FEWEST = 100  # images; fewer say nothing of a distribution
MOST = 10_000  # images compared pair by pair; the Fréchet distance takes all
_SIZES = (0.25, 0.4, 0.55, 0.7, 0.85, 1.0)  # parts of the images that the extrapolation looks at


@dataclass(frozen=True, eq=False)
class Reference:
    """The real images: a Gaussian, and the features themselves where they are known.

    Args:
        mean: mean of the features, `(d,)`, float64.
        covariance: covariance of the features, `(d, d)`, float64.
        features: features of at most `MOST` images, `(m, d)`, or `None` for published statistics.
    """

    mean: Tensor
    covariance: Tensor
    features: Tensor | None = None

    @classmethod
    def of(cls, features: Tensor) -> Reference:
        """From features `(m, d)`.

        Raises:
            PushforwardError: too few images, or values that are not finite.
        """
        x = _checked(features, "reference")
        return cls(x.mean(0), x.T.cov(), _evenly(x, MOST))

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp_min(0).sqrt()) @ vectors.T

    @cached_property
    def kernel(self) -> float:
        """The mean of the kernel over pairs of different reference images."""
        assert self.features is not None
        total = sum(_kernel(some, self.features).sum() for some in self.features.split(2048))
        count = len(self.features)
        return float((total - _own(self.features).sum()) / (count * (count - 1)))


class Sample:
    """Generated images to compare with a reference.

    Args:
        features: features of the images, `(n, d)`.
        reference: reference with features of the same network.

    Raises:
        PushforwardError: there are too few images, features of another width, or values that are not finite.
    """

    def __init__(self, features: Tensor, reference: Reference) -> None:
        self.features, self.reference = _checked(features, "generated"), reference
        if self.features.shape[1] != len(reference.mean):
            raise PushforwardError(
                f"Features of {self.features.shape[1]} numbers cannot be compared with {len(reference.mean)}."
            )

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def _seen(self) -> Tensor:
        """The features times the reference's root: all that the trace of the Fréchet distance needs."""
        return self.features @ self.reference.root

    def frechet(self, rows: Tensor | None = None) -> float:
        """Return the Fréchet distance, of the images `rows` (all by default, with repetitions if it has them)."""
        x, seen = (self.features, self._seen) if rows is None else (self.features[rows], self._seen[rows])
        n, reference = len(x), self.reference
        centred, seen = x - x.mean(0), seen - seen.mean(0)
        gram = seen @ seen.T if n < x.shape[1] else seen.T @ seen
        overlap = (torch.linalg.eigvalsh(gram).clamp_min(0) / (n - 1)).sqrt().sum()
        spread = centred.square().sum() / (n - 1) + reference.covariance.trace()
        return float((x.mean(0) - reference.mean).square().sum() + spread - 2 * overlap)

    @cached_property
    def _kernels(self) -> tuple[Tensor, Tensor]:
        """The kernel between the images, and its mean between each and the reference."""
        assert self.reference.features is not None
        cross = torch.cat([_kernel(some, self.reference.features).mean(1) for some in self.features.split(2048)])
        return _kernel(self.features, self.features), cross

    def kernel(self, rows: Tensor | None = None) -> float:
        """Return the kernel distance, of the images `rows`."""
        own, cross = self._kernels
        n = len(self)
        drawn = torch.ones(n, device="cpu") if rows is None else torch.bincount(rows, minlength=n)
        weights = drawn.to(own)
        count = float(weights.sum())
        pairs = weights @ own @ weights - weights.square() @ own.diagonal()
        # Two copies of an image are no pair of different ones: the pairs left are count^2 - sum of squares.
        mean = pairs / (count**2 - float(weights.square().sum()))
        return float(mean - 2 * (weights @ cross) / count) + self.reference.kernel


def extrapolated(sample: Sample, *, seed: int = 0, draws: int = 8, rows: Tensor | None = None) -> float | None:
    """Return the Fréchet distance of infinitely many images, by a straight line in 1 / n through subsets of the images.

    Args:
        sample: the images.
        seed: seed of the subsets.
        draws: subsets of each size.
        rows: images to use; by default all.

    Returns:
        The distance, or `None` where the smallest subset has not twice as many images as a feature has numbers: below
        that the error is no straight line.
    """
    rows = torch.arange(len(sample), device="cpu") if rows is None else rows
    sizes = [int(part * len(rows)) for part in _SIZES]
    if sizes[0] < 2 * sample.features.shape[1]:
        return None
    generator = torch.Generator().manual_seed(seed)
    inverse, values = [], []
    for n in sizes:
        for _ in range(draws if n < len(rows) else 1):
            inverse.append(1 / n)
            values.append(sample.frechet(rows[torch.randperm(len(rows), generator=generator, device="cpu")[:n]]))
    # The variance of a subset's distance falls with its size, and a size's weight does not grow with its draws.
    weights = np.sqrt([1 / k / (1 if k == inverse[-1] else draws) for k in inverse])
    return float(np.polynomial.polynomial.polyfit(inverse, values, 1, w=weights)[0])


def resamples(count: int, times: int, seed: int = 0) -> list[Tensor]:
    """Return rows of a bootstrap: `times` draws of `count` of `count` images with repetition."""
    check_memory(8 * count * times, f"{times:,} resamples of {count:,} images")
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(count, (count,), generator=generator, device="cpu") for _ in range(times)]


def distances(sample: Sample, rows: list[Tensor], seed: int) -> dict[str, float]:
    """Return the Fréchet distance and, where the reference has features, the kernel distance, with standard errors.

    Args:
        sample: the images.
        rows: resamples of them.
        seed: seed of the resamples of fewer, where the kernel of all pairs of images would not fit.
    """
    found = {
        "frechet": sample.frechet(),
        "frechet_error": standard_error([sample.frechet(draw) for draw in rows]),
    }
    if sample.reference.features is None:
        return found
    some = Sample(sample.features[:MOST], sample.reference)
    draws = rows if len(some) == len(sample) else resamples(len(some), len(rows), seed)
    return found | {
        "kernel": some.kernel(),
        "kernel_error": standard_error([some.kernel(draw) for draw in draws]),
    }


def neighbourhoods(sample: Sample, k: int = 5) -> dict[str, float]:
    """Return precision, recall, density and coverage with balls that reach to the `k`-th neighbour.

    As many reference images as generated ones are compared, since all four depend on the counts. Where one set is
    several times as large as the other, they are means over as many parts of it, evenly taken, and so vary less.
    """
    assert sample.reference.features is not None
    real, fake = sample.reference.features, sample.features
    count = min(len(real), len(fake), MOST)
    pairs = [_near(x, y, k) for x in _parts(real, count) for y in _parts(fake, count)]
    return {name: sum(one[name] for one in pairs) / len(pairs) for name in pairs[0]}


def _near(real: Tensor, fake: Tensor, k: int) -> dict[str, float]:
    """Precision, recall, density and coverage of two sets of one size."""
    between = torch.cdist(real, fake)
    real_radius, fake_radius = (_radius(x, k) for x in (real, fake))
    inside = between <= real_radius[:, None]
    return {
        "precision": float(inside.any(0).double().mean()),
        "recall": float((between <= fake_radius).any(1).double().mean()),
        "density": float(inside.double().sum(0).mean() / k),
        "coverage": float(inside.any(1).double().mean()),
    }


def _parts(x: Tensor, count: int) -> list[Tensor]:
    """Disjoint sets of `count` of the rows, each evenly taken, as many as there are."""
    number = len(x) // count
    return [_evenly(x[part::number], count) for part in range(number)]


def standard_error(values: Sequence[float]) -> float:
    """Return the standard deviation of what resamples gave."""
    return float(np.std(values, ddof=1))


def _radius(x: Tensor, k: int) -> Tensor:
    """Return the distance of every point to its k-th neighbour, itself not counted."""
    return torch.cdist(x, x).kthvalue(k + 1).values


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _own(x: Tensor) -> Tensor:
    return (x.square().sum(1) / x.shape[1] + 1) ** 3


def _evenly(x: Tensor, count: int) -> Tensor:
    """Return `count` of the rows, evenly taken, or all if there are fewer."""
    rows = torch.linspace(0, len(x) - 1, min(count, len(x)), dtype=torch.float32, device="cpu").round().long()
    return x[rows]


def _checked(features: Tensor, which: str) -> Tensor:
    if features.ndim != 2 or len(features) < FEWEST:
        count = len(features) if features.ndim else 0
        raise PushforwardError(f"A distance needs at least {FEWEST} {which} images; there are {count}.")
    features = features.double()
    if not bool(features.isfinite().all()):
        raise PushforwardError(
            f"Features of the {which} images are not finite; the model or the feature network is broken."
        )
    return features
