"""Watermarks: patterns that a key puts into codes, and that are found again in codes that were read from images.

Over keys, a marked code is distributed exactly as any code, N(0, I), so that the images are too.

`Bits` (Gaussian Shading) writes a message of bytes into the signs of a code's entries; their sizes stay free. A keyed
permutation deals the entries to the bytes in turn. Those of a byte take the signs of one of the 256 words of a
first-order Reed-Muller code of length 128, repeated as often as there are entries, times keyed signs. So a byte is
read by 256 correlations, which needs about half the entries of a repetition of single bits.

`Ring` (Tree-Ring) replaces the low spatial frequencies of a code by keyed Gaussian ones. It says that the key was
there, and nothing else.

Images of one key and message share their signs, or their low frequencies, and would be alike. So image `i` takes the
variant `i mod variants` of the keyed numbers, and a reader tries them all.

All is sound under one assumption: who does not know the key cannot tell the keyed numbers from random ones. They are
SHAKE-256 of the key, the purpose and the variant. Over random keys, of an image not marked with the key,

- the decoded bits are independent fair coins, because the words are a group: the number that match a message is exactly
  binomial, though the reader chooses geometry and variant by how well they agree with *some* message;
- a likelihood ratio of "marked" to "not marked" has the mean 1 (`evidence` is its logarithm), and so has the average
  over all that was tried: exp(-evidence) is a p-value by Markov's inequality, without the message too;
- the correlation of a ring with its keyed numbers is exactly N(0, 1), and p-values are corrected for all that was
  tried.

References:
    Gaussian Shading, Yang et al., arXiv 2404.04956; Tree-Ring Watermarks, Wen et al., arXiv 2305.20030.

>>> marked = Bits(b"key", 1).embed(torch.randn(1, 1, 16, 16), b"a")
>>> read(Bits(b"key", 1), marked[None]).message
[b'a']
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from hashlib import shake_256

import numpy as np
import torch
from scipy.linalg import hadamard
from scipy.special import bdtrc, ndtri
from torch import Tensor

from pushforward.data.words import many
from pushforward.errors import PushforwardError
from pushforward.execute.system import root_mean_square

__all__ = ["LEAST", "Bits", "Found", "Ring", "longest", "read"]

LEAST = 64  # entries of a code that a byte takes at least
_WORD = 128  # length of a word
_SHARES = (0.15, 0.3, 0.6, 0.9)  # correlations of the codes read with those embedded that a reader reckons with


def longest(shape: Sequence[int]) -> int:
    """The number of bytes that a code of a shape holds at most."""
    return math.prod(shape) // LEAST


@dataclass(frozen=True)
class _Keyed:
    """What all patterns have.

    Args:
        key: any bytes; it is not shown.
    """

    key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not self.key:
            raise PushforwardError("A watermark needs a key; give some text or a file that is not empty.")

    def _stream(self, size: int, purpose: str) -> bytes:
        """The first bytes of the key's numbers for a purpose."""
        head = f"pushforward watermark 1: {len(self.key)} ".encode()
        return shake_256(head + self.key + purpose.encode()).digest(size)


@dataclass(frozen=True)
class Bits(_Keyed):
    """A message in the signs of a code.

    Args:
        key: any bytes; it is not shown.
        length: bytes of the message.
        variants: how many patterns the key stands for.
    """

    length: int
    variants: int = 8

    def embed(self, z: Tensor, message: bytes, first: int = 0) -> Tensor:
        """Codes `(count, *shape)` with the message in their signs; image i takes the variant `first + i`.

        Raises:
            PushforwardError: the message has another length, or is too long for the code.
        """
        self.check(z.shape[1:])
        if len(message) != self.length:
            raise PushforwardError(f"The pattern holds {many(self.length, 'byte')}; got {len(message)}.")
        size = z[0].numel()
        place, column = self._places(size)
        chips = _words()[torch.tensor(list(message), device="cpu")[place], column]
        signs = torch.stack([self._signs(size, (first + i) % self.variants) for i in range(len(z))])
        return z.abs() * (signs * chips).reshape(z.shape).to(z)

    def evidence(self, odds: Tensor, variant: int, message: bytes | None = None) -> tuple[Tensor, Tensor]:
        """Logarithms of likelihoods of a variant in codes, `(shares, count)` both.

        The first is for any message, the second for the one given.

        Args:
            odds: half the log odds that an entry has the sign +, `(shares, count, size)`.
            variant: its number.
            message: the message, if it is known.
        """
        scores = self._scores(odds, variant)
        said = scores.logsumexp(-1).sum(-1) - self.length * math.log(2 * _WORD)
        return said, said if message is None else scores[..., range(self.length), list(message)].sum(-1)

    def bits(self, odds: Tensor, variant: int) -> Tensor:
        """The bits that are most likely in a code, `(8 * length,)`, by its odds `(size,)`; see `evidence`."""
        scores = self._scores(odds, variant)[:, None, :]
        ones = (torch.arange(2 * _WORD, device="cpu") >> torch.arange(7, -1, -1, device="cpu")[:, None]) & 1 == 1
        inside, outside = (scores.masked_fill(~some, -torch.inf).logsumexp(-1) for some in (ones, ~ones))
        return (inside > outside).flatten()

    def _scores(self, odds: Tensor, variant: int) -> Tensor:
        """Log-likelihoods of all words, `(..., length, 256)`."""
        size = odds.shape[-1]
        place, column = self._places(size)
        sums = odds.new_zeros(*odds.shape[:-1], self.length * _WORD)
        sums.index_add_(-1, place * _WORD + column, odds * self._signs(size, variant))
        scores = sums.unflatten(-1, (self.length, _WORD)) @ _words()[:_WORD].T
        return torch.cat([scores, -scores], -1)

    def check(self, shape: Sequence[int]) -> None:
        """Raise unless codes of a shape hold so long a message.

        Raises:
            PushforwardError: they do not.
        """
        most = longest(shape)
        if not 1 <= self.length <= most:
            held = f"hold a message of 1 to {most} bytes; got {self.length}" if most else "are too few for a message"
            raise PushforwardError(f"The code of an image has {math.prod(shape):,} numbers, which {held}.")

    @lru_cache  # noqa: B019 - a few small tensors
    def _places(self, size: int) -> tuple[Tensor, Tensor]:
        """The byte of each entry, and the column of its word, `(size,)` both."""
        words = np.frombuffer(self._stream(8 * size, "places"), "<u8")
        rank = torch.from_numpy(np.argsort(np.argsort(words, kind="stable")))
        return rank % self.length, rank // self.length % _WORD

    def _signs(self, size: int, variant: int) -> Tensor:
        """The keyed signs of a variant, `(size,)`."""
        bits = np.unpackbits(np.frombuffer(self._stream(-(-size // 8), f"signs {variant}"), np.uint8))[:size]
        return torch.from_numpy(1.0 - 2.0 * bits).float()


@dataclass(frozen=True)
class Ring(_Keyed):
    """Keyed numbers at the low spatial frequencies of a code.

    Args:
        key: any bytes; it is not shown.
        variants: how many patterns the key stands for.
        radius: the highest of these frequencies, in parts of the highest frequency along a side.
    """

    variants: int = 8
    radius: float = 0.4

    def embed(self, z: Tensor, first: int = 0) -> Tensor:
        """Codes `(count, *shape)` with the ring; image i takes the variant `first + i`.

        Raises:
            PushforwardError: the codes have no height and width.
        """
        keyed = torch.stack([self._numbers(z.shape[1:], (first + i) % self.variants) for i in range(len(z))])
        return z + self._ring(keyed.to(z) - z)

    def correlations(self, z: Tensor, variant: int) -> Tensor:
        """Correlations of codes `(count, *shape)` with a variant, `(count,)`: N(0, 1) under another key."""
        ring = self._ring(z.double().cpu()).flatten(1)
        size = ring.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
        return ring @ self._numbers(z.shape[1:], variant).flatten() / size

    def _ring(self, z: Tensor) -> Tensor:
        """The part of codes at these frequencies."""
        if z.ndim < 4:
            raise PushforwardError(
                f"A ring is of frequencies along height and width, but codes have shape {tuple(z.shape[1:])}; give a "
                "message."
            )
        height, width = z.shape[-2:]
        rows = torch.fft.fftfreq(height, dtype=torch.float32, device="cpu")[:, None]
        columns = torch.fft.rfftfreq(width, dtype=torch.float32, device="cpu")
        inside = (2 * torch.hypot(rows, columns) <= self.radius).to(z.device)
        return torch.fft.irfft2(torch.fft.rfft2(z) * inside, s=(height, width))

    def _numbers(self, shape: Sequence[int], variant: int) -> Tensor:
        """Keyed normal numbers, float64."""
        words = np.frombuffer(self._stream(8 * math.prod(shape), f"ring {variant}"), "<u8")
        return torch.from_numpy(ndtri(((words >> np.uint64(12)) + 0.5) / 2.0**52)).reshape(*shape)


@dataclass(frozen=True, eq=False)
class Found:
    """What was read from images.

    Args:
        message: most likely message of each image, whether or not it is marked; of rings, nothing.
        p_value: probability that an image which is not marked with the key seems as much marked, at most, `(count,)`.
        evidence: natural logarithm of the likelihood ratio of marked to not marked, `(count,)`; of rings, minus that of
            the p-value.
        correct: share of the message's bits that are right, if it was given, `(count,)`.
        view: number of the view that the message was read from, `(count,)`.
    """

    message: list[bytes]
    p_value: Tensor
    evidence: Tensor
    correct: Tensor | None
    view: Tensor

    def marked(self, rate: float) -> Tensor:
        """Whether each image is marked, `(count,)`, with so many false positives among images that are not."""
        return self.p_value <= rate


def read(pattern: Bits | Ring | Sequence[Bits], views: Tensor, message: bytes | None = None) -> Found:
    """Read a watermark from codes of images.

    Given a message, the p-value is twice the lesser of two: of the number of bits that are right (exactly binomial) and
    of the evidence for it. Else it is of the evidence for any message.

    Args:
        pattern: what the key makes; several, which differ in length, where the message's is not known.
        views: codes `(views, count, *shape)`, each a guess at the codes of the same images.
        message: the message, to see how many of its bits are right.
    """
    count = views.shape[1]
    every = views.flatten(0, 1)
    if isinstance(pattern, Ring):
        found = torch.stack([pattern.correlations(every, v).unflatten(0, (-1, count)) for v in range(pattern.variants)])
        most, which = found.flatten(0, 1).max(0)
        tail = torch.special.log_ndtr(-most) + math.log(found[..., 0].numel())
        return Found([b""] * count, tail.exp().clamp(max=1), -tail, None, which % len(views))
    tried = [(one, v) for one in ([pattern] if isinstance(pattern, Bits) else pattern) for v in range(one.variants)]
    for one, _ in tried:
        one.check(views.shape[2:])
    odds = _odds(every)
    even = (torch.logaddexp(odds, -odds) - math.log(2)).sum(-1)  # of codes without a mark
    ratios = torch.stack(
        [torch.stack(one.evidence(odds, v, message)) - even for one, v in tried]
    )  # (tried, 2, shares, views)
    said, told = ratios.unflatten(3, (-1, count)).movedim(1, 0).double()
    p_value = (evidence := told.flatten(0, 2).logsumexp(0) - math.log(told[..., 0].numel())).neg().exp().clamp(max=1)
    best = [np.unravel_index(int(place), said.shape[:3]) for place in said.flatten(0, 2).argmax(0)]
    bits = [tried[i][0].bits(odds[share, view * count + k], tried[i][1]).numpy()
            for k, (i, share, view) in enumerate(best)]  # fmt: skip
    correct = None
    if message is not None:
        wanted = np.unpackbits(np.frombuffer(message, np.uint8))
        right = np.array([(one == wanted).sum() for one in bits])
        exact = torch.from_numpy(bdtrc(right - 1, len(wanted), 0.5))
        p_value, correct = (2 * torch.minimum(p_value, exact)).clamp(max=1), torch.from_numpy(right / len(wanted))
    view = torch.tensor([int(view) for *_, view in best], device="cpu")
    return Found([np.packbits(one).tobytes() for one in bits], p_value, evidence, correct, view)


def _odds(z: Tensor) -> Tensor:
    """Half the log odds that the entries of codes `(count, *shape)` have the sign +, `(shares, count, size)`."""
    a = z.flatten(1).cpu().float()
    a = a / root_mean_square(a, 1).clamp_min(torch.finfo(a.dtype).tiny)[:, None]
    towards = torch.stack([share / math.sqrt(1 - share**2) * a for share in _SHARES])
    return (torch.special.log_ndtr(towards) - torch.special.log_ndtr(-towards)) / 2


@cache
def _words() -> Tensor:
    """The 256 words of the code, in signs, `(256, 128)`."""
    words = torch.from_numpy(hadamard(_WORD)).float()
    return torch.cat([words, -words])
