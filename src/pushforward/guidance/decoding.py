"""Decoding again and again, with gradients, the network evaluations of each image counted.

Where all steps are taken at once, an image's next decoding begins at its last trajectories (`Parallel.start`). It ends
at the same image, to the tolerance, whatever it began at; what is begun anew, such as a resumed run, takes a few rounds
more at first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from pushforward.data.memory import free_memory
from pushforward.denoiser import Watched
from pushforward.errors import PushforwardError
from pushforward.execute import Exact, Solution
from pushforward.maps.base import ModelMap
from pushforward.maps.code import Code
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.generator import Generator
from pushforward.maps.protocol import Pushforward

__all__ = ["Counted"]


@dataclass(frozen=True, eq=False)
class Counted:
    """A map, and how often its network was asked about each image.

    A diffusion for which no way of differentiating was chosen takes `Exact`, with the memory of one network call; where
    no gradient is asked for, none.

    Args:
        pushforward: the map.
        nfe: network evaluations of each image so far, `(count,)`, added to in place; a vector-Jacobian product counts
            as one, and a decoding of what is no diffusion as one, whether differentiated or not.
        trails: where the decodings begin, if all steps are taken at once.
    """

    pushforward: Pushforward
    nfe: Tensor
    trails: Trails | None = None

    @classmethod
    def of(cls, pushforward: Pushforward, count: int, *, gradient: bool = True) -> Counted:
        """None so far, of `count` images, whose decodings are differentiated if there is to be a `gradient`.

        Raises:
            PushforwardError: this is no map, or it is bound to labels of another number of images.
        """
        if not isinstance(pushforward, Pushforward):
            raise PushforwardError(
                f"What makes images of codes is a map, as model.diffusion('dpm++', 10) gives it; got {pushforward!r}."
            )
        place = pushforward.draw(1).start.device
        if isinstance(pushforward, ModelMap):
            pushforward.model_for(count)
        elif isinstance(pushforward, Generator):
            pushforward.labels_for(count)
        if isinstance(pushforward, Diffusion):
            way = pushforward.gradient or Exact()
            pushforward = pushforward.run_by(gradient=way if gradient else None)
        return cls(pushforward, torch.zeros(count, dtype=torch.long, device=place), Trails.of(pushforward, count))

    def some(self, which: Tensor) -> Pushforward:
        """The map of images `which (n,)`, whose evaluations are counted as long as it is a diffusion."""
        there = self.pushforward.some(which)
        if not isinstance(there, Diffusion):
            return there

        def count(*_: Tensor, of: Tensor | None, **__: object) -> None:
            images = which if of is None else which[of]
            self.nfe.index_add_(0, images, torch.ones_like(images))

        return there.around(lambda denoiser: Watched(denoiser, count))

    def decode(self, code: Code, which: Tensor) -> Tensor:
        """The images numbered `which (n,)`, whose codes these are, `(n, channels, height, width)`."""
        there = self.some(which)
        if not isinstance(there, Diffusion):
            self.nfe.index_add_(0, which, torch.ones_like(which))
            return there.decode(code)
        if self.trails is None or there.parallel is None or there.parallel.start != "reference":
            return there.decode(code)
        x = code.variables().detach()
        there = there.run_by(parallel=replace(there.parallel, start=self.trails.near(x, which)))
        return there.decode(code, found=partial(self.trails.keep, x, which))


_ROOM = 0.25  # part of the free memory that trails may take
_BACK = -1.0  # weight of the farther trajectory, at least


@dataclass(eq=False)
class Trails:
    """Two trajectories of each image with their codes: the last one, and the one it began at.

    A chain that rejects a move goes on from the one, a chain that accepts it from the other; and a descent's next step
    is much like its last.

    Args:
        count: images.
        states: states of all nodes, `(2, nodes, count, ...)`; empty before the first decoding.
        answers: answers about all asked nodes, `(2, nfe, count, ...)`.
        codes: variables, `(2, count, numbers)`.
        known: which there are, `(2, count)`.
    """

    count: int
    states: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    answers: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    codes: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    known: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))

    @classmethod
    def of(cls, pushforward: Pushforward, count: int) -> Trails | None:
        """None so far, of `count` images; `None` where steps are not taken at once, or there is no room."""
        if not isinstance(pushforward, Diffusion) or pushforward.parallel is None:
            return None
        plan, place = pushforward.plan, pushforward.draw(1).start
        needed = 2 * (2 * len(plan.nodes) + plan.nfe) * place.nbytes * count
        return cls(count) if needed < _ROOM * free_memory(place.device) else None

    def near(self, x: Tensor, which: Tensor) -> Solution | Literal["reference"]:
        """The point nearest to codes `x (n, numbers)` of images `which (n,)` on the line through their trajectories."""
        if not len(self.states):
            return "reference"
        codes, known = self.codes[:, which], self.known[:, which]
        far = (codes - x).square().sum(2).masked_fill(~known, math.inf)
        order, every = far.argsort(0), torch.arange(len(which), device=x.device)
        (base, other), both = codes[order, every], known.all(0)
        along, step = x - base, other - base
        part = ((along * step).sum(1) / step.square().sum(1)).nan_to_num(0.0).clamp(_BACK, 1.0)
        part = torch.where(both, part, 0.0)

        def mixed(kept: Tensor) -> Tensor:
            one, two = (kept[k, :, which].movedim(0, 1) for k in order)
            weight = part.view(1, -1, *[1] * (one.ndim - 2)).to(one)
            return one + weight * (two - one)

        none = torch.zeros(len(which), device=x.device)
        return Solution(mixed(self.states), 0, none.long(), none, ~known.any(0), mixed(self.answers))

    def keep(self, x: Tensor, which: Tensor, solution: Solution) -> None:
        """Put the trajectories of codes in the place of those that are farther from them."""
        if not len(self.states):
            self.states, self.answers, self.codes = (
                part.new_zeros(2, *shape)
                for part, shape in (
                    (solution.states, (len(solution.states), self.count, *solution.states.shape[2:])),
                    (solution.answers, (len(solution.answers), self.count, *solution.answers.shape[2:])),
                    (x, (self.count, x.shape[1])),
                )
            )
            self.known = torch.zeros(2, self.count, dtype=torch.bool, device=x.device)
        good = (~solution.diverged).nonzero()[:, 0]
        rows, x = which[good], x[good]
        far = (self.codes[:, rows] - x).square().sum(2).masked_fill(~self.known[:, rows], math.inf)
        place = far.argmax(0)
        self.states[place, :, rows] = solution.states[:, good].movedim(1, 0)
        self.answers[place, :, rows] = solution.answers[:, good].movedim(1, 0)
        self.codes[place, rows], self.known[place, rows] = x, True
