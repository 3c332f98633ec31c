"""Images of which some pixels are known: the others are drawn by a diffusion model.

At every step the known pixels take their places in the network's answer (`inpainted`), and plans with `repeats` take
each step several times, so that the others come to agree with them.

References:
    RePaint, Lugmayr et al., arXiv 2201.09865; DDNM, Wang et al., arXiv 2212.00490.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from pushforward.data.memory import check_images
from pushforward.errors import PushforwardError
from pushforward.guidance.altered import Altered, Change
from pushforward.linear import Process
from pushforward.maps.code import GaussianStream, batches, derive_seed, numbered, whole_numbers
from pushforward.maps.diffusion import Diffusion
from pushforward.model import Model

__all__ = ["inpaint", "inpainted"]


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
    (draws,) = whole_numbers("Draws", draws)
    if draws < 1:
        raise PushforwardError(f"Inpainting needs 1 draw or more of each image; got {draws}.")
    pieces = batches(len(images) * draws, batch)
    check_images(len(images) * draws, images.shape[1:])
    inpainted(diffusion.model, images, known)  # what is wrong is said before all work
    where, count = known.bool().expand_as(images), len(images)
    numbers, every = numbered(first, count), torch.arange(count * draws, device="cpu")
    diffusion.model_for(count)
    shape, like = diffusion.model.state_shape(1)[1:], diffusion.draw(1).start
    made = []
    for some in pieces:
        own, turn = every[some] // draws, every[some] % draws
        keys = [derive_seed(numbers[i], k) for i, k in zip(own.tolist(), turn.tolist(), strict=True)]
        there = diffusion.some(own)
        held = replace(there, model=inpainted(there.model, images[own], where[own]))
        code = GaussianStream(seed, keys, shape).code(diffusion.noises, like)
        found = held.decode(code, callback=callback).float().cpu()
        made.append(torch.where(where[own].cpu(), images[own].float().cpu(), found))
    return torch.cat(made).unflatten(0, (count, draws))


def inpainted(model: Model, image: Tensor, mask: Tensor) -> Model:
    """Make a model whose answers contain the known pixels of an image.

    A plan that ends at time 0 with the answer itself (ddim, ddpm and all of first order) ends with these pixels. The
    network fills in the others by what it sees around them, and it sees the known pixels only as noisy as the state is:
    take each step several times to make them agree (see `plan.recurrence`).

    Args:
        model: a model of images, not of latents.
        image: image in [-1, 1], `(channels, *field)`; or one per image of every batch, `(count, channels, *field)`.
        mask: true where a pixel is known; broadcasts to `image`.

    Raises:
        PushforwardError: the model diffuses latents, or the shapes do not fit it.

    References:
        DDNM, Wang et al., arXiv 2212.00490, algorithm 1 (for a mask); RePaint, Lugmayr et al., arXiv 2201.09865, which
        holds the pixels of the noisy state instead.
    """
    if model.decoder is not None:
        raise PushforwardError(
            f"Model {model.name!r} diffuses latents, which have no pixels to hold; steer it by an energy instead."
        )
    images = image.unsqueeze(0) if image.ndim == len(model.shape) else image
    try:
        known = mask.bool().expand_as(images)
    except RuntimeError:
        known = None
    if known is None or tuple(images.shape[1:]) != model.shape:
        raise PushforwardError(
            f"Model {model.name!r} inpaints images of shape {model.shape} with a mask that broadcasts to them; got "
            f"shapes {tuple(image.shape)} and {tuple(mask.shape)}."
        )
    return replace(model, denoiser=Altered(model.denoiser, partial(_inpainting, images, known)))


def _inpainting(
    images: Tensor, known: Tensor, process: Process, times: Tensor, like: Tensor, trained: bool  # noqa: ARG001
) -> Change:  # fmt: skip
    held, where = images.to(like), known.to(like.device)

    def change(ask: Callable[[Tensor], Tensor], k: int | Tensor, u: Tensor, of: Tensor | None) -> Tensor:  # noqa: ARG001
        denoised = ask(u)
        image = process.image(denoised)
        rows = slice(None) if of is None or len(held) == 1 else of
        if len(held[rows]) not in (1, len(u)):
            raise PushforwardError(
                f"{len(held)} images with known pixels do not fit a batch of {len(u)}; give one for all, or one per "
                "image of a batch, as `guidance.inpaint` does."
            )
        return torch.cat([torch.where(where[rows], held[rows], image), denoised[:, image.shape[1] :]], 1)

    return change
