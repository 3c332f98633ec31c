r"""The density that a model gives to images: a change of variables along its probability flow.

Along `du/dt = f(u, t)` the density changes by `d log p / dt = -div f`, and in the end the states have the codes' law.
With a reference Gaussian N(m, C), of root R_t and response L_t (see `linear.gaussian`),
a state is `u_t = Psi m + R_t z`, and the flow of process and network becomes

    dz/dt = R^-1 B (D(u, t) - m - L (u - Psi m)),        d log p(z) / dt = -tr B (J - L),        J = dD / du,

B being the flow's coefficient of answers. Expansion by R_t has a determinant in closed form, and what is integrated is
only how the network differs from the reference: nothing for the reference's own data. Runge and Kutta's method of order
four takes equal steps in `log(1 + 2 c alpha / sigma)`, c the data's deviation, which is finite without signal.

The trace is summed over all numbers of an image, or estimated: `E[e^T (J - L) B e]` for random signs e (Hutchinson),
drawn anew in every second step. Half as many steps with the same signs say what the steps' length changes.

A velocity is drawn from the reference's law given the image, and its density divided out. The result's expectation is
then at most the image's, and equal to it if the model's velocity has the reference's law.

References:
    Score-Based Generative Modeling through SDEs, Song et al., arXiv 2011.13456, section 4.3 and appendix D.2;
    FFJORD, Grathwohl et al., arXiv 1810.01367;
    Critically-Damped Langevin Diffusion, Dockhorn et al., arXiv 2112.07068, appendix B.6 (the bound over velocities).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pushforward.data.memory import check_memory
from pushforward.denoiser import Denoiser
from pushforward.errors import PushforwardError
from pushforward.linear import Gaussian, Operator, Process, root
from pushforward.plan.grid import STEP, solve_for_time

__all__ = ["STAGES", "log_density"]

STAGES = 6  # network calls for each step, with those of steps twice as long
_NEAR = 1e-9  # part of the time that is left out where there is no signal, and its logarithm not finite


def log_density(
    process: Process,
    denoiser: Denoiser,
    images: Tensor,
    *,
    reference: Gaussian,
    start: Gaussian,
    steps: int,
    draw: Callable[[], Tensor],
    exact: bool = False,
    end: float | None = None,
    callback: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the logarithm of the density of images, in nats.

    It is that of images with the noise of the time `end`, at `Psi x`, per unit of x.

    Args:
        process: the diffusion.
        denoiser: the network, differentiable in its states.
        images: `(batch, channels, *field)`, of the dtype and on the device that the network's states shall have.
        reference: Gaussian whose flow is subtracted. A white one serves trained networks: on images of Fashion-MNIST
            probes erred no more than beside a variance per frequency.
        start: Gaussian of the data whose marginal at `t_max` states begin with.
        steps: number of steps, even.
        draw: next standard normal of each image, shaped like `images`: velocities, then probes.
        exact: sum the trace over all numbers of an image, by as many products for each network call.
        end: the time of the images, `t_min` by default.
        callback: told after every network call how many states it saw.

    Returns:
        The values, `(batch,)`, float64, on the CPU, and those with half as many steps.

    Raises:
        PushforwardError: steps that are not even, an end out of range, or a value that is not finite.
    """
    end = process.t_min if end is None else end
    if steps < 2 or steps % 2:
        raise PushforwardError(
            f"A likelihood takes an even number of steps, for it is compared with half of them; got {steps}."
        )
    if not 0 < end < process.t_max:
        raise PushforwardError(
            f"Images have a time between 0 and t_max = {process.t_max:g}, by default t_min = {process.t_min:g}; got "
            f"{end:g}."
        )
    check_memory(steps * (STEP + 4 * images.numel()), f"A likelihood in {steps:,} steps")
    flow = _Flow(process, denoiser, images, reference, end, steps, exact, callback)
    w, size = _begin(process, images, reference, flow.times[0], draw)
    z = flow.root[0].inverse()(flow.marginal(0).cholesky()(w))
    velocity = w[:, images.shape[1] :]
    size += _log_size(flow.root[-1], images) - _log_size(flow.root[0], images) - _normal(velocity)
    probes = None if exact else [draw().double().sign() for _ in range(steps // 2)]
    found = []
    for stride in (1, 2):
        last, trace = flow.follow(z, probes, stride)
        code, expansion = _code(process, flow, last, start, images)
        found.append(size + trace + _normal(code) - expansion)
    if not bool(torch.stack(found).isfinite().all()):
        raise PushforwardError("The log-likelihood of an image is not finite; check the network and the images.")
    return found[0], found[1]


class _Flow:
    """The flow in the reference's coordinates, at the times of all stages, from the images on."""

    def __init__(
        self,
        process: Process,
        denoiser: Denoiser,
        like: Tensor,
        reference: Gaussian,
        end: float,
        steps: int,
        exact: bool,
        callback: Callable[[int], None] | None,
    ):
        self._process, self._reference, self._like = process, reference, like
        self._exact, self._callback, self._constant = exact, callback, False
        scale = 2 * float(reference.variance.mean().sqrt()) or 1.0

        def variable(t: Tensor) -> Tensor:
            return -torch.log1p(scale * process.log_snr(t).exp())

        low, high = torch.tensor([end, process.t_max], dtype=torch.float64, device="cpu")
        if not bool(process.log_snr(high).isfinite()):
            high = high * (1 - _NEAR)
        first, last = variable(low), variable(high)
        self._length = float(last - first) / steps
        places = first + (last - first) * torch.linspace(0, 1, 2 * steps + 1, dtype=torch.float64, device="cpu")
        times = solve_for_time(variable, places[1:-1], high, low)
        self.times = times = torch.cat([low[None], times, high[None]])
        signal = scale * process.log_snr(times).exp()
        pace = -(1 + signal) / (signal * process.log_snr_rate(times))  # dt / d variable
        self.root = root(process, times, reference)
        self._on_answer = process.flow(times)[1] * pace
        self._slope = self.root.inverse() @ self._on_answer
        self._response = reference.response(process, times)
        self._psi = process.signal(times)
        self._state = torch.zeros(_state_shape(process, like), dtype=torch.float64, device="cpu")
        self._mean = reference.mean_state(process, self._state)
        with torch.no_grad():  # what all calls share has no graph
            self._ask = denoiser.at(process, times, self._state.to(like))

    def marginal(self, k: int) -> Operator:
        """Return the covariance of the reference's marginal at a time."""
        return self._reference.covariance(self._process, self.times[k])

    def state(self, k: int, z: Tensor) -> Tensor:
        """Return the state at `z`."""
        u = self.root[k](z)
        return u if self._mean is None else u + self._psi[k](self._mean)

    def follow(self, z: Tensor, probes: list[Tensor] | None, stride: int) -> tuple[Tensor, Tensor]:
        """Return the last coordinates from the first ones, and the integrated trace, in steps of so many."""
        h, trace = stride * self._length, torch.zeros(len(z), dtype=torch.float64, device="cpu")
        for k in range(0, len(self.times) - 1, 2 * stride):
            probe = None if probes is None else probes[k // 4]
            one, t1 = self._rates(k, z, probe)
            two, t2 = self._rates(k + stride, z + h / 2 * one, probe)
            three, t3 = self._rates(k + stride, z + h / 2 * two, probe)
            four, t4 = self._rates(k + 2 * stride, z + h * three, probe)
            z = z + h / 6 * (one + 2 * two + 2 * three + four)
            trace += h / 6 * (t1 + 2 * t2 + 2 * t3 + t4)
        return z, trace

    def _rates(self, k: int, z: Tensor, probe: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return rates of the coordinates and of the trace."""
        u = self.state(k, z)
        with torch.enable_grad():
            state = u.to(self._like).requires_grad_()
            answer = self._ask(k, state)
        if not (answer.requires_grad or self._constant):
            self._check_constant(k, state.detach(), answer)
        rest = answer.detach().to(u) - self._response[k](self.root[k](z))
        if self._mean is not None:
            rest = rest - self._mean
        trace = torch.zeros(len(u), dtype=torch.float64, device="cpu")
        every = self._units() if probe is None else (probe,)
        for e in every:
            lifted = self._process.lift(e)
            back = -self._response[k].T(lifted)
            if answer.requires_grad:
                (product,) = torch.autograd.grad(answer, state, lifted.to(answer), retain_graph=self._exact,
                                                 materialize_grads=True)  # fmt: skip
                back = back + product.to(back)
            trace += (back * self._on_answer[k](lifted)).flatten(1).sum(1)
        if self._callback is not None:
            self._callback(len(u))
        return self._slope[k](rest), trace

    def _check_constant(self, k: int, state: Tensor, answer: Tensor) -> None:
        """Raise unless answers that have no gradient do not depend on the state either."""
        if not torch.equal(self._ask(k, state + 1), answer):
            raise PushforwardError(
                "A likelihood needs the gradient of the network's answers, which PyTorch cannot differentiate; let the "
                "network do without torch.no_grad, inference mode and detach."
            )
        self._constant = True

    def _units(self) -> list[Tensor]:
        """Every number of an image in turn."""
        shape = self._like.shape
        units = torch.eye(self._like[0].numel(), dtype=torch.float64, device="cpu").view(-1, 1, *shape[1:])
        return list(units.expand(-1, *shape))


def _begin(
    process: Process, images: Tensor, reference: Gaussian, time: Tensor, draw: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return images' states, white under the reference, and the logarithm of their scale's part that is no root."""
    x = images.detach().to("cpu", torch.float64)
    psi, factor = process.signal(time), reference.covariance(process, time).cholesky()
    kept = Operator.scalar(psi.entry(0, 0), basis=psi.basis)
    scale = Operator.scalar(factor.entry(0, 0), basis=factor.basis)
    w = scale.inverse()(kept(x - reference.mean.to(x)))
    size = torch.full((len(x),), _log_size(kept, images), dtype=torch.float64, device="cpu")
    if process.blocks > 1:
        size += _log_size(Operator.scalar(factor.entry(1, 1), basis=factor.basis), images)
        w = torch.cat([w, draw().to(w)], 1)
    return w, size


def _code(process: Process, flow: _Flow, z: Tensor, start: Gaussian, images: Tensor) -> tuple[Tensor, float]:
    """Return the codes of the last coordinates, and the logarithm of how much larger states are."""
    u, time = flow.state(-1, z), flow.times[-1]
    mean = start.mean_state(process, u)
    if mean is not None:
        u = u - process.signal(time)(mean)
    factor = start.covariance(process, time).cholesky()
    return factor.inverse()(u), _log_size(factor, images)


def _state_shape(process: Process, images: Tensor) -> tuple[int, ...]:
    return len(images), process.blocks * images.shape[1], *images.shape[2:]


def _log_size(operator: Operator, images: Tensor) -> float:
    """Return the logarithm of the determinant, on states of images."""
    c = operator.coefficients
    sizes = c[..., 0, 0] if operator.blocks == 1 else torch.linalg.det(c)
    return float(sizes.abs().log().sum()) * images[0].numel() / sizes.numel()


def _normal(z: Tensor) -> Tensor:
    """Return the logarithm of the standard normal density, `(batch,)`."""
    z = z.flatten(1)
    return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))
