r"""What networks predict, and the denoised state it stands for.

Every prediction is linear in the denoised state D and the state u at its time, so it is a pair of operators,
`D = on_state u + on_prediction p`:

| prediction | p | for |
|---|---|---|
| `epsilon` | noise in the root's form, `R^-1 (u - Psi D)` (for scalars the usual noise prediction) | all |
| `sample` | the clean image | all |
| `score` | `-Sigma^-1 (u - Psi D)` | all |
| `residual` | `(D - D_lin) / std`, the deviation from a reference Gaussian's posterior mean, in units of its | |
|  | posterior standard deviation: EDM's preconditioning for any linear diffusion | all |
| `v` | `alpha noise - sigma image` | scalars |
| `velocity` | `du/dt` along the conditional path, `alpha' image + sigma' noise` | scalars |

References:
    v: Salimans & Ho, arXiv 2202.00512, appendix D; residual: Karras et al., arXiv 2206.00364, table 1 and eq. 7;
    epsilon in the root's form: Zhang et al. (gDDIM), arXiv 2206.05564, eq. 9.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.linear import POINT, Gaussian, Operator, Process, ScaledProcess, root

Prediction = Literal["epsilon", "sample", "score", "residual", "v", "velocity"]


def denoising(
    process: Process, prediction: Prediction, t: Tensor, reference: Gaussian = POINT
) -> tuple[Operator, Operator]:
    """Return `on_state, on_prediction` at times `t (n,)`; image predictions count as clean states with no velocity.

    Raises:
        PushforwardError: the prediction is unknown or makes no sense for this process.
    """
    zero = torch.zeros_like(t)
    one = Operator.scalar(torch.ones_like(t), process.blocks)
    match prediction:
        case "sample":
            return one * 0.0, one
        case "epsilon":
            back = process.transition(zero, t)
            return back, -(back @ root(process, t))
        case "score":
            back = process.transition(zero, t)
            return back, back @ process.covariance(t)
        case "residual":
            if not reference:
                raise PushforwardError("The residual prediction needs a reference Gaussian of positive variance.")
            return reference.response(process, t), posterior_scale(process, t, reference)
    if not isinstance(process, ScaledProcess):
        raise PushforwardError(f"The {prediction!r} prediction is for scalar processes; {process.name!r} is not one.")
    alpha, sigma, d_alpha, d_sigma = process.rates(t)
    match prediction:
        case "v":
            on_state, on_prediction = alpha, -sigma
            norm = alpha.square() + sigma.square()
        case "velocity":
            on_state, on_prediction = -d_sigma, sigma
            norm = sigma * d_alpha - d_sigma * alpha
        case _:
            raise PushforwardError(f"Unknown prediction {prediction!r}; known are {', '.join(PREDICTIONS)}.")
    scaled = (Operator.scalar(c / norm, basis=process.basis) for c in (on_state, on_prediction))
    return next(scaled), next(scaled)


PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "sample", "score", "residual", "v", "velocity")


def is_image(prediction: Prediction) -> bool:
    """Say whether the network's output is an image without a velocity, whatever the process."""
    return prediction in ("sample", "residual")


def posterior_scale(process: Process, t: Tensor, reference: Gaussian) -> Operator:
    """Return the deviation of the clean image given the state, for the reference's data: `sqrt(C / (1 + snr_C))`."""
    variance = reference.variance
    scale = (variance / (1 + reference.snr(process, t))).sqrt()
    basis = process.basis if process.basis.shape else reference.basis
    if process.blocks == 1:
        return Operator.scalar(scale, basis=basis)
    zero = torch.zeros_like(scale)
    return Operator.block([[scale, zero], [zero, zero]], basis)
