r"""What a fixed point over a chain has left when it stops: an estimate on the safe side, made of what its rounds show.

A move's size is no error. With the notation of `execute.system`, the network's true derivatives J and the linear
system's answer `G = M^-1 B` to answers, a round that moves the states by Delta leaves the errors

    e = K (e + Delta),    K = G (J - L).

Two readings of this are taken, each with a margin, and the larger one counts:

- *The moves' tail*. Moves shrink by a rate; those to come are a geometric series with the worse of the last two rates.
  It begins at the last move, or at the greatest surprise of an answer if that is more: an answer is an image, and where
  modes part, a small move of a state makes it another image, which the states after it have yet to follow.
- *The chain's sum*. Node by node, in sizes (root mean squares in units of the marginals' deviations),

      e_n <= sum_{k < n} |G_nk| g_k (e_k + rho_k),    g_k = |J_k - L_k|,

  rho being the part of Delta that past rounds do not explain. `G` is known before any network call, and the gains g_k
  are measured: where a state has moved by Delta_k since the network was asked about it, its next answer is off what was
  expected of it by `(J_k - L_k) Delta_k`. In the sum is what a step that is no longer asked leaves behind, for its
  rho_k stays, and how later steps amplify it. Its transpose says how far each step's part reaches in the end: so steps
  are let go.

Answers are rounded, each by itself: that adds `sqrt(sum_k (G_nk noise_k)^2)` to every node, amplified as moves were. It
is reported with the rest, and no number of rounds takes it away.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pushforward.denoiser import Denoiser, Wrapper
from pushforward.execute.system import System

TAIL, CHAIN = 2.0, 3.0  # margins of the two readings
RATES = (0.3, 0.9)  # between these a measured rate is believed
LINEAR = 0.05  # no estimate above this is trusted to end the rounds: it is made of linear parts
AMPLIFIED = 10.0  # at most, a rounding: the moves of one round are not all that later ones come from
FADING = 0.5  # of a gain, when a later move finds a smaller one
ROUNDING = 0.75  # of a network's answer, in units of its dtype's eps and of the greatest answer; U-Nets had .3 to .5
ARITHMETIC = 6.0  # of a state, in units of the eps of its own dtype: the sums over many steps
_NUMBERS = 2**24  # of the matrices solved at a time


def tail(moves: Sequence[Tensor], surprise: Tensor | None = None) -> Tensor:
    """Estimate what is left after these moves by their rates, `(batch,)` each; before there are two, by the worst.

    Args:
        moves: the greatest of each round so far, in order; the last three count.
        surprise: the greatest of the last round's answers less what was expected of them, as an error of the image.
    """
    last, rate = moves[-1], torch.full_like(moves[-1], RATES[1])
    if len(moves) > 2:
        rate = torch.maximum(moves[-2] / moves[-3], last / moves[-2]).nan_to_num(RATES[1]).clamp(*RATES)
    begin = last if surprise is None else torch.maximum(last, surprise)
    return TAIL * begin * rate / (1 - rate)


def amplification(moves: Sequence[Tensor], rounding: Tensor) -> Tensor:
    """Say how far states have gone on from a round of small moves, in parts of its move, at most: `(batch,)`.

    A move is a defect of the equations, solved for as if they were the reference's; so this is how defects are
    amplified, roundings of answers among them.

    Args:
        moves: the greatest of each round so far, in order, each `(batch,)`.
        rounding: a move within thrice this says nothing, `(batch,)`.
    """
    each = torch.stack(list(moves))
    gone = each.flip(0).cumsum(0).flip(0)
    return torch.where((each > 3 * rounding) & (each <= LINEAR), gone / each, 1.0).amax(0).clamp_max(AMPLIFIED)


def roundoff(denoiser: Denoiser, like: Tensor) -> float:
    """Return the rounding of the network's answers, in parts of the greatest: eps of its least precise dtype."""
    own = ARITHMETIC * torch.finfo(like.dtype).eps
    weight = 1.0
    while isinstance(denoiser, Wrapper):
        denoiser = denoiser.inner
    kind = like.device.type
    dtypes = {torch.get_autocast_dtype(kind)} if torch.is_autocast_enabled(kind) else set()
    module, autocast = getattr(denoiser, "module", None), getattr(denoiser, "autocast", None)
    if isinstance(module, nn.Module):
        dtypes |= {p.dtype for p in module.parameters() if p.is_floating_point()}
        guidance = getattr(denoiser, "guidance", 1.0)
        weight = (guidance**2 + (1 - guidance) ** 2) ** 0.5
    if autocast is not None:
        dtypes.add(autocast)
    return max(own, *(ROUNDING * weight * torch.finfo(dtype).eps for dtype in dtypes), own)


class Remainder:
    """The chain's sum and the rounding of every image, kept up from round to round, in float64 on the CPU.

    Args:
        system: the plan's.
        batch: images.
        noise: rounding of an answer, in parts of the greatest one (see `roundoff`).
    """

    def __init__(self, system: System, batch: int, noise: float):
        self._asked, self._noise = torch.tensor(system.asked, device="cpu"), noise
        self._squares, self._last = system.influence.square(), system.influence[-1]
        self._chain = -system.influence[self._asked].tril(-1)
        self._deviations, self._end = system.deviations[self._asked, None], system.deviations[-1]
        shape = (len(self._asked), batch)
        self._gains = torch.full(shape, torch.nan, dtype=torch.float64, device="cpu")
        self._moved = torch.zeros(shape, dtype=torch.float64, device="cpu")  # since it was asked
        self._left = self._moved
        self._base = torch.zeros(system.size, batch, dtype=torch.float64, device="cpu")

    def asked(self, wanted: Tensor, surprises: Tensor, answers: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
        """Measure gains where the network was asked.

        Args:
            wanted: where, `(nfe, batch)`.
            surprises: sizes of the answers less what was expected of them, `(nodes, batch)`.
            answers: sizes of the answers, `(nodes, batch)`.
            moves: sizes of the moves that the round asks for then, `(nodes, batch)`.

        Returns:
            What rounding alone leaves in every node, `(nodes, batch)`, and the greatest surprise, as an error of the
            last state, `(batch,)`.
        """
        *tables, counted = _cpu(surprises, answers, moves, wanted)
        (off, own, self._asking), wanted = (table[self._asked] for table in tables), counted.bool()
        sizes = own * self._deviations
        noise = self._noise * sizes.amax(0) / self._deviations
        told = wanted & (self._moved > 4 * noise)
        gain = (off - 2 * noise).clamp_min(0) / self._moved
        kept = FADING * self._gains.nan_to_num(0.0)
        self._gains = torch.where(told, torch.maximum(gain, kept), self._gains)
        self._moved, self._left = (torch.where(wanted, 0.0, x) for x in (self._moved, self._left))
        self._base = (self._squares @ noise.square()).sqrt()
        surprise = (off - 2 * noise).clamp_min(0) * self._deviations / self._end
        return self._base, torch.where(wanted, surprise, 0.0).amax(0)

    def moved(self, moves: Tensor, unexplained: Tensor) -> Tensor:
        """Return the errors left in the last state, `(batch,)`.

        Args:
            moves: sizes of what the states have moved by in the round, `(nodes, batch)`.
            unexplained: the parts of these sizes that past rounds do not explain, `(nodes, batch)`.
        """
        moves, unexplained = (table[self._asked] for table in _cpu(moves, unexplained))
        self._left = self._leaving(unexplained)
        self._moved = self._moved + moves
        gains = self._believed()
        return CHAIN * (self._last @ self._solved(gains, gains * self._left)).nan_to_num(torch.inf)

    def reach(self) -> Tensor:
        """Return what each asked step would leave in the last state if it were let go now, `(nfe, batch)`."""
        left, gains = self._leaving(self._asking), self._believed()
        none = self._gains.isnan().all(0)
        end = self._last[:, None].expand_as(gains)
        part = CHAIN * gains * left * self._solved(gains, end, transposed=True)
        return torch.where(left == 0, 0.0, torch.where(none, torch.inf, part)).nan_to_num(torch.inf)

    def _believed(self) -> Tensor:
        """Return gains; one that was not measured yet counts as the greatest of its image that was."""
        return torch.where(self._gains.isnan(), self._gains.nan_to_num(0.0).amax(0), self._gains)

    def _leaving(self, moves: Tensor) -> Tensor:
        """Return moves of the asked steps since they were last asked, rounding apart, `(nfe, batch)`."""
        return self._left + (moves - self._base[self._asked]).clamp_min(0)

    def _solved(self, gains: Tensor, sources: Tensor, *, transposed: bool = False) -> Tensor:
        """Return `(1 - diag(g) G)^-1` applied to sources, `(nfe, batch)`, image by image."""
        count, batch = gains.shape
        pieces = []
        for some in torch.arange(batch, device="cpu").split(max(1, _NUMBERS // count**2)):
            matrix = gains[:, some].T[..., None] * self._chain  # its ones are understood
            matrix = matrix.mT if transposed else matrix
            pieces.append(
                torch.linalg.solve_triangular(
                    matrix, sources[:, some].T[..., None], upper=transposed, unitriangular=True
                )[..., 0]
            )
        return torch.cat(pieces).T


def _cpu(*tables: Tensor) -> Sequence[Tensor]:
    """Return tables of as many columns in float64 on the CPU, copied together: a copy waits for the GPU."""
    copied = torch.cat([table.to(tables[0].dtype) for table in tables]).to("cpu", torch.float64)
    pieces: Sequence[Tensor] = copied.split([len(table) for table in tables])
    return pieces
