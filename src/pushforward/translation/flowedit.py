r"""Editing without codes: the difference of two paths, followed by the difference of two models' answers.

Let the source's state at a time be a noised image, `s = Psi x + sigma noise`, and the target's be `s + d`. Both rows of
a plan are linear in state and answer, so their difference is the same row,

    d_{n+1} = a d_n + b (D_target(s_n + d_n) - D_source(s_n)),      d_0 = 0,

and the edited image is `x + Psi^-1 d` at the last time. With flow matching and Euler's steps this is FlowEdit; here it
is for any deterministic explicit plan. The noise is drawn anew at every time.

FlowAlign guides from the source's prompt to the target's at the target's state, and pulls the target's denoised state
to the source's: that is the same row with `b` less by `PULL` of the units of flow matching, `alpha + sigma`.

References:
    FlowEdit, Kulikov et al., arXiv 2412.08629, algorithm 1; FlowAlign, Kim et al., arXiv 2505.23145, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pushforward.denoiser import Ask, Denoiser
from pushforward.errors import PushforwardError
from pushforward.execute import run
from pushforward.linear import Operator, Process, ScaledProcess
from pushforward.maps.code import GaussianStream, numbered
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.passes import last_states
from pushforward.plan import Plan, Register

__all__ = ["flowedit"]

PULL = 0.01  # of FlowAlign, per step


@torch.no_grad()
def flowedit(
    images: Tensor,
    source: Diffusion,
    target: Diffusion,
    *,
    align: float | None = None,
    seed: int = 0,
    first: int | Sequence[int] = 0,
    callback: Callable[[Any], None] | None = None,
) -> Tensor:
    """Edit images by the difference of the answers at both ends; `(count, channels, height, width)`.

    Args:
        images: in [-1, 1], `(count, channels, height, width)`.
        source: where the images come from, bound to what they show.
        target: where they go, bound to what they shall show, with the same plan: deterministic, and explicit.
        align: weight of guidance from the source's condition to the target's, for FlowAlign.
        seed: seed of the noise; image i's depends on the seed and its number alone.
        first: number of the first image, or the number of each.
        callback: told after every pair of network calls.

    Raises:
        PushforwardError: a plan that takes noises or is implicit, or two processes.
    """
    plan, process = target.plan, target.model.process
    if plan.noises or plan.implicit or source.model.process != process:
        raise PushforwardError(
            "FlowEdit needs one process for both ends and a deterministic, explicit plan: ddim with eta 0."
        )
    clean = last_states(target, images)
    noise = GaussianStream(seed, numbered(first, len(images)), clean.shape[1:])
    one, other = (end.model_for(len(images)).denoiser for end in (source, target))
    difference = _Difference(one, other, clean, noise, align)
    plan = plan if align is None else _pulled(plan)
    moved = run(plan, difference, torch.zeros_like(clean), callback=callback)
    moved = process.signal(plan.times[-1:])[0].inverse()(moved)
    return target.model.images(clean + moved).float().cpu()


@dataclass(frozen=True)
class _Difference:
    """A denoiser of differences: the target's answer about `s + d`, less the source's about `s`."""

    source: Denoiser
    target: Denoiser
    clean: Tensor
    noise: GaussianStream
    align: float | None

    def at(self, process: Process, times: Tensor, like: Tensor) -> Ask:
        """See `Denoiser`; times are asked about once each, in order."""
        source, target = (end.at(process, times, like) for end in (self.source, self.target))
        signal, spread = process.signal(times), process.covariance(times).cholesky()

        def ask(k: int | Tensor, u: Tensor, of: Tensor | None = None) -> Tensor:
            state = signal[int(k)](self.clean) + spread[int(k)](self.noise.draw().to(u))
            answer = target(k, state + u, of)
            if self.align is not None:
                answer = torch.lerp(source(k, state + u, of), answer, self.align)
            return answer - source(k, state, of)

        return ask


def _pulled(plan: Plan) -> Plan:
    """The plan of one-step rows whose answers count less by FlowAlign's pull."""
    process = plan.process
    if not isinstance(process, ScaledProcess) or process.basis.shape:
        raise PushforwardError(f"FlowAlign is for scalar processes; {process.name!r} is not one.")
    alpha, sigma = process.alpha_sigma(plan.node_times)
    nodes = [plan.nodes[0]]
    for n, node in enumerate(plan.nodes[1:]):
        answer = Register("answer", n)
        less = node.terms[answer] + Operator.scalar(-PULL * (alpha + sigma)[n + 1])
        nodes.append(replace(node, terms={**node.terms, answer: less}))
    return replace(plan, nodes=tuple(nodes))
