r"""What a network in training is asked, and what it should answer.

Given the clean image x and white noise xi, a state is `u_t = Psi(t, 0) x + L_t xi` with `L_t L_t^T = Sigma_t`, and
every kind of prediction p is linear in x and u: `x = on_state u + on_prediction p` (see `model.prediction`). So what
the network sees and what it should answer are both *linear in x and xi*, with coefficients known beforehand:

    u      = Psi x + L xi,
    target = on_prediction^-1 (x - on_state u).

`TargetTable` holds these coefficients at many times. One code therefore trains VP, VE, flow matching, blurring and
Langevin diffusions, with any prediction. The times are equally spaced in the whitening angle of the data's reference
Gaussian, so that no noise level is neglected.

References:
    Karras et al., arXiv 2206.00364, section 5 (preconditioning); Zhang et al. (gDDIM), arXiv 2206.05564, eq. 9 and
    algorithm 1 (the R-form of epsilon).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.linear import Gaussian, Operator, Process, apply_coefficients
from pushforward.model.network import inverse_deviation
from pushforward.model.prediction import Prediction, denoising, is_image
from pushforward.plan.grid import spread_times
from pushforward.training.batches import Batch

__all__ = ["TIMES", "Objective", "TargetTable"]

MOST_NOISE, MOST_LEFT = 0.1, 0.1  # deviation of the noise at t_min, and variance of the data at t_max in units of it
TIMES = 1024  # so many that a network cannot tell them from a continuum


@dataclass(frozen=True, eq=False)
class TargetTable:
    """Questions and right answers: coefficients of states and targets on (image, noise) at a table of times.

    Args:
        process: the diffusion.
        times: float64 `(n,)`.
        state: `Psi` and `L`, batched over the times.
        target: the same two coefficients of what should be predicted.
        input_scale: by which the network's input is multiplied, as `Network` does with an `input_reference`.
        image_only: whether predictions are images without a velocity.
    """

    process: Process
    times: Tensor
    state: tuple[Operator, Operator]
    target: tuple[Operator, Operator]
    input_scale: Operator
    image_only: bool

    @classmethod
    def make(cls, process: Process, prediction: Prediction, reference: Gaussian, count: int = TIMES) -> TargetTable:
        """The table at `count` times equally spaced in the reference's whitening angle."""
        _check_ends(process, reference)
        times = spread_times(process, reference, count)
        psi = process.signal(times)
        noise = process.covariance(times).cholesky()
        on_state, on_prediction = denoising(process, prediction, times, reference)
        if is_image(prediction):
            inverse = Operator.scalar(1 / on_prediction.entry(0, 0), process.blocks, on_prediction.basis)
        else:
            inverse = on_prediction.inverse()
        one = Operator.scalar(torch.ones_like(times), process.blocks)
        target = inverse @ (one - on_state @ psi), -(inverse @ on_state @ noise)
        scale = inverse_deviation(reference.covariance(process, times))
        table = cls(process, times, (psi, noise), target, scale, is_image(prediction))
        for operator in (*table.state, *table.target, scale):
            if not operator.is_finite():
                raise PushforwardError(
                    f"Prediction {prediction!r} of {process.name!r} is infinite at some times; use 'residual'."
                )
        return table

    def draw(self, images: Tensor, k: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The network's input and target at times `k (batch,)` for clean images and white noise."""
        basis = self.process.basis
        x = basis.forward(self.process.lift(images))
        state = _combine(self.state, k, x, noise, len(basis.shape))
        target = _combine(self.target, k, x, noise, len(basis.shape))
        if self.image_only:
            target = self.process.image(target)
        seen = apply_coefficients(self.input_scale.coefficients[k], basis.inverse(state), 0)
        return seen, basis.inverse(target)

    def to(self, device: torch.device) -> TargetTable:
        """The same on a device, in single precision."""

        def move(o: Operator) -> Operator:
            return Operator(o.coefficients.to(device, torch.float32), o.basis)

        state, target = ((move(a), move(b)) for a, b in (self.state, self.target))
        return replace(self, state=state, target=target, input_scale=move(self.input_scale))


@dataclass(frozen=True, eq=False)
class Objective:
    """What a network is trained for, on its device.

    Args:
        table: of questions and answers.
        clock: the table's times as the network is told them, `(n,)`.
    """

    table: TargetTable
    clock: Tensor

    @classmethod
    def on(cls, device: torch.device, table: TargetTable, time_scale: float) -> Objective:
        """The objective on a device, of a network that is told `time_scale` times the time."""
        return cls(table.to(device), (time_scale * table.times).to(device, torch.float32))

    def loss(self, network: Callable[..., Tensor], batch: Batch) -> Tensor:
        """The mean square of what the network answers less what it should."""
        seen, target = self.table.draw(batch.images, batch.k, batch.noise)
        answer = network(seen, self.clock[batch.k], batch.condition)
        return (answer.float() - target).square().mean()


def _check_ends(process: Process, reference: Gaussian) -> None:
    """Raise unless images are all but clean at `t_min`, and all but noise at `t_max`, from which they are drawn.

    Raises:
        PushforwardError: they are not.
    """
    ends = torch.tensor([process.t_min, process.t_max], dtype=torch.float64, device="cpu")
    first, last = process.log_snr(ends).exp().tolist()
    noise, left = 1 / first, last**2 * float(reference.variance.max())
    if left > MOST_LEFT:
        raise PushforwardError(
            f"Images could not be drawn from noise: with these parameters of {process.name!r}, they still have "
            f"{left:.2g} times its variance at t_max = {process.t_max:g}, where {MOST_LEFT:g} is the most. Let more "
            "noise in, or raise t_max."
        )
    if noise > MOST_NOISE:
        raise PushforwardError(
            f"Images could not be drawn clean: with these parameters of {process.name!r}, values in [-1, 1] have noise "
            f"of {noise:.2g} even at t_min = {process.t_min:g}, where {MOST_NOISE:g} is the most. Lower t_min, or let "
            "noise in more slowly."
        )


def _combine(pair: tuple[Operator, Operator], k: Tensor, x: Tensor, noise: Tensor, frequencies: int) -> Tensor:
    on_image, on_noise = (operator.coefficients[k] for operator in pair)
    return apply_coefficients(on_image, x, frequencies) + apply_coefficients(on_noise, noise, frequencies)
