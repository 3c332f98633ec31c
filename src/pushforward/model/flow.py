"""Scalar diffusions as flow matching: one network, with its times and states in other units.

Two processes `alpha x + sigma n` with equal signal-to-noise ratios differ by a factor. Flow matching, with `1 - t` and
`t`, has the ratio of a process at its time `s` where `t = sigma_s / (alpha_s + sigma_s)`, and there the states of the
process are `alpha_s + sigma_s` times the flow's. So a network trained for one is asked for the other, exactly.

References:
    Flow Matching for Generative Modeling, Lipman et al., arXiv 2210.02747, section 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.denoiser import Ask, Wrapper
from pushforward.errors import PushforwardError
from pushforward.linear import Flow, Process, ScaledProcess
from pushforward.plan.grid import solve_for_time

__all__ = ["AsFlow", "flow_of"]


@dataclass(frozen=True)
class AsFlow(Wrapper):
    """A denoiser of flow matching that asks one of another process.

    Args:
        inner: the denoiser that is asked.
        own: its process.
    """

    own: ScaledProcess

    def at(self, process: Process, times: Tensor, like: Tensor) -> Ask:  # noqa: ARG002 - it is flow matching
        """See `Denoiser`."""
        bounds = (torch.tensor(t, dtype=torch.float64, device="cpu") for t in (self.own.t_max, 0.0))
        own = solve_for_time(lambda s: _time(self.own, s), times, *bounds)
        ask = self.inner.at(self.own, own, like)
        alpha, sigma = self.own.alpha_sigma(own)
        scales = (alpha + sigma).to(like)

        def asked(k: int | Tensor, u: Tensor, of: Tensor | None = None) -> Tensor:
            scale = scales[k].view(-1, *[1] * (u.ndim - 1))
            return ask(k, scale * u, of)

        return asked


def flow_of(process: Process) -> Flow:
    """Return the flow matching that has a process's signal-to-noise ratios, from its first time to its last.

    Raises:
        PushforwardError: the process is not scalar.
    """
    if not isinstance(process, ScaledProcess) or process.basis.shape:
        raise PushforwardError(
            f"Only a scalar process, one signal and one noise scale for all values, is a flow; {process.name!r} is not."
        )
    low, high = _time(process, torch.tensor([process.t_min, process.t_max], dtype=torch.float64, device="cpu")).tolist()
    return Flow(t_min=low, t_max=high)


def _time(process: ScaledProcess, s: Tensor) -> Tensor:
    alpha, sigma = process.alpha_sigma(s)
    return sigma / (alpha + sigma)
