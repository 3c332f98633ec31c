r"""An exact score: the posterior mean of a Gaussian mixture under any linear diffusion.

Data `x_0 = mu_k + s z`, k uniform. Given k, `u_t` is Gaussian with mean `p mu_k` and covariance
`S = Sigma_t + s^2 p p^T`, where p is the image's column of `Psi(t, 0)` (a number a field, or one a field and
frequency). With `q = S^-1 p`,

    log weight of k = (q . u) . mu_k - 1/2 (q . p) |mu_k|^2 + const,
    E[x_0 | u]      = s^2 (q . u) + (1 - s^2 q . p) sum_k w_k mu_k,

all in the coordinates where the process is diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pushforward.linear import Gaussian, Process


@dataclass(frozen=True, eq=False)
class Mixture:
    """The mixture, as a denoiser.

    Args:
        means: `(components, 1, height, width)`, float64.
        deviation: s, the standard deviation of every component.
    """

    means: Tensor
    deviation: float

    def at(self, process: Process, times: Tensor, like: Tensor) -> Callable[..., Tensor]:
        """See `pushforward.model.Denoiser`."""
        del like
        basis, k = process.basis, process.blocks
        means = basis.forward(self.means).flatten(1)
        psi = process.transition(times, torch.zeros_like(times))
        covariance = Gaussian(self.deviation**2).covariance(process, times)
        p = psi.coefficients[..., :, 0]  # (times, *frequencies, k)
        q = (covariance.inverse().coefficients @ p[..., None])[..., 0]
        spread = self.means.shape[1:] if basis.shape else (1,) * 3
        a = q.movedim(-1, 1).reshape(len(times), k, *spread)
        b = (q * p).sum(-1).reshape(len(times), *spread)
        squares = means.square()
        variance = self.deviation**2

        def ask(index: int | Tensor, u: Tensor, of: Tensor | None = None) -> Tensor:  # noqa: ARG001 - no condition
            v = basis.forward(u.double()).unflatten(1, (k, -1))  # (batch, k, 1, h, w)
            pulled = (a[index] * v).sum(1)
            scale = b[index]  # of all images, or each its own
            energy = scale.expand(*scale.shape[:-3], *self.means.shape[1:]).flatten(-3) @ squares.T
            weights = torch.softmax(pulled.flatten(1) @ means.T - 0.5 * energy, 1)
            centre = (weights @ means).view_as(pulled)
            image = basis.inverse(variance * pulled + (1 - variance * scale) * centre)
            return process.lift(image).to(u.dtype)

        return ask

    def reference(self) -> Gaussian:
        """White, with the mixture's mean image and mean variance."""
        centred = self.means - self.means.mean(0)
        return Gaussian(float(centred.square().mean()) + self.deviation**2, self.means.mean(0))

    def spectrum(self) -> Gaussian:
        """With the mixture's mean image and its variance a DCT frequency."""
        from pushforward.linear import Basis

        centred = Basis(tuple(self.means.shape[2:])).forward(self.means - self.means.mean(0))
        return Gaussian(centred.square().mean((0, 1)) + self.deviation**2, self.means.mean(0))


def mixture(data: Path | None, components: int = 3000, deviation: float = 0.15) -> Mixture:
    """A mixture around images of `data` (an .npz with `x_train`) at 14 x 14, or around synthetic ones."""
    if data is None:
        return Mixture(_synthetic(components), deviation)
    with np.load(data) as arrays:
        images = torch.from_numpy(arrays["x_train"][:components]).double() / 127.5 - 1
    return Mixture(torch.nn.functional.avg_pool2d(images[:, None], images.shape[1] // 14), deviation)


def _synthetic(components: int, size: int = 14) -> Tensor:
    """White strokes on black: short random walks of a round brush."""
    generator = torch.Generator().manual_seed(0)
    place = torch.rand(components, 1, 2, generator=generator, dtype=torch.float64) * 0.5 + 0.25
    turn = torch.randn(components, 12, generator=generator, dtype=torch.float64).mul(0.7).cumsum(1)
    path = place + 0.07 * torch.stack([turn.sin(), turn.cos()], -1).cumsum(1)
    grid = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    far = (path[:, :, 0, None, None] - grid[:, None]).square() + (path[:, :, 1, None, None] - grid).square()
    return 2 * torch.exp(-far / 0.005).amax(1)[:, None] - 1
