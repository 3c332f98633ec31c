r"""The density of a path of a stochastic plan: how probable each of its random moves was.

A node that takes noise has a Gaussian law, given the nodes before it:

    u_n ~ N(m_n, N_n N_n^T),        m_n = sum_j A_nj u_j + sum_j B_nj D_j,        D_j = E[u_0 | u_j].

Where N_n is singular (the velocity alone has noise in Langevin diffusion, some frequencies alone in blurring), the law
lives on the directions that it reaches, and so does the density; a state that differs from m_n elsewhere has density 0.
All states of the path are known, so the network is asked about all of them in one round (`execute.encode`), and its
parameters get gradients: what reinforcement learning of a diffusion model needs.

References:
    Training Diffusion Models with Reinforcement Learning, Black et al., arXiv 2305.13301, equation 7;
    DPOK, Fan et al., arXiv 2305.16381.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.denoiser import Denoiser
from pushforward.errors import PushforwardError
from pushforward.execute.encode import Solving, Unmixing
from pushforward.execute.sequential import Noise, check_start, run
from pushforward.plan import Plan

__all__ = ["Path", "check_stochastic", "log_densities", "log_density", "walk"]


@dataclass(frozen=True, eq=False)
class Path:
    """What is random of a plan's states.

    Args:
        start: the first state, `(batch, k * channels, *field)`.
        states: states of the nodes that take noise, `(noises, batch, k * channels, *field)`.
        last: the last state, like the first.
    """

    start: Tensor
    states: Tensor
    last: Tensor

    def __getitem__(self, images: slice | Tensor) -> Path:
        """Return the paths of some images."""
        return Path(self.start[images], self.states[:, images], self.last[images])


def check_stochastic(plan: Plan) -> None:
    """Raise unless a plan has random moves, one after another.

    Raises:
        PushforwardError: it is deterministic or implicit.
    """
    if not plan.noises:
        raise PushforwardError(
            f"The plan of {plan.solver!r} is deterministic, so its paths have no density: raise its eta or noise, or "
            "take ddpm."
        )
    if plan.implicit:
        raise PushforwardError(f"The plan of {plan.solver!r} is implicit; only explicit plans have paths.")


def walk(plan: Plan, denoiser: Denoiser, start: Tensor, noise: Noise) -> Path:
    """Return a path of `run`.

    Raises:
        PushforwardError: as `run`, or a plan that is deterministic.
    """
    check_stochastic(plan)
    states: dict[int, Tensor] = {}
    last = run(plan, denoiser, start, noise=noise, record=states.__setitem__)
    return Path(start, torch.stack([states[k] for k in plan.noises]), last)


def log_densities(
    plan: Plan, denoiser: Denoiser, path: Path, *, moves: Sequence[int] | None = None, rows: int = 64
) -> Tensor:
    """Return the logarithm of the density of each random move of a path, `(moves, batch)`; see above.

    Differentiable in the network's parameters and in the path.

    Args:
        plan: stochastic and explicit.
        denoiser: the network.
        path: of this plan, under this network or another one.
        moves: numbers of the moves, counted from 0; all by default. The network is asked about what these need, for one
            as a rule about one state: so the graph of a large network fits into memory.
        rows: states that the network sees at a time.

    Raises:
        PushforwardError: a deterministic or implicit plan, a path of another one, or moves that it has not.
    """
    check_stochastic(plan)
    check_start(plan, path.start)
    shape = (len(plan.noises), *path.start.shape)
    if tuple(path.states.shape) != shape:
        raise PushforwardError(
            f"A path of this plan of {plan.solver!r} has states of shape {shape}; got {tuple(path.states.shape)}."
        )
    if moves is not None and not set(moves) <= set(range(len(plan.noises))):
        raise PushforwardError(
            f"The random moves of this plan of {plan.solver!r} are 0 to {len(plan.noises) - 1}; got {list(moves)}."
        )
    nodes = plan.noises if moves is None else [plan.noises[move] for move in moves]
    solving = Solving(plan, denoiser, path.start, rows)
    states = {0: path.start, **dict(zip(plan.noises, path.states, strict=True))}
    wanted = {k: plan.basis.forward(state) for k, state in states.items()}
    solving.solve(wanted, dict(solving.fixed), among=nodes)
    return torch.stack([log_density(solving.noises[k], solving.unmixings[k], plan, solving.reached[k]) for k in nodes])


def log_density(noise: Tensor, how: Unmixing, plan: Plan, reached: Tensor | None = None) -> Tensor:
    """Return the logarithm of the density of the states to which a noise leads, `(batch,)`.

    Args:
        noise: standard normal where it counts, `(batch, k * channels, *field)`, in pixels.
        how: the noise's.
        plan: whose it is.
        reached: images whose states it leads to, `(batch,)`; the others have density 0.
    """
    rest = noise[0].numel() // (plan.process.blocks * math.prod(plan.basis.shape))  # numbers at each frequency
    size = rest * (float(how.log_size.sum()) + 0.5 * math.log(2 * math.pi) * int(how.rank.sum()))
    found = -0.5 * noise.flatten(1).square().sum(1) - size
    return found if reached is None else torch.where(reached, found, -math.inf)
