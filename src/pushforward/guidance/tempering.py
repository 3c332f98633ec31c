"""Ladders of tempered chains: weights of the energy from 1 down to 0, between which states are swapped.

A chain that sits in one mode of its posterior leaves it over the prior, where there are no walls. Rung k of a ladder
has the limit `exp(-|x|^2 / 2 - beta_k E(x))`, from `beta_0 = 1`, whose states are the samples, to `beta_K = 0`, the
prior itself, which is drawn anew at every move and so forgets all. Neighbours i and i + 1 swap with the probability

    min(1, exp((beta_i - beta_{i+1}) (E_i - E_{i+1}))),

which keeps the limit of all rungs together. Every other pair is tried, then the others, in the same order at every
move: this order is not reversible, and carries states up and down the ladder instead of to and fro.

What neighbours refuse, summed along the ladder, is the barrier between the prior and the posterior. The warm-up spaces
the rungs evenly along it, so that all pairs refuse alike; each ladder by its own moves.

References:
    Non-Reversible Parallel Tempering, Syed et al., arXiv 1905.02939 (order of the swaps, barrier, spacing).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Ladder", "spacings"]

_POWER = 4  # in whose root the first weights are even: barriers are steep where the weight is small


@dataclass(frozen=True, eq=False)
class Ladder:
    """The rungs of all chains after a move.

    Args:
        betas: weight of the energy, `(rungs, chains)`, float64, from 1 to 0.
        fresh: 1 where a state has come from the prior and not yet been at weight 1, `(rungs, chains)`, else 0.
    """

    betas: Tensor
    fresh: Tensor

    @classmethod
    def begun(cls, rungs: int, like: Tensor) -> Ladder:
        """Before the first move, of as many chains as `like (chains,)` has, in its dtype."""
        even = torch.linspace(1, 0, rungs, device="cpu", dtype=torch.float32).to(like)
        betas = even.pow(_POWER)[:, None].repeat(1, len(like))
        return cls(betas, torch.zeros_like(betas))

    def swapped(self, energies: Tensor, luck: Tensor) -> tuple[Ladder, Tensor, Tensor, Tensor]:
        """Try all pairs of neighbours once, from the prior on.

        Args:
            energies: `(rungs, chains)`, float64; what is not finite is not swapped towards greater weights.
            luck: uniform numbers, `(rungs - 1, chains)`.

        Returns:
            The ladder, the rung that each rung's state comes from, the probabilities of swapping `(rungs - 1, chains)`,
            and which chains have a state at weight 1 that has come from the prior anew, `(chains,)`, 0 or 1.
        """
        rungs = len(energies)
        order = torch.arange(rungs, device=energies.device)[:, None].repeat(1, energies.shape[1])
        chances = torch.zeros_like(luck)
        gaps = self.betas[:-1] - self.betas[1:]
        for parity in (rungs % 2, 1 - rungs % 2):  # the pair of the prior is in the first half
            pairs = torch.arange(parity, rungs - 1, 2, device=order.device)
            one, other = order[pairs], order[pairs + 1]
            gain = gaps[pairs] * (energies.gather(0, one) - energies.gather(0, other))
            chances[pairs] = torch.where(energies.gather(0, other).isfinite(), gain.clamp(max=0).exp(), 0.0)
            taken = luck[pairs] < chances[pairs]
            order[pairs], order[pairs + 1] = torch.where(taken, other, one), torch.where(taken, one, other)
        fresh = self.fresh.clone()
        fresh[-1] = 1
        fresh = fresh.gather(0, order)
        arrived = fresh[0].clone()
        fresh[0] = 0
        return replace(self, fresh=fresh), order, chances, arrived

    def spaced(self, chances: Tensor) -> Ladder:
        """The ladder with weights at which all neighbours should swap alike often.

        Args:
            chances: probabilities of swapping at some moves with the present weights, `(moves, rungs - 1, chains)`.
        """
        rungs, moves = len(self.betas), len(chances)
        refused = ((1 - chances).sum(0) + 0.5) / (moves + 1)  # as if one more had been refused by half: none is 0
        barrier = torch.cat([torch.zeros_like(refused[:1]), refused.cumsum(0)])
        even = barrier[-1] * torch.linspace(0, 1, rungs, device="cpu", dtype=torch.float32).to(barrier)[:, None]
        place = torch.searchsorted(barrier.T.contiguous(), even.T.contiguous()).T.clamp(1, rungs - 1)
        low, high = barrier.gather(0, place - 1), barrier.gather(0, place)
        share = ((even - low) / (high - low)).clamp(0, 1)
        roots = self.betas.pow(1 / _POWER)
        betas = torch.lerp(roots.gather(0, place - 1), roots.gather(0, place), share).pow(_POWER)
        betas[0], betas[-1] = 1, 0
        return replace(self, betas=betas)


def spacings(warmed: int) -> frozenset[int]:
    """The moves of a warm-up after which weights are spaced anew, counted from 1: its end, half of it, a quarter."""
    return frozenset(done for k in range(warmed.bit_length()) if (done := math.ceil(warmed / 2**k)) > 1)
