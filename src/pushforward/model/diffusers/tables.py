"""The tables `alphas_cumprod` of variance-preserving schedulers, by their settings.

Tables are computed in float64. Those of `diffusers` are float32 and differ by about 1e-5 of their value. Where
`rescale_betas_zero_snr` makes the last entry zero it stays zero; Euler, DPM-Solver and UniPC there put 2^-24, which is
more than the entry before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pushforward.errors import PushforwardError

__all__ = ["Settings", "alphas_cumprod"]

Settings = Mapping[str, Any]


def alphas_cumprod(settings: Settings) -> Tensor:
    """Compute the table `prod (1 - beta)` of a variance-preserving scheduler, float64 `(num_train_timesteps,)`.

    Args:
        settings: `trained_betas`, or `beta_schedule` with `beta_start`, `beta_end` and `num_train_timesteps`;
            `rescale_betas_zero_snr`; `snr_shift_scale`, by which the ratio of signal to noise is divided.

    References:
        linear: Ho et al., arXiv 2006.11239, section 4; scaled_linear: Rombach et al., arXiv 2112.10752;
        squaredcos_cap_v2: Nichol & Dhariwal, arXiv 2102.09672, eq. 17; laplace: Hang et al., arXiv 2407.03297;
        zero terminal SNR: Lin et al., arXiv 2305.08891, algorithm 1; shift: Yang et al., arXiv 2408.06072.

    Raises:
        PushforwardError: the schedule is unknown.
    """
    table = torch.cumprod(1 - _betas(settings), 0)
    shift = settings.get("snr_shift_scale", 1.0)
    table = table / (shift + (1 - shift) * table)
    if settings.get("rescale_betas_zero_snr"):
        signal = table.sqrt()
        table = ((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))).square()
    return table


def _betas(settings: Settings) -> Tensor:
    if settings.get("trained_betas") is not None:
        return torch.tensor(settings["trained_betas"], dtype=torch.float64, device="cpu")
    name, count = settings["beta_schedule"], settings["num_train_timesteps"]
    first, last = settings["beta_start"], settings["beta_end"]
    match name:
        case "linear":
            return torch.linspace(first, last, count, dtype=torch.float64, device="cpu")
        case "scaled_linear":
            return torch.linspace(first**0.5, last**0.5, count, dtype=torch.float64, device="cpu").square()
        case "sigmoid":
            return first + (last - first) * torch.linspace(-6, 6, count, dtype=torch.float64, device="cpu").sigmoid()
    if name not in _SIGNALS:
        known = ", ".join(["linear", "scaled_linear", "sigmoid", *_SIGNALS])
        raise PushforwardError(f"Unknown beta_schedule {name!r}; known are {known}.")
    signal = torch.tensor([_SIGNALS[name](n / count) for n in range(count + 1)], dtype=torch.float64, device="cpu")
    return (1 - signal[1:] / signal[:-1]).clamp_max(0.999)


def _laplace(t: float) -> float:
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6))
    return math.sqrt(snr / (1 + snr))


_SIGNALS: dict[str, Callable[[float], float]] = {
    "squaredcos_cap_v2": lambda t: math.cos(math.pi / 2 * (t + 0.008) / 1.008) ** 2,
    "laplace": _laplace,
    "exp": lambda t: math.exp(-12 * t),
}
