"""Images of which some pixels are known: the others are drawn by a diffusion model.

At every step the known pixels take their places in the network's answer (`guidance.steering.inpainted`), and plans with
`repeats` take each step several times, so that the others come to agree with them.

References:
    RePaint, Lugmayr et al., arXiv 2201.09865; DDNM, Wang et al., arXiv 2212.00490.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pushforward.data.memory import check_images
from pushforward.errors import PushforwardError
from pushforward.guidance.steering import inpainted
from pushforward.maps.code import GaussianStream, derive_seed, numbered
from pushforward.maps.diffusion import Diffusion

__all__ = ["inpaint"]


@torch.no_grad()
def inpaint(
    diffusion: Diffusion,
    images: Tensor,
    known: Tensor,
    *,
    draws: int = 1,
    seed: int = 0,
    first: int | Sequence[int] = 0,
    batch: int = 64,
    callback: Callable[[object], None] | None = None,
) -> Tensor:
    """Images with the same known pixels, `(count, draws, channels, height, width)` in [-1, 1], on the CPU.

    Args:
        diffusion: of images, not of latents, bound to the classes or prompts of the images; with a plan that has
            `repeats` the parts agree better.
        images: in [-1, 1], `(count, channels, height, width)`.
        known: true where a pixel is kept; broadcasts to `images`.
        draws: number of versions of each image.
        seed: seed of the codes; those of an image depend on the seed, its number and the draw's alone.
        first: number of the first image, or the number of each.
        batch: draws at a time.
        callback: told after every network call.

    Raises:
        PushforwardError: a model of latents, shapes that do not fit, or fewer than one draw.
    """
    if draws < 1 or batch < 1:
        raise PushforwardError(f"Inpainting needs 1 draw or more, and as many at a time; got {draws} and {batch}.")
    check_images(len(images) * draws, images.shape[1:])
    inpainted(diffusion.model, images, known)  # what is wrong is said before all work
    where, count = known.bool().expand_as(images), len(images)
    numbers = numbered(first, count)
    diffusion.told(count)
    shape, like = diffusion.model.state_shape(1)[1:], diffusion.draw(1).start
    made = []
    for some in torch.arange(count * draws, device="cpu").split(batch):
        own = some // draws
        keys = [derive_seed(numbers[i], k) for i, k in zip(own.tolist(), (some % draws).tolist(), strict=True)]
        there = diffusion.some(own)
        held = replace(there, model=inpainted(there.model, images[own], where[own]))
        code = GaussianStream(seed, keys, shape).code(diffusion.noises, like)
        found = held.decode(code, callback=callback).float().cpu()
        made.append(torch.where(where[own].cpu(), images[own].float().cpu(), found))
    return torch.cat(made).unflatten(0, (count, draws))
