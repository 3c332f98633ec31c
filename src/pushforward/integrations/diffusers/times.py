"""Times of a pipeline: what the network is told at the process's times, and the grids that pipelines give."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.linear import Discrete, Flow, Process, ScaledProcess
from pushforward.model import Model, Network
from pushforward.plan.grid import bent, check_grid, solve_for_time

__all__ = ["Given", "Times"]

_ROUNDED = 1e-2  # published lists of sigmas have two or three digits


class Given(NamedTuple):
    """A grid that a pipeline gives.

    Args:
        times: where the steps begin, and the end.
        timesteps: what the network is told there, if not its own times.
    """

    times: Tensor
    timesteps: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Times:
    """The times of a pipeline's network.

    Args:
        model: process, network and grid of the pipeline's configuration.
        config: the configuration.
        told: times, increasing, and what the network is told there, if not its own times.
    """

    model: Model
    config: Mapping[str, Any]
    told: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def network(self) -> Network:
        """The model's network."""
        network = self.model.denoiser
        assert isinstance(network, Network)
        return network

    def to_network(self, t: Tensor) -> Tensor:
        """Return the network's times at the process's."""
        network = self.network
        if self.told is not None:
            return torch.as_tensor(np.interp(t.numpy(), *self.told), device="cpu")
        return network.time_scale * t + network.time_shift if network.clock is None else network.clock(t)

    def telling(self, times: Tensor, told: Tensor) -> Times:
        """Return these where the network is told `told` at `times`; at the end its own time, if it has one."""
        end = self.to_network(times[-1:])
        if len(told) < len(times):
            told = torch.cat([told, end if end.isfinite() else told[-1:]])
        if not bool((told.diff() < 0)[:-1].all()) or told[-1] > told[-2]:
            raise PushforwardError(f"Timesteps must decrease; got {told.tolist()}.")
        return replace(self, told=(times.flip(0).numpy(), told.flip(0).numpy()))

    def to_pipeline(self, t: Tensor) -> Tensor:
        """Return the network's times as pipelines get them: whole numbers if all are."""
        clock = self.to_network(t)
        whole = isinstance(self.model.process, Discrete) and bool((clock - clock.round()).abs().max() < 1e-6)
        return clock.round().long() if whole else clock.float()

    def from_network(self, clock: Any) -> Tensor:
        """Return the process's times at the network's, float64 on the CPU."""
        process, wanted = self.model.process, torch.as_tensor(clock, dtype=torch.float64, device="cpu")
        first = 0.0 if isinstance(process, Flow) else process.t_min
        ends = torch.tensor([first, process.t_max], dtype=torch.float64, device="cpu")
        low, high = self.to_network(ends).tolist()
        slack = 1e-5 * (high - low)
        if not bool(((wanted >= low - slack) & (wanted <= high + slack)).all()):
            raise PushforwardError(f"The timesteps of this model lie in [{low:g}, {high:g}]; got {_listed(wanted)}.")
        return solve_for_time(self.to_network, wanted, ends[1], ends[0])

    def scales_like(self, sample: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return signal and noise scale at timesteps `(batch,)` or `(1,)`, to multiply images with."""
        alpha, sigma = self.scales(self.from_network(timesteps).flatten())
        shape = (-1, *[1] * (sample.ndim - 1))
        return alpha.to(sample).view(shape), sigma.to(sample).view(shape)

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return signal and noise scale at the process's times."""
        assert isinstance(self.model.process, ScaledProcess)  # as all are that configurations describe
        return self.model.process.alpha_sigma(t)

    def given(self, count: int, timesteps: Any, sigmas: Any, mu: float | None) -> Given | None:
        """Return the grid that the pipeline gives, or says how to make; `None` if it is the configuration's."""
        process, config = self.model.process, self.config
        final = self.final
        shifted = config.get("use_dynamic_shifting") or config.get("shift_terminal")
        told = None if timesteps is None else torch.as_tensor(timesteps, dtype=torch.float64, device="cpu")
        if sigmas is not None:
            sigmas = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
        elif isinstance(process, Flow) and told is None and shifted:
            sigmas = self._unshifted(count)
        if isinstance(process, Flow) and sigmas is not None:
            times = self._shifted(sigmas, mu)
        elif sigmas is not None:
            *starts, final = _times_at(process, sigmas).tolist()
            times = torch.tensor(starts, dtype=torch.float64, device="cpu")
        elif told is not None:
            times = self.from_network(told)
        else:
            return None
        if count != len(times) or (told is not None and len(told) != count):
            there = f"{len(times)} steps" if told is None else f"{len(told)} timesteps, at {len(times)} times"
            raise PushforwardError(
                f"The grid of {count} steps that is asked for, and what is given, must agree; got {there}."
            )
        within = times[: -1 if times[-1] <= final + 1e-12 else None]  # a last step that begins at the end moves nothing
        grid = check_grid(process, torch.cat([within, torch.tensor([final], dtype=torch.float64, device="cpu")]))
        return Given(grid, None if sigmas is None else told)

    def _unshifted(self, count: int) -> Tensor:
        """Return the times of a flow model's steps before their shift, where the pipeline says only how many."""
        last = self.model.grid.get("last")
        if last is None:  # of schedulers with a `flow_shift`
            least = 1 / self.config["num_train_timesteps"]
            return torch.linspace(1, least, count + 1, dtype=torch.float64, device="cpu")[:-1]
        return torch.linspace(1, last, count, dtype=torch.float64, device="cpu")

    def _shifted(self, times: Tensor, mu: float | None) -> Tensor:
        """Return a flow model's times, moved as the configuration says."""
        config = self.config
        if not bool(((times >= 0) & (times <= 1)).all()):
            raise PushforwardError(f"The sigmas of a flow model are times in [0, 1]; got {times.tolist()}.")
        shift = self.model.grid.get("shift", 1.0)
        if config.get("use_dynamic_shifting"):
            if mu is None:
                raise PushforwardError(
                    "This model's grid is shifted by the size of the image: give mu, or the scheduler a grid."
                )
            shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
        spread = self.model.grid.get("spread") if self.model.grid["name"] == "shifted" else None
        return bent(times, shift=shift, terminal=config.get("shift_terminal"), spread=spread)

    @property
    def final(self) -> float:
        """Where the grid ends, by the configuration."""
        grid = self.model.grid
        return grid.get("final", grid.get("end", 0.0))


def _times_at(process: Process, sigmas: Tensor) -> Tensor:
    """Return times at decreasing ratios of noise to signal, of which the last may be 0."""
    low, high = torch.tensor([process.t_min, process.t_max], dtype=torch.float64, device="cpu")

    def ratio(t: Tensor) -> Tensor:
        return torch.exp(-process.log_snr(t))

    least, most = ratio(low).item(), ratio(high).item()
    inside = (sigmas >= least * (1 - _ROUNDED)) & (sigmas <= most * (1 + _ROUNDED))
    inside[-1] |= sigmas[-1] == 0
    if not bool(inside.all()):
        raise PushforwardError(
            f"The sigmas of this model lie in [{least:.4g}, {most:.4g}], or end at 0; got {_listed(sigmas)}. A "
            "pipeline that gives others goes by the class of its scheduler; leave it that scheduler."
        )
    return torch.where(sigmas > 0, solve_for_time(ratio, sigmas, high, low), 0.0)


def _listed(values: Tensor) -> str:
    """Return numbers for a message."""
    return ", ".join(f"{value:.6g}" for value in values.flatten().tolist())
